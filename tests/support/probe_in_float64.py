"""The linear probe of the benchmark, written again in NumPy and float64 with explicit gradients."""

from __future__ import annotations

import math

import numpy as np
import torch

from muse_fast.classification.features import NucleusSet


def linear_probe_in_float64(
    sets: dict[str, NucleusSet], seed: int, lr: float, epochs: int, batch_size: int, stop_after: int | None = None
) -> tuple[np.ndarray, np.ndarray, int]:
    """Train as the benchmark does: softmax gradient, momentum, cosine schedule and choice of the epoch.

    ``stop_after`` is the epoch whose weights are wanted instead of the best one's.
    """
    generator = torch.Generator().manual_seed(seed)
    dim = sets["train"].features.shape[1]
    weight = torch.empty(3, dim).normal_(0, 0.01, generator=generator).double().numpy()
    bias = np.zeros(3)
    x, y = sets["train"].features.double().numpy(), sets["train"].labels.numpy()
    velocity_w, velocity_b = np.zeros_like(weight), np.zeros_like(bias)
    best = (-1.0, weight, bias, 0)
    for epoch in range(epochs):
        rate = lr * (1 + math.cos(math.pi * epoch / epochs)) / 2
        order = torch.randperm(len(x), generator=generator).numpy()
        for step in range(len(x) // batch_size):
            rows = order[step * batch_size : (step + 1) * batch_size]
            logits = x[rows] @ weight.T + bias
            p = np.exp(logits - logits.max(1, keepdims=True))
            p /= p.sum(1, keepdims=True)
            p[np.arange(len(rows)), y[rows]] -= 1
            velocity_w = 0.9 * velocity_w + p.T @ x[rows] / len(rows)
            velocity_b = 0.9 * velocity_b + p.mean(0)
            weight, bias = weight - rate * velocity_w, bias - rate * velocity_b
        val = sets["val"].features.double().numpy() @ weight.T + bias
        accuracy = (val.argmax(1) == sets["val"].labels.numpy()).mean()
        if epoch == stop_after:
            return weight, bias, epoch
        if accuracy >= best[0]:
            best = (accuracy, weight, bias, epoch)
    return best[1], best[2], best[3]
