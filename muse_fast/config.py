"""Settings of a pretraining run; `muse_fast.runtime.options` reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from muse_fast.errors import require
from muse_fast.runtime.options import AUTO, MAX_SEED, SWITCH, Config, Switch, load_settings, setting

DATA_BACKENDS = ("cpu", "dali", "cuda")
ATTENTION = ("sdpa", "xformers", "varlen")
RECOMPUTE = ("none", "selective", "full")
POS_EMBED_RESIZE = ("scale_factor", "size")
RESIZE_UNRECORDED = "size"  # the rule of weights from before the setting existed
PRECISIONS = ("bf16", "fp32", "fp64")
PARALLEL = ("ddp", "fsdp")
CENTERINGS = ("ema", "sinkhorn")
OPTIMISERS = ("adamw", "sgd", "lars")
CLIPPING = ("global", "per_tensor")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig(Config):
    roiset: str = setting("", may_change=True)
    """Folder of a ROI set, as written by ``python -m muse_fast.prepare``."""
    split: str = ""
    """Train only on the ROIs of this split; empty: on all."""
    workers: int = setting(2, ge=0, may_change=True)
    """Loader processes; the results do not depend on their number. 0 loads in the training process."""
    backend: str = setting("cpu", choices=DATA_BACKENDS, may_change=True)
    """Decodes and renders the views: ``cpu`` (in the loader processes), ``dali`` (NVIDIA DALI, on the device of the
    run) or ``cuda`` (nvJPEG and the op augment_views, on a GPU). Boxes, colours and nuclei are the same; pixels differ
    by a fifth of a grey level on average. With ``dali`` and ``cuda``, loader processes only read and plan."""
    timeout: int = setting(300, ge=1, may_change=True)
    """Seconds without a batch after which a loader process counts as stalled and the run ends."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewsConfig(Config):
    global_size: int = setting(224, ge=32, le=1024)
    """Side of a global view, pixels: a multiple of 16, for networks of timm of their patch size (or 32)."""
    local_size: int = setting(96, ge=32, le=1024)
    """Side of a local view, pixels."""
    num_globals: int = setting(2, choices=(2,))
    """Views that the teacher sees."""
    num_locals: int = setting(8, ge=0)
    """Additional views, only for the student."""
    global_mpp_min: float = setting(0.25, gt=0)
    """Finest um/px of a global view."""
    global_mpp_max: float = setting(0.50, gt=0)
    """Coarsest um/px of a global view."""
    local_mpp_min: float = setting(0.25, gt=0)
    """Finest um/px of a local view."""
    local_mpp_max: float = setting(0.50, gt=0)
    """Coarsest um/px of a local view."""
    min_overlap: float = setting(0.5, gt=0, le=1)
    """Least overlap of two global views along each axis, as a fraction of the smaller one's side."""
    min_nuclei: int = setting(0, ge=0)
    """Nuclei that the region of the two global views should hold; it is placed again if it holds fewer."""
    anchor_redraws: int = setting(3, ge=1)
    """Most times that the region is placed again; the last place counts, whatever it holds."""
    turns: bool = True
    """Random flips and 90 degree turns."""
    stain: float = setting(0.0, ge=0, le=1)
    """In every view, the amounts of haematoxylin, eosin and residual are multiplied by factors of 1 - stain to
    1 + stain, each by its own (Tellez et al., 2018); 0: they are not."""
    stain_shift: float = setting(0.0, ge=0, le=1)
    """They are then shifted by -stain_shift to stain_shift, in optical density (natural logarithm)."""
    jitter: float = setting(0.4, ge=0, le=1)
    """Strength of the brightness and contrast jitter; saturation gets half of it, hue a quarter (DINO's ratios)."""
    grey: float = setting(0.2, ge=0, le=1)
    """Probability that a view is converted to greyscale."""
    solarise: float = setting(0.2, ge=0, le=1)
    """Probability that the second global view is solarised."""
    blur: bool = True
    """Blur the first global view, the second with probability 0.1 and each local view with probability 0.5 (DINO)."""

    def check(self) -> None:
        for kind in ("global", "local"):
            low, high = getattr(self, f"{kind}_mpp_min"), getattr(self, f"{kind}_mpp_max")
            require(low <= high, f"{kind}_mpp_min", low, f"at most {kind}_mpp_max={high}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig(Config):
    arch: str = "vit_small"
    """An encoder of `muse_fast/models/archs.py`: vit_tiny, vit_small, vit_base, resnet50, ..., or any network of timm
    as timm:NAME[:key=value ...], with arguments of ``timm.create_model`` (docs/encoders.md)."""
    taps: list[int] = field(default_factory=list)
    """Four layers of a plain ViT of timm, or stages of a network with a pyramid, whose maps the decoder receives,
    counted from 0; empty: the last layer of each quarter, or the last stage at each of the strides 4, 8, 16 and 32."""
    decoder_dim: int = setting(0, multiple_of=4, ge=0)
    """Width D of nucleus features and of the unified map, for encoders whose widths would make the decoder too large or
    too small; its maps have D/4, D/2, D and 2D channels. 0: D is the width of a ViT, half that of a coarsest map."""
    drop_path: float = setting(0.1, ge=0, lt=1)
    """Drop path rate of the student's last block, rising linearly over depth; the teacher has none."""
    init: str = setting("", may_change=True)
    """What a new run begins with, at any view size: a run or checkpoint (student, teacher, heads and centres; an LFoV
    run starts from one at 224 px), an official MUSE ``.pth`` or an export (the backbone of both), or
    timm:NAME[:key=value ...]@FILE (the encoder of both, with NAME as in ``arch``); empty: random weights."""
    attention: str = setting("sdpa", choices=ATTENTION, may_change=True)
    """Attention of a ViT: ``sdpa`` (torch, on any device), or on CUDA GPUs ``xformers`` (the extra of that name) or
    ``varlen`` (torch's flash attention over packed images)."""
    recompute: str = setting("none", choices=RECOMPUTE, may_change=True)
    """Activations of a ViT layer that backward recomputes instead of storing them: ``none``, ``selective`` (all but
    matmuls and attention) or ``full``."""
    pos_embed_resize: str = setting("scale_factor", choices=POS_EMBED_RESIZE, before=RESIZE_UNRECORDED)
    """Scale by which a ViT resizes its position embedding to views of g x g patches that are not ``global_size``:
    ``scale_factor`` (g + 0.1) / stored, because the paper trains by DINO's recipe and DINO does so, or ``size``
    g / stored, which aligns the borders of both grids. The weights get used to the rule, so exports record it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadConfig(Config):
    hidden_dim: int = setting(2048, ge=2)
    bottleneck_dim: int = setting(256, ge=2)
    prototypes: int = setting(65536, ge=2)
    """K, of the image head and of the nucleus head."""
    input_norm: bool = False
    """LayerNorm and BatchNorm (without affine) before the MLP: stabilises short runs with small batches."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig(Config):
    lambda_image: float = setting(1.0, ge=0)
    lambda_nucleus: float = setting(1.0, ge=0)
    lambda_koleo: float = setting(0.0, ge=0)
    """KoLeo spreads the CLS features of global views (weight 0.1 in DINOv2); 0 skips it."""
    student_temp: float = setting(0.1, gt=0)
    teacher_temp_start: float = setting(0.04, gt=0)
    teacher_temp_end: float = setting(0.05, gt=0)
    teacher_temp_steps: int = setting(39_600, ge=0)
    """Steps over which the teacher temperature rises linearly; by default 30 % of all, as 30 of DINO's 100 epochs."""
    teacher_temp_epochs: float | None = setting(None, ge=0)
    """The same in epochs (one is ROIs / batch_size steps), which replaces ``teacher_temp_steps``; DINO suggests 30."""
    centering: str = setting("ema", choices=CENTERINGS)
    """``ema`` (the paper's) or ``sinkhorn`` (three iterations; for small batches, where the EMA centre oscillates)."""
    center_momentum: float = setting(0.9, ge=0, lt=1)
    logit_free: Switch = setting(AUTO, choices=SWITCH, before=True, may_change=True)
    """Compute logits twice instead of storing them: less memory, more arithmetic, other rounding. ``auto``: as is best
    for the machine on which the run begins (`muse_fast.pretraining.logits`); a run that resumes keeps that choice."""

    def check(self) -> None:
        require(self.lambda_image + self.lambda_nucleus > 0, "lambda_nucleus", 0, "one of the weights above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig(Config):
    name: str = setting("adamw", choices=OPTIMISERS)
    """``adamw``, ``sgd`` (with momentum 0.9) or ``lars``. DINO trains ViTs with AdamW and ResNets with SGD."""
    steps: int = setting(132_000, ge=1)
    batch_size: int = setting(256, ge=1)
    """ROIs per step, summed over all ranks."""
    accumulate: int = setting(1, ge=1)
    """Micro-batches into which each rank splits its share of the batch, to save memory. The statistics of BatchNorm
    and Sinkhorn are those of one micro-batch of all ranks."""
    lr: float = setting(1e-3, ge=0)
    """Peak learning rate, of a batch of ``base_batch`` ROIs if that is set."""
    base_batch: int | None = setting(None, ge=1)
    """Scales the peak to ``lr * batch_size / base_batch`` (256 in DINO); null does not scale it."""
    min_lr: float = setting(1e-6, ge=0)
    warmup_steps: int = setting(9_400, ge=0)
    weight_decay_start: float = setting(0.04, ge=0)
    weight_decay_end: float = setting(0.4, ge=0)
    clip_grad: float = setting(3.0, ge=0)
    """Maximum of the gradient norm; 0: no clipping."""
    clip: str = setting("global", choices=CLIPPING)
    """Which norm: ``global``, of all gradients together, or ``per_tensor``, of each by itself (DINO)."""
    ema_start: float = setting(0.996, ge=0, le=1)
    ema_end: float = setting(1.0, ge=0, le=1)
    freeze_prototypes_steps: int = setting(1_889, ge=0)
    """Prototypes are frozen for the first steps (the recipe's first epoch)."""
    freeze_encoder: int = setting(0, ge=0)
    """First steps in which the encoder that ``model.init`` loaded is frozen: only decoder and heads, which may be new,
    learn. Its BatchNorm uses the stored statistics meanwhile, and no paths are dropped."""
    layer_decay: float = setting(1.0, gt=0, le=1)
    """Factor between the learning rates of one layer of the encoder and the next: ``lr * layer_decay^(layers - i)`` for
    layer i, 0 the patch embedding, as in BEiT; 1: the same for all."""
    encoder_lr_scale: float = setting(1.0, gt=0)
    """Factor of the encoder's learning rate, next to that of decoder and heads."""

    def check(self) -> None:
        require(self.warmup_steps < self.steps, "warmup_steps", self.warmup_steps, f"below steps={self.steps}")
        scaled = "" if self.base_batch is None else f" * batch_size / base_batch = {self.peak_lr:g}"
        require(self.min_lr <= self.peak_lr, "min_lr", self.min_lr, f"at most lr={self.lr}{scaled}")

    @property
    def peak_lr(self) -> float:
        """The learning rate after the warm-up."""
        return self.lr if self.base_batch is None else self.lr * self.batch_size / self.base_batch


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig(Config):
    precision: str = setting("bf16", choices=PRECISIONS)
    """``bf16`` autocast or ``fp32``; weights, losses and optimiser state are fp32 either way. ``fp64`` is for tests.
    On a CPU without bf16 instructions (AVX512-BF16 or AMX) bf16 is emulated and many times slower than fp32."""
    device: str = "auto"
    """``auto``: a CUDA GPU if there is one; under torchrun, each rank uses its own."""
    parallel: str = setting("ddp", choices=PARALLEL, may_change=True)
    """On several ranks: ``ddp`` replicates everything, ``fsdp`` shards weights and optimiser state (FSDP2)."""
    compile: bool = setting(False, may_change=True)
    """torch.compile each ViT layer: fuses norms, GELU, casts and sums. The first step then takes minutes."""
    cuda_graph: Switch = setting(AUTO, choices=SWITCH, may_change=True)
    """Record encoder and decoder, whose shapes never change, as CUDA graphs in the second step and replay them from
    then on, so that the host does not launch their kernels one by one. ``auto``: on a single GPU, unless recording
    fails; the run says so."""
    deterministic: bool = setting(False, may_change=True)
    """On a GPU, take only operations that give the same bits in every run, so that a resumed run does not differ; on a
    CPU that is always so. Attention is then never cuDNN's. How much time it costs has not been measured."""
    timeout: int = setting(1_200, ge=1, le=1_799, unit="seconds", may_change=True)
    """On several ranks: seconds without progress after which the rank that the others wait for is named and all exit.
    Must be longer than a checkpoint, an evaluation or a compiled first step, and shorter than half an hour."""
    log_every: int = setting(10, ge=1, may_change=True)
    """Steps between rows of metrics.jsonl."""
    checkpoint_every: int = setting(1_000, ge=1, may_change=True)
    keep_every: int = setting(10_000, ge=0, may_change=True)
    """Checkpoints at multiples of this step are kept, in addition to the last two; 0: only the last two."""
    eval_every: int = setting(5_000, ge=0)
    """Steps between evaluations of nucleus retrieval; 0 evaluates only at the start and at the end."""
    eval_rois: int = setting(32, ge=1)
    """ROIs in that evaluation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig(Config):
    seed: int = setting(0, ge=0, le=MAX_SEED)
    data: DataConfig = field(default_factory=DataConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def check(self) -> None:
        random = self.train.deterministic and self.model.attention == "xformers"  # its backward adds in any order
        require(not random, "model.attention", "xformers", "sdpa or varlen, as train.deterministic is true")


def load_config(path: str | Path | None, items: Sequence[str] = ()) -> PretrainConfig:
    """Read the settings of a pretraining run, see `load_settings`."""
    return load_settings(PretrainConfig, path, items)
