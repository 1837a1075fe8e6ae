"""What every command shares: how a mistake of the user, or a full disk, is shown."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Sequence

from muse_fast.errors import UserError

EXIT_USER_ERROR = 2


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
    return EXIT_USER_ERROR
