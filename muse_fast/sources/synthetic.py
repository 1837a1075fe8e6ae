"""Procedural images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from muse_fast.errors import UserError
from muse_fast.images import synthetic
from muse_fast.runtime.options import setting
from muse_fast.sources.base import Source, SourceImage, mpp_setting


class Synthetic(Source):
    """``synthetic:N``: N procedural images, 70 % train, 15 % val and 15 % test, in that order."""

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Options(Source.Options):
        size: int = setting(synthetic.SIZE, ge=32, le=8192)
        """Side of an image, pixels."""
        mpp: float = mpp_setting(synthetic.MPP)
        """Um per pixel."""
        seed: int = setting(0, ge=0, le=2**31)

    kind = "synthetic"
    title = "procedural images"
    label_names = synthetic.LABEL_NAMES

    def __init__(self, target: str, options: Options) -> None:
        super().__init__(target, options)
        if not target.isdecimal() or int(target) < 1:
            raise UserError(f"synthetic:{target}: expected the number of images, 1 or more")
        self._count, self._options = int(target), options

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[SourceImage]:
        size, mpp, seed = self._options.size, self._options.mpp, self._options.seed
        for i in range(self._count):
            image, xy, label = synthetic.synthetic_image((seed, i), size, mpp)
            place = i / self._count
            split = "train" if place < 0.7 else "val" if place < 0.85 else "test"
            name = f"synthetic-{i:06d}"
            yield SourceImage(name, name, split, image, mpp, xy, label, None)
