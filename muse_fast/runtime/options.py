"""Settings: dataclasses whose fields declare their range, read from YAML and ``key=value``.

Precedence: the dataclass's defaults < the YAML file < ``key=value``. An unknown key and a value of the wrong
type or out of range raise an error that names the key. Values may name variables of the environment, see `expanded`,
and other settings as ``${section.key}``.

    @dataclass(frozen=True, kw_only=True, slots=True)
    class OptimConfig(Config):
        steps: int = setting(132_000, ge=1)
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import yaml
from omegaconf import BooleanNode, DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, InterpolationValidationError, OmegaConfBaseException

from muse_fast.errors import UserError, did_you_mean, require

_T = TypeVar("_T")
_Config = TypeVar("_Config", bound="Config")

Switch = bool | str
"""The type of a setting that is true or false, or ``auto``: the run decides. Declare it with ``choices=SWITCH``."""
AUTO: Switch = "auto"
SWITCH = (AUTO, True, False)

_EXPECTED = {
    bool: "true or false",
    Switch: "auto, true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list[int]: "whole numbers",
    list[float]: "numbers",
}
CONFIGS = Path(__file__).parents[1] / "configs"  # shipped with the package
_REFERENCES = "expected ${NAME} or ${oc.env:NAME} for a variable of the environment, ${section.key} for a setting"
MAX_SEED = 2**32 - 1  # of both numpy's and torch's generators
_VARIABLE = re.compile(r"\$(?:\{([A-Za-z_]\w*)\}|([A-Za-z_]\w*))")
_RANGE, _MAY_CHANGE, _BEFORE = "range", "may_change", "before"  # keys of a field's metadata


# -------------------------------------------------------------------------------------------------------- declaration


@dataclasses.dataclass(frozen=True, slots=True)
class Range:
    """The values that a setting may have, within all given bounds, which are named as in pydantic."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    multiple_of: int | None = None
    choices: Collection[Any] | None = None
    unit: str = ""

    def contains(self, value: Any) -> bool:
        """Whether the value is in the range; NaN is not in any range."""
        return (
            (self.choices is None or value in self.choices)
            and (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
            and (self.multiple_of is None or value % self.multiple_of == 0)
        )

    def __str__(self) -> str:
        """Describe the range for a message, such as ``a multiple of 16, 32 to 1024``."""
        if self.choices is not None:
            *others, last = self.words()
            return f"{', '.join(others)} or {last}" if others else last
        parts = [f"a multiple of {self.multiple_of}"] if self.multiple_of is not None else []
        low, high = self.ge, self.le
        if low is not None and high is not None:
            parts.append(f"{low} to {high}")
        elif low is not None:
            parts.append(f"{low} to below {self.lt}" if self.lt is not None else f"{low} or more")
        elif self.gt is not None:
            parts.append(f"above {self.gt}")
        if low is None and high is not None:
            parts.append(f"at most {high}")
        if low is None and self.lt is not None:
            parts.append(f"below {self.lt}")
        return ", ".join(parts) + (f" {self.unit}" if self.unit else "")

    def words(self) -> list[str]:
        """Return the choices as one types them."""
        return [str(choice).lower() if isinstance(choice, bool) else str(choice) for choice in self.choices or ()]


def setting(default: _T, *, may_change: bool = False, before: _T | None = None, **bounds: Any) -> _T:
    """Return a dataclass field with a range.

    Args:
        default: None if the setting is optional; None is never out of range.
        may_change: whether a run may continue with another value, because the setting changes what a run shows or how
            it computes, but not its numbers.
        before: what runs did before the setting existed, if that is not the default; see `recorded_settings`.
        bounds: see `Range`.
    """
    metadata = {_RANGE: Range(**bounds), _MAY_CHANGE: may_change, _BEFORE: before}
    field: _T = dataclasses.field(default=default, metadata=metadata)
    return field


class Config:
    """Base of settings dataclasses, which raises if a field is out of range."""

    __slots__ = ()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]  # subclasses are dataclasses
            value, allowed = getattr(self, field.name), field.metadata.get(_RANGE)
            require(not isinstance(value, float) or math.isfinite(value), field.name, value, "a finite number")
            if allowed is not None and value is not None and not allowed.contains(value):
                hint = did_you_mean(value, allowed.words()) if isinstance(value, str) else ""
                raise UserError(f"{field.name}={value}: expected {allowed}{hint}")
        self.check()

    def check(self) -> None:
        """Check that the fields fit together.

        Raises:
            UserError: they do not; the message begins with a field's name, to which `load_settings` adds the section.
        """


# ------------------------------------------------------------------------------------------------------------ reading


def load_settings(
    kind: type[_Config],
    path: str | Path | None = None,
    items: Sequence[str] | Mapping[str, Any] = (),
    *,
    prefix: str = "",
) -> _Config:
    """Read settings into a ``kind``.

    Args:
        path: a YAML file or the name of one shipped with the package, see `config_file`.
        items: ``key=value`` of a command line, or values by dotted key. The text of numbers, booleans and lists is
            parsed as in YAML; a text setting is used as it is.
        prefix: start of messages, such as ``consep: ``.

    Raises:
        UserError: no such file, bad YAML, unknown key (with the nearest known one), wrong type, out of range.
    """
    settings = OmegaConf.structured(kind())
    for node in (settings, *filter(OmegaConf.is_dict, settings.values())):
        OmegaConf.set_readonly(node, False)  # frozen dataclasses are read-only
    if path is not None:
        file = config_file(path)
        _set(settings, flatten(_read_yaml(file)), kind, f"{file}: ")
    _set(settings, (items if isinstance(items, Mapping) else key_values(items)).items(), kind, prefix)
    for name, section in settings.items():
        if OmegaConf.is_dict(section):  # first by itself: its messages do not contain its name
            _made(section, f"{prefix}{name}.")
    made = _made(settings, prefix)
    assert isinstance(made, kind)
    return made


def _made(settings: DictConfig, prefix: str) -> Any:
    try:
        return OmegaConf.to_object(settings)
    except UserError as error:
        raise UserError(f"{prefix}{error}") from None
    except OmegaConfBaseException as error:  # a value that names a setting of another type
        raise UserError(f"{prefix}{error.key}: {_first_line(error)}") from None


def expanded(text: str) -> str:
    """A text with the values of ``$NAME``, ``${NAME}`` and a leading ``~``, as a shell replaces them.

    A name that the environment lacks stays: files may have a ``$`` in their names, and ``${NAME}`` may be a setting.
    """
    return os.path.expanduser(_VARIABLE.sub(lambda name: os.environ.get(name[1] or name[2], name[0]), text))


def known_keys(kind: type[Config]) -> list[str]:
    """Return the dotted keys of all settings."""
    return list(_types(kind))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested dicts as (dotted key, value)."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def fixed_settings(settings: Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the settings that must not change when a run resumes, as (dotted key, value)."""
    for field in dataclasses.fields(settings):  # type: ignore[arg-type]  # subclasses are dataclasses
        value = getattr(settings, field.name)
        if isinstance(value, Config):
            yield from fixed_settings(value, f"{prefix}{field.name}.")
        elif not field.metadata.get(_MAY_CHANGE):
            yield f"{prefix}{field.name}", value


def recorded_settings(kind: type[Config], recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a checkpoint records, by dotted key, and what applied before later ones existed.

    Args:
        recorded: nested, as in the checkpoint; it may lack settings of ``kind``.
    """
    defaults = dict(flatten(dataclasses.asdict(kind())))  # type: ignore[call-overload]  # subclasses are dataclasses
    return {**defaults, **_before(kind), **dict(flatten(recorded))}


def _before(kind: type[Any], prefix: str = "") -> dict[str, Any]:
    values: dict[str, Any] = {}
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            values |= _before(hints[field.name], f"{prefix}{field.name}.")
        elif field.metadata.get(_BEFORE) is not None:
            values[f"{prefix}{field.name}"] = field.metadata[_BEFORE]
    return values


def config_file(name: str | Path) -> Path:
    """Return the YAML file that ``--config`` names: a path, or a file of `CONFIGS` without its suffix.

    Raises:
        UserError: it is neither; the message suggests the nearest name and lists them all.
    """
    shipped = {path.stem: path for path in sorted(CONFIGS.glob("*.yaml"))}
    if str(name) in shipped:
        return shipped[str(name)]
    if not Path(name).is_file():
        guess = did_you_mean(Path(name).stem, shipped) or "."
        raise UserError(f"no config file '{name}'{guess} Give a path or one of {', '.join(shipped)}")
    return Path(name)


def key_values(items: Sequence[str]) -> dict[str, str]:
    """Parse ``key=value`` items of a command line; the last value of a repeated key counts.

    Raises:
        UserError: an item does not have that form.
    """
    for item in items:
        if not all(item.partition("=")[:2]):
            raise UserError(f"'{item}': expected key=value, for example optim.lr=1e-3")
    return dict(item.split("=", 1) for item in items)


def split_list(text: str) -> list[str]:
    r"""Split a value with several names at its commas, leaving out empty ones; ``\,`` is a comma in a name."""
    return [name.replace(r"\,", ",") for name in re.split(r"(?<!\\),", text) if name]


def split_settings(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the arguments of a command line into ``key=value`` items and others, such as files."""
    settings = [item for item in arguments if re.match(r"[a-z_.]+=", item) and not Path(item).exists()]
    return settings, [item for item in arguments if item not in settings]


def split_source_options(items: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Split ``key=value`` items into options of a source, which begin with ``source.``, and others.

    Raises:
        UserError: an option does not have that form.
    """
    prefix = "source."
    options = key_values([item for item in items if item.startswith(prefix)])
    others = [item for item in items if not item.startswith(prefix)]
    return {key.removeprefix(prefix): value for key, value in options.items()}, others


def _set(settings: DictConfig, values: Iterable[tuple[str, Any]], kind: type[Config], origin: str = "") -> None:
    """Set ``values`` by their dotted keys; messages begin with ``origin``."""
    types = _types(kind)
    sections = {key.split(".")[0] for key in types if "." in key}
    for key, value in values:
        if key in sections and value in (None, {}):
            continue
        if key not in types:
            raise UserError(f"{origin}no setting '{key}'{_suggest(key, list(types))}")
        try:
            typed = expanded(value) if isinstance(value, str) else value
            if isinstance(typed, str) and types[key] is not str:
                typed = _read_value(typed)
            # OmegaConf accepts any number as a bool.
            if types[key] in (bool, Switch) and isinstance(typed, int | float) and typed not in (0, 1):
                raise ValueError
            if types[key] == Switch and typed != AUTO:  # OmegaConf would keep any text, such as "no"
                typed = BooleanNode(typed)._value()
            OmegaConf.update(settings, key, typed, merge=False)
            _check_value(OmegaConf.select(settings, key, throw_on_missing=True), types[key])
        except (OmegaConfBaseException, yaml.YAMLError, ValueError, RecursionError) as error:
            raise UserError(f"{origin}{key}={value}: {_problem(error, types[key])}") from None


def _check_value(value: Any, type_: Any) -> None:
    """Raise a ValueError, or an error of OmegaConf, if references led to a section or to a list of something else."""
    of = {list[int]: int, list[float]: int | float}.get(type_)
    if OmegaConf.is_dict(value) or OmegaConf.is_list(value) != (of is not None):
        raise ValueError
    numbers: Any = OmegaConf.to_container(value, resolve=True) if of is not None else []
    if of is not None and not all(isinstance(number, of) for number in numbers):
        raise ValueError


def _problem(error: Exception, type_: Any) -> str:
    if isinstance(error, InterpolationResolutionError) and not isinstance(error, InterpolationValidationError):
        return f"{_first_line(error)}; {_REFERENCES}"
    return _REFERENCES if type_ is str else f"expected {_EXPECTED[type_]}"


def _read_value(text: str) -> Any:
    return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[call-overload, index]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        loaded = OmegaConf.load(path)
    except Exception as error:  # the YAML parser's own errors share no base class with OmegaConf's
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(loaded, DictConfig):
        raise UserError(f"{path}: expected sections such as 'optim:' at the top level, got a list")
    return {str(key): value for key, value in OmegaConf.to_container(loaded).items()}  # type: ignore[union-attr]


def _types(kind: type[Any], prefix: str = "") -> dict[str, Any]:
    """Return the type of every setting, without ``| None``, by dotted key."""
    types: dict[str, Any] = {}
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            types |= _types(hint, f"{prefix}{field.name}.")
        else:
            types[f"{prefix}{field.name}"] = get_args(hint)[0] if type(None) in get_args(hint) else hint
    return types


def _suggest(key: str, known: list[str]) -> str:
    """Suggest the nearest known key, preferring keys with the same last part."""
    leaf = key.rsplit(".", 1)[-1]
    same_leaf = [name for name in known if name.rsplit(".", 1)[-1] == leaf]
    return did_you_mean(key, same_leaf or known) or f". Known: {', '.join(known)}"
