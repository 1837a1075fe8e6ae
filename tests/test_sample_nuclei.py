"""sample_nuclei against torch's grid_sample, image by image as the authors' code does, and against hand-worked maps."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from muse_fast import ops

pytestmark = pytest.mark.usefixtures("deterministic")

CHANNELS = (3, 5, 2, 4)
SIZES = {
    "208_px": [(52, 52), (26, 26), (13, 13), (6, 6)],
    "96_px": [(24, 24), (12, 12), (6, 6), (3, 3)],
    "not_square": [(11, 17), (5, 8), (3, 4), (1, 2)],
    "one_pixel": [(1, 1), (1, 1), (1, 1), (1, 1)],
}


def make_levels(sizes: Sequence[tuple[int, int]], images: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(images, c, *size, dtype=dtype) for c, size in zip(CHANNELS, sizes, strict=True)]


def make_points(count: int, view_size: int, images: int) -> tuple[Tensor, Tensor]:
    """Random points with the corners and the centre among them."""
    xy = torch.rand(count, 2) * view_size
    special = torch.tensor([[0.0, 0.0], [view_size - 1e-3, view_size - 1e-3], [view_size / 2, view_size / 2]])
    xy[: min(3, count)] = special[:count]
    return xy, torch.randint(images, (count,))


def by_grid_sample(levels: Sequence[Tensor], xy: Tensor, image_index: Tensor, view_size: int) -> Tensor:
    size = levels[0].shape[-2:]
    unified = torch.cat([F.interpolate(level, size, mode="bilinear", align_corners=True) for level in levels], dim=1)
    rows = []
    for point, image in zip(xy.to(unified.dtype), image_index.tolist(), strict=True):
        grid = (2 * point / view_size - 1).view(1, 1, 1, 2)
        rows.append(F.grid_sample(unified[image : image + 1], grid, align_corners=True).flatten())
    return torch.stack(rows)


@pytest.mark.parametrize("count", [1, 2, 97])
@pytest.mark.parametrize("sizes", SIZES)
def test_equals_grid_sample(sizes: str, count: int) -> None:
    levels = make_levels(SIZES[sizes], images=5)
    xy, image_index = make_points(count, 208, images=5)
    rows = ops.sample_nuclei(levels, xy, image_index, 208)
    assert rows.shape == (count, sum(CHANNELS))
    torch.testing.assert_close(rows, by_grid_sample(levels, xy, image_index, 208), rtol=0, atol=1e-12)


def test_gradient_equals_that_of_grid_sample() -> None:
    xy, image_index = make_points(97, 96, images=5)
    weights = torch.randn(97, sum(CHANNELS), dtype=torch.float64)
    gradients = []
    for op in (ops.sample_nuclei, by_grid_sample):
        torch.manual_seed(1)
        levels = [level.requires_grad_() for level in make_levels(SIZES["96_px"], images=5)]
        (op(levels, xy, image_index, 96) * weights).sum().backward()
        gradients.append([level.grad for level in levels])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-12)


def test_reads_the_coordinates_of_a_ramp_exactly() -> None:
    """Level 0 holds its own column and row numbers: u = x / R * (W - 1), v = y / R * (H - 1), in powers of two."""
    columns, rows = torch.arange(17.0).expand(9, 17), torch.arange(9.0).unsqueeze(1).expand(9, 17)
    level = torch.stack([columns, rows]).unsqueeze(0)
    xy = torch.tensor([[0.0, 0.0], [4.0, 8.0], [6.5, 31.0], [0.25, 16.0]])
    sampled = ops.sample_nuclei([level], xy, torch.zeros(4, dtype=torch.int64), 32)
    assert sampled.tolist() == [[0.0, 0.0], [2.0, 2.0], [3.25, 7.75], [0.125, 4.0]]


def test_coarse_level_is_resized_with_corners_aligned() -> None:
    """A 2-column level under a 5-column one: its ramp 0..4 arrives unchanged at every fine column."""
    fine = torch.zeros(1, 1, 1, 5)
    coarse = torch.tensor([0.0, 4.0]).view(1, 1, 1, 2)
    xy = torch.tensor([[0.0, 0.0], [2.0, 0.0], [3.0, 0.0], [6.5, 0.0]])
    sampled = ops.sample_nuclei([fine, coarse], xy, torch.zeros(4, dtype=torch.int64), 8)
    assert sampled[:, 1].tolist() == [0.0, 1.0, 1.5, 3.25]


def test_points_outside_take_the_border() -> None:
    level = torch.arange(12.0).view(1, 1, 3, 4)
    xy = torch.tensor([[-5.0, -5.0], [100.0, 100.0], [-1.0, 8.0]])
    sampled = ops.sample_nuclei([level], xy, torch.zeros(3, dtype=torch.int64), 8)
    assert sampled[:, 0].tolist() == [0.0, 11.0, 8.0]


def test_gradient_stays_in_the_image_of_the_point() -> None:
    levels = [level.requires_grad_() for level in make_levels(SIZES["96_px"], images=4)]
    xy, _ = make_points(20, 96, images=4)
    ops.sample_nuclei(levels, xy.requires_grad_(), torch.full((20,), 2), 96).sum().backward()
    for level, channels in zip(levels, CHANNELS, strict=True):
        assert level.grad is not None
        assert level.grad[[0, 1, 3]].abs().sum() == 0
        assert level.grad[2].sum().item() == pytest.approx(20 * channels)  # interpolation weights add up to 1
    assert xy.grad is None


def test_no_nuclei() -> None:
    levels = [level.requires_grad_() for level in make_levels(SIZES["96_px"], images=2)]
    rows = ops.sample_nuclei(levels, torch.empty(0, 2), torch.empty(0, dtype=torch.int64), 96)
    assert rows.shape == (0, sum(CHANNELS))
    rows.sum().backward()
    assert all(level.grad is not None and level.grad.abs().sum() == 0 for level in levels)


def test_two_runs_are_bit_equal() -> None:
    xy, image_index = make_points(500, 96, images=2)
    runs = []
    for _ in range(2):
        torch.manual_seed(1)
        levels = [level.requires_grad_() for level in make_levels(SIZES["96_px"], images=2, dtype=torch.float32)]
        rows = ops.sample_nuclei(levels, xy, image_index, 96)
        (rows * rows).sum().backward()
        runs.append([rows, *(level.grad for level in levels)])
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_bfloat16_is_as_exact_as_its_maps() -> None:
    levels = [level.bfloat16() for level in make_levels(SIZES["96_px"], images=3)]
    xy, image_index = make_points(200, 96, images=3)
    rows = ops.sample_nuclei(levels, xy, image_index, 96)
    truth = by_grid_sample([level.double() for level in levels], xy, image_index, 96)
    eager = by_grid_sample(levels, xy, image_index, 96)
    assert rows.dtype == torch.bfloat16
    assert (rows - truth).norm() <= 1.5 * (eager - truth).norm()
    assert (rows - truth).norm() <= 5e-3 * truth.norm()


def test_takes_strided_levels_and_gradients() -> None:
    levels = make_levels(SIZES["not_square"], images=3)
    xy, image_index = make_points(50, 64, images=3)
    expected = ops.sample_nuclei(levels, xy, image_index, 64)
    channels_last = [level.to(memory_format=torch.channels_last).requires_grad_() for level in levels]
    rows = ops.sample_nuclei(channels_last, xy, image_index, 64)
    assert torch.equal(rows, expected)
    rows.backward(torch.ones(1, dtype=torch.float64).expand_as(rows))
    assert channels_last[0].grad is not None
    assert channels_last[0].grad.sum().item() == pytest.approx(50 * CHANNELS[0])


def test_compiles_without_a_graph_break() -> None:
    levels = make_levels(SIZES["96_px"], images=3)
    compiled = torch.compile(ops.sample_nuclei, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (5, 12):
        xy, image_index = make_points(count, 96, images=3)
        torch.testing.assert_close(
            compiled(levels, xy, image_index, 96), by_grid_sample(levels, xy, image_index, 96), rtol=0, atol=1e-12
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"levels": []}, "levels must be tensors"),
        ({"levels": [torch.zeros(3, 4, 4)]}, "levels must be tensors"),
        ({"levels": [torch.zeros(2, 3, 4, 4), torch.zeros(1, 3, 2, 2)]}, "level 1 has 1 images"),
        (
            {"levels": [torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 2, 2).double()]},
            "level 1 has 2 images, torch.float64",
        ),
        ({"xy": torch.zeros(5, 3)}, "xy must be"),
        ({"xy": torch.zeros(5, 2, dtype=torch.int64)}, "xy must be"),
        ({"image_index": torch.zeros(4, dtype=torch.int64)}, r"image_index must be int64 \[5\]"),
        ({"image_index": torch.zeros(5)}, "image_index must be int64"),
        ({"view_size": 0}, "view_size must be positive"),
        ({"backend": "cpp"}, "no cpp implementation"),
    ],
)
def test_errors(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "levels": [torch.zeros(2, 3, 4, 4)],
        "xy": torch.zeros(5, 2),
        "image_index": torch.zeros(5, dtype=torch.int64),
        "view_size": 16,
    }
    with pytest.raises(ValueError, match=message):
        ops.sample_nuclei(**(arguments | change))  # type: ignore[arg-type]
