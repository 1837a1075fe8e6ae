"""The fine-tuning step on one page, and the state that it changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from muse_fast.detection.config import FinetuneConfig
from muse_fast.detection.detector import BEST, STEM, Detector, Proposals, build_detector
from muse_fast.detection.losses import (
    UNKNOWN,
    Sum,
    consistency_weight,
    distance,
    mean,
    pseudo_labels,
    regression_loss,
    type_loss,
)
from muse_fast.detection.samples import ANNOTATED, UNLABELLED, LfovBatch
from muse_fast.detection.targets import Matcher, Targets, proposal_places
from muse_fast.images.imagenet import normalise
from muse_fast.models.archs import check_optional, find_arch
from muse_fast.models.backbone import Backbone
from muse_fast.models.encoder import conv_flops
from muse_fast.pretraining.flops import view_flops
from muse_fast.runtime import checkpoint
from muse_fast.runtime.device import moved
from muse_fast.runtime.distributed import is_main, sum_over_ranks, world_size
from muse_fast.training import graphs
from muse_fast.training.guard import Guard
from muse_fast.training.optim import build_adam, clip_gradients, load_moments, moments
from muse_fast.training.parallel import gradient_sync, is_sharded, parallelise, place
from muse_fast.training.precision import autocast, dtype_of_weights
from muse_fast.training.report import Metrics
from muse_fast.training.schedules import cosine
from muse_fast.training.sharding import full, like, norms

TERMS = ("reg", "type", "cons")


class Finetuner:
    """A detector, its optimiser, and the step that updates them.

    Attributes:
        step: completed steps.
        steps: total steps of the run.
        best: step, epoch and F1 of the best evaluation so far; empty before the first.
        graphs: how ``train.cuda_graph`` was decided.

    Raises:
        UserError: the backbone does not support ``model.recompute`` or ``train.compile``.
    """

    unit = "images"

    def __init__(self, config: FinetuneConfig, detector: Detector, device: torch.device, num_images: int) -> None:
        spec, train = detector.spec, config.train
        check_optional(config, spec.arch, find_arch(spec.arch, taps=spec.taps))
        self.config, self.device, self.num_images, self.step = config, device, num_images, 0
        self.steps = -(-config.optim.epochs * num_images // config.optim.batch_size)
        self.best: dict[str, Any] = {}
        self.dtype = dtype_of_weights(train.precision)
        self.detector = place(detector, device, self.dtype, train.parallel, compiled=train.compile)
        layers: Iterable[Any] = detector.backbone.encoder.layers
        for layer in layers:
            layer.recompute = config.model.recompute
        unused = unused_weights(self.detector.backbone)
        self.detector_forward: Any = parallelise(self.detector, train.parallel, train.precision, frozen=unused)
        self.graphs = graphs.choose(train.cuda_graph, device)
        self.plain_forward: Any = self._plain_logits
        if self.graphs.on:
            # Each in its own memory, as plain samples are seen between forward and backward. They change no buffers.
            self.detector_forward, self.plain_forward = (
                graphs.Graphed(
                    function,
                    module,
                    graphs.CudaRecorder(device),
                    after=config.optim.accumulate,
                    required=self.graphs.required,
                )
                for function, module in ((self.detector, self.detector), (self._plain_logits, nn.Module()))
            )
        self._weights, self._buffers = list(self.detector.parameters()), dict(self.detector.named_buffers())
        self.matcher = Matcher(config.loss.match_distance)
        self.guard = Guard([*(f"{name} loss" for name in TERMS), "gradient norm"], device)
        self.optimizer = build_adam(self.detector, self.guard)

    def epoch_of(self, step: int) -> int:
        """Completed epochs after ``step`` steps."""
        return step * self.config.optim.batch_size // self.num_images

    def ends_epoch(self, step: int) -> bool:
        """Whether ``step`` completes an epoch or the run."""
        return self.epoch_of(step) > self.epoch_of(step - 1) or step == self.steps

    def weights(self, step: int) -> dict[str, float]:
        """Weights of the losses after ``step`` steps (equation 9)."""
        loss, epochs = self.config.loss, self.config.optim.epochs
        consistency = consistency_weight(self.epoch_of(step), epochs, loss.lambda_cons)
        return {"reg": loss.lambda_reg, "type": loss.lambda_type, "cons": consistency}

    def autocast(self) -> torch.autocast:
        return autocast(self.config.train.precision, self.device)

    def train_step(self, *micro_batches: LfovBatch, measure: bool = True) -> Metrics:
        """Run one optimisation step on this rank's share of the batch; return its measurements if ``measure``.

        If a value is not finite, neither this step nor any later one changes the detector, and `check` raises an error.
        """
        optim, weights = self.config.optim, self.weights(self.step)

        # Forward and backward. Every loss is a mean over a micro-batch of all ranks, then over the micro-batches.
        self.optimizer.zero_grad(set_to_none=True)
        totals = torch.zeros(len(TERMS), dtype=self.dtype, device=self.device)
        measured: list[dict[str, Sum]] = []
        for number, batch in enumerate(micro_batches, 1):
            with gradient_sync(self.detector_forward, number == len(micro_batches)):
                sums, others = self._forward(batch, with_pseudo=weights["cons"] > 0, measure=measure)
                divisors = sum_over_ranks(torch.stack([sums[name].weight for name in TERMS])) * len(micro_batches)
                losses = mean(torch.stack([sums[name].total for name in TERMS]), divisors)
                (_weighted(losses, weights) * world_size()).backward()  # the engines divide by the number of ranks
            totals += losses.detach()
            measured.append(others)
        sum_over_ranks(totals)

        # A final check before anything changes.
        gradients = [p.grad for p in self._weights if p.grad is not None]
        grad_norm = torch.linalg.vector_norm(norms(gradients))
        samples = [(batch.image_ids, batch.epochs) for batch in micro_batches]
        self.guard.look(self.step + 1, [*totals, grad_norm], samples)
        if optim.clip_grad:
            clip_gradients(gradients, grad_norm, optim.clip_grad)
        lr = cosine(optim.lr, optim.min_lr, self.step, self.steps)
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        self.step += 1

        if not measure:
            return {}
        return {
            "loss": _weighted(totals, weights),
            **{f"loss_{name}": value for name, value in zip(TERMS, totals, strict=True)},
            **_means(measured),
            "grad_norm": grad_norm,
            "lr": lr,
            "lambda_cons": weights["cons"],
            "epoch": self.epoch_of(self.step - 1),
        }

    def _forward(self, batch: LfovBatch, *, with_pseudo: bool, measure: bool) -> tuple[dict[str, Sum], dict[str, Sum]]:
        """Detect everything in the samples, and split proposals by the annotated region.

        Returns:
            The losses, and other measurements if ``measure``.
        """
        config, with_plain = self.config.loss, with_pseudo and self.config.loss.pseudo_view == "plain"
        statistics = self._copied_statistics() if with_plain else {}
        self.detector.train()
        with self.autocast():
            proposals: Proposals = self.detector_forward(self._to_network(batch.images))
        places = proposal_places(batch.places, self.detector.spec.stride)
        matching = self.matcher.begin(proposals, places, batch)
        places = moved(places, self.device)
        plain_logits = None
        if with_plain:  # meanwhile
            with torch.no_grad(), self.autocast():
                plain_logits = self.plain_forward(batch.plain.to(self.device, non_blocking=True), statistics)
        targets = Targets(*(moved(tensor, self.device) for tensor in matching.result()))
        points, logits = proposals.points.flatten(0, 1), proposals.logits.flatten(0, 1)
        unlabelled = (places == UNLABELLED).flatten()
        pseudo = pseudo_labels(logits.detach() if plain_logits is None else plain_logits, config.confidence)
        pseudo = torch.where(unlabelled, pseudo, UNKNOWN)
        losses = {
            "reg": regression_loss(points[targets.matched], targets.nuclei),
            "type": type_loss(logits, targets.type, config.background_weight),
            "cons": type_loss(logits, pseudo, config.background_weight),
        }
        if not measure:
            return losses, {}
        origins = proposals.xy.repeat(len(batch.images), 1)[targets.matched]
        images, matched = (points.new_full((), len(some)) for some in (batch.images, targets.matched))
        measured = {
            "distance": distance(points[targets.matched].detach(), targets.nuclei),
            "distance_of_proposals": distance(origins, targets.nuclei),
            "nuclei_per_image": Sum(matched, images),
            "annotated": Sum((places == ANNOTATED).sum(), points.new_full((), places.numel())),
            "pseudo_labelled": Sum((pseudo != UNKNOWN).sum(), unlabelled.sum()),
        }
        return losses, measured

    def _copied_statistics(self) -> dict[str, Tensor]:
        """Return the running statistics of BatchNorm as they are now."""
        copied = {name: torch.empty_like(buffer) for name, buffer in self._buffers.items()}
        graphs.copy(list(copied.values()), list(self._buffers.values()))
        return copied

    def _plain_logits(self, images: Tensor, statistics: dict[str, Tensor]) -> Tensor:
        """Logits ``[I * P, C + 1]`` in evaluation mode on samples without colour augmentation.

        Args:
            images: ``[I, 3, R, R]`` uint8.
            statistics: running ones of BatchNorm to use, from before the training forward of this step.
        """
        self.detector.eval()
        proposals: Proposals = functional_call(self.detector, statistics, (self._to_network(images),))
        self.detector.train()
        return proposals.logits.flatten(0, 1)

    def _to_network(self, images: Tensor) -> Tensor:
        return normalise(images.to(self.device, non_blocking=True)).to(self.dtype)

    def flops(self, micro_batches: Sequence[LfovBatch]) -> float:
        """Return the useful FLOPs of the last step on this rank's share; a backward counts as two forwards."""
        spec, width, hidden = self.detector.spec, self.detector.backbone.dense_dim, self.config.detector.hidden_dim
        layers = [(width, hidden), (hidden, hidden)] * 2 + [(hidden, 2), (hidden, len(spec.class_names) + 1)]
        forward = view_flops(spec.arch, spec.sample_size, spec.decoder_dim, spec.taps)
        forward += (spec.sample_size // spec.stride) ** 2 * sum(conv_flops(1, *widths) for widths in layers)
        plain = self.config.loss.pseudo_view == "plain" and self.weights(self.step - 1)["cons"] > 0
        return (4 if plain else 3) * forward * sum(len(batch.images) for batch in micro_batches)

    def check(self) -> None:
        """Check that all steps so far were finite, which waits for the device.

        Raises:
            NonFiniteError: a step was not; names the first one.
        """
        self.guard.check()

    def save(self, run: Path) -> Path | None:
        """Save a checkpoint of everything that the next step depends on; all ranks call it, the main rank writes.

        Raises:
            NonFiniteError: a step was not finite.
        """
        self.check()
        return self._write(run, {STEM: self.detector.state_dict(), "optimizer": moments(self.detector, self.optimizer)})

    def save_best(self, run: Path) -> Path | None:
        """Save only the detector, as the best of the run; all ranks call it, the main rank writes."""
        return self._write(run / BEST, {STEM: self.detector.state_dict()})

    def _write(self, folder: Path, tensors: Mapping[str, Mapping[str, Tensor]]) -> Path | None:
        whole = {stem: {name: full(t) for name, t in named.items()} for stem, named in tensors.items()}
        if not is_main():
            return None
        state = {
            "step": self.step,
            "num_images": self.num_images,
            "best": self.best,
            "config": dataclasses.asdict(self.config),
            STEM: dataclasses.asdict(self.detector.spec),
        }
        return checkpoint.save(folder, self.step, whole, state, keep_every=0)

    def load(self, folder: Path) -> None:
        """Continue from the checkpoint ``folder``, which any number of ranks may have written.

        Raises:
            CheckpointError: a file is damaged.
        """
        state, ours = checkpoint.read_state(folder), self.detector.state_dict()
        self.step, self.best = state["step"], state["best"]
        given = checkpoint.read_tensors(folder, STEM)
        self.detector.load_state_dict({name: like(t, ours[name]) for name, t in given.items()})
        load_moments(self.detector, self.optimizer, checkpoint.read_tensors(folder, "optimizer"))

    def whole_detector(self) -> Detector:
        """Return the detector, unsharded and float32 on every rank, for evaluation only; all ranks call it."""
        if not is_sharded(self.config.train.parallel) and self.dtype == torch.float32:
            return self.detector
        state = {name: full(t) for name, t in self.detector.state_dict().items()}
        detector = build_detector(self.detector.spec).to(self.device)
        detector.load_state_dict(state)
        return detector


def _weighted(losses: Tensor, weights: Mapping[str, float]) -> Tensor:
    return torch.stack([weights[name] * loss for name, loss in zip(TERMS, losses, strict=True)]).sum()


def _means(measured: Sequence[Mapping[str, Sum]]) -> dict[str, Tensor]:
    """Return the means over all micro-batches and ranks."""
    table = torch.stack([torch.stack([value.double() for one in sums.values() for value in one]) for sums in measured])
    totals, weights = sum_over_ranks(table.sum(dim=0)).view(-1, 2).unbind(dim=1)
    return dict(zip(measured[0], mean(totals, weights), strict=True))


def unused_weights(backbone: Backbone) -> Iterator[nn.Parameter]:
    """Yield the weights that maps do not depend on, such as those of some networks' image feature."""
    was_training, weights, side = backbone.training, list(backbone.parameters()), backbone.sides[0]
    images = torch.zeros(1, 3, side, side, dtype=weights[0].dtype, device=weights[0].device)
    total = torch.stack([level.sum() for level in backbone.eval()(images).levels]).sum()
    gradients = torch.autograd.grad(total, weights, allow_unused=True)
    backbone.train(was_training)
    yield from (weight for weight, gradient in zip(weights, gradients, strict=True) if gradient is None)
