"""Nucleus classification on frozen features: nearest neighbours and a linear probe, as MUSE reports them.

Both take ``train``, ``val`` and ``test`` :class:`NucleusSet`. Accuracy alone flatters a classifier that follows the
majority class, so every result carries balanced accuracy, recall per class, the confusion matrix and a 95 % interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muse_fast.classification.features import NucleusSet, Progress
from muse_fast.errors import UserError

KNN_NEIGHBOURS = (10, 20, 100, 200, 500)
KNN_TEMPERATURE = 0.07


@dataclass(frozen=True, slots=True)
class Scores:
    """How well predictions fit the truth. Shares lie in [0, 1]."""

    accuracy: float
    accuracy_ci95: tuple[float, float]  # bootstrap over slides
    balanced_accuracy: float  # mean recall of the classes that occur
    recall: tuple[float | None, ...]  # per class; None where the class does not occur
    confusion: list[list[int]]  # [truth][prediction]
    count: int


def score(predicted: Tensor, truth: NucleusSet, num_classes: int) -> Scores:
    """Scores of ``predicted`` ``[N]`` int64 against ``truth.labels``."""
    labels = truth.labels.to(predicted.device)
    hits = (predicted == labels).cpu().numpy()
    pairs = torch.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    confusion = pairs.view(num_classes, num_classes).cpu().numpy()
    support = confusion.sum(axis=1)
    recall = [confusion[c, c] / support[c] if support[c] else None for c in range(num_classes)]
    present = [value for value in recall if value is not None]
    return Scores(
        accuracy=float(hits.mean()),
        accuracy_ci95=_slide_bootstrap(hits, truth.slides.cpu().numpy()),
        balanced_accuracy=float(np.mean(present)),
        recall=tuple(None if value is None else float(value) for value in recall),
        confusion=confusion.tolist(),
        count=len(hits),
    )


def _slide_bootstrap(hits: np.ndarray, slides: np.ndarray, draws: int = 2000) -> tuple[float, float]:
    """95 % interval of the accuracy when slides, not nuclei, are drawn anew: nuclei of a slide are alike."""
    right = np.bincount(slides, weights=hits)
    count = np.bincount(slides)
    right, count = right[count > 0], count[count > 0]
    drawn = np.random.default_rng(0).integers(len(count), size=(draws, len(count)))
    low, high = np.quantile(right[drawn].sum(axis=1) / count[drawn].sum(axis=1), (0.025, 0.975))
    return float(low), float(high)


def majority(train: Sequence[int], test: Sequence[int]) -> dict[str, float]:
    """What a classifier that ignores the image scores on test, from the number of nuclei of each class."""
    most_frequent = max(range(len(train)), key=lambda kind: train[kind])
    return {
        "test_majority_share": max(test) / sum(test),
        "train_majority_accuracy": test[most_frequent] / sum(test),
    }


def standardised(sets: Mapping[str, NucleusSet]) -> dict[str, NucleusSet]:
    """All splits with the mean of ``train`` taken off and divided by its standard deviation, per feature."""
    train = sets["train"].features
    mean, std = train.mean(0), train.std(0, correction=0).clamp_min(1e-6)
    return {name: NucleusSet((one.features - mean) / std, one.labels, one.slides) for name, one in sets.items()}


# ---------------------------------------------------------------------------------------------- nearest neighbours


@torch.inference_mode()
def knn_predict(
    train: Tensor,
    labels: Tensor,
    queries: Tensor,
    neighbours: tuple[int, ...],
    *,
    num_classes: int,
    temperature: float = KNN_TEMPERATURE,
    chunk: int = 1024,
) -> dict[int, Tensor]:
    """Class of every query by a vote of its k nearest rows of ``train``, for each k.

    Similarity is the cosine; a neighbour votes with weight ``exp(similarity / temperature)``.

    Args:
        train: ``[M, D]`` float; need not be normalised.
        labels: ``[M]`` int64 classes of the rows of ``train``.
        queries: ``[Q, D]``, same device as ``train``.
        neighbours: each k, at most M.
        chunk: queries whose ``[chunk, M]`` similarities are held at once.

    Returns:
        ``{k: [Q] int64}``.
    """
    assert max(neighbours) <= len(train)
    bank = F.normalize(train, dim=1).T
    predicted: dict[int, list[Tensor]] = {k: [] for k in neighbours}
    for part in F.normalize(queries, dim=1).split(chunk):
        similarity, nearest = (part @ bank).topk(max(neighbours), dim=1)
        weights, classes = (similarity / temperature).exp(), labels[nearest]
        for k in neighbours:
            votes = part.new_zeros(len(part), num_classes)
            votes.scatter_add_(1, classes[:, :k], weights[:, :k])
            predicted[k].append(votes.argmax(dim=1))
    return {k: torch.cat(parts) for k, parts in predicted.items()}


@dataclass(frozen=True, slots=True)
class KnnResult:
    """Scores for every k, and the two ways to choose one."""

    test: dict[int, Scores]
    val: dict[int, Scores]
    k_best_on_test: int  # the published protocol; an optimistic number
    k_chosen_on_val: int  # the honest one
    skipped: tuple[int, ...]  # k larger than the number of train nuclei


def knn(sets: Mapping[str, NucleusSet], num_classes: int, neighbours: tuple[int, ...] = KNN_NEIGHBOURS) -> KnnResult:
    """Weighted k-nearest-neighbour classification of ``val`` and ``test`` by ``train``.

    Raises:
        UserError: ``train`` has fewer nuclei than the smallest k.
    """
    train = sets["train"]
    usable = tuple(k for k in neighbours if k <= len(train.labels))
    if not usable:
        raise UserError(
            f"the train split has {len(train.labels)} nuclei, fewer than the smallest number of neighbours "
            f"({min(neighbours)}); add train images or pass a smaller k=..."
        )
    scores = {}
    for split in ("val", "test"):
        predicted = knn_predict(train.features, train.labels, sets[split].features, usable, num_classes=num_classes)
        scores[split] = {k: score(predicted[k], sets[split], num_classes) for k in usable}
    return KnnResult(
        test=scores["test"],
        val=scores["val"],
        k_best_on_test=max(usable, key=lambda k: scores["test"][k].accuracy),
        k_chosen_on_val=max(usable, key=lambda k: scores["val"][k].accuracy),
        skipped=tuple(k for k in neighbours if k not in usable),
    )


# ----------------------------------------------------------------------------------------------------- linear probe


@dataclass(frozen=True, slots=True)
class LinearResult:
    """A trained linear classifier and how it did."""

    head: nn.Linear  # of the epoch kept
    val: Scores
    test: Scores
    epoch: int  # the epoch kept, counted from 0: the last one with the best accuracy on val
    step: float  # by `step_over_stable`


def new_head(dim: int, num_classes: int, generator: torch.Generator) -> nn.Linear:
    """Linear classifier with weights N(0, 0.01) and no bias, as the published probe starts."""
    head = nn.Linear(dim, num_classes)
    with torch.no_grad():
        head.weight.normal_(0.0, 0.01, generator=generator)
        head.bias.zero_()
    return head


MOMENTUM = 0.9


@torch.no_grad()
def step_over_stable(features: Tensor, num_classes: int, lr: float) -> float:
    """The probe's step over the longest that settles, at its start; above 1 the training is chaotic.

    Cross-entropy at equal probabilities of C classes has the curvature ``largest eigenvalue of E[x x^T] / C``, and
    descent with momentum m is stable where step times curvature is below ``2 (1 + m)``. Beyond, differences of rounding
    grow until nothing is left in common: features ``[N, D]`` as they come from a network may be that large.
    """
    direction = features.mean(0)
    for _ in range(30):  # power iteration
        direction = F.normalize(features.T @ (features @ direction), dim=0)
    curvature = (features @ direction).square().mean() / num_classes
    return float(lr * curvature / (2 * (1 + MOMENTUM)))


def linear_probe(
    sets: Mapping[str, NucleusSet],
    num_classes: int,
    *,
    seed: int = 2025,
    lr: float = 0.01,
    epochs: int = 100,
    batch_size: int = 256,
    progress: Progress | None = None,
) -> LinearResult:
    """Cross-entropy classifier on features as they are; SGD with momentum 0.9, no weight decay, cosine to 0 per epoch.

    One CPU generator seeded with ``seed`` draws the weights, then a permutation per epoch. The last incomplete batch
    of an epoch is dropped, as published; a train split smaller than one batch makes a batch of its own.

    Where `step_over_stable` is below 1, other implementations and precisions give the same predictions.

    Raises:
        UserError: the loss is no longer finite.
    """
    train, val, test = sets["train"], sets["val"], sets["test"]
    device = train.features.device
    generator = torch.Generator().manual_seed(seed)
    head = new_head(train.features.shape[1], num_classes, generator).to(device)
    optimiser = torch.optim.SGD(head.parameters(), lr=lr, momentum=MOMENTUM)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)

    count = len(train.labels)
    batch_size = min(batch_size, count)
    best_hits, best_epoch, best_state = -1, 0, {}
    for epoch in range(epochs):
        order = torch.randperm(count, generator=generator).to(device)
        features, labels = train.features[order], train.labels[order]
        for start in range(0, count - batch_size + 1, batch_size):
            batch = slice(start, start + batch_size)
            loss = F.cross_entropy(head(features[batch]), labels[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        schedule.step()
        if not torch.isfinite(loss):
            raise UserError(f"the linear probe diverged in epoch {epoch} (loss {loss.item()}); lower lr={lr}")
        hits = int((predict(head, val.features) == val.labels).sum())
        if hits >= best_hits:
            best_hits, best_epoch = hits, epoch
            best_state = {name: value.clone() for name, value in head.state_dict().items()}
        if progress is not None:
            progress(epoch + 1, epochs, "epochs")
    head.load_state_dict(best_state)
    return LinearResult(
        head=head,
        val=score(predict(head, val.features), val, num_classes),
        test=score(predict(head, test.features), test, num_classes),
        epoch=best_epoch,
        step=step_over_stable(train.features, num_classes, lr),
    )


@torch.no_grad()
def predict(head: nn.Linear, features: Tensor) -> Tensor:
    """Most likely class of every row, ``[N]`` int64."""
    return head(features).argmax(dim=1)
