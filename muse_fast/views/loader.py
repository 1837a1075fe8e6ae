"""From a ROI set to batches of views. The result does not depend on the number of workers or ranks.

Every random choice of a sample derives from (seed, epoch, ROI id). Which samples a step sees derives only from the
step: sample ``p`` of the run is ROI ``permutation(epoch)[p mod n]`` with ``epoch = p div n``, and step ``k`` takes
the samples from ``k * batch_size``. So a run can resume at any step with any world size: the step is all it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, Sampler

from muse_fast.batch import PlannedViews, Views
from muse_fast.config import ViewsConfig
from muse_fast.errors import UserError
from muse_fast.roiset.roiset import RoiSet
from muse_fast.views.ahead import one_ahead
from muse_fast.views.boxes import check_room
from muse_fast.views.colours import apply_colour
from muse_fast.views.plan import Plan, draw_plan, pack, view_major
from muse_fast.views.renderers import UntilError, rendered
from muse_fast.views.workers import STALLED_AFTER, load

Sample = tuple[int, int]  # (epoch, ROI id)
_Batch = TypeVar("_Batch")


class StepSampler(Sampler[list[Sample]]):
    """The samples of this rank from ``start_step`` to ``stop_step``, as ``accumulate`` micro-batches per step."""

    def __init__(
        self,
        roi_ids: NDArray[np.int64],
        *,
        seed: int,
        batch_size: int,
        start_step: int,
        stop_step: int,
        accumulate: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if len(roi_ids) == 0:
            raise UserError("no ROIs to train on: check data.roiset and data.split")
        if batch_size % (world_size * accumulate):
            raise UserError(
                f"optim.batch_size={batch_size}: expected a multiple of {world_size} ranks x "
                f"{accumulate} micro-batches (optim.accumulate)"
            )
        self.roi_ids, self.seed, self.batch_size = roi_ids, seed, batch_size
        self.start_step, self.stop_step, self.accumulate = start_step, stop_step, accumulate
        self.rank, self.world_size = rank, world_size
        self._order: tuple[int, NDArray[np.int64]] | None = None  # the current epoch and its permutation

    def __len__(self) -> int:
        return (self.stop_step - self.start_step) * self.accumulate

    @property
    def size(self) -> int:
        """Samples per micro-batch of this rank."""
        return self.batch_size // self.world_size // self.accumulate

    def __iter__(self) -> Iterator[list[Sample]]:
        share, size = self.batch_size // self.world_size, self.size
        for step in range(self.start_step, self.stop_step):
            start = step * self.batch_size + self.rank * share
            for first in range(start, start + share, size):
                yield [self._sample(position) for position in range(first, first + size)]

    def _sample(self, position: int) -> Sample:
        epoch, within = divmod(position, len(self.roi_ids))
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.roi_ids)
        return epoch, int(self._order[1][within])


class ViewDataset(Dataset["Views | PlannedViews | UserError"]):
    """``dataset[samples]`` is the batch of views of ``samples``, or of their plans for the device if ``planned``."""

    def __init__(self, roiset: RoiSet, config: ViewsConfig, seed: int, *, planned: bool = False) -> None:
        self.roiset, self.config, self.seed, self.planned = roiset, config, seed, planned

    def __getitem__(self, samples: Sequence[Sample]) -> Views | PlannedViews | UserError:
        try:
            if self.planned:
                return pack([self.plan(*sample) for sample in samples])
            return collate([self.views(*sample) for sample in samples])
        except UserError as error:
            return error  # as a value: raised in a worker, it would arrive wrapped in the worker's traceback

    def batch_bytes(self, samples: int) -> int:
        """Bytes of the images of a batch; of plans, those of whole JPEGs, though they hold only the rows in use."""
        if self.planned:
            return samples * sum(self.roiset.info["shards"].values()) // len(self.roiset)
        pixels = 2 * self.config.global_size**2 + self.config.num_locals * self.config.local_size**2
        return samples * pixels * 3

    def plan(self, epoch: int, roi_id: int) -> Plan:
        """Draw the boxes and colours of the views of one ROI."""
        return draw_plan(self.roiset[roi_id], epoch, self.seed, self.config)

    def views(self, epoch: int, roi_id: int) -> Views:
        """Render the views of one ROI on the CPU, as a batch of one."""
        return render(self.plan(epoch, roi_id), self.config)


def render(plan: Plan, config: ViewsConfig) -> Views:
    """Decode the rows that the views of a ROI cover and render them on the CPU: the reference for other backends."""
    _, top, _, height = plan.window()
    rows, first_row = plan.roi.decode_rows(top, top + height)
    image = torch.from_numpy(rows).permute(2, 0, 1)
    boxes = [replace(box, y=box.y - first_row) for box in plan.boxes]
    pixels = [apply_colour(box.render(image), colour) for box, colour in zip(boxes, plan.colours, strict=True)]
    globals_, locals_ = pixels[: plan.num_globals], pixels[plan.num_globals :]
    nuclei = plan.nuclei()
    return Views(
        global_images=torch.stack(globals_),
        local_images=torch.stack(locals_) if locals_ else image.new_empty(0, 3, config.local_size, config.local_size),
        nuclei=nuclei,
        num_global_nuclei=int(nuclei.offsets[plan.num_globals]),
        mpp=torch.tensor([box.mpp(plan.roi.mpp) for box in plan.boxes]),
        roi_ids=torch.tensor([plan.roi.id]),
        epochs=torch.tensor([plan.epoch]),
    )


def collate(samples: list[Views]) -> Views:
    """Join batches of one ROI each into one view-major batch."""
    return Views(
        global_images=torch.stack([s.global_images for s in samples], dim=1).flatten(0, 1),
        local_images=torch.stack([s.local_images for s in samples], dim=1).flatten(0, 1),
        nuclei=view_major([s.nuclei for s in samples]),
        num_global_nuclei=sum(s.num_global_nuclei for s in samples),
        mpp=torch.stack([s.mpp for s in samples], dim=1).flatten(),
        roi_ids=torch.cat([s.roi_ids for s in samples]),
        epochs=torch.cat([s.epochs for s in samples]),
    )


def load_views(
    dataset: ViewDataset,
    sampler: StepSampler,
    *,
    workers: int,
    pin_memory: bool = False,
    device: torch.device | str = "cpu",
    backend: str = "cpu",
    timeout: int = STALLED_AFTER,
) -> Generator[Views]:
    """Yield batches of views in the sampler's order; on a GPU, each is copied or rendered during the step before.

    Close the generator to end its workers: if an error ends the program first, open workers keep it from exiting.

    Args:
        workers: processes that read and, with the ``cpu`` backend, render (0: the calling process).
        device: where the views go; the other backends render there.
        backend: one of ``config.DATA_BACKENDS``, for which `renderers.why_not` returns None.
        timeout: seconds without a batch after which a worker counts as stalled.

    Raises:
        UserError: damaged data, named by path and ROI id, in the step that would have used it; or a worker died or
            stalled, with the ROIs that it was reading; or shared memory is too small for the workers' batches.
    """
    planned = ViewDataset(dataset.roiset, dataset.config, dataset.seed, planned=backend != "cpu")

    def named(roi_ids: Sequence[int]) -> str:
        return f"ROIs {roi_ids} of {dataset.roiset.path}"

    batch_bytes = planned.batch_bytes(sampler.size)
    with closing(load(planned, sampler, workers, pin_memory, timeout, named, batch_bytes)) as items:
        batches: UntilError[Any] = UntilError(items)
        with closing(iter(batches)) as loaded:
            if backend == "cpu":
                yield from on_device(loaded, torch.device(device))
            else:
                yield from rendered(loaded, backend, dataset.config, torch.device(device), workers)
    if batches.error is not None:
        raise batches.error


def load_batches(
    dataset: Dataset[_Batch | UserError],
    sampler: StepSampler,
    *,
    workers: int,
    named: Callable[[Sequence[int]], str],
    batch_bytes: int,
    pin_memory: bool = False,
    device: torch.device | str = "cpu",
    timeout: int = STALLED_AFTER,
) -> Generator[_Batch]:
    """Yield batches of any dataset that is indexed by lists of samples, in the sampler's order, as `load_views` does.

    Args:
        named: turns item numbers into a name for messages.
        batch_bytes: size of a batch, nearly.
    """
    with closing(load(dataset, sampler, workers, pin_memory, timeout, named, batch_bytes)) as items:
        batches: UntilError[Any] = UntilError(items)
        with closing(iter(batches)) as loaded:
            yield from on_device(loaded, torch.device(device))
    if batches.error is not None:
        raise batches.error


def on_device(batches: Iterable[Any], device: torch.device) -> Iterable[Any]:
    """Batches, which have a method ``to``, on ``device``; a GPU copies each during the step before."""
    if device.type != "cuda":
        return batches  # where they were made
    return one_ahead(batches, lambda batch: batch.to(device, non_blocking=True), device)


def check_roiset(roiset: RoiSet, roi_ids: NDArray[np.int64], config: ViewsConfig) -> None:
    """Check before a run starts that every ROI is large enough for the views.

    Raises:
        UserError: a ROI is too small; names the first.
    """
    shapes = np.stack([roiset.width[roi_ids], roiset.height[roi_ids], roiset.mpp[roi_ids]], axis=1)
    for shape in np.unique(shapes, axis=0):
        width, height, mpp = int(shape[0]), int(shape[1]), float(shape[2])
        try:
            check_room(width, height, mpp, config)
        except UserError as error:
            first = roi_ids[int(np.flatnonzero((shapes == shape).all(axis=1))[0])]
            raise UserError(f"{roiset.path}: ROI {first}: {error}") from None


def as_batches(dataset: ViewDataset, roi_ids: NDArray[np.int64], batch_size: int) -> list[Views]:
    """Return a fixed list of batches over ``roi_ids`` (epoch 0), for evaluation."""
    bounds = [*range(0, len(roi_ids), batch_size), len(roi_ids)]
    return [collate([dataset.views(0, int(i)) for i in roi_ids[a:b]]) for a, b in pairwise(bounds)]
