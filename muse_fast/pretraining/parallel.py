"""Data parallelism by torch's own engines: DDP, or FSDP2, which shards weights and optimiser state over the ranks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from muse_fast.pretraining.distill import Network
from muse_fast.runtime.distributed import world_size


def parallelise(network: Network, engine: str, precision: str) -> nn.Module:
    """Return the module to call for a forward whose backward averages gradients over the ranks.

    ``fsdp`` shards ``network`` in place, ``ddp`` wraps it, and must wrap it again when ``train_encoder`` changes; a
    single rank uses it as it is.
    """
    if world_size() == 1:
        return network
    if engine == "fsdp":
        return shard(network, precision)
    # For a 1x1 kernel channels-last is the same memory order, but DDP warns because the strides may differ.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    # DDP waits for a gradient of every weight that needs one while it is built.
    encoder = network.backbone.encoder
    frozen = [] if network.train_encoder else [weight for weight in encoder.parameters() if weight.requires_grad]
    for weight in frozen:
        weight.requires_grad_(False)
    # BatchNorm already gives every rank the same running statistics.
    parallel = DistributedDataParallel(network, broadcast_buffers=False, gradient_as_bucket_view=True)
    for weight in frozen:
        weight.requires_grad_(True)
    return parallel


def shard(network: Network, precision: str) -> Network:
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
