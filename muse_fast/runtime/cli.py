"""Shared by all commands: how errors of the user and full disks are shown.

A command is a file with ``main(argv) -> exit code``, which may raise UserError; the shell starts ``run(main)``.
"""

from __future__ import annotations

import errno
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from muse_fast.errors import UserError
from muse_fast.runtime import exit_codes


def run(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """Call ``main``; a :class:`UserError`, a full disk and Ctrl-C become one message on stderr and an exit code."""
    print_any_name()
    try:
        return main(argv)
    except KeyboardInterrupt:
        print("interrupted; repeat the command to finish it", file=sys.stderr)
        return exit_codes.INTERRUPTED
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        place = f"{error.filename}: " if error.filename else ""
        print(f"error: {place}{error.strerror}; make room and start the same command again", file=sys.stderr)
    return exit_codes.USER_ERROR


def print_any_name() -> None:
    """Let this process print names of files with characters that its locale lacks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def written_to(out: Path) -> Iterator[None]:
    """Turn errors of the file system, such as a full disk, into a UserError that names ``out``."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{out} was not written: {error}") from error
