"""Data parallelism by torch's own engines: DDP, or FSDP2, which shards weights and optimiser state over the ranks."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from muse_fast.models.backbone import WithBackbone
from muse_fast.runtime.distributed import world_size

_FORMS_OF_LAYERS = 64  # dtypes, sizes of batches and views, dropped paths, with a branch to add or without

_Network = TypeVar("_Network", bound=WithBackbone)


def is_sharded(engine: str) -> bool:
    """Whether ``engine`` shards weights over the ranks of this job."""
    return engine == "fsdp" and world_size() > 1


def describe_ranks(engine: str, accumulate: int) -> str:
    """Return how the batch of a run is split, for its first lines; empty if it is not."""
    spread = f" over {world_size()} ranks ({engine})" if world_size() > 1 else ""
    return spread + (f" in {accumulate} micro-batches" if accumulate > 1 else "")


def place(network: _Network, device: torch.device, dtype: torch.dtype, engine: str, *, compiled: bool) -> _Network:
    """Move ``network`` to ``device``, in the memory order that convolutions prefer, and let its layers be compiled."""
    network = network.to(device, dtype)
    for module in network.modules():
        # FSDP needs weights in the default memory order; for a 1x1 kernel both orders are the same.
        if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1) and not is_sharded(engine):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
    if compiled:
        # All layers, of student and teacher, are compiled from the same code, and each form of them counts towards the
        # limit beyond which torch would run them as they are.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _FORMS_OF_LAYERS)
        for layer in network.backbone.encoder.layers:
            layer.compile(dynamic=False)  # a network sees few shapes
    return network


def parallelise(
    network: WithBackbone, engine: str, precision: str, *, frozen: Iterable[nn.Parameter] = ()
) -> nn.Module:
    """Return the module to call for a forward whose backward averages gradients over the ranks.

    ``fsdp`` shards ``network`` in place, ``ddp`` wraps it; a single rank uses it as it is.

    Args:
        frozen: weights that get no gradient; ``ddp`` must wrap the network again when others do not.
    """
    if world_size() == 1:
        return network
    if engine == "fsdp":
        return shard(network, precision)
    # For a 1x1 kernel channels-last is the same memory order, but DDP warns because the strides may differ.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    # DDP waits for a gradient of every weight that needs one while it is built.
    without = [weight for weight in frozen if weight.requires_grad]
    for weight in without:
        weight.requires_grad_(False)
    # BatchNorm already gives every rank the same running statistics.
    parallel = DistributedDataParallel(network, broadcast_buffers=False, gradient_as_bucket_view=True)
    for weight in without:
        weight.requires_grad_(True)
    return parallel


def shard(network: _Network, precision: str) -> _Network:
    """Apply FSDP2 to ``network`` in place; it may be a teacher, without gradients."""
    # Under bf16, layers of only matmuls and norms are gathered in bf16. Coordinates must not be cast.
    half = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    whole = MixedPrecisionPolicy(cast_forward_inputs=False)
    backbone = network.backbone
    for layer in backbone.encoder.layers:
        fully_shard(layer, mp_policy=half if precision == "bf16" else whole)
    fully_shard(backbone.decoder, mp_policy=whole)
    register_fsdp_forward_method(backbone.decoder, "nucleus_rows")
    for head in network.heads.values():
        fully_shard(head, mp_policy=whole)
    # By default the root module keeps its gathered weights until the backward. A teacher has no backward, so its
    # gathered weights would never be updated.
    fully_shard(network, mp_policy=whole, reshard_after_forward=True)
    return network


@contextmanager
def gradient_sync(module: nn.Module, enabled: bool) -> Iterator[None]:
    """Set whether backwards in the body exchange gradients; otherwise they add up on each rank until one does."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(enabled)
        yield
    elif isinstance(module, DistributedDataParallel) and not enabled:
        with module.no_sync():
            yield
    else:
        yield
