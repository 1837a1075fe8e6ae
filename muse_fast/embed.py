"""``python -m muse_fast.embed --weights W --out DIR IMAGE_OR_SLIDE ... [key=value ...]``: one vector per nucleus.

Each slide or image gets NAME.h5ad in DIR, which scanpy opens, NAME.parquet without the vectors, and NAME.json. A file
appears only when it is complete; an interrupted command continues when it is repeated. Ranks of torchrun, or tasks of
a Slurm array, share the inputs.

``embed search`` finds the nuclei most similar to one, see `muse_fast.exploring.search`, and ``embed report`` draws the
vectors of several commands, see `muse_fast.exploring.report`.

``python -m muse_fast.embed --to-geojson FILE COLUMN`` writes a column of a file, such as clusters, for QuPath.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from muse_fast.embedding.run import EmbedConfig, embed
from muse_fast.embedding.to_qupath import to_geojson
from muse_fast.exploring import report, search
from muse_fast.models.weights import COMPATS
from muse_fast.predicting.pages import find_pages
from muse_fast.runtime import shares
from muse_fast.runtime.cli import run, written_to
from muse_fast.runtime.options import known_keys, load_settings, split_settings

WEIGHTS_HELP = (
    "run, checkpoint, export, .pth, run of finetune, random:ARCH, or a network of timm as "
    "timm:NAME[:key=value ...]@FILE"
)
EPILOG = (
    "`python -m muse_fast.embed search H5AD ...` finds the nuclei most similar to one, and `python -m muse_fast.embed "
    "report H5AD ...` draws the vectors of several commands; each has its own --help."
)
OTHERS = {"search": search.main, "report": report.main}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in OTHERS:
        return OTHERS[arguments[0]](arguments[1:])
    parser = argparse.ArgumentParser(
        prog="python -m muse_fast.embed",
        description="Describe every nucleus of slides and images by a vector.",
        epilog=EPILOG,
    )
    parser.add_argument("--weights", help=WEIGHTS_HELP)
    parser.add_argument("--out", type=Path, help="output folder, with the files of each input")
    parser.add_argument("--arch", help="needed only if the weights do not record it")
    parser.add_argument("--compat", choices=COMPATS, help="resampling of the position embedding, see load_backbone")
    help_ = f"files or folders of files; also settings as key=value: {', '.join(known_keys(EmbedConfig))}"
    parser.add_argument("inputs", nargs="*", metavar="IMAGE_OR_SLIDE", help=help_)
    parser.add_argument(
        "--to-geojson",
        nargs=2,
        metavar=("FILE", "COLUMN"),
        help="instead, write a column of a file as SLIDE.COLUMN.geojson for QuPath, to --out or next to the file",
    )
    shares.add_arguments(parser)
    args = parser.parse_intermixed_args(arguments)
    if args.to_geojson:
        return _to_geojson(Path(args.to_geojson[0]), args.to_geojson[1], args.out)
    if not (args.weights and args.out and args.inputs):
        parser.error("--weights, --out and inputs are needed, or --to-geojson FILE COLUMN")
    given, files = split_settings(args.inputs)
    settings, inputs = load_settings(EmbedConfig, None, given), [Path(file) for file in files]
    with written_to(args.out):
        if args.slurm_tasks is not None:
            _submit(args, inputs, settings)
        else:
            shares.each_share(
                lambda share: embed(args.weights, args.out, inputs, settings, args.arch, args.compat, share), args.task
            )
    return 0


def _submit(args: argparse.Namespace, inputs: Sequence[Path], settings: EmbedConfig) -> None:
    jobs = shares.JobArray(args)
    arguments = ["--weights", args.weights, "--out", str(args.out), *args.inputs]
    for name in ("arch", "compat"):
        arguments += [f"--{name}", getattr(args, name)] if getattr(args, name) else []
    jobs.submit(main, arguments, len(find_pages(inputs, settings.mpp, args.out)[0]))


def _to_geojson(path: Path, column: str, out: Path | None) -> int:
    for file in to_geojson(path, column, out or path.parent):
        print(file)
    return 0


if __name__ == "__main__":
    from muse_fast import embed as module  # so that jobs are pickled as muse_fast.embed's, not __main__'s

    raise SystemExit(run(module.main))
