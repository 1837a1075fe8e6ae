"""Test the tests of the ops: each bug below is planted in a copy of the checkout, where its op's tests must fail."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from torch.utils.cpp_extension import include_paths, library_paths

from muse_fast.ops import backends

ROOT = Path(__file__).parents[2]
LIBRARY = "build/_C.so"

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.timeout(900),
    pytest.mark.skipif(backends.triton_error() is not None, reason=str(backends.triton_error())),
]


class Bug(NamedTuple):
    """``correct`` appears once in ``file``; with ``wrong`` in its place, one of the tests must fail."""

    file: str
    correct: str
    wrong: str
    tests: str  # a file
    named: str  # selects tests in it by name, like pytest -k


EXACT = ("test_dino_loss.py", "exact_as_eager or padding")
SAMPLED = ("test_sample_nuclei.py", "equals_grid_sample and not reference")
CHECKED = ("test_sample_nuclei.py", "opcheck and cpp")
MATCHED = ("test_match_nuclei.py", "set_intersection and cpp")
RESIZED = ("test_augment_views.py", "equals_pillow and triton or equals_torchvision and triton")
STAINED = ("test_augment_views.py", "stains_equal_the_equations and triton")
NORMED = ("test_add_layer_norm.py", "exact_as_eager or hand_computed and triton")
ACTIVATED = ("test_gelu.py", "exact_as_eager")
JOINED = ("test_join_heads.py", "float64 and triton")
BATCHED = ("test_batch_norm.py", "exact_as_eager and add_relu or no_digits")
CONCATENATED = ("test_resize_concat.py", "products_of_matrices and triton")
LINEAR = ("test_linear_dino_loss.py", "exact_as_eager or padding")

BUGS = {
    "cpp_gradient_1_percent": Bug(
        "csrc/dino_loss.cpp",
        "weight += weights[p];",
        "weight += 1.01f * weights[p];",
        *EXACT,
    ),
    "cpp_missing_centre": Bug("csrc/dino_loss.cpp", "subtract(u, &centers", "if (false) subtract(u, &centers", *EXACT),
    "cpp_dropped_pair": Bug("csrc/match_nuclei.cpp", "while (a < a_end &&", "while (a + 1 < a_end &&", *MATCHED),
    "cpp_swapped_x_y": Bug(
        "csrc/sample_nuclei.cpp", "position(point, 0, fine_width)", "position(point, 1, fine_width)", *SAMPLED
    ),
    "cpp_off_by_one_tap": Bug("csrc/sample_nuclei.cpp", "std::pair{q + 1, s}", "std::pair{q, s}", *SAMPLED),
    "cpp_wrong_fake_shape": Bug(
        "kernels/registration.py", "new_empty(xy.shape[0],", "new_empty(xy.shape[0] + 1,", *CHECKED
    ),
    "triton_gradient_1_percent": Bug(
        "kernels/fused/dino_loss.py",
        "out = total * inverse_student_temp",
        "out = total * 1.01 * inverse_student_temp",
        *EXACT,
    ),
    "triton_missing_centre": Bug(
        "kernels/fused/dino_loss.py", "tl.where(inside, t - c, LOWEST)", "tl.where(inside, t, LOWEST)", *EXACT
    ),
    "triton_swapped_x_y": Bug(
        "kernels/fused/sample_nuclei.py", "xy + point * 2, mask=given", "xy + point * 2 + 1, mask=given", *SAMPLED
    ),
    "triton_off_by_one_tap": Bug(
        "kernels/fused/sample_nuclei.py", "place(q + 1, fine, coarse)", "place(q, fine, coarse)", *SAMPLED
    ),
    "triton_logit_free_gradient_1_percent": Bug(
        "kernels/fused/linear_dino_loss.py", "total *= unit", "total *= unit * 1.01", *LINEAR
    ),
    "triton_shifted_by_half_a_pixel": Bug(
        "kernels/fused/augment_views.py", "(0.5 - rest)) / stretch", "(0.0 - rest)) / stretch", *RESIZED
    ),
    "triton_contrast_about_the_wrong_grey": Bug(
        "kernels/fused/augment_views.py",
        "lane < num_tiles, other=0.0), 0) / area",
        "lane < num_tiles, other=0.0), 0) / (1.01 * area)",
        *RESIZED,
    ),
    "triton_stain_1_percent": Bug("kernels/fused/augment_views.py", "+ 1.13473037 * g", "+ 1.14607767 * g", *STAINED),
    "triton_norm_of_the_unscaled_branch": Bug(
        "kernels/fused/add_layer_norm.py", "added *= tl.load(scale", "added += 0 * tl.load(scale", *NORMED
    ),
    "triton_norm_without_the_mean_of_its_gradient": Bug(
        "kernels/fused/add_layer_norm.py", "(g - (tl.sum(g, 1) / WIDTH)[:, None]", "(g", *NORMED
    ),
    "triton_norm_gradient_1_percent": Bug(
        "kernels/fused/add_layer_norm.py", "weight_gradient += dn * h", "weight_gradient += dn * h * 1.01", *NORMED
    ),
    "triton_norm_bias_of_the_branch_1_percent": Bug(
        "kernels/fused/add_layer_norm.py", "branch_sums += dx", "branch_sums += dx * 1.01", *NORMED
    ),
    "triton_gelu_without_the_density": Bug(
        "kernels/fused/gelu.py", "(distribution + h * density)", "distribution", *ACTIVATED
    ),
    "triton_gelu_bias_misses_a_tile": Bug(
        "kernels/fused/gelu.py", "sums += dh", "sums += dh if start > 0 else 0 * dh", *ACTIVATED
    ),
    "triton_join_swaps_keys_and_values": Bug(
        "kernels/fused/join_heads.py", "move(second + source,", "move(third + source,", *JOINED
    ),
    "triton_join_sums_1_percent": Bug(
        "kernels/fused/join_heads.py", "return value.to(tl.float32)", "return value.to(tl.float32) * 1.01", *JOINED
    ),
    "triton_batch_norm_without_the_centre_of_a_run": Bug(
        "kernels/fused/batch_norm.py", "var + apart * apart", "var + 0 * apart", *BATCHED
    ),
    "triton_batch_norm_biased_running_variance": Bug(
        "kernels/fused/batch_norm.py", "squares / tl.maximum(total - 1, 1.0)", "squares / total", *BATCHED
    ),
    "triton_batch_norm_gradient_through_relu": Bug(
        "kernels/fused/batch_norm.py", "g = tl.where(positive, g, 0.0)", "g = tl.where(positive, g, g)", *BATCHED
    ),
    "triton_batch_norm_gradient_1_percent": Bug(
        "kernels/fused/batch_norm.py", "- away * slope[None, :]", "- 1.01 * away * slope[None, :]", *BATCHED
    ),
    "triton_resize_off_by_one_tap": Bug(
        "kernels/fused/resize_concat.py",
        "for right in range(taps_across):",
        "for right in range(taps_across - 1):",
        *CONCATENATED,
    ),
    "triton_resize_swapped_axes": Bug(
        "kernels/fused/resize_concat.py",
        "place(fine_row, fine_height, height)",
        "place(fine_row, fine_width, width)",
        *CONCATENATED,
    ),
    "triton_dropped_pair": Bug(
        "kernels/fused/dino_loss.py", "while position < last:", "while position < last - 1:", *EXACT
    ),
}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the files that the tests of the ops need, and build the C++ library."""
    copy = tmp_path_factory.mktemp("checkout")
    skipped = shutil.ignore_patterns("__pycache__", "*.so")
    for folder in ("csrc", "kernels", "muse_fast", "tests", "torture"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=skipped)
    (copy / "muse_fast" / "kernels").symlink_to(copy / "kernels")
    for file in ("CMakeLists.txt", "pyproject.toml"):
        shutil.copy(ROOT / file, copy)
    if backends.library_error() is None:
        settings = {
            "CMAKE_BUILD_TYPE": "Release",
            "MUSE_FAST_CUDA": "OFF",
            "TORCH_INCLUDE_DIRS": ";".join(include_paths()),
            "TORCH_LIBRARY_DIRS": ";".join(library_paths()),
        }
        run("cmake", "-S", ".", "-B", "build", *(f"-D{key}={value}" for key, value in settings.items()), cwd=copy)
        build(copy)
    return copy


def build(checkout: Path) -> None:
    run("cmake", "--build", "build", "--parallel", cwd=checkout)


def run(*command: str, cwd: Path) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # pip's cmake and ninja
    finished = subprocess.run(command, cwd=cwd, env=os.environ | {"PATH": path}, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr


def failed_tests(checkout: Path, tests: str, named: str) -> list[str]:
    """Return the first test that fails in the copy, if any; errors outside a test fail this test."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    environment |= {"MUSE_FAST_LIBRARY": str(checkout / LIBRARY), "PYTHONPATH": str(checkout)}
    options = ["-q", "-x", "-p", "no:cacheprovider", "-k", named, f"tests/ops/{tests}"]
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", *options], cwd=checkout, env=environment, capture_output=True, text=True
    )
    assert finished.returncode in (0, 1), finished.stdout + finished.stderr
    return [line for line in finished.stdout.splitlines() if line.startswith("FAILED")]


@pytest.fixture
def planted(request: pytest.FixtureRequest, checkout: Path) -> Iterator[Bug]:
    """Plant one bug in the copy, and remove it afterwards."""
    bug = BUGS[request.param]
    if bug.file.startswith("csrc") and backends.library_error() is not None:
        pytest.skip(str(backends.library_error()))
    source = checkout / bug.file
    healthy = source.read_text()
    assert healthy.count(bug.correct) == 1, f"{bug.file} has changed: update this bug"
    source.write_text(healthy.replace(bug.correct, bug.wrong))
    try:
        if bug.file.startswith("csrc"):
            build(checkout)
        yield bug
    finally:
        source.write_text(healthy)
        if bug.file.startswith("csrc"):
            build(checkout)


def test_the_copy_is_healthy(checkout: Path) -> None:
    for tests, named in {(bug.tests, bug.named) for bug in BUGS.values()}:
        assert failed_tests(checkout, tests, named) == []


@pytest.mark.parametrize("planted", BUGS, indirect=True)
def test_is_caught(planted: Bug, checkout: Path) -> None:
    assert failed_tests(checkout, planted.tests, planted.named)
