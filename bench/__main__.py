"""``python -m bench {ops|loss|step|plan|data|embed|rates|ablation|start|finetune|finetune-step} --help``"""

from __future__ import annotations

import argparse
import sys

import torch

from bench.ablation import command as ablation_command
from bench.data import command as data_command
from bench.embed import command as embed_command
from bench.finetune import command as finetune_command
from bench.finetune_step import command as finetune_step_command
from bench.loss import command as loss_command
from bench.ops import command as ops_command
from bench.plan import command as plan_command
from bench.rates import command as rates_command
from bench.start import command as start_command
from bench.step import command as step_command

COMMANDS = {
    "ops": ops_command,
    "loss": loss_command,
    "step": step_command,
    "plan": plan_command,
    "data": data_command,
    "embed": embed_command,
    "rates": rates_command,
    "ablation": ablation_command,
    "start": start_command,
    "finetune": finetune_command,
    "finetune-step": finetune_step_command,
}


def main(argv: list[str] | None = None) -> int:
    """Print tables and write the JSON; exit code 1 if a version is wrong."""
    options = parse(argv)
    return COMMANDS[options.benchmark].main(options)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Time the ops, the loss, the training step, the data path and embed; compare short runs.",
    )
    benchmarks = parser.add_subparsers(dest="benchmark", required=True)
    for name, command in COMMANDS.items():
        arguments = benchmarks.add_parser(name, description=command.__doc__)
        arguments.add_argument(
            "--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu"
        )
        command.add_arguments(arguments)
        arguments.set_defaults(parser=arguments)
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        options.parser.error("--device cuda: torch finds no CUDA device")
    return options


if __name__ == "__main__":
    sys.exit(main())
