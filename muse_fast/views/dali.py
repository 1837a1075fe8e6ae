"""Views rendered by NVIDIA DALI, which decodes on the GPU (or, without one, on the CPU) during the previous step.

One sample of the pipeline is one ROI: it is decoded once, cropped and resized V times, and the views of a resolution
are stacked, so that every later operator handles them all at once. Boxes, turns and colours are inputs next to the
JPEG. The steps are those of ``ops.augment_views``. Hue and contrast are written as arithmetic, because DALI's own
operators differ from torchvision's: its hue rotates in YIQ, not around the HSV circle, and its contrast does not
use the mean grey. It has none for stains.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, math, types
from torch import Tensor

from muse_fast.batch import PlannedViews, Views
from muse_fast.config import ViewsConfig
from muse_fast.images.imagenet import IMAGENET_MEAN, IMAGENET_STD
from muse_fast.ops.augment_views import BOX_COLUMNS, COLOUR_COLUMNS, STAIN_SHIFTS, STAINS
from muse_fast.views.colours import DARKEST, blur_radius, stain_maps
from muse_fast.views.damage import damaged_jpeg

_PREFETCH = 2  # batches in preparation
_STEPS = ("brightness", "contrast", "saturation", "hue")

Node = Any  # an edge of the pipeline's graph


class Inputs(NamedTuple):
    """The inputs of the pipeline: the JPEG of each ROI and numbers for each view."""

    jpegs: list[NDArray[np.uint8]]
    crops: list[NDArray[np.int32]]  # [V, 3] y, x, side
    turns: list[NDArray[np.float32]]  # [V, 2, 3] maps a pixel of the turned view to one before the turn
    windows: list[NDArray[np.int32]]  # [V] width of the blur kernel; 1 does not blur
    sigmas: list[NDArray[np.float32]]  # [V]
    steps: list[NDArray[np.float32]]  # [V, 4, 4, 1, 1, 1] of each step: factor, is contrast, is saturation, hue shift
    flags: list[NDArray[np.float32]]  # [V, 2, 1, 1, 1] grey, solarise
    stains: list[NDArray[np.float32]]  # [V, 3, 4, 1, 1, 1] see `stain_maps`


def render_batches(
    batches: Iterable[PlannedViews], config: ViewsConfig, device: torch.device, threads: int
) -> Iterator[Views]:
    """Yield the views of every batch, in order, on ``device``.

    Raises:
        UserError: DALI cannot decode a JPEG; names path and ROI id.
    """
    waiting = iter(batches)
    first = next(waiting, None)
    if first is None:
        return
    waiting = chain([first], waiting)
    in_flight: deque[PlannedViews] = deque()

    def source() -> Inputs:
        in_flight.append(next(waiting))
        return pipeline_inputs(in_flight[-1], config)

    pipeline = _pipeline(source, first.num_rois, config, device, max(1, threads))
    while True:
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None  # the host does not wait for it
        try:
            outputs = [_view_major(output) for output in pipeline.run(stream)]
        except StopIteration:
            return
        except RuntimeError as error:
            raise damaged_jpeg(in_flight[0], f"DALI: {str(error).splitlines()[0]}") from None
        if not config.num_locals:
            outputs.append(outputs[0].new_empty(0, 3, config.local_size, config.local_size))
        yield in_flight.popleft().rendered(*outputs)


def pipeline_inputs(planned: PlannedViews, config: ViewsConfig) -> Inputs:
    """Convert a batch to the inputs of the pipeline."""
    boxes = dict(zip(BOX_COLUMNS, planned.boxes.numpy().T, strict=True))
    colours = dict(zip(COLOUR_COLUMNS, planned.colours.numpy().T, strict=True))
    sizes = np.full(len(planned.boxes), config.local_size)
    sizes[: planned.num_globals * planned.num_rois] = config.global_size
    blurred = colours["sigma"] > 0
    radii = [blur_radius(sigma, size) for sigma, size in zip(colours["sigma"].tolist(), sizes.tolist(), strict=True)]
    views = (
        np.stack([boxes["y"], boxes["x"], boxes["side"]], axis=1),
        _turn_matrices(boxes["flip"], boxes["turns"], sizes),
        np.where(blurred, 2 * np.array(radii) + 1, 1).astype(np.int32),
        np.where(blurred, colours["sigma"], 1).astype(np.float32),
        _steps(colours)[..., None, None, None],
        np.stack([colours["grey"], colours["solarise"]], axis=1)[..., None, None, None],
        stain_maps(np.stack([colours[name] for name in (*STAINS, *STAIN_SHIFTS)], axis=1))[..., None, None, None],
    )
    return Inputs(
        [planned.jpeg(b).numpy() for b in range(planned.num_rois)],
        *(list(_roi_major(rows, planned.num_rois)) for rows in views),
    )


def _roi_major(rows: NDArray[Any], num_rois: int) -> NDArray[Any]:
    """Reorder ``[V * B, ...]`` to a contiguous ``[B, V, ...]``."""
    return np.ascontiguousarray(rows.reshape(-1, num_rois, *rows.shape[1:]).swapaxes(0, 1))


def _turn_matrices(flip: NDArray[Any], turns: NDArray[Any], sizes: NDArray[Any]) -> NDArray[np.float32]:
    """Return ``[N, 2, 3]`` matrices that undo flip and turns, the inverse of those in `ViewBox.map_points`."""
    matrices = []
    for mirrored, quarters, size in zip(flip, turns, sizes, strict=True):
        back = np.eye(3)
        if mirrored:
            back = back @ [[-1, 0, size], [0, 1, 0], [0, 0, 1]]
        for _ in range(quarters):
            back = back @ [[0, -1, size], [1, 0, 0], [0, 0, 1]]
        matrices.append(back[:2])
    return np.stack(matrices).astype(np.float32)


def _steps(colours: dict[str, NDArray[np.float32]]) -> NDArray[np.float32]:
    """Return ``[N, 4, 4]``: for each view, its steps in order as (factor, is contrast, is saturation, hue shift)."""
    rows = np.arange(len(colours["hue"]))
    order = np.stack([colours[name] for name in ("first", "second", "third", "fourth")], axis=1).astype(int)
    strength = np.stack([colours[name] for name in _STEPS], axis=1)[rows[:, None], order]
    is_hue, shift = order == 3, np.where(order == 3, strength, 0)
    return np.stack([np.where(is_hue, 1, strength), order == 1, order == 2, shift], axis=2).astype(np.float32)


def _pipeline(source: Any, num_rois: int, config: ViewsConfig, device: torch.device, threads: int) -> Pipeline:
    gpu = device.type == "cuda"
    place = (device.index or 0) if gpu else None
    pipeline = Pipeline(num_rois, threads, place, prefetch_queue_depth=_PREFETCH)
    with pipeline:
        inputs = Inputs(*fn.external_source(source, num_outputs=len(Inputs._fields)))
        image = fn.decoders.image(inputs.jpegs, device="mixed" if gpu else "cpu", output_type=types.RGB)
        split, stop = config.num_globals, config.num_globals + config.num_locals
        outputs = [_views(image, inputs, range(split), config.global_size, config, gpu)]
        if config.num_locals:
            outputs.append(_views(image, inputs, range(split, stop), config.local_size, config, gpu))
        pipeline.set_outputs(*outputs)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The external source node")  # the settings may leave inputs unused
        pipeline.build()
    return pipeline


def _views(image: Node, inputs: Inputs, views: range, size: int, config: ViewsConfig, gpu: bool) -> Node:
    """Render the views of one resolution of a ROI, normalised, ``[views, 3, size, size]``."""
    crops: Any = inputs.crops
    resized = [
        fn.resize(
            fn.slice(image, crops[view, :2], fn.cat(crops[view, 2:], crops[view, 2:]), axes=[0, 1]),
            size=[size, size],
            interp_type=types.INTERP_CUBIC,
            antialias=True,
        )
        for view in views
    ]

    def select(numbers: Any) -> Node:
        return numbers[views.start : views.stop]

    def on_device(numbers: Any) -> Node:
        return select(numbers).gpu() if gpu else select(numbers)

    pixels = fn.stack(*resized, axis_name="F")
    if config.turns:
        pixels = fn.warp_affine(pixels, matrix=fn.per_frame(select(inputs.turns)), interp_type=types.INTERP_NN)
    steps, flags = on_device(inputs.steps), on_device(inputs.flags)
    stained = config.stain or config.stain_shift
    if stained or config.jitter or config.grey:
        levels = fn.cast(pixels, dtype=types.FLOAT)
        if stained:
            levels = _stained(levels, on_device(inputs.stains))
        for step in range(4 if config.jitter else 0):
            levels = _jittered(levels, *(steps[:, step, column] for column in range(4)))
        levels = levels + flags[:, 0] * (_grey(levels) - levels)
        pixels = fn.cast(levels, dtype=types.UINT8)
    if config.blur:
        window, sigma = fn.per_frame(select(inputs.windows)), fn.per_frame(select(inputs.sigmas))
        pixels = fn.gaussian_blur(pixels, window_size=window, sigma=sigma)
    levels = fn.cast(pixels, dtype=types.FLOAT)
    if config.solarise:
        levels = levels + flags[:, 1] * (levels >= 128) * (255 - 2 * levels)
    mean, deviation = np.array(IMAGENET_MEAN), np.array(IMAGENET_STD)
    levels = levels * _per_channel(1 / (255 * deviation), gpu) - _per_channel(mean / deviation, gpu)
    return fn.transpose(levels, perm=[0, 3, 1, 2])


def _stained(levels: Node, maps: Node) -> Node:
    """Apply `stain_maps` to the logarithms of the levels."""
    red, green, blue = (math.log(math.max(channel, DARKEST)) for channel in _channels(levels))
    changed = []
    for row in range(3):
        of_red, of_green, of_blue, offset = (maps[:, row, column] for column in range(4))
        logs = of_red * red + of_green * green + of_blue * blue + offset
        changed.append(math.floor(math.min(math.exp(logs), 255.0) + 0.5))
    return fn.cat(*changed, axis=3)


def _jittered(levels: Node, factor: Node, is_contrast: Node, is_saturation: Node, shift: Node) -> Node:
    """Apply one step of brightness, contrast or saturation, then of hue; a step that was not drawn changes nothing."""
    grey = _grey(levels)
    mean = fn.reductions.mean(grey, axes=[1, 2, 3], keep_dims=True)
    blended = levels * factor + (1 - factor) * (is_contrast * mean + is_saturation * grey)
    levels = math.floor(math.clamp(blended, 0.0, 255.0))
    return levels + (shift != 0) * (_hue_shifted(levels, shift) - levels)


def _grey(levels: Node) -> Node:
    red, green, blue = _channels(levels)
    return math.floor(0.2989 * red + 0.587 * green + 0.114 * blue)


def _hue_shifted(levels: Node, shift: Node) -> Node:
    """Shift the hue, a circle from 0 to 6; its position sets each channel between the lowest and the highest."""
    red, green, blue = channels = _channels(levels)
    highest = math.max(math.max(red, green), blue)
    chroma = highest - math.min(math.min(red, green), blue)
    divisor = math.max(chroma, 1.0)
    by_red, by_green, by_blue = (green - blue) / divisor, 2 + (blue - red) / divisor, 4 + (red - green) / divisor
    red_leads, green_leads = channels[0] == highest, channels[1] == highest
    hue = by_blue + green_leads * (by_green - by_blue)
    hue = hue + red_leads * (by_red - hue) + 6 * shift
    shifted = []
    for position in (5.0, 3.0, 1.0):
        k = hue + position
        k = k - 6 * math.floor(k / 6)
        share = math.clamp(math.min(k, 4 - k), 0.0, 1.0)
        shifted.append(math.floor((highest - chroma * share) * (255.999 / 255)))
    return fn.cat(*shifted, axis=3)


def _channels(levels: Node) -> tuple[Node, Node, Node]:
    red, green, blue = (levels[:, :, :, channel : channel + 1] for channel in range(3))
    return red, green, blue


def _per_channel(values: NDArray[np.float64], gpu: bool) -> Node:
    return types.Constant(values.astype(np.float32), device="gpu" if gpu else "cpu")


def _view_major(output: Any) -> Tensor:
    """Reorder the ``[B, V, 3, R, R]`` of a pipeline to ``[V * B, 3, R, R]``; this is the only copy."""
    return torch.from_dlpack(output.as_tensor()).transpose(0, 1).flatten(0, 1)
