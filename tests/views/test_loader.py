"""The loader: random choices depend only on (seed, epoch, ROI id), batches only on the step."""

import multiprocessing
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from muse_fast.batch import Views
from muse_fast.config import ViewsConfig
from muse_fast.errors import UserError
from muse_fast.images.image_files import read_image
from muse_fast.images.synthetic import synthetic_image
from muse_fast.roiset.records import Roi
from muse_fast.roiset.roiset import RoiSet, RoiSetWriter
from muse_fast.views.loader import StepSampler, ViewDataset, as_batches, check_roiset, collate, load_views

VIEWS = ViewsConfig(global_size=64, local_size=32, num_locals=3)


@pytest.fixture(scope="module")
def roiset(tmp_path_factory: pytest.TempPathFactory) -> RoiSet:
    folder = tmp_path_factory.mktemp("set") / "rois"
    with RoiSetWriter(folder, provenance={"test": True}) as writer:
        for seed in range(5):
            image, xy, _ = synthetic_image(seed, 200, 0.25)
            writer.add(image, mpp=0.25, xy=xy if seed != 3 else xy[:0], slide=f"s{seed}")
    return RoiSet(folder)


def sampler(ids: np.ndarray, **options: int) -> StepSampler:
    return StepSampler(ids, **{"seed": 1, "batch_size": 4, "start_step": 0, "stop_step": 10, **options})


def same(a: Views, b: Views) -> bool:
    return all(
        torch.equal(x, y)
        for x, y in [
            (a.global_images, b.global_images),
            (a.local_images, b.local_images),
            (a.nuclei.xy, b.nuclei.xy),
            (a.nuclei.index, b.nuclei.index),
            (a.nuclei.offsets, b.nuclei.offsets),
            (a.mpp, b.mpp),
            (a.roi_ids, b.roi_ids),
            (a.epochs, b.epochs),
        ]
    ) and (a.num_global_nuclei == b.num_global_nuclei)


def test_every_roi_once_per_epoch_in_a_new_order() -> None:
    ids = np.array([3, 5, 8, 13, 21, 34])
    stream = [s for step in sampler(ids, batch_size=4, stop_step=9) for s in step]  # 36 samples, 6 epochs
    for epoch in range(6):
        assert sorted(r for e, r in stream if e == epoch) == ids.tolist()
    assert len({tuple(r for e, r in stream if e == epoch) for epoch in range(6)}) > 3


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("start", [0, 3])
def test_ranks_share_a_step_and_resume_at_any_world_size(world: int, start: int) -> None:
    ids = np.arange(7)
    whole = list(sampler(ids))
    parts = [list(sampler(ids, start_step=start, rank=r, world_size=world)) for r in range(world)]
    for k, step in enumerate(whole[start:]):
        assert [s for part in parts for s in part[k]] == step


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("accumulate", [2, 4])
def test_micro_batches_of_all_ranks_are_the_step(world: int, accumulate: int) -> None:
    """Joined, the micro-batches of a rank are its samples without accumulation."""
    ids = np.arange(7)
    for rank in range(world):
        ranks = {"batch_size": 8, "start_step": 2, "rank": rank, "world_size": world}
        whole, parts = list(sampler(ids, **ranks)), sampler(ids, **ranks, accumulate=accumulate)
        micro_batches = list(parts)
        assert len(parts) == len(micro_batches) == accumulate * len(whole)
        joined = [[s for part in micro_batches[i : i + accumulate] for s in part]
                  for i in range(0, len(micro_batches), accumulate)]  # fmt: skip
        assert joined == whole
        assert {len(part) for part in micro_batches} == {8 // world // accumulate}


def test_a_batch_that_ranks_cannot_share_and_an_empty_set_are_refused() -> None:
    with pytest.raises(UserError, match=r"batch_size=4: expected a multiple of 3 ranks"):
        sampler(np.arange(7), world_size=3)
    with pytest.raises(UserError, match=r"2 ranks x 4 micro-batches \(optim\.accumulate\)"):
        sampler(np.arange(7), world_size=2, accumulate=4)
    with pytest.raises(UserError, match=r"data\.split"):
        sampler(np.arange(0))


def test_the_same_views_with_any_number_of_workers(roiset: RoiSet) -> None:
    dataset = ViewDataset(roiset, VIEWS, seed=7)
    runs = [list(load_views(dataset, sampler(np.arange(5), stop_step=4), workers=workers)) for workers in (0, 2)]
    assert all(same(a, b) for a, b in zip(*runs, strict=True))
    assert not same(runs[0][0], runs[0][1])


def test_the_loader_does_not_touch_the_global_random_stream(roiset: RoiSet) -> None:
    dataset = ViewDataset(roiset, VIEWS, seed=7)
    before = torch.get_rng_state()
    next(iter(load_views(dataset, sampler(np.arange(5)), workers=1)))
    assert torch.equal(before, torch.get_rng_state())


def test_view_major_order_after_collate(roiset: RoiSet) -> None:
    dataset = ViewDataset(roiset, VIEWS, seed=7)
    singles = [dataset.views(0, roi) for roi in (4, 3, 0)]
    batch = collate(singles)
    assert (batch.num_rois, batch.num_globals, batch.num_locals) == (3, 2, 3)
    for view in range(5):
        for b, single in enumerate(singles):
            images = batch.global_images if view < 2 else batch.local_images
            own = single.global_images if view < 2 else single.local_images
            at = view if view < 2 else view - 2
            assert torch.equal(images[at * 3 + b], own[at])
            part, expected = batch.nuclei.images(view * 3 + b, view * 3 + b + 1), single.nuclei.images(view, view + 1)
            assert torch.equal(part.xy, expected.xy) and torch.equal(part.index, expected.index)
            assert batch.mpp[view * 3 + b] == single.mpp[view]
    assert batch.num_global_nuclei == int(batch.nuclei.offsets[2 * 3])
    groups, nuclei = batch.groups()
    assert torch.equal(groups[0], batch.global_images) and torch.equal(groups[1], batch.local_images)
    for part, expected in zip(nuclei, (batch.nuclei.images(0, 6), batch.nuclei.images(6, 15)), strict=True):
        assert torch.equal(part.xy, expected.xy) and torch.equal(part.offsets, expected.offsets)
        assert torch.equal(part.index, expected.index)
    counts = Counter(batch.nuclei.image_index().tolist())
    assert all(counts[i] == 0 for i in range(15) if i % 3 == 1)  # ROI 3 has no nuclei


def test_nuclei_of_views_lie_on_nuclei_in_the_image(roiset: RoiSet) -> None:
    """Hematoxylin is dark in red: the mean red at nuclei lies well below the mean of their views."""
    dataset = ViewDataset(
        roiset,
        ViewsConfig(global_size=64, local_size=32, num_locals=0, jitter=0, grey=0, solarise=0, blur=False),
        seed=7,
    )
    views = as_batches(dataset, np.array([0, 1, 2, 4]), 4)[0]
    x, y = views.nuclei.xy.long().unbind(1)
    assert views.global_images.dtype == torch.uint8
    red = views.global_images[:, 0].float()
    at_nuclei = red[views.nuclei.image_index(), y, x]
    assert len(at_nuclei) > 10
    assert at_nuclei.mean() < red.mean() - 17


def test_no_locals(roiset: RoiSet) -> None:
    config = ViewsConfig(global_size=64, local_size=32, num_locals=0)
    views = ViewDataset(roiset, config, seed=0)[[(0, 1), (0, 2)]]
    assert isinstance(views, Views) and views.local_images.shape == (0, 3, 32, 32) and views.num_locals == 0
    (group,), (nuclei,) = views.groups()
    assert torch.equal(group, views.global_images) and torch.equal(nuclei.offsets, views.nuclei.offsets)


@pytest.mark.parametrize(("folder", "mpp"), [("mitos12", 0.25), ("brcam2c/images", 0.5)])
def test_views_from_some_rows_equal_those_from_the_whole_roi(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, mpp: float
) -> None:
    """Bit for bit, on real images, and without decoding all rows."""
    with RoiSetWriter(tmp_path / "set", provenance={}) as writer:
        for path in sorted((shared_data / folder).iterdir())[:3]:
            image = read_image(path)
            xy = np.random.default_rng(0).uniform(0, min(image.shape[:2]), (200, 2))
            writer.add(image, mpp=mpp, xy=xy, slide=path.stem)
    config = ViewsConfig(global_mpp_min=mpp, global_mpp_max=mpp, local_mpp_min=mpp, local_mpp_max=mpp)
    dataset, decode_rows, shares = ViewDataset(RoiSet(tmp_path / "set"), config, seed=3), Roi.decode_rows, []

    def counted(roi: Roi, top: int, bottom: int) -> tuple[np.ndarray, int]:
        pixels, first = decode_rows(roi, top, bottom)
        shares.append(len(pixels) / roi.height)
        return pixels, first

    monkeypatch.setattr(Roi, "decode_rows", counted)
    of_rows = [dataset.views(epoch, roi) for epoch in range(3) for roi in range(3)]
    monkeypatch.setattr(Roi, "decode_rows", lambda roi, top, bottom: (roi.decode(), 0))
    of_all = [dataset.views(epoch, roi) for epoch in range(3) for roi in range(3)]
    assert all(same(a, b) for a, b in zip(of_rows, of_all, strict=True))
    assert len(shares) == 9 and max(shares) < 1


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_jpeg_stops_the_run_with_path_and_roi(tmp_path: Path, workers: int) -> None:
    folder = tmp_path / "rois"
    with RoiSetWriter(folder, provenance={}) as writer:
        image, xy, _ = synthetic_image(0, 128, 0.25)
        writer.add(image, mpp=0.25, xy=xy, slide="s")
    shard = folder / "shard-00000.bin"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(content)
    dataset = ViewDataset(RoiSet(folder), VIEWS, seed=0)
    with pytest.raises(UserError, match=r"rois.*ROI 0") as error:
        list(load_views(dataset, sampler(np.array([0])), workers=workers))
    assert "Traceback" not in str(error.value)


def test_rois_too_small_for_the_views_are_refused_by_id(roiset: RoiSet) -> None:
    with pytest.raises(UserError, match=r"ROI 0: a 200 x 200 px ROI"):
        check_roiset(roiset, np.arange(5), ViewsConfig())


def test_closing_ends_the_workers(roiset: RoiSet) -> None:
    """Workers ignore signals, so a program that ends with an error would wait for them."""
    before = set(multiprocessing.active_children())  # ranks of other tests
    views = load_views(ViewDataset(roiset, VIEWS, seed=7), sampler(np.arange(5)), workers=2)
    next(views)
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2 and all(worker.is_alive() for worker in workers)
    views.close()
    assert not any(worker.is_alive() for worker in workers)
