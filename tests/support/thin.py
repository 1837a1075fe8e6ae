"""Networks with the structure of the real ones and a fraction of their cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import timm

from bench.step import networks
from muse_fast.models import archs, vit

VIT_DIM, VIT_HEADS, RESNET_CHANNELS = 32, 2, (4, 8, 16, 32)
VIT_LAYERS = {"DEPTH": 4, "TAPPED_LAYERS": (0, 1, 2, 3)}
RESNET_WIDTHS = tuple(4 * channels for channels in RESNET_CHANNELS)


@contextmanager
def thin_networks() -> Iterator[None]:
    """In the engine and in the baselines of `bench step`, ``vit_tiny`` has four layers and a sixth of the width,
    ``resnet50`` a sixteenth of the channels."""
    engine = {
        "vit_tiny": archs.vit_arch("vit_tiny", VIT_DIM, VIT_HEADS),
        "resnet50": dataclasses.replace(archs.ARCHS["resnet50"], widths=RESNET_WIDTHS),
    }
    create, thin = timm.create_model, {"resnet50": {"channels": RESNET_CHANNELS}}
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(archs.ARCHS, engine))
        stack.enter_context(mock.patch.dict(networks.VIT_DIM_AND_HEADS, vit_tiny=(VIT_DIM, VIT_HEADS)))
        stack.enter_context(mock.patch.multiple(vit, **VIT_LAYERS))
        stack.enter_context(mock.patch.multiple(networks, RESNET_WIDTHS=RESNET_WIDTHS, **VIT_LAYERS))
        stack.enter_context(
            mock.patch.object(timm, "create_model", lambda name, **more: create(name, **thin.get(name, {}), **more))
        )
        yield
