"""Time the data path from the ROI set to batches of views, each stage and the whole.

Times are CPU seconds of one thread, so rates are per core and less sensitive to other load on the machine. Every round
times all stages once, with the views of another epoch. Before that, pixels and views from partially decoded ROIs are
compared with those from whole ROIs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.measure import quantiles, spent_milliseconds
from muse_fast.batch import Views
from muse_fast.config import DATA_BACKENDS, ViewsConfig
from muse_fast.finders.classical import detect_nuclei
from muse_fast.images import jpeg, jpeg_rows
from muse_fast.images.image_files import read_image
from muse_fast.images.synthetic import synthetic_image
from muse_fast.ops.reference import match_nuclei
from muse_fast.roiset.roiset import RoiSet, RoiSetWriter
from muse_fast.views.colours import apply_colour
from muse_fast.views.loader import StepSampler, ViewDataset, collate, load_views, render
from muse_fast.views.plan import Plan, draw_plan
from muse_fast.views.renderers import why_not

Row = dict[str, Any]
Image = tuple[NDArray[np.uint8], NDArray[np.float32]]  # pixels and nuclei
Loader = Callable[[ViewDataset, StepSampler], Iterable[Views]]

MPP = 0.25
SEED = 0
ENCODINGS: dict[str, dict[str, Any]] = {
    "q80 4:2:0": {"quality": 80, "subsampling": "4:2:0"},
    "q95 4:4:4": {"quality": 95, "subsampling": "4:4:4"},
}
SIZES = {224: ViewsConfig(), 512: ViewsConfig(global_size=512, local_size=208)}
ALL, SEEN = "decode all", "decode rows seen"
TARGETS = {224: 3.0}  # speedup over decoding all

MORE_BATCHES = 4  # of the long run of a loader, compared with the short run


def loaders(device: str) -> dict[str, Loader]:
    """Return the loaders that run here by the name of their backend; views stay on the device that rendered them."""
    found: dict[str, Loader] = {}
    for backend in DATA_BACKENDS:
        place = "cpu" if backend == "cpu" else device
        if why_not(backend, torch.device(place)) is None:
            found[backend] = partial(load_views, workers=0, backend=backend, device=place, pin_memory=place == "cuda")
    return found


# --- ROIs


def real_images() -> Path:
    """Return a folder of images of 2084 px at 0.25 um/px: ``mitos12`` in ``$MUSE_FAST_DATA`` or ``../shared/data``."""
    default = Path(__file__).parents[3] / "shared" / "data"
    return Path(os.environ.get("MUSE_FAST_DATA", default)) / "mitos12"


def images(folder: Path, count: int, side: int) -> Iterator[Image]:
    """Yield crops of the images in ``folder`` with detected nuclei, or procedural images if there is no such folder."""
    if not folder.is_dir():
        for seed in range(count):
            yield synthetic_image(seed, side, MPP)[:2]
        return
    for path in sorted(folder.iterdir())[:count]:
        pixels = np.ascontiguousarray(read_image(path)[:side, :side])
        yield pixels, detect_nuclei(pixels, MPP)[0]


def write_set(out: Path, rois: Sequence[Image], encoding: str) -> RoiSet:
    with RoiSetWriter(out, provenance={"made by": "bench data"}, **ENCODINGS[encoding]) as writer:
        for i, (pixels, xy) in enumerate(rois):
            writer.add(pixels, mpp=MPP, xy=xy, slide=str(i))
    return RoiSet(out)


def spread(plan: Plan) -> Plan:
    """Place each view of a plan anywhere in the ROI, as in a literal reading of the paper."""
    rng = np.random.default_rng([SEED, plan.epoch, plan.roi.id, 1])
    places = [rng.integers((plan.roi.width - box.side + 1, plan.roi.height - box.side + 1)) for box in plan.boxes]
    boxes = [replace(box, x=int(x), y=int(y)) for box, (x, y) in zip(plan.boxes, places, strict=True)]
    return replace(plan, boxes=tuple(boxes))


def decode_seen(plan: Plan) -> tuple[NDArray[np.uint8], int]:
    _, top, _, height = plan.window()
    return plan.roi.decode_rows(top, top + height)


def describe(plans: Sequence[Plan]) -> dict[str, float]:
    """Return means over ROIs: fractions of rows decoded and of pixels in the views' window; nuclei and pairs."""
    rows, pixels, nuclei, pairs = list[float](), list[float](), list[float](), list[float]()
    for plan in plans:
        _, _, width, height = plan.window()
        rows.append(len(decode_seen(plan)[0]) / plan.roi.height)
        pixels.append(width * height / (plan.roi.width * plan.roi.height))
        seen = plan.nuclei()
        nuclei.append(len(seen.index))
        pairs.append(len(match_nuclei(seen.index, seen.offsets, 1, plan.num_globals)[0]))
    means = {"rows": rows, "window": pixels, "nuclei_of_views": nuclei, "pairs": pairs}
    return {name: float(np.mean(values)) for name, values in means.items()}


# --- a case: one set, one size of views


def run_case(roiset: RoiSet, config: ViewsConfig, rounds: int, device: str) -> dict[str, Any]:
    """Return statistics of the views and a row per stage, or why pixels are wrong."""
    rois = [roiset[i] for i in range(len(roiset))]
    epochs = [[draw_plan(roi, epoch, SEED, config) for roi in rois] for epoch in range(rounds)]
    plans = [plan for epoch in epochs for plan in epoch]
    spread_plans = [spread(plan) for plan in plans]
    report = {
        "jpeg_bytes": float(np.mean([len(roi.jpeg) for roi in rois])),
        "nuclei_per_roi": float(np.mean([len(roi.xy) for roi in rois])),
        "anchored": describe(plans),
        "uniform": describe(spread_plans),
    }
    wrong = first_difference([*plans, *spread_plans], config)
    if wrong is not None:
        return report | {"results": [{"version": SEEN, "wrong": wrong}]}
    if device == "cuda":
        report["nvjpeg_mean_difference"] = nvjpeg_difference(epochs[0])
    times: dict[str, list[float]] = {}
    for epoch in epochs:
        calls = [(stage, call, False) for stage, call in stages(roiset, epoch, config).items()]
        if device == "cuda":
            calls += [(stage, call, True) for stage, call in gpu_stages(epoch).items()]
        for stage, call, on_gpu in calls:
            times.setdefault(stage, []).append(spent_milliseconds(call, on_gpu) / len(rois))
        for name, loader in loaders(device).items():
            run = partial(load_batches, loader, ViewDataset(roiset, config, SEED), epoch)
            times.setdefault(f"loader {name}", []).append(batch_milliseconds(name, run, device) / len(rois))
    rows = {stage: figures(values) for stage, values in times.items()}
    rows[SEEN]["speedup_all"] = rows[ALL]["median_ms"] / rows[SEEN]["median_ms"]
    return report | {"results": [{"version": stage} | row for stage, row in rows.items()]}


def first_difference(plans: Sequence[Plan], config: ViewsConfig) -> str | None:
    """Return where partially decoded rows, or views made from them, differ from those of the whole ROI, or None."""
    for plan in plans:
        _, top, _, height = plan.window()
        pixels, first = decode_seen(plan)
        if not np.array_equal(pixels[top - first : top - first + height], plan.roi.decode()[top : top + height]):
            return f"ROI {plan.roi.id}, epoch {plan.epoch}: pixels of rows {top} to {top + height - 1} differ"
        ours, expected = render(plan, config), views_of_all(plan)
        if not all(torch.equal(a, b) for a, b in zip((ours.global_images, ours.local_images), expected, strict=True)):
            return f"ROI {plan.roi.id}, epoch {plan.epoch}: views differ"
    return None


def views_of_all(plan: Plan) -> tuple[Tensor, Tensor]:
    """Return global and local views, made from the whole ROI."""
    views = coloured(plan, cropped(plan, plan.roi.decode(), 0))
    return torch.stack(views[: plan.num_globals]), torch.stack(views[plan.num_globals :])


def cropped(plan: Plan, pixels: NDArray[np.uint8], first_row: int) -> list[Tensor]:
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    return [replace(box, y=box.y - first_row).render(image) for box in plan.boxes]


def coloured(plan: Plan, views: Sequence[Tensor]) -> list[Tensor]:
    return [apply_colour(view, colour) for view, colour in zip(views, plan.colours, strict=True)]


def load_batches(loader: Loader, dataset: ViewDataset, plans: Sequence[Plan], count: int) -> None:
    """Load ``count`` batches of the ROIs in ``plans``: the first with the same views, then with others."""
    epoch, ids = plans[0].epoch, np.array([plan.roi.id for plan in plans])
    sampler = StepSampler(ids, seed=SEED, batch_size=len(ids), start_step=epoch, stop_step=epoch + count)
    for _ in loader(dataset, sampler):
        pass


def batch_milliseconds(backend: str, run: Callable[[int], None], device: str) -> float:
    """Return the time per batch of a loader; ``run(count)`` loads that many batches."""
    if backend == "cpu":
        return spent_milliseconds(partial(run, 1), on_gpu=False)
    # In the difference of two runs, work done once per run (DALI builds its pipeline) cancels out.
    short, long = (spent_milliseconds(partial(run, count), device == "cuda") for count in (1, 1 + MORE_BATCHES))
    return (long - short) / MORE_BATCHES


def stages(roiset: RoiSet, plans: Sequence[Plan], config: ViewsConfig) -> dict[str, Callable[[], object]]:
    """Return the stages, each over all ROIs. Their inputs are made here, outside their times."""
    rows = [decode_seen(plan) for plan in plans]
    crops = [cropped(plan, *found) for plan, found in zip(plans, rows, strict=True)]
    samples = [render(plan, config) for plan in plans]
    elsewhere = [spread(plan) for plan in plans]

    def cut(cut_rows: Callable[[bytes, int, int], object]) -> None:
        for plan in plans:
            _, top, _, height = plan.window()
            cut_rows(plan.roi.jpeg, top, top + height)

    def each(do: Callable[..., object], *arguments: Sequence[Any]) -> Callable[[], object]:
        return lambda: [do(*values) for values in zip(plans, *arguments, strict=True)]

    return {
        "read, check hash": lambda: [roiset[plan.roi.id] for plan in plans],
        "draw views, move nuclei": lambda: [draw_plan(p.roi, p.epoch, SEED, config).nuclei() for p in plans],
        ALL: lambda: [plan.roi.decode() for plan in plans],
        SEEN: lambda: [decode_seen(plan) for plan in plans],
        "of which cutting": lambda: cut(jpeg.cutter.cut_rows),
        "cutting in Python": lambda: cut(jpeg_rows.cut_rows),
        "decode rows seen, uniform": lambda: [decode_seen(plan) for plan in elsewhere],
        "crop and resize": each(cropped, [pixels for pixels, _ in rows], [first for _, first in rows]),
        "colours": each(coloured, crops),
        "collate": lambda: collate(samples),
    }


def gpu_stages(plans: Sequence[Plan]) -> dict[str, Callable[[], object]]:
    """Return nvJPEG's stages: a batch of whole ROIs and of their bands, from bytes in host memory."""
    return {
        "nvJPEG all": lambda: nvjpeg([plan.roi.jpeg for plan in plans]),
        "nvJPEG rows seen": lambda: nvjpeg([band(plan) for plan in plans]),
    }


def nvjpeg(jpegs: Sequence[bytes]) -> list[Tensor]:
    from torchvision.io import decode_jpeg

    return decode_jpeg([torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in jpegs], device="cuda")


def band(plan: Plan) -> bytes:
    _, top, _, height = plan.window()
    found = jpeg.cutter.cut_rows(plan.roi.jpeg, top, top + height)
    assert found is not None  # write_set wrote restart markers
    return found[0]


def nvjpeg_difference(plans: Sequence[Plan]) -> float:
    """Return the mean distance of pixel values from libjpeg's, which rounds and upsamples differently: in 0..1."""
    found = [image.permute(1, 2, 0).cpu().float() for image in nvjpeg([plan.roi.jpeg for plan in plans])]
    expected = [torch.from_numpy(plan.roi.decode()).float() for plan in plans]
    return float(np.mean([(a - b).abs().mean().item() for a, b in zip(found, expected, strict=True)]))


# --- figures


def figures(times: Sequence[float]) -> Row:
    row: Row = quantiles(times)
    return row | {"roi_per_s": 1e3 / row["median_ms"]}
