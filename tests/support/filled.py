"""Networks in which every tensor differs from its initial value, so that a forgotten tensor is noticed."""

from __future__ import annotations

import torch
from torch import nn


def open_branches(network: nn.Module) -> nn.Module:
    """Give every norm a gain of 1, so that residual branches that start at zero contribute; return the network."""
    for name, parameter in network.named_parameters():
        if parameter.ndim == 1 and name.endswith("bn3.weight"):
            nn.init.ones_(parameter)
    return network


def fill(network: nn.Module) -> nn.Module:
    """Fill every tensor of ``network``, which may be on the meta device; return it on the CPU, in evaluation mode."""
    network = network.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    for name, tensor in network.state_dict().items():
        if name.endswith("num_batches_tracked"):
            tensor.fill_(12)
        elif tensor.ndim == 1:
            tensor.uniform_(0.5, 1.0, generator=generator)
        else:
            tensor.uniform_(-0.05, 0.05, generator=generator)
    return network
