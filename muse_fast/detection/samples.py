"""Samples with a large field of view for fine-tuning (paper, "LFoV Samples", equation 8).

The annotated region of an image is placed at random inside a larger square. The rest of the square is tissue without
annotation, taken from the source's context image if it has one, and beyond that mirrored tissue or glass
(`muse_fast.detection.squares`). Every random choice of a sample depends only on (seed, epoch, image).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from muse_fast.classification.tiles import resample
from muse_fast.config import ViewsConfig
from muse_fast.detection.squares import cut_square, inside
from muse_fast.errors import UserError
from muse_fast.images.points import Points
from muse_fast.sources import Source, SourceImage
from muse_fast.sources.base import Context, Field, read_splits
from muse_fast.views.boxes import ViewBox
from muse_fast.views.colours import apply_colour, draw_colour
from muse_fast.views.loader import Sample

UNLABELLED, ANNOTATED, EMPTY = 0, 1, 2
"""Kinds of pixels in a sample: tissue without annotation, annotated tissue, or glass in place of unknown tissue."""


@dataclass(frozen=True, slots=True)
class LabelledImage:
    """An image at the training scale, and the nuclei of its annotated region."""

    name: str
    image: Tensor  # [3, H, W] uint8
    region: Tensor  # [H, W] bool, where nuclei are annotated; of any shape
    xy: NDArray[np.float32]  # [n, 2] pixels
    label: NDArray[np.int64]  # [n], -1 if unknown
    scale: tuple[float, float]  # pixels of this image per pixel of the source's image, along x and y
    corner: tuple[int, int] = (0, 0)  # x, y of the source's image in this one

    def box(self) -> tuple[int, int, int, int]:
        """x, y, width and height of the region."""
        y, x = (self.region.any(dim=axis).nonzero().flatten() for axis in (1, 0))
        return int(x[0]), int(y[0]), int(x[-1] - x[0]) + 1, int(y[-1] - y[0]) + 1


def class_names(source: Source) -> tuple[str, ...]:
    """Names of the labels 0, 1, ... of ``source``; a single class if it names none."""
    return tuple(source.label_names) or ("nucleus",)


def labels(image: SourceImage, classes: int) -> NDArray[np.int64]:
    """Labels ``[n]`` of nuclei, -1 if unknown; with a single class, all labels are 0."""
    if classes == 1 or image.label is None:
        return np.full(len(image.xy), 0 if classes == 1 else -1, np.int64)
    return image.label.astype(np.int64)


def known_nuclei(xy: NDArray[Any], label: NDArray[Any]) -> Points:
    """The annotated nuclei of known class, which detections are scored against."""
    known = label >= 0
    return Points(xy[known], label[known])


def labelled_image(source: SourceImage, mpp: float, classes: int, sample_size: int = 0) -> LabelledImage:
    """Resample ``source``, which is annotated everywhere, to ``mpp``, and add the context that samples can show.

    Nuclei outside the image are skipped.

    Raises:
        UserError: the context image is damaged or does not contain the image.
    """
    image, xy = resample(source, mpp)
    height, width = image.shape[:2]
    label = labels(source, classes)
    keep = ((xy >= 0) & (xy < (width, height))).all(axis=1)
    whole, (left, top) = image, (0, 0)
    if source.context is not None:
        whole, (left, top) = _with_context(image, mpp, source.context, sample_size)
    region = torch.zeros(whole.shape[:2], dtype=torch.bool)
    region[top : top + height, left : left + width] = True
    return LabelledImage(
        name=source.name,
        image=torch.from_numpy(np.ascontiguousarray(whole.transpose(2, 0, 1))),
        region=region,
        xy=(xy[keep] + (left, top)).astype(np.float32),
        label=label[keep],
        scale=(width / source.image.shape[1], height / source.image.shape[0]),
        corner=(left, top),
    )


def _with_context(
    image: NDArray[np.uint8], mpp: float, context: Context, sample_size: int
) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """Paste ``image`` into its context at the same scale; return the result and the x, y of ``image`` in it."""
    height, width = image.shape[:2]
    x0, y0, x1, y1 = context.box
    across, down = (x1 - x0) / width, (y1 - y0) / height  # pixels of the larger image per pixel of this one
    room_x, room_y = max(0, sample_size - width), max(0, sample_size - height)
    left, top = min(room_x, int(x0 / across)), min(room_y, int(y0 / down))

    def around(whole_width: int, whole_height: int) -> tuple[Field, tuple[int, int]]:
        right, bottom = min(room_x, int((whole_width - x1) / across)), min(room_y, int((whole_height - y1) / down))
        near = max(0.0, x0 - left * across), max(0.0, y0 - top * down)
        far = min(float(whole_width), x1 + right * across), min(float(whole_height), y1 + bottom * down)
        return (*near, *far), (left + width + right, top + height + bottom)

    whole = context.read(mpp / across, around)
    whole[top : top + height, left : left + width] = image  # it may be sharper than the context
    return whole, (left, top)


def read_labelled(
    source: Source, splits: Sequence[str], mpp: float, sample_size: int = 0
) -> dict[str, list[LabelledImage]]:
    """Read the images of each split in ``splits`` with `labelled_image`; see `read_splits`."""
    classes = len(class_names(source))
    return read_splits(source, splits, lambda image: labelled_image(image, mpp, classes, sample_size))


def draw_images(images: Sequence[LabelledImage], fraction: float, seed: int) -> Sequence[LabelledImage]:
    """Draw ``fraction`` of the images, at least one, and keep their order. A smaller fraction is part of a larger one.

    Args:
        fraction: above 0, at most 1; 1 draws nothing and returns ``images``.
        seed: of the draw.
    """
    if fraction == 1:
        return images
    count = max(1, round(fraction * len(images)))
    drawn = np.random.default_rng(seed).permutation(len(images))[:count]
    return [images[i] for i in sorted(drawn)]


class LfovSample(NamedTuple):
    """One image as a sample of R x R pixels."""

    plain: Tensor  # [3, R, R] uint8, original colours
    image: Tensor  # [3, R, R] uint8, augmented colours
    places: Tensor  # [R, R] uint8: UNLABELLED, ANNOTATED or EMPTY
    xy: NDArray[np.float32]  # [n, 2] pixels of the sample
    label: NDArray[np.int64]  # [n]


class LfovBatch(NamedTuple):
    """The samples of one step."""

    plain: Tensor  # [I, 3, R, R] uint8
    images: Tensor  # [I, 3, R, R] uint8
    places: Tensor  # [I, R, R] uint8
    xy: Tensor  # [N, 2] float32
    label: Tensor  # [N] int64
    counts: Tensor  # [I] int64, nuclei per image
    image_ids: Tensor  # [I] int64
    epochs: Tensor  # [I] int64

    def to(self, device: torch.device | str, non_blocking: bool = False) -> LfovBatch:
        """Move the images; the host reads the rest."""
        plain, images = (one.to(device, non_blocking=non_blocking) for one in (self.plain, self.images))
        return self._replace(plain=plain, images=images)


def draw_corner(rng: np.random.Generator, box: tuple[int, int, int, int], size: int) -> tuple[int, int]:
    """Draw the top-left pixel of a sample of ``size`` that shows the region ``box`` (x, y, width, height): equation 8.

    Each axis is drawn separately: the region is uniformly distributed inside the sample. Along an axis on which the
    region is larger, the sample is uniformly distributed inside the region.
    """
    x, y, width, height = box
    offsets = [int(rng.integers(min(0, size - side), max(0, size - side) + 1)) for side in (width, height)]
    return x - offsets[0], y - offsets[1]


class LfovDataset(Dataset["LfovBatch | UserError"]):
    """``dataset[samples]`` is the batch of ``samples``, pairs of an epoch and an index into ``images``.

    Args:
        images: to draw samples from.
        size: R, side in pixels.
        surroundings: what lies beyond an image, ``reflect`` or ``mask``.
        turns: flips and quarter turns.
        colours: stains, jitter, grey and blur are drawn as for a local view of pretraining.
        seed: seeds all draws.
    """

    def __init__(
        self,
        images: Sequence[LabelledImage],
        *,
        size: int,
        surroundings: str,
        turns: bool,
        colours: ViewsConfig,
        seed: int,
    ) -> None:
        self.images, self.size, self.surroundings = images, size, surroundings
        self._boxes = [image.box() for image in images]
        self.turns, self.colours, self.seed = turns, colours, seed

    def __getitem__(self, samples: Sequence[Sample]) -> LfovBatch | UserError:
        drawn = [self.sample(epoch, image) for epoch, image in samples]
        return LfovBatch(
            plain=torch.stack([sample.plain for sample in drawn]),
            images=torch.stack([sample.image for sample in drawn]),
            places=torch.stack([sample.places for sample in drawn]),
            xy=torch.from_numpy(np.concatenate([sample.xy for sample in drawn])),
            label=torch.from_numpy(np.concatenate([sample.label for sample in drawn])),
            counts=torch.tensor([len(sample.xy) for sample in drawn]),
            image_ids=torch.tensor([image for _, image in samples]),
            epochs=torch.tensor([epoch for epoch, _ in samples]),
        )

    def batch_bytes(self, samples: int) -> int:
        """Bytes of the images and places of a batch."""
        return samples * self.size**2 * (3 + 3 + 1)

    def sample(self, epoch: int, number: int) -> LfovSample:
        """The sample of ``images[number]`` in ``epoch``."""
        rng = np.random.default_rng([self.seed, epoch, number])
        source = self.images[number]
        left, top = draw_corner(rng, self._boxes[number], self.size)
        flip, turns = (bool(rng.integers(2)), int(rng.integers(4))) if self.turns else (False, 0)
        colour = draw_colour(rng, "local", self.colours)

        plain = _turn(cut_square(source.image, left, top, self.size, self.surroundings), flip, turns)
        xy, shown = ViewBox(left, top, self.size, self.size, flip, turns).nuclei(source.xy)
        return LfovSample(
            plain=plain,
            image=apply_colour(plain, colour),
            places=_turn(self._places(source.region, left, top), flip, turns),
            xy=xy,
            label=source.label[shown],
        )

    def _places(self, region: Tensor, left: int, top: int) -> Tensor:
        height, width = region.shape
        in_image = inside(left, top, self.size, width, height)
        places = torch.full((self.size, self.size), EMPTY if self.surroundings == "mask" else UNLABELLED)
        places[in_image] = UNLABELLED
        places[in_image & cut_square(region, left, top, self.size, "reflect")] = ANNOTATED
        return places.to(torch.uint8)


def _turn(square: Tensor, flip: bool, turns: int) -> Tensor:
    """Mirror left to right, then turn counter-clockwise by quarters, as `ViewBox` does with points."""
    return torch.rot90(square.flip(-1) if flip else square, turns, (-2, -1)).contiguous()


def describe(images: Sequence[LabelledImage], names: Sequence[str]) -> dict[str, Any]:
    """Count images, nuclei, and nuclei per class."""
    label = np.concatenate([image.label for image in images])
    counts = {name: int((label == kind).sum()) for kind, name in enumerate(names)}
    return {"images": len(images), "nuclei": len(label), **counts}
