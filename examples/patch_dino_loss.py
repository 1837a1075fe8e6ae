"""Compare DINO's published loss with the three ways to compute it with ``kernels/``.

    python examples/patch_dino_loss.py

Runs on a GPU if there is one, else on the CPU. Prints loss, largest gradient difference, time and peak memory of each
way, and fails if one differs. To use the ops in your own code, copy the folder ``kernels/`` next to it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import profiler

sys.path.insert(0, str(Path(__file__).parents[1]))  # the folder that contains kernels/

import kernels
from kernels.modules import crop_pairs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IMAGES, PROTOTYPES = (64, 65_536) if DEVICE.type == "cuda" else (32, 8_192)
CROPS, GLOBALS = 10, 2  # per image, the global ones first
STUDENT_TEMP, TEACHER_TEMP = 0.1, 0.04
TOLERANCE = 1e-4  # relative to the loss, and to the largest entry of a gradient

torch.manual_seed(0)
student = F.normalize(torch.randn(CROPS * IMAGES, 256, device=DEVICE), dim=-1)  # bottleneck features of every crop
teacher = F.normalize(torch.randn(GLOBALS * IMAGES, 256, device=DEVICE), dim=-1)
student_prototypes = F.normalize(torch.randn(PROTOTYPES, 256, device=DEVICE), dim=-1)
teacher_prototypes = F.normalize(torch.randn(PROTOTYPES, 256, device=DEVICE), dim=-1)
center = torch.randn(PROTOTYPES, device=DEVICE) * 0.01


def as_published(features: Tensor, prototypes: Tensor) -> Tensor:
    """Caron et al. 2021, equation 3: compare every global view of the teacher with every other view of the student."""
    student_logits, teacher_logits = features @ prototypes.T, teacher @ teacher_prototypes.T
    targets = F.softmax((teacher_logits - center) / TEACHER_TEMP, dim=-1).chunk(GLOBALS)
    predictions = F.log_softmax(student_logits / STUDENT_TEMP, dim=-1).chunk(CROPS)
    terms = [
        -(target * prediction).sum(dim=-1).mean()
        for g, target in enumerate(targets)
        for v, prediction in enumerate(predictions)
        if v != g
    ]
    return torch.stack(terms).mean()


# Which rows to compare, and how: crop g < GLOBALS of the teacher with crop v != g of the student, image by image.
PAIRS_AND_TEMPS = (*crop_pairs(IMAGES, GLOBALS, CROPS, DEVICE), STUDENT_TEMP, TEACHER_TEMP)


def by_function(features: Tensor, prototypes: Tensor) -> Tensor:
    """On a GPU, this stores neither softmaxes nor pairs."""
    student_logits, teacher_logits = features @ prototypes.T, teacher @ teacher_prototypes.T
    return kernels.dino_loss(student_logits, teacher_logits, center, *PAIRS_AND_TEMPS).mean()


module = kernels.DINOLoss(PROTOTYPES, CROPS, student_temp=STUDENT_TEMP).to(DEVICE)
module.center.copy_(center)  # in training: module(..., update_center=True)


def by_module(features: Tensor, prototypes: Tensor) -> Tensor:
    """The same as a module that keeps centre and pairs."""
    return module(features @ prototypes.T, teacher @ teacher_prototypes.T, teacher_temp=TEACHER_TEMP)


def without_logits(features: Tensor, prototypes: Tensor) -> Tensor:
    """This does not even store the logits."""
    return kernels.linear_dino_loss(features, prototypes, teacher, teacher_prototypes, center, *PAIRS_AND_TEMPS).mean()


def run(loss_function: Callable[[Tensor, Tensor], Tensor]) -> tuple[float, tuple[Tensor, ...]]:
    """Return the loss, and its gradients for features and prototypes."""
    leaves = student.detach().requires_grad_(), student_prototypes.detach().requires_grad_()
    loss = loss_function(*leaves)
    return loss.item(), torch.autograd.grad(loss, leaves)


def seconds(loss_function: Callable[[Tensor, Tensor], Tensor]) -> float:
    start = time.perf_counter()
    _, gradients = run(loss_function)
    gradients[0].sum().item()  # waits for the GPU
    return time.perf_counter() - start


def peak_bytes(loss_function: Callable[[Tensor, Tensor], Tensor]) -> int:
    """Return the peak memory that torch allocates, gradients included, beyond what was allocated before."""
    if DEVICE.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(loss_function)
        return torch.cuda.max_memory_allocated() - before
    with profiler.profile(profile_memory=True) as profile:
        run(loss_function)
    events = sorted(profile.kineto_results.events(), key=lambda event: event.start_ns())
    changes = torch.tensor([event.nbytes() for event in events if event.name() == "[memory]"])
    return int(changes.cumsum(0).max())


print(f"{IMAGES} images, {CROPS} crops ({GLOBALS} global), {PROTOTYPES} prototypes, float32 on {DEVICE.type}\n")
print(f"{'':15}{'loss':>10}{'gradients differ':>19}{'time':>11}{'peak memory':>15}")
true_loss, true_gradients = run(as_published)
for loss_function in (as_published, by_function, by_module, without_logits):
    loss, gradients = run(loss_function)  # also warms up: Triton compiles at the first call
    pairs = zip(gradients, true_gradients, strict=True)
    difference = max(((ours - theirs).abs().max() / theirs.abs().max()).item() for ours, theirs in pairs)
    figures = f"{seconds(loss_function) * 1e3:8.0f} ms{peak_bytes(loss_function) / 2**20:12.0f} MB"
    print(f"{loss_function.__name__:15}{loss:10.5f}{difference:19.1e}{figures}")
    if not (difference <= TOLERANCE and abs(loss - true_loss) <= TOLERANCE * true_loss):
        sys.exit(f"{loss_function.__name__} differs from the published loss")
if DEVICE.type == "cpu":
    print("\nAll of this ran in plain PyTorch. On a GPU, Triton kernels store neither softmaxes nor pairs.")
