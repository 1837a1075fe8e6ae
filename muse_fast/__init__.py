"""Pretrain, fine-tune, evaluate and apply MUSE models of nuclei in histopathology.

The public API is ``from muse_fast import embed_slide, load_backbone, load_detector, ops``. Each is imported on first
use, so that ``import muse_fast`` does not import torch.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from muse_fast.version import __version__

if TYPE_CHECKING:
    from muse_fast import ops as ops
    from muse_fast.detection.detector import load_detector as load_detector
    from muse_fast.embedding.api import embed_slide as embed_slide
    from muse_fast.models.weights import load_backbone as load_backbone

# OpenMP reads this once, when torch is imported. By default its threads spin while they wait for each other: on cores
# that other work shares, they burn the time that the last thread needs, and the rate falls to a tenth and less.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

__all__ = ["__version__", "embed_slide", "load_backbone", "load_detector", "ops"]


def __getattr__(name: str) -> Any:
    if name == "load_backbone":
        return importlib.import_module("muse_fast.models.weights").load_backbone
    if name == "embed_slide":
        return importlib.import_module("muse_fast.embedding.api").embed_slide
    if name == "load_detector":
        return importlib.import_module("muse_fast.detection.detector").load_detector
    if name == "ops":
        return importlib.import_module("muse_fast.ops")
    raise AttributeError(f"module 'muse_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
