"""Which rows show the same nucleus in two views (the matching step of NuLo)."""

from __future__ import annotations

import torch
from torch import Tensor

from muse_fast.ops import backends, reference


def match_nuclei(
    index: Tensor, offsets: Tensor, num_rois: int, num_globals: int, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Pair the rows of equal nucleus index, for every global view g and every view v != g of the same ROI.

    Args:
        index: ``[N]`` int32, nucleus index of every packed row; inside an image sorted and unique.
        offsets: ``[V * B + 1]`` int32, rows of image ``v * B + b`` are ``offsets[v * B + b] : offsets[v * B + b + 1]``.
        num_rois: B.
        num_globals: G; views 0 to G - 1 are the teacher's.
        backend: ``reference``, ``cpp`` or ``cuda`` to force one.

    Returns:
        ``(teacher [P], student [P])``, both int64 rows of the packed nuclei, by g, then v, then ROI, then index.
        Globals come first in the pack, so a teacher row also counts in a pack of the globals alone. On CUDA the host
        waits for the device once, to learn P.

    Raises:
        ValueError: wrong shape, dtype or count, or a forced backend that cannot run. Offsets that do not rise from 0
            to N and unsorted rows are refused too (RuntimeError from ``cpp`` and ``cuda``).
    """
    _check(index, offsets, num_rois, num_globals)
    if backends.choose("match_nuclei", index.device.type, backend) in ("cpp", "cuda"):
        return torch.ops.muse_fast.match_nuclei(index.contiguous(), offsets.contiguous(), num_rois, num_globals)
    return reference.match_nuclei(index, offsets, num_rois, num_globals)


def _check(index: Tensor, offsets: Tensor, num_rois: int, num_globals: int) -> None:
    for name, tensor in (("index", index), ("offsets", offsets)):
        if tensor.dtype != torch.int32 or tensor.dim() != 1:
            raise ValueError(f"match_nuclei: {name} must be 1-D int32, got {tensor.dim()}-D {tensor.dtype}")
    if index.device != offsets.device:
        raise ValueError(f"match_nuclei: index is on {index.device}, offsets on {offsets.device}")
    if num_rois < 1 or offsets.numel() < 1 or (offsets.numel() - 1) % num_rois:
        raise ValueError(f"match_nuclei: offsets must hold V * {num_rois} ROIs + 1 entries, got {offsets.numel()}")
    if not 1 <= num_globals <= (offsets.numel() - 1) // num_rois:
        views = (offsets.numel() - 1) // num_rois
        raise ValueError(f"match_nuclei: num_globals must be in 1..{views} (the views in offsets), got {num_globals}")


if backends.library_error() is None:

    @torch.library.register_fake("muse_fast::match_nuclei")
    def _(index: Tensor, offsets: Tensor, num_rois: int, num_globals: int) -> tuple[Tensor, Tensor]:
        num_pairs = torch.library.get_ctx().new_dynamic_size()
        return index.new_empty(num_pairs, dtype=torch.int64), index.new_empty(num_pairs, dtype=torch.int64)
