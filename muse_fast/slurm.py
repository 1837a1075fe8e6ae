"""``python -m muse_fast.slurm [--command finetune] --out DIR ... -- --config CONFIG ...``: train under Slurm.

One task per GPU. Shortly before its time limit, or when it is preempted, the run saves a checkpoint and the job is
requeued, until all steps are done.
"""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from muse_fast import finetune, pretrain
from muse_fast.config import PretrainConfig, load_config
from muse_fast.detection.config import FinetuneConfig
from muse_fast.detection.run import new_detector
from muse_fast.detection.samples import class_names
from muse_fast.errors import require
from muse_fast.models.archs import check_model
from muse_fast.roiset.roiset import RoiSet
from muse_fast.runtime import checkpoint, cluster, exit_codes
from muse_fast.sources import open_source

WARNED_BEFORE = 180  # seconds before the time limit: enough for the steps to the next log line and the checkpoint
_MAX_TIMEOUTS = 1_000  # a run ends when its steps are done, however often it was requeued
COMMANDS = {"pretrain": pretrain, "finetune": finetune}


@dataclass(frozen=True)
class TrainingJob:
    """One task of the job, which is one rank of the run. submitit pickles it and calls it on its node.

    Attributes:
        command: one of `COMMANDS`.
        arguments: arguments of the command.
    """

    command: str
    arguments: tuple[str, ...]

    def __call__(self) -> int:
        """Run to the end (return 0), or until the run is saved (75) and, on rank 0, requeued.

        Raises:
            RuntimeError: the run stopped for another reason, so that the job fails.
        """
        from submitit.helpers import TorchDistributedEnvironment

        # A rank picks its GPU by LOCAL_RANK, as under torchrun.
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        warning = _SaveFirst()
        code = COMMANDS[self.command].main(self.arguments)
        if warning.received and code == exit_codes.STOPPED:
            warning.requeue()  # the other ranks return 75: a failing task could take rank 0 down before it has requeued
        elif code != 0:
            raise RuntimeError(f"{self.command} ended with exit code {code}; see its output")
        return code

    def checkpoint(self) -> Any:
        """Return the job that submitit requeues: the same one, as a run resumes from its newest checkpoint."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


class _SaveFirst:
    """Lets the run save before submitit requeues the job.

    Slurm's warning (SIGUSR2) reaches every task. submitit's handler requeues and exits at once, in the middle of a
    step, where no consistent state can be saved and the other ranks wait in a collective. Here the warning is turned
    into the SIGTERM that a run handles: the step ends, the checkpoint is written and all ranks return; then submitit's
    handler is called. A SIGTERM from elsewhere (scancel) also saves, but does not requeue.
    """

    def __init__(self) -> None:
        from submitit import JobEnvironment

        self.received = False
        self._process = os.getpid()
        self._number = signal.Signals[f"SIG{JobEnvironment.USR_SIG}"]
        self._outside_training = signal.getsignal(signal.SIGTERM)
        self._submitit_handler: Any = signal.signal(self._number, self._handle)

    def requeue(self) -> None:
        """Requeue the job and exit on rank 0; do nothing on the others."""
        self._submitit_handler(self._number, None)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a loader process that inherited this handler
        self.received = True
        if signal.getsignal(signal.SIGTERM) == self._outside_training:
            self.requeue()  # before or after training there is nothing to save
        else:
            signal.raise_signal(signal.SIGTERM)


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    logs = options.out / "slurm"
    tasks = options.tasks_per_node or max(1, options.gpus_per_node)
    with cluster.submitting():
        config = _check(options, ranks=options.nodes * tasks)
        executor = cluster.executor(logs, options.local, _MAX_TIMEOUTS)
        executor.update_parameters(
            name=options.out.name,
            nodes=options.nodes,
            tasks_per_node=tasks,
            gpus_per_node=options.gpus_per_node,
            timeout_min=options.time,
            stderr_to_stdout=True,
            **({} if options.local else _slurm_parameters(options, config)),
        )
        if options.local:  # all tasks share this machine's cores; Slurm would bind each to its own
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // tasks)))
        job = executor.submit(TrainingJob(options.command, tuple(_arguments(options))))
    print(f"job {job.job_id} of {options.nodes} x {tasks} tasks; output in {logs}/{job.job_id}_*_log.out")
    if options.local:
        cluster.wait_for([job])
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m muse_fast.slurm",
        description="Submit pretraining or fine-tuning to Slurm. The job is requeued until the run is done.",
        usage="%(prog)s --out DIR --gpus-per-node G --time MINUTES [options] -- --config CONFIG [key=value ...]",
    )
    parser.add_argument("--command", choices=COMMANDS, default="pretrain", help="what to run (pretrain)")
    parser.add_argument("--out", required=True, type=Path, help="run folder, on a file system that all nodes share")
    parser.add_argument("--gpus-per-node", required=True, type=int, metavar="G", help="GPUs per node; 0: CPU")
    parser.add_argument("--time", required=True, type=int, metavar="MINUTES", help="time limit of one start")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="number of nodes (1)")
    parser.add_argument("--tasks-per-node", type=int, metavar="N", help="ranks per node (default: one per GPU)")
    parser.add_argument("--cpus-per-task", type=int, metavar="N", help="CPU cores per rank (default: data.workers + 2)")
    cluster.add_arguments(parser)
    parser.add_argument(
        "arguments", nargs="*", metavar="--config CONFIG ...", help="arguments of the command, without --out"
    )
    return parser


def _check(options: argparse.Namespace, ranks: int) -> PretrainConfig | FinetuneConfig:
    """Check the arguments now, not when the job starts, perhaps hours later."""
    check = _check_pretraining if options.command == "pretrain" else _check_finetuning
    config = check(_arguments(options))
    batch, micro = config.optim.batch_size, config.optim.accumulate
    fitting = f"a multiple of {ranks} tasks x {micro} micro-batches (optim.accumulate)"
    require(batch % (ranks * micro) == 0, "optim.batch_size", batch, fitting)
    if not options.local:
        require(options.time * 60 > WARNED_BEFORE, "--time", options.time, f"more than {WARNED_BEFORE // 60} minutes")
    return config


def _check_pretraining(arguments: Sequence[str]) -> PretrainConfig:
    args = pretrain.argument_parser().parse_args(arguments)
    config = load_config(args.config, args.overrides)
    check_model(config)
    RoiSet(Path(config.data.roiset))
    return config


def _check_finetuning(arguments: Sequence[str]) -> FinetuneConfig:
    args = finetune.parse(arguments)
    config: FinetuneConfig = args.config
    names = class_names(open_source(args.data, **args.options))
    if not checkpoint.steps(args.out):  # a run that resumes does not read the weights that it began with
        new_detector(config, names, args.weights, args.arch, args.compat)
    return config


def _arguments(options: argparse.Namespace) -> list[str]:
    return [*options.arguments, "--out", str(options.out)]


def _slurm_parameters(options: argparse.Namespace, config: PretrainConfig | FinetuneConfig) -> dict[str, Any]:
    cpus = options.cpus_per_task or config.data.workers + 2
    return {**cluster.slurm_parameters(options, cpus), "slurm_signal_delay_s": WARNED_BEFORE}


if __name__ == "__main__":
    from muse_fast import slurm
    from muse_fast.runtime import cli  # so that the job is pickled as muse_fast.slurm's, not __main__'s

    raise SystemExit(cli.run(slurm.main))
