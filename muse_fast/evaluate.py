"""``python -m muse_fast.evaluate {knn|linear|ridge|finetune} --weights W ... --data SOURCE --json OUT [key=value ...]``

Evaluates nucleus classification by the published protocol, see `muse_fast.classification.benchmark`.
``evaluate detect`` scores a fine-tuned detector, see `muse_fast.detection.score_detector`, and ``evaluate points``
files of detected points, see `muse_fast.scoring.files`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from muse_fast.classification.benchmark import CROP, PROTOCOLS, Benchmark, benchmark
from muse_fast.classification.tasks import TASKS
from muse_fast.classification.tiles import CROP_UM
from muse_fast.detection import score_detector
from muse_fast.errors import UserError, require
from muse_fast.models.weights import COMPATS
from muse_fast.runtime.cli import run
from muse_fast.runtime.options import known_keys, load_settings, split_settings, split_source_options
from muse_fast.scoring import files

PROTOCOL_HELP = (
    "muse (default): the published rules, with nuclei rounded to whole pixels; exact: without rounding, and with maps "
    "of timm sampled so that the middle of a token yields exactly that token; crop: the image feature of a crop of "
    "--crop-um, resized to --size, in whose middle the nucleus lies"
)
WEIGHTS_HELP = "run, checkpoint, export, .pth, random:ARCH, or a backbone of timm as timm:NAME[:key=value ...][@FILE]"
EPILOG = (
    "`python -m muse_fast.evaluate detect ...` scores a fine-tuned detector, `python -m muse_fast.evaluate points ...` "
    "files of detected points; each has its own --help."
)
_MPP = 0.5
OTHERS = {"points": files.main, "detect": score_detector.main}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in OTHERS:
        return OTHERS[arguments[0]](arguments[1:])
    args = argument_parser().parse_intermixed_args(arguments)
    given, weights = split_settings(args.weights)  # `--weights A B lr=1` swallows the settings after it
    source_options, settings = split_source_options([*given, *args.settings])
    if args.baseline_random:
        settings.append("baseline=true")
    if not weights:
        raise UserError("--weights: expected a run, a checkpoint, a file, random:ARCH or timm:NAME[@FILE]")
    if args.json is not None and args.json.exists():
        raise UserError(f"{args.json} exists already; remove it or choose another --json")
    what = Benchmark(
        task=args.task,
        weights=weights,
        data=args.data,
        source_options=source_options,
        size=args.size,
        mpp=_mpp(args),
        arch=args.arch,
        compat=args.compat,
        protocol=args.protocol,
    )
    benchmark(what, load_settings(TASKS[args.task].config, None, settings), args.json)
    return 0


def _mpp(args: argparse.Namespace) -> float:
    """um per pixel of tiles or crops."""
    for name in ("mpp", "crop_um"):
        if (given := getattr(args, name)) is not None and given <= 0:
            raise UserError(f"--{name.replace('_', '-')} {given}: expected um{' per pixel' * (name == 'mpp')} above 0")
    if args.protocol == CROP:
        require(args.mpp is None, "--mpp", args.mpp, f"none with --protocol {CROP}, where --crop-um and --size decide")
        return (args.crop_um or CROP_UM) / float(args.size)
    require(args.crop_um is None, "--crop-um", args.crop_um, f"none without --protocol {CROP}")
    return float(args.mpp or _MPP)


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m muse_fast.evaluate",
        description="Evaluate backbones by nucleus classification.",
        epilog=EPILOG,
    )
    parser.add_argument("task", choices=TASKS, help="how the nuclei are classified")
    parser.add_argument("--weights", nargs="+", required=True, help=WEIGHTS_HELP)
    parser.add_argument("--data", required=True, help="labelled source with train, val and test, e.g. brcam2c:DIR")
    parser.add_argument("--mpp", type=float, help=f"um per pixel of the tiles ({_MPP})")
    parser.add_argument("--size", type=int, default=224, help="side of the tiles or crops in pixels (224)")
    parser.add_argument("--crop-um", type=float, metavar="UM", help=f"side of the crops ({CROP_UM:g})")
    parser.add_argument("--arch", help="needed only if the weights do not record it")
    parser.add_argument("--compat", choices=COMPATS, help="resampling of the position embedding, see load_backbone")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="muse", help=PROTOCOL_HELP)
    parser.add_argument(
        "--baseline-random",
        action="store_true",
        help="also evaluate the same network untrained, as built and with calibrated BatchNorm",
    )
    parser.add_argument("--json", type=Path, help="write all numbers to this new file")
    known = "; ".join(f"{name}: {', '.join(known_keys(task.config))}" for name, task in TASKS.items())
    help_ = f"settings of the task ({known}), or options of the source as source.key=value"
    parser.add_argument("settings", nargs="*", metavar="key=value", help=help_)
    return parser


if __name__ == "__main__":
    raise SystemExit(run(main))
