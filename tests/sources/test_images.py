"""``images:``: folders of plain images whose nuclei are detected."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from muse_fast import prepare
from muse_fast.errors import UserError
from muse_fast.finders.learned import load_finder
from muse_fast.images.synthetic import synthetic_image
from muse_fast.roiset.roiset import RoiSet
from muse_fast.runtime.cli import run
from muse_fast.sources import open_source

main = partial(run, prepare.main)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Three images in two folders: 0.5, 0.5 and 0.25 um/px."""
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    second.mkdir()
    for i, (folder, mpp) in enumerate(((first, 0.5), (first, 0.5), (second, 0.25))):
        Image.fromarray(synthetic_image(i, round(100 / mpp), mpp)[0]).save(folder / f"field{i}.png")
    (second / "mpp.csv").write_text("image,mpp,slide,split\nfield2.png,0.25,S2,val\n")
    (first / "notes.txt").write_text("not an image")
    return first, second


def test_detections_of_two_folders(folders: tuple[Path, Path]) -> None:
    first, second = folders
    (first / "mpp.csv").write_text("image,mpp\nfield0.png,0.5\nfield1.png,0.5\n")
    source = open_source(f"images:{first},{second}")
    assert len(source) == 3  # type: ignore[arg-type]
    items = list(source)
    assert [(item.name, item.slide, item.split, item.mpp) for item in items] == [
        ("field0.png", "field0", "", 0.5),
        ("field1.png", "field1", "", 0.5),
        ("field2.png", "S2", "val", 0.25),
    ]
    assert list(source.slides()) == [("field0", ""), ("field1", ""), ("S2", "val")]
    for item in items:
        found = load_finder("default")(item.image, item.mpp)
        np.testing.assert_array_equal(item.xy, found.xy)
        np.testing.assert_array_equal(item.score, found.score)
        assert item.label is None and len(found) > 20


def test_a_comma_in_the_name_of_a_folder(folders: tuple[Path, Path]) -> None:
    first, second = folders
    odd = first.rename(first.with_name("a, old"))
    with pytest.raises(UserError, match=r"a is not a folder; expected .* \(a comma in a name is written \\,\)"):
        open_source(f"images:{odd},{second}", mpp=0.5)
    source = open_source(f"images:{str(odd).replace(',', chr(92) + ',')},{second}", mpp=0.5)
    assert list(source.slides()) == [("field0", ""), ("field1", ""), ("S2", "val")]


def test_options(folders: tuple[Path, Path]) -> None:
    spec = f"images:{folders[0]}"
    (first, _) = open_source(spec, mpp=0.5, detector="classical")
    np.testing.assert_array_equal(first.xy, load_finder("classical")(first.image, 0.5).xy)
    fewer = next(iter(open_source(spec, mpp=0.5, threshold=0.6, min_nuclei=0)))
    assert len(fewer.xy) < len(next(iter(open_source(spec, mpp=0.5))).xy)
    source = open_source(spec, mpp=0.5, min_nuclei=1000)
    assert list(source) == [] and source.dropped == {"too few nuclei": 2}


def test_mistakes(folders: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = folders
    with pytest.raises(UserError, match=r"field0.png: um per pixel unknown; give mpp=NUMBER"):
        open_source(f"images:{first}")
    with pytest.raises(UserError, match="nowhere is not a folder"):
        open_source(f"images:{second},{tmp_path / 'nowhere'}")
    with pytest.raises(UserError, match=r"no setting 'detektor'.*did you mean 'detector'"):
        open_source(f"images:{second}", detektor="classical")
    with pytest.raises(UserError, match=r"detector=clasical: .*did you mean 'classical'"):
        open_source(f"images:{second}", detector="clasical")
    with pytest.raises(UserError, match=r"field0.png: 2 um/px is too coarse"):
        list(open_source(f"images:{first}", mpp=2))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty contains no images"):
        open_source(f"images:{tmp_path / 'empty'}")
    Image.new("RGB", (9, 9)).save(second / "field0.jpg")
    with pytest.raises(UserError, match=r"field0.jpg: .*a/field0.png has the same stem"):
        open_source(f"images:{first},{second}", mpp=0.5)


def test_prepare(folders: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "rois"
    assert main([f"images:{folders[1]}", str(out)]) == 0
    rois = RoiSet(out)
    assert len(rois) == 1
    assert (out / "contact.png").is_file()
