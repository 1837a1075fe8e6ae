"""Jobs as submitit runs them: on this machine, and under Slurm with fake commands."""

import os
import runpy
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from muse_fast import pretrain, slurm
from muse_fast.errors import UserError
from muse_fast.runtime import checkpoint, exit_codes
from muse_fast.runtime.cli import run
from muse_fast.training.report import StopSignal, read_metrics
from tests.support.fake_slurm import fake_slurm
from torture import toy
from torture.processes import Child, children_of, wait_until
from torture.toy import COMMANDS, FINETUNE, PRETRAIN, Command

pytest.importorskip("submitit")

STEPS = 60  # more than a run takes before it is warned
LONG = {
    PRETRAIN: ("optim.batch_size=4", "train.eval_every=0", "train.checkpoint_every=1000"),
    FINETUNE: ("train.eval_every=50",),
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.prepare(tmp_path_factory.mktemp("slurm"))


def training(command: Command, workplace: Path, *overrides: str) -> list[str]:
    return command.settings(workplace, "train.precision=fp64", command.lasting(STEPS), *LONG[command], *overrides)


@pytest.fixture(scope="module", params=COMMANDS)
def command(request: pytest.FixtureRequest) -> Command:
    return COMMANDS[request.param]


@pytest.fixture(scope="module")
def unbroken(command: Command, workplace: Path) -> list[float]:
    out = workplace / f"{command.name}-unbroken"
    if not (out / "summary.json").exists():  # pytest sets this up again when it comes back to a command
        assert command.main([*training(command, workplace), "--out", str(out)]) == 0
    return losses(out)


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(out / "metrics.jsonl") if "loss" in row]


def wait_until_trained(out: Path, process: Child) -> None:
    wait_until(lambda: len(losses(out)) >= 3 or process.poll() is not None, 300, "fewer than three steps")
    assert process.poll() is None, process.output()


def submitted(logs: Path) -> int:
    """Do what Slurm starts: ``python -m submitit.core._submit LOGS``."""
    sys.argv[1:] = [str(logs)]
    runpy.run_module("submitit.core._submit", run_name="__main__")
    return 0


@pytest.mark.parametrize(
    ("command", "tasks"),
    [
        pytest.param("pretrain", 1, marks=pytest.mark.slow),
        pytest.param("pretrain", 2, marks=pytest.mark.heavy),
        pytest.param("finetune", 2, marks=pytest.mark.heavy),
    ],
    indirect=["command"],
)
def test_a_warned_run_saves_requeues_and_ends_like_an_unbroken_run(
    command: Command, tasks: int, workplace: Path, unbroken: list[float], tmp_path: Path
) -> None:
    out = workplace / f"{command.name}-local-{tasks}"
    options = ["--local", "--out", str(out), "--gpus-per-node", "0", "--tasks-per-node", str(tasks), "--time", "60"]
    argv = ["--command", command.name, *options, "--", *training(command, workplace)]
    with Child(run, slurm.main, argv, log=tmp_path / "log") as process:
        wait_until_trained(out, process)
        (controller,) = children_of(process.pid)
        for task in children_of(controller):
            os.kill(task, signal.SIGUSR2)
        assert process.wait() == 0, process.output()
    (log,) = (out / "slurm").glob("*_0_log.out")
    assert "stopped after step" in log.read_text() and log.read_text().count(f"{command.name}: timm:vit_tiny") == 2
    assert len(checkpoint.steps(out)) == 2
    # Up to rounding: where memory begins differs between processes, and with it the order of some sums.
    assert losses(out) == pytest.approx(unbroken, rel=1e-10, abs=0)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of fake Slurm commands; ``scontrol`` writes the checkpoints it finds to ``requeued``."""
    fake_slurm(tmp_path, monkeypatch, scontrol=f"echo $*: $(ls $RUN/checkpoints) > {tmp_path}/requeued")
    return tmp_path


@pytest.mark.parametrize(
    "command",
    [pytest.param("pretrain", marks=pytest.mark.slow), pytest.param("finetune", marks=pytest.mark.heavy)],
    indirect=True,
)
def test_under_slurm_a_run_saves_before_it_is_requeued(
    command: Command, workplace: Path, unbroken: list[float], cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = workplace / f"{command.name}-cluster"
    options = ["--gpus-per-node", "0", "--time", "60", "--partition", "long", "--sbatch", "qos=high"]
    argv = ["--command", command.name, "--out", str(out), *options, "--", *training(command, workplace)]
    assert slurm.main(argv) == 0
    assert "job 40 of 1 x 1 tasks" in capsys.readouterr().out
    batch = (cluster / "batch-0.sh").read_text().splitlines()
    for line in ("partition=long", "qos=high", "requeue", "time=60", "signal=USR2@180", "cpus-per-task=2", "nodes=1"):
        assert f"#SBATCH --{line}" in batch
    (line,) = (line for line in batch if line.startswith("srun"))
    assert "--cpus-per-task=2" in line and "submitit.core._submit" in line

    slurms = {"SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": "40", "RUN": str(out), "PATH": os.environ["PATH"]}
    with Child(submitted, out / "slurm", log=cluster / "0.log", env=slurms) as process:
        wait_until_trained(out, process)
        process.signal(signal.SIGUSR2)
        process.wait()
        said = process.output()
    saved = " ".join(f"step-{step:08d}" for step in checkpoint.steps(out))
    assert saved and (cluster / "requeued").read_text() == f"requeue 40: {saved}\n", said
    assert losses(out) == unbroken[: checkpoint.steps(out)[-1]]

    with Child(submitted, out / "slurm", log=cluster / "1.log", env=slurms) as process:  # as Slurm does after that
        assert process.wait() == 0, process.output()
    assert losses(out) == unbroken


@pytest.fixture
def submitits_handler() -> Iterator[list[int]]:
    """Signals that reached the handler that submitit sets before a job begins."""
    seen: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM)}
    signal.signal(signal.SIGUSR2, lambda number, frame: seen.append(number))
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    yield seen
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> slurm.TrainingJob:
    for name, value in {"SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_JOB_ID": "1"}.items():
        monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "")  # so that monkeypatch undoes what the job sets
        monkeypatch.delenv(name)
    return slurm.TrainingJob("pretrain", ())


def test_a_task_is_a_rank(job: slurm.TrainingJob, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"GLOBALID": 1, "LOCALID": 1, "NTASKS": 2, "NODEID": 0, "JOB_NUM_NODES": 1}.items():
        monkeypatch.setenv(f"SUBMITIT_LOCAL_{name}", str(value))
    seen = {}
    monkeypatch.setattr(pretrain, "main", lambda argv: seen.update(os.environ) or 0)
    assert job() == 0
    assert [seen[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")] == ["1", "1", "2", "2"]
    assert seen["MASTER_ADDR"] and int(seen["MASTER_PORT"]) > 0


def test_a_warning_before_training_requeues_immediately(
    job: slurm.TrainingJob, submitits_handler: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def warned_while_loading(argv: object) -> int:
        signal.raise_signal(signal.SIGUSR2)
        assert submitits_handler == [signal.SIGUSR2]
        return 0

    monkeypatch.setattr(pretrain, "main", warned_while_loading)
    assert job() == 0


def test_a_warning_during_training_stops_it_first(
    job: slurm.TrainingJob, submitits_handler: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def warned_in_training(argv: object) -> int:
        with StopSignal() as stop:
            signal.raise_signal(signal.SIGUSR2)
            assert stop.received == "SIGTERM" and not submitits_handler
        return exit_codes.STOPPED

    monkeypatch.setattr(pretrain, "main", warned_in_training)
    assert job() == exit_codes.STOPPED
    assert submitits_handler == [signal.SIGUSR2]


@pytest.mark.parametrize("code", [exit_codes.STOPPED, exit_codes.NON_FINITE])
def test_a_run_that_stops_without_a_warning_has_failed(
    code: int, job: slurm.TrainingJob, submitits_handler: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain, "main", lambda argv: code)
    with pytest.raises(RuntimeError, match=f"exit code {code}"):
        job()
    assert not submitits_handler


@pytest.mark.parametrize(
    ("name", "options", "overrides", "said"),
    [
        ("pretrain", [], ["optim.lrr=1"], "did you mean 'optim.lr'?"),
        ("pretrain", [], ["data.roiset=nowhere"], "nowhere is not a ROI set"),
        ("pretrain", ["--tasks-per-node", "3"], [], "optim.batch_size=4: expected a multiple of 3 tasks"),
        ("pretrain", ["--time", "2"], [], "--time=2: expected more than 3 minutes"),
        ("pretrain", ["--local", "--nodes", "2"], [], "one node"),
        ("pretrain", [], [], "srun"),
        ("finetune", [], ["optim.lrr=1"], "did you mean 'optim.lr'?"),
        ("finetune", [], ["source.siz=9"], "did you mean 'size'?"),
        ("finetune", [], ["--weights", "none.pth"], "do not exist"),
        ("finetune", ["--tasks-per-node", "3"], [], "optim.batch_size=2: expected a multiple of 3 tasks"),
        ("finetune", [], [], "srun"),
    ],
)
def test_refusals(
    name: str,
    options: list[str],
    overrides: list[str],
    said: str,
    workplace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    fixed = ["--command", name, "--out", str(tmp_path / "out"), "--gpus-per-node", "0", "--time", "60"]
    assert run(slurm.main, [*fixed, *options, "--", *training(COMMANDS[name], workplace, *overrides)]) == 2
    assert said in capsys.readouterr().err


def test_without_submitit_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, workplace: Path) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r"pip install 'muse_fast\[slurm\]'"):
        slurm.main(["--out", "x", "--gpus-per-node", "0", "--time", "60", "--", *training(PRETRAIN, workplace)])
