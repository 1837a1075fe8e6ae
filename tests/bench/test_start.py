"""``python -m bench start``: what runs begin with, and the curves over the steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench.__main__ import main
from bench.start import runs
from muse_fast import prepare
from muse_fast.config import load_config
from muse_fast.pretraining.start import first_backbone

pytestmark = pytest.mark.usefixtures("without_pictures")
TOY = """
data: {split: train, workers: 0}
views: {global_size: 64, num_locals: 0}
model: {arch: "timm:resnet10t:channels=[8,8,16,16]:stem_width=8", decoder_dim: 32}
head: {hidden_dim: 32, bottleneck_dim: 16, prototypes: 16, input_norm: true}
loss: {centering: sinkhorn}
optim: {batch_size: 2, warmup_steps: 1}
train: {precision: fp32, log_every: 1}
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    (folder / "toy.yaml").write_text(TOY)
    assert prepare.main(["synthetic:7", str(folder / "rois"), "size=224", "mpp=0.25"]) == 0
    return folder


def arguments(folder: Path, *more: str) -> list[str]:
    fixed = ["--device", "cpu", "--rois", str(folder / "rois"), "--config", str(folder / "toy.yaml"), "--mpp", "0.25"]
    return ["start", *fixed, "--out", str(folder / "runs"), "--first", "2", "--steps", "4", "--every", "2", *more]


@pytest.mark.slow
def test_the_encoder_alone_is_kept_and_frozen_where_a_variant_says_so(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = {name: runs.VARIANTS[name] for name in ("all at once", "frozen first")}
    monkeypatch.setattr(runs, "VARIANTS", some)
    out, figure = tmp_path / "out.json", tmp_path / "out.png"
    assert main(arguments(workplace, "--freeze", "3", "--json", str(out), "--figure", str(figure))) == 0
    report = json.loads(out.read_text())
    results = {result["variant"]: result["scores"] for result in report["results"]}
    assert list(results) == [runs.SCRATCH, *some]
    at = {name: {row["step"]: row["encoder"] for row in rows} for name, rows in results.items()}
    assert all(list(scores) == [0, 2, 4] for scores in at.values())
    first = report["first"]["encoder"]
    frozen = at["frozen first"]
    assert frozen[0] == frozen[2] == at["all at once"][0] == first, "an encoder that does not train keeps its scores"
    assert figure.stat().st_size > 10_000

    # What the teacher of a frozen run knows is what the first run left, and the decoder is another.
    kept = torch.load(workplace / "runs" / "encoder.pth", weights_only=True)
    config = load_config(workplace / "toy.yaml", ["seed=1"])
    init = f"model.init={config.model.arch}@{workplace / 'runs' / 'encoder.pth'}"
    start = first_backbone(load_config(workplace / "toy.yaml", ["seed=1", init]))
    assert all(torch.equal(kept[name], value) for name, value in start.encoder.encoder.state_dict().items())


def test_only_networks_of_timm(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments(workplace, "model.arch=vit_tiny"))
    assert "model.arch=vit_tiny: expected timm:NAME" in capsys.readouterr().err
