"""The gradients of queries, keys and values of several resolutions, joined into one matrix."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from muse_fast.ops import backends, reference


def join_heads(
    parts: Sequence[Tensor], with_sums: bool = False, *, backend: str | None = None
) -> tuple[Tensor, Tensor | None]:
    """Join the heads of each token, then q, k and v, then the rows of all resolutions.

    ``triton`` reads and writes each value once and sums it on the way; ``reference`` reads the result again for the
    sums. Part of a backward, so it has no gradient itself.

    Args:
        parts: q, k and v of each resolution in turn, floating point of one dtype: three
            ``[images, tokens, heads, d]``, with the same heads and d everywhere.
        with_sums: whether sums are wanted.
        backend: ``reference`` or ``triton`` to force one.

    Returns:
        ``[M, 3 * heads * d]``, rows ordered by resolution, image and token; and its column sums, for ``triton`` in
        float32, else in its dtype, or None.

    Raises:
        ValueError: wrong shape, dtype or device, or a forced backend that cannot run.
    """
    _check(parts)
    if backends.choose("join_heads", parts[0].device.type, backend, parts[0].dtype) == "triton":
        from muse_fast.kernels.fused.join_heads import join_heads as fused  # needs triton

        joined, sums = fused(parts)
        return joined, sums if with_sums else None
    return reference.join_heads(parts, with_sums)


def _check(parts: Sequence[Tensor]) -> None:
    shapes = [tuple(part.shape) for part in parts]
    if not parts or len(parts) % 3 or any(len(shape) != 4 or shape[2:] != shapes[0][2:] for shape in shapes):
        raise ValueError(f"join_heads: expected q, k, v [images, tokens, heads, d] per resolution, got {shapes}")
    if shapes[::3] != shapes[1::3] or shapes[::3] != shapes[2::3]:
        raise ValueError(f"join_heads: q, k and v of a resolution must have one shape, got {shapes}")
    first = parts[0]
    if not first.dtype.is_floating_point or any(p.dtype != first.dtype or p.device != first.device for p in parts):
        given = [f"{part.dtype} on {part.device}" for part in parts]
        raise ValueError(f"join_heads: parts must have one floating point dtype and device, got {given}")
