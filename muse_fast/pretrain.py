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
    parser = argparse.ArgumentParser(prog="python -m muse_fast.pretrain", description="Pretrain a backbone by MUSE.")
    parser.add_argument("--config", required=True, help="YAML file or shipped config, such as vits16_224")
    parser.add_argument("--out", required=True, type=Path, help="run folder")
    parser.add_argument("--resume", default="auto", help="auto (default), never, or a checkpoint folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, for example optim.steps=500")
    return parser


if __name__ == "__main__":
    raise SystemExit(run(main))
