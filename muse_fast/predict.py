"""``python -m muse_fast.predict --weights W --out DIR IMAGE_OR_SLIDE ... [key=value ...]``: find nuclei.

Each slide or image gets a folder in DIR with its cells for QuPath (GeoJSON) and for tables (CSV), a picture and a
summary. A folder appears only when it is complete; an interrupted command continues when it is repeated. Ranks of
torchrun, or tasks of a Slurm array, share the inputs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from muse_fast.predicting.detectors import NUCLEI
from muse_fast.predicting.pages import find_pages
from muse_fast.predicting.run import PredictConfig, predict
from muse_fast.runtime import shares
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
    shares.add_arguments(parser)
    args = parser.parse_intermixed_args(argv)
    given, files = split_settings(args.inputs)
    settings, inputs = load_settings(PredictConfig, None, given), [Path(file) for file in files]
    with written_to(args.out):
        if args.slurm_tasks is not None:
            jobs = shares.JobArray(args)
            slides = len(find_pages(inputs, settings.mpp, args.out)[0])
            jobs.submit(main, ["--weights", args.weights, "--out", str(args.out), *args.inputs], slides)
        else:
            shares.each_share(lambda share: predict(args.weights, args.out, inputs, settings, share), args.task)
    return 0


if __name__ == "__main__":
    from muse_fast import predict as module  # so that jobs are pickled as muse_fast.predict's, not __main__'s

    raise SystemExit(run(module.main))
