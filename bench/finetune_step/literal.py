"""The *literal* fine-tuning step: the detector as the paper describes it, in plain eager PyTorch.

Attention stores its weights, the unified map is stored and sampled image by image at the proposals, pseudo-labels come
from a forward pass of their own before the one that is trained, and nuclei are matched one image after the other: the
costs of all pairs are computed on the device, copied to the host, which waits for them, and solved there. Losses are
those of each image, put together at the end; Adam updates parameter by parameter. Written for this benchmark.
"""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from bench.ops.baselines import literal_sample
from bench.step.networks import Backbone, stored_softmax
from muse_fast.detection.config import FinetuneConfig
from muse_fast.detection.detector import DetectorSpec
from muse_fast.detection.losses import consistency_weight
from muse_fast.detection.samples import ANNOTATED, UNLABELLED, LfovBatch
from muse_fast.images.imagenet import normalise
from muse_fast.training.schedules import cosine

IGNORED = -1


class Network(nn.Module):
    """Backbone and heads; names of the parameters are the engine's."""

    def __init__(self, spec: DetectorSpec) -> None:
        super().__init__()
        self.stride = spec.stride
        self.backbone = Backbone(spec.arch, 0.0, spec.image_size, stored_softmax)
        width, hidden = self.backbone.dense_dim, spec.hidden_dim
        self.reg_head, self.type_head = (
            nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), last)
            for last in (nn.Linear(hidden, 2), nn.Linear(hidden, len(spec.class_names) + 1))
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Proposals ``[P, 2]``, points ``[I, P, 2]`` and logits ``[I, P, C + 1]``."""
        count, side = len(images), images.shape[-1]
        middle = (torch.arange(side // self.stride, device=images.device) + 0.5) * self.stride
        y, x = torch.meshgrid(middle, middle, indexing="ij")
        xy = torch.stack([x.flatten(), y.flatten()], dim=1)
        _, levels = self.backbone(images)
        image = torch.arange(count, device=images.device).repeat_interleave(len(xy))
        rows = literal_sample(levels, xy.repeat(count, 1), image, side)
        offsets, logits = (head(rows).float().unflatten(0, (count, -1)) for head in (self.reg_head, self.type_head))
        return xy, xy + self.stride * offsets, logits


class LiteralFinetuner:
    """``train_step(batch)`` -> the losses; every step is an epoch.

    Attributes:
        matching_s: seconds of matching in the last step, with the copies to the host.
    """

    def __init__(
        self, config: FinetuneConfig, spec: DetectorSpec, state: dict[str, Tensor], device: torch.device, step: int
    ) -> None:
        self.config, self.device, self.step, self.matching_s = config, device, step, 0.0
        self.detector = Network(spec).to(device)
        self.detector.load_state_dict(state)
        self.optimizer = torch.optim.Adam(self.detector.parameters(), foreach=False)

    def train_step(self, batch: LfovBatch) -> dict[str, Tensor]:
        config, stride, self.matching_s = self.config, self.detector.stride, 0.0
        images, plain = (normalise(some.to(self.device)) for some in (batch.images, batch.plain))
        places = batch.places[:, stride // 2 :: stride, stride // 2 :: stride].flatten(1).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.train.precision == "bf16"):
            with torch.no_grad():
                _, _, plain_logits = self.detector.eval()(plain)
            _, points, logits = self.detector.train()(images)

        weight = torch.ones(logits.shape[-1], device=self.device)
        weight[-1] = config.loss.background_weight
        counts = batch.counts.tolist()
        nuclei = zip(batch.xy.to(self.device).split(counts), batch.label.to(self.device).split(counts), strict=True)
        squared, labelled, unlabelled = [], [], []
        for i, (xy, label) in enumerate(nuclei):
            inside = torch.nonzero(places[i] == ANNOTATED)[:, 0]
            proposal, nucleus = self.match(points[i, inside], logits[i, inside], xy, label)
            rows = inside[proposal]
            squared.append((points[i, rows] - xy[nucleus]).square().sum(dim=1))
            target = torch.full_like(inside, logits.shape[-1] - 1)
            target[proposal] = label[nucleus]
            labelled.append((logits[i, inside], target))
            confidence, pseudo = plain_logits[i].softmax(dim=-1).max(dim=-1)
            pseudo[(confidence <= config.loss.confidence) | (places[i] != UNLABELLED)] = IGNORED
            unlabelled.append((logits[i], pseudo))

        losses = {
            "loss_reg": torch.cat(squared).mean(),
            "loss_type": cross_entropy(labelled, weight),
            "loss_cons": cross_entropy(unlabelled, weight),
        }
        consistency = consistency_weight(self.step, config.optim.epochs, config.loss.lambda_cons)
        factors = config.loss.lambda_reg, config.loss.lambda_type, consistency
        loss = torch.stack([factor * one for factor, one in zip(factors, losses.values(), strict=True)]).sum()
        self.optimizer.zero_grad()
        loss.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = cosine(config.optim.lr, config.optim.min_lr, self.step, config.optim.epochs)
        self.optimizer.step()
        self.step += 1
        return {name: one.detach() for name, one in losses.items()}

    @torch.no_grad()
    def match(self, points: Tensor, logits: Tensor, xy: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of matched proposals and nuclei, by the costs of all pairs."""
        begin = time.perf_counter()
        cost = self.config.loss.match_distance * torch.cdist(points, xy) - logits.softmax(dim=-1)[:, label]
        pairs = linear_sum_assignment(cost.cpu().numpy())
        proposal, nucleus = (torch.from_numpy(rows).to(self.device) for rows in pairs)
        self.matching_s += time.perf_counter() - begin
        return proposal, nucleus


def cross_entropy(parts: list[tuple[Tensor, Tensor]], weight: Tensor) -> Tensor:
    """Weighted mean over the rows of all images; 0 without a row that counts."""
    logits, target = (torch.cat(one) for one in zip(*parts, strict=True))
    if not (target != IGNORED).any():
        return logits.sum() * 0
    return F.cross_entropy(logits, target, weight, ignore_index=IGNORED)
