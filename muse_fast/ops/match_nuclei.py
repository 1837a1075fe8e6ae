"""Find the rows that show the same nucleus in two views (the matching step of NuLo)."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from muse_fast.ops import backends, reference


@overload
def match_nuclei(
    index: Tensor,
    offsets: Tensor,
    num_rois: int,
    num_globals: int,
    *,
    capacity: None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


@overload
def match_nuclei(
    index: Tensor, offsets: Tensor, num_rois: int, num_globals: int, *, capacity: int, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]: ...


def match_nuclei(
    index: Tensor,
    offsets: Tensor,
    num_rois: int,
    num_globals: int,
    *,
    capacity: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """Pair the rows of equal nucleus index, for every global view g and every view v != g of the same ROI.

    Args:
        index: ``[N]`` int32, nucleus index of every packed row; sorted and unique within an image.
        offsets: ``[V * B + 1]`` int32; image ``v * B + b`` has rows ``offsets[v * B + b] : offsets[v * B + b + 1]``.
        num_rois: B.
        num_globals: G; views 0 to G - 1 are the teacher's.
        capacity: None, or the length of the results. ``G * N`` is always enough, as a row is the student of each
            global at most once.
        backend: ``reference``, ``cpp`` or ``cuda`` to force one.

    Returns:
        ``(teacher [P], student [P])``, both int64 rows of the packed nuclei, ordered by g, then v, then ROI, then
        index. Globals come first in the pack, so teacher rows are also valid in a pack of only the globals. On CUDA
        the host synchronises once, to read P.

        With a capacity, ``(teacher [capacity], student [capacity], count [])``: the same pairs, truncated or padded
        with -1, and P (int64). On CUDA the host does not synchronise.

    Raises:
        ValueError: wrong shape, dtype or count, or a forced backend that cannot run; also offsets that do not rise from
            0 to N, and unsorted rows (RuntimeError from ``cpp`` and ``cuda``). With a capacity on CUDA, these two
            yield a negative count and a device-side assertion, which surfaces at the next synchronisation.
    """
    _check(index, offsets, num_rois, num_globals)
    if capacity is not None and capacity < 0:
        raise ValueError(f"match_nuclei: capacity must not be negative, got {capacity}")
    if backends.choose("match_nuclei", index.device.type, backend) == "reference":
        return reference.match_nuclei(index, offsets, num_rois, num_globals, capacity=capacity)
    pack = index.contiguous(), offsets.contiguous()
    if capacity is None:
        return torch.ops.muse_fast.match_nuclei(*pack, num_rois, num_globals)
    teacher, student, count = torch.ops.muse_fast.match_nuclei_padded(*pack, num_rois, num_globals, capacity)
    if count.is_cuda:  # the device reports an invalid pack without a host synchronisation; on the CPU the op raised
        torch._assert_async(
            count >= 0,
            "match_nuclei: offsets must rise from 0 to N, and the rows of an image must be sorted by nucleus index, "
            "each index once",
        )
    return teacher, student, count


def _check(index: Tensor, offsets: Tensor, num_rois: int, num_globals: int) -> None:
    """Check everything that does not require reading the rows."""
    for name, tensor in (("index", index), ("offsets", offsets)):
        if tensor.dtype != torch.int32 or tensor.dim() != 1:
            raise ValueError(f"match_nuclei: {name} must be 1-D int32, got {tensor.dim()}-D {tensor.dtype}")
    if index.device != offsets.device:
        raise ValueError(f"match_nuclei: index is on {index.device}, offsets on {offsets.device}")
    images = offsets.numel() - 1
    if num_rois < 1 or images < 0 or images % num_rois:
        raise ValueError(f"match_nuclei: offsets must have V * {num_rois} + 1 entries, got {offsets.numel()}")
    if not 1 <= num_globals <= images // num_rois:
        raise ValueError(
            f"match_nuclei: num_globals must be in 1..{images // num_rois} (the views in offsets), got {num_globals}"
        )


if backends.library_error() is None:

    @torch.library.register_fake("muse_fast::match_nuclei")
    def _(index: Tensor, offsets: Tensor, num_rois: int, num_globals: int) -> tuple[Tensor, Tensor]:
        num_pairs = torch.library.get_ctx().new_dynamic_size()
        return index.new_empty(num_pairs, dtype=torch.int64), index.new_empty(num_pairs, dtype=torch.int64)

    @torch.library.register_fake("muse_fast::match_nuclei_padded")
    def _(
        index: Tensor, offsets: Tensor, num_rois: int, num_globals: int, capacity: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        teacher, student = (index.new_empty(capacity, dtype=torch.int64) for _ in range(2))
        return teacher, student, index.new_empty((), dtype=torch.int64)
