"""Settings of a fine-tuning run; the defaults are the paper's for BRCA-M2C (appendix B) where it gives any."""

from __future__ import annotations

from dataclasses import dataclass, field

from muse_fast.config import ViewsConfig
from muse_fast.detection.protocols import find_protocol
from muse_fast.errors import require
from muse_fast.images.mpp import MPP_RANGE
from muse_fast.images.squares import SURROUNDINGS

PSEUDO_VIEWS = ("plain", "same")


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplesConfig:
    train: str = "train"
    """Split of the source to train on; empty takes all images."""
    val: str = "val"
    """Split that chooses the best epoch."""
    mpp: float = 0.5
    """um per pixel at which images are seen."""
    sample_size: int = 1024
    """Side of a sample in pixels (equation 8). About the side of the annotated regions: no large field of view, the
    paper's ablation. Below it, samples are crops of the regions."""
    surroundings: str = "reflect"
    """What stands beyond an image: ``reflect`` mirrors it, ``mask`` leaves it white and out of all losses."""
    turns: bool = True
    """Flips and 90 degree turns."""
    jitter: float = 0.4
    """Strength of the brightness and contrast jitter; saturation takes half of it, hue a quarter."""
    grey: float = 0.0
    """Probability that a sample is turned to greyscale."""
    blur: bool = False
    """Blur every other sample."""
    workers: int = 2
    """Loader processes. The run is the same with any number of them; 0 loads in the training process."""
    timeout: int = 300
    """Seconds without a batch after which a loader process is called stalled and the run ends."""

    def __post_init__(self) -> None:
        low, high = MPP_RANGE
        require(low <= self.mpp <= high, "data.mpp", self.mpp, f"{low} to {high} um per pixel")
        fits = self.sample_size % 16 == 0 and 32 <= self.sample_size <= 1024
        require(fits, "data.sample_size", self.sample_size, "a multiple of 16, 32 to 1024")
        require(self.surroundings in SURROUNDINGS, "data.surroundings", self.surroundings, " or ".join(SURROUNDINGS))
        for key in ("jitter", "grey"):
            require(0 <= getattr(self, key) <= 1, f"data.{key}", getattr(self, key), "0 to 1")
        require(self.workers >= 0, "data.workers", self.workers, "0 or more")
        require(self.timeout >= 1, "data.timeout", self.timeout, "1 or more")

    def colours(self) -> ViewsConfig:
        """The same colour augmentation as pretraining, of these strengths."""
        return ViewsConfig(jitter=self.jitter, grey=self.grey, solarise=0.0, blur=self.blur)


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectorConfig:
    stride: int = 8
    """Pixels between proposals."""
    hidden_dim: int = 256
    """Width of both heads."""
    min_score: float = 0.5
    """Least probability of a nucleus in what is detected."""
    nms_um: float = 3.0
    """Of two detected nuclei nearer than this the less probable is dropped; 0 drops none."""

    def __post_init__(self) -> None:
        require(self.stride in (4, 8, 16), "detector.stride", self.stride, "4, 8 or 16")
        require(self.hidden_dim >= 1, "detector.hidden_dim", self.hidden_dim, "1 or more")
        require(0 <= self.min_score <= 1, "detector.min_score", self.min_score, "0 to 1")
        require(self.nms_um >= 0, "detector.nms_um", self.nms_um, "0 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectionLossConfig:
    lambda_reg: float = 5e-3
    """Weight of the squared distance, in pixels squared, of matched proposals."""
    lambda_type: float = 1.0
    """Weight of the cross-entropy of types inside the annotated region."""
    lambda_cons: float = 0.1
    """Weight that the consistency loss outside the region ends at, from 0; 0 leaves it out (the paper's ablation)."""
    background_weight: float = 0.5
    """Weight of background in both cross-entropies."""
    match_distance: float = 0.05
    """Cost of a pixel of distance in the matching, against the probability of the class."""
    confidence: float = 0.9
    """A pseudo-label must be more probable than this."""
    pseudo_view: str = "plain"
    """Where pseudo-labels come from: ``plain``, the network in evaluation mode on the sample in its own colours, or
    ``same``, the very predictions that they then judge."""

    def __post_init__(self) -> None:
        for key in ("lambda_reg", "lambda_type", "lambda_cons", "match_distance"):
            require(getattr(self, key) >= 0, f"loss.{key}", getattr(self, key), "0 or more")
        require(self.background_weight > 0, "loss.background_weight", self.background_weight, "above 0")
        require(0 <= self.confidence < 1, "loss.confidence", self.confidence, "0 to below 1")
        require(self.pseudo_view in PSEUDO_VIEWS, "loss.pseudo_view", self.pseudo_view, " or ".join(PSEUDO_VIEWS))


@dataclass(frozen=True, kw_only=True, slots=True)
class AdamConfig:
    epochs: int = 150
    batch_size: int = 4
    """Images per step."""
    lr: float = 1e-4
    min_lr: float = 1e-5
    """Learning rate of the last step, reached along half a cosine."""
    clip_grad: float = 0.0
    """Largest global gradient norm; 0 does not clip."""

    def __post_init__(self) -> None:
        for key in ("epochs", "batch_size"):
            require(getattr(self, key) >= 1, f"optim.{key}", getattr(self, key), "1 or more")
        require(0 <= self.min_lr <= self.lr, "optim.min_lr", self.min_lr, f"0 to optim.lr={self.lr}")
        require(self.clip_grad >= 0, "optim.clip_grad", self.clip_grad, "0 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneTrainConfig:
    precision: str = "bf16"
    """``bf16`` autocast or ``fp32``; weights, losses and optimiser state are fp32 either way."""
    device: str = "auto"
    """``auto`` takes a CUDA GPU where there is one."""
    log_every: int = 10
    """Steps between rows of metrics.jsonl."""
    eval_every: int = 1
    """Epochs between evaluations of the val split; the last epoch is always evaluated."""
    protocol: str = "ocelot"
    """Rule of the F1 that chooses the best epoch, see `muse_fast.detection.protocols`."""
    radius_um: float = 3.0
    """Within which a predicted and a true nucleus may pair."""

    def __post_init__(self) -> None:
        require(self.precision in ("bf16", "fp32"), "train.precision", self.precision, "bf16 or fp32")
        for key in ("log_every", "eval_every"):
            require(getattr(self, key) >= 1, f"train.{key}", getattr(self, key), "1 or more")
        find_protocol(self.protocol)
        require(self.radius_um > 0, "train.radius_um", self.radius_um, "above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneConfig:
    seed: int = 0
    data: SamplesConfig = field(default_factory=SamplesConfig)
    detector: DetectorConfig = field(default_factory=DetectorConfig)
    loss: DetectionLossConfig = field(default_factory=DetectionLossConfig)
    optim: AdamConfig = field(default_factory=AdamConfig)
    train: FinetuneTrainConfig = field(default_factory=FinetuneTrainConfig)

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**32, "seed", self.seed, "0 to 2**32 - 1")
