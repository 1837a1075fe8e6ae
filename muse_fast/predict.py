"""``python -m muse_fast.predict --weights W --out DIR IMAGE_OR_SLIDE ... [key=value ...]``: the nuclei of slides.

Every slide or image gets a folder in DIR, which appears whole: cells for QuPath (GeoJSON) and for tables (CSV), a
picture, and numbers. A command that was interrupted continues when it is repeated.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from muse_fast.predicting.detectors import NUCLEI
from muse_fast.predicting.run import PredictConfig, predict
from muse_fast.runtime.cli import run, written_to
from muse_fast.runtime.options import load_settings, split_settings


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m muse_fast.predict", description="Find the nuclei of slides and images."
    )
    parser.add_argument("--weights", required=True, help=f"a fine-tuned run, or `{NUCLEI}` for nuclei of one class")
    parser.add_argument("--out", type=Path, required=True, help="folder that gets a folder for every slide")
    parser.add_argument("inputs", nargs="+", metavar="IMAGE_OR_SLIDE", help="files, or folders of them; key=value")
    args = parser.parse_intermixed_args(argv)
    given, files = split_settings(args.inputs)
    settings = load_settings(PredictConfig, None, given)
    with written_to(args.out):
        predict(args.weights, args.out, [Path(file) for file in files], settings)
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
