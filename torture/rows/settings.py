"""U1: settings that are misspelt, of the wrong type or out of range."""

from __future__ import annotations

import dataclasses
import random
import string
from typing import Any

from muse_fast.config import PretrainConfig
from muse_fast.detection.config import FinetuneConfig
from muse_fast.errors import UserError
from muse_fast.runtime.options import flatten, known_keys, load_settings
from torture.harness import Outcome, Row, Scale, Tally

_LEAST_RIGHT = 0.95  # share of the hints


def one_edit(key: str, rng: random.Random) -> str:
    """Drop a letter of ``key``, swap it with its neighbour, or insert one."""
    letters = [i for i, c in enumerate(key) if c.isalpha()]
    i = rng.choice(letters)
    kind = rng.choice(["drop", "swap", "add"])
    if kind == "drop":
        return key[:i] + key[i + 1 :]
    if kind == "swap" and i + 1 < len(key) and key[i + 1].isalpha() and key[i] != key[i + 1]:
        return key[:i] + key[i + 1] + key[i] + key[i + 2 :]
    return key[:i] + rng.choice(string.ascii_lowercase) + key[i:]


def refusal(kind: type[Any], setting: str) -> str | None:
    """Return the error for a setting, or None if it is accepted."""
    try:
        load_settings(kind, None, [setting])
    except UserError as error:
        return str(error)
    return None


def bad_settings(scale: Scale) -> Outcome:
    """Try random edits of each key of both configurations, and values of another type."""
    tally, right, edits = Tally(), 0, 0
    for kind in (PretrainConfig, FinetuneConfig):
        known = known_keys(kind)
        for key, value in flatten(dataclasses.asdict(kind())):
            for typo in {one_edit(key, scale.rng) for _ in range(scale.of(10, 1))} - set(known):
                said = refusal(kind, f"{typo}=1")
                tally.add(said is not None and "no setting" in said, f"{typo}: {said}")
                right += f"did you mean '{key}'?" in (said or "")
                edits += 1
            others = _other_values(value)
            for bad in scale.rng.sample(others, min(len(others), scale.of(len(others), 1))):
                said = refusal(kind, f"{key}={bad}")
                tally.add(said is not None and key.split(".")[-1].partition("_")[0] in said, f"{key}={bad}: {said}")
    tally.add(right >= _LEAST_RIGHT * edits, f"only {right} of {edits} hints are correct")
    return tally.outcome(f"{right} of {edits} hints are correct")


def _other_values(value: Any) -> list[str]:
    """Return values of another type or out of any range. Strings have none: any text is a valid path."""
    if isinstance(value, bool):
        return ["maybe", "7"]
    if isinstance(value, int):
        return ["fast", "1.5", "nan", "-1", "[1, 2]", "null"]
    if isinstance(value, float):
        return ["fast", "nan", "-1", "inf", "-inf", "[1, 2]", "null"]
    return []


ROWS = [
    Row(
        "U1",
        "misspelt or invalid settings are refused, with a hint",
        "each key edited at random and set to other types: all refused, 95 % of the hints correct",
        bad_settings,
    )
]
