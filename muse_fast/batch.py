"""The containers that the data path, the models, the ops and the losses exchange.

Shape legend used across the package:

    B  ROIs per rank          V  views per ROI = G + L      N  nucleus rows
    G  global views           L  local views                P  pairs of rows
    D  width of a row         d  bottleneck width (256)     K  prototypes

Ragged data is packed, never a list of tensors. Views are ordered view-major: all ROIs of global 0, all ROIs
of global 1, ..., then all ROIs of local 0, and so on. Image ``v * B + b`` is view ``v`` of ROI ``b``.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T", bound="_Movable")


class _Movable:
    """A dataclass of tensors that moves between devices as a whole."""

    def to(self: _T, device: torch.device | str, non_blocking: bool = False) -> _T:
        moved = {}
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, (Tensor, _Movable)):
                moved[field.name] = value.to(device, non_blocking=non_blocking)
        return replace(self, **moved)  # type: ignore[type-var]

    def pin_memory(self: _T) -> _T:
        pinned = {}
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, (Tensor, _Movable)):
                pinned[field.name] = value.pin_memory()
        return replace(self, **pinned)  # type: ignore[type-var]


@dataclass(frozen=True, slots=True)
class PackedNuclei(_Movable):
    """Nuclei of many images, one row each. Within an image, rows are sorted by ``index`` and unique."""

    xy: Tensor  # [N, 2] float32, pixels of the row's image
    index: Tensor  # [N] int32, number of the nucleus in its ROI; the same in all views
    offsets: Tensor  # [images + 1] int32; rows of image i are offsets[i] : offsets[i + 1]

    @property
    def num_images(self) -> int:
        return self.offsets.numel() - 1

    def image_index(self) -> Tensor:
        """Return the image of every row, ``[N]`` int64."""
        rows = torch.arange(len(self.xy), dtype=torch.int32, device=self.offsets.device)
        return torch.searchsorted(self.offsets[1:], rows, right=True)

    def images(self, start: int, stop: int) -> PackedNuclei:
        """Return the nuclei of images ``start:stop``."""
        first, last = int(self.offsets[start]), int(self.offsets[stop])
        return PackedNuclei(self.xy[first:last], self.index[first:last], self.offsets[start : stop + 1] - first)


@dataclass(frozen=True, slots=True)
class Pairs(_Movable):
    """Rows that a loss compares: the same nucleus, or the same ROI, in a global view and in another view."""

    teacher_rows: Tensor  # [P] int64, rows of global views
    student_rows: Tensor  # [P] int64, rows of any view


@dataclass(frozen=True, slots=True)
class Views(_Movable):
    """One batch: the views of B ROIs and the nuclei in each view."""

    global_images: Tensor  # [G * B, 3, R, R] uint8, or floating and normalised (those rendered on a GPU)
    local_images: Tensor  # [L * B, 3, r, r] in the same dtype; L may be 0
    nuclei: PackedNuclei  # over (G + L) * B images, globals first
    num_global_nuclei: int  # rows of `nuclei` in the globals; an int, so that reading it never waits for a device
    mpp: Tensor  # [(G + L) * B] float32, um per pixel of every view
    roi_ids: Tensor  # [B] int64
    epochs: Tensor  # [B] int64; with the seed and the ROI id it determines every random choice

    @property
    def num_rois(self) -> int:
        return self.roi_ids.numel()

    @property
    def num_globals(self) -> int:
        return self.global_images.shape[0] // self.num_rois

    @property
    def num_locals(self) -> int:
        return self.local_images.shape[0] // self.num_rois

    def groups(self) -> tuple[list[Tensor], list[PackedNuclei]]:
        """Group images, and the nuclei in them, by resolution; without locals there is one group."""
        nuclei, split, rows = self.nuclei, self.global_images.shape[0], self.num_global_nuclei
        global_nuclei = PackedNuclei(nuclei.xy[:rows], nuclei.index[:rows], nuclei.offsets[: split + 1])
        if not self.num_locals:
            return [self.global_images], [global_nuclei]
        local_nuclei = PackedNuclei(nuclei.xy[rows:], nuclei.index[rows:], nuclei.offsets[split:] - rows)
        return [self.global_images, self.local_images], [global_nuclei, local_nuclei]


@dataclass(frozen=True, slots=True)
class PlannedViews(_Movable):
    """A batch of views before decoding, which a renderer turns into :class:`Views`."""

    jpegs: Tensor  # [bytes] uint8: for each of the B ROIs in turn, a JPEG of the rows that its views cover
    jpeg_bounds: Tensor  # [B + 1] int64; the JPEG of ROI b is jpegs[jpeg_bounds[b] : jpeg_bounds[b + 1]]
    shapes: Tensor  # [B, 2] int64, height and width of each JPEG
    boxes: Tensor  # [V * B, 6] int32, see ops.augment_views; image: place of the ROI in the batch, y: in its JPEG
    colours: Tensor  # [V * B, 17] float32, see ops.augment_views
    num_globals: int
    nuclei: PackedNuclei
    num_global_nuclei: int
    mpp: Tensor  # these four as in Views
    roi_ids: Tensor
    epochs: Tensor
    path: str  # of the ROI set, for messages

    @property
    def num_rois(self) -> int:
        return self.roi_ids.numel()

    def jpeg(self, roi: int) -> Tensor:
        """Return the JPEG of the ROI at place ``roi`` of the batch, ``[bytes]`` uint8."""
        return self.jpegs[self.jpeg_bounds[roi] : self.jpeg_bounds[roi + 1]]

    def rendered(self, global_images: Tensor, local_images: Tensor) -> Views:
        """Return the batch of views with the given pixels, in the order of ``boxes``."""
        return Views(
            global_images=global_images,
            local_images=local_images,
            nuclei=self.nuclei,
            num_global_nuclei=self.num_global_nuclei,
            mpp=self.mpp,
            roi_ids=self.roi_ids,
            epochs=self.epochs,
        )
