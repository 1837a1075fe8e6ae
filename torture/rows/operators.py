"""K1, K3: the operators, checked by the test suite, and tensors of more than 2**31 numbers."""

from __future__ import annotations

import torch

from muse_fast import ops
from muse_fast.ops import dino_loss, match_nuclei, reference, sample_nuclei
from torture.harness import Outcome, Row, Scale, Tally
from torture.suite import ROOT, tests

_ROW = 32_768  # rows of 65,536 logits are 2**31 numbers
_PROTOTYPES = 65_536


def registered(scale: Scale) -> Outcome:
    """Run opcheck on every op, check gradients in double precision, and plant bugs in copies of the sources."""
    files = [path for op in ops.__all__ for path in ROOT.glob(f"tests/ops/test_{op}.py")]
    ran = tests(*map(str, files), "tests/ops/test_reference_gradients.py", "-k", "opcheck or grad")
    caught = tests("tests/ops/test_seeded_bugs.py", "-m", "heavy", "-k", "is_caught")
    notes = f"{ran.injected} checks {ran.notes}, {caught.survived} of {caught.injected} bugs caught {caught.notes}"
    return Outcome(ran.injected + caught.injected, ran.survived + caught.survived, notes)


def beyond_int32(scale: Scale) -> Outcome:
    """Compute rows that lie beyond 2**31 numbers, in bfloat16 (4.3 GB), and the same rows on their own."""
    tally = Tally()
    if (free := _available_memory()) < 10 << 30:
        return Outcome(1, 0, f"needs 10 GB of memory, {free >> 30} are free")
    torch.manual_seed(0)
    few = torch.randn(3, _PROTOTYPES).bfloat16()
    logits = torch.zeros(_ROW + 2, _PROTOTYPES, dtype=torch.bfloat16)
    center = torch.randn(_PROTOTYPES)
    rows = [_ROW - 1, _ROW, _ROW + 1]
    for row, values in zip(rows, few, strict=True):
        logits[row] = values
    pairs = torch.tensor([0, 1, 2]), torch.tensor([1, 2, 0])
    far = torch.tensor(rows)[pairs[0]], torch.tensor(rows)[pairs[1]]
    expected = reference.dino_loss(few.double(), few.double(), center.double(), *pairs, 0.1, 0.04)
    found = dino_loss(logits, logits, center, *far, 0.1, 0.04)
    tally.add(torch.allclose(found.double(), expected, rtol=2e-5, atol=0), f"dino_loss {found} for {expected}")
    del logits

    level = torch.zeros(1, 2, _ROW, _ROW + 32, dtype=torch.bfloat16)  # 2**31 numbers and a bit, 4.3 GB
    small = torch.randn(1, 2, 4, 4).bfloat16()
    level[:, :, -4:, -4:] = small
    last = torch.tensor([[float(_ROW), float(_ROW)]])  # the corner of the view is the corner of the level
    read = sample_nuclei([level], last, torch.tensor([0]), _ROW)
    tally.add(bool(torch.isfinite(read).all()) and torch.allclose(read[0], small[0, :, -1, -1]), f"sampled {read}")
    del level

    index = torch.arange(70_000, dtype=torch.int32).repeat(4)
    offsets = torch.tensor([0, 70_000, 140_000, 210_000, 280_000], dtype=torch.int32)
    teacher, student, *_ = match_nuclei(index, offsets, 1, 2)
    tally.add(len(teacher) == 2 * 3 * 70_000 and bool((index[teacher] == index[student]).all()), "match_nuclei")
    return tally.outcome("dino_loss, sample_nuclei and match_nuclei on the CPU")


def _available_memory() -> int:
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable"))


ROWS = [
    Row(
        "K1",
        "operators are registered correctly and have correct gradients",
        "opcheck and gradients of every op; each planted bug is caught",
        registered,
        quick=False,
    ),
    Row("K2", "no memory errors in C++", "has its own target: make sanitize", None),
    Row(
        "K3",
        "sizes beyond 32 bits are handled correctly",
        "rows beyond 2**31 numbers have the same values as on their own (CPU; not tried on CUDA)",
        beyond_int32,
        quick=False,
    ),
]
NOT_APPLICABLE = [
    Row("C5", "an asynchronous save is a snapshot", "does not apply: a save returns once everything is on disk", None)
]
