"""Procedural images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from muse_fast.errors import UserError
from muse_fast.images import synthetic
from muse_fast.images.mpp import MPP_RANGE
from muse_fast.sources.base import Source, SourceImage


class Synthetic(Source):
    """``synthetic:N``: N procedural images, the first 70 % train, then 15 % val, then 15 % test."""

    kind = "synthetic"
    title = "procedural images"
    label_names = synthetic.LABEL_NAMES
    options: ClassVar[dict[str, tuple[type, float, float]]] = {
        "size": (int, 32, 8192),
        "mpp": (float, *MPP_RANGE),
        "seed": (int, 0, 2**31),
    }

    def __init__(self, count: str, size: int = synthetic.SIZE, mpp: float = synthetic.MPP, seed: int = 0) -> None:
        super().__init__()
        if not count.isdecimal() or int(count) < 1:
            raise UserError(f"synthetic:{count}: expected the number of images, 1 or more")
        self._count, self._size, self._mpp, self._seed = int(count), size, mpp, seed

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[SourceImage]:
        for i in range(self._count):
            image, xy, label = synthetic.synthetic_image((self._seed, i), self._size, self._mpp)
            place = i / self._count
            split = "train" if place < 0.7 else "val" if place < 0.85 else "test"
            name = f"synthetic-{i:06d}"
            yield SourceImage(name, name, split, image, self._mpp, xy, label, None)
