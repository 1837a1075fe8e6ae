"""Which backend renders planned views: ``data.backend``.

cpu    the loader's processes, with torchvision; the reference, in loader.py
dali   an NVIDIA DALI pipeline: on the GPU, or on the CPU if there is no GPU
cuda   nvJPEG and the op ``augment_views``, on the GPU

Boxes, colours and nuclei come from the plan, so backends differ only in the rounding of pixels.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from muse_fast.batch import PlannedViews, Views
from muse_fast.config import ViewsConfig
from muse_fast.errors import UserError
from muse_fast.ops import augment_views, backends
from muse_fast.views.ahead import one_ahead
from muse_fast.views.damage import damaged_jpeg, decode_strictly

_T = TypeVar("_T")


def why_not(backend: str, device: torch.device) -> str | None:
    """Return why ``backend`` cannot render views for a run on ``device``, or None if it can."""
    if backend == "cpu":
        return None
    if backend == "cuda":
        if device.type != "cuda":
            return f"it runs only on CUDA GPUs, and the run is on {device.type}"
        return backends.why_not("augment_views", "triton", "cuda")
    if device.type not in ("cuda", "cpu"):
        return f"it renders on CUDA GPUs and CPUs, and the run is on {device.type}"
    try:
        import nvidia.dali  # noqa: F401
    except ImportError as error:
        return f"nvidia.dali cannot be imported ({error}): pip install 'muse_fast[dali]'"
    return None


def rendered(
    batches: Iterable[PlannedViews], backend: str, config: ViewsConfig, device: torch.device, threads: int
) -> Iterator[Views]:
    """Yield the views of every batch, on ``device``, rendered during the previous step.

    Raises:
        UserError: a JPEG cannot be decoded; names path and ROI id.
    """
    if backend == "dali":
        from muse_fast.views.dali import render_batches  # needs nvidia-dali

        return render_batches(batches, config, device, threads)
    # In a thread, since nvJPEG's decoder keeps the host busy, and launching a step does too.
    return one_ahead(batches, lambda planned: render_batch(planned, config, device), device, thread=True)


def render_batch(planned: PlannedViews, config: ViewsConfig, device: torch.device, backend: str | None = None) -> Views:
    """Decode the ROIs of a batch and render its views on ``device``: nvJPEG on a GPU, simplejpeg on a CPU.

    Args:
        backend: of the op ``augment_views``; None chooses the fastest.

    Raises:
        UserError: a JPEG cannot be decoded; names path and ROI id.
    """
    images = _decode(planned, device)
    planes = planned.shapes.prod(1)
    starts = torch.cat([planes.new_zeros(1), 3 * planes.cumsum(0)[:-1]])
    table = torch.cat([starts[:, None], planned.shapes], 1).to(device, non_blocking=True)
    pixels = torch.cat([image.flatten() for image in images])
    boxes = planned.boxes.to(device, non_blocking=True)
    colours = planned.colours.to(device, non_blocking=True)
    split = planned.num_globals * planned.num_rois
    return planned.rendered(
        augment_views(pixels, table, boxes[:split], colours[:split], config.global_size, backend=backend),
        augment_views(pixels, table, boxes[split:], colours[split:], config.local_size, backend=backend),
    )


def _decode(planned: PlannedViews, device: torch.device) -> list[Tensor]:
    """Decode the ROIs of a batch, each to ``[3, H, W]`` uint8 on ``device``."""
    jpegs = [planned.jpeg(b) for b in range(planned.num_rois)]
    try:
        if device.type == "cuda":
            # nvJPEG writes on a stream of its own, which does not wait for those that read this memory before.
            torch.cuda.current_stream(device).synchronize()
            images = decode_jpeg(jpegs, mode=ImageReadMode.RGB, device=device)
        else:
            images = [decode_strictly(jpeg).permute(2, 0, 1) for jpeg in jpegs]
    except (RuntimeError, ValueError) as error:
        raise damaged_jpeg(planned, error) from None
    if [list(image.shape[1:]) for image in images] != planned.shapes.tolist():
        raise damaged_jpeg(planned, "their sizes differ from their headers")
    return images


class UntilError(Generic[_T]):
    """Items up to the first error, which is kept, to be raised once the items before it have been used."""

    def __init__(self, items: Iterable[_T | UserError]) -> None:
        self.error: UserError | None = None
        self._items = items

    def __iter__(self) -> Generator[_T]:
        for item in self._items:
            if isinstance(item, UserError):
                self.error = item
                return
            yield item
