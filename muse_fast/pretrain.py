"""``python -m muse_fast.pretrain --config CONFIG --out DIR [--resume auto|never|PATH] [key=value ...]``"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from muse_fast.config import load_config
from muse_fast.pretraining.run import pretrain
from muse_fast.runtime.cli import run


def main(argv: Sequence[str] | None = None) -> int:
    args = argument_parser().parse_args(argv)
    return pretrain(load_config(args.config, args.overrides), args.out, resume=args.resume)


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m muse_fast.pretrain", description="Pretrain a backbone with MUSE.")
    parser.add_argument("--config", required=True, help="YAML file or name of a shipped config, e.g. vits16_224")
    parser.add_argument("--out", required=True, type=Path, help="run folder, new or to be resumed")
    parser.add_argument("--resume", default="auto", help="auto (default), never, or a checkpoint folder")
    help_ = "settings, e.g. data.roiset=DIR optim.steps=500 (all: muse_fast/config.py)"
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=help_)
    return parser


if __name__ == "__main__":
    raise SystemExit(run(main))
