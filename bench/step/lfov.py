"""Forward and backward of a backbone on large images, as in fine-tuning with a large field of view."""

from __future__ import annotations

import torch

from bench.measure import held_and_peak, milliseconds, quantiles
from bench.step.timing import Row, efficiency, skip_on_refusal
from muse_fast.config import RECOMPUTE
from muse_fast.models.archs import find_arch
from muse_fast.models.backbone import Backbone, build_backbone
from muse_fast.models.encoder import check_image_size
from muse_fast.pretraining.flops import view_flops

BATCH = 4
REPEATS = {"cpu": 3, "cuda": 20}


def run(arch: str, side: int, batch: int, precision: str, device: str, matmul: float, peak: float | None) -> list[Row]:
    """Return a row per kind of recomputation: times, images and useful FLOPs per second, memory; or why it was skipped.

    Raises:
        UserError: the network does not support images with this side.
    """
    check_image_size(side, find_arch(arch).sides)
    rows: list[Row] = []
    for recompute in RECOMPUTE if "model.recompute" in find_arch(arch).supports else ("none",):
        rows.append({"version": f"recompute {recompute}", "kind": "fast"})
        with skip_on_refusal(rows[-1]):
            rows[-1] |= measure(arch, side, batch, precision, device, recompute)
            rate = batch / rows[-1]["median_ms"] * 1e3
            rows[-1] |= efficiency(rate, 3 * view_flops(arch, side), matmul, peak)
    return rows


def measure(arch: str, side: int, batch: int, precision: str, device: str, recompute: str) -> Row:
    """Measure the dense map of images and the gradient of all weights, after one warm-up run."""
    torch.manual_seed(0)
    networks: list[Backbone] = []
    images = torch.randn(batch, 3, side, side, device=device)

    def forward_and_backward() -> None:
        networks[0].zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            dense = networks[0].dense_map(images)
        dense.float().square().mean().backward()

    def prepare() -> None:
        backbone = build_backbone(arch, recompute=recompute).train()
        networks.append(backbone.to(device).to(memory_format=torch.channels_last))  # type: ignore[call-overload]
        forward_and_backward()
        networks[0].zero_grad()

    held, peak = held_and_peak(prepare, forward_and_backward, device)
    times = [milliseconds(forward_and_backward, device) for _ in range(REPEATS[device])]
    return quantiles(times) | {"held_bytes": held, "peak_bytes": peak, "step_bytes": peak - held}
