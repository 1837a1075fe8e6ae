"""``python -m muse_fast.predict --weights W --out DIR IMAGE_OR_SLIDE ... [key=value ...]``: find nuclei.

Each slide or image gets a folder in DIR with its cells for QuPath (GeoJSON) and for tables (CSV), a picture and a
summary. A folder appears only when it is complete; an interrupted command continues when it is repeated.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from muse_fast.predicting.detectors import NUCLEI
from muse_fast.predicting.run import PredictConfig, predict
from muse_fast.runtime.cli import run, written_to
from muse_fast.runtime.options import known_keys, load_settings, split_settings


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m muse_fast.predict", description="Find the nuclei of slides and images."
    )
    parser.add_argument("--weights", required=True, help=f"fine-tuned run, or `{NUCLEI}` for nuclei without classes")
    parser.add_argument("--out", type=Path, required=True, help="output folder, with a folder for each input")
    help_ = f"files or folders of files; also settings as key=value: {', '.join(known_keys(PredictConfig))}"
    parser.add_argument("inputs", nargs="+", metavar="IMAGE_OR_SLIDE", help=help_)
    args = parser.parse_intermixed_args(argv)
    given, files = split_settings(args.inputs)
    settings = load_settings(PredictConfig, None, given)
    with written_to(args.out):
        predict(args.weights, args.out, [Path(file) for file in files], settings)
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
