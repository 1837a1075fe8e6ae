"""Nucleus classification on frozen features: nearest neighbours and a linear probe, as MUSE reports them.

Both take `Splits`, which say what k and the epoch are chosen on, and score the class probabilities with
`muse_fast.classification.metrics`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muse_fast.classification.features import NucleusSet
from muse_fast.classification.metrics import Scores, score
from muse_fast.classification.splits import Pair, Splits
from muse_fast.errors import UserError
from muse_fast.runtime.progress_bar import ShowProgress

KNN_NEIGHBOURS = (10, 20, 100, 200, 500)
KNN_TEMPERATURE = 0.07


# ---------------------------------------------------------------------------------------------- nearest neighbours


@torch.inference_mode()
def knn_probabilities(
    train: Tensor,
    labels: Tensor,
    queries: Tensor,
    neighbours: tuple[int, ...],
    *,
    num_classes: int,
    temperature: float = KNN_TEMPERATURE,
    chunk: int = 1024,
) -> dict[int, Tensor]:
    """Class probabilities of every query by a vote of its k nearest rows of ``train``, for each k.

    Similarity is the cosine. A neighbour votes for its class with weight ``exp(similarity / temperature)``, and the
    probability of a class is its share of the votes. Shares are float64, so votes that differ in float32 do not tie.

    Args:
        train: ``[M, D]`` float; need not be normalised.
        labels: ``[M]`` int64, classes of the rows of ``train``.
        queries: ``[Q, D]``, on the same device as ``train``.
        neighbours: values of k, each at most M.
        chunk: number of queries whose similarities ``[chunk, M]`` are in memory at once.

    Returns:
        ``{k: [Q, C] float64}``.
    """
    assert max(neighbours) <= len(train)
    bank = F.normalize(train, dim=1).T
    shares: dict[int, list[Tensor]] = {k: [] for k in neighbours}
    for part in F.normalize(queries, dim=1).split(chunk):
        similarity, nearest = (part @ bank).topk(max(neighbours), dim=1)
        weights, classes = (similarity / temperature).exp(), labels[nearest]
        for k in neighbours:
            votes = part.new_zeros(len(part), num_classes)
            votes = votes.scatter_add_(1, classes[:, :k], weights[:, :k]).double()
            shares[k].append(votes / votes.sum(dim=1, keepdim=True))
    return {k: torch.cat(parts) for k, parts in shares.items()}


@dataclass(frozen=True, slots=True)
class KnnResult:
    """Scores by k, and the k that each of two rules chooses."""

    held_out: dict[int, Scores]  # on val, or on all folds
    test: dict[int, Scores]  # with folds, only of the chosen k
    k_chosen: int  # on val or on folds; unbiased
    k_best_on_test: int | None  # the published protocol, which is optimistic; None with folds
    skipped: tuple[int, ...]  # values of k above the number of nuclei to train on


def knn(splits: Splits, num_classes: int, neighbours: tuple[int, ...] = KNN_NEIGHBOURS) -> KnnResult:
    """Classify nuclei by a weighted vote of their k nearest neighbours among those of train.

    Raises:
        UserError: there are fewer nuclei than the smallest k.
    """
    count = splits.fewest_to_train_on
    usable = tuple(k for k in neighbours if k <= count)
    if not usable:
        raise UserError(
            f"there are {count} nuclei to train on, fewer than the smallest number of neighbours "
            f"({min(neighbours)}); add train images or pass a smaller k=..."
        )
    votes = [_votes(pair, usable, num_classes) for pair in splits.trials()]
    truth = splits.held_out
    held_out = {k: score(torch.cat([found[k] for found in votes]), truth) for k in usable}
    chosen = max(usable, key=lambda k: held_out[k]["accuracy"])
    final = splits.final()
    on_test = _votes(final, usable if splits.fold is None else (chosen,), num_classes)
    test = {k: score(shares, final.other) for k, shares in on_test.items()}
    best = max(usable, key=lambda k: test[k]["accuracy"]) if splits.fold is None else None
    return KnnResult(held_out, test, chosen, best, tuple(k for k in neighbours if k not in usable))


def _votes(pair: Pair, neighbours: tuple[int, ...], num_classes: int) -> dict[int, Tensor]:
    train, other = pair
    return knn_probabilities(train.features, train.labels, other.features, neighbours, num_classes=num_classes)


# ----------------------------------------------------------------------------------------------------- linear probe


@dataclass(frozen=True, slots=True)
class LinearResult:
    """A trained linear classifier and its scores."""

    head: nn.Linear  # with the weights of the best epoch
    held_out: Scores  # on val, or on all folds
    test: Scores
    epoch: int  # the best epoch, counted from 0: the last one with the highest accuracy on val or on all folds
    step: float  # see `step_over_stable`


def new_head(dim: int, num_classes: int, generator: torch.Generator) -> nn.Linear:
    """Linear classifier with weights from N(0, 0.01) and zero bias, as in the published probe."""
    head = nn.Linear(dim, num_classes)
    with torch.no_grad():
        head.weight.normal_(0.0, 0.01, generator=generator)
        head.bias.zero_()
    return head


MOMENTUM = 0.9


@torch.no_grad()
def step_over_stable(features: Tensor, num_classes: int, lr: float) -> float:
    """The probe's learning rate divided by the largest stable one at the start; above 1 training is chaotic.

    At equal probabilities of C classes, cross-entropy has the curvature ``largest eigenvalue of E[x x^T] / C``, and
    descent with momentum m is stable if step times curvature is below ``2 (1 + m)``. Above that, rounding differences
    grow until two runs have nothing in common. Raw features ``[N, D]`` of a network can be that large.
    """
    direction = features.mean(0)
    for _ in range(30):  # power iteration
        direction = F.normalize(features.T @ (features @ direction), dim=0)
    curvature = (features @ direction).square().mean() / num_classes
    return float(lr * curvature / (2 * (1 + MOMENTUM)))


def linear_probe(
    splits: Splits,
    num_classes: int,
    *,
    seed: int = 2025,
    lr: float = 0.01,
    epochs: int = 100,
    batch_size: int = 256,
    progress: ShowProgress | None = None,
) -> LinearResult:
    """Train a cross-entropy classifier by SGD and keep the best epoch; see `_epochs_of_training`.

    With folds, the best epoch is that of the heads trained without each fold; then a head is trained on train and val
    up to that epoch of the same schedule.

    If `step_over_stable` is below 1, other implementations and precisions give the same predictions.

    Raises:
        UserError: the loss is no longer finite.
    """
    train = partial(
        _epochs_of_training, num_classes=num_classes, seed=seed, lr=lr, epochs=epochs, batch_size=batch_size
    )
    heads: list[list[nn.Linear]] = []  # by trial and epoch
    hits = [0] * epochs
    for nuclei, other in splits.trials():
        heads.append([])
        for epoch, head in enumerate(train(nuclei)):
            heads[-1].append(copy.deepcopy(head))
            hits[epoch] += int((class_probabilities(head, other.features).argmax(dim=1) == other.labels).sum())
            if progress is not None:
                progress(epoch + 1, epochs, "epochs")
    best = max(range(epochs), key=lambda epoch: (hits[epoch], epoch))
    trials = zip(heads, splits.trials(), strict=True)
    held_out = [class_probabilities(of_trial[best], pair.other.features) for of_trial, pair in trials]
    nuclei, test = splits.final()
    chosen = heads[0][best] if splits.fold is None else next(islice(train(nuclei), best, None))
    return LinearResult(
        head=chosen,
        held_out=score(torch.cat(held_out), splits.held_out),
        test=score(class_probabilities(chosen, test.features), test),
        epoch=best,
        step=step_over_stable(nuclei.features, num_classes, lr),
    )


def _epochs_of_training(
    train: NucleusSet, *, num_classes: int, seed: int, lr: float, epochs: int, batch_size: int
) -> Iterator[nn.Linear]:
    """Yield the classifier after each epoch: momentum 0.9, no weight decay, cosine schedule to 0 per epoch.

    One CPU generator seeded with ``seed`` draws the weights, then a permutation per epoch. The last incomplete batch
    of an epoch is dropped, as published; a train split smaller than one batch is used as one batch.
    """
    device = train.features.device
    generator = torch.Generator().manual_seed(seed)
    head = new_head(train.features.shape[1], num_classes, generator).to(device)
    optimiser = torch.optim.SGD(head.parameters(), lr=lr, momentum=MOMENTUM)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)
    count = len(train.labels)
    batch_size = min(batch_size, count)
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
        yield head


@torch.no_grad()
def class_probabilities(head: nn.Linear, features: Tensor) -> Tensor:
    """Softmax of the logits of every row, ``[N, C]`` float64, so that float32 logits keep their order."""
    return head(features).double().softmax(dim=1)
