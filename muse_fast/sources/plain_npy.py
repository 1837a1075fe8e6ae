"""Read ``.npy`` files without running code from them.

numpy stores arrays of numbers as bytes and anything else as a pickle, which is a program. Arrays are mapped with
pickles disabled. The one pickle that datasets use, a mapping of names to arrays of numbers, is read with the standard
library's disassembler: only the instructions that build such a mapping are followed, and nothing is imported or called.
"""

from __future__ import annotations

import pickletools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from muse_fast.errors import UserError


def map_npy(path: Path) -> NDArray[Any]:
    """The array of a file, mapped read-only.

    Raises:
        UserError: missing, truncated, not a ``.npy``, or a pickle; names the file.
    """
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{path}: not a readable array of numbers ({error})") from error


def read_npy_mapping(path: Path, names: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    """The arrays ``names`` of a file that ``np.save(path, {name: array, ...})`` wrote.

    Raises:
        UserError: damaged, or contains anything but such a mapping; names the file.
    """
    try:
        with open(path, "rb") as file:
            version = npy.read_magic(file)
            reader = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, _, dtype = reader(file)
            if shape != () or dtype.kind != "O":
                raise ValueError(f"an array of {dtype} {list(shape)}")
            content = _array(_build(file))
        if not isinstance(content, dict):
            raise ValueError(f"a pickle of {_name_of(content)}")
        return {name: _array(content[name]) for name in names}
    except (OSError, EOFError, ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise UserError(f"{path}: {reason}; expected a mapping of {', '.join(names)} to arrays of numbers") from error


@dataclass(slots=True)
class _Call:
    """A call in a pickle; it is never made."""

    function: str
    arguments: Any
    state: Any = None


_LITERALS = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_IGNORED = frozenset(("PROTO", "FRAME", "STOP"))
_MARK = object()


def _build(file: BinaryIO) -> Any:
    """The object that a pickle describes, with a ``_Call`` in place of every call."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    argument: Any
    for opcode, argument, _ in pickletools.genops(file):
        match opcode.name:
            case name if name in _LITERALS:
                stack.append(argument)
            case name if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "MARK":
                stack.append(_MARK)
            case "TUPLE":
                stack.append(tuple(_pop_to_mark(stack)))
            case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                stack[-int(name[-1]) :] = [tuple(stack[-int(name[-1]) :])]
            case "APPEND":
                item = stack.pop()
                stack[-1].append(item)
            case "APPENDS":
                items = _pop_to_mark(stack)
                stack[-1].extend(items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                stack[-1][key] = value
            case "SETITEMS":
                items = _pop_to_mark(stack)
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            case "GLOBAL":
                stack.append(_Call(argument.replace(" ", "."), None))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_Call(f"{module}.{name}", None))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_Call(function.function, arguments))
            case "BUILD":
                state = stack.pop()
                stack[-1].state = state
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case name if name not in _IGNORED:
                raise ValueError(f"a pickle with the instruction {name}")
    return stack.pop()


def _pop_to_mark(stack: list[Any]) -> list[Any]:
    place = len(stack) - 1
    while stack[place] is not _MARK:
        place -= 1
    items = stack[place + 1 :]
    del stack[place:]
    return items


def _array(call: Any) -> Any:
    """The array that a call would rebuild; for an array of one object, that object."""
    if not isinstance(call, _Call) or not re.fullmatch(r"numpy\.(_?core\.)?multiarray\._reconstruct", call.function):
        raise ValueError(f"a pickle of {_name_of(call)}")
    _, shape, kind, fortran, data = call.state
    name = kind.arguments[0]
    if kind.function != "numpy.dtype" or not re.fullmatch(r"[biuf][1248]|O8?", name):
        raise ValueError(f"an array of {name!r}")
    if name[0] == "O":
        (content,) = data
        return content
    order = kind.state[1] if kind.state[1] in "<>" else "="
    return np.frombuffer(data, np.dtype(order + name)).reshape(shape, order="F" if fortran else "C")


def _name_of(value: Any) -> str:
    return value.function if isinstance(value, _Call) else type(value).__name__
