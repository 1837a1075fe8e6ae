"""The modules of kernels/ against the losses and centres as published for DINO, iBOT and DINOv2, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from muse_fast import kernels
from muse_fast.ops import backends
from tests.support.ranks import Ranks

pytestmark = pytest.mark.usefixtures("deterministic")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

needs_triton = pytest.mark.skipif(backends.triton_error() is not None, reason=str(backends.triton_error()))


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


def check(results: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor]) -> None:
    assert results[0].dtype == torch.float32
    for ours, true in zip(results, truth, strict=True):
        torch.testing.assert_close(ours.double(), true, rtol=1e-5, atol=1e-6 * true.abs().max().item())


# --- DINO


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


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize(("images", "crops"), [(3, 6), (1, 2), (5, 3)])
def test_dino_module_equals_the_published_loss(
    images: int, crops: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = torch.randn(crops * images, 31, device=DEVICE), torch.randn(2 * images, 31, device=DEVICE)
    module = kernels.DINOLoss(31, crops).to(DEVICE)
    module.center += torch.randn(31, device=DEVICE)
    if backend == "triton":
        monkeypatch.setattr(kernels.modules, "runs_triton", lambda *_: True)
        monkeypatch.setattr(kernels.functional, "_choose_triton", lambda *_: True)
    else:
        monkeypatch.setattr(kernels.modules, "runs_triton", lambda *_: False)
    results = gradient_of(lambda x: module(x, teacher, teacher_temp=0.04), student)
    center, temps = module.center.double(), (0.1, 0.04)
    check(results, gradient_of(lambda x: published_dino(x, teacher.double(), center, crops, temps), student.double()))


def test_dino_module_of_two_lists_equals_the_published_loss_of_dinov2() -> None:
    """Oquab et al. 2023: the sum over pairs of the mean; a target of one row is for all images."""
    student, teacher = torch.randn(3, 5, 31, device=DEVICE), torch.rand(2, 5, 31, device=DEVICE)
    module = kernels.DINOLoss(31, 3).to(DEVICE)
    targets = [module.softmax_center_teacher(teacher[0], teacher_temp=0.04), teacher[1, :1].softmax(dim=-1)]
    truth = gradient_of(
        lambda x: sum(cross_entropy(target.double(), s, 0.1).mean() for s in x for target in targets), student.double()
    )
    check(gradient_of(lambda x: module.forward_list(x.unbind(), targets), student), truth)
    assert module.forward_list([], targets) == module.forward_list([student[0]], []) == 0
    with pytest.raises(
        ValueError, match=r"DINOLoss: expected a teacher whose shape broadcasts .* \(5, 31\), got \(4, 3"
    ):
        module.forward_list([student[0]], [targets[0][:4]])


LOSSES: dict[str, Callable[..., Any]] = {"DINOLoss": lambda **o: kernels.DINOLoss(7, 2, **o)}
LOSSES["iBOTPatchLoss"] = lambda **o: kernels.iBOTPatchLoss(7, **o)


@pytest.mark.parametrize("temp", [5, 0, -0.1, float("nan"), float("inf")])
def test_an_epoch_is_not_a_temperature(temp: float) -> None:
    """DINO's third argument is the epoch: by position it is refused, by name it must be plausible."""
    logits, masks = torch.zeros(2, 7), torch.ones(1, 2, dtype=torch.bool)
    dino, ibot = LOSSES["DINOLoss"](), LOSSES["iBOTPatchLoss"]()
    with pytest.raises(TypeError):
        dino(logits, logits, temp)
    with pytest.raises(TypeError):
        kernels.DINOLoss(7, 2, 0.04, 0.04, 0, 100)  # DINO's constructor has the teacher's schedule here
    calls: list[Callable[[], Any]] = [
        lambda: dino(logits, logits, teacher_temp=temp),
        lambda: ibot(logits[None], logits[None], masks, teacher_temp=temp),
        lambda: ibot.forward_masked(logits, logits, masks, teacher_temp=temp),
        *(lambda m=m: m.softmax_center_teacher(logits, teacher_temp=temp) for m in (dino, ibot)),
        *(lambda m=m: m.sinkhorn_knopp_teacher(logits, teacher_temp=temp) for m in (dino, ibot)),
        *(lambda make=make: make(student_temp=temp) for make in LOSSES.values()),
    ]
    for call in calls:
        with pytest.raises(
            ValueError, match=r"Loss: (teacher|student)_temp must be above 0 and at most 1, .* the epoch"
        ):
            call()


@pytest.mark.parametrize(
    ("student", "teacher"),
    [((9, 7), (4, 7)), ((10, 7), (3, 7)), ((10, 7), (12, 7)), ((10, 7), (4, 6)), ((10, 6), (4, 6))],
)
def test_dino_module_rejects_wrong_shapes(student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="DINOLoss: expected student_output"):
        kernels.DINOLoss(7, 5)(torch.zeros(student), torch.zeros(teacher), teacher_temp=0.04)


def test_dino_module_compiles_without_a_graph_break() -> None:
    module = kernels.DINOLoss(7, 3).to(DEVICE)
    student, teacher = torch.randn(6, 7, device=DEVICE), torch.randn(4, 7, device=DEVICE)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(student, teacher, teacher_temp=0.04), module(student, teacher, teacher_temp=0.04)
    )


# --- iBOT


def published_ibot(student: Tensor, targets: Tensor, masks: Tensor) -> Tensor:
    """Zhou et al. 2022, for all patches ``[B, N, K]``: the mean over an image's masked patches, then over images."""
    loss = cross_entropy(targets, student, 0.1)
    return ((loss * masks).sum(dim=1) / masks.sum(dim=1).clamp(min=1)).mean()


@pytest.mark.parametrize("teacher_is", ["logits", "probabilities", "broadcast"])
@pytest.mark.parametrize("call", ["forward", "masked", "padded", "padded_and_counted", "weighted"])
def test_ibot_module_equals_the_published_loss(call: str, teacher_is: str) -> None:
    """Including an image without masked patches."""
    student, teacher = torch.randn(4, 9, 31, device=DEVICE), torch.randn(4, 9, 31, device=DEVICE)
    masks = torch.rand(4, 9, device=DEVICE) < 0.5
    masks[2] = False
    count = int(masks.sum())
    module = kernels.iBOTPatchLoss(31).to(DEVICE)
    module.center += torch.randn(31, device=DEVICE)
    if teacher_is == "broadcast":  # one target for all patches
        teacher = teacher[:1, :1]
    targets = probabilities(teacher.double(), module.center.double(), 0.04)
    options: dict[str, Any] = {"teacher_temp": 0.04} if teacher_is == "logits" else {}
    if teacher_is != "logits":
        teacher = module.softmax_center_teacher(teacher, teacher_temp=0.04)
    of_masked = teacher[0, :1] if teacher_is == "broadcast" else teacher[masks].unsqueeze(0)  # [1, M, K], as in DINOv2
    if call == "weighted":
        options["masks_weight"] = 1 / masks.sum(dim=1, keepdim=True).expand_as(masks)[masks]
    if call == "padded_and_counted":
        options["n_masked_patches"] = count

    def loss(x: Tensor) -> Tensor:
        if call == "forward":
            return module(x, teacher, masks, **options)
        rows, of_rows = x[masks], of_masked
        if call.startswith("padded"):
            rows = F.pad(rows, (0, 0, 0, 40 - count))
            of_rows = of_rows if teacher_is == "broadcast" else F.pad(of_rows, (0, 0, 0, 40 - count))
        return module.forward_masked(rows, of_rows, masks, **options)

    truth = gradient_of(lambda x: published_ibot(x, targets, masks), student.double())
    check(gradient_of(loss, student), truth)


def test_ibot_module_rejects_wrong_shapes() -> None:
    module = kernels.iBOTPatchLoss(7)
    masks = torch.tensor([[True, True], [True, False]])
    rows, tokens = torch.zeros(3, 7), torch.zeros(2, 2, 7)
    wrong: list[tuple[str, Callable[[], Tensor]]] = [
        ("a teacher whose shape broadcasts", lambda: module.forward_masked(rows, rows[:2], masks)),
        ("a teacher whose shape broadcasts", lambda: module.forward_masked(rows[:1], rows, masks)),
        ("a teacher whose shape broadcasts", lambda: module.forward_masked(rows, rows[:, :1], masks)),
        ("a teacher whose shape broadcasts", lambda: module(tokens, tokens[:, :, :6], masks)),
        ("3 patches are masked, but there are only 2", lambda: module.forward_masked(rows[:2], rows[:2], masks)),
        ("masks_weight", lambda: module.forward_masked(rows, rows, masks, masks_weight=torch.ones(2))),
        ("student_patch_tokens_masked", lambda: module.forward_masked(rows[0], rows[0], masks)),
        ("student_masks_flat", lambda: module.forward_masked(rows, rows, masks[0])),
        ("student_masks_flat", lambda: module(tokens, tokens, masks[:1])),
        ("student_patch_tokens", lambda: module(rows, rows, masks)),
        ("number of prototypes", lambda: module.forward_masked(*[torch.zeros(3, 6)] * 2, masks, teacher_temp=0.04)),
    ]
    for message, call in wrong:
        with pytest.raises(ValueError, match=message):
            call()


def test_modules_without_images_return_zero_with_a_gradient() -> None:
    student, teacher = torch.empty(0, 7, requires_grad=True), torch.empty(0, 7)
    masks = torch.zeros(2, 9, dtype=torch.bool)
    ibot = kernels.iBOTPatchLoss(7)
    losses = [
        kernels.DINOLoss(7, 5)(student, teacher, teacher_temp=0.04),
        ibot.forward_masked(student, teacher, masks),
        ibot.forward_masked(student, teacher, masks, teacher_temp=0.04),
        ibot(student.view(0, 9, 7), teacher.view(0, 9, 7), masks[:0]),
    ]
    for loss in losses:
        assert loss.item() == 0
        loss.backward()


# --- the centre


@pytest.mark.parametrize("name", LOSSES)
def test_center_is_a_running_mean(name: str) -> None:
    module = LOSSES[name]()
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
    for wrong in (torch.zeros(7), torch.zeros(2, 6)):
        with pytest.raises(ValueError, match=rf"{name}: expected logits \[\.\.\., 7\]"):
            module.update_center(wrong)


def test_a_loss_does_not_change_the_center_and_survives_its_update() -> None:
    module = kernels.DINOLoss(7, 2).to(DEVICE)
    student, teacher = torch.randn(4, 7, device=DEVICE), torch.randn(4, 7, device=DEVICE)
    _, expected = gradient_of(lambda x: module(x, teacher, teacher_temp=0.04), student)
    assert module.center.count_nonzero() == 0
    student.requires_grad_()
    loss = module(student, teacher, teacher_temp=0.04, update_center=True)  # before the backward, as DINO does
    loss.backward()
    assert module.center.count_nonzero() > 0
    assert torch.equal(student.grad, expected)


def published_centers(teachers: Tensor) -> Tensor:
    """Caron et al. 2021, equation 4, for the logits ``[steps, B, K]`` of all processes: the centre after each step."""
    centers, center = [], torch.zeros(1, teachers.shape[-1], dtype=torch.float64)
    for logits in teachers.double():
        center = 0.9 * center + 0.1 * logits.mean(dim=0, keepdim=True)
        centers.append(center)
    return torch.stack(centers)


def centers_of_training(teachers: Tensor) -> Tensor:
    module = kernels.DINOLoss(7, 2)
    centers = []
    for logits in teachers:
        module(torch.zeros_like(logits), logits, teacher_temp=0.04, update_center=True)
        centers.append(module.center)
    return torch.stack(centers)


def test_updating_forward_has_the_centers_of_dino(two_ranks: Ranks) -> None:
    """After each of 20 steps, on one process and on two with half of the rows each."""
    teachers = torch.randn(20, 8, 7)
    truth = published_centers(teachers)
    for centers in (
        centers_of_training(teachers),
        *two_ranks(centers_of_training, [(t,) for t in teachers.chunk(2, 1)]),
    ):
        torch.testing.assert_close(centers.double(), truth, rtol=1e-5, atol=1e-6)


def updated_centers(logits: Tensor) -> list[Tensor]:
    """Update a centre with all processes, and one with a group for each process."""
    groups = [dist.new_group([rank]) for rank in range(2)]
    modules = [kernels.iBOTPatchLoss(7), kernels.iBOTPatchLoss(7, group=groups[dist.get_rank()])]
    for module in modules:
        module.update_center(logits)
    return [module.center.flatten() for module in modules]


def test_center_is_the_mean_over_the_rows_of_all_processes_of_the_group(two_ranks: Ranks) -> None:
    """One process has 1 row, the other 4. DINO's loss would add 0.1 * sum / (2 * own rows), which differs."""
    logits = torch.randn(5, 7)
    shares = logits[:1], logits[1:]
    for share, (of_all, of_one) in zip(shares, two_ranks(updated_centers, [(s,) for s in shares]), strict=True):
        torch.testing.assert_close(of_all, 0.1 * logits.mean(dim=0))
        torch.testing.assert_close(of_one, 0.1 * share.mean(dim=0))
        as_in_dino = 0.1 * logits.sum(dim=0) / (2 * len(share))
        assert not torch.allclose(of_all, as_in_dino, rtol=0.1)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_casting_a_module_keeps_the_center(name: str, cast: str) -> None:
    """Half precision would round the centre, and lose updates that are small next to it."""
    module = LOSSES[name]().to(DEVICE)
    module.update_center(torch.randn(5, 7, device=DEVICE))
    before = module.center.clone()
    assert torch.equal(getattr(module, cast)().center, before)
    logits = torch.randn(4, 7, device=DEVICE).to(getattr(torch, cast))
    module.update_center(logits)
    assert module.center.dtype == torch.float32
    expected = 0.9 * before.double() + 0.1 * logits.double().mean(dim=0)
    torch.testing.assert_close(module.center.double(), expected, rtol=1e-5, atol=1e-7)
    assert module.to("meta").center.is_meta


@pytest.mark.parametrize(("name", "shape"), [("DINOLoss", (1, 7)), ("iBOTPatchLoss", (1, 1, 7))])
def test_state_dicts_of_dino_and_dinov2_load(name: str, shape: tuple[int, ...]) -> None:
    module = LOSSES[name]()
    center = torch.randn(shape)
    module.load_state_dict({"center": center})
    assert torch.equal(module.center, center)
    logits = torch.randn(3, 7)
    targets = module.softmax_center_teacher(logits, teacher_temp=0.04)
    truth = probabilities(logits.double(), center.double().flatten(), 0.04)
    torch.testing.assert_close(targets.double(), truth, rtol=1e-4, atol=1e-6)


# --- Sinkhorn-Knopp


def published_sinkhorn(logits: Tensor, temp: float, iterations: int = 3) -> Tensor:
    """Caron et al. 2020 (SwAV), section 3.1 and appendix, as used by DINOv2: every row of Q, one per prototype, is
    made to sum to 1/K, then every column, one per sample, to 1/B; in the end, columns sum to 1."""
    q = torch.exp(logits.double() / temp).T
    q /= q.sum()
    num_prototypes, batch = q.shape
    for _ in range(iterations):
        q /= q.sum(dim=1, keepdim=True) * num_prototypes
        q /= q.sum(dim=0, keepdim=True) * batch
    return (q * batch).T


@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_sinkhorn_knopp_equals_the_published_equations(iterations: int) -> None:
    logits = torch.randn(12, 7, device=DEVICE)
    targets = kernels.sinkhorn_knopp(logits, 0.07, iterations)
    assert targets.dtype == torch.float32
    torch.testing.assert_close(targets.double(), published_sinkhorn(logits, 0.07, iterations), rtol=1e-4, atol=1e-6)
    exact = kernels.sinkhorn_knopp(logits.double(), 0.07, iterations)
    torch.testing.assert_close(exact, published_sinkhorn(logits, 0.07, iterations), rtol=1e-10, atol=1e-12)


def test_sinkhorn_knopp_leaves_out_padding_and_does_not_overflow() -> None:
    logits = torch.randn(12, 7, device=DEVICE)
    truth = published_sinkhorn(logits[:9], 0.07)
    module, count = kernels.iBOTPatchLoss(7).to(DEVICE), torch.tensor([9], device=DEVICE)
    targets = module.sinkhorn_knopp_teacher(logits, teacher_temp=0.07, n_masked_patches_tensor=count)
    torch.testing.assert_close(targets[:9].double(), truth, rtol=1e-4, atol=1e-6)
    assert targets[9:].count_nonzero() == 0
    assert kernels.sinkhorn_knopp(logits, 0.07, num_rows=0).count_nonzero() == 0
    large = kernels.sinkhorn_knopp(logits * 1e3, 0.01)  # exp of 1e5
    torch.testing.assert_close(large.sum(dim=1), torch.ones(12, device=DEVICE))


def test_sinkhorn_knopp_rejects_wrong_arguments() -> None:
    for arguments in ((torch.zeros(7), 0.1), (torch.zeros(2, 7), 0), (torch.zeros(2, 7), 0.1, 0)):
        with pytest.raises(ValueError, match=r"sinkhorn_knopp: expected logits \[N, K\]"):
            kernels.sinkhorn_knopp(*arguments)


def sinkhorn_on_one_of_two(logits: Tensor) -> Tensor:
    return kernels.DINOLoss(7, 2).sinkhorn_knopp_teacher(logits, teacher_temp=0.07)


@pytest.mark.parametrize("of_first", [0, 4, 6])
def test_sinkhorn_knopp_balances_over_all_processes(of_first: int, two_ranks: Ranks) -> None:
    logits = torch.randn(12, 7)
    targets = two_ranks(sinkhorn_on_one_of_two, [(logits[:of_first],), (logits[of_first:],)])
    torch.testing.assert_close(torch.cat(targets).double(), published_sinkhorn(logits, 0.07), rtol=1e-4, atol=1e-6)
