"""The same field gives the same nuclei, however it is stored."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from muse_fast.predict import main as predict_main
from muse_fast.runtime.cli import run
from tests.support import twins
from tests.support.planted import assert_same_places

predict = partial(run, predict_main)


@pytest.mark.parametrize("name", twins.SOUND)
def test_the_same_field_gives_the_same_nuclei(name: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    twin = twins.SOUND[name](tmp_path / "in")
    out = tmp_path / "out"
    assert predict(["--weights", "classical", "--out", str(out), str(twin.path), *twin.words]) == 0
    (table,) = out.glob("*/cells.csv")  # of one slide, though DICOM's has three files
    found = np.loadtxt(table, delimiter=",", skiprows=1, usecols=(0, 1), ndmin=2)
    assert len(twin.xy) > 300
    assert_same_places(found, twin.xy, 1.0)
