"""Match nuclei and read the feature rows of those that have a partner (the matching and sampling steps of NuLo)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from muse_fast.ops import backends, reference
from muse_fast.ops.match_nuclei import assert_sound, check_pack

MAX_LEVELS = 4


class NuloRows(NamedTuple):
    """What the nucleus loss needs. Every tensor but ``counts`` is padded to its capacity."""

    teacher: Tensor  # [C_t, D], then zeros
    student: Tensor  # [C_s, D], then zeros
    teacher_rows: Tensor  # [C_p] int64, rows of `teacher`, then -1
    student_rows: Tensor  # [C_p] int64, rows of `student`, then -1
    counts: Tensor  # [3] int64: teacher rows, student rows, pairs


def nulo_rows(
    teacher_levels: Sequence[Tensor],
    student_levels: Sequence[Sequence[Tensor]],
    view_sizes: Sequence[int],
    xy: Tensor,
    index: Tensor,
    offsets: Tensor,
    num_rois: int,
    num_globals: int,
    *,
    capacity: tuple[int, int, int] | None = None,
    backend: str | None = None,
) -> NuloRows:
    """:func:`match_nuclei`, then :func:`sample_nuclei` of the rows that stand in a pair, and of no others.

    On CUDA it is one launch and the host does not wait: the results have the sizes of the capacity, and how much of
    them is filled stands on the device.

    Args:
        teacher_levels: 1 to 4 tensors ``[G * B, c_l, h_l, w_l]``, finest first: the teacher's maps of the globals.
        student_levels: the student's maps of the globals, then, where the pack has locals, those of the locals
            ``[L * B, c_l, h_l, w_l]``; all maps of one dtype and device.
        view_sizes: pixels along a side of the globals, then of the locals if there are any.
        xy: ``[N, 2]`` float32, pixels of the view that the row belongs to.
        index, offsets, num_rois, num_globals: the pack, as :func:`match_nuclei` takes it.
        capacity: lengths C_t of teacher rows, C_s of student rows and C_p of pairs. The default ``(N, N, G * N)`` is
            always enough. What exceeds it is left out: the last rows, every pair of a row that is left out (which
            becomes -1, -1 in its place), the last pairs.
        backend: ``reference`` or ``cuda`` to force one.

    Returns:
        :class:`NuloRows`. Rows are in packed order, pairs in that of :func:`match_nuclei`. The counts are the true
        ones, whatever the capacity. The gradient flows to ``student_levels`` alone.

    Raises:
        ValueError: wrong shape, dtype, device or count, or a forced backend that cannot run. A pack with offsets that
            do not rise from 0 to N or with unsorted rows is refused too; on CUDA its counts are -1, and the device
            asserts, which shows at the next synchronisation.
    """
    check_pack("nulo_rows", index, offsets, num_rois, num_globals)
    _check_points(xy, index, teacher_levels)
    num_locals = (offsets.numel() - 1) // num_rois - num_globals
    images = [num_globals * num_rois] + ([num_locals * num_rois] if num_locals else [])
    _check_levels(teacher_levels, student_levels, view_sizes, images)
    if capacity is None:
        capacity = (len(xy), len(xy), num_globals * len(xy))
    if min(capacity) < 0:
        raise ValueError(f"nulo_rows: capacity must not be negative, got {capacity}")

    if backends.choose("nulo_rows", xy.device.type, backend, teacher_levels[0].dtype) == "reference":
        return NuloRows(
            *reference.nulo_rows(
                teacher_levels,
                student_levels,
                view_sizes,
                xy.detach(),
                index,
                offsets,
                num_rois,
                num_globals,
                capacity=capacity,
            )
        )
    *results, _ = torch.ops.muse_fast.nulo_rows(
        [level.detach() for level in teacher_levels],
        student_levels[0],
        student_levels[1] if num_locals else [],
        view_sizes[0],
        view_sizes[-1],
        xy.detach().contiguous(),
        index.contiguous(),
        offsets.contiguous(),
        num_rois,
        num_globals,
        *capacity,
    )
    rows = NuloRows(*results)
    assert_sound("nulo_rows", rows.counts[2])
    return rows


def _check_points(xy: Tensor, index: Tensor, levels: Sequence[Tensor]) -> None:
    if xy.dtype != torch.float32 or xy.shape != (len(index), 2):
        raise ValueError(f"nulo_rows: xy must be float32 [{len(index)}, 2], got {xy.dtype} {tuple(xy.shape)}")
    if not 1 <= len(levels) <= MAX_LEVELS:
        raise ValueError(f"nulo_rows: expected 1 to {MAX_LEVELS} teacher_levels, got {len(levels)}")
    if not xy.device == index.device == levels[0].device:
        raise ValueError(
            f"nulo_rows: xy is on {xy.device}, index on {index.device}, teacher_levels on {levels[0].device}"
        )


def _check_levels(
    teacher_levels: Sequence[Tensor],
    student_levels: Sequence[Sequence[Tensor]],
    view_sizes: Sequence[int],
    images: Sequence[int],
) -> None:
    """``images``: how many there are of each resolution."""
    if not len(student_levels) == len(view_sizes) == len(images) or min(view_sizes) < 1:
        raise ValueError(
            f"nulo_rows: expected student_levels and positive view_sizes of {len(images)} resolutions (globals, then "
            f"locals if the pack has any), got {len(student_levels)} and {list(view_sizes)}"
        )
    like = [(level.shape[1], level.dtype, level.device) for level in teacher_levels if level.dim() == 4]
    for name, levels, count in (
        ("teacher_levels", teacher_levels, images[0]),
        *(("student_levels", levels, count) for levels, count in zip(student_levels, images, strict=True)),
    ):
        shapes = [tuple(level.shape) for level in levels]
        if any(len(shape) != 4 or shape[0] != count for shape in shapes):
            raise ValueError(f"nulo_rows: {name} must be tensors [{count}, c, h, w], got {shapes}")
        if [(level.shape[1], level.dtype, level.device) for level in levels] != like:
            raise ValueError(f"nulo_rows: {name} must have the channels, dtypes and devices of teacher_levels")
        if any(level.dtype != levels[0].dtype for level in levels):
            raise ValueError(f"nulo_rows: {name} must be of one dtype, got {[level.dtype for level in levels]}")
        if any(h > shapes[0][2] or w > shapes[0][3] or 0 in (h, w) for _, _, h, w in shapes):
            raise ValueError(f"nulo_rows: {name} must start with the finest, and none be empty, got {shapes}")


if backends.library_error() is None:

    @torch.library.register_fake("muse_fast::nulo_rows")
    def _(
        teacher_levels: Sequence[Tensor],
        global_levels: Sequence[Tensor],
        local_levels: Sequence[Tensor],
        global_size: int,
        local_size: int,
        xy: Tensor,
        index: Tensor,
        offsets: Tensor,
        num_rois: int,
        num_globals: int,
        teacher_capacity: int,
        student_capacity: int,
        pair_capacity: int,
    ) -> tuple[Tensor, ...]:
        width = sum(level.shape[1] for level in teacher_levels)
        teacher, student = (teacher_levels[0].new_empty(size, width) for size in (teacher_capacity, student_capacity))
        sizes = (pair_capacity, pair_capacity, 3, student_capacity)
        return teacher, student, *(index.new_empty(size, dtype=torch.int64) for size in sizes)

    def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        teacher_levels, global_levels, local_levels, global_size, local_size, xy, _, offsets = inputs[:8]
        teacher, *_, student_kept = output
        ctx.mark_non_differentiable(teacher)
        ctx.save_for_backward(xy, offsets, student_kept)
        ctx.num_levels = len(teacher_levels)
        ctx.resolutions = [_layout(global_levels, global_size), _layout(local_levels, local_size)]

    def _backward(ctx: Any, _: Tensor, gradient: Tensor, *of_integers: Tensor) -> tuple[Any, ...]:
        from muse_fast.kernels.fused.sample_nuclei import sample_nuclei_bwd  # needs triton

        xy, offsets, kept = ctx.saved_tensors
        points = F.pad(xy, (0, 0, 0, 1))[kept]  # -1 takes what was added
        image = torch.searchsorted(offsets.long(), kept, right=True) - 1  # of -1, it is -1
        gradients: list[list[Tensor]] = []
        first = 0
        for view_size, num_images, *layout in ctx.resolutions:
            if num_images == 0:  # no locals
                gradients.append([])
                continue
            inside = (image >= first) & (image < first + num_images)
            image_index = torch.where(inside, image - first, -1)
            gradients.append(sample_nuclei_bwd(gradient, points, image_index, view_size, num_images, *layout))
            first += num_images
        return [None] * ctx.num_levels, *gradients, *[None] * 10

    def _layout(levels: Sequence[Tensor], view_size: int) -> tuple[int, int, list[int], bool]:
        """As sample_nuclei_bwd takes it."""
        shapes = [size for level in levels for size in level.shape[1:]]
        channels_last = all(level.is_contiguous(memory_format=torch.channels_last) for level in levels)
        return view_size, levels[0].shape[0] if levels else 0, shapes, channels_last

    torch.library.register_autograd("muse_fast::nulo_rows", _backward, setup_context=_setup_context)
