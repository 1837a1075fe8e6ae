"""Settings of a pretraining run, and the strict loader of every command's settings.

They are frozen dataclasses, filled from YAML and ``key=value`` by OmegaConf.

Precedence: defaults below < the YAML file < ``key=value`` on the command line. A key that does not exist, a value of
the wrong type or out of range is refused with the key to change.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from muse_fast.errors import UserError, did_you_mean, require

ARCHS = ("vit_tiny", "vit_small", "vit_base", "resnet50")
DATA_BACKENDS = ("cpu", "dali", "cuda")
ATTENTION = ("sdpa", "xformers", "varlen")
RECOMPUTE = ("none", "selective", "full")
PRECISIONS = ("bf16", "fp32", "fp64")
PARALLEL = ("ddp", "fsdp")


def check_arch(arch: str) -> None:
    """Refuse what is not one of ``ARCHS``.

    Raises:
        UserError: with the nearest one.
    """
    if arch not in ARCHS:
        raise UserError(f"unknown arch '{arch}'; expected one of {', '.join(ARCHS)}{did_you_mean(arch, ARCHS)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    roiset: str = ""
    """Folder of a ROI set, as written by ``python -m muse_fast.prepare``."""
    split: str = ""
    """Train on the ROIs of this split alone; empty takes all."""
    workers: int = 2
    """Loader processes. The run is the same with any number of them; 0 loads in the training process."""
    backend: str = "cpu"
    """Who decodes and renders views: ``cpu`` (the loader processes), ``dali`` (NVIDIA DALI, on the GPU or, in runs on a
    CPU, there) or ``cuda`` (nvJPEG and the op augment_views, on a GPU). Boxes, colours and nuclei are the same; pixels
    differ by a fifth of a grey level on average. With the last two, loader processes only read and plan."""
    timeout: int = 300
    """Seconds without a batch after which a loader process is called stalled and the run ends."""

    def __post_init__(self) -> None:
        require(self.backend in DATA_BACKENDS, "data.backend", self.backend, " or ".join(DATA_BACKENDS))
        require(self.timeout >= 1, "data.timeout", self.timeout, "1 or more")
        require(self.workers >= 0, "data.workers", self.workers, "0 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewsConfig:
    global_size: int = 224
    """Side of a global view, pixels."""
    local_size: int = 96
    """Side of a local view, pixels."""
    num_globals: int = 2
    """Views that the teacher sees."""
    num_locals: int = 8
    """Further views that the student alone sees."""
    global_mpp_min: float = 0.25
    """Finest um/px of a global view."""
    global_mpp_max: float = 0.50
    """Coarsest um/px of a global view."""
    local_mpp_min: float = 0.25
    """Finest um/px of a local view."""
    local_mpp_max: float = 0.50
    """Coarsest um/px of a local view."""
    min_overlap: float = 0.5
    """Least share of the smaller global view's side that any two global views have in common, per axis."""
    turns: bool = True
    """Flips and 90 degree turns."""
    jitter: float = 0.4
    """Strength of the brightness and contrast jitter; saturation takes half of it, hue a quarter (DINO's ratios)."""
    grey: float = 0.2
    """Probability that a view is turned to greyscale."""
    solarise: float = 0.2
    """Probability that the second global view is solarised."""
    blur: bool = True
    """Blur the first global view always, the second one time in ten, locals every other time (DINO)."""

    def __post_init__(self) -> None:
        for key in ("global_size", "local_size"):
            size = getattr(self, key)
            require(size % 16 == 0 and 32 <= size <= 1024, f"views.{key}", size, "a multiple of 16, 32 to 1024")
        require(self.num_globals == 2, "views.num_globals", self.num_globals, "2, as in the paper")
        require(self.num_locals >= 0, "views.num_locals", self.num_locals, "0 or more")
        for kind in ("global", "local"):
            low, high = getattr(self, f"{kind}_mpp_min"), getattr(self, f"{kind}_mpp_max")
            require(0 < low <= high, f"views.{kind}_mpp_min", low, f"above 0 and not above {kind}_mpp_max={high}")
        require(0 < self.min_overlap <= 1, "views.min_overlap", self.min_overlap, "above 0, at most 1")
        for key in ("jitter", "grey", "solarise"):
            require(0 <= getattr(self, key) <= 1, f"views.{key}", getattr(self, key), "0 to 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    arch: str = "vit_small"
    """One of vit_tiny, vit_small, vit_base, resnet50."""
    drop_path: float = 0.1
    """Stochastic depth of the student's last block (linear over depth); the teacher has none."""
    init: str = ""
    """Run folder or checkpoint whose weights, teacher and centres a new run starts from, at any view size (as an LFoV
    run starts from one at 224 px); empty starts at random."""
    attention: str = "sdpa"
    """Attention of a ViT: ``sdpa`` (torch, anywhere), ``xformers`` or ``varlen`` (torch's flash attention over packed
    images), the last two on CUDA GPUs."""
    recompute: str = "none"
    """What the backward of a ViT layer computes again instead of storing it: ``none``, ``selective`` (all but matmuls
    and attention) or ``full``."""

    def __post_init__(self) -> None:
        check_arch(self.arch)
        require(self.attention in ATTENTION, "model.attention", self.attention, " or ".join(ATTENTION))
        require(self.recompute in RECOMPUTE, "model.recompute", self.recompute, " or ".join(RECOMPUTE))
        for key, default in (("attention", "sdpa"), ("recompute", "none")):
            is_vit = self.arch != "resnet50"
            require(is_vit or getattr(self, key) == default, f"model.{key}", getattr(self, key), f"{default} (no ViT)")
        require(0 <= self.drop_path < 1, "model.drop_path", self.drop_path, "0 to below 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadConfig:
    hidden_dim: int = 2048
    bottleneck_dim: int = 256
    prototypes: int = 65536
    """K, for the image head and the nucleus head alike."""
    input_norm: bool = False
    """LayerNorm and BatchNorm (no affine) before the MLP: steadies short runs with small batches."""

    def __post_init__(self) -> None:
        for key in ("hidden_dim", "bottleneck_dim", "prototypes"):
            require(getattr(self, key) >= 2, f"head.{key}", getattr(self, key), "2 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    lambda_image: float = 1.0
    lambda_nucleus: float = 1.0
    student_temp: float = 0.1
    teacher_temp_start: float = 0.04
    teacher_temp_end: float = 0.05
    teacher_temp_steps: int = 39_600
    """Steps over which the teacher temperature rises linearly."""
    centering: str = "ema"
    """``ema`` (the paper's) or ``sinkhorn`` (three iterations; for small batches, where the EMA centre swings)."""
    center_momentum: float = 0.9
    logit_free: bool = True
    """Never store logits: two fifths of the step's memory at K = 65536, for computing them twice. Below some thousand
    prototypes stored logits are faster."""

    def __post_init__(self) -> None:
        require(self.centering in ("ema", "sinkhorn"), "loss.centering", self.centering, "ema or sinkhorn")
        for key in ("student_temp", "teacher_temp_start", "teacher_temp_end"):
            require(getattr(self, key) > 0, f"loss.{key}", getattr(self, key), "above 0")
        for key in ("lambda_image", "lambda_nucleus", "teacher_temp_steps"):
            require(getattr(self, key) >= 0, f"loss.{key}", getattr(self, key), "0 or more")
        require(self.lambda_image + self.lambda_nucleus > 0, "loss.lambda_nucleus", 0, "one of the weights above 0")
        require(0 <= self.center_momentum < 1, "loss.center_momentum", self.center_momentum, "0 to below 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    steps: int = 132_000
    batch_size: int = 256
    """ROIs per step, over all ranks."""
    accumulate: int = 1
    """Micro-batches that a rank splits its share of the batch into, one after the other, where memory is short.
    BatchNorm and Sinkhorn take their statistics over one micro-batch of all ranks."""
    lr: float = 1e-3
    """Peak learning rate."""
    min_lr: float = 1e-6
    warmup_steps: int = 9_400
    weight_decay_start: float = 0.04
    weight_decay_end: float = 0.4
    clip_grad: float = 3.0
    """Largest global gradient norm; 0 does not clip."""
    ema_start: float = 0.996
    ema_end: float = 1.0
    freeze_prototypes_steps: int = 1_889
    """Prototypes stay as they are for so many first steps (the recipe's first epoch)."""

    def __post_init__(self) -> None:
        for key in ("steps", "batch_size", "accumulate"):
            require(getattr(self, key) >= 1, f"optim.{key}", getattr(self, key), "1 or more")
        require(0 <= self.warmup_steps < self.steps, "optim.warmup_steps", self.warmup_steps, "below optim.steps")
        require(0 <= self.min_lr <= self.lr, "optim.min_lr", self.min_lr, f"0 to optim.lr={self.lr}")
        for key in ("weight_decay_start", "weight_decay_end", "clip_grad", "freeze_prototypes_steps"):
            require(getattr(self, key) >= 0, f"optim.{key}", getattr(self, key), "0 or more")
        for key in ("ema_start", "ema_end"):
            require(0 <= getattr(self, key) <= 1, f"optim.{key}", getattr(self, key), "0 to 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    precision: str = "bf16"
    """``bf16`` autocast or ``fp32``; weights, losses and optimiser state are fp32 either way. ``fp64`` is for checks.
    On a CPU without bf16 instructions (AVX512-BF16 or AMX) bf16 is emulated and many times slower than fp32."""
    device: str = "auto"
    """``auto`` takes a CUDA GPU where there is one; under torchrun every rank takes its own."""
    parallel: str = "ddp"
    """On several ranks: ``ddp`` holds everything on each, ``fsdp`` shards weights and optimiser state (FSDP2)."""
    compile: bool = False
    """torch.compile of every ViT layer: fuses norms, GELU, casts and sums. The first step then takes minutes."""
    timeout: int = 1_200
    """Seconds without progress after which, on several ranks, the one that the others wait for is named and all end.
    Longer than a checkpoint, an evaluation or a compiled first step takes, and below half an hour."""
    log_every: int = 10
    """Steps between rows of metrics.jsonl."""
    checkpoint_every: int = 1_000
    keep_every: int = 10_000
    """Checkpoints at multiples of this step are kept for ever; of the others the last two. 0 keeps none."""
    eval_every: int = 5_000
    """Steps between evaluations of nucleus retrieval; 0 evaluates at the start and at the end alone."""
    eval_rois: int = 32
    """ROIs in that evaluation."""

    def __post_init__(self) -> None:
        require(self.precision in PRECISIONS, "train.precision", self.precision, " or ".join(PRECISIONS))
        require(self.parallel in PARALLEL, "train.parallel", self.parallel, " or ".join(PARALLEL))
        for key in ("log_every", "checkpoint_every", "eval_rois"):
            require(getattr(self, key) >= 1, f"train.{key}", getattr(self, key), "1 or more")
        require(1 <= self.timeout < 1_800, "train.timeout", self.timeout, "1 to 1799 seconds")
        for key in ("keep_every", "eval_every"):
            require(getattr(self, key) >= 0, f"train.{key}", getattr(self, key), "0 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig:
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**32, "seed", self.seed, "0 to 2**32 - 1")
        is_vit = self.model.arch != "resnet50"
        require(is_vit or not self.train.compile, "train.compile", self.train.compile, "false (no ViT)")


_Config = TypeVar("_Config")


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> PretrainConfig:
    """Settings of a pretraining run, see `load_as`."""
    return load_as(PretrainConfig, path, overrides)


def load_as(kind: type[_Config], path: str | Path | None, overrides: Sequence[str] = ()) -> _Config:
    """Read ``path`` (YAML, may be None) and ``overrides`` (``a.b=value``) into a checked config of that kind.

    Raises:
        UserError: no such file, bad YAML, unknown key (with the nearest known one), wrong type, out of range.
    """
    defaults = defaults_of(kind)
    schema = OmegaConf.structured(kind())
    OmegaConf.set_readonly(schema, False)
    layers: list[tuple[str, DictConfig]] = []
    if path is not None:
        layers.append((str(path), _read_yaml(Path(path))))
    for override in overrides:
        if "=" not in override:
            raise UserError(f"'{override}': settings are given as key=value, for example optim.lr=1e-3")
        layers.append((f"'{override}'", OmegaConf.from_dotlist([override])))
    merged = schema
    for origin, layer in layers:
        _check_keys(layer, origin, defaults)
        try:
            merged = OmegaConf.merge(merged, layer)
        except OmegaConfBaseException as error:
            key = error.full_key or "?"
            raise UserError(f"{origin}: {key}: {str(error).splitlines()[0]}") from None
    for key, value in flatten(OmegaConf.to_container(merged)):  # type: ignore[arg-type]
        require(not isinstance(value, float) or math.isfinite(value), key, value, "a finite number")
    config = OmegaConf.to_object(merged)
    assert isinstance(config, kind)
    return config


def _read_yaml(path: Path) -> DictConfig:
    if not path.is_file():
        raise UserError(f"no config file at {path}")
    try:
        loaded = OmegaConf.load(path)
    except Exception as error:  # the YAML parser's own errors share no base class with OmegaConf's
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(loaded, DictConfig):
        raise UserError(f"{path}: expected sections such as 'optim:' at the top level, got a list")
    return loaded


def known_keys(kind: type[Any] = PretrainConfig) -> list[str]:
    """Every setting as a dotted key."""
    return list(defaults_of(kind))


def defaults_of(kind: type[Any]) -> dict[str, Any]:
    """Every setting by its dotted key."""
    return dict(flatten(dataclasses.asdict(kind())))


def flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested dicts as (dotted key, value)."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _check_keys(layer: DictConfig, origin: str, defaults: dict[str, Any]) -> None:
    """Refuse keys that are not known, and numbers that OmegaConf would take for yes and no."""
    known = list(defaults)
    sections = {key.split(".")[0] for key in known if "." in key}
    raw = OmegaConf.to_container(layer)
    assert isinstance(raw, dict)
    for key, value in flatten({str(k): v for k, v in raw.items()}):
        if key in sections and value in (None, {}):
            continue
        if key not in known:
            raise UserError(f"{origin}: no setting '{key}'{_suggest(key, known)}")
        if isinstance(defaults[key], bool) and isinstance(value, int | float):
            require(value in (0, 1), f"{origin}: {key}", value, "true or false")


def _suggest(key: str, known: list[str]) -> str:
    """The nearest known key, one with the same last part before others."""
    leaf = key.rsplit(".", 1)[-1]
    same_leaf = [name for name in known if name.rsplit(".", 1)[-1] == leaf]
    return did_you_mean(key, same_leaf or known) or f". Known: {', '.join(known)}"
