"""``python -m bench plan``: what a step costs on a GPU, counted without one, and that it has not become more."""

from __future__ import annotations

import argparse
import json
from typing import Any

import pytest
import torch

from bench import __main__ as bench
from bench.plan import command, standin
from bench.plan.counts import CHUNK, multi_tensor_launches
from muse_fast.errors import UserError

KNOWN = torch.__version__.startswith(f"{standin.TORCH}.") and torch.version.cuda is not None
needs_torch = pytest.mark.skipif(not KNOWN, reason=f"the stand-in is for torch {standin.TORCH} with CUDA")


@pytest.fixture(scope="module")
def counted() -> dict[str, Any]:
    return json.loads(standin.run("tests.support.planned", []))


@pytest.mark.slow
@needs_torch
def test_a_step_never_waits_and_costs_what_is_committed(counted: dict[str, Any]) -> None:
    """If a change makes a step cheaper, or dearer on purpose: ``python -m bench plan ... --commit``."""
    committed = command.committed()
    for step in counted["steps"]:
        assert command.differences(step, committed[command.key(step)]) == []
    pretraining = counted["steps"][0]
    assert pretraining["replayed"] > 2 * pretraining["launches"]  # those of the host
    for step in counted["steps"]:  # in fine-tuning, the thread that matches proposals on the host waits for them
        assert step["waits_at"] == step["pageable_at"] == {}


@pytest.mark.heavy
@needs_torch
@pytest.mark.parametrize(("size", "batch"), [(224, 64), (512, 16)])
@pytest.mark.parametrize("arch", ["vit_small", "vit_base"])
def test_a_step_of_the_paper_costs_what_is_committed(arch: str, size: int, batch: int) -> None:
    options = argparse.Namespace(arch=arch, size=size, batch=batch, settings=[])
    (step,) = command.count([command.job("ours", options)])
    assert command.differences(step, command.committed()[command.key(step)]) == []


@pytest.mark.slow
@needs_torch
def test_lines_name_where_the_host_launches(counted: dict[str, Any]) -> None:
    """The backward of a line counts there, though torch runs it on a thread that knows no line."""
    found = counted["cases"]["traced"]["launched_at"]
    line = found[0][0]
    assert line.startswith("tests/support/planned.py:")
    assert found == [[line, "sin f32"], [f"backward of {line}", "cos f32"], [f"backward of {line}", "mul f32"]]


@pytest.mark.slow
@needs_torch
def test_the_flops_are_those_of_the_closed_form(counted: dict[str, Any]) -> None:
    """What is executed beyond them: logits computed again by the loss without stored ones, and both statistics."""
    step = counted["steps"][0]
    assert 1.0 < step["flops"] / step["useful_flops"] < 1.15


# For which torch raises under `torch.use_deterministic_algorithms`, by its documentation: what a network might use.
RANDOM = (
    "upsample_bilinear2d_backward", "upsample_bicubic2d_backward", "adaptive_avg_pool2d_backward",
    "adaptive_max_pool2d_backward", "reflection_pad2d_backward", "grid_sampler_2d_backward",
    "cudnn_grid_sampler_backward", "nll_loss_forward", "histc", "cumsum f32", "cumsum bf16", "put_", "median",
)  # fmt: skip


@pytest.mark.slow
@needs_torch
def test_a_step_can_be_deterministic(counted: dict[str, Any]) -> None:
    """No operation of pretraining lacks such a form, and torch takes flash attention where it would take cuDNN's."""
    names = counted["steps"][0]["operations"]
    assert [name for name in names if name.startswith(RANDOM)] == []
    attention = {name: counted["cases"][name]["operations"] for name in ("attention", "deterministic_attention")}
    used = {how: sorted({x.split()[0] for x in names if "attention" in x}) for how, names in attention.items()}
    assert used == {
        "attention": ["_scaled_dot_product_cudnn_attention", "_scaled_dot_product_cudnn_attention_backward"],
        "deterministic_attention": [
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_flash_attention_backward",
        ],
    }


@pytest.mark.slow
@needs_torch
def test_operations_of_known_cost(counted: dict[str, Any]) -> None:
    cases = counted["cases"]
    product = cases["product"]
    assert product["launches"] == 1
    assert product["flops"] == 2 * 1024 * 512 * 256
    assert product["bytes"] == 4 * (1024 * 512 + 512 * 256 + 1024 * 256)
    assert cases["broadcast"]["bytes"] == 4 * (64 * 32 + 32 + 64 * 32)
    assert cases["freed"]["peak"] == 3 << 20
    assert cases["freed"]["live"] == 0


@pytest.mark.slow
@needs_torch
@pytest.mark.parametrize(
    ("name", "waits", "pageable"),
    [
        ("pinned", 0, 0),
        ("pinned_but_blocking", 1, 0),
        ("pageable", 1, 1),
        ("read", 1, 0),
        ("read_all", 2, 1),  # a list is copied to the device, and its values are read back
        ("masked", 1, 0),
        ("copied_ahead", 0, 0),
    ],
)
def test_waits_and_copies_are_found(counted: dict[str, Any], name: str, waits: int, pageable: int) -> None:
    found = counted["cases"][name]
    assert (len(found["waits"]), found["pageable"]) == (waits, pageable)
    assert all("tests/support/planned.py:" in wait for wait in found["waits"])


@pytest.mark.slow
@needs_torch
def test_graphs_are_replayed_unless_what_they_record_waits(counted: dict[str, Any]) -> None:
    replayed, refused = counted["cases"]["replayed"], counted["cases"]["wait_in_a_graph"]
    assert replayed["graphs"] == 2 * 3  # forward and backward
    assert replayed["replayed"] == 3 * 4  # addmm; mm, sum, copies of both gradients in one launch
    assert (refused["graphs"], refused["replayed"]) == (0, 0)


@pytest.mark.parametrize(
    ("sizes", "lists", "launches"),
    [
        ([], 2, 0),
        ([1], 2, 1),
        ([1] * 64, 2, 1),
        ([1] * 65, 2, 2),
        ([1] * 36, 4, 1),
        ([1] * 37, 4, 2),
        ([320 * CHUNK], 1, 1),
        ([320 * CHUNK + 1], 1, 2),
        ([160 * CHUNK] * 3, 3, 2),
    ],
)
def test_multi_tensor_launches(sizes: list[int], lists: int, launches: int) -> None:
    """By torch's limits: 320 chunks of 65,536 values; 110, 64, 48 or 36 tensors in one to four lists."""
    assert multi_tensor_launches(sizes, lists) == launches


def test_a_change_of_one_percent_is_reported() -> None:
    before = dict.fromkeys(command.FIGURES, 1000.0) | {"waits": 0, "pageable_copies": 0}
    same = before | {"engine": "ours", "launches": 1009, "bytes": 991}
    assert command.differences(same, before) == []
    worse = same | {"launches": 1011, "waits": 1}
    assert command.differences(worse, before) == [
        "ours: launches 1,011, committed 1,000 (+1.1%)",
        "ours: waits 1, committed 0",
    ]
    assert command.differences(worse, None) == []


def test_another_torch_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch, "__version__", "2.12.0+cu130")
    with pytest.raises(UserError, match=r"torch 2\.11 with CUDA.* this is 2\.12\.0"):
        standin.check_torch()
    with pytest.raises(SystemExit):
        bench.main(["plan"])
    assert "2.12.0" in capsys.readouterr().err


def test_a_size_without_locals_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["plan", "--size", "300"])
    assert "--size 300: global views have 224 or 512 px" in capsys.readouterr().err
