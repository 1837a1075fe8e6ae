"""Names of files in other encodings, locales and spellings."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from muse_fast.images.synthetic import synthetic_image
from muse_fast.runtime.names import key_of, text_of

COMPOSED, DECOMPOSED = "L\u00e4sion", "La\u0308sion"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (b"a b.svs", "a b.svs"),
        (COMPOSED.encode(), COMPOSED),
        (DECOMPOSED.encode(), DECOMPOSED),
        (b"L\xe4sion", r"L\xe4sion"),  # Latin-1
        ("組織".encode("shift-jis"), r"\x91g\x90D"),
    ],
)
@pytest.mark.parametrize("locale", ["utf-8", "ascii"])
def test_text_is_that_of_utf_8_in_every_locale(name: bytes, text: str, locale: str) -> None:
    assert text_of(name.decode(locale, "surrogateescape")) == text
    text.encode()


def test_names_that_look_the_same_have_one_key() -> None:
    assert COMPOSED != DECOMPOSED
    assert (
        key_of(COMPOSED) == key_of(DECOMPOSED) == key_of(Path(DECOMPOSED.encode().decode("ascii", "surrogateescape")))
    )
    assert key_of("a") != key_of("A") != key_of("a ")


@pytest.mark.parametrize("locale", ["C", pytest.param("C.UTF-8", marks=pytest.mark.heavy)])
def test_predict_takes_any_name(tmp_path: Path, locale: str) -> None:
    """In the locale C without Python's UTF-8 mode, which a cluster may have, names and standard output are ASCII."""
    folder = tmp_path / "in"
    folder.mkdir()
    names = [b"L\xe4sion", "組織".encode(), b"a [1] #b"]
    for seed, name in enumerate(names):
        with open(os.fsencode(folder) + b"/" + name + b".png", "wb") as file:
            Image.fromarray(synthetic_image(seed, 128, 0.5)[0]).save(file, "png")
    code = (
        "import sys; from muse_fast.predict import main; from muse_fast.runtime.cli import run;"
        f"words = ['--out', {str(tmp_path / 'out')!r}, {str(folder)!r}];"
        "sys.exit(run(main, ['--weights', 'classical', *words, 'mpp=0.5']))"
    )
    settings = {"LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | settings, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"3 inputs" in done.stdout
    for name in names:
        assert os.path.isfile(os.fsencode(tmp_path / "out") + b"/" + name + b"/cells.geojson")
