"""Whether a run stores the logits of its losses: ``loss.logit_free=auto``.

Stored, the logits of a micro-batch are matrices ``[rows, K]``. Without storing them, every block of them is computed
again in the backward: less memory, more arithmetic. ``python -m bench loss`` measures both. Rounding differs, so a run
keeps the form in which it began: `recorded`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from muse_fast.config import PretrainConfig
from muse_fast.ops import backends
from muse_fast.runtime.device import available_memory
from muse_fast.runtime.distributed import any_rank, local_world_size, world_size
from muse_fast.runtime.options import AUTO, recorded_settings

NUCLEI_PER_UM2 = 0.008  # in dense tissue
SHARE = 1 / 4  # of the available memory, which stored logits may take; the rest is for activations
# On a CPU, the loss was faster with stored logits at every size in bench/results/2026-11-29-cpu-loss-*.json: 1.15 to
# 5.4 times up to 0.6 GiB of them, but only 1.07 and 1.10 times at 2.4 GiB.
WORTH = 2 * 2**30  # bytes


class Choice(NamedTuple):
    logit_free: bool
    reason: str  # of ``auto``; empty if the settings decide

    def __str__(self) -> str:
        return f"logits {'not ' * self.logit_free}stored (loss.logit_free={AUTO}): {self.reason}"

    def written_into(self, config: PretrainConfig) -> PretrainConfig:
        """Return the settings with the choice in place of ``auto``."""
        return dataclasses.replace(config, loss=dataclasses.replace(config.loss, logit_free=self.logit_free))


def choose(config: PretrainConfig, device: torch.device) -> Choice:
    """Return the form of the loss for a new run; all ranks call it and get the same."""
    asked = config.loss.logit_free
    if isinstance(asked, bool):
        return Choice(asked, "")
    if device.type != "cpu":
        return Choice(True, "on a GPU they would be the largest tensors of a step")
    if config.train.precision == "bf16":
        return Choice(True, "stored, bf16 would round them")
    dtype = {"fp32": torch.float32, "fp64": torch.float64}[config.train.precision]
    if backends.choose("dino_loss", "cpu", None, dtype) != "cpp":
        return Choice(True, "they are worth storing only with the op dino_loss in C++, which cannot run here")
    needed, free = logit_bytes(config), available_memory() / local_world_size()
    sizes = f"about {needed / 2**20:.0f} MiB of the {free / 2**20:.0f} MiB available to a rank"
    if any_rank(needed > SHARE * free, device):
        return Choice(True, f"they would take {sizes}")
    if needed > WORTH:
        return Choice(True, f"they would take {sizes}, and save at most a tenth of the loss's time")
    return Choice(False, f"this is faster on a CPU and takes {sizes}")


def recorded(settings: Mapping[str, Any]) -> Choice:
    """Return the form in which a run began.

    Args:
        settings: nested, as in its checkpoint.
    """
    return Choice(recorded_settings(PretrainConfig, settings)["loss.logit_free"], "as the run began")


def logit_bytes(config: PretrainConfig) -> int:
    """Estimate the bytes of the logits of a micro-batch on one rank, in float32: of the student, their gradient, and of
    the teacher, whose rows are those of the global views. Views are taken to show dense tissue.
    """
    views, optim = config.views, config.optim
    in_globals = views.num_globals * (1 + nuclei(views.global_size, views.global_mpp_min, views.global_mpp_max))
    in_locals = views.num_locals * (1 + nuclei(views.local_size, views.local_mpp_min, views.local_mpp_max))
    rois = optim.batch_size / (optim.accumulate * world_size())
    return round(4 * config.head.prototypes * rois * (3 * in_globals + 2 * in_locals))


def nuclei(side: int, finest: float, coarsest: float) -> float:
    """Return the mean number of nuclei in views of ``side`` pixels at scales uniform between two um/px."""
    return NUCLEI_PER_UM2 * side**2 * (finest**2 + finest * coarsest + coarsest**2) / 3
