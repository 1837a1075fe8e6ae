"""Swap the loss of a DINO training script for that of kernels/, and check that training does not change.

    python examples/swap_dino_loss.py [STEPS]

Prints the diff of the two scripts in ``dino_training/``, their losses over 50 steps, and the peak memory of the loss
alone (beyond the logits, with the gradient). Fails if a loss differs by more than TOLERANCE or no memory is saved.
Runs on the CPU, in plain PyTorch; on a GPU, kernels/ stores still less.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import profiler

sys.path.insert(0, str(Path(__file__).parents[1]))  # the folder that contains kernels/

from dino_training import after, before

import kernels

TOLERANCE = 1e-4  # relative to the loss; rounding differs, and training amplifies it


def print_diff() -> None:
    scripts = (Path(module.__file__).read_text().splitlines() for module in (before, after))
    print("\n".join(difflib.unified_diff(*scripts, "before.py", "after.py", lineterm="", n=1)), end="\n\n")


def peak_bytes(loss_function: Callable[[Tensor, Tensor], Tensor]) -> int:
    """Return the peak memory that torch allocates for a loss of random logits and its gradient."""
    student = torch.randn(before.CROPS * before.IMAGES, before.PROTOTYPES, requires_grad=True)
    teacher = torch.randn(2 * before.IMAGES, before.PROTOTYPES)
    with profiler.profile(profile_memory=True) as profile:
        loss_function(student, teacher).backward()
    events = sorted(profile.kineto_results.events(), key=lambda event: event.start_ns())
    return int(torch.tensor([event.nbytes() for event in events if event.name() == "[memory]"]).cumsum(0).max())


def main(steps: int) -> None:
    print_diff()
    losses_before, losses_after = before.train(steps), after.train(steps)
    difference = max(abs(ours / theirs - 1) for ours, theirs in zip(losses_after, losses_before, strict=True))
    for step in sorted({0, steps // 2, steps - 1}):
        print(f"step {step:3}: loss {losses_before[step]:.6f} before, {losses_after[step]:.6f} after")
    print(f"largest relative difference over {steps} steps: {difference:.1e} (tolerance {TOLERANCE:.0e})")
    published = before.DINOLoss(before.PROTOTYPES, before.CROPS, [0.04])
    ours = kernels.DINOLoss(before.PROTOTYPES, before.CROPS)
    memory_before = peak_bytes(lambda student, teacher: published(student, teacher, 0))
    memory_after = peak_bytes(lambda student, teacher: ours(student, teacher, teacher_temp=0.04, update_center=True))
    print(f"peak memory of the loss: {memory_before / 2**20:.1f} MB before, {memory_after / 2**20:.1f} MB after")
    if not difference <= TOLERANCE:
        sys.exit("training changed")
    if memory_after >= memory_before:
        sys.exit("no memory was saved")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 50)
