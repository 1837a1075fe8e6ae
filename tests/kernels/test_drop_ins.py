"""The functions of kernels/ run Triton or fall back to PyTorch, and a copy of the folder works on its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from muse_fast import kernels
from muse_fast.ops import backends

pytestmark = pytest.mark.usefixtures("deterministic")

ROOT = Path(__file__).parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

needs_triton = pytest.mark.skipif(backends.triton_error() is not None, reason=str(backends.triton_error()))


def dino_arguments(dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    rows = torch.tensor([0, 2, 1]), torch.tensor([1, 1, 3])
    return torch.randn(4, 7, dtype=dtype), torch.randn(3, 7, dtype=dtype), torch.randn(7, dtype=dtype), *rows, 0.1, 0.04


def linear_arguments(dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    student_z, student_W, teacher_z, teacher_W = (
        F.normalize(torch.randn(rows, 5, dtype=dtype), dim=1) for rows in (4, 7, 3, 7)
    )
    return student_z, student_W, teacher_z, teacher_W, *dino_arguments(dtype)[2:]


def soft_arguments(dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    return torch.randn(4, 7, dtype=dtype), torch.randn(4, 7, dtype=dtype).softmax(1), 0.1


ARGUMENTS = {
    "dino_loss": dino_arguments,
    "linear_dino_loss": linear_arguments,
    "soft_cross_entropy": soft_arguments,
}


def on_device(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(argument.to(DEVICE) if isinstance(argument, Tensor) else argument for argument in arguments)


def in_single_precision(argument: Any) -> Any:
    return argument.float() if isinstance(argument, Tensor) and argument.is_floating_point() else argument


@pytest.mark.parametrize("op", ARGUMENTS)
def test_functions_fall_back_to_pytorch(op: str) -> None:
    """For CPU tensors, even with TRITON_INTERPRET=1, and for float64 on any device."""
    arguments = ARGUMENTS[op](torch.float64)
    truth = getattr(kernels.reference, op)(*arguments)
    assert truth.dtype == torch.float64
    torch.testing.assert_close(getattr(kernels, op)(*arguments), truth, rtol=1e-12, atol=1e-12)
    loss = getattr(kernels, op)(*map(in_single_precision, arguments))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), truth, rtol=1e-4, atol=1e-4)


@needs_triton
@pytest.mark.parametrize("op", ARGUMENTS)
def test_functions_run_triton_when_forced(op: str) -> None:
    arguments = on_device(ARGUMENTS[op]())
    truth = getattr(kernels, op)(*arguments, backend="torch")
    torch.testing.assert_close(getattr(kernels, op)(*arguments, backend="triton"), truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", ARGUMENTS)
def test_functions_compile_without_a_graph_break(op: str) -> None:
    arguments = on_device(ARGUMENTS[op]())
    function = getattr(kernels, op)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), function(*arguments))


@pytest.mark.parametrize("op", ARGUMENTS)
def test_functions_say_why_a_forced_backend_cannot_run(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    function = getattr(kernels, op)
    with pytest.raises(ValueError, match=f"{op}: unknown backend 'cpp'; expected torch or triton"):
        function(*ARGUMENTS[op](), backend="cpp")
    with pytest.raises(ValueError, match=f"{op}: .* on cpu tensors: it takes CUDA tensors"):
        function(*ARGUMENTS[op](), backend="triton")
    with pytest.raises(ValueError, match=f"{op}: .* it computes in float32"):
        function(*ARGUMENTS[op](torch.float64), backend="triton")


@pytest.mark.parametrize("op", ["dino_loss", "linear_dino_loss"])
def test_functions_check_their_arguments(op: str) -> None:
    arguments = list(ARGUMENTS[op]())
    for place, wrong in enumerate(arguments):
        wrong = torch.zeros(2, 2, 2) if isinstance(wrong, Tensor) else 0.0
        with pytest.raises(ValueError, match=op):
            getattr(kernels, op)(*arguments[:place], wrong, *arguments[place + 1 :])


@pytest.mark.parametrize("op", ["dino_loss", "linear_dino_loss"])
def test_functions_accept_the_center_of_a_checkpoint(op: str) -> None:
    """``[1, K]`` in DINO's and DINOv2's, ``[1, 1, K]`` in iBOT's."""
    *features, center, teacher_rows, student_rows, student_temp, teacher_temp = ARGUMENTS[op]()
    rest = teacher_rows, student_rows, student_temp, teacher_temp
    expected = getattr(kernels, op)(*features, center, *rest)
    for shape in ((1, 7), (1, 1, 7)):
        assert torch.equal(getattr(kernels, op)(*features, center.view(shape), *rest), expected)
    with pytest.raises(ValueError, match=op):
        getattr(kernels, op)(*features, center.view(7, 1), *rest)


USE = """
import torch
import kernels

rows = torch.arange(2)
uniform = torch.full((2,), 8.0).log()
teacher, zeros, W = torch.randn(2, 8), torch.zeros(2, 8), torch.eye(8)

def check(**options):
    losses = [
        kernels.dino_loss(zeros, teacher, zeros[0], rows, rows, 0.1, 0.04, **options),
        kernels.linear_dino_loss(zeros, W, teacher, W, zeros[0], rows, rows, 0.1, 0.04, **options),
        kernels.soft_cross_entropy(zeros, teacher.softmax(1), 0.1, **options),
    ]
    for loss in losses:
        torch.testing.assert_close(loss, uniform)

check()
kernels.DINOLoss(8, 2)(zeros, teacher, teacher_temp=0.04)
kernels.iBOTPatchLoss(8).forward_masked(zeros, teacher, torch.eye(2, dtype=torch.bool), teacher_temp=0.04)
kernels.sinkhorn_knopp(teacher, 0.04)
loaded = [name for name in sys.modules if name.startswith("muse_fast")]
assert not loaded, loaded
"""
WITHOUT_TRITON = f"""
import sys
sys.modules["triton"] = None  # importing it raises ImportError
{USE}
try:
    check(backend="triton")
except ValueError as error:
    assert "triton" in str(error), error
else:
    raise AssertionError("ran without triton")
"""
WITH_TRITON = f"""
import sys
{USE}
assert "kernels.fused.dino_loss" not in sys.modules, "Triton kernels were imported before they were needed"
check(backend="triton")
check()
"""


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(WITHOUT_TRITON, id="without_triton"),
        pytest.param(WITH_TRITON, id="with_triton", marks=needs_triton),
    ],
)
def test_a_copy_of_the_folder_works_on_its_own(code: str, tmp_path: Path) -> None:
    """In a folder without anything else, and without the checkout on the path."""
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
