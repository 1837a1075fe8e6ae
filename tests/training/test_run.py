"""Settings that a run must continue with."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from muse_fast.config import PretrainConfig, load_config
from muse_fast.errors import UserError
from muse_fast.runtime import checkpoint
from muse_fast.training.run import refuse_other_settings


def save(folder: Path, config: PretrainConfig, *unknown: str) -> Path:
    """Save a checkpoint of a run from before the settings ``unknown`` existed."""
    tree = dataclasses.asdict(config)
    for key in unknown:
        section, name = key.split(".")
        del tree[section][name]
    return checkpoint.save(folder, 1, {}, {"step": 1, "config": tree}, keep_every=0)


def test_only_settings_that_do_not_change_the_numbers_may_change(tmp_path: Path) -> None:
    folder = save(tmp_path, PretrainConfig())
    refuse_other_settings(folder, PretrainConfig())
    refuse_other_settings(folder, load_config(None, ["data.workers=7"]))
    with pytest.raises(UserError, match=r"other settings: seed=3 \(was 0\), optim\.lr=0\.5 \(was 0\.001\);"):
        refuse_other_settings(folder, load_config(None, ["optim.lr=0.5", "seed=3"]))


def test_a_run_from_before_a_setting_continues_as_it_began(tmp_path: Path) -> None:
    folder = save(tmp_path, PretrainConfig(), "model.pos_embed_resize", "optim.clip")
    refuse_other_settings(folder, load_config(None, ["model.pos_embed_resize=size"]))
    with pytest.raises(UserError, match=r"other settings: model\.pos_embed_resize=scale_factor \(was size\);"):
        refuse_other_settings(folder, PretrainConfig())
    with pytest.raises(UserError, match=r"other settings: optim\.clip=per_tensor \(was global\);"):
        refuse_other_settings(folder, load_config(None, ["model.pos_embed_resize=size", "optim.clip=per_tensor"]))
