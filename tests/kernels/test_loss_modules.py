"""The modules of kernels/ against the losses as published for DINO and iBOT, in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from muse_fast import kernels

pytestmark = pytest.mark.usefixtures("deterministic")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def probabilities(logits: Tensor, center: Tensor, temp: float) -> Tensor:
    return F.softmax((logits - center) / temp, dim=-1)


def cross_entropy(target: Tensor, logits: Tensor, temp: float) -> Tensor:
    return -(target * F.log_softmax(logits / temp, dim=-1)).sum(dim=-1)


def gradient_of(function: Callable[[Tensor], Tensor], leaf: Tensor) -> tuple[Tensor, Tensor]:
    """Return the value and its gradient."""
    leaf = leaf.detach().clone().requires_grad_()
    value = function(leaf)
    value.backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad


def published_dino(student: Tensor, teacher: Tensor, center: Tensor, crops: int, temps: tuple[float, float]) -> Tensor:
    """Caron et al. 2021, equation 3: every global view of the teacher against every other view of the student."""
    targets = probabilities(teacher, center, temps[1]).chunk(2)
    views = student.chunk(crops)
    terms = [
        cross_entropy(target, view, temps[0]).mean()
        for g, target in enumerate(targets)
        for v, view in enumerate(views)
        if g != v
    ]
    return torch.stack(terms).mean()


@pytest.mark.parametrize(("images", "crops"), [(3, 6), (1, 2), (5, 3)])
def test_dino_module_equals_the_published_loss(images: int, crops: int) -> None:
    student, teacher = torch.randn(crops * images, 31, device=DEVICE), torch.randn(2 * images, 31, device=DEVICE)
    module = kernels.DINOLoss(31, crops).to(DEVICE)
    module.center += torch.randn(31, device=DEVICE)
    loss, gradient = gradient_of(lambda x: module(x, teacher, 0.04), student)
    truth, true_gradient = gradient_of(
        lambda x: published_dino(x, teacher.double(), module.center.double(), crops, (0.1, 0.04)), student.double()
    )
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient.double(), true_gradient, rtol=1e-5, atol=1e-6)


def published_ibot(student: Tensor, teacher: Tensor, center: Tensor, masks: Tensor) -> Tensor:
    """Zhou et al. 2022, for all patches ``[B, N, K]``: the mean over an image's masked patches, then over images."""
    loss = cross_entropy(probabilities(teacher, center, 0.04), student, 0.1)
    return ((loss * masks).sum(dim=1) / masks.sum(dim=1).clamp(min=1)).mean()


@pytest.mark.parametrize("weights", ["of_the_masks", "given"])
def test_ibot_module_equals_the_published_loss(weights: str) -> None:
    """Including an image without masked patches."""
    student, teacher = torch.randn(4, 9, 31, device=DEVICE), torch.randn(4, 9, 31, device=DEVICE)
    masks = torch.rand(4, 9, device=DEVICE) < 0.5
    masks[2] = False
    per_patch = 1 / masks.sum(dim=1, keepdim=True).expand_as(masks)[masks]
    module = kernels.IBOTPatchLoss(31).to(DEVICE)
    module.center += torch.randn(31, device=DEVICE)
    options = {"masks_weight": per_patch} if weights == "given" else {}
    loss, gradient = gradient_of(lambda x: module(x[masks], teacher[masks], masks, 0.04, **options), student)
    truth, true_gradient = gradient_of(
        lambda x: published_ibot(x, teacher.double(), module.center.double(), masks), student.double()
    )
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient.double(), true_gradient, rtol=1e-5, atol=1e-6)


MODULES = {"dino": lambda: kernels.DINOLoss(7, 2), "ibot": lambda: kernels.IBOTPatchLoss(7, center_momentum=0.9)}


@pytest.mark.parametrize("name", MODULES)
def test_center_is_a_running_mean(name: str) -> None:
    module = MODULES[name]()
    shape = module.center.shape
    center = torch.zeros(7)
    for rows in (3, 0, 5):
        logits = torch.randn(rows, 7)
        module.update_center(logits)
        if rows:
            center = 0.9 * center + 0.1 * logits.mean(dim=0)
    assert list(module.state_dict()) == ["center"]
    assert module.center.shape == shape
    torch.testing.assert_close(module.center.flatten(), center)


def test_a_loss_does_not_change_the_center_and_survives_its_update() -> None:
    module = kernels.DINOLoss(7, 2).to(DEVICE)
    student, teacher = torch.randn(4, 7, device=DEVICE), torch.randn(4, 7, device=DEVICE)
    _, expected = gradient_of(lambda x: module(x, teacher, 0.04), student)
    assert module.center.count_nonzero() == 0
    student.requires_grad_()
    loss = module(student, teacher, 0.04)
    module.update_center(teacher)  # between forward and backward, as DINO's own code does
    loss.backward()
    assert module.center.count_nonzero() > 0
    assert torch.equal(student.grad, expected)


def test_modules_without_images_return_zero_with_a_gradient() -> None:
    student, teacher = torch.empty(0, 7, requires_grad=True), torch.empty(0, 7)
    masks = torch.zeros(2, 9, dtype=torch.bool)
    losses = [kernels.DINOLoss(7, 5)(student, teacher, 0.04), kernels.IBOTPatchLoss(7)(student, teacher, masks, 0.04)]
    for loss in losses:
        assert loss.item() == 0
        loss.backward()


@pytest.mark.parametrize(("students", "teachers"), [(9, 4), (10, 3), (10, 12)])
def test_dino_module_rejects_wrong_numbers_of_rows(students: int, teachers: int) -> None:
    with pytest.raises(ValueError, match=r"DINOLoss: expected student_logits \[5 \* B, K\]"):
        kernels.DINOLoss(7, 5)(torch.zeros(students, 7), torch.zeros(teachers, 7), 0.04)


def test_modules_compile_without_a_graph_break() -> None:
    module = kernels.DINOLoss(7, 3).to(DEVICE)
    student, teacher = torch.randn(6, 7, device=DEVICE), torch.randn(4, 7, device=DEVICE)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(student, teacher, 0.04), module(student, teacher, 0.04))


def update_on_one_of_two(rank: int, store: str, logits: Tensor, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    module = kernels.DINOLoss(7, 2)
    module.update_center(logits[:1] if rank == 0 else logits[1:])
    torch.save(module.center, f"{folder}/center{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_center_is_the_mean_over_all_processes(tmp_path: Path) -> None:
    """It is the mean over rows, not processes: one has 1 row, the other 4."""
    logits = torch.randn(5, 7)
    arguments = (str(tmp_path / "store"), logits, str(tmp_path))
    torch.multiprocessing.spawn(update_on_one_of_two, arguments, nprocs=2)
    for rank in range(2):
        center = torch.load(tmp_path / f"center{rank}.pt", weights_only=True)
        torch.testing.assert_close(center, 0.1 * logits.mean(dim=0, keepdim=True))
