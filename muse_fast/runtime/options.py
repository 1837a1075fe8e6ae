"""Settings as frozen dataclasses: each field states its type, its default and its range once.

    @dataclass(frozen=True)
    class Options:
        roi_um: float = setting(512.0, ge=16, le=4096)
        merge: str = setting("yes", choices=("yes", "no"))

`parse_options` makes such a dataclass of ``key=value`` items; `check_options` checks the ranges of one that was made
otherwise. Bounds are called as in pydantic: ``ge`` and ``le`` belong to the range, ``gt`` and ``lt`` do not.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from muse_fast.errors import UserError, did_you_mean

_Options = TypeVar("_Options")
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: ""}


@dataclasses.dataclass(frozen=True, slots=True)
class Range:
    """The values that a setting takes: ``choices``, or whatever lies within the bounds that are given."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    choices: tuple[str, ...] = ()

    def __contains__(self, value: Any) -> bool:
        if self.choices:
            return value in self.choices
        return (
            (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )

    def __str__(self) -> str:
        if self.choices:
            return " or ".join(self.choices)
        low = f"{self.ge:.10g}" if self.ge is not None else f"above {self.gt:.10g}" if self.gt is not None else ""
        high = f"{self.le:.10g}" if self.le is not None else f"below {self.lt:.10g}" if self.lt is not None else ""
        if low and high:
            return f"{low} to {high}"
        if low:
            return low if self.ge is None else f"{low} or more"
        return high if self.le is None else f"at most {high}"


def setting(
    default: Any,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: Sequence[str] = (),
) -> Any:
    """A dataclass field with a default and the range of its values."""
    return dataclasses.field(default=default, metadata={"range": Range(ge, gt, le, lt, tuple(choices))})


def parse_options(kind: type[_Options], values: Mapping[str, Any], prefix: str = "") -> _Options:
    """A ``kind`` from values that are text, as on a command line, or have the field's type already.

    Args:
        prefix: what the messages begin with, for example ``"consep: "``.

    Raises:
        UserError: unknown key (with the nearest known one), wrong type, or out of range.
    """
    known = {one.name: one for one in dataclasses.fields(kind)}  # type: ignore[arg-type]
    annotations = typing.get_type_hints(kind)
    parsed = {}
    for key, value in values.items():
        if key not in known:
            raise UserError(f"{prefix}no option {key!r} among {', '.join(known) or 'none'}{did_you_mean(key, known)}")
        try:
            parsed[key] = _converted(annotations[key], value)
        except ValueError:
            expected = _expected(annotations[key], known[key])
            raise UserError(f"{prefix}{key}={value}: expected {expected}") from None
    options = kind(**parsed)
    check_options(options, prefix)
    return options


def check_options(options: Any, prefix: str = "") -> None:
    """Compare every field with its range; None is always allowed.

    Args:
        prefix: of the key in the message, for example ``"optim."``.

    Raises:
        UserError: a value is out of range; names the key and the range.
    """
    for one in dataclasses.fields(options):
        value, allowed = getattr(options, one.name), one.metadata.get("range", Range())
        if value is not None and value not in allowed:
            expected = _expected(typing.get_type_hints(type(options))[one.name], one)
            hint = did_you_mean(str(value), allowed.choices)
            raise UserError(f"{prefix}{one.name}={value}: expected {expected}{hint}")


def _expected(annotation: Any, one: dataclasses.Field[Any]) -> str:
    """What a field takes, in words: ``a whole number, 1 or more``."""
    return ", ".join(filter(None, (_WORDS[_plain(annotation)], str(one.metadata.get("range", "")))))


def _plain(annotation: Any) -> Any:
    """``float`` of ``float | None``."""
    (plain,) = (one for one in typing.get_args(annotation) or (annotation,) if one is not types.NoneType)
    return plain


def _converted(annotation: Any, value: Any) -> Any:
    """``value`` as a bool, int, float or str, or None where there is none.

    Raises:
        ValueError: it is not one, or not finite.
    """
    kind = _plain(annotation)
    if value is None and kind is not annotation:
        return None
    text = str(value)
    if kind is bool and text.lower() not in ("true", "false"):
        raise ValueError
    converted = text.lower() == "true" if kind is bool else kind(text)
    if isinstance(converted, float) and not math.isfinite(converted):
        raise ValueError
    return converted
