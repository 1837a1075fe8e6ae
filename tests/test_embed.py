"""The embed command: vectors against windows cut by hand, kills, files that scanpy opens, and unusable input."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from muse_fast import load_backbone
from muse_fast.embed import main as embed_main
from muse_fast.exploring import atlas
from muse_fast.images.synthetic import synthetic_image
from muse_fast.runtime.cli import run

anndata = pytest.importorskip("anndata")
pytest.importorskip("pyarrow")

pytestmark = pytest.mark.usefixtures("thin")
main = partial(run, embed_main)
SIDE = 512


@pytest.fixture(scope="module")
def field(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A field at 0.5 um/px, and a table of 300 of its points."""
    folder = tmp_path_factory.mktemp("field")
    pixels, *_ = synthetic_image(0, SIDE, 0.5)
    Image.fromarray(pixels).save(folder / "a.png")
    (folder / "mpp.csv").write_text("image,mpp\na.png,0.5\n")
    rng = np.random.default_rng(0)
    rows = [f"{x:.2f},{y:.2f},{n % 2},{'ab'[n % 2]},0.5" for n, (x, y) in enumerate(rng.uniform(0, SIDE, (300, 2)))]
    (folder / "a.csv").write_text("\n".join(["x,y,label,class,score", *rows]))
    return folder


def embed(field: Path, out: Path, *settings: str, weights: str = "random:vit_tiny") -> int:
    given = ["--weights", weights, "--out", str(out), str(field / "a.png")]
    return main([*given, f"nuclei={field / 'a.csv'}", "dtype=float32", "pictures=false", *settings])


def read(out: Path) -> Any:
    return anndata.read_h5ad(out / "a.h5ad")


def table(field: Path) -> np.ndarray:
    return np.loadtxt(field / "a.csv", delimiter=",", skiprows=1, usecols=(0, 1))


def random_backbone(arch: str) -> Any:
    torch.manual_seed(0)
    return load_backbone(arch)


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


@pytest.mark.parametrize(("arch", "side"), [("vit_tiny", 224), ("resnet50", 160)])
def test_vectors_are_those_of_a_window_cut_by_hand(field: Path, tmp_path: Path, arch: str, side: int) -> None:
    assert embed(field, tmp_path, f"window={side}", weights=f"random:{arch}") == 0
    found = read(tmp_path)
    expected = by_hand(field, arch, side)
    np.testing.assert_allclose(found.X, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(found.obsm["spatial"], table(field), atol=1e-4)
    assert found.obs["class"].tolist()[:4] == ["a", "b", "a", "b"]


def test_pictures_and_search(
    field: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures are drawn at the end, also by a command that has nothing else left to do, unless they are not wanted."""
    monkeypatch.setattr(atlas, "has_umap", lambda: False)  # it takes long to load
    out = tmp_path / "out"
    assert embed(field, out) == 0
    assert not list(out.glob("*.png")) and not (out / "report.html").exists()
    assert embed(field, out, "pictures=true") == 0
    assert f"{out / 'report.html'}: the vectors in pictures" in capsys.readouterr().out
    assert {"overview.png", "atlas.png", "report.html"} <= {path.name for path in out.iterdir()}
    assert embed(field, out, "pictures=true") == 2
    assert "already contains" in capsys.readouterr().err

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
