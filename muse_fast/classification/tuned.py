"""Nucleus classification by training the whole network: the published fine-tuning protocol.

From random weights and with a larger learning rate, the same loop is plain supervised training, which shows how well
the network can do on a data set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muse_fast.classification.features import NucleusSet, TileBatch, stack_tiles
from muse_fast.classification.metrics import Scores, score
from muse_fast.classification.tiles import Tile
from muse_fast.errors import UserError
from muse_fast.runtime.progress_bar import ShowProgress


@dataclass(frozen=True, slots=True)
class TunedResult:
    """A fine-tuned classifier: ``model.backbone`` and ``model.head`` have the weights of the best epoch."""

    model: NucleusClassifier
    val: Scores
    test: Scores
    epoch: int  # the best epoch, counted from 0: the last one with the highest accuracy on val
    history: tuple[dict[str, float], ...]  # per epoch: mean train loss and accuracy on val


class NucleusClassifier(nn.Module):
    """Backbone and linear head; logits ``[N, classes]`` of the nuclei of a batch of tiles."""

    def __init__(self, backbone: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, batch: TileBatch) -> Tensor:
        rows: Tensor = self.backbone.nucleus_features(batch.images, batch.xy, batch.image_index)  # type: ignore[operator]
        logits: Tensor = self.head(rows)
        return logits


def finetune(
    backbone: nn.Module,
    head: nn.Linear,
    tiles: Mapping[str, Sequence[Tile]],
    sets: Mapping[str, NucleusSet],
    *,
    seed: int = 2025,
    lr: float = 1e-5,
    epochs: int = 10,
    batch_size: int = 32,
    augment: bool = False,
    bf16: bool = False,
    progress: ShowProgress | None = None,
) -> TunedResult:
    """Train ``backbone`` and ``head`` in place: AdamW without weight decay, cosine to 0 per epoch, best epoch on val.

    BatchNorm runs in training mode. ``batch_size`` counts tiles; the last incomplete batch of an epoch is dropped, and
    a train split smaller than one batch is used as one batch. ``augment`` adds flips and quarter turns, which the
    published protocol does not use. ``sets`` contains the labels and slides of ``tiles``.

    Raises:
        UserError: the loss is no longer finite.
    """
    device = head.weight.device
    generator = torch.Generator().manual_seed(seed)
    model = NucleusClassifier(backbone, head)
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)

    train = tiles["train"]
    batch_size = min(batch_size, len(train))
    steps = len(train) // batch_size
    best_hits, best_epoch, best_state = -1, 0, {}
    history = []
    for epoch in range(epochs):
        model.train()
        order = torch.randperm(len(train), generator=generator).tolist()
        total = torch.zeros((), device=device)
        for step in range(steps):
            chosen = order[step * batch_size : (step + 1) * batch_size]
            batch = stack_tiles([train[i] for i in chosen], device)
            if augment:
                batch = turn_tiles(batch, torch.randint(8, (len(chosen),), generator=generator))
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                logits = model(batch)
            loss = F.cross_entropy(logits.float(), batch.labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            total += loss.detach()
            if progress is not None:
                progress(epoch * steps + step + 1, epochs * steps, "steps")
        schedule.step()
        if not torch.isfinite(total):
            raise UserError(f"fine-tuning diverged in epoch {epoch} (loss {total.item()}); lower lr={lr}")
        predicted = predict(model, tiles["val"], batch_size, bf16).argmax(dim=1)
        hits = int((predicted == sets["val"].labels.cpu()).sum())
        history.append({"train_loss": float(total) / steps, "val_accuracy": hits / len(predicted)})
        if hits >= best_hits:
            best_hits, best_epoch = hits, epoch
            best_state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(best_state)
    scores = {split: score(predict(model, tiles[split], batch_size, bf16), sets[split]) for split in ("val", "test")}
    return TunedResult(model, scores["val"], scores["test"], best_epoch, tuple(history))


@torch.inference_mode()
def predict(model: NucleusClassifier, tiles: Sequence[Tile], batch_size: int, bf16: bool = False) -> Tensor:
    """Class probabilities of every nucleus of ``tiles`` in eval mode, ``[N, C]`` float64 on the CPU."""
    device = model.head.weight.device
    model.eval()
    found = []
    for start in range(0, len(tiles), batch_size):
        batch = stack_tiles(tiles[start : start + batch_size], device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = model(batch)
        found.append(logits.cpu().double().softmax(dim=1))
    return torch.cat(found)


def turn_tiles(batch: TileBatch, turns: Tensor) -> TileBatch:
    """Apply one of the eight symmetries of the square to each tile and its nuclei.

    ``turns`` ``[I]`` in 0..7: bit 0 mirrors x, bit 1 mirrors y, then bit 2 swaps the axes. A point moves to
    ``size - x``, where the mirrored feature map has the value that the old one has at ``x``.
    """
    size = batch.images.shape[-1]
    images = []
    for image, turn in zip(batch.images, turns.tolist(), strict=True):
        flips = [axis for axis, bit in ((-1, 1), (-2, 2)) if turn & bit]
        image = image.flip(flips)
        images.append(image.transpose(-1, -2) if turn & 4 else image)

    turn_of_row = turns.to(batch.image_index.device)[batch.image_index]
    mirrored = torch.stack([turn_of_row & 1, turn_of_row & 2], dim=1).bool()
    xy = torch.where(mirrored, size - batch.xy, batch.xy)
    xy = torch.where((turn_of_row & 4).bool()[:, None], xy.flip(1), xy)
    return replace(batch, images=torch.stack(images), xy=xy)
