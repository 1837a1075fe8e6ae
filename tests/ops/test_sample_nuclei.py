"""sample_nuclei against torch's grid_sample, point by point, and against hand-computed maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from torch import Tensor

from muse_fast import ops
from muse_fast.ops import backends, reference
from tests.support.agreement import FLOOR, GRADIENT_CAP, assert_as_exact_as_eager

pytestmark = pytest.mark.usefixtures("deterministic")

INTERPRETED = not torch.cuda.is_available()  # whether Triton's interpreter runs the kernels
needs_library = pytest.mark.skipif(backends.library_error() is not None, reason=str(backends.library_error()))
needs_triton = pytest.mark.skipif(backends.triton_error() is not None, reason=str(backends.triton_error()))
CPP, TRITON = pytest.param("cpp", marks=needs_library), pytest.param("triton", marks=needs_triton)
every_backend = pytest.mark.parametrize("backend", ["reference", CPP, TRITON])
fast_backend = pytest.mark.parametrize("backend", [CPP, TRITON])

CHANNELS = (3, 5, 2, 4)
SIZES = {
    "nested": [(16, 16), (8, 8), (4, 4), (2, 2)],
    "not_square": [(11, 17), (5, 8), (3, 4), (1, 2)],
    "not_nested": [(13, 10), (7, 9), (13, 3), (2, 10)],
    "one_pixel": [(1, 1), (1, 1), (1, 1), (1, 1)],
    "coarsest_first": [(3, 4), (9, 4), (1, 30), (5, 2)],
    "one_level": [(9, 7)],
    "wide": [(5, 3), (4, 40)],
}


class Case(NamedTuple):
    levels: list[Tensor]
    xy: Tensor
    image_index: Tensor
    view_size: int


def make_case(
    sizes: str,
    backend: str,
    dtype: torch.dtype | None = None,
    count: int = 15,
    images: int = 2,
    channels: Sequence[int] = CHANNELS,
) -> Case:
    """Make random points in random images, including corners, the centre, points outside, and padding."""
    device = device_of(backend)
    dtype = dtype or precision_of(backend)
    shapes = [(images, c, *size) for c, size in zip(channels, SIZES[sizes], strict=False)]
    xy = torch.rand(count, 2) * 96
    special = torch.tensor([[0.0, 0.0], [96 - 1e-3, 96 - 1e-3], [48.0, 48.0], [-5.0, 30.0], [96.0, 200.0]])
    xy[: min(5, count)] = special[:count]
    image_index = torch.randint(images, (count,))
    image_index[5::6] = -1
    levels = [torch.randn(shape, dtype=torch.float64).to(device, dtype) for shape in shapes]
    return Case(levels, xy.to(device), image_index.to(device), 96)


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and not INTERPRETED else "cpu"


def precision_of(backend: str) -> torch.dtype:
    """Return the most precise dtype that a backend accepts."""
    return torch.float32 if backend == "triton" else torch.float64


def op_of(backend: str) -> Callable[..., Tensor]:
    return lambda *arguments: ops.sample_nuclei(*arguments, backend=backend)


def by_grid_sample(levels: Sequence[Tensor], xy: Tensor, image_index: Tensor, view_size: int) -> Tensor:
    size = levels[0].shape[-2:]
    unified = torch.cat([F.interpolate(level, size, mode="bilinear", align_corners=True) for level in levels], dim=1)
    rows = unified.new_zeros(len(xy), unified.shape[1])
    for row, (point, image) in enumerate(zip(xy.to(unified.dtype), image_index.tolist(), strict=True)):
        if image >= 0:
            grid = (2 * point / view_size - 1).view(1, 1, 1, 2)
            of_image = unified[image : image + 1]
            rows[row] = F.grid_sample(of_image, grid, padding_mode="border", align_corners=True).flatten()
    return rows


def rows_and_gradients(op: Callable[..., Tensor], case: Case, gradient: Tensor | None = None) -> list[Tensor]:
    """Return the rows, and the gradients of the levels for a gradient of the rows, by default a fixed random one."""
    levels = [level.detach().requires_grad_() for level in case.levels]
    rows = op(levels, *case[1:])
    if gradient is None:
        gradient = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1))
    rows.backward(gradient.to(rows))
    return [rows.detach(), *(level.grad for level in levels if level.grad is not None)]


def assert_exact(case: Case, backend: str) -> None:
    """Assert that a backend is as exact as eager PyTorch on the same inputs, with float64 as the truth."""
    dtype = case.levels[0].dtype
    gradient = torch.randn(len(case.xy), sum(level.shape[1] for level in case.levels)).to(dtype)
    exact = Case([level.double().cpu() for level in case.levels], case.xy.cpu(), case.image_index.cpu(), case.view_size)
    truth = rows_and_gradients(by_grid_sample, exact, gradient)
    if backend == "triton" and INTERPRETED and dtype == torch.bfloat16:  # it truncates where a GPU rounds
        truth = [(tensor.float().view(torch.int32) & -0x10000).view(torch.float32) for tensor in truth]
    got, eager = (rows_and_gradients(op, case, gradient) for op in (op_of(backend), reference.sample_nuclei))
    assert_as_exact_as_eager(got, eager, truth, [GRADIENT_CAP[dtype]] * len(got), FLOOR[dtype])


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        *(("reference", dtype) for dtype in ("float64", "float32")),
        *(pytest.param("cpp", dtype, marks=needs_library) for dtype in ("float64", "float32", "bfloat16", "float16")),
        *(pytest.param("triton", dtype, marks=needs_triton) for dtype in ("float32", "bfloat16", "float16")),
    ],
)
def test_equals_grid_sample(backend: str, dtype: str, sizes: str) -> None:
    assert_exact(make_case(sizes, backend, getattr(torch, dtype)), backend)


@pytest.mark.parametrize("channels", [(1,), (96, 192), (130, 1)], ids=str)
@every_backend
def test_any_number_of_channels(backend: str, channels: tuple[int, ...]) -> None:
    assert_exact(make_case("not_square", backend, count=7, channels=channels), backend)


@pytest.mark.parametrize("count", [1, 2, 40])
@every_backend
def test_any_number_of_points(backend: str, count: int) -> None:
    """All in one image."""
    case = make_case("one_level", backend, count=count, images=1)
    assert_exact(case, backend)


@every_backend
def test_a_single_point_reaches_all_its_pixels(backend: str) -> None:
    """Images with one point each, halfway between two fine rows, which depends on three rows of the 4-row level."""
    xy = torch.tensor([[40.0, 12.0], [40.0, 36.0], [40.0, 60.0], [40.0, 84.0]], device=device_of(backend))
    case = make_case("wide", backend, count=4, images=4)
    assert_exact(case._replace(xy=xy, image_index=torch.arange(4, device=xy.device)), backend)


@every_backend
def test_reads_the_coordinates_of_a_ramp_exactly(backend: str) -> None:
    """Level 0 contains its own column and row numbers: u = x / R * (W - 1), v = y / R * (H - 1), in powers of two."""
    columns, rows = torch.arange(17.0).expand(9, 17), torch.arange(9.0).unsqueeze(1).expand(9, 17)
    level = torch.stack([columns, rows]).unsqueeze(0)
    xy = torch.tensor([[0.0, 0.0], [4.0, 8.0], [6.5, 31.0], [0.25, 16.0]])
    arguments = (tensor.to(device_of(backend)) for tensor in (xy, torch.zeros(4, dtype=torch.int64)))
    sampled = ops.sample_nuclei([level.to(device_of(backend))], *arguments, 32, backend=backend)
    assert sampled.tolist() == [[0.0, 0.0], [2.0, 2.0], [3.25, 7.75], [0.125, 4.0]]


@every_backend
def test_coarse_level_is_resized_with_corners_aligned(backend: str) -> None:
    """A 2-column level under a 5-column one: its ramp 0..4 is exact at every fine column."""
    fine = torch.zeros(1, 1, 1, 5)
    coarse = torch.tensor([0.0, 4.0]).view(1, 1, 1, 2)
    xy = torch.tensor([[0.0, 0.0], [2.0, 0.0], [3.0, 0.0], [6.5, 0.0]])
    fine, coarse, xy, images = (
        tensor.to(device_of(backend)) for tensor in (fine, coarse, xy, torch.zeros(4, dtype=torch.int64))
    )
    sampled = ops.sample_nuclei([fine, coarse], xy, images, 8, backend=backend)
    assert sampled[:, 1].tolist() == [0.0, 1.0, 1.5, 3.25]


@every_backend
def test_upsamples_before_it_samples(backend: str) -> None:
    """A 3-column level 0, 1, 0 under a 4-column one is upsampled to 0, 2/3, 2/3, 0: halfway it is 2/3, not 1."""
    fine = torch.zeros(1, 1, 1, 4)
    coarse = torch.tensor([0.0, 1.0, 0.0]).view(1, 1, 1, 3)
    fine, coarse, xy, images = (
        tensor.to(device_of(backend)) for tensor in (fine, coarse, torch.tensor([[4.0, 0.0]]), torch.tensor([0]))
    )
    sampled = ops.sample_nuclei([fine, coarse], xy, images, 8, backend=backend)
    assert sampled[0, 1].item() == pytest.approx(2 / 3, rel=1e-6)


@every_backend
def test_points_outside_take_the_border(backend: str) -> None:
    level = torch.arange(12.0).view(1, 1, 3, 4)
    xy = torch.tensor([[-5.0, -5.0], [100.0, 100.0], [-1.0, 8.0], [8.0, 0.0]])
    level, xy, images = (tensor.to(device_of(backend)) for tensor in (level, xy, torch.zeros(4, dtype=torch.int64)))
    sampled = ops.sample_nuclei([level], xy, images, 8, backend=backend)
    assert sampled[:, 0].tolist() == [0.0, 11.0, 8.0, 3.0]


def dyadic_case(count: int, backend: str) -> tuple[Case, Tensor]:
    """Make sizes, points, values and gradients in halves and quarters, so that sums are never rounded."""
    sizes = [(9, 17), (5, 9), (3, 3)]
    levels = [torch.randint(-4, 5, (2, c, *size)).float() for c, size in zip((2, 1, 1), sizes, strict=True)]
    xy = torch.randint(0, 65, (count, 2)) / 2
    gradient = torch.randint(-2, 3, (count, 4)).float()
    image_index = torch.randint(-1, 2, (count,))
    device = device_of(backend)
    return Case([level.to(device) for level in levels], xy.to(device), image_index.to(device), 32), gradient


@every_backend
def test_is_exact_for_dyadic_numbers(backend: str) -> None:
    case, gradient = dyadic_case(30, backend)
    exact = case._replace(levels=[level.double() for level in case.levels])
    truth = rows_and_gradients(reference.sample_nuclei, exact, gradient)
    got = rows_and_gradients(op_of(backend), case, gradient)
    assert all(torch.equal(ours.double(), theirs) for ours, theirs in zip(got, truth, strict=True))


@needs_library
def test_more_points_than_16_bits_can_count() -> None:
    case, gradient = dyadic_case(4 * 65_536, "cpp")
    truth = rows_and_gradients(
        reference.sample_nuclei, case._replace(levels=[x.double() for x in case.levels]), gradient
    )
    got = rows_and_gradients(op_of("cpp"), case, gradient)
    assert all(torch.equal(ours.double(), theirs) for ours, theirs in zip(got, truth, strict=True))


def test_real_tissue_equals_scipy(shared_data: Path) -> None:
    """The red, green and blue of an H&E image are the channels of level 0."""
    path = sorted((shared_data / "brcam2c" / "images").glob("*.png"))[0]
    image = np.asarray(Image.open(path).convert("RGB"))[:224, :200].astype(np.float64)
    xy = torch.rand(200, 2) * 224
    rows = ops.sample_nuclei(
        [torch.from_numpy(image).permute(2, 0, 1)[None]], xy, torch.zeros(200, dtype=torch.int64), 224
    )
    places = xy.double().numpy()[:, ::-1].T / 224 * [[223], [199]]
    expected = [ndimage.map_coordinates(image[..., c], places, order=1) for c in range(3)]
    torch.testing.assert_close(rows, torch.from_numpy(np.stack(expected, axis=1)), rtol=0, atol=1e-9)


@every_backend
def test_gradient_stays_in_the_image_of_the_point(backend: str) -> None:
    case = make_case("nested", backend, images=4)
    xy = case.xy.clone().requires_grad_()
    case = case._replace(xy=xy, image_index=torch.full_like(case.image_index, 2))
    _, *gradients = rows_and_gradients(op_of(backend), case, torch.ones(15, sum(CHANNELS)))
    for gradient, channels in zip(gradients, CHANNELS, strict=True):
        assert gradient[[0, 1, 3]].count_nonzero() == 0
        assert gradient[2].sum().item() == pytest.approx(15 * channels)  # interpolation weights add up to 1
    assert xy.grad is None


@every_backend
def test_padding_changes_only_its_own_rows(backend: str) -> None:
    case = make_case("not_square", backend)
    kept = case.image_index >= 0
    assert 0 < kept.sum() < len(kept)
    gradient = torch.randn(len(kept), sum(CHANNELS))
    rows, *gradients = rows_and_gradients(op_of(backend), case, gradient)
    fewer = case._replace(xy=case.xy[kept], image_index=case.image_index[kept])
    rows_of_fewer, *gradients_of_fewer = rows_and_gradients(op_of(backend), fewer, gradient[kept.cpu()])
    assert rows[~kept].count_nonzero() == 0
    assert torch.equal(rows[kept], rows_of_fewer)
    torch.testing.assert_close(gradients, gradients_of_fewer)


@pytest.mark.parametrize("points", ["none", "padding"])
@every_backend
def test_without_nuclei_everything_is_zero(backend: str, points: str) -> None:
    case = make_case("nested", backend, count=0 if points == "none" else 3)
    case = case._replace(image_index=torch.full_like(case.image_index, -1))
    rows, *gradients = rows_and_gradients(op_of(backend), case)
    assert rows.shape == (len(case.xy), sum(CHANNELS))
    assert [gradient.shape for gradient in gradients] == [level.shape for level in case.levels]
    assert not any(tensor.count_nonzero() for tensor in (rows, *gradients))


@every_backend
def test_two_runs_are_bit_identical(backend: str) -> None:
    case = make_case("nested", backend, torch.float32, count=40)
    first, second = (rows_and_gradients(op_of(backend), case) for _ in range(2))
    assert all(map(torch.equal, first, second))


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_do_not_change_the_bits(dtype: torch.dtype) -> None:
    case = make_case("nested", "cpp", dtype, count=2000, images=5)
    threads = torch.get_num_threads()
    runs = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        runs.append(rows_and_gradients(op_of("cpp"), case))
    torch.set_num_threads(threads)
    assert all(map(torch.equal, runs[0], runs[1])) and all(map(torch.equal, runs[0], runs[2]))


@every_backend
def test_points_may_be_in_any_order(backend: str) -> None:
    case = make_case("not_square", backend)
    order = torch.randperm(len(case.xy), device=case.xy.device)
    gradient = torch.randn(len(order), sum(CHANNELS))
    rows, *gradients = rows_and_gradients(op_of(backend), case, gradient)
    shuffled = case._replace(xy=case.xy[order], image_index=case.image_index[order])
    rows_of_shuffled, *gradients_of_shuffled = rows_and_gradients(op_of(backend), shuffled, gradient[order.cpu()])
    assert torch.equal(rows[order], rows_of_shuffled)
    torch.testing.assert_close(gradients, gradients_of_shuffled)


@every_backend
def test_reads_levels_of_any_strides(backend: str) -> None:
    case = make_case("not_square", backend)
    rows, *gradients = rows_and_gradients(op_of(backend), case)
    layouts: dict[str, Callable[[Tensor], Tensor]] = {
        "channels_last": lambda level: level.to(memory_format=torch.channels_last),
        "transposed": lambda level: level.transpose(2, 3).contiguous().transpose(2, 3),
        "every_second": lambda level: torch.stack([level, level], 2).flatten(1, 2)[:, ::2],
    }
    for name, layout in layouts.items():
        levels = [layout(level) for level in case.levels]
        assert not any(level.is_contiguous() for level in levels[:3])
        rows_there, *gradients_there = rows_and_gradients(op_of(backend), case._replace(levels=levels))
        torch.testing.assert_close(rows_there, rows, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gradients_there, gradients, rtol=1e-6, atol=1e-6)
        if name == "channels_last" and backend != "reference":
            assert all(gradient.is_contiguous(memory_format=torch.channels_last) for gradient in gradients_there)
            assert torch.equal(rows_there, rows)


@every_backend
def test_accepts_strided_points_and_gradients(backend: str) -> None:
    case = make_case("not_square", backend)
    columns = sum(CHANNELS)
    gradient = torch.randn(columns, len(case.xy)).T
    apart = case._replace(
        xy=case.xy.T.contiguous().T, image_index=torch.stack([case.image_index, case.image_index], 1)[:, 0]
    )
    first = rows_and_gradients(op_of(backend), case, gradient.contiguous())
    second = rows_and_gradients(op_of(backend), apart, gradient)
    assert all(map(torch.equal, first, second))
    one = torch.ones(1, 1)
    first = rows_and_gradients(op_of(backend), case, one.repeat(len(case.xy), columns))
    second = rows_and_gradients(op_of(backend), case, one.expand(len(case.xy), columns))
    assert all(map(torch.equal, first, second))


@every_backend
def test_levels_without_a_gradient_get_none(backend: str) -> None:
    case = make_case("not_square", backend)
    _, *expected = rows_and_gradients(op_of(backend), case, torch.ones(15, sum(CHANNELS)))
    levels = [level.detach().requires_grad_(place % 2 == 1) for place, level in enumerate(case.levels)]
    op_of(backend)(levels, *case[1:]).sum().backward()
    assert [level.grad is None for level in levels] == [True, False, True, False]
    assert torch.equal(levels[1].grad, expected[1]) and torch.equal(levels[3].grad, expected[3])


@every_backend
def test_autocast_changes_nothing(backend: str) -> None:
    case = make_case("not_square", backend, torch.float16)
    expected = op_of(backend)(*case)
    with torch.autocast(case.xy.device.type, torch.bfloat16):
        rows = op_of(backend)(*case)
    assert rows.dtype == torch.float16
    assert torch.equal(rows, expected)


@needs_library
@pytest.mark.parametrize("sizes", ["not_square", "coarsest_first"])
def test_cpp_gradcheck(sizes: str) -> None:
    case = make_case(sizes, "cpp", count=7, channels=(2, 1, 1, 2))

    def op(*levels: Tensor) -> Tensor:
        return op_of("cpp")(list(levels), *case[1:])

    assert torch.autograd.gradcheck(op, [level.requires_grad_() for level in case.levels])


@pytest.mark.parametrize("channels_last", [False, True])
@fast_backend
def test_opcheck(backend: str, channels_last: bool) -> None:
    if backend == "triton":
        from muse_fast.kernels.fused import sample_nuclei as fused

        forward, backward = fused.sample_nuclei_fwd._opoverload, fused.sample_nuclei_bwd._opoverload
    else:
        forward, backward = (getattr(torch.ops.muse_fast, f"sample_nuclei_{way}").default for way in ("fwd", "bwd"))
    case = make_case("not_square", backend, torch.float32, count=3, channels=CHANNELS[:2])
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    levels = [level.to(memory_format=memory_format).requires_grad_() for level in case.levels]
    torch.library.opcheck(forward, (levels, *case[1:]))
    shapes = [size for level in levels for size in level.shape[1:]]
    gradient = torch.randn(sum(CHANNELS[:2]), 3, device=case.xy.device).T
    torch.library.opcheck(backward, (gradient, *case[1:], 2, shapes, channels_last))


@pytest.mark.parametrize("dynamic", [False, True])
@fast_backend
def test_compiles_without_a_graph_break(backend: str, dynamic: bool) -> None:
    op = op_of(backend)
    compiled = torch.compile(op, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for count in (5, 8):
        case = make_case("not_square", backend, count=count)
        expected = rows_and_gradients(op, case)
        assert all(map(torch.equal, rows_and_gradients(compiled, case), expected))


def test_reference_compiles_without_a_graph_break() -> None:
    compiled = torch.compile(op_of("reference"), fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (5, 8):
        case = make_case("not_square", "reference", count=count)
        torch.testing.assert_close(compiled(*case), by_grid_sample(*case), rtol=0, atol=1e-12)


@needs_library
def test_is_chosen_on_the_cpu() -> None:
    assert backends.choose("sample_nuclei", "cpu", None, torch.float32) == "cpp"


@needs_library
@pytest.mark.parametrize("image", [2, 2**40])
def test_cpp_rejects_images_out_of_range(image: int) -> None:
    case = make_case("not_square", "cpp")
    case.image_index[7] = image
    with pytest.raises(RuntimeError, match=f"image_index must be below 2, the number of images, got {image}"):
        op_of("cpp")(*case)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"levels": []}, "levels must be tensors"),
        ({"levels": [torch.zeros(3, 4, 4)]}, "levels must be tensors"),
        ({"levels": [torch.zeros(3, 4, 4, 0)]}, "levels must be tensors"),
        ({"levels": [torch.zeros(2, 3, 4, 4), torch.zeros(1, 3, 2, 2)]}, "level 1 has 1 images"),
        (
            {"levels": [torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 2, 2).double()]},
            "level 1 has 2 images, torch.float64",
        ),
        ({"levels": [torch.zeros(2, 3, 4, 4, dtype=torch.int32)]}, "levels must be floating point, got torch.int32"),
        ({"xy": torch.zeros(5, 3)}, "xy must be"),
        ({"xy": torch.zeros(5, 2, dtype=torch.int64)}, "xy must be"),
        ({"image_index": torch.zeros(4, dtype=torch.int64)}, r"image_index must be int64 \[5\]"),
        ({"image_index": torch.zeros(5)}, "image_index must be int64"),
        ({"view_size": 0}, "view_size must be positive"),
        ({"backend": "cuda"}, "no cuda implementation"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "levels": [torch.zeros(2, 3, 4, 4)],
        "xy": torch.zeros(5, 2),
        "image_index": torch.zeros(5, dtype=torch.int64),
        "view_size": 16,
    }
    with pytest.raises(ValueError, match=message):
        ops.sample_nuclei(**(arguments | change))
