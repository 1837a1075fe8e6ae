import math
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest

from muse_fast.errors import UserError, require
from muse_fast.runtime.options import (
    Config,
    flatten,
    key_values,
    load_settings,
    recorded_settings,
    setting,
    split_list,
    split_settings,
    split_source_options,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class SideConfig(Config):
    low: float = setting(0.5, gt=0, le=2)
    high: float = setting(1.0, gt=0, unit="um")
    side: int = setting(64, multiple_of=16, ge=32, le=128)
    share: float = setting(0.1, ge=0, lt=1)
    kind: str = setting("plain", choices=("plain", "same", "both"))
    limit: int | None = setting(None, ge=1)
    folder: str = ""
    on: bool = True
    rate: float = 1.0
    k: list[int] = field(default_factory=lambda: [5])

    def check(self) -> None:
        require(self.low <= self.high, "low", self.low, f"at most high={self.high}")


@dataclass(frozen=True, kw_only=True, slots=True)
class WholeConfig(Config):
    seed: int = setting(0, ge=0)
    side: SideConfig = field(default_factory=SideConfig)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("low", 0, "above 0, at most 2"),
        ("low", 2.5, "above 0, at most 2"),
        ("low", 1.5, "at most high=1.0"),
        ("high", 0, "above 0 um"),
        ("side", 31, "a multiple of 16, 32 to 128"),
        ("side", 16, "a multiple of 16, 32 to 128"),
        ("share", 1, "0 to below 1"),
        ("kind", "sam", "plain, same or both; did you mean 'same'?"),
        ("limit", 0, "1 or more"),
        ("rate", math.nan, "a finite number"),
        ("low", -math.inf, "a finite number"),
    ],
)
def test_values_out_of_range_are_refused(key: str, value: Any, expected: str) -> None:
    with pytest.raises(UserError) as direct:
        SideConfig(**{key: float(value) if key in ("low", "high", "share") else value})
    text = str(float(value)) if key in ("low", "high", "share") else str(value)
    assert str(direct.value) == f"{key}={text}: expected {expected}"
    with pytest.raises(UserError) as read:
        load_settings(WholeConfig, None, {f"side.{key}": value})
    assert str(read.value) == f"side.{direct.value}"


@pytest.mark.parametrize("edge", [{"low": 2.0, "high": 2.0}, {"side": 32}, {"side": 128}, {"share": 0.0}, {"limit": 1}])
def test_the_ends_of_a_range_are_allowed(edge: dict[str, Any]) -> None:
    assert load_settings(SideConfig, None, edge) == SideConfig(**edge)


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ("side.side=1.5", "a whole number"),
        ("side.side=null", "a whole number"),
        ("side.limit=some", "a whole number"),
        ("side.rate=fast", "a number"),
        ("side.rate=[", "a number"),
        ("side.rate=???", "a number"),
        ("side.rate=${seed", "a number"),
        ("side.on=7", "true or false"),
        ("side.k=5,x", "whole numbers"),
        ("side.k=[5,x]", "whole numbers"),
    ],
)
def test_another_type_is_refused(item: str, expected: str) -> None:
    with pytest.raises(UserError) as error:
        load_settings(WholeConfig, None, [item])
    assert str(error.value) == f"{item}: expected {expected}"


def test_a_text_setting_is_used_as_it_is() -> None:
    for text in ("on", "007", "a: b", "x=1", "", "[1, 2]", "null", "1.50"):
        assert load_settings(WholeConfig, None, [f"side.folder={text}"]).side.folder == text


def test_text_of_other_types_is_parsed_as_in_yaml() -> None:
    read = load_settings(SideConfig, None, {"rate": "1e-3", "k": "[7, 8]", "on": "no", "limit": "null"})
    assert read == SideConfig(rate=1e-3, k=[7, 8], on=False, limit=None)


def test_an_error_in_a_file_names_it(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("side:\n  rate: fast\n")
    with pytest.raises(UserError, match=r"c\.yaml: side\.rate=fast: expected a number$"):
        load_settings(WholeConfig, file)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", []),
        ("a", ["a"]),
        ("a,b c,d", ["a", "b c", "d"]),
        (",a,,b,", ["a", "b"]),
        (r"a\,b,c", ["a,b", "c"]),
        (r"/x\,\,y,C:\z", ["/x,,y", "C:\\z"]),
    ],
)
def test_names_are_split_at_commas(text: str, names: list[str]) -> None:
    assert split_list(text) == names


def test_variables_and_the_home_folder_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("HOME", "/home/me"), ("RATE", "0.5"), ("SIDE", "96")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NOPE", raising=False)
    items = ["folder=$HOME/a/${RATE}", "rate=${oc.env:RATE}", "side=$SIDE", "low=${oc.env:NOPE,0.25}"]
    side = load_settings(SideConfig, None, items)
    assert (side.folder, side.rate, side.side, side.low) == ("/home/me/a/0.5", 0.5, 96, 0.25)
    file = tmp_path / "c.yaml"
    file.write_text("seed: 7\nside:\n  folder: ~/b/${seed}\n  rate: $RATE\n  k: ['${seed}']\n")
    assert load_settings(WholeConfig, file).side == SideConfig(folder="/home/me/b/7", rate=0.5, k=[7])
    assert load_settings(WholeConfig, file, ["seed=8"]).side.folder == "/home/me/b/8"
    for text in ("/a/$NOPE", "/a/b$", "a~", "~nobody_of_this_name/x"):  # may be files
        assert load_settings(SideConfig, None, {"folder": text}).folder == text


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("side.folder", "${NOPE}/rois", "Interpolation key 'NOPE' not found"),
        ("side.folder", "${oc.env:NOPE}", "Environment variable 'NOPE' not found"),
        ("side.rate", "${NOPE}", "Interpolation key 'NOPE' not found"),
        ("side.folder", "${side.folder}", "Recursive interpolation"),
        ("side.rate", "${side}", "Interpolation to parent node"),
        ("side.folder", "${x:y}", "Unsupported interpolation type x"),
        ("side.folder", "/a/${b", ""),
        ("side.kind", "${a b}", ""),
    ],
)
def test_a_reference_to_nothing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: str, problem: str
) -> None:
    monkeypatch.delenv("NOPE", raising=False)
    expected = rf"^{key}={re.escape(value)}: .*{problem}.*expected \$\{{NAME\}} or \$\{{oc.env:NAME\}} for a variable"
    with pytest.raises(UserError, match=expected):
        load_settings(WholeConfig, None, [f"{key}={value}"])
    file = tmp_path / "c.yaml"
    section, name = key.split(".")
    file.write_text(f"{section}:\n  {name}: '{value}'\n")
    with pytest.raises(UserError, match=rf"c\.yaml[: ](.*\n)*.*{key}"):
        load_settings(WholeConfig, file)


def test_a_reference_that_later_settings_break_is_refused_with_its_key(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("side:\n  folder: '7'\n  rate: ${side.folder}\n")
    assert load_settings(WholeConfig, file).side.rate == 7
    with pytest.raises(UserError, match=r"^side\.rate: .*Value 'x' .*could not be converted to Float"):
        load_settings(WholeConfig, file, ["side.folder=x"])


def test_arguments_are_split_into_settings_and_others(tmp_path: Path) -> None:
    file = str(tmp_path / "a=b.png")
    Path(file).touch()
    assert split_settings(["x", "lr=1", file, "optim.lr=2"]) == (["lr=1", "optim.lr=2"], ["x", file])
    assert split_source_options(["source.mpp=0.5", "lr=1", "source.folder=a=b"]) == (
        {"mpp": "0.5", "folder": "a=b"},
        ["lr=1"],
    )


@pytest.mark.parametrize("item", ["lr", "=1"])
def test_an_item_without_key_or_equals_is_refused(item: str) -> None:
    with pytest.raises(UserError, match=f"'{item}': expected key=value"):
        key_values([item])


@dataclass(frozen=True, kw_only=True, slots=True)
class LaterConfig(Config):
    side: SideConfig = field(default_factory=SideConfig)
    rule: str = setting("new", choices=("new", "old"), before="old")


@dataclass(frozen=True, kw_only=True, slots=True)
class OuterConfig(Config):
    inner: LaterConfig = field(default_factory=LaterConfig)
    clip: bool = setting(True, before=False)


def test_a_record_is_completed_by_what_applied_before_a_setting_existed() -> None:
    defaults = dict(flatten(asdict(OuterConfig())))
    assert (defaults["inner.rule"], defaults["inner.side.high"], defaults["clip"]) == ("new", 1.0, True)
    old = recorded_settings(OuterConfig, {"inner": {"side": {"low": 0.25}}})
    assert old == defaults | {"inner.side.low": 0.25, "inner.rule": "old", "clip": False}
    assert recorded_settings(OuterConfig, {"inner": {"rule": "new"}, "clip": True}) == defaults
