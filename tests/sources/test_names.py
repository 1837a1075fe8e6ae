"""Which slides are the same, by name and by content."""

from __future__ import annotations

from pathlib import Path

from muse_fast.sources.names import Names, SlidesSeen


def test_names_without_a_slide() -> None:
    listed = Names.of(["a.svs", "b", "TCGA-AA-0001-01Z", "TCGA-AA-0002-01Z"])
    assert listed.without(["b.tif", "TCGA-AA-0001-02A.x.svs"]) == ["TCGA-AA-0002-01Z", "a"]
    assert Names.of([]).without(["a"]) == []


def test_files_with_an_identity_are_compared_by_it(tmp_path: Path) -> None:
    seen = SlidesSeen()
    a, b, c = (tmp_path / name for name in "abc")  # are not read
    assert [seen.first(a, "1"), seen.first(b, "2"), seen.first(c, "1"), seen.first(a, "1")] == [a, b, a, a]


def test_files_without_an_identity_are_compared_by_their_bytes(tmp_path: Path) -> None:
    contents = {"a": b"12345", "b": b"123", "c": b"12346", "d": b"12345", "e": b"12346", "f": b""}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    seen = SlidesSeen()
    assert [seen.first(tmp_path / name, None).name for name in contents] == ["a", "b", "c", "a", "c", "f"]
    assert seen.first(tmp_path / "a", None).name == "a"


def test_one_spelling_of_accents_leaks_no_slide_written_in_the_other() -> None:
    composed, decomposed = Names.of(["L\u00e4sion 1.svs"]), Names.of(["La\u0308sion 1"])
    assert (composed & decomposed).slides == {"L\u00e4sion 1"}
    assert composed.reason("La\u0308sion 1") == "slide L\u00e4sion 1"
