"""Settings as dataclasses: what is parsed, what is refused, and how a range reads."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pytest

from muse_fast.errors import UserError
from muse_fast.runtime.options import Range, check_options, parse_options, setting


@dataclass(frozen=True, slots=True)
class Options:
    name: str = ""
    size: int = setting(64, ge=32, le=8192)
    mpp: float | None = setting(None, gt=0, lt=5)
    merge: str = setting("yes", choices=("yes", "no"))
    flip: bool = True


def test_text_and_values_become_what_the_fields_are() -> None:
    assert parse_options(Options, {}) == Options()
    text = {"name": "no", "size": "8192", "mpp": "0.25", "merge": "no", "flip": "false"}
    expected = Options("no", 8192, 0.25, "no", False)
    assert parse_options(Options, text) == parse_options(Options, {**text, "mpp": 0.25, "flip": False}) == expected
    assert parse_options(Options, {"mpp": None, "name": "1_0,[a"}) == Options(name="1_0,[a")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sise": 64}, "here: no option 'sise' among name, size, mpp, merge, flip; did you mean 'size'?"),
        ({"size": "64.5"}, "here: size=64.5: expected a whole number, 32 to 8192"),
        ({"size": 8193}, "here: size=8193: expected a whole number, 32 to 8192"),
        ({"mpp": "0"}, "here: mpp=0.0: expected a number, above 0 to below 5"),
        ({"mpp": "nan"}, "here: mpp=nan: expected a number, above 0"),
        ({"mpp": "-inf"}, "here: mpp=-inf: expected a number, above 0"),
        ({"mpp": "fine"}, "here: mpp=fine: expected a number, above 0"),
        ({"merge": "nö"}, "here: merge=nö: expected yes or no; did you mean 'no'?"),
        ({"flip": "1"}, "here: flip=1: expected true or false"),
        ({"size": None}, "here: size=None: expected a whole number"),
    ],
)
def test_a_mistake_names_key_value_and_what_was_expected(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        parse_options(Options, values, "here: ")


def test_an_object_is_checked_with_its_section_before_the_key() -> None:
    check_options(Options(mpp=4.9, size=32))
    with pytest.raises(UserError, match=r"^data\.mpp=5: expected a number, above 0 to below 5$"):
        check_options(Options(mpp=5), "data.")


@pytest.mark.parametrize(
    ("allowed", "words", "inside", "outside"),
    [
        (Range(ge=1), "1 or more", (1, 9), (0.9,)),
        (Range(gt=0), "above 0", (1e-9,), (0, -1)),
        (Range(le=2**32 - 1), "at most 4294967295", (2**32 - 1,), (2**32,)),
        (Range(lt=1), "below 1", (0.9,), (1,)),
        (Range(ge=0, lt=1), "0 to below 1", (0, 0.99), (-0.01, 1)),
        (Range(choices=("a", "b", "c")), "a or b or c", ("a", "c"), ("", "ab")),
    ],
)
def test_ranges(allowed: Range, words: str, inside: tuple[Any, ...], outside: tuple[Any, ...]) -> None:
    assert str(allowed) == words
    assert all(value in allowed for value in inside) and not any(value in allowed for value in outside)
