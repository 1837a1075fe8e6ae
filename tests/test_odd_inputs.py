"""Whatever a table or a setting contains: either it is read, or a UserError names it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from muse_fast.classification.tasks import TASKS
from muse_fast.config import PretrainConfig
from muse_fast.detection.config import FinetuneConfig
from muse_fast.detection.train_finder import TrainDetectorConfig
from muse_fast.errors import UserError
from muse_fast.images.mpp import read_mpp_file
from muse_fast.images.points_csv import read_bare_points, read_class_names, read_points
from muse_fast.images.tables import csv_rows, read_groups, read_rows, text_lines
from muse_fast.predicting.run import PredictConfig
from muse_fast.preparing.audit import read_names
from muse_fast.runtime.options import Config, _types, load_settings
from muse_fast.sources import source_kinds
from tests.support.tiny_datasets import DATASETS, build, opened


def refused(action: Callable[[], object]) -> str:
    """Return the message of the UserError, "" if there is none; any other error is raised."""
    try:
        action()
    except UserError as error:
        return str(error)
    return ""


# -------------------------------------------------------------------------------------------------------------- tables

TABLES: dict[str, Callable[[Path], object]] = {
    "csv": lambda path: list(csv_rows(path)),
    "lines": lambda path: list(text_lines(path)),
    "rows": lambda path: list(read_rows(path, ("image", "mpp"), others=True)),
    "mpp": read_mpp_file,
    "groups": read_groups,
    "names": lambda path: read_names(str(path)),
    "points": lambda path: read_points(path, 64, 64, 2),
    "bare points": lambda path: read_bare_points(path, 64, 64, range(2)),
    "class names": read_class_names,
}
HEADERS = ("image,mpp", "image,mpp,slide,split", "slide,group", "x,y", "x,y,label,score", "x,y,label,class")
PIECES = (
    "a", "a.tif", "0.5", "1", "-1", "nan", "1e400", "9" * 5_000, ",", ",,", ";", "\t", '"', '""', "\n", "\r", "\r\n",
    "\0", "\ufeff", "é", "\u0663", "\u2028", "'", "\\", "=1+1", "x" * 140_000,
)  # fmt: skip
FIRST = st.sampled_from([b"", *(f"{header}\n".encode() for header in HEADERS)])
CONTENTS = st.one_of(
    st.binary(max_size=40),
    st.builds(lambda head, parts: head + "".join(parts).encode(), FIRST, st.lists(st.sampled_from(PIECES), max_size=9)),
    st.builds(lambda head, tail: head.decode().encode("utf-16") + tail, FIRST, st.binary(max_size=5)),
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=CONTENTS)
def test_a_table_of_anything_is_read_or_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    for read in TABLES.values():
        message = refused(partial(read, path))
        assert not message or message.startswith(str(path))


def spoilt(content: bytes) -> Iterator[bytes]:
    """Yield variants of a table in which something is wrong, or at least unusual."""
    yield from (b"", b"\xff\xfe", b"\0", content[: len(content) // 2], content + b'"', b'"' + content)
    yield content.decode().encode("utf-16")
    yield b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n")
    last = content.splitlines()[-1] if content else b""
    yield from (content + row + b"\n" for row in (b"\xb5", b"\0", b"9" * 5_000, b"," * 20, b"x" * 140_000))
    yield from (content + row + b"\n" for row in (last.replace(b",", b";"), last + b",", b'"' + last))


@pytest.mark.parametrize("name", DATASETS)
def test_every_table_of_a_dataset_is_read_or_refused(tmp_path: Path, name: str) -> None:
    tiny = build(name, tmp_path)
    tables = [path for path in sorted(tmp_path.rglob("*")) if path.suffix in (".csv", ".txt", ".json", ".yaml")]
    for path in {(path.parent, path.suffix): path for path in tables}.values():  # one of each kind
        content = path.read_bytes()
        for variant in spoilt(content):
            path.write_bytes(variant)
            refused(lambda: list(opened(tiny)))
        path.write_bytes(content)
    assert len(list(opened(tiny))) == len(tiny.boxes)


# ------------------------------------------------------------------------------------------------------------ settings

VALUES = (
    "", "~", "~/x", "$HOME", "${HOME}", "${oc.env:HOME}", "${NOPE}", "${", "${}", "${a:b}", "$", "\\${x}", "???",
    "null", "nan", "1e400", "9" * 5_000, "[" * 2_000, "[1,", "{a: 1}", "!!python/name:os.system", "&a [*a]", "*a",
    "2020-13-45", "\0", "\ud800", "a=b", "yes",
)  # fmt: skip
SETTINGS: dict[str, type[Config]] = {
    "pretrain": PretrainConfig,
    "finetune": FinetuneConfig,
    "train_detector": TrainDetectorConfig,
    "predict": PredictConfig,
    **{f"evaluate {name}": task.config for name, task in TASKS.items()},
    **{f"prepare {name}": source.Options for name, source in source_kinds().items()},
}


@pytest.mark.parametrize("command", SETTINGS)
def test_a_setting_of_anything_is_read_or_refused_with_its_key(command: str) -> None:
    one_of_each_type = {str(type_): key for key, type_ in _types(SETTINGS[command]).items()}
    for key in one_of_each_type.values():
        for value in VALUES:
            message = refused(partial(load_settings, SETTINGS[command], None, {key: value}))
            assert not message or message.startswith(key)


@pytest.mark.parametrize("value", VALUES)
def test_a_yaml_file_of_anything_is_read_or_refused_by_name(tmp_path: Path, value: str) -> None:
    path = tmp_path / "c.yaml"
    where = ("{}", "seed: {}", "data:\n  roiset: {}", "data:\n  {}: 1", "data: [{}]", "views: {{blur: {}}}")
    for text in where:
        path.write_bytes(text.format(value).encode("utf-8", "surrogatepass"))
        refused(partial(load_settings, PretrainConfig, path))
