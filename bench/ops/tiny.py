"""Run every fast backend once, forward and backward, on the smallest inputs, for use with a sanitizer.

    compute-sanitizer --tool memcheck python -m bench.ops.tiny --device cuda

Sizes are odd, so that the last block of every kernel is partial and an overrun shows.
"""

from __future__ import annotations

import argparse

import torch

from bench.measure import evaluate
from bench.ops.cases import (
    Case,
    batch_norm_inputs,
    gelu_inputs,
    join_inputs,
    loss_inputs,
    match_inputs,
    norm_inputs,
    resize_inputs,
    sample_inputs,
    stats_inputs,
    view_inputs,
)
from bench.ops.timing import arguments_of, versions_of

CASES = [
    Case(op="match_nuclei", name="2 ROIs", inputs=match_inputs(2, 3, 5)),
    Case(op="match_nuclei", name="more rows than threads", inputs=match_inputs(1, 2, 300)),
    Case(op="match_nuclei", name="no nuclei", inputs=match_inputs(2, 3, 0)),
    Case(op="sample_nuclei", name="2 images", inputs=sample_inputs(2, 96, 19, 7)),
    Case(op="sample_nuclei", name="no nuclei", inputs=sample_inputs(2, 96, 19, 0)),
    Case(op="projection_stats", name="2 images", inputs=stats_inputs(2, 35, 9, 19)),
    Case(op="add_layer_norm", name="67 rows", inputs=norm_inputs(67, 35)),
    Case(op="gelu", name="67 rows", inputs=gelu_inputs(67, 35)),
    Case(op="join_heads", name="2 resolutions", inputs=join_inputs([(2, 9), (3, 5)], 3, 5)),
    Case(op="batch_norm", name="2 images", inputs=batch_norm_inputs(2, 35, 9)),
    Case(op="resize_concat", name="2 images", inputs=resize_inputs(2, (5, 3), (35, 19), 9)),
    Case(op="augment_views", name="2 ROIs", inputs=view_inputs(2, 3, 77, 37)),
    Case(op="dino_loss", name="7 rows", inputs=loss_inputs(7, 5, 2501, 11)),
    Case(op="linear_dino_loss", name="7 rows", inputs=loss_inputs(7, 5, 261, 11, width=32)),
]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.ops.tiny", description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    device = parser.parse_args().device
    for case in CASES:
        for version in versions_of(case.op, device):
            if version.kind == "fast":
                print(case.op, case.name, version.name)
                evaluate(version.call, arguments_of(case, device))
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
