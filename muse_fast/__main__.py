"""``muse-fast COMMAND ...`` and ``python -m muse_fast COMMAND ...``."""

from __future__ import annotations

import importlib
import sys

from muse_fast.errors import did_you_mean
from muse_fast.runtime import exit_codes
from muse_fast.runtime.cli import run

COMMANDS = {
    "prepare": "convert slides or labelled images to a ROI set",
    "pretrain": "pretrain a backbone with MUSE",
    "slurm": "submit pretraining or fine-tuning to Slurm and requeue it until it is done",
    "finetune": "fine-tune a pretrained backbone to detect and classify nuclei",
    "evaluate": "evaluate a backbone by nucleus classification, or score a detector",
    "predict": "find the nuclei of slides and images: GeoJSON, CSV and a picture",
    "embed": "describe every nucleus of slides and images by a vector, in files for scanpy",
    "export": "write a trained network as safetensors, for timm or in the published layout",
    "train_detector": "train a nucleus detector from annotated nuclei",
    "doctor": "show what is installed and the backend of each op, or check a ROI set or a run",
}


def main() -> int:
    """Run the command named in ``sys.argv``, or list the commands."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in COMMANDS:
        return run(importlib.import_module(f"muse_fast.{name}").main, rest)
    print("usage: muse-fast COMMAND ...\n")
    for command, text in COMMANDS.items():
        print(f"  {command:15} {text}")
    print("\n`muse-fast COMMAND --help` describes a command.")
    if name in ("-h", "--help"):
        return 0
    print(f"\nerror: no command '{name}'{did_you_mean(name, COMMANDS)}", file=sys.stderr)
    return exit_codes.USER_ERROR


if __name__ == "__main__":
    raise SystemExit(main())
