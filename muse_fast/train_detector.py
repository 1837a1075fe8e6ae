"""``python -m muse_fast.train_detector --data SOURCE --out DIR [key=value ...]``: train a detector from points."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from muse_fast.detection.train_finder import TrainDetectorConfig, train_detector
from muse_fast.runtime.cli import run
from muse_fast.runtime.options import known_keys, load_settings, split_source_options


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m muse_fast.train_detector", description="Train a nucleus detector from points."
    )
    parser.add_argument("--data", required=True, help="source with train, val and test splits, e.g. brcam2c:DIR")
    parser.add_argument("--out", required=True, type=Path, help="run folder, without a finished run")
    help_ = f"settings: {', '.join(known_keys(TrainDetectorConfig))}"
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help=f"{help_}; source.KEY=VALUE are options of the source"
    )
    args = parser.parse_intermixed_args(argv)
    options, settings = split_source_options(args.settings)
    return train_detector(args.data, args.out, load_settings(TrainDetectorConfig, None, settings), options)


if __name__ == "__main__":
    raise SystemExit(run(main))
