"""Worker processes of the loader: room for their batches, and which of them is blamed."""

from __future__ import annotations

import signal
from collections import namedtuple
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from muse_fast.config import ViewsConfig
from muse_fast.detection.samples import LabelledImage, LfovDataset
from muse_fast.errors import UserError
from muse_fast.images.synthetic import synthetic_image
from muse_fast.roiset.roiset import RoiSet, RoiSetWriter
from muse_fast.views import workers
from muse_fast.views.loader import StepSampler, ViewDataset, load_views

MIB = 2**20
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch):
    """Pretend that shared memory has so many bytes free."""

    def set_room(free: int, total: int | None = None) -> None:
        usage = Usage(free if total is None else total, 0, free)
        monkeypatch.setattr(workers.shutil, "disk_usage", lambda path: usage)

    return set_room


@pytest.fixture(scope="module")
def roiset(tmp_path_factory: pytest.TempPathFactory) -> RoiSet:
    folder = tmp_path_factory.mktemp("set") / "rois"
    with RoiSetWriter(folder, provenance={}) as writer:
        for seed in range(2):
            image, xy, _ = synthetic_image(seed, 128, 0.25)
            writer.add(image, mpp=0.25, xy=xy, slide=f"s{seed}")
    return RoiSet(folder)


def stored_bytes(batch: object) -> int:
    """Bytes of all tensors in a batch, however nested."""
    if isinstance(batch, torch.Tensor):
        return batch.nbytes
    parts = (
        batch if isinstance(batch, tuple) else [getattr(batch, name, None) for name in getattr(batch, "__slots__", ())]
    )
    return sum(stored_bytes(part) for part in parts)


def test_too_little_shared_memory_is_refused_before_workers_start(room) -> None:
    room(50 * MIB)
    workers.check_shared_memory(2, 10 * MIB)  # two ahead of each worker and one in use: exactly 50
    room(50 * MIB - 1)
    with pytest.raises(UserError) as error:
        workers.check_shared_memory(2, 10 * MIB)
    said = str(error.value)
    assert "data.workers=2" in said and "10.0 MiB each, need 50 MiB in /dev/shm, which has 49 of 49 MiB free" in said
    assert "--shm-size=1g" in said and "data.workers=0" in said


def test_ranks_of_a_machine_share_its_memory(room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    room(50 * MIB, total=400 * MIB)  # the others have begun
    workers.check_shared_memory(2, 10 * MIB)
    room(399 * MIB)
    with pytest.raises(UserError, match="need 400 MiB"):
        workers.check_shared_memory(2, 10 * MIB)


def test_a_loader_without_room_is_refused_and_reads_in_the_process(roiset: RoiSet, room) -> None:
    dataset = ViewDataset(roiset, ViewsConfig(global_size=64, local_size=32, num_locals=2), seed=0)
    sampler = StepSampler(np.arange(2), seed=0, batch_size=2, start_step=0, stop_step=1)
    room(100_000)
    with pytest.raises(UserError, match=r"--shm-size.*data\.workers=0"):
        next(load_views(dataset, sampler, workers=1))
    assert next(load_views(dataset, sampler, workers=0)).num_rois == 2


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_estimate_is_nearly_the_size_of_a_batch(roiset: RoiSet, accumulate: int) -> None:
    sampler = StepSampler(np.arange(2), seed=0, batch_size=8, start_step=0, stop_step=1, accumulate=accumulate)
    samples = next(iter(sampler))
    config = ViewsConfig(global_size=96, local_size=48, num_locals=3)
    views = ViewDataset(roiset, config, seed=0)
    size = stored_bytes(views[samples])
    assert 0.9 * size < views.batch_bytes(sampler.size) < size
    planned = ViewDataset(roiset, config, seed=0, planned=True)
    assert 0.3 * stored_bytes(planned[samples]) < planned.batch_bytes(sampler.size) < 3 * stored_bytes(planned[samples])
    image, xy, _ = synthetic_image(0, 128, 0.25)
    pixels, everywhere = torch.from_numpy(image).permute(2, 0, 1).contiguous(), torch.ones(128, 128, dtype=torch.bool)
    labelled = LabelledImage("image", pixels, everywhere, xy.astype(np.float32), np.zeros(len(xy), np.int64), (1, 1))
    tiles = LfovDataset([labelled] * 2, size=96, surroundings="reflect", turns=True, colours=config, seed=0)
    assert 0.9 * (size := stored_bytes(tiles[samples])) < tiles.batch_bytes(sampler.size) < size


# ------------------------------------------------------------------------------------------------------- who is blamed


@dataclass
class Process:
    """Stands for a worker process."""

    pid: int
    exitcode: int | None = None
    killed: bool = field(default=False)

    def is_alive(self) -> bool:
        return self.exitcode is None

    def kill(self) -> None:
        self.killed = True


def blame(processes: Sequence[Process], number: int, **found: object) -> str:
    pool = workers._Workers(processes, timeout=7, batch_bytes=10 * MIB)
    for name, value in found.items():
        setattr(pool, name, value)
    sampler = [[(0, 10 * batch)] for batch in range(9)]
    return str(pool.failure(sampler, number, lambda items: f"ROIs {items}"))


@pytest.mark.parametrize(("number", "first"), [(3, 1), (5, 2)])
def test_of_several_dead_workers_the_one_whose_batch_is_next_is_named(number: int, first: int) -> None:
    """Name, process id, exit code and ROIs are those of the same worker."""
    processes = [Process(100), Process(101, -signal.SIGKILL), Process(102, 3)]
    how = {1: "was killed by SIGKILL", 2: "exited with code 3"}[first]
    batch = next(n for n in range(number, 9) if n % 3 == first)
    said = blame(processes, number)
    assert f"loader process {first} of 3 (pid {100 + first}) {how}, at or before ROIs [{10 * batch}]" in said
    assert all(process.killed for process in processes)


def test_shared_memory_that_fills_up_during_a_run_is_the_cause() -> None:
    died = blame([Process(100, -signal.SIGBUS)], 0)
    assert "SIGBUS" in died and "/dev/shm was full" in died and "--shm-size=1g" in died and "data.workers=0" in died
    lost = blame([Process(100)], 0, _states=["S"], _no_room=True)
    assert "produced nothing for 7 s" in lost and "/dev/shm was full" in lost and "data.timeout" not in lost
    slow = blame([Process(100)], 0, _states=["S"])
    assert "if it is only slow, raise data.timeout" in slow and "/dev/shm" not in slow
