"""Searches of folders: links, circles, and what a Mac leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from muse_fast.runtime.folders import find_files, iter_files, subfolders


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """``top`` with two files, one of them deep, and ``elsewhere``, to which tests link."""
    for name in ("top/a.csv", "top/in/deep/b.csv", "elsewhere/c.csv", "elsewhere/more/d.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path / "top"


def found(tree: Path, pattern: str = "**/*") -> list[str]:
    return [path.relative_to(tree).as_posix() for path in find_files(tree, pattern)]


def test_linked_folders_and_files_are_found(tree: Path) -> None:
    (tree / "link").symlink_to(tree.parent / "elsewhere")
    (tree / "file.csv").symlink_to(tree.parent / "elsewhere" / "c.csv")
    assert found(tree) == ["a.csv", "file.csv", "in/deep/b.csv", "link/c.csv", "link/more/d.csv"]
    assert found(tree, "*/*.csv") == ["link/c.csv"]
    assert found(tree, "*/deep/?.csv") == ["in/deep/b.csv"]
    assert found(tree, "*.CSV") == []
    assert subfolders(tree) == [tree / "in", tree / "link"]


def test_a_folder_is_searched_once_however_many_links_lead_to_it(tree: Path) -> None:
    for name, target in (("1", "elsewhere"), ("2", "elsewhere/more"), ("3", "top/in"), ("4", "top"), ("5", ".")):
        (tree / name).symlink_to(tree.parent / target)
    (tree.parent / "elsewhere" / "more" / "back").symlink_to(tree)
    (tree / "in" / "deep" / "up").symlink_to("..")
    (tree / "itself").symlink_to("itself")
    assert found(tree) == ["1/c.csv", "1/more/d.csv", "a.csv", "in/deep/b.csv", "itself"]


def test_a_link_to_nowhere_is_a_file_so_that_it_is_reported(tree: Path) -> None:
    (tree / "lost.svs").symlink_to(tree / "absent.svs")
    assert found(tree, "*.svs") == ["lost.svs"]


def test_hidden_names_and_folders_of_systems_are_left_out(tree: Path) -> None:
    for name in ("._a.csv", ".hidden/x.csv", "__MACOSX/y.csv", "in/@eaDir/z.csv", "in/.DS_Store"):
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).touch()
    assert found(tree) == ["a.csv", "in/deep/b.csv"]
    assert found(tree, "*/*.csv") == []
    hidden = tree / ".hidden"
    assert find_files(hidden, "*") == [hidden / "x.csv"]  # a folder that the user names is searched
    assert list(iter_files(tree / "absent", "*")) == find_files(tree / "a.csv", "**/*") == []
