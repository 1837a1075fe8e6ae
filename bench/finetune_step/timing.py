"""Time whole fine-tuning steps of two versions in one process: *literal*, and *fast* (the engine).

Both start from the same weights and train on the same batches, which are on the host as from the loader. Before
anything is timed, their losses over several steps must agree.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from bench.finetune_step.literal import LiteralFinetuner
from bench.measure import held_and_peak, quantiles
from bench.step.timing import Row, relative_error, release, skip_on_refusal, top
from muse_fast.detection import targets
from muse_fast.detection.config import FinetuneConfig
from muse_fast.detection.detector import Detector
from muse_fast.detection.finetuner import TERMS, Finetuner
from muse_fast.detection.run import new_detector
from muse_fast.detection.samples import ANNOTATED, UNLABELLED, LfovBatch
from muse_fast.runtime.device import keep_freed_memory
from muse_fast.runtime.options import load_settings

KINDS = ("literal", "fast")
CLASSES = ("lymphocyte", "tumour", "stromal")
LOSSES = [f"loss_{name}" for name in TERMS]
# Every step is an epoch, half of them are over, and every unlabelled proposal gets a pseudo-label.
FIXED = ("optim.epochs=100", "loss.confidence=0")
START = 50
GATE_STEPS = 3
TOLERANCE = 1e-4  # relative, for every loss of every step, in float32: rounding in bfloat16 changes who is matched
MIN_REPEATS, MAX_REPEATS = 3, 20


class Times(NamedTuple):
    """Milliseconds of a step."""

    clock: float
    cpu: float  # of the process
    matching: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What all versions share."""

    config: FinetuneConfig
    weights: str
    nuclei: int
    """Annotated ones per sample."""
    device: str

    @property
    def side(self) -> int:
        return self.config.data.sample_size

    def in_float32(self) -> Case:
        return replace(self, config=replace(self.config, train=replace(self.config.train, precision="fp32")))

    def detector(self) -> Detector:
        return new_detector(self.config, CLASSES, self.weights, None, None)

    def batch(self) -> LfovBatch:
        """Random pixels and nuclei; the left half of every sample is annotated."""
        count, side, random = self.config.optim.batch_size, self.side, torch.Generator().manual_seed(0)
        plain, images = torch.randint(0, 256, (2, count, 3, side, side), dtype=torch.uint8, generator=random)
        places = torch.full((count, side, side), UNLABELLED, dtype=torch.uint8)
        places[:, :, : side // 2] = ANNOTATED
        total = count * self.nuclei
        return LfovBatch(
            plain=plain,
            images=images,
            places=places,
            xy=torch.rand(total, 2, generator=random) * torch.tensor([side / 2, side]),
            label=torch.randint(0, len(CLASSES), (total,), generator=random),
            counts=torch.full((count,), self.nuclei),
            image_ids=torch.arange(count),
            epochs=torch.zeros(count, dtype=torch.int64),
        )


def settings(side: int, batch: int, precision: str, more: Sequence[str]) -> FinetuneConfig:
    own = [f"data.sample_size={side}", f"optim.batch_size={batch}", f"train.precision={precision}"]
    return load_settings(FinetuneConfig, None, [*FIXED, *own, *more])


class Fast:
    """The engine.

    Attributes:
        matching_s: seconds of the thread that matches in the last step, without what it waited.
    """

    def __init__(self, case: Case, detector: Detector) -> None:
        config = case.config
        self.tuner = Finetuner(config, detector, torch.device(case.device), config.optim.batch_size)
        self.tuner.step, self.matching_s = START, 0.0

    def train_step(self, batch: LfovBatch) -> dict[str, Any]:
        with mock.patch.object(targets, "assign", self._timed(targets.assign)):
            return dict(self.tuner.train_step(batch))

    def _timed(self, assign: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            begin = time.thread_time()
            found = assign(*arguments)
            self.matching_s = time.thread_time() - begin
            return found

        return timed


def build(kind: str, case: Case, state: dict[str, Tensor]) -> Fast | LiteralFinetuner:
    detector = case.detector()
    if kind == "literal":
        return LiteralFinetuner(case.config, detector.spec, state, torch.device(case.device), START)
    detector.load_state_dict(state)
    return Fast(case, detector)


def new_rows(case: Case, kinds: Sequence[str]) -> list[Row]:
    return [{"px": case.side, "version": kind} for kind in kinds]


def run(case: Case, rows: Sequence[Row], seconds: float, keep: Callable[[], None]) -> None:
    """Add to the row of each version its figures, or under ``wrong`` or ``skipped`` the reason why it has none.

    Args:
        rows: from `new_rows`.
        seconds: duration of timed steps per version; every version gets at least MIN_REPEATS.
        keep: is called after the checks and after every round of timed steps.
    """
    if case.device == "cpu":
        keep_freed_memory()  # as a run does; it serves both versions
    state, batch = case.detector().state_dict(), case.batch()
    truth: list[float] = []
    for row in rows:
        release()
        with skip_on_refusal(row):
            losses, memory = trial(row["version"], case.in_float32(), state, batch)
            if case.config.train.precision != "fp32":
                _, memory = trial(row["version"], case, state, batch)
            truth = truth or losses
            error = relative_error(losses, truth)
            row |= memory | {"relative_error": error, "losses": losses}
            if not error <= TOLERANCE:
                row["wrong"] = f"losses of {GATE_STEPS} steps differ by {error:.0e}, above {TOLERANCE:.0e}"
        keep()
    interleaved([row for row in rows if not row.keys() & {"wrong", "skipped"}], case, state, batch, seconds, keep)


def trial(kind: str, case: Case, state: dict[str, Tensor], batch: LfovBatch) -> tuple[list[float], Row]:
    """Return the losses of the gate's steps, and the bytes that a version holds between steps and at a step's peak."""
    trainers: list[Fast | LiteralFinetuner] = []
    losses: list[dict[str, Any]] = []

    def first_steps() -> None:
        trainers.append(build(kind, case, state))
        for _ in range(GATE_STEPS - 1):
            last_step()

    def last_step() -> None:
        losses.append(trainers[0].train_step(batch))

    held, peak = held_and_peak(first_steps, last_step, case.device)
    values = [float(step[name]) for step in losses for name in LOSSES]
    return values, {"held_bytes": held, "peak_bytes": peak, "step_bytes": peak - held}


def interleaved(
    rows: Sequence[Row],
    case: Case,
    state: dict[str, Tensor],
    batch: LfovBatch,
    seconds: float,
    keep: Callable[[], None],
) -> None:
    """Time steps in turns, so that a change of the machine's speed affects all versions."""
    trainers = {row["version"]: build(row["version"], case, state) for row in rows}
    times: dict[str, list[Times]] = {name: [] for name in trainers}
    for trainer in trainers.values():
        one_step(trainer, batch, case.device)  # a warm-up
    for _ in range(MAX_REPEATS):
        for row in rows:
            of_version = times[row["version"]]
            if len(of_version) < MIN_REPEATS or sum(one.clock for one in of_version) < seconds * 1e3:
                of_version.append(one_step(trainers[row["version"]], batch, case.device))
            if len(of_version) > 1:
                row |= figures(of_version, case)
        add_ratios(rows)
        keep()
    for row in rows:
        row["profile"] = top(partial(one_step, trainers[row["version"]], batch, case.device), case.device)


def one_step(trainer: Fast | LiteralFinetuner, batch: LfovBatch, device: str) -> Times:
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter(), time.process_time()
    trainer.train_step(batch)
    if device == "cuda":
        torch.cuda.synchronize()
    ended = time.perf_counter(), time.process_time()
    return Times((ended[0] - began[0]) * 1e3, (ended[1] - began[1]) * 1e3, trainer.matching_s * 1e3)


def figures(times: Sequence[Times], case: Case) -> Row:
    clock, cpu, matching = (quantiles(some) for some in zip(*times, strict=True))
    return clock | {
        "cpu_ms": cpu["median_ms"],
        "matching_ms": matching["median_ms"],
        "matching_share": matching["median_ms"] / clock["median_ms"],
        "img_per_s": case.config.optim.batch_size / clock["median_ms"] * 1e3,
    }


def add_ratios(rows: Sequence[Row]) -> None:
    """Add literal's time, CPU time and memory for a step over the engine's own."""
    of_kind = {row["version"]: row for row in rows}
    if of_kind.keys() != {*KINDS}:
        return
    literal, fast = (of_kind[kind] for kind in KINDS)
    for figure, key in {"speedup": "median_ms", "cpu_speedup": "cpu_ms", "memory": "step_bytes"}.items():
        if key in literal and key in fast:
            fast[f"{figure}_literal"] = literal[key] / fast[key]
