"""The fine-tuning step on one page, and the state that it changes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from muse_fast.detection.assignment import match
from muse_fast.detection.config import FinetuneConfig
from muse_fast.detection.detector import BEST, STEM, Detector, Proposals
from muse_fast.detection.losses import (
    UNKNOWN,
    consistency_weight,
    mean_distance,
    pseudo_labels,
    regression_loss,
    type_loss,
)
from muse_fast.detection.samples import ANNOTATED, UNLABELLED, LfovBatch
from muse_fast.images.imagenet import normalise
from muse_fast.pretraining.trainer import Metrics
from muse_fast.runtime import checkpoint
from muse_fast.training.guard import Guard
from muse_fast.training.optim import build_adam, load_moments, moments
from muse_fast.training.schedules import cosine

TERMS = ("reg", "type", "cons")


class Targets(NamedTuple):
    """Targets of the proposals of a batch from the annotated nuclei, image after image."""

    type: Tensor  # [I * P] int64; UNKNOWN outside annotated regions and at nuclei of unknown class
    matched: Tensor  # [M] int64, rows of the proposals matched with a nucleus
    nuclei: Tensor  # [M, 2], positions of these nuclei


class Finetuner:
    """A detector, its optimiser, and the step that updates them.

    Attributes:
        step: completed steps.
        steps: total steps of the run.
        best: step, epoch and F1 of the best evaluation so far; empty before the first.
    """

    def __init__(self, config: FinetuneConfig, detector: Detector, device: torch.device, num_images: int) -> None:
        self.config, self.device, self.num_images, self.step = config, device, num_images, 0
        self.steps = -(-config.optim.epochs * num_images // config.optim.batch_size)
        self.best: dict[str, Any] = {}
        self.detector = detector.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.guard = Guard([*(f"{name} loss" for name in TERMS), "gradient norm"], device)
        self.optimizer = build_adam(self.detector, self.guard)

    def epoch_of(self, step: int) -> int:
        """Completed epochs after ``step`` steps."""
        return step * self.config.optim.batch_size // self.num_images

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.train.precision == "bf16")

    def train_step(self, batch: LfovBatch, *, measure: bool = True) -> Metrics:
        """Run one optimisation step (equation 9); return its measurements if ``measure``.

        If a value is not finite, neither this step nor any later one changes the detector, and `check` raises an error.
        """
        config, optim = self.config.loss, self.config.optim
        epoch = self.epoch_of(self.step)
        weights = {
            "reg": config.lambda_reg,
            "type": config.lambda_type,
            "cons": consistency_weight(epoch, optim.epochs, config.lambda_cons),
        }

        # Forward: detect everything in the sample, then split proposals by the annotated region.
        places = proposal_places(batch.places, self.detector.spec.stride).to(self.device)
        plain_logits = self._plain_logits(batch) if weights["cons"] and config.pseudo_view == "plain" else None
        self.detector.train()
        with self.autocast():
            proposals = self.detector(self._to_network(batch.images))
        targets = assign(proposals, places, batch, config.match_distance)
        points, logits = proposals.points.flatten(0, 1), proposals.logits.flatten(0, 1)
        unlabelled = (places == UNLABELLED).flatten()
        pseudo = pseudo_labels(logits.detach() if plain_logits is None else plain_logits, config.confidence)
        pseudo = torch.where(unlabelled, pseudo, UNKNOWN)
        losses = {
            "reg": regression_loss(points[targets.matched], targets.nuclei),
            "type": type_loss(logits, targets.type, config.background_weight),
            "cons": type_loss(logits, pseudo, config.background_weight),
        }
        loss = torch.stack([weights[name] * losses[name] for name in TERMS]).sum()

        # Backward, and a final check before anything changes.
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parameters = [p for p in self.detector.parameters() if p.grad is not None]
        grad_norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        self.guard.look(self.step + 1, [*losses.values(), grad_norm], batch.image_ids, batch.epochs)
        if optim.clip_grad:
            nn.utils.clip_grads_with_norm_(parameters, optim.clip_grad, grad_norm)
        lr = cosine(optim.lr, optim.min_lr, self.step, self.steps)
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        self.step += 1

        if not measure:
            return {}
        origins = proposals.xy.repeat(len(batch.images), 1)[targets.matched]
        return {
            "loss": loss.detach(),
            **{f"loss_{name}": value.detach() for name, value in losses.items()},
            "distance": mean_distance(points[targets.matched].detach(), targets.nuclei),
            "distance_of_proposals": mean_distance(origins, targets.nuclei),
            "grad_norm": grad_norm,
            "lr": lr,
            "lambda_cons": weights["cons"],
            "epoch": epoch,
            "nuclei_per_image": len(targets.matched) / len(batch.images),
            "annotated": (places == ANNOTATED).double().mean(),
            "pseudo_labelled": (pseudo != UNKNOWN).sum() / unlabelled.sum().clamp_min(1),
        }

    @torch.no_grad()
    def _plain_logits(self, batch: LfovBatch) -> Tensor:
        """Logits ``[I * P, C + 1]`` in evaluation mode on the samples without colour augmentation."""
        self.detector.eval()
        with self.autocast():
            proposals: Proposals = self.detector(self._to_network(batch.plain))
        return proposals.logits.flatten(0, 1)

    def _to_network(self, images: Tensor) -> Tensor:
        return normalise(images.to(self.device, non_blocking=True))

    def check(self) -> None:
        """Check that all steps so far were finite, which waits for the device.

        Raises:
            NonFiniteError: a step was not; names the first one.
        """
        self.guard.check()

    def save(self, run: Path) -> Path:
        """Save a checkpoint of everything that the next step depends on.

        Raises:
            NonFiniteError: a step was not finite.
        """
        self.check()
        tensors = {STEM: self.detector.state_dict(), "optimizer": moments(self.detector, self.optimizer)}
        return checkpoint.save(run, self.step, tensors, self._state(), keep_every=0)

    def save_best(self, run: Path) -> Path:
        """Save only the detector, as the best of the run."""
        return checkpoint.save(run / BEST, self.step, {STEM: self.detector.state_dict()}, self._state(), keep_every=0)

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "num_images": self.num_images,
            "best": self.best,
            "config": dataclasses.asdict(self.config),
            STEM: dataclasses.asdict(self.detector.spec),
        }

    def load(self, folder: Path) -> None:
        """Continue from the checkpoint ``folder``.

        Raises:
            CheckpointError: a file is damaged.
        """
        state = checkpoint.read_state(folder)
        self.step, self.best = state["step"], state["best"]
        self.detector.load_state_dict(checkpoint.read_tensors(folder, STEM))
        load_moments(self.detector, self.optimizer, checkpoint.read_tensors(folder, "optimizer"))


def proposal_places(places: Tensor, stride: int) -> Tensor:
    """Sample ``[I, R, R]`` at the proposals: ``[I, P]``, in the order of `detection.detector.grid`."""
    return places[:, stride // 2 :: stride, stride // 2 :: stride].flatten(1)


def assign(proposals: Proposals, places: Tensor, batch: LfovBatch, distance_weight: float) -> Targets:
    """Match the annotated nuclei of each image with proposals in its annotated region.

    Unmatched proposals in that region have background as target. The matching runs on the host.
    """
    points = proposals.points.detach().cpu().numpy()
    probabilities = proposals.logits.detach().softmax(dim=-1).cpu().numpy()
    annotated = (places == ANNOTATED).cpu().numpy()
    count, size = annotated.shape
    background = probabilities.shape[-1] - 1
    target = np.where(annotated, background, UNKNOWN).astype(np.int64)
    bounds = np.cumsum(batch.counts.numpy())[:-1]
    all_xy, all_labels = (np.split(array.numpy(), bounds) for array in (batch.xy, batch.label))
    matched, nuclei = [], []
    for i in range(count):
        rows, xy, label = np.flatnonzero(annotated[i]), all_xy[i], all_labels[i]
        proposal, nucleus = match(points[i][rows], probabilities[i][rows], xy, label, distance_weight=distance_weight)
        target[i, rows[proposal]] = label[nucleus]
        matched.append(i * size + rows[proposal])
        nuclei.append(xy[nucleus])
    device = proposals.points.device
    return Targets(
        torch.from_numpy(target.ravel()).to(device),
        torch.from_numpy(np.concatenate(matched)).to(device),
        torch.from_numpy(np.concatenate(nuclei)).to(proposals.points),
    )
