"""The timed cases: the sizes of real runs, the minimum work of any version, and the project's targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from muse_fast.views.colours import UNSTAINED

STUDENT_TEMP, TEACHER_TEMP = 0.1, 0.04
LEVEL_STRIDES = (4, 8, 16, 32)

Build = Callable[[torch.Generator, torch.dtype], tuple[Any, ...]]


class Work(NamedTuple):
    """Bytes that must be read from or written to memory, and FLOPs, of one forward and backward."""

    bytes: int
    flops: int


class Target(NamedTuple):
    """A ratio that the default backend should reach; ``figure`` is its key in the rows of the report."""

    device: str
    figure: str
    at_least: float


@dataclass(frozen=True, kw_only=True)
class Case:
    """Inputs of one size for one op."""

    op: str
    name: str
    inputs: Build
    devices: tuple[str, ...] = ("cpu", "cuda")
    targets: tuple[Target, ...] = ()


# --- inputs: those that receive a gradient in training require one here


def match_inputs(rois: int, views: int, nuclei: int) -> Build:
    """Nuclei of views: a ROI has twice as many as a view on average; a view shows each with probability 1/2."""

    def build(random: torch.Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        visible = torch.rand(views * rois, 2 * nuclei, generator=random) < 0.5
        offsets = F.pad(visible.sum(1).cumsum(0), (1, 0)).int()
        return visible.nonzero()[:, 1].int(), offsets, rois, 2

    return build


def sample_inputs(images: int, size: int, channels: int, nuclei: int) -> Build:
    """Levels of ``images`` views of ``size`` pixels, each view with ``nuclei`` nuclei."""

    def build(random: torch.Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        levels = [level.requires_grad_() for level in decoder_levels(images, size, channels, random, dtype)]
        xy = torch.rand(images * nuclei, 2, generator=random) * size
        return levels, xy, torch.arange(images).repeat_interleave(nuclei), size

    return build


def decoder_levels(images: int, size: int, channels: int, random: torch.Generator, dtype: torch.dtype) -> list[Tensor]:
    """Maps at strides 4 to 32 of ``size`` pixels."""
    sides = [size // stride for stride in LEVEL_STRIDES]
    return [torch.randn(images, channels, side, side, generator=random).to(dtype) for side in sides]


def norm_inputs(rows: int, width: int) -> Build:
    """A float32 stream, a branch of the dtype with dropped paths, and LayerNorm."""

    def build(random: torch.Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        x = torch.randn(rows, width, generator=random).requires_grad_()
        branch = torch.randn(rows, width, generator=random).to(dtype).requires_grad_()
        scale = (torch.rand(rows, 1, generator=random) < 0.9) / 0.9
        affine = [torch.ones(width).requires_grad_(), torch.zeros(width).requires_grad_()]
        return x, branch, scale, *affine, 1e-6

    return build


def gelu_inputs(rows: int, width: int) -> Build:
    """What the first linear layer of an MLP returns, and its bias."""

    def build(random: torch.Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        hidden = torch.randn(rows, width, generator=random).to(dtype)
        return hidden.requires_grad_(), torch.zeros(width).requires_grad_()

    return build


def join_inputs(layout: Sequence[tuple[int, int]], heads: int, width: int) -> Build:
    """Gradients of q, k and v, images and tokens per resolution, with heads before tokens in memory."""

    def build(random: torch.Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        shapes = [(images, heads, tokens, width) for images, tokens in layout for _ in range(3)]
        return [torch.randn(shape, generator=random).to(dtype).transpose(1, 2) for shape in shapes], True

    return build


def batch_norm_inputs(images: int, channels: int, side: int) -> Build:
    """The end of a residual block: maps of the dtype, parameters and statistics in float32."""

    def build(random: torch.Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        maps = [torch.randn(images, channels, side, side, generator=random).to(dtype) for _ in range(2)]
        x, residual = (x.to(memory_format=torch.channels_last).requires_grad_() for x in maps)
        affine = [torch.ones(channels).requires_grad_(), torch.zeros(channels).requires_grad_()]
        running = torch.zeros(channels), torch.ones(channels), torch.tensor(0)
        return x, residual, *affine, *running, 0.1, 1e-5, True

    return build


def resize_inputs(images: int, sides: tuple[int, int], channels: tuple[int, int], side: int) -> Build:
    """Two maps, as they reach a stage of the decoder."""

    def build(random: torch.Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        shapes = [(images, c, h, h) for c, h in zip(channels, sides, strict=True)]
        maps = [torch.randn(*shape, generator=random).to(dtype) for shape in shapes]
        return [x.to(memory_format=torch.channels_last).requires_grad_() for x in maps], side

    return build


def stats_inputs(images: int, channels: int, side: int, outputs: int) -> Build:
    """A decoder map after its last ReLU, and the weight of the 1x1 convolution that projects it."""

    def build(random: torch.Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        x = torch.randn(images, channels, side, side, generator=random).relu().to(dtype)
        weight = (torch.randn(outputs, channels, generator=random) * (2 / outputs) ** 0.5).to(dtype)
        return x.requires_grad_(), weight.requires_grad_()

    return build


def view_inputs(rois: int, views: int, roi_side: int, size: int) -> Build:
    """Views anywhere in ROIs of ``roi_side`` pixels, 1 to 2 times as coarse, with about the colours of DINO's globals.

    Of 10 views, 8 are jittered, 2 grey, 5 blurred and 1 solarised on average.
    """

    def build(random: torch.Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        def draw(low: float = 0.0, high: float = 1.0) -> Tensor:
            return low + (high - low) * torch.rand(rois * views, generator=random)

        coarse = torch.rand(rois, 3, roi_side // 8, roi_side // 8, generator=random)
        tissue = F.interpolate(coarse, (roi_side, roi_side), mode="bilinear") * 255
        table = torch.arange(rois).unsqueeze(1) * tissue[0].numel() * torch.tensor([1, 0, 0])
        table += torch.tensor([0, roi_side, roi_side])
        side = (draw(1, 2) * size).int().clamp(max=roi_side)
        place = [(draw() * (roi_side - side)).int() for _ in "xy"]
        turn = [(draw() < 0.5).int(), (draw() * 4).int()]
        boxes = torch.stack([torch.arange(rois).repeat(views).int(), *place, side, *turn], dim=1)
        jittered, sigma = draw() < 0.8, draw(0.1, 2.0)
        strengths = [draw(1 - s, 1 + s) for s in (0.4, 0.4, 0.2, 0.1)]
        jitter = [
            torch.where(jittered, strength, 1.0) - shift
            for strength, shift in zip(strengths, (0, 0, 0, 1), strict=True)
        ]
        order = torch.stack([torch.randperm(4, generator=random) for _ in range(rois * views)], dim=1)
        others = [draw() < 0.2, torch.where(draw() < 0.5, sigma, 0.0), draw() < 0.1]
        stain = torch.tensor(UNSTAINED).repeat(rois * views, 1)
        colours = torch.stack([column.float() for column in (*jitter, *order, *others)], dim=1)
        colours = torch.cat([colours, stain], dim=1)
        return tissue.to(torch.uint8).flatten(), table, boxes, colours, size

    return build


def loss_inputs(students: int, teachers: int, prototypes: int, pairs: int, width: int = 0) -> Build:
    """Logits, or with a ``width`` unit features and prototypes.

    Pairs are spread evenly over the rows: with 1.5 pairs per student, half of the students have two teachers, like
    nuclei in both globals.
    """

    def build(random: torch.Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        def spread(count: int) -> Tensor:
            rounds = [torch.randperm(count, generator=random) for _ in range(-(-pairs // count))]
            return torch.cat(rounds)[:pairs]

        def unit_rows(count: int) -> Tensor:
            return F.normalize(torch.randn(count, width, generator=random), dim=1).to(dtype)

        if width:
            student = [unit_rows(students).requires_grad_(), unit_rows(prototypes).requires_grad_()]
            teacher = [unit_rows(teachers), unit_rows(prototypes)]
        else:
            logits = [(torch.rand(n, prototypes, generator=random) * 2 - 1).to(dtype) for n in (students, teachers)]
            student, teacher = [logits[0].requires_grad_()], [logits[1]]
        center = torch.randn(prototypes, generator=random) * 0.1
        return *student, *teacher, center, spread(teachers), spread(students), STUDENT_TEMP, TEACHER_TEMP

    return build


# --- work, from results and inputs: the forward and the backward each read every input once, and every result is
# written once


def match_work(results: list[Tensor], index: Tensor, offsets: Tensor, *_: Any) -> Work:
    return Work(4 * (len(index) + len(offsets)) + 2 * 8 * len(results[0]), 0)


def sample_work(_: list[Tensor], levels: list[Tensor], xy: Tensor, image_index: Tensor, view_size: int) -> Work:
    """The backward does not read the levels, and writes all their gradients. 2 FLOPs per tap, forward and backward."""
    item, rows = levels[0].element_size(), len(xy)
    points, features = (8 + 8) * rows, item * rows * sum(level.shape[1] for level in levels)
    taps = sum(level.shape[1] * min(4 * rows, level[:, 0].numel()) for level in levels)  # or all pixels, if fewer
    forward = points + item * taps + features
    backward = points + features + item * sum(level.numel() for level in levels)
    return Work(forward + backward, 2 * 2 * 4 * features // item)


def norm_work(results: list[Tensor], x: Tensor, branch: Tensor, scale: Tensor, *_: Any) -> Work:
    """The backward reads the sum and the gradients of both results, and writes two. FLOPs are not counted."""
    total, normed = (4 * x.numel(), branch.element_size() * x.numel())
    forward = 4 * x.numel() + branch.element_size() * x.numel() + total + normed
    backward = 2 * total + normed + 4 * x.numel() + branch.element_size() * x.numel()
    return Work(forward + backward + 2 * 4 * len(scale), 0)


def gelu_work(results: list[Tensor], hidden: Tensor, bias: Tensor) -> Work:
    """The backward reads the hidden values and the gradient of the result, and writes one."""
    return Work(5 * hidden.element_size() * hidden.numel() + 4 * len(bias), 0)


def join_work(results: list[Tensor], *_: Any) -> Work:
    joined, sums = results
    return Work(2 * joined.element_size() * joined.numel() + 4 * len(sums), 0)


def batch_norm_work(_: list[Tensor], x: Tensor, *__: Any) -> Work:
    """Both passes of a direction must read x, and the gradient of the result; the sign of the result is needed once, if
    the gradient before ReLU, which the residual gets, is written then."""
    forward, backward = 2 + 1 + 1, (3 + 1) + (2 + 1)
    return Work((forward + backward) * x.numel() * x.element_size(), 0)


def resize_work(results: list[Tensor], maps: list[Tensor], side: int) -> Work:
    """8 FLOPs per value of a resized map, forward and backward. A map of the right size gets a view as its gradient."""
    item, out = maps[0].element_size(), results[0].numel()
    resized = [x for x in maps if x.shape[-1] != side]
    forward = sum(x.numel() for x in maps) + out
    backward = sum(x.numel() + x.shape[0] * x.shape[1] * side**2 for x in resized)
    return Work(item * (forward + backward), 2 * 8 * sum(x.shape[0] * x.shape[1] * side**2 for x in resized))


def stats_work(_: list[Tensor], x: Tensor, weight: Tensor) -> Work:
    """Three matrix products: the projection and the gradients of its two arguments. A version that does not store the
    projection computes it twice."""
    item, outputs = x.element_size(), len(weight)
    arguments, statistics = item * (x.numel() + weight.numel()), 2 * 4 * outputs
    return Work(3 * arguments + 2 * statistics, 3 * 2 * x.numel() * outputs)


def view_work(results: list[Tensor], pixels: Tensor, images: Tensor, boxes: Tensor, colours: Tensor, _: int) -> Work:
    """The pixels of every box are read once, but at most all pixels once; every view is written once.

    FLOPs are not counted, because no step requires a matrix product.
    """
    cut = min(3 * int(boxes[:, 3].long().square().sum()), pixels.numel())
    numbers = sum(tensor.numel() * tensor.element_size() for tensor in (images, boxes, colours))
    return Work(cut + numbers + sum(view.numel() * view.element_size() for view in results), 0)


def loss_work(results: list[Tensor], student: Tensor, teacher: Tensor, *_: Any) -> Work:
    """FLOPs per prototype: for a row, 5 for the log-sum-exp and 3 for the softmax that the backward recomputes; for a
    student row, 2 more for its gradient; for a pair, 2 for the dot product and 2 for the sum of its targets."""
    (students, prototypes), teachers, pairs = student.shape, len(teacher), len(results[0])
    item = student.element_size()
    read = item * prototypes * (students + teachers) + 4 * prototypes + (8 + 8 + 4) * pairs  # loss, or its gradient
    return Work(2 * read + item * prototypes * students, prototypes * (10 * students + 8 * teachers + 4 * pairs))


def linear_loss_work(results: list[Tensor], student_z: Tensor, student_W: Tensor, teacher_z: Tensor, *_: Any) -> Work:
    """Only the matrix products: the logits of both, and two products for the gradients.

    A version that does not store logits recomputes them, 8Kd(Ns + Nt) in all, so the reported share of the matmul rate
    is below the rate that it achieves.
    """
    (students, width), prototypes = student_z.shape, len(student_W)
    teachers, item = len(teacher_z), student_z.element_size()
    read = item * width * (students + teachers + 2 * prototypes) + 4 * prototypes + (8 + 8 + 4) * len(results[0])
    gradients = item * width * (students + prototypes)
    return Work(2 * read + gradients, 2 * prototypes * width * (3 * students + teachers))


WORK: dict[str, Callable[..., Work]] = {
    "match_nuclei": match_work,
    "sample_nuclei": sample_work,
    "projection_stats": stats_work,
    "augment_views": view_work,
    "add_layer_norm": norm_work,
    "gelu": gelu_work,
    "join_heads": join_work,
    "batch_norm": batch_norm_work,
    "resize_concat": resize_work,
    "dino_loss": loss_work,
    "linear_dino_loss": linear_loss_work,
}

# --- cases: 16 ROIs per rank, with 2 globals and 8 locals each. ViT-S has levels of 96 channels, ViT-B of 192; a global
# has 224 px and about 60 nuclei, a local 96 px and 12; with a large field of view (LFoV) 512 px and 300. A row is a
# nucleus in one view. K is 65,536, or 4,096 for smaller sets.

CUDA = ("cuda",)
CASES = [
    Case(
        op="match_nuclei",
        name="16 ROIs x 10 views x 60",
        inputs=match_inputs(16, 10, 60),
        targets=(Target("cpu", "speedup_literal", 20),),
    ),
    Case(op="match_nuclei", name="16 ROIs x 10 views x 300", inputs=match_inputs(16, 10, 300)),
    Case(
        op="sample_nuclei",
        name="ViT-S 224, 16 x 60",
        inputs=sample_inputs(16, 224, 96, 60),
        targets=(Target("cpu", "speedup_literal", 10), Target("cpu", "speedup_eager", 1.5)),
    ),
    Case(op="sample_nuclei", name="ViT-S 96, 32 x 12", inputs=sample_inputs(32, 96, 96, 12)),
    Case(op="sample_nuclei", name="ViT-B 224, 16 x 60", inputs=sample_inputs(16, 224, 192, 60), devices=CUDA),
    Case(op="sample_nuclei", name="ViT-S 512, 4 x 300", inputs=sample_inputs(4, 512, 96, 300), devices=CUDA),
    Case(
        op="sample_nuclei",
        name="ViT-S 224, 32 x 60",
        inputs=sample_inputs(32, 224, 96, 60),
        devices=CUDA,
        targets=(
            Target("cuda", "speedup_eager", 4),
            Target("cuda", "speedup_literal", 30),
            Target("cuda", "of_copy", 0.7),
        ),
    ),
    Case(
        op="sample_nuclei",
        name="ViT-S 96, 128 x 12",
        inputs=sample_inputs(128, 96, 96, 12),
        devices=CUDA,
        targets=(Target("cuda", "speedup_literal", 30),),
    ),
    Case(op="sample_nuclei", name="ViT-B 512, 16 x 300", inputs=sample_inputs(16, 512, 192, 300), devices=CUDA),
    Case(op="projection_stats", name="ViT-S 224, 16 x 96 x 56 x 56", inputs=stats_inputs(16, 96, 56, 96)),
    Case(op="projection_stats", name="ViT-S 224, 16 x 768 x 7 x 7", inputs=stats_inputs(16, 768, 7, 96)),
    Case(
        op="projection_stats",
        name="ViT-B 512, 16 x 192 x 128 x 128",
        inputs=stats_inputs(16, 192, 128, 192),
        devices=CUDA,
    ),
    Case(op="augment_views", name="4 ROIs x 2 x 224 px", inputs=view_inputs(4, 2, 1024, 224)),
    Case(op="augment_views", name="16 ROIs x 2 x 224 px", inputs=view_inputs(16, 2, 1024, 224), devices=CUDA),
    Case(op="augment_views", name="16 ROIs x 8 x 96 px", inputs=view_inputs(16, 8, 1024, 96), devices=CUDA),
    Case(op="augment_views", name="16 ROIs x 2 x 512 px", inputs=view_inputs(16, 2, 2048, 512), devices=CUDA),
    Case(op="add_layer_norm", name="ViT-S, 2760 tokens", inputs=norm_inputs(2760, 384)),
    Case(
        op="add_layer_norm",
        name="ViT-S 224/96, 64 ROIs",
        inputs=norm_inputs(44160, 384),
        devices=CUDA,
        targets=(Target("cuda", "of_copy", 0.8),),
    ),
    Case(op="add_layer_norm", name="ViT-B 224/96, 64 ROIs", inputs=norm_inputs(44160, 768), devices=CUDA),
    Case(op="gelu", name="ViT-S, 690 tokens", inputs=gelu_inputs(690, 1536)),
    Case(
        op="gelu",
        name="ViT-S 224/96, 64 ROIs",
        inputs=gelu_inputs(44160, 1536),
        devices=CUDA,
        targets=(Target("cuda", "of_copy", 0.8),),
    ),
    Case(op="join_heads", name="ViT-S 224/96, 1 ROI", inputs=join_inputs([(2, 197), (8, 37)], 6, 64)),
    Case(
        op="join_heads",
        name="ViT-S 224/96, 64 ROIs",
        inputs=join_inputs([(128, 197), (512, 37)], 6, 64),
        devices=CUDA,
        targets=(Target("cuda", "of_copy", 0.8),),
    ),
    Case(op="batch_norm", name="ViT-S 224, 2 x 96 x 56 x 56", inputs=batch_norm_inputs(2, 96, 56)),
    Case(
        op="batch_norm",
        name="ViT-S 224, 128 x 96 x 56 x 56",
        inputs=batch_norm_inputs(128, 96, 56),
        devices=CUDA,
        targets=(Target("cuda", "of_copy", 0.8),),
    ),
    Case(op="batch_norm", name="ViT-S 96, 512 x 384 x 6 x 6", inputs=batch_norm_inputs(512, 384, 6), devices=CUDA),
    Case(
        op="resize_concat", name="ViT-S 224, 2 x (192, 28) + (96, 14)", inputs=resize_inputs(2, (28, 14), (192, 96), 56)
    ),
    Case(
        op="resize_concat",
        name="ViT-S 224, 128 x (192, 28) + (96, 14)",
        inputs=resize_inputs(128, (28, 14), (192, 96), 56),
        devices=CUDA,
        targets=(Target("cuda", "of_copy", 0.6),),
    ),
    Case(op="dino_loss", name="160 images, K 65536", inputs=loss_inputs(160, 32, 65536, 288)),
    Case(op="dino_loss", name="500 rows, K 4096", inputs=loss_inputs(500, 250, 4096, 750)),
    Case(
        op="dino_loss",
        name="500 rows, K 65536",
        inputs=loss_inputs(500, 250, 65536, 750),
        targets=(Target("cpu", "speedup_eager", 2), Target("cpu", "memory_eager", 5)),
    ),
    Case(
        op="dino_loss",
        name="2000 rows, K 65536",
        inputs=loss_inputs(2000, 1000, 65536, 3000),
        devices=CUDA,
        targets=(Target("cuda", "of_copy", 0.8),),
    ),
    Case(op="linear_dino_loss", name="500 rows, K 4096", inputs=loss_inputs(500, 250, 4096, 750, width=256)),
    Case(
        op="linear_dino_loss",
        name="500 rows, K 65536",
        inputs=loss_inputs(500, 250, 65536, 750, width=256),
        targets=(Target("cpu", "memory_eager", 20),),
    ),
    Case(
        op="linear_dino_loss",
        name="2000 rows, K 65536",
        inputs=loss_inputs(2000, 1000, 65536, 3000, width=256),
        devices=CUDA,
        targets=(Target("cuda", "speedup_eager", 6), Target("cuda", "memory_eager", 50)),
    ),
]
