"""``python -m bench ops``: correct versions are timed, wrong ones are rejected, and the report is complete."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import __main__ as command
from bench.machine import Rates, environment
from bench.measure import evaluate, extra_memory, milliseconds, relative_error
from bench.ops import command as ops_command
from bench.ops import timing
from bench.ops import tiny as tiny_ops
from bench.ops.cases import (
    CASES,
    WORK,
    Case,
    Target,
    Work,
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
from muse_fast import ops
from muse_fast.ops import backends, reference

LOSS = Case(
    op="dino_loss",
    name="tiny",
    inputs=loss_inputs(5, 3, 20, 7),
    targets=(Target("cpu", "speedup_literal", 1e9), Target("cpu", "of_copy", 0.0), Target("cuda", "of_copy", 0.0)),
)
TINY = [
    LOSS,
    Case(op="linear_dino_loss", name="tiny", inputs=loss_inputs(5, 3, 20, 7, width=4)),
    Case(op="match_nuclei", name="tiny", inputs=match_inputs(2, 3, 8)),
    Case(op="sample_nuclei", name="tiny", inputs=sample_inputs(3, 64, 2, 5)),
    Case(op="projection_stats", name="tiny", inputs=stats_inputs(2, 3, 5, 4)),
    Case(op="add_layer_norm", name="tiny", inputs=norm_inputs(7, 5)),
    Case(op="gelu", name="tiny", inputs=gelu_inputs(7, 5)),
    Case(op="join_heads", name="tiny", inputs=join_inputs([(2, 3), (1, 2)], 2, 3)),
    Case(op="batch_norm", name="tiny", inputs=batch_norm_inputs(2, 5, 3)),
    Case(op="resize_concat", name="tiny", inputs=resize_inputs(2, (3, 2), (5, 4), 5)),
    Case(op="augment_views", name="tiny", inputs=view_inputs(2, 2, 70, 32)),
]
RATES = Rates(1e10, 1e12)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use small cases, few repeats, and no compiler, which takes seconds per case."""
    monkeypatch.setattr(timing, "CASES", TINY)
    monkeypatch.setattr("bench.measure.REPEATS", 4)
    monkeypatch.setattr(timing, "LENGTHS_FROM_DATA", tuple(backends.HOMES))
    monkeypatch.setattr(ops_command, "machine_rates", lambda device: RATES)


def test_on_cuda_the_gpu_waits_before_the_first_event(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the host has queued the launches when the first event is recorded, and its speed does not count."""
    did: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            did.append("event")

        def synchronize(self) -> None:
            did.append("wait of the host")

        def elapsed_time(self, end: Event) -> float:
            return 7.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: did.append("wait of the GPU"), raising=False)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: torch.zeros(1))
    assert milliseconds(lambda: did.append("run"), "cuda") == 7.0
    assert did == ["wait of the GPU", "event", "run", "event", "wait of the host"]


def test_json_has_numbers_and_environment(tmp_path: Path) -> None:
    out = tmp_path / "ops.json"
    assert command.main(["ops", "--device", "cpu", "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["environment"].keys() >= {"torch", "device", "commit", "threads", "time"}
    assert report["rates"] == {"copy": 1e10, "matmul": 1e12}
    timed = [row for row in report["results"] if "skipped" not in row]
    assert {(row["op"], row["kind"]) for row in timed} >= {(case.op, k) for case in TINY for k in ("literal", "eager")}
    for row in timed:
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["repeats"] == 4
        assert row["relative_error"] <= timing.LEVELS.get(row["op"], 1e-5)
        assert row["extra_bytes"] >= 0
        assert row["gb_per_s"] == pytest.approx(row["least_bytes"] / row["median_ms"] / 1e6)
        assert row["of_copy"] == pytest.approx(row["gb_per_s"] / 10)
        assert row["of_matmul"] == pytest.approx(row["gflop_per_s"] / 1000)
        assert row["inputs"]


def test_every_op_has_cases_for_both_devices() -> None:
    for device in ("cpu", "cuda"):
        assert {case.op for case in CASES if device in case.devices} == set(backends.HOMES)
    assert len({(case.op, case.name) for case in CASES}) == len(CASES)


def test_skipped_versions_have_a_reason(capsys: pytest.CaptureFixture[str]) -> None:
    rows = timing.run_case(LOSS, "cpu", RATES)
    skipped = {row["version"]: row["skipped"] for row in rows if "skipped" in row}
    assert skipped.keys() == {"triton", "compile"} | ({"cpp"} if backends.library_error() else set())
    assert all(skipped.values())
    assert command.main(["ops", "--device", "cpu", "--only", "dino_loss"]) == 0
    printed = capsys.readouterr().out
    assert "triton skipped: it takes CUDA tensors" in printed


def test_ratios_are_to_the_fastest_of_a_kind() -> None:
    rows = [
        {"kind": "literal", "median_ms": 12.0, "extra_bytes": 600},
        {"kind": "eager", "median_ms": 6.0, "extra_bytes": 300},
        {"kind": "eager", "median_ms": 4.0, "extra_bytes": 500},
        {"kind": "compile", "skipped": "no compiler"},
        {"kind": "fast", "median_ms": 2.0, "extra_bytes": 10},
        {"kind": "fast", "median_ms": 2.0, "extra_bytes": 0},
    ]
    timing.add_ratios(rows)
    fast = rows[4]
    assert (fast["speedup_literal"], fast["speedup_eager"]) == (6.0, 2.0)
    assert (fast["memory_literal"], fast["memory_eager"]) == (60.0, 50.0)
    assert rows[5]["memory_eager"] == 500.0  # as if it used one byte
    assert rows[1]["speedup_eager"] == pytest.approx(2 / 3)
    assert "speedup_compile" not in fast
    assert rows[3] == {"kind": "compile", "skipped": "no compiler"}


def test_targets_apply_to_the_default_backend(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    versions = [
        timing.Version("literal", "literal", timing.LITERAL["dino_loss"]),
        timing.Version("reference", "fast", reference.dino_loss),
        timing.Version("other", "fast", reference.dino_loss),
    ]
    monkeypatch.setattr(timing, "versions_of", lambda op, device: versions)
    monkeypatch.setenv(backends.ENVIRONMENT, "reference")
    rows = timing.run_case(LOSS, "cpu", RATES)
    assert [row["version"] for row in rows if row.get("targets")] == ["reference"]
    missed, met = rows[1]["targets"]
    assert missed == {
        "figure": "speedup_literal",
        "at_least": 1e9,
        "reached": rows[1]["speedup_literal"],
        "met": False,
    }
    assert met["figure"] == "of_copy" and met["met"] is True
    assert command.main(["ops", "--device", "cpu", "--only", "dino_loss"]) == 0
    assert "faster than literal: missed" in capsys.readouterr().out


def wrong_value(*arguments: Any) -> Tensor:
    return reference.dino_loss(*arguments) * 1.01


def wrong_gradient(student: Tensor, *rest: Any) -> Tensor:
    """Return the right value with a gradient that is 1 % too large."""
    scaled = student * 1.01
    return reference.dino_loss(scaled + (student - scaled).detach(), *rest)


def not_a_number(*arguments: Any) -> Tensor:
    return reference.dino_loss(*arguments) * float("nan")


def another_shape(*arguments: Any) -> Tensor:
    return reference.dino_loss(*arguments).unsqueeze(0)


def broken(*arguments: Any) -> Tensor:
    raise RuntimeError("out of order")


@pytest.mark.parametrize("wrong", [wrong_value, wrong_gradient, not_a_number, another_shape, broken])
def test_a_wrong_version_is_not_timed(
    wrong: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(timing.EAGER, "dino_loss", {"": wrong})
    out = tmp_path / "ops.json"
    assert command.main(["ops", "--device", "cpu", "--only", "dino_loss", "--json", str(out)]) == 1
    assert "eager wrong: " in capsys.readouterr().out
    row = next(row for row in json.loads(out.read_text())["results"] if row["version"] == "eager")
    assert row["wrong"]
    assert "median_ms" not in row


@pytest.mark.parametrize("dtype", timing.TOLERANCE)
def test_every_tolerance_rejects_an_error_of_one_per_cent(dtype: torch.dtype) -> None:
    exact = torch.randn(1000, dtype=torch.float64)
    assert relative_error([(exact.to(dtype) * 1.01).to(dtype)], [exact]) > timing.TOLERANCE[dtype]
    assert relative_error([exact.to(dtype)], [exact]) < timing.TOLERANCE[dtype]


def test_one_wrong_integer_is_an_error() -> None:
    rows = torch.arange(1000)
    other = rows.clone()
    other[-1] += 1
    assert relative_error([rows], [rows]) == 0
    assert relative_error([other], [rows]) == float("inf")


def test_forms_that_do_not_compile_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "LENGTHS_FROM_DATA", ())
    monkeypatch.setattr(torch, "compile", lambda call, **_: broken)
    rows = timing.run_case(LOSS, "cpu", RATES)
    compiled = [row for row in rows if row["kind"] == "compile"]
    assert len(compiled) == 2
    assert {row["skipped"] for row in compiled} == {"RuntimeError: out of order"}


@pytest.mark.heavy  # two builds
def test_compiled_forms_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "LENGTHS_FROM_DATA", ())
    rows = timing.run_case(LOSS, "cpu", RATES)
    compiled = {row["version"]: row for row in rows if row["kind"] == "compile"}
    assert compiled.keys() == {"compile gather", "compile all pairs"}
    for row in compiled.values():
        assert "skipped" in row or row["median_ms"] > 0  # without a C++ compiler nothing is timed


def test_extra_memory_is_the_peak_above_the_memory_afterwards() -> None:
    x = torch.zeros(1000, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        first = torch.empty(3_000_000, dtype=torch.uint8)
        second = torch.empty(2_000_000, dtype=torch.uint8)
        del first
        third = torch.empty(500_000, dtype=torch.uint8)
        del second, third
        return 2 * x

    evaluate(run, (x,))  # caches the output gradient
    held = 4000 + 4000  # the result, and the gradient of x; neither exists at the peak
    assert extra_memory(run, (x,), "cpu") == 5_000_000 - held


def test_extra_memory_counts_allocations_of_the_library() -> None:
    """It allocates two int64 results of a known length through torch's allocator."""
    if (reason := backends.library_error()) is not None:
        pytest.skip(reason)
    index, offsets = torch.arange(1000, dtype=torch.int32).repeat(2), torch.tensor([0, 1000, 2000], dtype=torch.int32)
    results = []

    def run(*arguments: Any) -> Tensor:
        results.extend(torch.ops.muse_fast.match_nuclei(*arguments))
        results.clear()
        return torch.empty(0)

    assert extra_memory(run, (index, offsets, 1, 2), "cpu") >= 2 * 8 * 2000


WORK_BY_HAND = {
    # 10 rows in 4 images, 3 pairs
    "match_nuclei": (
        [torch.zeros(3)] * 2,
        (torch.zeros(10), torch.zeros(5), 2, 2),
        Work(4 * (10 + 5) + 3 * (8 + 8), 0),
    ),
    # 1 point in levels of 2 channels, 4 x 4 and 2 x 2: 4 pixels of each
    "sample_nuclei": (
        [],
        ([torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 2, 2)], torch.zeros(1, 2), torch.zeros(1), 16),
        Work((16 + 4 * 16 + 4 * 4) + (16 + 4 * 4 + 4 * (32 + 8)), 2 * 2 * 16),
    ),
    # 8 values, 3 outputs: 6 weights and 3 + 3 statistics
    "projection_stats": (
        [],
        (torch.zeros(1, 2, 2, 2), torch.zeros(3, 2)),
        Work(4 * (3 * (8 + 6) + 2 * 6), 3 * 2 * 4 * 2 * 3),
    ),
    # 4 student rows, 2 teacher rows, 8 prototypes, 6 pairs
    "dino_loss": (
        [torch.zeros(6)],
        (torch.zeros(4, 8), torch.zeros(2, 8), torch.zeros(8)),
        Work(2 * (4 * 8 * 6 + 4 * 8 + 20 * 6) + 4 * 4 * 8, 8 * (5 * 6 + 3 * 6 + 2 * 4 + 4 * 6)),
    ),
    # the same with width 3
    "linear_dino_loss": (
        [torch.zeros(6)],
        (torch.zeros(4, 3), torch.zeros(8, 3), torch.zeros(2, 3), torch.zeros(8, 3), torch.zeros(8)),
        Work(2 * (4 * 3 * (4 + 2 + 8 + 8) + 4 * 8 + 20 * 6) + 4 * 3 * (4 + 8), 2 * 8 * 3 * (4 + 2 + 4 + 4)),
    ),
}


@pytest.mark.parametrize("op", WORK_BY_HAND)
def test_minimum_work_equals_hand_counts(op: str) -> None:
    results, arguments, expected = WORK_BY_HAND[op]
    assert WORK[op](results, *arguments) == expected


def test_pairs_are_spread_as_in_a_batch() -> None:
    """With 1.5 pairs per student row, every row has one teacher and half of them a second."""
    *_, teacher_rows, student_rows, _, _ = loss_inputs(100, 50, 8, 150)(torch.Generator(), torch.float32)
    assert torch.bincount(student_rows).unique().tolist() == [1, 2]
    assert torch.bincount(teacher_rows).tolist() == [3] * 50


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--only", "blur"], "invalid choice: 'blur'"), (["--case", "huge"], "no case of any op on cpu has 'huge'")],
)
def test_an_unknown_op_or_case_is_an_error(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.main(["ops", "--device", "cpu", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("case", TINY, ids=[case.op for case in TINY])
def test_inputs_of_a_case_are_those_of_its_op(case: Case) -> None:
    """Backends that run only on a GPU get them too."""
    signature = inspect.signature(getattr(ops, case.op))
    signature.bind(*timing.arguments_of(case, "cpu"), backend="triton")


def test_cases_with_targets_come_first_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a machine may be lent for less time than all of them take."""
    monkeypatch.setattr(timing, "CASES", CASES)
    with_targets = [any(target.device == "cuda" for target in case.targets) for case in timing.selected("cuda")]
    assert with_targets == sorted(with_targets, reverse=True) and True in with_targets and False in with_targets
    assert timing.selected("cpu") == [case for case in CASES if "cpu" in case.devices]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["ops", "--device", "cuda"])
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("stages", [["test", "everything"], ["sanitise"]])
def test_gpu_script_rejects_an_unknown_stage_before_it_starts(stages: list[str], tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "bench" / "gpu.sh"
    variables = os.environ | {"OUT": str(tmp_path / "out")}
    finished = subprocess.run([script, *stages], env=variables, capture_output=True, text=True)
    assert finished.returncode == 2
    assert f"unknown stage '{stages[-1]}'" in finished.stderr
    assert not (tmp_path / "out").exists()


def test_gpu_script_skips_stages_beyond_the_budget(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "bench" / "gpu.sh"
    variables = os.environ | {"OUT": str(tmp_path), "DEVICE": "cpu", "PYTHON": sys.executable, "BUDGET": "10"}
    finished = subprocess.run([script, "ops", "data"], env=variables, capture_output=True, text=True)
    assert finished.returncode == 1 and finished.stdout.count("less than 20 seconds of the budget are left") == 2
    stages = json.loads((tmp_path / "stages.json").read_text())["stages"]
    assert [(row["stage"], row["exit_code"]) for row in stages] == [("ops", 1), ("data", 1)]


def test_gpu_script_says_what_is_missing_and_archives_after_every_stage(tmp_path: Path) -> None:
    """An archive has what was measured before a stage that fails, here as a package cannot be imported."""
    script = Path(__file__).parents[2] / "bench" / "gpu.sh"
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "simplejpeg.py").write_text("raise OSError('libjpeg is missing')")
    out = tmp_path / "out"
    variables = os.environ | {"OUT": str(out), "DEVICE": "cpu", "PYTHON": sys.executable}
    variables |= {"PYTHONPATH": str(tmp_path / "broken"), "WHEELS": str(tmp_path / "no wheels")}
    finished = subprocess.run([script, "preflight", "build"], env=variables, capture_output=True, text=True)
    assert finished.returncode == 1 and "simplejpeg       MISSING (OSError: libjpeg is missing)" in finished.stdout
    with tarfile.open(f"{out}.tar.gz") as archive:
        assert {"stages.json", "preflight.log", "build.log"} <= set(archive.getnames())
        stages = json.loads(archive.extractfile("stages.json").read())["stages"]  # type: ignore[union-attr]
    assert [row["stage"] for row in stages] == ["preflight", "build"] and all(row["exit_code"] for row in stages)


def test_commit_comes_from_the_environment_without_git_history(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMMIT", "abc")
    assert environment("cpu")["commit"] == "abc"


def test_tiny_runs_every_fast_backend_on_this_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["tiny", "--device", "cpu"])
    tiny_ops.main()
    ran = {tuple(line.split()[i] for i in (0, -1)) for line in capsys.readouterr().out.splitlines()}
    assert ran == {(op, b) for op, homes in backends.HOMES.items() for b in homes if not backends.why_not(op, b, "cpu")}
