"""The source ``wsi:``: usable slides, their tables and files, and nuclei that do not depend on the grid."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from muse_fast.errors import UserError
from muse_fast.finders.classical import detect_nuclei
from muse_fast.sources import SourceImage, open_source
from muse_fast.sources.cut import Cut, CutSettings, SlideFile, survey
from muse_fast.sources.names import Names
from muse_fast.sources.wsi import Slides, usable_cpus
from tests.support.dicom import write_series
from tests.support.small_slides import damage, page_with_tissue, write_slide

EVERYTHING = {"roi_um": 100, "min_tissue": 0, "min_nuclei": 0}


@pytest.fixture(scope="module")
def tissue() -> np.ndarray:
    return page_with_tissue()


@pytest.fixture
def slide(tmp_path: Path, tissue: np.ndarray) -> Path:
    return write_slide(tmp_path / "slide.tif", tissue)


def opened(path: Path, **options: object) -> Slides:
    """With the classical detector, which is quicker than the default."""
    source = open_source(f"wsi:{path}", **{"detector": "classical", **options})
    assert isinstance(source, Slides)
    return source


# --------------------------------------------------------------------------------------------------- um per pixel


def test_mpp_comes_from_table_then_option_then_header(slide: Path, tmp_path: Path) -> None:
    def first(**options: object) -> SourceImage:
        return next(iter(opened(slide.parent, roi_um=128, **options)))

    assert first().mpp == 0.5
    assert first(mpp=0.45).mpp == 0.45
    table = slide.parent / "mpp.csv"
    for name in ("slide.tif", "slide"):
        table.write_text(f"image,mpp,slide,split\n{name},0.55,S1,val\n")
        item = first(mpp=0.45)
        assert (item.mpp, item.slide, item.split) == (0.55, "S1", "val")
    other = tmp_path / "other.csv"
    other.write_text("image,mpp\nslide.tif,0.6\nabsent.tif,0.3\n")
    assert first(mpp_csv=str(other)).mpp == 0.6
    table.write_text("image,mpp\nabsent.tif,0.3\n")
    assert first(mpp=0.45).mpp == 0.45


def test_rows_for_slides_in_subfolders(tmp_path: Path, tissue: np.ndarray) -> None:
    write_slide(tmp_path / "one" / "a.tif", tissue[:300, :300], None)
    write_slide(tmp_path / "two" / "b.tif", tissue[:300, :300], None)
    (tmp_path / "mpp.csv").write_text("image,mpp\none/a.tif,0.4\nb.tif,0.3\n")
    assert [(file.mpp, file.mpp_from) for file in opened(tmp_path).files] == [(0.4, "mpp.csv"), (0.3, "mpp.csv")]


# ------------------------------------------------------------------------------------- slides that cannot be used


def test_bad_slides_do_not_stop_the_others(slide: Path, tissue: np.ndarray) -> None:
    folder = slide.parent
    write_slide(folder / "nothing.tif", tissue[:300, :300], None)
    (folder / "broken.svs").write_bytes(b"not a slide")
    write_slide(folder / "within" / "slide.tif", tissue[:300, :300])
    source = opened(folder, roi_um=100)
    assert {item.slide for item in source} == {"slide"}
    reasons = {path.relative_to(folder).as_posix(): reason for path, reason in source.refused.items()}
    assert set(reasons) == {"nothing.tif", "broken.svs", "within/slide.tif"}
    assert reasons["broken.svs"].startswith("OpenSlide cannot read it")
    assert reasons["nothing.tif"].startswith("the header does not give um per pixel; give mpp=NUMBER")
    assert "slide.tif has the same name" in reasons["within/slide.tif"]


def test_all_reasons_are_listed_when_no_slide_can_be_used(tmp_path: Path, tissue: np.ndarray) -> None:
    write_slide(tmp_path / "nothing.tif", tissue[:300, :300], None)
    (tmp_path / "broken.svs").write_bytes(b"not a slide")
    with pytest.raises(UserError) as caught:
        list(opened(tmp_path))
    lines = str(caught.value).splitlines()
    assert lines[0] == "no slide can be used"
    assert lines[1].startswith(f"  {tmp_path / 'broken.svs'}: OpenSlide cannot read it")
    assert lines[2].startswith(f"  {tmp_path / 'nothing.tif'}: the header does not give")


def test_a_roi_too_large_to_hold_is_refused(slide: Path) -> None:
    with pytest.raises(UserError, match=r"slide.tif: roi_um=4096 is 40960 px, expected at most 16384"):
        list(opened(slide, mpp=0.1, roi_um=4096))


def test_excluded_slides(tmp_path: Path, tissue: np.ndarray) -> None:
    for name in ("TCGA-AA-0001-01Z-00-DX1.8F3A.tif", "TCGA-AA-0002-01Z-00-DX1.tif", "case.tif", "other.tif"):
        write_slide(tmp_path / "in" / name, tissue[:300, :300])
    source = opened(tmp_path / "in")
    source.exclude({"one": Names.of(["TCGA-AA-0001-01A-01-TS1", "TCGA-AA-0002-01Z-00-DX1"]), "two": Names.of(["case"])})
    assert [slide for slide, _ in source.slides()] == ["other"]
    assert list(source.excluded.values()) == [
        "patient TCGA-AA-0001 is also in one",
        "slide TCGA-AA-0002-01Z-00-DX1 is also in one",
        "slide case is also in two",
    ]
    with pytest.raises(UserError, match=r"no slide can be used\n(.*\n)+.*other.tif: slide other is also in three"):
        source.exclude({"three": Names.of(["other"])})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_group": 3}, "per_group=3: expected groups=FILE"),
        ({"groups": "absent.csv"}, "absent.csv: no such file"),
        ({"tissue": "absent"}, "tissue=absent: expected a folder"),
        ({"exclude": "absent"}, "wsi: no setting 'exclude'"),  # only `prepare` accepts it
        ({"mpp_csv": "absent.csv"}, "absent.csv: no such file"),
        ({"per_slide": 0}, "per_slide=0: expected 1 to"),
    ],
)
def test_options_that_are_refused(slide: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        opened(slide, **options)


def test_groups(tmp_path: Path, tissue: np.ndarray) -> None:
    for name in ("a", "b", "c"):
        write_slide(tmp_path / f"{name}.tif", tissue[:300, :300])
    table = tmp_path / "groups.csv"
    table.write_text("slide,group\na,BRCA\nb.tif,LUAD\n")
    source = opened(tmp_path, groups=str(table))
    assert [(file.name, file.group) for file in source.files] == [("a", "BRCA"), ("b", "LUAD")]
    assert list(source.refused.values()) == [f"not listed in groups={table}"]
    table.write_text("slide,group\na,BRCA\na,LUAD\n")
    with pytest.raises(UserError, match=r"groups.csv, row 3: a is also in the group BRCA"):
        opened(tmp_path, groups=str(table))


# ------------------------------------------------------------------------------- one slide in several files, copies


def test_the_files_of_a_series_are_read_once(tmp_path: Path, tissue: np.ndarray) -> None:
    first = write_series(tmp_path / "in", "a", tissue[:300, :300], 0.5)
    other = write_series(tmp_path / "in", "b", tissue[300:600, 300:600], 0.5, number=2)
    (tmp_path / "in" / "mpp.csv").write_text("image,mpp,split\na-1,0.25,train\n")
    source = opened(tmp_path / "in")
    assert [(file.name, file.mpp) for file in source.usable(source.files)] == [("a-1", 0.25), ("b-0", None)]
    assert source.repeated == {
        first[0]: f"the same slide as {first[1]}",
        first[2]: f"the same slide as {first[1]}",
        other[1]: f"the same slide as {other[0]}",
        other[2]: f"the same slide as {other[0]}",
    }
    source = opened(tmp_path / "in")
    source.exclude({"tested": Names.of(["b-2"])})
    assert [file.name for file in source.usable(source.files)] == ["a-1"]
    assert source.excluded[other[0]] == source.excluded[other[1]] == f"the same slide as {other[2]}"


def test_copies_in_two_splits_are_refused(tmp_path: Path, tissue: np.ndarray) -> None:
    paths = [write_slide(tmp_path / f"{name}.tif", tissue[:300, :300]) for name in "abc"]
    table = tmp_path / "mpp.csv"
    table.write_text("image,mpp,split\na,0.5,train\nc,0.5,test\n")
    source = opened(tmp_path)
    with pytest.raises(UserError, match=r"c.tif is the same slide as .*a.tif, but split is 'test' and 'train'"):
        source.usable(source.files)
    table.write_text("image,mpp,split\nb,0.5,train\nc,0.5,train\n")
    source = opened(tmp_path)
    assert [file.path for file in source.usable(source.files)] == paths[1:2]
    assert set(source.repeated) == {paths[0], paths[2]}


# -------------------------------------------------------------------------------------- what the user gave in vain


def test_rows_and_files_that_belong_to_no_slide_are_named(tmp_path: Path, tissue: np.ndarray) -> None:
    folder = tmp_path / "in"
    for name in ("a", "deep/b"):
        write_slide(folder / f"{name}.tif", tissue[:300, :300])
    for name in ("nuclei/a.csv", "nuclei/b.csv", "nuclei/c.csv", "tissue/a.png", "tissue/._a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (folder / "mpp.csv").write_text("image,mpp\na.svs,0.5\nb,0.5\n")
    (folder / "deep" / "mpp.csv").write_text("image,mpp\nb,0.4\n")
    (tmp_path / "groups.csv").write_text("slide,group\na,A\nb,B\nB,A\n")
    given = {name: str(tmp_path / name) for name in ("nuclei", "tissue")}
    source = opened(folder, groups=str(tmp_path / "groups.csv"), **given)
    source.exclude({"tested": Names.of(["x", "y"])})
    assert [(file.name, file.mpp) for file in source.files] == [("a", None), ("b", 0.4)]
    assert source.without_effect == [
        f"{folder / 'mpp.csv'}: 2 of 2 rows match no slide or image: a.svs (row 2), b (row 3)",
        f"{tmp_path / 'groups.csv'}: 1 of 3 rows match no slide or image: B (row 4)",
        f"{tmp_path / 'nuclei'}: 1 of 3 files match no slide or image: c.csv",
        "exclude=tested: 2 of 2 slides match no slide or image: x, y",
    ]


# ------------------------------------------------------------------------------------------ the user's own files


def test_tables_and_files_in_the_other_spelling_of_accents(tmp_path: Path, tissue: np.ndarray) -> None:
    """A Mac writes a letter and its accent as two characters, most others as one; the names look the same."""
    composed, decomposed = "L\u00e4sion", "La\u0308sion"
    for there, here in ((composed, decomposed), (decomposed, composed)):
        folder = tmp_path / here
        write_slide(folder / f"{here}.tif", tissue[:300, :700], 0.5)
        (folder / "mpp.csv").write_text(f"image,mpp\n{there}.tif,0.25\n")
        (tmp_path / "groups.csv").write_text(f"slide,group\n{there},a\n")
        own = folder / "own"
        own.mkdir()
        (own / f"{there}.CSV").write_text("x,y\n9,9\n")
        source = opened(folder, groups=tmp_path / "groups.csv", nuclei=own)
        (file,) = source.files
        assert (file.mpp, file.group, file.nuclei) == (0.25, "a", own / f"{there}.CSV")
        assert source.without_effect == []
        with pytest.raises(UserError, match="no slide can be used"):
            source.exclude({"test": Names.of([there])})


def test_own_nuclei_replace_the_detector(slide: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cells"
    folder.mkdir()
    rng = np.random.default_rng(0)
    points = rng.uniform((300, 40), (1300, 1000), (400, 2)).round(1)
    (folder / "slide.csv").write_text("x,y,label\n" + "".join(f"{x},{y},1\n" for x, y in points))
    items = list(opened(slide, **EVERYTHING, nuclei=str(folder), labels="a,b"))
    together = np.concatenate([item.xy + item.origin for item in items])
    inside = points[(points < [1400, 1000]).all(axis=1)].astype(np.float32)
    np.testing.assert_allclose(np.sort(together[:, 0]), np.sort(inside[:, 0]), atol=1e-3)
    assert all(item.label is not None and (item.label == 1).all() for item in items)
    few = opened(slide, roi_um=100, min_tissue=0, nuclei=str(folder))
    assert all(len(item.xy) >= 20 for item in few) and few.dropped["too few nuclei"] > 10

    write_slide(slide.parent / "without.tif", page_with_tissue(1)[:300, :300])
    source = opened(slide.parent, nuclei=str(folder))
    assert [file.name for file in source.files] == ["slide"]
    assert "has no file without with suffix .csv" in source.refused[slide.parent / "without.tif"]
    (folder / "slide.csv").write_text("x,y\n2000,3\n")
    source = opened(slide, nuclei=str(folder))
    assert list(source) == []
    assert "slide.csv, row 2: x is '2000'" in source.refused[slide]


def test_own_geojson_of_one_multipolygon(tmp_path: Path, tissue: np.ndarray) -> None:
    """One nucleus in two parts, or two nuclei; other objects are counted."""
    slide = write_slide(tmp_path / "slides" / "slide.tif", tissue[:300, :300])
    squares = [[[[x, 20], [x + 10, 20], [x + 10, 30], [x, 30], [x, 20]]] for x in (40, 80)]
    two = {"type": "Feature", "geometry": {"type": "MultiPolygon", "coordinates": squares}}
    core = {"type": "Feature", "geometry": two["geometry"], "properties": {"objectType": "tmaCore"}}
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "slide.geojson").write_text(json.dumps([two, core]))
    for multi, expected in (("one", [[65, 25]]), ("each", [[45, 25], [85, 25]])):
        source = opened(slide, **EVERYTHING, nuclei=str(tmp_path / "cells"), multi=multi)
        assert np.concatenate([item.xy for item in source]).tolist() == expected
        assert source.dropped["TMA core"] == 1


def outline(left: float, top: float, right: float, bottom: float, kind: str, name: str = "") -> dict:
    ring = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
    properties = {"objectType": kind} | ({"classification": {"name": name}} if name else {})
    return {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": properties}


def test_other_objects_beside_own_nuclei(tmp_path: Path, tissue: np.ndarray) -> None:
    """With regions, TMA cores, a cell beyond the edge, or gzipped, the nuclei are the same, and the rest is counted."""
    slide = write_slide(tmp_path / "slides" / "slide.tif", tissue[:400, :400])
    places = np.random.default_rng(0).uniform(10, 390, (40, 2)).round(1).tolist()
    cells = [outline(x - 4, y - 4, x + 4, y + 4, "detection", "AB"[i % 2]) for i, (x, y) in enumerate(places)]
    region, core = outline(0, 0, 400, 400, "annotation", "Region"), outline(100, 100, 300, 300, "tmaCore")
    beyond = outline(396, 50, 406, 58, "detection", "A")
    variants = {
        "plain": (cells, {}),
        "beside": ([region, core, *cells], {"annotation beside detections": 1, "TMA core": 1}),
        "beyond": ([*cells, beyond], {"nucleus outside the slide": 1}),
        "gzip": (cells, {}),
    }
    for name, (features, dropped) in variants.items():
        (tmp_path / name).mkdir()
        text = json.dumps({"type": "FeatureCollection", "features": features})
        if name == "gzip":
            (tmp_path / name / "slide.geojson.gz").write_bytes(gzip.compress(text.encode()))
        else:
            (tmp_path / name / "slide.geojson").write_text(text)
        source = opened(slide, **EVERYTHING | {"roi_um": 200}, nuclei=str(tmp_path / name), labels="A,B")
        (item,) = source
        np.testing.assert_allclose(item.xy, places, atol=1e-3)
        assert item.label is not None and item.label.tolist() == [0, 1] * 20
        assert source.dropped == dropped
    (tmp_path / "gzip" / "slide.csv").write_text("x,y\n")
    with pytest.raises(UserError, match=r"both .*slide.csv and slide.geojson.gz exist; keep one"):
        opened(slide, nuclei=str(tmp_path / "gzip"))


def test_own_tissue_of_qupath(slide: Path, tmp_path: Path) -> None:
    """``Ignore*`` and TMA cores are not tissue."""
    tissue, ignored = (
        outline(0, 0, 500, 1000, "annotation", "Tissue"),
        outline(500, 0, 1000, 1000, "annotation", "Ignore*"),
    )
    core, all_of_it = outline(0, 0, 1000, 1000, "tmaCore"), outline(0, 0, 1000, 1000, "annotation", "Tissue")
    for number, features in enumerate(([tissue], [tissue, ignored], [all_of_it, ignored], [tissue, core])):
        folder = tmp_path / f"tissue{number}"
        folder.mkdir()
        (folder / "slide.geojson").write_text(json.dumps(features))
        source = opened(slide, roi_um=125, min_tissue=0.9, min_nuclei=0, tissue=str(folder), detector="classical")
        assert [item.origin for item in source] == [(x, y) for y in (0, 250, 500, 750) for x in (0, 250)]


def test_own_tissue(slide: Path, tmp_path: Path) -> None:
    from PIL import Image

    folder = tmp_path / "masks"
    folder.mkdir()
    with pytest.raises(UserError, match="no file is named like a slide"):
        opened(slide, tissue=str(folder))
    mask = np.zeros((11, 15), np.uint8)
    mask[2:4, 4:8] = 1  # mask pixels of 100 px
    Image.fromarray(mask).save(folder / "slide.png")
    items = list(opened(slide, roi_um=100, min_tissue=0.9, min_nuclei=0, tissue=str(folder)))
    assert [item.origin for item in items] == [(400, 200), (600, 200)]


# ------------------------------------------------------------------------------------------------------------ ROIs


def test_rois_are_pixels_of_the_slide(slide: Path, tissue: np.ndarray) -> None:
    source = opened(slide, roi_um="100")
    items = list(source)
    assert len(items) > 10
    for item in items:
        x, y = item.origin
        assert x % 200 == y % 200 == 0
        np.testing.assert_array_equal(item.image, tissue[y : y + 200, x : x + 200])
        assert ((item.xy >= 0) & (item.xy < 200)).all()
        assert len(item.xy) >= 20
        assert item.score is not None
        assert item.score.shape == (len(item.xy),)
        assert (item.slide, item.name) == ("slide", f"slide_{x}_{y}")
    assert len(items) + source.dropped.total() == 7 * 5


def test_nuclei_do_not_depend_on_the_grid(slide: Path, tissue: np.ndarray) -> None:
    """The nuclei of all ROIs together are those of one detection on the whole slide, also at the borders of ROIs."""
    together = np.concatenate([item.xy + item.origin for item in opened(slide, **EVERYTHING)])
    whole, _ = detect_nuclei(tissue, 0.5)
    whole = whole[(whole < [1400, 1000]).all(axis=1)]
    assert len(whole) > 500
    assert {tuple(p) for p in together.tolist()} == {tuple(p) for p in whole.tolist()}


def test_dropped_squares_are_counted(slide: Path) -> None:
    source = opened(slide, roi_um=100, min_tissue=0.99, min_nuclei=10**6)
    assert list(source) == []
    assert set(source.dropped) == {"too little tissue", "too few nuclei"}
    assert source.dropped.total() == 35
    assert list(opened(slide, roi_um=2048)) == []  # the slide is smaller


def test_per_slide_draws_at_random(slide: Path) -> None:
    everything = {item.origin for item in opened(slide, roi_um=100)}
    draws = []
    for seed in (0, 0, 1):
        source = opened(slide, roi_um=100, per_slide=5, seed=seed)
        draws.append([item.origin for item in source])
        assert len(draws[-1]) == 5 and set(draws[-1]) <= everything
        assert source.dropped["beyond per_slide"] > 0
        assert 5 + source.dropped.total() == 35
    assert draws[0] == draws[1] != draws[2]
    assert {item.origin for item in opened(slide, roi_um=100, per_slide=100)} == everything


# ---------------------------------------------------------------------------------------------------------- damage


def test_damaged_tiles_are_counted_and_bounded(tmp_path: Path, tissue: np.ndarray) -> None:
    path = write_slide(tmp_path / "slide.tif", tissue, compression="zlib")
    damage(path, 9)  # of 6 columns: x 768 to 1023, y 256 to 511, which overlaps 3 x 2 squares and 2 margins
    source = opened(path, **EVERYTHING)
    images = {item.origin: item.image for item in source}
    lost = source.dropped["unreadable"]
    assert 6 <= lost <= 20 and len(images) == 35 - lost and source.refused == {}
    for (x, y), image in images.items():
        np.testing.assert_array_equal(image, tissue[y : y + 200, x : x + 200])

    settings = CutSettings(roi_um=100, min_tissue=0, min_nuclei=0, detector="classical")
    surveyed = survey(SlideFile(path, "slide", "slide"), settings)
    assert not isinstance(surveyed, UserError)
    cut = Cut(surveyed, settings)
    assert len(list(cut.rois())) == 35 - lost
    assert cut.damage.unreadable_mm2 == pytest.approx(0.128**2)  # once, though it lies in several squares
    source = opened(path, **EVERYTHING, max_unreadable=0.03)
    assert list(source) == []
    assert source.refused[path].startswith("unreadable at 768, 256, level 0")
    assert source.refused[path].endswith("more than max_unreadable=0.03 of the slide cannot be read, copy it again")


def test_cpus(monkeypatch: pytest.MonkeyPatch, slide: Path) -> None:
    import os

    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    assert opened(slide).workers == usable_cpus() == len(os.sched_getaffinity(0))
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "3")
    assert opened(slide).workers == 3
    assert opened(slide, workers=1).workers == 1
