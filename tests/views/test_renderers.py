"""The backends of data.backend agree on the same plans: pixels to a grey level, everything else exactly."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from muse_fast.batch import PlannedViews, Views
from muse_fast.config import ViewsConfig
from muse_fast.errors import UserError
from muse_fast.images.imagenet import denormalise
from muse_fast.images.synthetic import synthetic_image
from muse_fast.ops import backends
from muse_fast.roiset.roiset import RoiSet, RoiSetWriter
from muse_fast.views import renderers
from muse_fast.views.loader import StepSampler, ViewDataset, load_views
from muse_fast.views.plan import pack
from muse_fast.views.renderers import UntilError, render_batch
from tests.support.dots import assert_dots_at, draw_dots, scattered

CPU = torch.device("cpu")
SMALL = ViewsConfig(global_size=48, local_size=32, num_locals=2)
PLAIN = {"jitter": 0.0, "grey": 0.0, "solarise": 0.0, "blur": False}
STAINED = {"stain": 0.4, "stain_shift": 0.08}

Load = Callable[[RoiSet, ViewsConfig], list[Views]]


def sampler(rois: RoiSet, steps: int = 2) -> StepSampler:
    return StepSampler(np.arange(len(rois)), seed=3, batch_size=3, start_step=0, stop_step=steps)


def by_cpu(rois: RoiSet, config: ViewsConfig) -> list[Views]:
    return list(load_views(ViewDataset(rois, config, 7), sampler(rois), workers=0))


def by_dali(rois: RoiSet, config: ViewsConfig, workers: int = 0) -> list[Views]:
    pytest.importorskip("nvidia.dali")
    dataset = ViewDataset(rois, config, 7)
    return list(load_views(dataset, sampler(rois), workers=workers, backend="dali"))


def by_op(rois: RoiSet, config: ViewsConfig) -> list[Views]:
    """The cuda backend's code without a GPU: decoding by simplejpeg, and the reference of the op."""
    return [render_batch(batch, config, CPU) for batch in planned(rois, config)]


def by_cuda(rois: RoiSet, config: ViewsConfig) -> list[Views]:
    dataset = ViewDataset(rois, config, 7)
    options = {"workers": 0, "pin_memory": True, "device": "cuda", "backend": "cuda"}
    return [views.to("cpu") for views in load_views(dataset, sampler(rois), **options)]


def by_dali_on_cuda(rois: RoiSet, config: ViewsConfig) -> list[Views]:
    pytest.importorskip("nvidia.dali")
    dataset = ViewDataset(rois, config, 7)
    return [v.to("cpu") for v in load_views(dataset, sampler(rois), workers=2, device="cuda", backend="dali")]


def planned(rois: RoiSet, config: ViewsConfig, steps: int = 2) -> Iterator[PlannedViews]:
    dataset = ViewDataset(rois, config, 7, planned=True)
    for samples in sampler(rois, steps):
        batch = dataset[samples]
        assert isinstance(batch, PlannedViews)
        yield batch


on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")]
OTHERS = pytest.mark.parametrize(
    "load",
    [
        pytest.param(by_dali, id="dali"),
        pytest.param(by_op, id="reference"),
        pytest.param(by_dali_on_cuda, id="dali_on_cuda", marks=on_gpu),
        pytest.param(by_cuda, id="cuda", marks=on_gpu),
    ],
)


@pytest.fixture(scope="module")
def tissue(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> RoiSet:
    """Images of slides from two hospitals, at two scales and of several sizes."""
    folder = tmp_path_factory.mktemp("tissue") / "rois"
    files = [
        *sorted((shared_data / "mitos12").glob("*.jpg"))[:10:5],
        *sorted((shared_data / "brcam2c" / "images").glob("*.png"))[::30],
    ]
    with RoiSetWriter(folder, provenance={}) as writer:
        for number, file in enumerate(files):
            image = np.array(Image.open(file).convert("RGB"))[: 700 - number, :700]
            xy = np.random.default_rng(number).random((60, 2)) * [image.shape[1], image.shape[0]]
            writer.add(image, mpp=0.25 if file.suffix == ".jpg" else 0.5, xy=xy, slide=file.stem)
    return RoiSet(folder)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> RoiSet:
    folder = tmp_path_factory.mktemp("drawn") / "rois"
    with RoiSetWriter(folder, provenance={}) as writer:
        for seed in range(4):
            image, xy, _ = synthetic_image(seed, 150 + seed, 0.25)
            writer.add(image, mpp=0.25, xy=xy if seed else xy[:0], slide="s")
    return RoiSet(folder)


def distances(a: Views, b: Views) -> torch.Tensor:
    """Return the mean absolute difference of every view, in levels."""
    pairs = ((a.global_images, b.global_images), (a.local_images, b.local_images))
    return torch.cat([(levels(x) - levels(y)).abs().flatten(1).mean(1) for x, y in pairs])


def levels(images: torch.Tensor) -> torch.Tensor:
    """Views of any backend, uint8 or normalised, in levels 0 to 255."""
    return (images if images.dtype == torch.uint8 else denormalise(images)).float()


def assert_same_but_pixels(a: Views, b: Views) -> None:
    for name in ("mpp", "roi_ids", "epochs"):
        assert torch.equal(getattr(a, name), getattr(b, name))
    for name in ("xy", "index", "offsets"):
        assert torch.equal(getattr(a.nuclei, name), getattr(b.nuclei, name))
    assert a.num_global_nuclei == b.num_global_nuclei
    for x, y in ((a.global_images, b.global_images), (a.local_images, b.local_images)):
        assert x.shape == y.shape
        assert y.is_contiguous()


@OTHERS
@pytest.mark.parametrize("coloured", [False, True], ids=["plain", "coloured"])
def test_agrees_with_the_cpu_backend(coloured: bool, load: Load, tissue: RoiSet) -> None:
    """Within a grey level: torch resizes uint8 in integers, which by itself accounts for a fifth of a level."""
    config = ViewsConfig(num_locals=3, **(STAINED if coloured else PLAIN))
    expected, got = by_cpu(tissue, config), load(tissue, config)
    assert len(got) == len(expected) == 2
    for a, b in zip(expected, got, strict=True):
        assert_same_but_pixels(a, b)
        assert distances(a, b).max() < (0.7 if coloured else 0.3)


@OTHERS
def test_agrees_on_colours_not_found_in_tissue(load: Load, tmp_path: Path) -> None:
    """Each channel is the highest and the lowest somewhere, and strong jitter shifts the hue far."""
    with RoiSetWriter(tmp_path / "rois", provenance={}) as writer:
        for seed in range(3):
            coarse = np.random.default_rng(seed).integers(0, 256, (20, 20, 3), dtype=np.uint8)
            image = np.asarray(Image.fromarray(coarse).resize((150, 150), Image.Resampling.BICUBIC))
            writer.add(image, mpp=0.25, xy=np.zeros((0, 2)), slide="s")
    rois, config = RoiSet(tmp_path / "rois"), ViewsConfig(global_size=48, local_size=32, num_locals=4, jitter=0.9)
    for a, b in zip(by_cpu(rois, config), load(rois, config), strict=True):
        assert distances(a, b).max() < 1


@pytest.mark.skipif(backends.triton_error() is not None, reason=str(backends.triton_error()))
def test_the_triton_kernels_agree_with_the_cpu_backend(drawn: RoiSet) -> None:
    """One ROI, because the interpreter is slow."""
    config = ViewsConfig(global_size=32, local_size=32, num_locals=1)
    dataset = ViewDataset(drawn, config, 7)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # on the CPU the kernels are interpreted
    expected = dataset.views(0, 1)
    got = render_batch(pack([dataset.plan(0, 1)]), config, device, "triton").to("cpu")
    assert_same_but_pixels(expected, got)
    assert distances(expected, got).max() < 0.7


@OTHERS
def test_dots_lie_where_the_nuclei_are(load: Load, tmp_path: Path) -> None:
    with RoiSetWriter(tmp_path / "rois", provenance={}, quality=100) as writer:
        for seed in range(3):
            xy = scattered(np.random.default_rng(seed), 310)
            image = draw_dots(310, xy, sigma=2.5).permute(1, 2, 0).contiguous().numpy()
            writer.add(image, mpp=0.3, xy=xy, slide="s")
    config = ViewsConfig(global_size=96, local_size=64, num_locals=4, **PLAIN)
    found = 0
    for views in load(RoiSet(tmp_path / "rois"), config):
        for images, nuclei in zip(*views.groups(), strict=True):
            for number, view in enumerate(levels(images)):
                found += assert_dots_at(view[0], nuclei.images(number, number + 1).xy.numpy())
    assert found > 100


def test_the_same_views_with_any_number_of_workers(drawn: RoiSet) -> None:
    for a, b in zip(by_dali(drawn, SMALL), by_dali(drawn, SMALL, workers=2), strict=True):
        assert_same_but_pixels(a, b)
        assert torch.equal(a.global_images, b.global_images) and torch.equal(a.local_images, b.local_images)


@OTHERS
def test_no_locals_and_no_turns(load: Load, drawn: RoiSet) -> None:
    config = ViewsConfig(global_size=64, local_size=32, num_locals=0, turns=False)
    for a, b in zip(by_cpu(drawn, config), load(drawn, config), strict=True):
        assert_same_but_pixels(a, b)
        assert distances(a, b).max() < 0.7


def test_nothing_to_load(drawn: RoiSet) -> None:
    pytest.importorskip("nvidia.dali")
    dataset = ViewDataset(drawn, SMALL, 7)
    assert list(load_views(dataset, sampler(drawn, steps=0), workers=0, backend="dali")) == []


@pytest.mark.parametrize("backend", ["dali", "cuda"])
def test_a_jpeg_that_cannot_be_decoded_is_named(backend: str, drawn: RoiSet) -> None:
    """The batches before it are used first."""
    good, bad = planned(drawn, SMALL)
    jpegs = bad.jpegs.clone()
    jpegs[bad.jpeg_bounds[1] + 2 : bad.jpeg_bounds[2]] = 0
    batches = [good, good, replace(bad, jpegs=jpegs), bad]
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
        views = renderers.rendered(batches, "dali", SMALL, CPU, 1)
    else:
        views = (render_batch(batch, SMALL, CPU) for batch in batches)
    done: list[Views] = []
    with pytest.raises(UserError, match=rf"rois, ROI {bad.roi_ids[1]}: the JPEG cannot be decoded"):
        done.extend(views)
    assert len(done) == 2


def test_a_planned_batch_contains_only_the_rows_that_its_views_cover(drawn: RoiSet) -> None:
    config = ViewsConfig(global_size=48, local_size=32, num_locals=2, global_mpp_max=0.25, local_mpp_max=0.25)
    batch = next(planned(drawn, config))
    tall = batch.shapes[:, 0]
    assert ((tall % 8 == 0) | (tall + 8 > 150)).all() and (tall < 120).all()
    boxes = batch.boxes.long()
    assert (boxes[:, 2] >= 0).all() and (boxes[:, 2] + boxes[:, 3] <= tall[boxes[:, 0]]).all()


def test_a_jpeg_of_another_size_is_refused_by_the_loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RoiSetWriter(tmp_path / "rois", provenance={}) as writer:
        image, xy, _ = synthetic_image(0, 150, 0.25)
        writer.add(image, mpp=0.25, xy=xy, slide="s")
    rois = RoiSet(tmp_path / "rois")
    taller = replace(rois[0], height=158)
    monkeypatch.setattr(RoiSet, "__getitem__", lambda self, i: taller)
    error = ViewDataset(rois, SMALL, 7, planned=True)[[(0, 0)]]
    assert isinstance(error, UserError) and "rois, ROI 0: the JPEG cannot be decoded" in str(error)


def test_items_before_an_error_are_used_first() -> None:
    error = UserError("damaged")
    items = UntilError(["a", "b", error, "c"])
    assert list(items) == ["a", "b"] and items.error is error


def test_why_not_explains_why_a_backend_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert renderers.why_not("cpu", torch.device("mps")) is None
    assert renderers.why_not("cuda", torch.device("cuda")) == backends.triton_error()
    assert renderers.why_not("cuda", CPU) == "it runs only on CUDA GPUs, and the run is on cpu"
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    reason = renderers.why_not("dali", CPU)
    assert reason is not None and "pip install 'muse_fast[dali]'" in reason


def test_nvjpeg_waits_for_those_who_still_read_its_memory(drawn: RoiSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """It decodes on a stream of its own, into memory that the batch before has freed on this one."""
    batch, order = next(planned(drawn, SMALL)), []

    def decode(jpegs: list[torch.Tensor], **_: object) -> list[torch.Tensor]:
        order.append("decode")
        return [torch.zeros(3, *shape) for shape in batch.shapes.tolist()]

    stream = SimpleNamespace(synchronize=lambda: order.append("wait"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(renderers, "decode_jpeg", decode)
    renderers._decode(batch, torch.device("cuda"))
    assert order == ["wait", "decode"]
