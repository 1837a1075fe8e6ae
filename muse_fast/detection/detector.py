"""The nucleus detector of fine-tuning (paper, figure 5), and its application to images.

Proposals form a regular grid. The backbone's unified map is sampled at each of them, and two independent heads predict
from that row an offset, which moves the proposal onto a nucleus, and a type, which may be background. Shapes:

    I  images    R  side in pixels    P  proposals of an image = (R / stride) ** 2    D  feature width    C  classes
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from muse_fast import ops
from muse_fast.config import RESIZE_UNRECORDED
from muse_fast.detection.squares import SURROUNDINGS, cut_square
from muse_fast.errors import UserError, require
from muse_fast.images.imagenet import normalise
from muse_fast.images.points import Points, non_maximum_suppression
from muse_fast.models.archs import find_arch
from muse_fast.models.backbone import Backbone, WithBackbone, build_backbone, build_to_fill
from muse_fast.models.encoder import describe_sides, nearest
from muse_fast.models.weights import find_checkpoint
from muse_fast.runtime import checkpoint
from muse_fast.runtime.kept import kept

BEST = "best"
"""Folder inside a run with a checkpoint of its best detector."""

STEM = "detector"
"""Name of the network's file in a checkpoint, and key of its `DetectorSpec` in the state."""

SAMPLE_STEP = 16
"""Proposals of every stride fit into a multiple of this."""

_REACH_UM = 32.0


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectorSpec:
    """Properties of a detector that are saved with its weights."""

    arch: str
    class_names: tuple[str, ...]
    mpp: float
    """um per pixel of its input images."""
    sample_size: int
    """Side in pixels of the samples it was trained on and of the tiles it is applied to."""
    surroundings: str = "reflect"
    """Padding beyond the border of an image, see `muse_fast.detection.squares`."""
    image_size: int = 224
    """Side in pixels that a ViT stores its position embedding for."""
    pos_embed_resize: str = "scale_factor"
    """Rule by which a ViT resizes it to other sides, see `muse_fast.models.vit.resampling`."""
    decoder_dim: int = 0
    """Width D of the unified map if it was chosen."""
    taps: tuple[int, ...] = ()
    """Layers whose maps the decoder receives, if they were chosen."""
    stride: int = 8
    """Pixels between proposals."""
    hidden_dim: int = 256
    """Width of both heads."""
    min_score: float = 0.5
    """Minimal probability of a detected nucleus."""
    nms_um: float = 3.0
    """If two nuclei are closer than this, the less probable one is dropped."""

    def __post_init__(self) -> None:
        require(
            self.stride > 0 and SAMPLE_STEP % self.stride == 0, "stride", self.stride, f"a divisor of {SAMPLE_STEP}"
        )
        sides = sample_sides(find_arch(self.arch, taps=self.taps).sides)
        expected = f"{describe_sides(sides)} for {self.arch}; the nearest is {nearest(self.sample_size, sides)}"
        require(self.sample_size in sides, "sample_size", self.sample_size, expected)
        require(len(self.class_names) > 0, "class_names", self.class_names, "one or more")
        require(self.surroundings in SURROUNDINGS, "surroundings", self.surroundings, " or ".join(SURROUNDINGS))


def sample_sides(sides: range) -> range:
    """The sides of an encoder's images that samples may have."""
    step = math.lcm(sides.step, SAMPLE_STEP)
    return range(-(-sides[0] // step) * step, sides[-1] + 1, step)


class Proposals(NamedTuple):
    """Predictions of the network at every proposal, in the dtype of its weights."""

    xy: Tensor  # [P, 2] pixels, positions on the grid, the same in every image
    points: Tensor  # [I, P, 2] pixels, predicted positions of nuclei
    logits: Tensor  # [I, P, C + 1], background last


class Detector(WithBackbone):
    """Backbone and heads. `load_detector` loads a trained one; a new one has random heads and offsets of 0.

    Attributes:
        spec: see `DetectorSpec`.
        mpp: um per pixel of its input images.
        class_names: names of the labels 0, 1, ...
        tile_size: side in pixels of its input; smaller images are padded, larger ones cut into windows.
        reach_um: pixels farther away than this have little influence on a prediction, so windows overlap by twice this
            distance: 32 um, about three nuclei, but at most a quarter of ``tile_size``. A ViT attends to its whole
            tile, so this is a choice, not a limit.
    """

    def __init__(self, backbone: Backbone, spec: DetectorSpec) -> None:
        super().__init__()
        self.spec = spec
        self.backbone = backbone
        width, hidden = backbone.dense_dim, spec.hidden_dim
        offset, types = nn.Linear(hidden, 2), nn.Linear(hidden, len(spec.class_names) + 1)
        nn.init.zeros_(offset.weight)
        nn.init.zeros_(offset.bias)
        self.reg_head, self.type_head = _mlp(width, hidden, offset), _mlp(width, hidden, types)

    @property
    def heads(self) -> Mapping[str, nn.Module]:
        return {"reg": self.reg_head, "type": self.type_head}

    @property
    def mpp(self) -> float:
        return self.spec.mpp

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.spec.class_names

    @property
    def tile_size(self) -> int:
        return self.spec.sample_size

    @property
    def reach_um(self) -> float:
        return min(_REACH_UM, self.mpp * (self.tile_size // 4))

    def forward(self, images: Tensor) -> Proposals:
        """Proposals for images ``[I, 3, R, R]``, normalised floats, R a multiple of 16 from 32 to 1024."""
        return self._proposals(self.backbone(images).levels, images.shape[-1])

    def _proposals(self, levels: tuple[Tensor, ...], side: int) -> Proposals:
        """Proposals from the map of images of ``side`` pixels."""
        count, device = len(levels[0]), levels[0].device
        xy = _grid_on(side, self.spec.stride, device)
        image_index = torch.arange(count, device=device).repeat_interleave(len(xy))
        rows = ops.sample_nuclei(levels, xy.repeat(count, 1), image_index, side)
        offsets, logits = (
            head(rows).to(next(head.parameters()).dtype).unflatten(0, (count, len(xy))) for head in self.heads.values()
        )
        return Proposals(xy, xy + self.spec.stride * offsets, logits)

    @torch.inference_mode()
    def detect(self, images: Tensor) -> list[Points]:
        """Detect nuclei in images ``[B, 3, H, W]`` uint8 RGB at ``mpp``, of any H and W, in evaluation mode.

        Images smaller than ``tile_size`` are padded as in training, larger ones cut into overlapping windows. The
        caller sets autocast.

        Returns:
            Points per image: xy ``[n, 2]`` float32, pixels inside the image; label ``[n]`` int64; score ``[n]``
            float32, the probability of a nucleus. The most probable come first.

        Raises:
            UserError: the shape or dtype is different.
        """
        return [points for points, _ in self.describe(images, vectors=False)]

    @torch.inference_mode()
    def describe(self, images: Tensor, *, vectors: bool = True) -> list[tuple[Points, Tensor]]:
        """Detect nuclei as `detect`, and read the map from which they were detected at each of them.

        Returns:
            Points as from `detect`, and vectors ``[n, D]`` float32 per image, on the device; none without ``vectors``.

        Raises:
            UserError: as in `detect`.
        """
        if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8 or 0 in images.shape[2:]:
            raise UserError(f"images must be uint8 [B, 3, H, W], got {images.dtype} {list(images.shape)}")
        was_training = self.training
        self.eval()
        height, width = images.shape[2:]
        margin = math.ceil(self.reach_um / self.mpp)
        found: list[list[tuple[Points, Tensor]]] = [[] for _ in range(len(images))]
        for top, *rows in windows(height, self.tile_size, margin):
            for left, *columns in windows(width, self.tile_size, margin):
                square = cut_square(images, left, top, self.tile_size, self.spec.surroundings)
                area = (columns[0], rows[0], columns[1], rows[1])
                parts = self._detect_square(square, (left, top), (width, height), area, vectors)
                for one, part in zip(found, parts, strict=True):
                    one.append(part)
        self.train(was_training)
        return [_suppressed(parts, self.spec.nms_um / self.mpp) for parts in found]

    def _detect_square(
        self,
        squares: Tensor,
        corner: tuple[int, int],
        size: tuple[int, int],
        area: tuple[int, int, int, int],
        vectors: bool,
    ) -> list[tuple[Points, Tensor]]:
        """Detections per square in ``area``, in pixels of the whole image, of proposals inside the image."""
        device = next(self.parameters()).device
        images, side = normalise(squares.to(device)), squares.shape[-1]
        levels = self.backbone(images).levels if vectors else ()
        xy, points, logits = self._proposals(levels, side) if vectors else self(images)
        limit = torch.tensor(size, dtype=torch.float32, device=device)
        origin = torch.tensor(corner, dtype=torch.float32, device=device)
        place = xy + origin
        in_image = ((place >= 0) & (place < limit)).all(dim=-1)
        nuclei = torch.minimum((points + origin).clamp_min(0), limit.nextafter(torch.zeros_like(limit)))
        probabilities = logits.softmax(dim=-1)
        score = 1 - probabilities[..., -1]
        label = probabilities[..., :-1].argmax(dim=-1)
        keep = in_image & (score >= self.spec.min_score)
        arrays = (tensor.cpu().numpy() for tensor in (nuclei, label, score, keep))
        found = [_within(Points(x[k], kind[k], s[k]), area) for x, kind, s, k in zip(*arrays, strict=True)]
        if not vectors:
            return [(one, torch.zeros(0, 0)) for one in found]
        counts = [len(one) for one in found]
        place = torch.from_numpy(np.concatenate([one.xy for one in found])).to(device) - origin
        image_index = torch.arange(len(found)).repeat_interleave(torch.tensor(counts)).to(device)
        rows = ops.sample_nuclei(levels, place, image_index, side).float()
        return list(zip(found, rows.split(counts), strict=True))


def grid(side: int, stride: int) -> Tensor:
    """Positions ``[P, 2]`` float32 of the proposals in an image of ``side`` pixels: middles of cells, row by row."""
    middle = (torch.arange(side // stride, dtype=torch.float32) + 0.5) * stride
    y, x = torch.meshgrid(middle, middle, indexing="ij")
    return torch.stack([x, y], dim=-1).flatten(0, 1)


@kept
def _grid_on(side: int, stride: int, device: torch.device) -> Tensor:
    return grid(side, stride).to(device)


def windows(length: int, size: int, margin: int) -> list[tuple[int, int, int]]:
    """Cover ``length`` with windows of ``size`` pixels: start of each, and first and end of its valid results.

    Neighbours overlap by at least two margins and split the overlap in its middle. If ``length`` is shorter than a
    window, it is centred in it.
    """
    if length <= size:
        return [((length - size) // 2, 0, length)]
    count = math.ceil((length - 2 * margin) / (size - 2 * margin))
    starts = [round(i * (length - size) / (count - 1)) for i in range(count)]
    cuts = [0, *((left + size + right) // 2 for left, right in pairwise(starts)), length]
    return list(zip(starts, cuts[:-1], cuts[1:], strict=True))


def suppress(points: Points, radius: float) -> Points:
    """Non-maximum suppression: keep the most confident point, drop those within ``radius`` pixels, and so on.

    At equal confidence the earlier point is kept. The result is sorted by descending confidence.
    """
    return points.take(_unsuppressed(points, radius))


def _unsuppressed(points: Points, radius: float) -> NDArray[np.int64]:
    """The rows that `suppress` keeps."""
    order = np.argsort(-points.confidence(), kind="stable")
    kept: NDArray[np.int64] = order[non_maximum_suppression(points.xy[order], radius)]
    return kept


def _suppressed(parts: Sequence[tuple[Points, Tensor]], radius: float) -> tuple[Points, Tensor]:
    """The points of all windows of an image after `suppress`, and their vectors."""
    points, rows = _join([points for points, _ in parts]), torch.cat([rows for _, rows in parts])
    order = _unsuppressed(points, radius)
    return points.take(order), rows[torch.from_numpy(order).to(rows.device)] if len(rows) else rows


def load_detector(path: str | Path, device: torch.device | str = "cpu") -> Detector:
    """Load a trained detector in evaluation mode, float32.

    Args:
        path: a run folder of ``muse_fast.finetune`` (its best detector), or a checkpoint folder.
        device: device of the detector.

    Raises:
        UserError: the folder does not exist or does not contain a detector.
        CheckpointError: a file is damaged.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; expected a run of muse_fast.finetune, or one of its checkpoints")
    folder = find_checkpoint(best_of(path))
    state = checkpoint.read_state(folder)
    if STEM not in state:
        raise UserError(f"{folder} is a checkpoint of pretraining, not a detector; run muse_fast.finetune on it first")
    recorded = {"pos_embed_resize": RESIZE_UNRECORDED, **state[STEM]}
    tuples = {key: tuple(recorded.get(key, ())) for key in ("class_names", "taps")}
    detector = build_detector(DetectorSpec(**{**recorded, **tuples}))
    detector.load_state_dict(checkpoint.read_tensors(folder, STEM))
    return detector.to(device).eval()


def best_of(path: Path) -> Path:
    """The folder of the best detector of a run, or ``path``."""
    return path / BEST if (path / BEST).is_dir() else path


def build_detector(spec: DetectorSpec) -> Detector:
    """Build a detector whose weights are to be loaded."""
    described = ("image_size", "pos_embed_resize", "decoder_dim", "taps")
    shape: dict[str, Any] = {key: getattr(spec, key) for key in described}
    return build_to_fill(spec.arch, spec.taps, lambda: Detector(build_backbone(spec.arch, **shape), spec))


def _mlp(in_dim: int, hidden_dim: int, last: nn.Linear) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, hidden_dim), nn.ReLU(), last)


def _within(points: Points, area: tuple[int, int, int, int]) -> Points:
    """The points in the rectangle from (x0, y0) inclusive to (x1, y1) exclusive."""
    return points.take(np.all((points.xy >= area[:2]) & (points.xy < area[2:]), axis=1))


def _join(parts: Sequence[Points]) -> Points:
    xy, label, score = zip(*((part.xy, part.classes(), part.confidence()) for part in parts), strict=True)
    return Points(np.concatenate(xy), np.concatenate(label), np.concatenate(score))
