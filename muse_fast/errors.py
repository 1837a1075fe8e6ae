"""The error that a user can fix, and the checks and hints that go with it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something in the input or the settings is wrong; the message says what, where, and what to do.

    Commands show the message without a traceback and exit with code 2.
    """


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` with the known name nearest to ``name``, or nothing if none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""


def require(ok: bool, key: str, value: object, expected: str) -> None:
    """Refuse the ``value`` of the setting ``key`` unless ``ok``.

    Raises:
        UserError: says what was expected.
    """
    if not ok:
        raise UserError(f"{key}={value}: expected {expected}")
