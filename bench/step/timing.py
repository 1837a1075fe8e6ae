"""Time whole training steps of three versions in one process: *literal*, *fair* and *fast* (the engine).

All start from the same weights and train on the same views, which are already on the device. Before anything is timed,
their losses over several steps must agree.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.measure import held_and_peak, quantiles
from bench.step.fair import FairTrainer
from bench.step.literal import LiteralTrainer
from muse_fast.batch import PackedNuclei, Views
from muse_fast.config import PretrainConfig, load_config
from muse_fast.errors import UserError
from muse_fast.ops.reference import match_nuclei
from muse_fast.pretraining.flops import step_flops
from muse_fast.pretraining.trainer import Trainer
from muse_fast.views.boxes import draw_boxes
from muse_fast.views.loader import collate, on_device

LOSSES = ("loss_image", "loss_nucleus")
BASELINES = ("literal", "fair")

ROI_SIDE, ROI_MPP = 2048, 0.25
NUCLEI_PER_GLOBAL = 60  # on average in a view of 224 px; the same density in all others

# Three steps, each of which depends on the one before: no warm-up, and a teacher and centres that move.
GATE = {
    "model.drop_path": 0.0,
    "optim.warmup_steps": 0,
    "optim.freeze_prototypes_steps": 0,
    "optim.lr": 2e-5,
    "optim.ema_start": 0.5,
}
GATE_STEPS = 3
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-3}  # relative, for every loss of every step; an error of 1 % fails
GATE_ROIS = 4  # batch size of the additional float32 gate of a bfloat16 run

MIN_REPEATS, MAX_REPEATS = 3, 20
STEPS_PER_REPEAT = {"cpu": 1, "cuda": 5}  # back to back, without synchronisation between them
WARMUP_STEPS = {"cpu": 1, "cuda": 3}
TOP = 20

Row = dict[str, Any]


@dataclass(frozen=True)
class Version:
    """One way to train; ``kind`` is one of BASELINES, or ``fast``."""

    name: str
    kind: str
    settings: tuple[str, ...] = ()  # ``key=value``, in addition to the shared settings
    from_host: bool = False  # views come from the host, as in a run; otherwise they are on the device

    def config(self, shared: Sequence[str]) -> PretrainConfig:
        return load_config(None, [*shared, *self.settings])

    def build(self, config: PretrainConfig, weights: dict[str, Tensor], device: torch.device) -> Any:
        if self.kind == "fast":  # it draws the same weights from the seed
            return Trainer(config, device)
        return {"literal": LiteralTrainer, "fair": FairTrainer}[self.kind](config, weights, device)


# --- inputs


def synthetic_views(config: PretrainConfig, seed: int = 0) -> Views:
    """Make a batch of random pixels, with boxes drawn as in training over uniformly distributed nuclei."""
    rng = np.random.default_rng(seed)
    pixels = torch.Generator().manual_seed(seed)
    size = config.views.global_size
    mean_side = size * rms(config.views.global_mpp_min, config.views.global_mpp_max) / ROI_MPP
    nuclei = round(NUCLEI_PER_GLOBAL * (size / 224) ** 2 * (ROI_SIDE / mean_side) ** 2)
    return collate([roi_views(config, roi, nuclei, rng, pixels) for roi in range(config.optim.batch_size)])


def roi_views(
    config: PretrainConfig, roi: int, nuclei: int, rng: np.random.Generator, pixels: torch.Generator
) -> Views:
    xy = rng.uniform(0, ROI_SIDE, (nuclei, 2)).astype(np.float32)
    globals_, locals_ = draw_boxes(rng, ROI_SIDE, ROI_SIDE, ROI_MPP, xy, config.views)
    boxes = globals_ + locals_
    seen = [box.nuclei(xy) for box in boxes]
    counts = [len(index) for _, index in seen]
    return Views(
        global_images=torch.randn(len(globals_), 3, *[config.views.global_size] * 2, generator=pixels),
        local_images=torch.randn(len(locals_), 3, *[config.views.local_size] * 2, generator=pixels),
        nuclei=PackedNuclei(
            xy=torch.from_numpy(np.concatenate([points for points, _ in seen])),
            index=torch.from_numpy(np.concatenate([index for _, index in seen])),
            offsets=torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32),
        ),
        mpp=torch.tensor([box.mpp(ROI_MPP) for box in boxes]),
        roi_ids=torch.tensor([roi]),
        epochs=torch.tensor([0]),
        num_global_nuclei=sum(counts[: len(globals_)]),
    )


def rows_per_roi(views: Views) -> tuple[float, float]:
    """Return the nuclei per ROI in all views, and in the globals."""
    return len(views.nuclei.xy) / views.num_rois, views.num_global_nuclei / views.num_rois


def describe(config: PretrainConfig) -> dict[str, float]:
    """Return the size of the batch that `run` trains on."""
    views = synthetic_views(config)
    pairs = match_nuclei(views.nuclei.index, views.nuclei.offsets, views.num_rois, views.num_globals)[0]
    rows, teacher_rows = rows_per_roi(views)
    return {
        "rois": views.num_rois,
        "rows": rows,
        "teacher_rows": teacher_rows,
        "pairs": len(pairs) / views.num_rois,
    }


def rms(low: float, high: float) -> float:
    """Return the root mean square of a uniform distribution between the two."""
    return math.sqrt((low * low + low * high + high * high) / 3)


# --- the whole run


def run(
    versions: Sequence[Version],
    shared: Sequence[str],
    device: str,
    seconds: float,
    matmul: float,
    peak: float | None,
    keep: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """Return one row per version: its figures, or under ``wrong`` or ``skipped`` the reason why it has none.

    Args:
        shared: settings of the run, ``key=value``.
        seconds: duration of timed steps per version; every version gets at least MIN_REPEATS.
        matmul, peak: FLOP per second of a large matrix product here, and in the chip's data sheet if known.
        keep: gets the rows as far as they are known, after the checks and after every round of timed steps.
    """
    config = load_config(None, shared)
    rows: dict[str, Row] = {version.name: {"version": version.name, "kind": version.kind} for version in versions}
    views = synthetic_views(config)
    for gate in gates(config):
        able = passed(versions, rows)
        if load_config(None, [*shared, *gate]).train.precision != config.train.precision:
            able = [version for version in able if runs_in_float32(version.config(shared))]
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # whose digits are fewer than the tolerance
            check(able, [*shared, *gate], device, rows)
        keep(list(rows.values()))
    timed = {version.name: version for version in passed(versions, rows)}
    flops = {name: step_flops(version.config(shared), rows_per_roi(views)) for name, version in timed.items()}

    def add_figures(times: dict[str, list[float]]) -> None:
        for name, some in times.items():
            if len(some) > 1:
                rows[name] |= figures(some, views.num_rois, flops[name], matmul, peak)
        add_ratios(list(rows.values()))
        keep(list(rows.values()))

    interleaved([*timed.values()], shared, views, device, seconds, rows, add_figures)
    return list(rows.values())


def runs_in_float32(config: PretrainConfig) -> bool:
    """Whether the float32 gate of a bfloat16 run has this version: compiling for both would take twice as long."""
    return config.model.attention != "varlen" and not config.train.compile


def passed(versions: Sequence[Version], rows: dict[str, Row]) -> list[Version]:
    return [v for v in versions if not rows[v.name].keys() & {"wrong", "skipped"}]


@contextmanager
def skip_on_refusal(row: Row) -> Iterator[None]:
    """Record in ``row["skipped"]`` why a version cannot run here: a UserError, or too little memory."""
    try:
        yield
    except UserError as error:
        row["skipped"] = str(error)
    except torch.OutOfMemoryError:
        row["skipped"] = "out of memory"
    if "skipped" in row:
        release()


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- the gate


def gates(config: PretrainConfig) -> list[list[str]]:
    """Return the settings of each check: the run's own precision and batch, and before a bfloat16 run float32 too."""
    own = [f"{key}={value}" for key, value in GATE.items()]
    if config.train.precision == "fp32":
        return [own]
    few = min(config.optim.batch_size, GATE_ROIS)
    return [[*own, "train.precision=fp32", f"optim.batch_size={few}"], own]


def check(versions: Sequence[Version], settings: Sequence[str], device: str, rows: dict[str, Row]) -> None:
    """Compare the losses of every version with those of the first of its arch, and measure memory in the last step."""
    views = synthetic_views(load_config(None, settings)).to(device)
    weights: dict[str, Tensor] = {}
    truths: dict[str, tuple[str, list[float]]] = {}  # by arch: the first version that runs, and its losses
    for version in versions:
        row = rows[version.name]
        release()
        with skip_on_refusal(row):
            config = version.config(settings)
            weights = weights or initial_weights(config, device)
            losses, memory = trial(version, config, weights, views, device)
            first, truth = truths.setdefault(config.model.arch, (version.name, losses))
            error, tolerance = relative_error(losses, truth), TOLERANCE[config.train.precision]
            row |= memory | {"relative_error": max(error, row.get("relative_error", 0.0))}
            if not error <= tolerance:
                row["wrong"] = (
                    f"losses of {GATE_STEPS} steps in {config.train.precision} differ by {error:.0e} from those of "
                    f"{first}, above {tolerance:.0e}"
                )


def initial_weights(config: PretrainConfig, device: str) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in Trainer(config, torch.device(device)).student.state_dict().items()}


def trial(
    version: Version, config: PretrainConfig, weights: dict[str, Tensor], views: Views, device: str
) -> tuple[list[float], Row]:
    """Return the losses of the gate's steps, and the bytes that a version holds between steps and at a step's peak."""
    trainers, losses = [], []

    def first_steps() -> None:
        trainers.append(version.build(config, weights, torch.device(device)))
        for _ in range(GATE_STEPS - 1):
            last_step()
        for parameter in trainers[0].student.parameters():  # some versions free gradients only when a step begins
            parameter.grad = None

    def last_step() -> None:
        losses.append(trainers[0].train_step(views))

    held, peak = held_and_peak(first_steps, last_step, device)
    values = [float(step[name]) for step in losses for name in LOSSES]
    return values, {"held_bytes": held, "peak_bytes": peak, "step_bytes": peak - held}


def relative_error(losses: Sequence[float], truth: Sequence[float]) -> float:
    """Return the largest relative error; NaN if a loss is not finite, so that every comparison fails."""
    errors = [abs(a - b) / abs(b) for a, b in zip(losses, truth, strict=True)]
    return max(errors) if all(map(math.isfinite, errors)) else math.nan


# --- the times


def interleaved(
    versions: Sequence[Version],
    shared: Sequence[str],
    views: Views,
    device: str,
    seconds: float,
    rows: dict[str, Row],
    keep: Callable[[dict[str, list[float]]], None],
) -> None:
    """Time steps in milliseconds, alternating the versions so that drift of the machine affects them equally.

    ``keep`` gets all times so far after every round, and at the end.
    """
    trainers: dict[str, Any] = {}
    batches: dict[bool, Iterator[Views]] = {False: repeat(views.to(device)), True: from_host(views, device)}
    weights = None
    for version in versions:
        with skip_on_refusal(rows[version.name]):
            config = version.config([*shared, "optim.freeze_prototypes_steps=0"])  # as after the first epoch
            weights = weights or initial_weights(config, device)
            trainer = version.build(config, weights, torch.device(device))
            if isinstance(trainer, Trainer):
                rows[version.name]["logit_free"] = trainer.logits.logit_free
            steps_ms(trainer, batches[version.from_host], device, WARMUP_STEPS[device])
            trainers[version.name] = trainer
    times: dict[str, list[float]] = {name: [] for name in trainers}
    inputs = {version.name: batches[version.from_host] for version in versions}
    for _ in range(MAX_REPEATS):
        for name in list(trainers):
            if len(times[name]) >= MIN_REPEATS and sum(times[name]) * STEPS_PER_REPEAT[device] > seconds * 1e3:
                continue
            with skip_on_refusal(rows[name]):
                times[name].append(steps_ms(trainers[name], inputs[name], device, STEPS_PER_REPEAT[device]))
            if "skipped" in rows[name]:
                del trainers[name], times[name]
                release()
        keep(times)
    for version in versions:
        if version.kind == "fast" and version.name in trainers:
            trainers[version.name].check()  # training on NaNs would make the times meaningless
            step = partial(steps_ms, trainers[version.name], inputs[version.name], device, 1)
            rows[version.name]["profile"] = top(step, device)
    keep(times)


def from_host(views: Views, device: str) -> Iterator[Views]:
    """Yield the views as a run's loader does: uint8, copied from pinned memory during the step before."""
    pixels = {name: getattr(views, name).to(torch.uint8) for name in ("global_images", "local_images")}
    batch = replace(views, **pixels)
    return iter(on_device(repeat(batch.pin_memory() if device == "cuda" else batch), torch.device(device)))


def steps_ms(trainer: Any, batches: Iterator[Views], device: str, steps: int) -> float:
    """Return the mean time of consecutive steps, without synchronisation between them."""
    options = {"measure": False} if isinstance(trainer, Trainer) else {}
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        trainer.train_step(next(batches), **options)
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3 / steps


def top(step: Callable[[], object], device: str) -> list[Row]:
    """Return the operations (on CUDA the kernels) with the most self time in ``step``."""
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * (device == "cuda")
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        step()
    key = "self_cpu_time_total" if device == "cpu" else "self_device_time_total"
    kind = torch.autograd.DeviceType.CPU if device == "cpu" else torch.autograd.DeviceType.CUDA
    # An operation of the host also has the time of the kernels that it launched: only these count on a GPU.
    events = [e for e in profile.key_averages() if e.device_type == kind and not e.is_user_annotation]
    events = [e for e in events if getattr(e, key) > 0]
    total = sum(getattr(event, key) for event in events)
    events.sort(key=lambda event: -getattr(event, key))
    return [
        {"name": e.key, "calls": e.count, "ms": getattr(e, key) / 1e3, "share": getattr(e, key) / total}
        for e in events[:TOP]
    ]


# --- the figures


def figures(times: list[float], rois: int, flops: float, matmul: float, peak: float | None) -> Row:
    row: Row = quantiles(times)
    return row | efficiency(rois / row["median_ms"] * 1e3, flops, matmul, peak)


def efficiency(rate: float, flops: float, matmul: float, peak: float | None) -> Row:
    """Return images per second, and useful FLOPs per second compared with the machine's rates."""
    row = {"img_per_s": rate, "gflop_per_s": rate * flops / 1e9, "of_matmul": rate * flops / matmul}
    return row if peak is None else row | {"mfu": rate * flops / peak}


def add_ratios(rows: Sequence[Row]) -> None:
    """Add ``speedup_X``, ``memory_X``, ``peak_X``: X's time, memory for a step and peak memory over the row's own."""
    keys = {"speedup": "median_ms", "memory": "step_bytes", "peak": "peak_bytes"}
    for baseline in (row for row in rows if row["kind"] in BASELINES):
        for row in rows:
            for figure, key in keys.items():
                if key in row and key in baseline:
                    row[f"{figure}_{baseline['kind']}"] = baseline[key] / max(1, row[key])


def targets(chip: str, config: PretrainConfig) -> dict[str, float]:
    """Return the minimum figures that the engine should reach, if the project has set any."""
    arch, size, rois = config.model.arch, config.views.global_size, config.optim.batch_size
    if chip == "cpu":
        return {"speedup_literal": 1.5, "speedup_fair": 1.0, "memory_literal": 2.0}
    if not any(name in chip for name in ("H100", "H200")):  # they compute alike
        return {}
    if (size, rois) == (224, 16):
        return {"vit_small": {"speedup_literal": 4.0}, "vit_base": {"speedup_literal": 3.0}}.get(arch, {})
    if (size, rois) in ((224, 64), (512, 16)):
        large_batch = {"vit_small": (2.5, 0.40), "vit_base": (1.8, 0.50)}
        if arch in large_batch:
            return dict(zip(("speedup_fair", "mfu"), large_batch[arch], strict=True)) | {"memory_fair": 2.0}
    return {}


def add_targets(rows: Sequence[Row], wanted: dict[str, float]) -> None:
    """Add to the first fast version's row each target, the value it reached, and whether the target was met."""
    for row in [row for row in rows if row["kind"] == "fast"][:1]:
        row["targets"] = [
            {"figure": figure, "at_least": least, "reached": row[figure], "met": row[figure] >= least}
            for figure, least in wanted.items()
            if figure in row
        ]
