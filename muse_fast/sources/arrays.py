"""Arrays of datasets: ``.npy`` and ``.mat`` files, read without running code from them, and instance maps.

In an instance map every nucleus has its own number. numpy stores arrays of numbers as bytes and anything else as a
pickle, which is a program. Arrays are mapped with pickles disabled. The one pickle that datasets use, a mapping of
names to arrays of numbers, is read with the standard library's disassembler: only the instructions that build such a
mapping are followed, and nothing is imported or called.
"""

from __future__ import annotations

import pickletools
import re
import struct
import zlib
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


# ----------------------------------------------------------------------------------------------------- instance maps


def instance_centroids(instances: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Ascending numbers ``[n]`` and centroids ``[n, 2]`` (x, y) of the instances of a map ``[H, W]``; 0 is background.

    Pixel centres are at half pixels: an instance that is only the first pixel is at 0.5, 0.5.
    """
    rows, columns = np.nonzero(instances)
    numbers, index = np.unique(instances[rows, columns], return_inverse=True)
    sums = [np.bincount(index, axis, len(numbers)) for axis in (columns, rows)]
    return numbers.astype(np.int64), np.stack(sums, axis=1) / np.bincount(index, minlength=len(numbers))[:, None] + 0.5


def instance_types(
    instances: NDArray[np.integer], types: NDArray[np.integer], numbers: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The most common type ``[n]`` in each instance, from a map of types ``[H, W]``; 0 if all its pixels are 0."""
    inside = instances > 0
    index = np.searchsorted(numbers, instances[inside])
    width = int(types.max(initial=0)) + 1
    votes = np.bincount(index * width + types[inside], minlength=len(numbers) * width).reshape(-1, width)
    votes[:, 0] = 0  # background cut into the instance
    return votes.argmax(axis=1)


def integer_map(values: NDArray[Any], shape: tuple[int, ...], highest: int, where: str) -> NDArray[np.int64]:
    """``values`` as integers from 0 to ``highest``; public datasets store them as floats.

    Raises:
        UserError: another shape, or a value that is not such an integer; the message begins with ``where``.
    """
    if values.shape != shape:
        raise UserError(f"{where} has the shape {list(values.shape)}, expected {list(shape)}")
    if (
        values.dtype.kind not in "fiub"
        or not ((values >= 0) & (values <= highest) & (values == np.floor(values))).all()
    ):
        raise UserError(f"{where} contains {_extremes(values)}, expected whole numbers from 0 to {highest}")
    return values.astype(np.int64)


def _extremes(values: NDArray[Any]) -> str:
    if values.dtype.kind not in "fiub" or values.size == 0:
        return str(values.dtype)
    return f"{values.dtype} from {values.min():g} to {values.max():g}"


def read_mat(path: Path, needed: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict[str, NDArray[Any]]:
    """The arrays of a MATLAB file by name. No code in the file is run.

    Raises:
        UserError: damaged, not a MATLAB file, or an array is missing; names the file.
    """
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        content = loadmat(path, variable_names=[*needed, *optional])
    except NotImplementedError as error:
        raise UserError(f"{path}: MATLAB 7.3, expected version 7 or older; save it with '-v7'") from error
    except (MatReadError, OSError, EOFError, ValueError, TypeError, IndexError, zlib.error, struct.error) as error:
        raise UserError(f"{path}: not a readable MATLAB file ({error})") from error
    if missing := [name for name in needed if name not in content]:
        raise UserError(f"{path}: {', '.join(missing)} missing, expected {', '.join(needed)}")
    return {name: content[name] for name in (*needed, *optional) if name in content}
