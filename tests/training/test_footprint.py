"""Counting what a step keeps in memory, without running it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from muse_fast.runtime import distributed
from muse_fast.runtime.kept import kept
from muse_fast.training.footprint import (
    BACKWARD,
    BLOCK,
    GRADIENTS,
    LOSSES,
    OPTIMISER,
    WEIGHTS,
    Footprint,
    LiveBytes,
    copy_of,
    count,
    dry,
    kind_of,
    refusal,
)

CPU = torch.device("cpu")
KIB = 1024  # of float32 values is a multiple of the block


def test_live_bytes() -> None:
    live = LiveBytes()
    first, second = torch.zeros(KIB), torch.zeros(2, KIB)
    live.hold(first, "a")
    live.hold(second, "b")
    live.hold(second[0], "c")  # shares memory with what is counted
    del first
    live.hold(torch.zeros(1), "d")  # freed at once
    assert live.peak == {"a": 4 * KIB, "b": 8 * KIB}
    live.rename(second, "e")
    assert +live.now == {"e": 8 * KIB} and +live.peak == {"a": 4 * KIB, "e": 8 * KIB}
    late = torch.zeros(KIB // 2)
    live.rename(late, "f")
    assert live.peak["f"] == 0
    live.reset()
    assert +live.now == +live.peak == {"e": 8 * KIB, "f": 2 * KIB}


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict({"encoder": nn.Linear(KIB, KIB, bias=False)})
        self.head = nn.Linear(KIB, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone["encoder"](x).relu())


def test_a_step_of_known_cost() -> None:
    """Of two layers: its peak is where the last gradient is made, from the input and that of the hidden rows."""
    network, rows = Network(), 64
    with dry(CPU) as meter:
        copied = copy_of(network, CPU, torch.float32)
        meter.watch(copied)
        optimizer = torch.optim.Adam(copied.parameters(), fused=True)
        x = torch.zeros(rows, KIB)

        def step() -> None:
            copied(x).sum().backward()
            optimizer.step()

        found = count(meter, optimizer, step).kinds
    weights = 4 * KIB * (KIB + 1)
    assert found[WEIGHTS] == found[GRADIENTS] == weights
    assert found[OPTIMISER] == 2 * weights + 2 * BLOCK  # two moments, and the numbers of steps
    assert found[LOSSES] == 4 * rows * KIB + 2 * BLOCK  # the input, the loss and its gradient
    assert found[BACKWARD] == 4 * rows * KIB
    assert found.keys() == {WEIGHTS, GRADIENTS, OPTIMISER, LOSSES, BACKWARD}
    assert all(type(p) is nn.Parameter and p.grad is None for p in network.parameters())


def test_nothing_is_left_of_a_dry_run() -> None:
    @kept
    def one(device: torch.device) -> torch.Tensor:
        return torch.ones(3, device=device)

    with dry(CPU):
        assert type(one(CPU)) is not torch.Tensor
    assert one(CPU).tolist() == [1, 1, 1]
    assert one(CPU) is one(CPU)
    assert not distributed._is_alone


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("backbone.encoder.encoder.blocks.3.attn.qkv", "attention"),
        ("backbone.encoder.encoder.blocks.3.mlp", "MLP"),
        ("backbone.encoder.encoder.blocks.3.norm2", "norms"),
        ("backbone.encoder.encoder.norm", "norms"),
        ("backbone.encoder.encoder.patch_embed.proj", "patch embedding"),
        ("backbone.encoder.encoder.blocks.3", "encoder, other"),
        ("backbone.decoder.hyper_feats.conv_list.0", "decoder"),
        ("type_head.0", "heads"),
        ("", "heads"),
    ],
)
def test_kinds_of_modules(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_a_refusal_names_the_first_setting_that_fits() -> None:
    own, gib = Footprint({"attention": 9 << 30, "MLP": 3 << 30}), 1 << 30
    changes = [("a=1", Footprint({"MLP": 9 * gib})), ("b=2", Footprint({"MLP": 7 * gib})), ("c=3", Footprint({}))]
    assert refusal(own, 8 * gib, CPU, changes) == (
        "a step needs 12 GiB at its peak (attention 9, MLP 3), and cpu has 8 GiB; it fits with b=2 (7 GiB)"
    )
    assert refusal(own, 6 * gib, CPU, changes[:2]).endswith(
        "; even b=2 needs 7 GiB; train on smaller images or a smaller network"
    )
    assert refusal(own, 6 * gib, CPU, []).endswith("and cpu has 6 GiB; train on smaller images or a smaller network")
