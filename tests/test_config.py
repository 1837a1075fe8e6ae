from pathlib import Path

import pytest

from muse_fast.config import PretrainConfig, load_config
from muse_fast.detection.config import FinetuneConfig
from muse_fast.errors import UserError
from muse_fast.runtime.options import CONFIGS, load_settings

SHIPPED = sorted(CONFIGS.glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_committed_configs_load(path: Path) -> None:
    load_settings(FinetuneConfig if path.name.startswith("finetune") else PretrainConfig, path)


def test_a_misspelt_key_of_finetuning_is_refused() -> None:
    with pytest.raises(UserError, match=r"did you mean 'loss\.lambda_cons'"):
        load_settings(FinetuneConfig, None, ["loss.lambda_con=1"])


def test_command_line_wins_over_file_wins_over_default(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("optim:\n  lr: 0.002\n  batch_size: 32\n")
    config = load_config(file, ["optim.lr=0.003"])
    assert (config.optim.lr, config.optim.batch_size, config.optim.clip_grad) == (0.003, 32, 3.0)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optim.lr=fast", "optim.lr"),
        ("optim.steps=1.5", "optim.steps"),
        ("optim.lr=nan", "optim.lr=nan: expected a finite number"),
        ("views.local_mpp_max=inf", "views.local_mpp_max=inf: expected a finite number"),
        ("views.blur=7", "views.blur=7: expected true or false"),
        ("loss.logit_free=maybe", "loss.logit_free=maybe: expected auto, true or false"),
        ("loss.logit_free=2", "expected auto, true or false"),
        ("loss.logit_free=null", "expected auto, true or false"),
        ("loss.logit_free=${seed}", "expected auto, true or false"),
        ("views.global_size=16", "32 to 1024"),
        ("views.global_mpp_min=0.9", "global_mpp_max"),
        ("loss.centering=none", "ema or sinkhorn"),
        ("optim.warmup_steps=132000", "below steps=132000"),
        ("loss.student_temp=0", "above 0"),
        ("data.backend=gpu", "cpu, dali or cuda"),
        ("model.attention=flash", "sdpa, xformers or varlen"),
        ("model.recompute=some", "none, selective or full"),
        ("train.precision=fp16", "bf16, fp32 or fp64"),
        ("train.parallel=dp", "ddp or fsdp"),
        ("optim.accumulate=0", "optim.accumulate"),
        ("optim.lr", "key=value"),
        ("optim.lr=[", "expected a number"),
        ("optim.lr=null", "optim.lr=null: expected a number"),
        ("optim.steps=0", r"^optim.steps=0: expected 1 or more$"),
        ("head.input_norm=${x}", "Interpolation key 'x' not found"),
        ("optim.steps=???", "expected a whole number"),
        ("optim=3", "no setting 'optim'"),
    ],
)
def test_bad_values_are_refused_by_key(override: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_config(None, [override])


def test_attention_that_is_not_deterministic_is_refused() -> None:
    load_config(None, ["train.deterministic=true", "model.attention=varlen"])
    with pytest.raises(UserError, match=r"^model\.attention=xformers: expected sdpa or varlen, as train\.determ"):
        load_config(None, ["train.deterministic=true", "model.attention=xformers"])


@pytest.mark.parametrize(
    ("text", "value"),
    [("auto", "auto"), ("true", True), ("no", False), ("1", True), ("${head.input_norm}", False), ("False", False)],
)
def test_a_switch_is_auto_or_a_bool(text: str, value: bool | str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"loss:\n  logit_free: {text}\n")
    for config in (load_config(file), load_config(None, [f"loss.logit_free={text}"])):
        assert (type(config.loss.logit_free), config.loss.logit_free) == (type(value), value)


def test_typo_in_file_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("optim:\n  lrr: 0.002\n")
    with pytest.raises(UserError, match=r"c\.yaml.*optim\.lrr.*did you mean 'optim\.lr'"):
        load_config(file)


@pytest.mark.parametrize("text", ["optim: [", "- 1\n- 2\n"])
def test_bad_yaml_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=r"c\.yaml"):
        load_config(file)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no config file"):
        load_config(tmp_path / "none.yaml")


def test_a_shipped_config_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("vitb16_512").views.global_size == 512
    Path("vitb16_512.yaml").write_text("views:\n  global_size: 448\n")
    assert load_config("vitb16_512.yaml").views.global_size == 448


@pytest.mark.parametrize("name", ["vits16_24", "configs/vits16_224.yaml", "pretrain_vits16_224"])
def test_an_unknown_name_is_refused_with_the_nearest_and_the_list(name: str) -> None:
    with pytest.raises(UserError, match=rf"no config file '{name}'; did you mean 'vits16_224'\?") as error:
        load_config(name)
    assert all(path.stem in str(error.value) for path in SHIPPED)
