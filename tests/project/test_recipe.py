"""docs/recipe.md names every setting and quotes the configs; the configs follow the paper and DINO."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from muse_fast.config import PretrainConfig, load_config
from muse_fast.detection.config import FinetuneConfig
from muse_fast.runtime.options import known_keys, load_settings
from muse_fast.training.schedules import schedule_at

PAGE = Path(__file__).parents[2] / "docs" / "recipe.md"
PRETRAIN = [f"{arch}_{size}" for arch in ("vits16", "vitb16", "r50") for size in (224, 512)]
FINETUNE = ["finetune_brcam2c", "finetune_ocelot", "finetune_puma"]
QUOTED = re.compile(r"`([^`]+)`")


def section(title: str) -> str:
    return PAGE.read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(title: str, column: str) -> Iterator[tuple[list[str], str]]:
    """Yield the keys of each row that begins with one, and its cell in ``column``."""
    head, _, *body = [line.strip("| ").split(" | ") for line in section(title).splitlines() if line.startswith("|")]
    place = head.index(column)
    for cells in body:
        assert len(cells) == len(head), cells
        if cells[0].startswith("`") and "." in cells[0]:
            yield QUOTED.findall(cells[0]), cells[place]


def quoted(cell: str, config: str) -> list[str]:
    """Return the values that a cell such as "`1e-3`; R50 `5e-3`" quotes for a config; the last match counts."""
    values: list[str] = []
    for variant in cell.split("; "):
        names = variant.partition("`")[0].replace(" px", "").lower().split(", ")
        if any(name.strip() in config for name in names):
            values = QUOTED.findall(variant)
    return values


@pytest.mark.parametrize(
    ("title", "kind", "configs"), [("Pretraining", PretrainConfig, PRETRAIN), ("Fine-tuning", FinetuneConfig, FINETUNE)]
)
def test_quoted_values_are_those_of_the_configs(title: str, kind: type[Any], configs: list[str]) -> None:
    for config in configs:
        items = {}
        for keys, cell in rows(title, "ours"):
            values = quoted(cell, config)
            assert len(values) == len(keys), (config, keys, cell)
            items |= dict(zip(keys, values, strict=True))
        assert len(items) > 8
        loaded, typed = (OmegaConf.structured(load_settings(kind, *given)) for given in ((config,), (None, items)))
        for key, value in items.items():
            assert OmegaConf.select(loaded, key) == OmegaConf.select(typed, key), (config, key, value)


def test_every_setting_is_in_the_table_or_has_no_counterpart() -> None:
    in_table = [key for keys, _ in rows("Pretraining", "ours") for key in keys]
    others = section("Pretraining").split("Settings without a counterpart")[1].split("\n\n")[0]
    assert sorted([*in_table, *QUOTED.findall(others)]) == sorted(known_keys(PretrainConfig))


def test_cells_that_are_wrong_are_noticed() -> None:
    cell = "`1e-3`; R50 `5e-3`; 512 px `2`; OCELOT, PUMA `3`"
    expected = {
        "vits16_224": "1e-3",
        "r50_224": "5e-3",
        "r50_512": "2",
        "finetune_puma": "3",
        "finetune_brcam2c": "1e-3",
    }
    assert {config: quoted(cell, config) for config in expected} == {c: [v] for c, v in expected.items()}


PAPER: dict[str, Callable[[bool, bool], Any]] = {  # appendix B: of a ResNet, at 512 px
    "optim.steps": lambda resnet, large: 29_000 if large else 132_000,
    "optim.batch_size": lambda resnet, large: 256,
    "optim.lr": lambda resnet, large: 5e-3 if resnet else 1e-3,
    "loss.teacher_temp_end": lambda resnet, large: 0.05,
    "views.global_size": lambda resnet, large: 512 if large else 224,
    "views.local_size": lambda resnet, large: 208 if large else 96,
    "loss.lambda_image": lambda resnet, large: 1,
    "loss.lambda_nucleus": lambda resnet, large: 1,
}
DINO: dict[str, Callable[[bool, bool], Any]] = {  # main_dino.py and, for ResNet-50, the command in its README
    "optim.name": lambda resnet, large: "sgd" if resnet else "adamw",
    "optim.base_batch": lambda resnet, large: 256,
    "optim.min_lr": lambda resnet, large: 1e-6,
    "optim.weight_decay_start": lambda resnet, large: 1e-4 if resnet else 0.04,
    "optim.weight_decay_end": lambda resnet, large: 1e-4 if resnet else 0.4,
    "optim.clip": lambda resnet, large: "per_tensor",
    "optim.clip_grad": lambda resnet, large: 3.0,
    "optim.ema_start": lambda resnet, large: 0.996,
    "model.drop_path": lambda resnet, large: 0.0 if resnet else 0.1,
    "head.prototypes": lambda resnet, large: 65_536,
    "loss.student_temp": lambda resnet, large: 0.1,
    "loss.center_momentum": lambda resnet, large: 0.9,
    "views.num_locals": lambda resnet, large: 8,
}


@pytest.mark.parametrize("name", PRETRAIN)
def test_the_configs_follow_the_paper_and_dino(name: str) -> None:
    loaded, resnet, large = load_config(name), name.startswith("r50"), name.endswith("512")
    tree = OmegaConf.structured(loaded)
    for key, value in (PAPER | DINO).items():
        assert OmegaConf.select(tree, key) == value(resnet, large), key
    temps = [schedule_at(step, loaded).teacher_temp for step in (0, 30 * (483_627 // 256))]
    assert temps == ([0.05, 0.05] if large else [0.04, 0.05])
    if not large:
        assert loaded.optim.warmup_steps == 9_400


def test_other_configs_do_not_follow_the_recipe() -> None:
    """Their results, which the docs quote, are those of the global norm, AdamW and a rate that is not scaled."""
    for name in ("demo", "brcam2c_cpu", "ablation", None):
        optim = load_config(name).optim
        assert (optim.name, optim.clip, optim.base_batch) == ("adamw", "global", None)
        assert optim.peak_lr == optim.lr
