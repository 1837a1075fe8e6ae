"""``muse-fast COMMAND ...`` and ``python -m muse_fast COMMAND ...``."""

from __future__ import annotations

import importlib
import sys

from muse_fast.errors import did_you_mean
from muse_fast.runtime import exit_codes
from muse_fast.runtime.cli import run

COMMANDS = {
    "prepare": "slides or labelled images to a ROI set",
    "pretrain": "self-supervised pretraining",
    "slurm": "submit pretraining to Slurm, until it is done",
    "finetune": "a detector that classifies nuclei, from a pretrained backbone",
    "evaluate": "nucleus classification by KNN, linear probe or fine-tuning; scores of a detector or of points",
    "predict": "the nuclei of slides and images, as GeoJSON, CSV and a picture",
    "export": "a trained network for use elsewhere: safetensors, timm or the published layout",
    "train_detector": "a nucleus detector from annotated nuclei",
    "doctor": "what is installed and which backend each op would use",
}


def main() -> int:
    """Run the command that ``sys.argv`` names; without one, list them."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in COMMANDS:
        return run(importlib.import_module(f"muse_fast.{name}").main, rest)
    print("usage: muse-fast COMMAND ...\n")
    for command, text in COMMANDS.items():
        print(f"  {command:14} {text}")
    if name in ("-h", "--help"):
        return 0
    print(f"\nerror: no command '{name}'{did_you_mean(name, COMMANDS)}", file=sys.stderr)
    return exit_codes.USER_ERROR


if __name__ == "__main__":
    raise SystemExit(main())
