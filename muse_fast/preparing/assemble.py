"""Sample ROIs from the parts of all slides, and order them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from muse_fast.errors import require
from muse_fast.preparing.parts import Part
from muse_fast.roiset.roiset import Roi
from muse_fast.sources.cut import priorities
from muse_fast.sources.wsi import Slides


@dataclass(frozen=True, slots=True)
class Chosen:
    """The ROIs sampled from one part: their ids in it, from top to bottom and left to right."""

    part: Part
    ids: list[int]

    @property
    def not_sampled(self) -> list[int]:
        """The ids of the other ROIs."""
        return sorted(set(range(len(self.part.rois))) - set(self.ids))

    def read(self) -> Iterator[Roi]:
        yield from (self.part.rois[i] for i in self.ids)


def choose(parts: Sequence[Part], options: Slides.Options) -> list[Chosen]:
    """Sample ROIs of all parts at random, the same number from each group.

    Each ROI has a number that depends only on the seed, its slide and its position, and a group's lowest numbers are
    sampled. The sample therefore does not depend on how the work was divided, and a larger sample contains a smaller
    one of the same seed.

    Raises:
        UserError: ``max_rois`` is less than the number of groups.
    """
    numbers = [priorities(options.seed, part.file.name, part.rois.origin) for part in parts]
    in_group: dict[str, list[int]] = defaultdict(list)
    for i, part in enumerate(parts):
        if len(part.rois):
            in_group[part.file.group].append(i)
    limit = _per_group(options, len(in_group))
    sampled: dict[int, NDArray[np.bool_]] = {i: np.ones(len(part.rois), bool) for i, part in enumerate(parts)}
    for members in in_group.values():
        together = np.concatenate([numbers[i] for i in members])
        lowest = np.zeros(len(together), bool)
        lowest[np.argsort(together, kind="stable")[:limit]] = True
        ends = np.cumsum([len(numbers[i]) for i in members])
        for i, chosen in zip(members, np.split(lowest, ends[:-1]), strict=True):
            sampled[i] = chosen
    return [Chosen(part, _by_position(part, sampled[i])) for i, part in enumerate(parts)]


def _per_group(options: Slides.Options, groups: int) -> int | None:
    """Return the maximum number of ROIs per group; None: all."""
    limits = [] if options.per_group is None else [options.per_group]
    if options.max_rois is not None:
        share = options.max_rois // max(1, groups)
        require(share > 0, "max_rois", options.max_rois, f"at least one for each of the {groups} groups")
        limits.append(share)
    return min(limits, default=None)


def _by_position(part: Part, sampled: NDArray[np.bool_]) -> list[int]:
    ids = np.flatnonzero(sampled)
    x, y = part.rois.origin[ids].T
    return ids[np.lexsort((x, y))].tolist()
