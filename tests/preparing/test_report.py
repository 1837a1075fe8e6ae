"""The report of ``prepare wsi:``."""

from __future__ import annotations

import os
from pathlib import Path

from muse_fast.preparing.report import Row, write_report


def test_names_in_reasons_may_have_any_bytes(tmp_path: Path) -> None:
    file = tmp_path / os.fsdecode(b"L\xe4sion.svs")
    write_report(tmp_path, [Row(file, file.stem, "repeated", f"the same slide as {file}")], "title")
    assert rb"the same slide as" in (tmp_path / "report.csv").read_bytes()
    assert rb"L\xe4sion.svs" in (tmp_path / "report.csv").read_bytes()
    assert rb"L\xe4sion.svs" in (tmp_path / "report.html").read_bytes()
