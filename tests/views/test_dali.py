"""DALI's arithmetic on pixels, without its decoder and resize; test_renderers.py compares whole views."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from muse_fast.views.colours import UNSTAINED, Colour, apply_colour, stain_maps
from tests.support.stains import STRONG, stained_exactly


def test_stains_equal_the_equations_and_the_cpu_on_tissue(shared_data: Path) -> None:
    """To the nearest level; where float32 decides a tie, in less than one of 10,000 pixels, by a level."""
    nvidia_dali = pytest.importorskip("nvidia.dali")
    from muse_fast.views.dali import _stained

    image = np.array(Image.open(shared_data / "mitos12" / "A00_01.jpg"))[300:491, 700:860]
    stains = [STRONG, UNSTAINED, (2.0, 0.0, 2.0, -1.0, 1.0, -1.0)]
    maps = np.ascontiguousarray(stain_maps(stains)[..., None, None, None])
    pipeline = nvidia_dali.Pipeline(1, 1, None)
    with pipeline:
        levels, numbers = (
            nvidia_dali.fn.external_source(source=[[item]], cycle=True)
            for item in (np.stack([image.astype(np.float32)] * 3), maps)
        )
        pipeline.set_outputs(_stained(levels, numbers))
    pipeline.build()
    views = torch.from_dlpack(pipeline.run()[0].as_tensor())[0].permute(0, 3, 1, 2)
    pixels = torch.from_numpy(image).permute(2, 0, 1)
    for view, stain in zip(views, stains, strict=True):
        assert np.abs(view.numpy() - stained_exactly(pixels, stain)).max() <= 0.501, stain
        off = (view - apply_colour(pixels, Colour(stain=stain))).abs()
        assert off.max() <= 1 and off.mean() < 1e-4
    assert torch.equal(views[1], pixels.float())
