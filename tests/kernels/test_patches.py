"""The patches do not change the values and gradients of the losses of DINO, DINOv2 and DINOv3."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from muse_fast import kernels

pytestmark = pytest.mark.usefixtures("deterministic")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# A stand-in for https://github.com/facebookresearch/dinov2, which is not installed: written from the published
# equations, with the names, signatures and signs of dinov2.loss.
STAND_IN = {
    "dino_clstoken_loss.py": """
        import torch
        import torch.nn.functional as F
        from torch import nn


        class Centering(nn.Module):
            def __init__(self, center, student_temp, center_momentum):
                super().__init__()
                self.register_buffer("center", center)
                self.student_temp, self.center_momentum = student_temp, center_momentum
                self.batch_mean = None

            @torch.no_grad()
            def softmax_center_teacher(self, teacher_output, teacher_temp):
                self.apply_center_update()
                return ((teacher_output - self.center) / teacher_temp).softmax(dim=-1)

            @torch.no_grad()
            def update_center(self, teacher_output):
                self.batch_mean = teacher_output.flatten(0, -2).mean(dim=0)

            @torch.no_grad()
            def apply_center_update(self):
                if self.batch_mean is not None:
                    self.center = self.center.lerp(self.batch_mean.expand_as(self.center), 1 - self.center_momentum)
                    self.batch_mean = None

            @torch.no_grad()
            def sinkhorn_knopp_teacher(self, teacher_output, teacher_temp, n_iterations=3):
                prototypes_first = (teacher_output.float() / teacher_temp).exp().t()
                for _ in range(n_iterations):
                    prototypes_first = prototypes_first / prototypes_first.sum(dim=1, keepdim=True)
                    prototypes_first = prototypes_first / prototypes_first.sum(dim=0, keepdim=True)
                return prototypes_first.t()


        class DINOLoss(Centering):
            def __init__(self, out_dim, student_temp=0.1, center_momentum=0.9):
                super().__init__(torch.zeros(1, out_dim), student_temp, center_momentum)

            def forward(self, student_output_list, teacher_out_softmaxed_centered_list):
                losses = [
                    -(teacher * F.log_softmax(student / self.student_temp, dim=-1)).sum(dim=-1).mean()
                    for student in student_output_list
                    for teacher in teacher_out_softmaxed_centered_list
                ]
                return sum(losses)
    """,
    "ibot_patch_loss.py": """
        import torch
        import torch.nn.functional as F

        from .dino_clstoken_loss import Centering


        def lossfunc(t, s, temp):
            return (t * F.log_softmax(s / temp, dim=-1)).sum(dim=-1)


        class iBOTPatchLoss(Centering):
            def __init__(self, patch_out_dim, student_temp=0.1, center_momentum=0.9):
                super().__init__(torch.zeros(1, 1, patch_out_dim), student_temp, center_momentum)

            def forward(self, student_patch_tokens, teacher_patch_tokens, student_masks_flat):
                log_prediction = F.log_softmax(student_patch_tokens / self.student_temp, dim=-1)
                loss = -(teacher_patch_tokens * log_prediction).sum(dim=-1) * student_masks_flat
                return (loss.sum(dim=-1) / student_masks_flat.sum(dim=-1).clamp(min=1)).mean()

            def forward_masked(
                self,
                student_patch_tokens_masked,
                teacher_patch_tokens_masked,
                student_masks_flat,
                n_masked_patches=None,
                masks_weight=None,
            ):
                log_likelihood = lossfunc(teacher_patch_tokens_masked, student_patch_tokens_masked, self.student_temp)
                if masks_weight is None:
                    counts = student_masks_flat.sum(dim=-1)
                    masks_weight = (1 / counts).repeat_interleave(counts)
                return -(log_likelihood[:n_masked_patches] * masks_weight).sum() / len(student_masks_flat)
    """,
    "__init__.py": """
        from .dino_clstoken_loss import DINOLoss
        from .ibot_patch_loss import iBOTPatchLoss
    """,
}


def gradient_of(function: Callable[[Tensor], Tensor], leaf: Tensor) -> tuple[Tensor, Tensor]:
    """Return the value and its gradient."""
    leaf = leaf.detach().clone().requires_grad_()
    value = function(leaf)
    value.backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad


def forget(package: str) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[name]


@pytest.fixture
def dinov2_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    folder = tmp_path / "dinov2" / "loss"
    folder.mkdir(parents=True)
    (tmp_path / "dinov2" / "__init__.py").touch()
    for name, source in STAND_IN.items():
        (folder / name).write_text(dedent(source))
    monkeypatch.syspath_prepend(tmp_path)
    forget("dinov2")
    yield __import__("dinov2.loss").loss
    forget("dinov2")


def train_dino(module: nn.Module, centering: str) -> list[Tensor]:
    """Run two steps of DINOv2's image loss: locals, then both globals at once; return losses, gradients, centre."""
    results = []
    for step in range(2):
        torch.manual_seed(step)
        local, both_globals = torch.randn(8 * 3, 31, device=DEVICE), torch.randn(2 * 3, 31, device=DEVICE)
        teacher_logits = torch.rand(2 * 3, 31, device=DEVICE) * 2 - 1
        teacher = getattr(module, f"{centering}_teacher")(teacher_logits, 0.04).view(2, -1, 31)
        module.update_center(teacher_logits)

        def local_loss(x: Tensor, teacher: Tensor = teacher) -> Tensor:
            return module(student_output_list=x.chunk(8), teacher_out_softmaxed_centered_list=teacher)

        def global_loss(x: Tensor, teacher: Tensor = teacher) -> Tensor:
            return module(student_output_list=[x], teacher_out_softmaxed_centered_list=[teacher.flatten(0, 1)])

        results += [*gradient_of(local_loss, local), *gradient_of(global_loss, both_globals)]
    module.apply_center_update()
    return [*results, module.center]


def train_ibot(module: nn.Module, centering: str) -> list[Tensor]:
    """Run two steps of DINOv2's patch loss: all forms of ``forward_masked``, then ``forward``; return the same."""
    results = []
    for step in range(2):
        torch.manual_seed(step)
        student, teacher_logits = torch.rand(2, 4, 9, 31, device=DEVICE) * 2 - 1
        masks = torch.rand(4, 9, device=DEVICE) < 0.5
        count, weights = int(masks.sum()), torch.rand(int(masks.sum()) - 1, device=DEVICE)
        teacher = getattr(module, f"{centering}_teacher")(teacher_logits.flatten(0, 1), 0.04).view(4, 9, 31)
        module.update_center(teacher_logits[masks].unsqueeze(0))
        for options in ({}, {"n_masked_patches": count}, {"n_masked_patches": count - 1, "masks_weight": weights}):

            def masked_loss(
                x: Tensor, teacher: Tensor = teacher, masks: Tensor = masks, options: dict[str, Any] = options
            ) -> Tensor:
                return module.forward_masked(x[masks], teacher[masks], student_masks_flat=masks, **options)

            results += gradient_of(masked_loss, student)
        results += gradient_of(lambda x, t=teacher, m=masks: module(x, t, m), student)
    module.apply_center_update()
    return [*results, module.center]


STEPS = {"DINOLoss": train_dino, "iBOTPatchLoss": train_ibot}


@pytest.mark.parametrize("centering", ["softmax_center", "sinkhorn_knopp"])
@pytest.mark.parametrize("name", STEPS)
def test_patched_dinov2_computes_the_same(
    name: str, centering: str, dinov2_loss: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, step = getattr(dinov2_loss, name), STEPS[name]
    before = step(make(31).to(DEVICE), centering)
    existing = make(31).to(DEVICE)
    calls = count_calls(monkeypatch)
    undo = kernels.patch_dinov2()
    for after in (step(existing, centering), step(make(31).to(DEVICE), centering)):
        for ours, theirs in zip(after, before, strict=True):
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())
    made = len(calls)
    assert made > 0
    undo()
    for again, theirs in zip(step(make(31).to(DEVICE), centering), before, strict=True):
        assert torch.equal(again, theirs)
    assert len(calls) == made


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Return a list that collects the shapes with which the patches call ``soft_cross_entropy``."""
    calls: list[torch.Size] = []

    def counted(student_logits: Tensor, *arguments: Any, **options: Any) -> Tensor:
        calls.append(student_logits.shape)
        return kernels.soft_cross_entropy(student_logits, *arguments, **options)

    for module in (kernels.modules, kernels.patches):
        monkeypatch.setattr(module, "soft_cross_entropy", counted)
    return calls


def test_lossfunc_of_ibot_accepts_two_and_three_dimensions(dinov2_loss: ModuleType) -> None:
    from dinov2.loss import ibot_patch_loss

    logits, target = torch.randn(2, 5, 31, device=DEVICE), torch.rand(2, 5, 31, device=DEVICE)
    expected = ibot_patch_loss.lossfunc(target, logits, 0.1)
    undo = kernels.patch_dinov2()
    torch.testing.assert_close(ibot_patch_loss.lossfunc(target, logits, 0.1), expected)
    torch.testing.assert_close(ibot_patch_loss.lossfunc(target[0], logits[0], 0.1), expected[0])
    undo()


def test_each_loss_of_dinov2_can_be_patched_separately(dinov2_loss: ModuleType) -> None:
    from dinov2.loss import ibot_patch_loss

    def members() -> list[Any]:
        return [dinov2_loss.DINOLoss.forward, dinov2_loss.iBOTPatchLoss.forward, ibot_patch_loss.lossfunc]

    originals = members()
    for choice, expected in (({"ibot": False}, [True, False, False]), ({"dino": False}, [False, True, True])):
        undo = kernels.patch_dinov2(**choice)
        assert [now is not then for now, then in zip(members(), originals, strict=True)] == expected
        undo()
        assert members() == originals


def test_dinov2_missing_or_unknown(dinov2_loss: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from dinov2.loss import ibot_patch_loss

    forward = dinov2_loss.DINOLoss.forward
    monkeypatch.delattr(ibot_patch_loss, "lossfunc")
    with pytest.raises(ImportError, match=r"patch_dinov2: dinov2\.loss\.ibot_patch_loss has no lossfunc"):
        kernels.patch_dinov2()
    assert dinov2_loss.DINOLoss.forward is forward  # all or nothing
    monkeypatch.setitem(sys.modules, "dinov2.loss.dino_clstoken_loss", None)
    with pytest.raises(ImportError, match=r"put a checkout of .*/facebookresearch/dinov2 on PYTHONPATH"):
        kernels.patch_dinov2()


def test_empty_lists_and_broadcast_targets_of_dinov2(dinov2_loss: ModuleType) -> None:
    """An epoch without local crops passes an empty list; centring 2-D patch tokens makes the targets ``[1, M, K]``."""
    from dinov2.loss import ibot_patch_loss

    loss = dinov2_loss.DINOLoss(31)
    logits, target = torch.randn(5, 31), torch.rand(1, 5, 31)

    def results() -> list[Tensor]:
        sums = loss([], [target[0]]), loss([logits], []), loss([logits], [target[0, :1], target[0]])
        return [*map(torch.as_tensor, sums), ibot_patch_loss.lossfunc(target, logits, 0.1)]

    expected = results()
    undo = kernels.patch_dinov2()
    for ours, theirs in zip(results(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    undo()


# A stand-in for main_dino.py of https://github.com/facebookresearch/dino, from equations 3 and 4 of Caron et al. 2021
# and the names and signature of its DINOLoss. It has no process group.
DINO = """
    import torch
    import torch.nn.functional as F
    from torch import nn


    class DINOLoss(nn.Module):
        def __init__(self, out_dim, ncrops, temperatures, student_temp=0.1, center_momentum=0.9):
            super().__init__()
            self.student_temp, self.center_momentum, self.ncrops = student_temp, center_momentum, ncrops
            self.teacher_temp_schedule = temperatures
            self.register_buffer("center", torch.zeros(1, out_dim))

        def forward(self, student_output, teacher_output, epoch):
            temp = self.teacher_temp_schedule[epoch]
            teachers = ((teacher_output - self.center) / temp).softmax(dim=-1).detach().chunk(2)
            students = student_output.chunk(self.ncrops)
            terms = [
                -(teacher * F.log_softmax(student / self.student_temp, dim=-1)).sum(dim=-1).mean()
                for g, teacher in enumerate(teachers)
                for v, student in enumerate(students)
                if v != g
            ]
            self.update_center(teacher_output)
            return sum(terms) / len(terms)

        @torch.no_grad()
        def update_center(self, teacher_output):
            mean = teacher_output.mean(dim=0, keepdim=True)
            self.center = self.center * self.center_momentum + mean * (1 - self.center_momentum)
"""


def test_patched_dino_computes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses, gradients and the centre over five epochs of one step."""
    (tmp_path / "main_dino.py").write_text(dedent(DINO))
    monkeypatch.syspath_prepend(tmp_path)
    forget("main_dino")
    import main_dino

    def train() -> list[Tensor]:
        module = main_dino.DINOLoss(31, 6, temperatures=[0.04, 0.05, 0.06, 0.07, 0.07]).to(DEVICE)
        results = []
        for epoch in range(5):
            torch.manual_seed(epoch)
            student, teacher = torch.randn(6 * 3, 31, device=DEVICE), torch.rand(2 * 3, 31, device=DEVICE)
            results += gradient_of(lambda x, t=teacher, e=epoch: module(x, t, e), student)
        return [*results, module.center]

    before = train()
    calls = count_calls(monkeypatch)
    undo = kernels.patch_dino()
    for ours, theirs in zip(train(), before, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert len(calls) == (0 if DEVICE == "cuda" else 5 * 6)  # one per crop
    undo()
    assert all(map(torch.equal, train(), before))
    forget("main_dino")
    with pytest.raises(
        ImportError, match=r"patch_dino: cannot import other_dino .*facebookresearch/dino on PYTHONPATH"
    ):
        kernels.patch_dino("other_dino")


# A stand-in for https://github.com/facebookresearch/dinov3, from the equations and with the public names of its losses.
DINOV3 = {
    "dino_clstoken_loss.py": """
        import torch.nn.functional as F
        from torch import nn


        class DINOLoss(nn.Module):
            student_temp = 0.1

            def forward(self, student_logits, teacher_probs, ignore_diagonal=False):
                terms = [
                    -(teacher * F.log_softmax(student / self.student_temp, dim=-1)).sum(dim=-1).mean()
                    for s, student in enumerate(student_logits)
                    for t, teacher in enumerate(teacher_probs)
                    if not (ignore_diagonal and s == t)
                ]
                return sum(terms) / len(terms)
    """,
    "ibot_patch_loss.py": """
        import torch.nn.functional as F
        from torch import nn


        def lossfunc(t, s, temp):
            return (t.float() * F.log_softmax(s.float() / temp, dim=-1)).sum(dim=-1)


        class iBOTPatchLoss(nn.Module):
            student_temp = 0.1

            def forward(self, student_patch_tokens, teacher_patch_tokens, student_masks_flat):
                loss = -lossfunc(teacher_patch_tokens, student_patch_tokens, self.student_temp) * student_masks_flat
                return (loss.sum(dim=-1) / student_masks_flat.sum(dim=-1).clamp(min=1)).mean()
    """,
}


@pytest.fixture
def dinov3_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    folder = tmp_path / "dinov3" / "loss"
    folder.mkdir(parents=True)
    (tmp_path / "dinov3" / "__init__.py").touch()
    (folder / "__init__.py").touch()
    for name, source in DINOV3.items():
        (folder / name).write_text(dedent(source))
    monkeypatch.syspath_prepend(tmp_path)
    forget("dinov3")
    yield __import__("dinov3.loss.dino_clstoken_loss", fromlist=["DINOLoss"])
    forget("dinov3")


@pytest.mark.parametrize(("students", "teachers"), [(2, 2), (8, 2), (1, 3)])
@pytest.mark.parametrize("ignore_diagonal", [False, True])
def test_patched_dino_loss_of_dinov3_computes_the_same(
    students: int, teachers: int, ignore_diagonal: bool, dinov3_loss: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = torch.randn(students, 3, 31, device=DEVICE)
    teacher = torch.randn(teachers, 3, 31, device=DEVICE).softmax(dim=-1)
    module = dinov3_loss.DINOLoss()
    truth = gradient_of(lambda x: module(x, teacher.double(), ignore_diagonal=ignore_diagonal), student.double())
    calls = count_calls(monkeypatch)
    undo = kernels.patch_dinov3(ibot=False)
    results = gradient_of(lambda x: module(x, teacher, ignore_diagonal=ignore_diagonal), student)
    undo()
    assert len(calls) == students
    for ours, theirs in zip(results, truth, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-7)


def test_patched_patch_loss_of_dinov3_computes_the_same(
    dinov3_loss: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dinov3.loss.ibot_patch_loss import iBOTPatchLoss

    student, teacher = torch.randn(2, 4, 9, 31, device=DEVICE).bfloat16()
    masks = torch.rand(4, 9, device=DEVICE) < 0.5
    targets = teacher.float().softmax(dim=-1)
    truth = gradient_of(lambda x: iBOTPatchLoss()(x, targets, masks), student)
    calls = count_calls(monkeypatch)
    undo = kernels.patch_dinov3()
    results = gradient_of(lambda x: iBOTPatchLoss()(x, targets, masks), student)
    assert len(calls) == 1
    for ours, theirs in zip(results, truth, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs)
    undo()
    iBOTPatchLoss()(student, targets, masks)
    assert len(calls) == 1
