"""Nucleus classification on frozen features: nearest neighbours and a linear probe, as MUSE reports them.

Both take a :class:`NucleusSet` for each of ``train``, ``val`` and ``test``, and score the class probabilities with
`muse_fast.classification.metrics`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muse_fast.classification.features import NucleusSet
from muse_fast.classification.metrics import Scores, score
from muse_fast.errors import UserError
from muse_fast.runtime.progress_bar import ShowProgress

KNN_NEIGHBOURS = (10, 20, 100, 200, 500)
KNN_TEMPERATURE = 0.07


def standardised(sets: Mapping[str, NucleusSet]) -> dict[str, NucleusSet]:
    """Subtract the mean of ``train`` from all splits and divide by its standard deviation, per feature."""
    train = sets["train"].features
    mean, std = train.mean(0), train.std(0, correction=0).clamp_min(1e-6)
    return {name: NucleusSet((one.features - mean) / std, one.labels, one.slides) for name, one in sets.items()}


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
    """Scores for every k, and the k that each of two rules chooses."""

    test: dict[int, Scores]
    val: dict[int, Scores]
    k_best_on_test: int  # the published protocol, which is optimistic
    k_chosen_on_val: int  # unbiased
    skipped: tuple[int, ...]  # values of k above the number of train nuclei


def knn(sets: Mapping[str, NucleusSet], num_classes: int, neighbours: tuple[int, ...] = KNN_NEIGHBOURS) -> KnnResult:
    """Classify ``val`` and ``test`` by a weighted vote of their k nearest neighbours in ``train``.

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
        found = knn_probabilities(train.features, train.labels, sets[split].features, usable, num_classes=num_classes)
        scores[split] = {k: score(found[k], sets[split]) for k in usable}
    return KnnResult(
        test=scores["test"],
        val=scores["val"],
        k_best_on_test=max(usable, key=lambda k: scores["test"][k]["accuracy"]),
        k_chosen_on_val=max(usable, key=lambda k: scores["val"][k]["accuracy"]),
        skipped=tuple(k for k in neighbours if k not in usable),
    )


# ----------------------------------------------------------------------------------------------------- linear probe


@dataclass(frozen=True, slots=True)
class LinearResult:
    """A trained linear classifier and its scores."""

    head: nn.Linear  # with the weights of the best epoch
    val: Scores
    test: Scores
    epoch: int  # the best epoch, counted from 0: the last one with the highest accuracy on val
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
    sets: Mapping[str, NucleusSet],
    num_classes: int,
    *,
    seed: int = 2025,
    lr: float = 0.01,
    epochs: int = 100,
    batch_size: int = 256,
    progress: ShowProgress | None = None,
) -> LinearResult:
    """Train a cross-entropy classifier by SGD: momentum 0.9, no weight decay, cosine schedule to 0 per epoch.

    One CPU generator seeded with ``seed`` draws the weights, then a permutation per epoch. The last incomplete batch
    of an epoch is dropped, as published; a train split smaller than one batch is used as one batch.

    If `step_over_stable` is below 1, other implementations and precisions give the same predictions.

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
        hits = int((class_probabilities(head, val.features).argmax(dim=1) == val.labels).sum())
        if hits >= best_hits:
            best_hits, best_epoch = hits, epoch
            best_state = {name: value.clone() for name, value in head.state_dict().items()}
        if progress is not None:
            progress(epoch + 1, epochs, "epochs")
    head.load_state_dict(best_state)
    return LinearResult(
        head=head,
        val=score(class_probabilities(head, val.features), val),
        test=score(class_probabilities(head, test.features), test),
        epoch=best_epoch,
        step=step_over_stable(train.features, num_classes, lr),
    )


@torch.no_grad()
def class_probabilities(head: nn.Linear, features: Tensor) -> Tensor:
    """Softmax of the logits of every row, ``[N, C]`` float64, so that float32 logits keep their order."""
    return head(features).double().softmax(dim=1)
