"""Shared by all commands: how errors of the user and full disks are shown.

A command is a file with ``main(argv) -> exit code``, which may raise UserError; the shell starts ``run(main)``.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from muse_fast.errors import UserError
from muse_fast.runtime import exit_codes


def run(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """Call ``main``; a :class:`UserError` or a full disk becomes one message on stderr and exit code 2."""
    try:
        return main(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        place = f"{error.filename}: " if error.filename else ""
        print(f"error: {place}{error.strerror}; make room and start the same command again", file=sys.stderr)
    return exit_codes.USER_ERROR


@contextmanager
def written_to(out: Path) -> Iterator[None]:
    """Turn errors of the file system, such as a full disk, into a UserError that names ``out``."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{out} was not written: {error}") from error
