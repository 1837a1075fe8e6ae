import errno
import os
import signal
import sys
import time

import pytest

from muse_fast.__main__ import COMMANDS, main
from muse_fast.errors import UserError
from muse_fast.runtime.cli import run


def test_a_user_error_is_one_message_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    def command(argv: object) -> int:
        raise UserError("roi.csv: row 3: x is nan")

    assert run(command, []) == 2
    assert capsys.readouterr().err == "error: roi.csv: row 3: x is nan\n"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_message(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    def command(argv: object) -> int:
        raise OSError(number, os.strerror(number), "runs/a/metrics.jsonl")

    assert run(command, []) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: runs/a/metrics.jsonl: ") and "make room" in said


def test_ctrl_c_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def command(argv: object) -> int:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)
        return 0

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores the signal
    try:
        assert run(command, []) == 130  # as shells do
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "interrupted; repeat the command to finish it\n"


def test_other_errors_of_files_are_not_hidden() -> None:
    def command(argv: object) -> int:
        raise PermissionError(errno.EACCES, "no", "x")

    with pytest.raises(PermissionError):
        run(command, [])


def test_other_errors_are_not_hidden() -> None:
    def command(argv: object) -> int:
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        run(command, [])


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [([], 0, ""), (["--help"], 0, ""), (["pretain"], 2, "did you mean 'pretrain'?"), (["xyz"], 2, "no command 'xyz'")],
)
def test_commands_are_listed(
    argv: list[str], code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["muse-fast", *argv])
    assert main() == code
    shown = capsys.readouterr()
    assert said in shown.err and all(name in shown.out for name in COMMANDS)
