"""Run by `tests/bench/test_plan.py` with a stand-in GPU: counts of two steps, and of operations whose cost is known."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from itertools import repeat
from typing import Any

import torch
import torch.nn.functional as F

from bench.plan.counts import Counts
from bench.plan.standin import DEVICE, StandIn, stand_in
from bench.plan.worker import Job, count
from muse_fast.runtime.device import deterministic
from muse_fast.training.graphs import CudaRecorder, Graphed
from muse_fast.views.loader import on_device

SIZES = ("views.global_size=224", "views.local_size=96", "optim.batch_size=2")
JOBS = (
    Job("ours", "vit_small", SIZES),
    Job("finetune", "vit_tiny", ("data.sample_size=64", "optim.batch_size=2")),
)


def product() -> None:
    torch.empty(1024, 512, device=DEVICE) @ torch.empty(512, 256, device=DEVICE)


def broadcast() -> None:
    torch.empty(64, 32, device=DEVICE) + torch.empty(32, device=DEVICE).expand(64, 32)


def freed() -> None:
    for megabytes in (1, 3, 2):
        torch.empty(megabytes << 20, dtype=torch.uint8, device=DEVICE)


def pageable() -> None:
    torch.ones(8).to(DEVICE, non_blocking=True)


def pinned() -> None:
    torch.ones(8).pin_memory().to(DEVICE, non_blocking=True)


def pinned_but_blocking() -> None:
    torch.ones(8).pin_memory().to(DEVICE)


def copied_ahead() -> None:
    batches = iter(on_device(repeat(torch.ones(8).pin_memory()), DEVICE))
    for _ in range(3):
        next(batches).sum()


def replayed() -> None:
    graphed(DEVICE, torch.nn.Linear(8, 4, device=DEVICE))


def wait_in_a_graph() -> None:
    """A recording that waits is refused, and the function runs as usual."""
    layer = torch.nn.Linear(8, 4, device=DEVICE)

    def wait(*_: Any) -> None:
        torch.arange(3, device=DEVICE).sum().item()

    layer.register_forward_hook(wait)
    graphed(DEVICE, layer)


def graphed(device: torch.device, module: torch.nn.Module) -> None:
    """Call it twice as usual, and then three times."""
    function = Graphed(module, module, CudaRecorder(device), after=2)
    for _ in range(5):
        function(torch.empty(2, 8, device=device)).sum().backward()


def read() -> None:
    assert torch.arange(4, device=DEVICE).sum().item() == 6


def read_all() -> None:
    assert torch.tensor([3, 5], device=DEVICE).tolist() == [3, 5]


def masked() -> None:
    numbers = torch.arange(5, device=DEVICE)
    assert torch.empty(5, 2, device=DEVICE)[numbers > 2].shape == (2, 2)


def attention() -> None:
    q = torch.empty(2, 3, 40, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    F.scaled_dot_product_attention(q, q, q).sum().backward()


def deterministic_attention() -> None:
    with deterministic(DEVICE, True):
        attention()


def traced() -> None:
    with torch.autograd.set_detect_anomaly(True, check_nan=False):
        x = torch.empty(4, device=DEVICE, requires_grad=True)
        y = x.sin()
        y.backward(torch.empty(4, device=DEVICE))


CASES: tuple[Callable[[], None], ...] = (
    product, broadcast, freed, pageable, pinned, pinned_but_blocking, copied_ahead, replayed, wait_in_a_graph, read,
    read_all, masked, attention, deterministic_attention, traced,
)  # fmt: skip


def case(run: Callable[[], None], device: StandIn) -> dict[str, Any]:
    counts = device.meter = Counts()
    run()
    rows = counts.rows.values()
    return {
        "launches": sum(row.launches for row in rows),
        "replayed": sum(row.replayed for row in rows),
        "graphs": counts.rows["CUDA graph"].calls,
        "bytes": sum(row.bytes for row in rows),
        "flops": sum(row.flops for row in rows),
        "waits": list(counts.waits),
        "pageable": sum(not copy.pinned for copy in counts.copies),
        "peak": counts.peak,
        "live": counts.held,
        "operations": list(counts.rows),
        "launched_at": list(counts.launched_at),
    }


if __name__ == "__main__":
    with stand_in() as device, redirect_stdout(sys.stderr):
        found = {run.__name__: case(run, device) for run in CASES}
        steps = [count(job, device) for job in JOBS]
    json.dump({"cases": found, "steps": steps}, sys.stdout)
