"""``python -m muse_fast.finetune --config CONFIG --data SOURCE --weights W --out DIR [--resume ...] [key=value ...]``

Fine-tunes a nucleus detector (paper, "Downstream Fine-Tuning"), which `muse_fast.load_detector` opens.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from muse_fast.detection.config import FinetuneConfig
from muse_fast.detection.run import finetune
from muse_fast.models.weights import COMPATS
from muse_fast.runtime.cli import run
from muse_fast.runtime.options import load_settings, split_source_options


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    return finetune(
        args.config,
        args.out,
        data=args.data,
        options=args.options,
        weights=args.weights,
        arch=args.arch,
        compat=args.compat,
        resume=args.resume,
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse arguments; ``config`` are then the settings, and ``options`` those of the source."""
    args = argument_parser().parse_intermixed_args(argv)
    args.options, settings = split_source_options(args.overrides)
    args.config = load_settings(FinetuneConfig, args.config, settings)
    return args


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m muse_fast.finetune", description="Fine-tune a nucleus detector.")
    parser.add_argument("--config", required=True, help="YAML file or name of a shipped config, e.g. finetune_brcam2c")
    parser.add_argument("--data", required=True, help="annotated source with train and val splits, e.g. brcam2c:DIR")
    parser.add_argument("--weights", required=True, help="run, checkpoint, export, .pth, random:ARCH or timm:NAME@FILE")
    parser.add_argument("--arch", help="needed only if the weights do not record it")
    parser.add_argument("--compat", choices=COMPATS, help="resampling of the position embedding, see load_backbone")
    parser.add_argument("--out", required=True, type=Path, help="run folder, new or to be resumed")
    parser.add_argument("--resume", default="auto", help="auto (default), never, or a checkpoint folder")
    help_ = "settings, e.g. optim.epochs=20 (all: detection/config.py), or options of the source as source.key=value"
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=help_)
    return parser


if __name__ == "__main__":
    raise SystemExit(run(main))
