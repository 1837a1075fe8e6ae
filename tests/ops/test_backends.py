"""The choice of a backend: automatic, or forced by argument or environment, with a reason if it cannot run."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from muse_fast.ops import backends


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(backends.ENVIRONMENT, raising=False)


def test_falls_back_to_the_reference_and_logs_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backends, "library_error", lambda: "it was not built")
    with caplog.at_level(logging.DEBUG, logger="muse_fast.ops.backends"):
        assert backends.choose("match_nuclei", "cpu", None) == "reference"
    assert caplog.messages == [
        "match_nuclei on cpu: not cpp, it was not built",
        "match_nuclei on cpu: not cuda, it takes CUDA tensors",
    ]


def test_chooses_the_fast_backend_if_it_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "library_error", lambda: None)
    monkeypatch.setattr(backends, "cuda_error", lambda op: None)
    assert backends.choose("match_nuclei", "cpu", None) == "cpp"
    assert backends.choose("match_nuclei", "cuda", None) == "cuda"
    monkeypatch.setattr(backends, "cuda_error", lambda op: "it was built without CUDA")
    assert backends.choose("match_nuclei", "cuda", None) == "reference"


def test_a_forced_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "library_error", lambda: "it was not built")
    with pytest.raises(ValueError, match="forced backend 'cpp' cannot run on cpu tensors: it was not built"):
        backends.choose("match_nuclei", "cpu", "cpp")
    with pytest.raises(ValueError, match="it takes CPU tensors"):
        backends.choose("match_nuclei", "cuda", "cpp")
    with pytest.raises(
        ValueError, match="unknown backend 'gpu'; expected one of reference, blocked, cpp, triton, cuda"
    ):
        backends.choose("match_nuclei", "cuda", "gpu")
    monkeypatch.setattr(backends, "cuda_error", lambda op: "it was built without CUDA")
    with pytest.raises(ValueError, match="forced backend 'cuda' cannot run on cuda tensors: it was built without CUDA"):
        backends.choose("match_nuclei", "cuda", "cuda")


def test_triton_needs_cuda_and_rejects_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "triton_error", lambda: None)
    assert backends.choose("dino_loss", "cuda", None, torch.bfloat16) == "triton"
    assert backends.choose("dino_loss", "cuda", None, torch.float64) == "reference"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backends.choose("projection_stats", "cpu", None) == "blocked"  # the interpreter runs only when forced
    assert backends.choose("dino_loss", "cpu", "triton") == "triton"
    with pytest.raises(ValueError, match="it computes in float32"):
        backends.choose("dino_loss", "cpu", "triton", torch.float64)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="it takes CUDA tensors"):
        backends.choose("dino_loss", "cpu", "triton")


def test_dino_loss_in_float64_runs_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "library_error", lambda: None)
    assert backends.choose("dino_loss", "cpu", None, torch.float32) == "cpp"
    assert backends.choose("dino_loss", "cpu", None, torch.float64) == "reference"
    with pytest.raises(ValueError, match="it computes in float32"):
        backends.choose("dino_loss", "cpu", "cpp", torch.float64)


def test_environment_forces_all_ops_or_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "library_error", lambda: None)
    monkeypatch.setenv(backends.ENVIRONMENT, "reference")
    assert backends.choose("match_nuclei", "cpu", None) == "reference"
    assert backends.choose("match_nuclei", "cpu", "cpp") == "cpp"  # the argument takes precedence
    monkeypatch.setenv(backends.ENVIRONMENT, "dino_loss=triton, match_nuclei=reference")
    assert backends.choose("match_nuclei", "cpu", None) == "reference"
    assert backends.choose("sample_nuclei", "cpu", None) == "cpp"
    monkeypatch.setenv(backends.ENVIRONMENT, "match_nuklei=cpp")
    with pytest.raises(ValueError, match="unknown op 'match_nuklei'"):
        backends.choose("match_nuclei", "cpu", None)


def test_table_has_every_op_on_every_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "library_error", lambda: "it was not built")
    table = backends.table()
    assert {(row.op, row.device) for row in table} == {(op, d) for op in backends.HOMES for d in ("cpu", "cuda")}
    row = next(row for row in table if (row.op, row.device) == ("match_nuclei", "cpu"))
    assert (row.backend, row.reason) == ("reference", "not cpp: it was not built; not cuda: it takes CUDA tensors")


def test_table_has_no_reasons_against_slower_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "library_error", lambda: None)
    row = next(row for row in backends.table() if (row.op, row.device) == ("match_nuclei", "cpu"))
    assert (row.backend, row.reason) == ("cpp", "")


def test_table_shows_a_forced_backend_that_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backends.ENVIRONMENT, "sample_nuclei=cuda")
    rows = {(row.op, row.device): row for row in backends.table()}
    assert rows["sample_nuclei", "cuda"].backend == "none"
    assert "has no cuda implementation" in rows["sample_nuclei", "cuda"].reason
    assert rows["linear_dino_loss", "cpu"].backend == "blocked"


def test_missing_library_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(backends, "LIBRARY", tmp_path / "_C.so")
    assert "MUSE_FAST_BUILD=require" in str(backends.library_error.__wrapped__())


def test_broken_library_says_to_rebuild(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "_C.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(backends, "LIBRARY", broken)
    assert "rebuild it for torch" in str(backends.library_error.__wrapped__())


@pytest.mark.parametrize(
    ("built", "capabilities", "reason"),
    [
        (False, [(9, 0)], "built without CUDA, because nvcc"),
        (True, [], "torch finds no CUDA device"),
        (True, [(9, 0), (7, 5)], "needs compute capability 8.0, but a device here has 7.5"),
        (True, [(8, 0), (9, 0)], None),
    ],
)
def test_why_not_cuda(
    built: bool, capabilities: list[tuple[int, int]], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "library_error", lambda: None)
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device])
    found = backends.cuda_error.__wrapped__("match_nuclei")
    assert found is None if reason is None else reason in str(found)
