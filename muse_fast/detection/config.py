"""Settings of a fine-tuning run; the defaults are the paper's for BRCA-M2C (appendix B), as far as it states them."""

from __future__ import annotations

from dataclasses import dataclass, field

from muse_fast.config import PARALLEL, PRECISIONS, RECOMPUTE, ViewsConfig
from muse_fast.detection.squares import SURROUNDINGS
from muse_fast.errors import require
from muse_fast.images.mpp import MPP_RANGE
from muse_fast.runtime.options import AUTO, MAX_SEED, SWITCH, Config, Switch, setting
from muse_fast.scoring.protocols import PROTOCOLS

PSEUDO_VIEWS = ("plain", "same")


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplesConfig(Config):
    train: str = "train"
    """Split of the source to train on; empty uses all images."""
    val: str = "val"
    """Split on which the best epoch is chosen."""
    fraction: float = setting(1.0, gt=0, le=1)
    """Share of the images to train on that is used, at least one, drawn with the seed: for studies of few labels."""
    mpp: float = setting(0.5, ge=MPP_RANGE[0], le=MPP_RANGE[1], unit="um per pixel")
    """um per pixel of the samples."""
    sample_size: int = setting(1024, multiple_of=16, ge=32, le=1024)
    """Side of a sample in pixels (equation 8). At about the side of the annotated regions there is no large field of
    view (the paper's ablation); below it, samples are crops of the regions."""
    surroundings: str = setting("reflect", choices=SURROUNDINGS)
    """Area outside the image: ``reflect`` mirrors the image, ``mask`` is white and excluded from all losses."""
    turns: bool = True
    """Flips and 90 degree turns."""
    stain: float = setting(0.0, ge=0, le=1)
    """The amounts of haematoxylin, eosin and residual are multiplied by factors of 1 - stain to 1 + stain, each by its
    own, as ``views.stain`` of pretraining does; 0: they are not."""
    stain_shift: float = setting(0.0, ge=0, le=1)
    """They are then shifted by -stain_shift to stain_shift, in optical density (natural logarithm)."""
    jitter: float = setting(0.4, ge=0, le=1)
    """Strength of the brightness and contrast jitter; half of it for saturation, a quarter for hue."""
    grey: float = setting(0.0, ge=0, le=1)
    """Probability that a sample is converted to greyscale."""
    blur: bool = False
    """Blur every other sample."""
    workers: int = setting(2, ge=0, may_change=True)
    """Loader processes. The result does not depend on their number; 0 loads in the training process."""
    timeout: int = setting(300, ge=1, may_change=True)
    """Seconds without a batch after which a loader process counts as stalled and the run ends."""

    def colours(self) -> ViewsConfig:
        """The colour augmentation of pretraining, with these strengths."""
        return ViewsConfig(
            stain=self.stain,
            stain_shift=self.stain_shift,
            jitter=self.jitter,
            grey=self.grey,
            solarise=0.0,
            blur=self.blur,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class BackboneConfig(Config):
    recompute: str = setting("none", choices=RECOMPUTE, may_change=True)
    """Activations of a ViT layer that backward recomputes instead of storing them: ``none``, ``selective`` (all but
    matmuls and attention) or ``full``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectorConfig(Config):
    stride: int = setting(8, choices=(4, 8, 16))
    """Pixels between proposals."""
    hidden_dim: int = setting(256, ge=1)
    """Width of both heads."""
    min_score: float = setting(0.5, ge=0, le=1)
    """Minimal probability of a detected nucleus."""
    nms_um: float = setting(3.0, ge=0)
    """If two detected nuclei are closer than this, the less probable one is dropped; 0 keeps all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectionLossConfig(Config):
    lambda_reg: float = setting(5e-3, ge=0)
    """Weight of the squared distance, in pixels squared, of matched proposals."""
    lambda_type: float = setting(1.0, ge=0)
    """Weight of the cross-entropy of types inside the annotated region."""
    lambda_cons: float = setting(0.1, ge=0)
    """Final weight of the consistency loss outside the region, from 0; 0 disables the loss (the paper's ablation)."""
    background_weight: float = setting(0.5, gt=0)
    """Weight of background in both cross-entropies."""
    match_distance: float = setting(0.05, ge=0)
    """Cost of a distance of one pixel in the matching, relative to the probability of the class."""
    confidence: float = setting(0.9, ge=0, lt=1)
    """Pseudo-labels must be more probable than this."""
    pseudo_view: str = setting("plain", choices=PSEUDO_VIEWS)
    """Source of pseudo-labels: ``plain``, the network in evaluation mode on the sample without colour augmentation, or
    ``same``, the predictions that are trained."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdamConfig(Config):
    epochs: int = setting(150, ge=1)
    batch_size: int = setting(4, ge=1)
    """Images per step, summed over all ranks."""
    accumulate: int = setting(1, ge=1)
    """Micro-batches into which each rank splits its share of the batch, to save memory. Each loss is the mean over one
    micro-batch of all ranks, as are the statistics of BatchNorm; a step takes the mean of its micro-batches."""
    lr: float = setting(1e-4, ge=0)
    min_lr: float = setting(1e-5, ge=0)
    """Learning rate at the end of the cosine schedule."""
    clip_grad: float = setting(0.0, ge=0)
    """Maximal global gradient norm; 0 disables clipping."""

    def check(self) -> None:
        require(self.min_lr <= self.lr, "min_lr", self.min_lr, f"at most lr={self.lr}")


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneTrainConfig(Config):
    precision: str = setting("bf16", choices=PRECISIONS)
    """``bf16`` autocast or ``fp32``; weights, losses and optimiser state are fp32 either way. ``fp64`` is for tests."""
    device: str = "auto"
    """``auto`` uses a CUDA GPU if there is one; under torchrun, each rank uses its own."""
    parallel: str = setting("ddp", choices=PARALLEL, may_change=True)
    """On several ranks: ``ddp`` replicates everything, ``fsdp`` shards weights and optimiser state (FSDP2)."""
    compile: bool = setting(False, may_change=True)
    """torch.compile each ViT layer; the first step then takes minutes."""
    cuda_graph: Switch = setting(AUTO, choices=SWITCH, may_change=True)
    """Record the detector, whose shapes never change, as CUDA graphs in the second step and replay them from then on.
    ``auto``: on a single GPU, unless recording fails."""
    timeout: int = setting(1_200, ge=1, le=1_799, unit="seconds", may_change=True)
    """On several ranks: seconds without progress after which the rank that the others wait for is named and all exit.
    Must be longer than a checkpoint, an evaluation or a compiled first step, and shorter than half an hour."""
    log_every: int = setting(10, ge=1, may_change=True)
    """Steps between rows of metrics.jsonl."""
    eval_every: int = setting(1, ge=1)
    """Epochs between evaluations of the val split; the last epoch is always evaluated."""
    protocol: str = setting("ocelot", choices=PROTOCOLS)
    """Protocol of the F1 that selects the best epoch, see `muse_fast.scoring.protocols`."""
    radius_um: float = setting(3.0, gt=0)
    """Maximal distance in um between a predicted nucleus and its true one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneConfig(Config):
    seed: int = setting(0, ge=0, le=MAX_SEED)
    data: SamplesConfig = field(default_factory=SamplesConfig)
    model: BackboneConfig = field(default_factory=BackboneConfig)
    detector: DetectorConfig = field(default_factory=DetectorConfig)
    loss: DetectionLossConfig = field(default_factory=DetectionLossConfig)
    optim: AdamConfig = field(default_factory=AdamConfig)
    train: FinetuneTrainConfig = field(default_factory=FinetuneTrainConfig)
