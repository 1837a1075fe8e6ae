"""The embed command: vectors against windows cut by hand, kills, files that scanpy opens, and unusable input."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import muse_fast
from muse_fast.detection.detector import Detector, DetectorSpec
from muse_fast.embed import main as embed_main
from muse_fast.embedding import files, pipeline
from muse_fast.embedding.encoders import MapEncoder
from muse_fast.embedding.parts import Parts
from muse_fast.embedding.to_qupath import to_geojson
from muse_fast.errors import UserError
from muse_fast.images.synthetic import synthetic_image
from muse_fast.models.backbone import build_backbone
from muse_fast.predict import main as predict_main
from muse_fast.runtime import atomic, checkpoint
from muse_fast.runtime.cli import run
from tests.support.planted import write_pyramid
from tests.support.small_slides import page_with_tissue

anndata = pytest.importorskip("anndata")
pandas = pytest.importorskip("pandas")
pytest.importorskip("pyarrow")

pytestmark = pytest.mark.usefixtures("thin")
main = partial(run, embed_main)
SIDE = 512
TINY = "timm:vit_tiny_patch16_224:depth=1:embed_dim=48:num_heads=3"
CLOSE = {"rtol": 1e-5, "atol": 5e-5}  # of values up to ten


@pytest.fixture(scope="module")
def field(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A field at 0.5 um/px, and a table of 200 of its points."""
    folder = tmp_path_factory.mktemp("field")
    pixels, *_ = synthetic_image(0, SIDE, 0.5)
    Image.fromarray(pixels).save(folder / "a.png")
    (folder / "mpp.csv").write_text("image,mpp\na.png,0.5\n")
    rng = np.random.default_rng(0)
    rows = [f"{x:.2f},{y:.2f},{n % 2},{'ab'[n % 2]},0.5" for n, (x, y) in enumerate(rng.uniform(0, SIDE, (200, 2)))]
    (folder / "a.csv").write_text("\n".join(["x,y,label,class,score", *rows]))
    return folder


def words(field: Path, out: Path, weights: str = "random:vit_tiny") -> list[str]:
    given = ["--weights", weights, "--out", str(out), str(field / "a.png")]
    return [*given, "dtype=float32", "pictures=false", f"nuclei={field / 'a.csv'}"]


def embed(field: Path, out: Path, *settings: str, weights: str = "random:vit_tiny") -> int:
    return main([*words(field, out, weights), *settings])


def embedded(field: Path, out: Path, *settings: str, weights: str = "random:vit_tiny") -> Any:
    assert embed(field, out, *settings, weights=weights) == 0
    return read(out)


def read(out: Path) -> Any:
    return anndata.read_h5ad(out / "a.h5ad")


def table(field: Path) -> np.ndarray:
    return np.loadtxt(field / "a.csv", delimiter=",", skiprows=1, usecols=(0, 1))


def random_backbone(arch: str) -> Any:
    torch.manual_seed(0)
    return muse_fast.load_backbone(arch)


def by_hand(field: Path, arch: str, side: int) -> np.ndarray:
    """The vectors of the nuclei, each from its own window, computed on its own."""
    margin, stride = 32, (side - 64) // 32 * 32
    starts = [*range(0, SIDE - side, stride), SIDE - side]
    pixels, backbone = np.asarray(Image.open(field / "a.png")), random_backbone(arch)
    vectors = []
    for xy in table(field):
        # The first window in whose core the nucleus is: cores end in the middle of an overlap.
        ends = [(a + side + b) / 2 for a, b in pairwise(starts)]
        left, top = (starts[sum(place >= end for end in ends)] for place in xy)
        assert all(place - start >= margin or start == 0 for place, start in zip(xy, (left, top), strict=True))
        window = torch.from_numpy(pixels[top : top + side, left : left + side].copy()).permute(2, 0, 1)[None]
        place = torch.tensor(xy - (left, top), dtype=torch.float32)[None]
        with torch.inference_mode():
            vectors.append(backbone.nucleus_features(window, place, torch.zeros(1, dtype=torch.int64)))
    return torch.cat(vectors).numpy()


@pytest.mark.parametrize(("arch", "side"), [("vit_tiny", 96), ("resnet50", 112)])
def test_vectors_are_those_of_a_window_cut_by_hand(field: Path, tmp_path: Path, arch: str, side: int) -> None:
    assert embed(field, tmp_path, f"window={side}", weights=f"random:{arch}") == 0
    found = read(tmp_path)
    expected = by_hand(field, arch, side)
    np.testing.assert_allclose(found.X, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(found.obsm["spatial"], table(field), atol=1e-4)
    assert found.obs["class"].tolist()[:4] == ["a", "b", "a", "b"]


def test_pictures_and_search(field: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pictures are drawn at the end, also by a command that has nothing else left to do, unless they are not wanted."""
    out = tmp_path / "out"
    assert embed(field, out) == 0
    assert not list(out.glob("*.png")) and not (out / "report.html").exists()
    assert embed(field, out, "pictures=true") == 0
    assert f"{out / 'report.html'}: the vectors in pictures" in capsys.readouterr().out
    assert {"overview.png", "atlas.png", "report.html"} <= {path.name for path in out.iterdir()}
    assert embed(field, out, "pictures=true") == 2
    assert "already contains" in capsys.readouterr().err
    for name in ("overview.png", "atlas.png"):
        shutil.copy(out / name, tmp_path)  # pictures are not slides
    assert main(["--weights", "random:vit_tiny", "--out", str(tmp_path / "more"), str(tmp_path)]) == 2
    assert f"{tmp_path} contains no slides or images" in capsys.readouterr().err

    x, y = table(field)[17]
    assert (
        main(["search", str(out), "--like", f"a:{x + 0.1:.2f},{y:.2f}", "--top", "5", "--out", str(tmp_path / "s")])
        == 0
    )
    rows = (tmp_path / "s" / "search.csv").read_text().splitlines()
    assert len(rows) == 1 + 6 and rows[1].startswith("0,a,a:17,1.000000,b,0.5")
    vectors = read(out).X.astype(float)
    cosine = vectors @ vectors[17] / np.linalg.norm(vectors, axis=1)
    assert [int(row.split(",")[2][2:]) for row in rows[2:]] == np.argsort(-cosine, kind="stable")[1:6].tolist()


def test_batches_order_and_readers_do_not_matter(field: Path, tmp_path: Path) -> None:
    """All but the sums of the network itself, whose order may depend on the batch."""
    reference = embedded(field, tmp_path / "a", "batch=1", "readers=1")
    for number, batch in enumerate((3, 8)):
        np.testing.assert_allclose(embedded(field, tmp_path / f"b{number}", f"batch={batch}").X, reference.X, **CLOSE)
    order = np.random.default_rng(2).permutation(len(reference))
    shuffled = muse_fast.embed_slide(
        field / "a.png", "random:vit_tiny", reference.obsm["spatial"][order], mpp=0.5, dtype="float32"
    )
    np.testing.assert_allclose(shuffled.X, reference.X[order], **CLOSE)
    alone = muse_fast.embed_slide(
        field / "a.png", random_backbone("vit_tiny"), reference.obsm["spatial"][order[:1]], mpp=0.5, dtype="float32"
    )
    np.testing.assert_allclose(alone.X, reference.X[order[:1]], **CLOSE)


def test_a_killed_command_gives_the_same_file(field: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "PART", 2)
    assert embed(field, tmp_path / "whole", "batch=2") == 0
    keep, encoded = Parts.keep, []
    forward = MapEncoder.vectors
    monkeypatch.setattr(MapEncoder, "vectors", lambda *args: encoded.append(len(args[1].images)) or forward(*args))

    def killed(parts: Parts, number: int, *args: Any) -> None:
        keep(parts, number, *args)
        if number in (0, 1, 3):
            raise KeyboardInterrupt

    monkeypatch.setattr(Parts, "keep", killed)
    out = tmp_path / "out"
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            embed_main([*words(field, out), "batch=2"])
        assert not list(out.glob("a.*"))
    assert embed(field, out, "batch=2") == 0
    for name in ("a.h5ad", "a.parquet"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sum(encoded) < 2 * json.loads((out / "a.json").read_text())["windows"]
    assert sorted(path.name for path in out.iterdir()) == [
        "a.h5ad",
        "a.json",
        "a.parquet",
        "embed.json",
        "summary.json",
    ]


def test_unfinished_work_of_other_settings_is_not_used(field: Path, tmp_path: Path) -> None:
    parts = Parts(tmp_path / ".a.parts", {"weights": "others"})
    parts.keep(0, np.zeros((200, 32), np.float32))
    assert np.abs(embedded(field, tmp_path).X).min(axis=1).max() > 0


@pytest.mark.parametrize("space", [0, 1, 2])
def test_a_full_disk_leaves_nothing_half_written(
    field: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], space: int
) -> None:
    """The disk is full from the ``space``-th time on that something is brought to it."""
    left = iter(range(space))

    def full(path: Path) -> None:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patched:
        patched.setattr(atomic, "fsync", full)
        assert embed(field, tmp_path) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not list(tmp_path.glob("a.*"))
    assert len(embedded(field, tmp_path)) == 200


def test_vectors_beyond_float16(field: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    huge = random_backbone("vit_tiny")
    for projection in huge.decoder.hyper_feats.conv_list:
        projection.layer[1].bias.data += 1e5
    places = np.full((3, 2), 100.0)
    with pytest.raises(UserError, match=r"a: vectors reach 1.*, beyond float16; give dtype=float32"):
        muse_fast.embed_slide(field / "a.png", huge, places, mpp=0.5)
    huge.decoder.hyper_feats.conv_list[0].layer[1].bias.data[0] = np.nan
    with pytest.raises(UserError, match="values that are not finite; its weights may be damaged"):
        muse_fast.embed_slide(field / "a.png", huge, places, mpp=0.5, dtype="float32")


def test_a_slide_without_nuclei(field: Path, tmp_path: Path) -> None:
    table = tmp_path / "none.csv"
    table.write_text("x,y\n")
    assert main([*words(field, tmp_path / "out")[:-1], f"nuclei={table}"]) == 0
    found = read(tmp_path / "out")
    assert found.shape == (0, 32) and found.obsm["spatial"].shape == (0, 2)
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["nothing_found"] == {"a.png": "no nuclei"}


def test_crops(field: Path, tmp_path: Path) -> None:
    """A crop of 32 um at 0.5 um/px is 64 px around the nucleus."""
    found = embedded(field, tmp_path, "protocol=crop", "crop_um=32", "size=64", "batch=7")
    pixels, backbone = np.asarray(Image.open(field / "a.png")), random_backbone("vit_tiny")
    padded = np.pad(pixels, ((64, 64), (64, 64), (0, 0)), mode="symmetric")
    for row in range(0, 200, 29):
        left, top = np.round(found.obsm["spatial"][row] - 32).astype(int) + 64
        crop = torch.from_numpy(padded[top : top + 64, left : left + 64].copy()).permute(2, 0, 1)[None]
        with torch.inference_mode():
            np.testing.assert_allclose(found.X[row], backbone.cls(crop)[0].numpy(), **CLOSE)
    assert found.uns["muse_fast"]["protocol"] == "crop" and found.uns["muse_fast"]["mpp"] == 0.5


@pytest.mark.parametrize("protocol", ["map", "crop"])
def test_networks_of_timm(field: Path, tmp_path: Path, protocol: str) -> None:
    settings = ["protocol=crop", "size=32", "crop_um=16"] if protocol == "crop" else ["window=96"]
    found = embedded(field, tmp_path, *settings, weights=TINY)
    assert found.shape == (200, 48) and np.isfinite(found.X).all() and np.unique(found.X, axis=0).shape[0] > 190


def test_a_detector_describes_what_it_finds(field: Path, tmp_path: Path) -> None:
    """In one pass: the nuclei are those of `predict`, and each vector is that of a tile with the nucleus."""
    detector = random_detector(tmp_path / "run")
    run_folder, common = str(tmp_path / "run"), [str(field / "a.png"), "dtype=float32", "pictures=false"]
    assert main(["--weights", run_folder, "--out", str(tmp_path / "out"), *common]) == 0
    found = read(tmp_path / "out")
    assert predict_main(["--weights", run_folder, "--out", str(tmp_path / "cells"), str(field / "a.png")]) == 0
    cells = np.genfromtxt(tmp_path / "cells" / "a" / "cells.csv", delimiter=",", names=True, dtype=None, encoding="utf")
    assert len(found) > 100
    np.testing.assert_allclose(found.obsm["spatial"], np.stack([cells["x"], cells["y"]], axis=1), atol=1e-4)
    np.testing.assert_allclose(found.obs["score"], cells["score"], atol=1e-6)
    assert found.obs["class"].tolist() == cells["class"].tolist()

    pixels = torch.from_numpy(np.array(Image.open(field / "a.png"))).permute(2, 0, 1)
    stride, side = 32, 96  # of tiles with a margin of 12 um and 3 um
    starts = [start for start in range(0, SIDE, stride) if start + side <= SIDE]
    inner = np.flatnonzero(((found.obsm["spatial"] > 64) & (found.obsm["spatial"] < SIDE - 128)).all(axis=1))[::40]
    assert len(inner) > 1
    for row in inner:
        xy, nearest = found.obsm["spatial"][row], np.inf
        for left in starts:
            for top in starts:
                place = torch.tensor(xy - (left, top), dtype=torch.float32)[None]
                if (place < 30).any() or (place > side - 30).any():
                    continue
                with torch.inference_mode():
                    window = pixels[None, :, top : top + side, left : left + side]
                    expected = detector.backbone.nucleus_features(window, place, torch.zeros(1, dtype=torch.int64))
                nearest = min(nearest, float(np.abs(found.X[row] - expected.numpy()).max() / expected.abs().max()))
        assert nearest < 2e-3  # positions in the file are rounded to hundredths of pixels
    # With other nuclei, or another um/px, the detector's network is used like any other.
    assert len(embedded(field, tmp_path / "other", weights=run_folder)) == 200


def random_detector(run_folder: Path) -> Detector:
    spec = DetectorSpec(
        arch="vit_tiny", class_names=("a", "b"), mpp=0.5, sample_size=96, image_size=96, hidden_dim=8, min_score=0.2
    )
    detector = Detector(build_backbone("vit_tiny", image_size=96), spec).eval()
    torch.nn.init.normal_(detector.reg_head[-1].weight, std=0.05)
    state = {"detector": asdict(spec), "step": 1}
    checkpoint.save(run_folder, 1, {"detector": detector.state_dict()}, state, keep_every=0)
    return detector


# -------------------------------------------------------------------------------------------- files of nuclei, and back


def test_earlier_predictions_give_the_same_file(field: Path, tmp_path: Path) -> None:
    """As the detector that made them; the number of a nucleus is its row in the table."""
    image = str(field / "a.png")
    assert predict_main(["--weights", "classical", "--out", str(tmp_path / "cells"), image]) == 0
    common = ["--weights", "random:vit_tiny", image, "pictures=false", "--out"]
    assert main([*common, str(tmp_path / "a"), "nuclei=classical"]) == 0
    assert main([*common, str(tmp_path / "b"), f"nuclei={tmp_path / 'cells'}"]) == 0
    first, second = read(tmp_path / "a"), read(tmp_path / "b")
    rows = (tmp_path / "cells" / "a" / "cells.csv").read_text().splitlines()
    assert len(first) == len(rows) - 1 > 200
    assert first.X.tobytes() == second.X.tobytes() and first.obs.equals(second.obs)
    assert first.obs_names[7] == "a:7" and rows[8].startswith(f"{first.obsm['spatial'][7, 0]:.2f},")
    assert to_geojson(tmp_path / "a" / "a.h5ad", "slide", tmp_path) == [tmp_path / "a.slide.geojson"]
    ours, theirs = (
        json.loads(p.read_text()) for p in (tmp_path / "a.slide.geojson", tmp_path / "cells/a/cells.geojson")
    )
    for one, other in zip(ours["features"], theirs["features"], strict=True):
        assert one["id"] == other["id"] and one["geometry"] == other["geometry"]


def test_qupath_and_back(field: Path, tmp_path: Path) -> None:
    """Classes come from GeoJSON; clusters of joined files go back to it, one file per slide."""
    places = [[10.5, 20.25], [300, 40], [511, 511], [70, 70]]
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Point", "coordinates": place},
            "properties": {"objectType": "detection"} | ({"classification": {"name": name}} if name else {}),
        }
        for place, name in zip(places, ("tumour", "immune", "", "tumour"), strict=True)
    ]
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "a.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    out = tmp_path / "out"
    assert main([*words(field, out)[:-1], f"nuclei={tmp_path / 'q'}"]) == 0
    found = read(out)
    assert found.obs["class"].tolist()[:2] == ["tumour", "immune"] and found.obs["class"].isna().tolist()[2]
    assert found.obs["score"].isna().all() and found.obsm["spatial"].tolist() == places
    assert found.obs["x_um"].tolist() == [x / 2 for x, _ in places]

    other = found.copy()
    other.obs["slide"] = other.obs["slide"].cat.rename_categories({"a": "b"})
    joined = anndata.concat([found, other], index_unique="-")
    joined.obs["cluster"] = list("xyxyyyxx")
    joined.obs["depth"] = np.arange(8) / 4
    joined.uns["cluster_colors"] = ["#102030", "#ff0000"]
    joined.write_h5ad(out / "all.h5ad")
    assert main(["--to-geojson", str(out / "all.h5ad"), "cluster"]) == 2  # nothing says where b begins
    (out / "b.json").write_text(json.dumps({"qupath_frame": [10, 20, 400, 400]}))
    assert main(["--to-geojson", str(out / "all.h5ad"), "cluster", "--out", str(tmp_path)]) == 0
    back = json.loads((tmp_path / "b.cluster.geojson").read_text())
    assert back["muse_fast"]["origin"] == [10, 20]
    assert [one["geometry"]["coordinates"] for one in back["features"]] == [[x - 10, y - 20] for x, y in places]
    kinds = [one["properties"]["classification"] for one in back["features"]]
    assert kinds[0] == {"name": "y", "color": [255, 0, 0]} and kinds[2] == {"name": "x", "color": [16, 32, 48]}
    assert main(["--to-geojson", str(out / "all.h5ad"), "depth", "--out", str(tmp_path)]) == 0
    back = json.loads((tmp_path / "a.depth.geojson").read_text())["features"]
    assert [one["properties"]["measurements"] for one in back] == [{"depth": n / 4} for n in range(4)]
    assert main(["--to-geojson", str(out / "all.h5ad"), "clusters"]) == 2


def test_a_slide_of_several_levels(tmp_path: Path) -> None:
    """Nuclei and windows come from the level that fits; positions are those of level 0."""
    page = page_with_tissue(side=200, height=300, width=400)
    fine = np.asarray(Image.fromarray(page).resize((800, 600), Image.Resampling.BICUBIC))
    slide = write_pyramid(tmp_path / "a.tif", fine, 0.25, (2,))
    assert (
        main(["--weights", TINY, "--out", str(tmp_path / "out"), str(slide), "nuclei=classical", "pictures=false"]) == 0
    )
    found, summary = read(tmp_path / "out"), json.loads((tmp_path / "out" / "a.json").read_text())
    assert len(found) == summary["nuclei"] > 20 and summary["window_mpp"] == 0.5 and summary["mpp"] == 0.25
    assert found.obsm["spatial"].max() > 500
    np.testing.assert_allclose(found.obs[["x_um", "y_um"]].to_numpy(), found.obsm["spatial"] * 0.25)


def test_scanpy_opens_and_clusters_the_file(field: Path, tmp_path: Path) -> None:
    scanpy = pytest.importorskip("scanpy")
    pytest.importorskip("igraph")
    assert embed(field, tmp_path, "format=zarr") == 0
    stored = anndata.read_zarr(tmp_path / "a.zarr")
    assert embed(field, tmp_path / "h5ad") == 0
    cells = scanpy.read_h5ad(tmp_path / "h5ad" / "a.h5ad")
    assert cells.X.tobytes() == stored.X.tobytes() and cells.obs.equals(stored.obs)
    assert pandas.read_parquet(tmp_path / "a.parquet").equals(cells.obs)
    assert json.loads(cells.uns["muse_fast"]["settings"])["window"] == 224
    scanpy.pp.neighbors(cells, n_neighbors=10, use_rep="X", method="gauss")  # umap would first be compiled
    scanpy.tl.leiden(cells, flavor="igraph", n_iterations=2)
    cells.write_h5ad(tmp_path / "clustered.h5ad")
    assert main(["--to-geojson", str(tmp_path / "clustered.h5ad"), "leiden"]) == 0
    features = json.loads((tmp_path / "a.leiden.geojson").read_text())["features"]
    assert [one["properties"]["classification"]["name"] for one in features] == cells.obs["leiden"].tolist()


@pytest.mark.heavy  # and only where squidpy is installed, which brings 66 packages
def test_squidpy_opens_the_file(field: Path, tmp_path: Path) -> None:
    squidpy = pytest.importorskip("squidpy")
    cells = embedded(field, tmp_path)
    squidpy.gr.spatial_neighbors(cells, coord_type="generic", n_neighs=6)
    assert cells.obsp["spatial_connectivities"].nnz == 6 * 200


# ------------------------------------------------------------------------------------------------- what cannot be used


def test_two_commands_at_once(field: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one writes its file, the other finishes and removes the parts of both."""
    write = files.write

    def late(*args: Any) -> Any:
        with monkeypatch.context() as other:
            other.setattr(files, "write", write)
            assert embed(field, tmp_path) == 0
        return write(*args)

    monkeypatch.setattr(files, "write", late)
    assert embed(field, tmp_path) == 0
    assert len(read(tmp_path)) == 200 and json.loads((tmp_path / "summary.json").read_text())["refused"] == {}


def test_two_inputs_of_one_name(field: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "b").mkdir()
    shutil.copy(field / "a.png", tmp_path / "b")
    assert main([*words(field, tmp_path / "out"), str(tmp_path / "b" / "a.png"), "mpp=0.5"]) == 2
    assert f"{field / 'a.png'} has the same name; the names of inputs must differ" in capsys.readouterr().err
    assert len(read(tmp_path / "out")) == 200


def test_an_input_that_cannot_be_used_leaves_nothing(tmp_path: Path) -> None:
    """Of two truncated images of one name, the summary names both."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.fromarray(page_with_tissue()).save(tmp_path / name / "cut.png")
        os.truncate(tmp_path / name / "cut.png", 10_000)
    images = [str(tmp_path / name / "cut.png") for name in ("a", "b")]
    argv = ["--weights", "random:vit_tiny", "--out", str(tmp_path / "out"), *images]
    assert main([*argv, "nuclei=classical", "device=cpu", "mpp=0.5"]) == 2
    assert sorted(json.loads((tmp_path / "out" / "summary.json").read_text())["refused"]) == images
    assert not list((tmp_path / "out").glob(".*"))


def test_results_are_kept(field: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert embed(field, tmp_path) == 0
    before = (tmp_path / "a.h5ad").read_bytes()
    for settings, weights, words_ in (
        ((), "random:vit_tiny", "already contains all vectors"),
        (("context_um=8",), "random:vit_tiny", "settings {'context_um': 16.0}, not {'context_um': 8.0}"),
        ((), "random:resnet50", "weights random:vit_tiny, not random:resnet50; choose another --out"),
    ):
        assert embed(field, tmp_path, *settings, weights=weights) == 2
        assert words_ in capsys.readouterr().err
    assert (tmp_path / "a.h5ad").read_bytes() == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--weights", "nothing.pth"], "nothing.pth do not exist"),
        (["--weights", "timm:vit_tny"], "has no 'vit_tny'; did you mean"),
        (["window=100"], "window=100: expected a multiple of 16"),
        (["window=64", "context_um=32"], "window=64: expected at least 160"),
        (["nuclei=nothing.csv"], "nothing.csv"),
        (["protocol=crop", "window=224"], "window=224: expected none with protocol=crop"),
        (["encoder_mpp=0.2"], "0.5 um/px is too coarse for a network that works at 0.2"),
    ],
)
def test_unusable_settings(
    field: Path, tmp_path: Path, settings: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words(field, tmp_path / "out"), *settings]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("out/a.*"))


def test_positions_outside_the_slide(field: Path) -> None:
    outside = r"1 of 1 nuclei lie outside its 512 x 512 px \(row 0 at 1, 600\)"
    for places, message in (([[1.0, 600.0]], outside), ([3.0], "expected finite positions")):
        with pytest.raises(UserError, match=message):
            muse_fast.embed_slide(field / "a.png", "random:vit_tiny", np.array(places), mpp=0.5)


def test_um_per_pixel_from_the_table(field: Path) -> None:
    """`embed_slide` finds mpp.csv as the command does."""
    found = muse_fast.embed_slide(field / "a.png", "random:vit_tiny", table(field)[:3], window=96)
    assert len(found) == 3 and found.uns["muse_fast"]["slide_mpp"].tolist() == [0.5, 0.5]


def test_a_folder_called_like_a_detector(field: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "classical").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main([*words(field, tmp_path / "out")[:-1], "nuclei=classical"]) == 0
    assert len(read(tmp_path / "out")) > 200


def test_a_file_has_the_nuclei_of_one_slide(field: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.open(field / "a.png").transpose(Image.Transpose.ROTATE_90).save(tmp_path / "b.png")
    assert main([*words(field, tmp_path / "out"), str(tmp_path / "b.png"), "mpp=0.5"]) == 2
    assert "has the nuclei of one slide, but there are 2 inputs; give a folder" in capsys.readouterr().err
    assert not (tmp_path / "out" / "a.h5ad").exists()


def test_copies_need_no_nuclei_of_their_own(field: Path, tmp_path: Path) -> None:
    """As `predict` writes none for them."""
    (tmp_path / "in").mkdir()
    for name in ("a.png", "b.png"):
        shutil.copy(field / "a.png", tmp_path / "in" / name)
    common = [str(tmp_path / "in"), "mpp=0.5"]
    assert predict_main(["--weights", "classical", "--out", str(tmp_path / "cells"), *common]) == 0
    assert not (tmp_path / "cells" / "b").exists()
    argv = ["--weights", "random:vit_tiny", "--out", str(tmp_path / "out"), *common, "pictures=false"]
    assert main([*argv, f"nuclei={tmp_path / 'cells'}"]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["inputs"] == 1 and summary["refused"] == {}
    assert list(summary["repeated"]) == [str(tmp_path / "in" / "b.png")]
