"""What every command shares: how a mistake of the user is shown."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from muse_fast.errors import UserError

EXIT_USER_ERROR = 2


def run(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """Call ``main``; a :class:`UserError` becomes one message on stderr and exit code 2."""
    try:
        return main(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
