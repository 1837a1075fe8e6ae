"""Report of a fine-tuning run that ran out of memory."""

from __future__ import annotations

from muse_fast.detection.config import FinetuneConfig
from muse_fast.detection.finetuner import Finetuner
from muse_fast.training.memory import Situation


def situation(tuner: Finetuner) -> Situation:
    data, optim = tuner.config.data, tuner.config.optim
    proposals = (data.sample_size // tuner.config.detector.stride) ** 2
    held = f"It held {optim.batch_size} images of {data.sample_size} px at once, with {proposals} proposals each"
    return Situation(tuner.step + 1, held, remedies(tuner.config, tuner.device.type))


def remedies(config: FinetuneConfig, device: str) -> list[str]:
    """Settings that need less memory. All of them change the numbers, so they need a new run."""
    data, optim = config.data, config.optim
    smaller = []
    if config.train.precision == "fp32" and device == "cuda":
        smaller.append("train.precision=bf16")
    if optim.batch_size > 1:
        smaller.append(f"optim.batch_size={optim.batch_size // 2}")
    if data.sample_size >= 64:
        smaller.append(f"data.sample_size={data.sample_size // 32 * 16}")
    if config.detector.stride < 16:
        smaller.append(f"detector.stride={2 * config.detector.stride}")
    return [f"{one} (a new run)" for one in [*smaller, "weights of a smaller architecture"]]
