"""D6: damaged and odd slides and images."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from muse_fast import predict
from muse_fast.runtime import cli
from tests.support.twins import ODD, Twin, damaged_at_random
from torture.harness import Outcome, Row, Scale, Tally

QUICK = (
    "white", "black_image", "dicom", "damaged_overview", "all levels damaged", "some tiles damaged", "12 bits",
    "patch of 38 um", "table of other slides", "linked folder", "broken link",
)  # fmt: skip
_SAYS = ("unreadable_mm2", "nothing_found", "unlike_header", "refused", "repeated", "without_effect")  # in summary.json


def silent_losses(scale: Scale) -> Outcome:
    """Predict each input; it must give all nuclei, or an error or summary that names what is wrong."""
    tally, complete, refused = Tally(), 0, 0
    makers = {name: ODD[name] for name in QUICK} if scale.quick else dict(ODD)
    makers |= {f"damage {i}": damaged_at_random(scale.rng) for i in range(scale.of(100, 4))}
    for number, (name, make) in enumerate(makers.items()):
        folder = scale.folder / str(number)
        (folder / "in").mkdir(parents=True)
        code, said, summary = _predict(twin := make(folder / "in"), folder / "out")
        found, expected = summary.get("nuclei", 0), len(twin.xy)
        reported = (code == 2 and "error: " in said) or any(summary.get(key) for key in _SAYS)
        complete += code == 0 and found == expected
        refused += code != 0
        tally.add(
            found == expected or (reported and found < expected),
            f"{name}: exit code {code}, {found} of {expected} nuclei, said {said[-300:]!r}",
        )
    fewer = len(makers) - complete - refused
    return tally.outcome(f"{complete} with all nuclei, {refused} refused, {fewer} with fewer and the reason")


def _predict(twin: Twin, out: Path) -> tuple[int, str, dict[str, Any]]:
    """Exit code, output and summary; an error that the command does not explain has the code -1."""
    argv = ["--weights", "classical", "--out", str(out), str(twin.path), *twin.words]
    with redirect_stdout(io.StringIO()) as said, redirect_stderr(said):
        try:
            code = cli.run(predict.main, argv)
        except Exception as error:
            return -1, f"{type(error).__name__}: {error}", {}
    path = out / "summary.json"
    return code, said.getvalue(), json.loads(path.read_text()) if path.is_file() else {}


ROWS = [
    Row(
        "D6",
        "no slide loses nuclei silently",
        "47 odd files and 100 slides with random damage: all nuclei, or the error or the summary says what is missing",
        silent_losses,
    )
]
