"""The memory of a fine-tuning run: counted before its first step, and reported when it runs out."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from concurrent.futures import Future
from dataclasses import replace

import torch

from muse_fast.config import RECOMPUTE
from muse_fast.detection.config import FinetuneConfig
from muse_fast.detection.detector import Detector, Proposals
from muse_fast.detection.finetuner import Finetuner
from muse_fast.detection.samples import ANNOTATED, UNLABELLED, LfovBatch
from muse_fast.detection.targets import Matcher, Targets
from muse_fast.errors import UserError
from muse_fast.models.archs import find_arch
from muse_fast.runtime.distributed import world_size
from muse_fast.training.footprint import Footprint, at_most, copy_of, count, dry, gib, on_a_rank, refusal, room_on
from muse_fast.training.memory import Situation
from muse_fast.training.precision import dtype_of_weights

_NUCLEI = 8  # a nucleus at every eighth proposal


def footprint(config: FinetuneConfig, detector: Detector, device: torch.device, ranks: int = 1) -> Footprint:
    """Count what a rank of a run needs for a step with pseudo-labels.

    Args:
        detector: its network; remains as it is.
        ranks: number of ranks of the job.
    """
    images, micro_batches = images_at_once(config, ranks), min(2, config.optim.accumulate)
    alone = replace(
        config,
        optim=replace(config.optim, batch_size=images * micro_batches, accumulate=micro_batches),
        train=replace(config.train, compile=False, cuda_graph=False, parallel="ddp"),
    )
    with dry(device) as meter:
        copied = copy_of(detector, device, dtype_of_weights(config.train.precision))
        tuner = Finetuner(alone, copied, device, alone.optim.batch_size)
        tuner.step = tuner.steps - 1  # where the consistency loss has its largest weight
        tuner.matcher = _AnyMatcher(alone.loss.match_distance)
        meter.watch(tuner.detector)
        batches = [_empty_batch(images, config.data.sample_size) for _ in range(micro_batches)]
        one = count(meter, tuner.optimizer, lambda: tuner.train_step(*batches, measure=False))
    return on_a_rank(one, config.train.parallel, ranks, detector)


def images_at_once(config: FinetuneConfig, ranks: int) -> int:
    return max(1, config.optim.batch_size // (ranks * config.optim.accumulate))


class _AnyMatcher(Matcher):
    """Finds targets without looking at predictions, which have no values."""

    def begin(self, proposals: Proposals, places: torch.Tensor, batch: LfovBatch) -> Future[Targets]:
        found, rows = Future[Targets](), places.numel()
        matched = torch.arange(0, rows, _NUCLEI)
        found.set_result(Targets(torch.zeros(rows, dtype=torch.int64), matched, torch.zeros(len(matched), 2)))
        return found


def _empty_batch(images: int, side: int) -> LfovBatch:
    """Samples of which half is annotated."""
    pixels = torch.zeros(images, 3, side, side, dtype=torch.uint8)
    places = torch.full((images, side, side), UNLABELLED, dtype=torch.uint8)
    places[:, :, : side // 2] = ANNOTATED
    return LfovBatch(
        plain=pixels,
        images=torch.zeros_like(pixels),
        places=places,
        xy=torch.zeros(0, 2),
        label=torch.zeros(0, dtype=torch.int64),
        counts=torch.zeros(images, dtype=torch.int64),
        image_ids=torch.zeros(images, dtype=torch.int64),
        epochs=torch.zeros(images, dtype=torch.int64),
    )


def plan(config: FinetuneConfig, detector: Detector, device: torch.device) -> list[str]:
    """Say what a step of this rank will need, as lines for the user; all ranks may call it.

    Raises:
        UserError: more than the device has; names a setting with which it fits.
    """
    ranks, room, spec = world_size(), room_on(device), detector.spec
    pixels = images_at_once(config, ranks) * spec.sample_size**2
    if (most := at_most(detector, pixels)) < room / 8:
        return [f"a step takes less than {gib(most)} of {gib(room)} GiB"]
    supports = find_arch(spec.arch, taps=spec.taps).supports

    def needed(changed: FinetuneConfig) -> Footprint:
        # By the CPU's kernels, also for a GPU: autograd keeps much the same, and counting needs no GPU.
        return footprint(changed, detector, torch.device("cpu"), ranks)

    own = needed(config)
    if own.total > room:
        changes = ((name, needed(changed)) for name, changed in smaller(config, supports, ranks))
        raise UserError(refusal(own, room, device, changes))
    lines = [f"{gib(own.total)} of {gib(room)} GiB at the peak of a step: {own}"]
    if "model.recompute" in supports:
        other = "none" if config.model.recompute == "full" else "full"
        lines.append(f"{gib(needed(_recomputing(config, other)).total)} GiB with model.recompute={other}")
    return lines


def smaller(config: FinetuneConfig, supports: Collection[str], ranks: int) -> Iterator[tuple[str, FinetuneConfig]]:
    """Yield changes of the settings that lower the memory, each with those before it: first those that cost least."""
    changed: list[str] = []
    if "model.recompute" in supports:
        for kind in RECOMPUTE[RECOMPUTE.index(config.model.recompute) + 1 :]:
            config, changed = _recomputing(config, kind), [f"model.recompute={kind}"]
            yield changed[0], config
    if ranks > 1 and config.train.parallel == "ddp":
        config = replace(config, train=replace(config.train, parallel="fsdp"))
        changed.append("train.parallel=fsdp")
        yield " ".join(changed), config
    while images_at_once(config, ranks) % 2 == 0:
        config = replace(config, optim=replace(config.optim, accumulate=2 * config.optim.accumulate))
        yield " ".join([*changed, f"optim.accumulate={config.optim.accumulate}"]), config


def _recomputing(config: FinetuneConfig, kind: str) -> FinetuneConfig:
    return replace(config, model=replace(config.model, recompute=kind))


def situation(tuner: Finetuner) -> Situation:
    data, spec = tuner.config.data, tuner.detector.spec
    images = images_at_once(tuner.config, world_size())
    proposals = (data.sample_size // spec.stride) ** 2
    held = f"A rank held {images} images of {data.sample_size} px at once, with {proposals} proposals each"
    supports = find_arch(spec.arch, taps=spec.taps).supports
    return Situation(tuner.step + 1, held, remedies(tuner.config, images, world_size(), supports, tuner.device.type))


def remedies(config: FinetuneConfig, images: int, ranks: int, supports: Collection[str], device: str) -> list[str]:
    """List settings that lower the memory: first those a run may change when it resumes, then the rest.

    Args:
        images: number that a rank holds at once.
        ranks: number of ranks of the job.
        supports: optional settings that the encoder supports.
        device: its type.
    """
    data, optim = config.data, config.optim
    resumed = []
    if "model.recompute" in supports and config.model.recompute != "full":
        resumed.append(f"model.recompute={'selective' if config.model.recompute == 'none' else 'full'}")
    if ranks > 1 and config.train.parallel == "ddp":
        resumed.append("train.parallel=fsdp")
    smaller = []
    if images % 2 == 0:
        smaller.append(f"optim.accumulate={2 * optim.accumulate}")
    if config.train.precision == "fp32" and device == "cuda":
        smaller.append("train.precision=bf16")
    if optim.batch_size > ranks:
        smaller.append(f"optim.batch_size={max(ranks, optim.batch_size // 2 // ranks * ranks)}")
    if data.sample_size >= 64:
        smaller.append(f"data.sample_size={data.sample_size // 32 * 16}")
    if config.detector.stride < 16:
        smaller.append(f"detector.stride={2 * config.detector.stride}")
    new = [*smaller, "weights of a smaller architecture"]
    return [f"{one} (the run resumes with it)" for one in resumed] + [f"{one} (a new run)" for one in new]
