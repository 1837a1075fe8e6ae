"""Choose the implementation that runs an op.

Backends: ``reference`` is plain PyTorch that stores every intermediate; ``blocked`` is plain PyTorch that processes its
inputs block by block, on any device; ``cpp``, ``triton`` and ``cuda`` are kernels.

Only ``choose`` decides. Its predicate ``why_not`` returns the reason that is logged when the choice is automatic,
raised when a backend was forced, and shown by ``python -m muse_fast.doctor``.

The ``backend=`` argument of an op forces a backend, as does an environment variable for a whole run:
``MUSE_FAST_BACKEND=reference``, or ``MUSE_FAST_BACKEND=match_nuclei=cpp,dino_loss=triton`` for single ops.
``MUSE_FAST_LIBRARY=FILE`` loads another build of the C++ library, for example one with sanitizers.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from pathlib import Path
from typing import NamedTuple

import torch

BACKENDS = ("reference", "blocked", "cpp", "triton", "cuda")
ENVIRONMENT = "MUSE_FAST_BACKEND"
LIBRARY = Path(os.environ.get("MUSE_FAST_LIBRARY", Path(__file__).parents[1] / "_C.so"))
CUDA_CAPABILITY = (8, 0)  # the lowest that CMakeLists.txt builds for

# The fast backends of each op, best first.
HOMES: dict[str, tuple[str, ...]] = {
    "match_nuclei": ("cpp", "cuda"),
    "sample_nuclei": ("cpp", "triton"),
    "projection_stats": ("triton", "blocked"),
    "dino_loss": ("cpp", "triton"),
    "linear_dino_loss": ("triton", "blocked"),
    "augment_views": ("triton",),
    "add_layer_norm": ("triton",),
    "batch_norm": ("triton",),
    "resize_concat": ("triton", "blocked"),
    "gelu": ("triton",),
    "join_heads": ("triton",),
}
SINGLE_PRECISION = {("dino_loss", "cpp")}  # in addition to all Triton kernels

_log = logging.getLogger(__name__)


class Choice(NamedTuple):
    """One row of :func:`table`."""

    op: str
    device: str
    backend: str
    reason: str  # why faster backends were not chosen, or why a forced one cannot run; may be empty


@functools.cache
def library_error() -> str | None:
    """Load the C++ library once, and return why it cannot be used, or None."""
    if not LIBRARY.exists():
        return (
            "the C++ library was not built during installation; "
            "`MUSE_FAST_BUILD=require pip install --no-build-isolation .` shows why"
        )
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"the C++ library cannot be loaded, rebuild it for torch {torch.__version__}: {error}"
    return None


@functools.cache
def cuda_error(op: str) -> str | None:
    """Return why the CUDA implementation of ``op`` in the C++ library cannot be used, or None."""
    if (error := library_error()) is not None:
        return error
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"muse_fast::{op}", "CUDA"):
        return (
            "the C++ library was built without CUDA, because nvcc or a CUDA build of torch was missing; "
            "`MUSE_FAST_BUILD=require pip install -v --no-build-isolation .` shows which"
        )
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    oldest = min(torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count()))
    if oldest < CUDA_CAPABILITY:
        return f"it needs compute capability {CUDA_CAPABILITY[0]}.0, but a device here has {oldest[0]}.{oldest[1]}"
    return None


@functools.cache
def triton_error() -> str | None:
    """Return why the Triton kernels cannot be used, or None."""
    try:
        importlib.import_module("triton")
        importlib.import_module("muse_fast.kernels")
    except ImportError as error:
        return f"{error}; `pip install` triton and muse_fast"
    return None


def why_not(
    op: str, backend: str, device: str, dtype: torch.dtype | None = None, *, forced: bool = False
) -> str | None:
    """Return why ``backend`` cannot run ``op`` on tensors of this device type and dtype, or None if it can.

    Triton's interpreter runs the programs of a kernel one after the other on the CPU, so it is used only when forced.
    """
    if backend == "reference":
        return None
    if backend not in HOMES[op]:
        return f"{op} has no {backend} implementation"
    reason = _why_not_on(op, backend, device, forced)
    if reason is None and dtype == torch.float64 and (backend == "triton" or (op, backend) in SINGLE_PRECISION):
        return "it computes in float32"
    return reason


def _why_not_on(op: str, backend: str, device: str, forced: bool) -> str | None:
    if backend == "blocked":
        return None
    if backend == "cpp":
        return "it takes CPU tensors" if device != "cpu" else library_error()
    if backend == "cuda":
        return "it takes CUDA tensors" if device != "cuda" else cuda_error(op)
    if backend == "triton":
        interpreted = forced and os.environ.get("TRITON_INTERPRET") == "1"
        if device != "cuda" and not interpreted:
            return "it takes CUDA tensors, or TRITON_INTERPRET=1 when forced"
        return triton_error()
    raise AssertionError(f"{op} lists {backend!r}, which has no predicate")


@torch.compiler.assume_constant_result
def choose(op: str, device: str, backend: str | None, dtype: torch.dtype | None = None) -> str:
    """Return the backend that runs ``op`` on tensors of this device type and dtype.

    Raises:
        ValueError: a forced backend is unknown or cannot run; the message says why.
    """
    forced = backend or _from_environment(op)
    if forced is not None:
        if forced not in BACKENDS:
            raise ValueError(f"{op}: unknown backend {forced!r}; expected one of {', '.join(BACKENDS)}")
        reason = why_not(op, forced, device, dtype, forced=True)
        if reason is not None:
            raise ValueError(f"{op}: the forced backend {forced!r} cannot run on {device} tensors: {reason}")
        return forced
    for candidate in HOMES[op]:
        reason = why_not(op, candidate, device, dtype)
        if reason is None:
            return candidate
        _log.debug("%s on %s: not %s, %s", op, device, candidate, reason)
    return "reference"


def table(devices: tuple[str, ...] = ("cpu", "cuda")) -> list[Choice]:
    """Return the choice for every op on every device type, and why faster backends were not chosen."""
    rows = []
    for op, homes in HOMES.items():
        for device in devices:
            try:
                chosen = choose(op, device, None)
            except ValueError as error:  # the environment forces a backend that cannot run
                rows.append(Choice(op, device, "none", str(error)))
                continue
            better = homes[: homes.index(chosen)] if chosen in homes else homes
            reasons = {home: why_not(op, home, device) for home in better}
            passed_over = "; ".join(f"not {home}: {reason}" for home, reason in reasons.items() if reason)
            rows.append(Choice(op, device, chosen, passed_over if homes else "it has no other"))
    return rows


def _from_environment(op: str) -> str | None:
    """Return the backend that ``MUSE_FAST_BACKEND`` forces for ``op``, or None."""
    setting = os.environ.get(ENVIRONMENT)
    if not setting:
        return None
    if "=" not in setting:
        return setting
    forced = dict(item.strip().partition("=")[::2] for item in setting.split(","))
    unknown = sorted(set(forced) - set(HOMES))
    if unknown:
        raise ValueError(f"{ENVIRONMENT}={setting}: unknown op {unknown[0]!r}; expected one of {', '.join(HOMES)}")
    return forced.get(op)
