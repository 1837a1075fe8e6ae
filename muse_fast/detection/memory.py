"""Report of a fine-tuning run that ran out of memory."""

from __future__ import annotations

from collections.abc import Collection

from muse_fast.detection.config import FinetuneConfig
from muse_fast.detection.finetuner import Finetuner
from muse_fast.models.archs import find_arch
from muse_fast.runtime.distributed import world_size
from muse_fast.training.memory import Situation


def situation(tuner: Finetuner) -> Situation:
    data, optim, spec = tuner.config.data, tuner.config.optim, tuner.detector.spec
    images = optim.batch_size // (world_size() * optim.accumulate)
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
