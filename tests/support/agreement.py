"""Tolerances of the fast backends: as close to float64 as eager PyTorch, and never so loose that 1 % could hide."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Maximum distance from float64 relative to its norm, even if eager PyTorch is less exact.
LOSS_CAP = {torch.float32: 2e-6, torch.bfloat16: 2e-5, torch.float16: 2e-5, torch.float64: 1e-12}
GRADIENT_CAP = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float64: 1e-12}
FLOOR = {torch.float32: 5e-7, torch.bfloat16: 1e-6, torch.float16: 1e-6, torch.float64: 1e-13}

NORMS: tuple[Callable[[Tensor], Tensor], ...] = (torch.linalg.vector_norm, lambda x: x.abs().max())


def assert_as_exact_as_eager(
    got: Sequence[Tensor], eager: Sequence[Tensor], truth: Sequence[Tensor], caps: Sequence[float], floor: float
) -> None:
    """Assert, per tensor, in L2 and maximum norm: ``|got - truth| <= 1.5 |eager - truth| + floor |truth|``, and caps.

    Args:
        got, eager: results of the fast backend and of eager PyTorch for the same inputs.
        truth: results of eager PyTorch for these inputs in float64.
        caps: per tensor, see LOSS_CAP and GRADIENT_CAP.
        floor: see FLOOR.
    """
    assert len(got) == len(eager) == len(truth) == len(caps)
    for place, (ours, theirs, exact, cap) in enumerate(zip(got, eager, truth, caps, strict=True)):
        assert ours.shape == theirs.shape == exact.shape, f"tensor {place}"
        assert ours.dtype == theirs.dtype, f"tensor {place}"
        assert ours.isfinite().all(), f"tensor {place}"
        if not exact.numel():
            continue
        ours, theirs = ours.double().cpu(), theirs.double().cpu()
        exact = exact.double().cpu()
        for norm in NORMS:
            allowed = min(1.5 * norm(theirs - exact) + floor * norm(exact), cap * norm(exact))
            assert allowed <= 0.005 * norm(exact), f"tensor {place}: the inputs would let a 1 % error through"
            assert norm(ours - exact) <= allowed, f"tensor {place}"
