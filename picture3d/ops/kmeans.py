"""K-means with a k-means++ start, in plain PyTorch: seeded, on the device of the features."""

from __future__ import annotations

import torch
from torch import Tensor


def kmeans(features: Tensor, k: int, generator: torch.Generator, max_iterations: int = 25) -> tuple[Tensor, Tensor]:
    """Clusters rows by Euclidean distance (Lloyd's iteration, Arthur and Vassilvitskii's start).

    Args:
        features: (n, D) float; n may be 0.
        k: clusters wanted; at most n are made.
        generator: source of the start, on the device of `features`.
        max_iterations: Lloyd's iterations at most; ends as soon as no row changes its cluster.

    Returns:
        (n,) int64 labels in 0 .. min(k, n) - 1, and (min(k, n), D) float32 centres. A cluster that loses all its rows keeps
        its centre.

    Raises:
        ValueError: if k is below 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    rows = features.detach().float()
    n = len(rows)
    k = min(k, n)
    if n == 0:
        return torch.zeros(0, dtype=torch.int64, device=rows.device), rows.new_zeros((0, features.shape[1]))
    squared = (rows * rows).sum(1)
    centers = _spread_start(rows, squared, k, generator)
    labels = _nearest(rows, squared, centers)
    for _ in range(max_iterations):
        sums = torch.zeros_like(centers).index_add_(0, labels, rows)
        counts = torch.bincount(labels, minlength=k)
        centers = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centers)
        moved = _nearest(rows, squared, centers)
        if torch.equal(moved, labels):
            break
        labels = moved
    return labels, centers


def _spread_start(rows: Tensor, squared: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k rows, each drawn with probability proportional to its squared distance to those drawn before."""
    n = len(rows)
    draws = torch.rand(k, generator=generator, device=rows.device, dtype=torch.float64)
    chosen = (draws[:1] * n).long().clamp(max=n - 1)
    distance = _distance(rows, squared, rows[chosen]).squeeze(1)
    for draw in draws[1:]:
        total = distance.double().cumsum(0)
        # All rows equal to a centre already: any row will do, the first one is taken.
        pick = torch.searchsorted(total, draw * total[-1], right=True).clamp(max=n - 1).reshape(1)
        chosen = torch.cat([chosen, pick])
        distance = torch.minimum(distance, _distance(rows, squared, rows[pick]).squeeze(1))
    return rows[chosen].clone()


def _distance(rows: Tensor, squared: Tensor, centers: Tensor) -> Tensor:
    return (squared[:, None] - 2 * (rows @ centers.t()) + (centers * centers).sum(1)).clamp(min=0)


def _nearest(rows: Tensor, squared: Tensor, centers: Tensor) -> Tensor:
    return _distance(rows, squared, centers).argmin(1)
