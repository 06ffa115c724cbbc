"""K-means: greedy k-means++ start, then Lloyd's iterations, as pure tensor operations driven by one generator."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Distances of this many rows are held at once, so that memory does not follow the product of rows and clusters.
_BLOCK_ROWS = 1 << 16


@torch.no_grad()
def kmeans(features: Tensor, k: int, generator: torch.Generator, max_iterations: int = 25) -> tuple[Tensor, Tensor]:
    """Clusters rows by Euclidean distance.

    The start is that of Arthur and Vassilvitskii (2007) in its greedy form: each new centre is the best of a few rows
    drawn with a probability that grows with the squared distance to the centres so far. A cluster that loses all its
    rows takes over the row that lies farthest from its own centre. Two calls with equal generators give equal results.

    Args:
        features: (n, D) float, on any device; half precision is clustered in float32.
        k: clusters wanted; with fewer rows than that, every row is a cluster of its own.
        generator: draws the start; it may live on another device than the features.
        max_iterations: Lloyd iterations at most; it ends earlier when no row changes its cluster.

    Returns:
        labels (n,) int64 in [0, min(k, n)), and centres (min(k, n), D), float32 or float64: the means of the final labels.

    Raises:
        ValueError: if `features` is not (n, D), holds a value that is not finite, or `k` or `max_iterations` is not positive.
    """
    if features.ndim != 2:
        raise ValueError(f"features must be (n, D), got {tuple(features.shape)}")
    if k < 1 or max_iterations < 1:
        raise ValueError(f"k and max_iterations must be at least 1, got {k} and {max_iterations}")
    rows = features.detach()
    rows = rows if rows.dtype == torch.float64 else rows.float()
    if not bool(torch.isfinite(rows).all()):
        raise ValueError("features hold values that are not finite; leave those rows out")
    k = min(k, len(rows))
    if k == 0:
        return torch.zeros(0, dtype=torch.int64, device=rows.device), rows.new_zeros(0, rows.shape[1])
    with torch.autocast(rows.device.type, enabled=False):
        # Distances come from products: with the mean at the origin, nothing cancels that need not.
        shift = rows.mean(0)
        rows = rows - shift
        centres = _plus_plus(rows, k, generator)
        labels, distance = _nearest(rows, centres)
        for _ in range(max_iterations):
            labels = _fill_empty(labels, distance, k)
            centres = _means(rows, labels, centres)
            moved, distance = _nearest(rows, centres)
            if torch.equal(moved, labels):
                break
            labels = moved
        else:
            labels = _fill_empty(labels, distance, k)
            centres = _means(rows, labels, centres)
    return labels, centres + shift


def _plus_plus(rows: Tensor, k: int, generator: torch.Generator) -> Tensor:
    trials = 2 + int(math.log(k))
    # One draw for the whole start: how many numbers are consumed does not depend on the data.
    draws = torch.rand(k, trials, generator=generator, device=generator.device, dtype=torch.float64).to(rows.device)
    chosen = (draws[0, :1] * len(rows)).long().clamp(max=len(rows) - 1)
    centres = [rows[chosen]]
    closest = (rows - centres[0]).square().sum(1)
    for i in range(1, k):
        cumulative = closest.double().cumsum(0)
        # Where all rows coincide with centres the total is 0 and the first row is taken again.
        candidates = torch.searchsorted(cumulative, draws[i] * cumulative[-1], right=True).clamp(max=len(rows) - 1)
        offered = torch.minimum(closest[:, None], _squared_distances(rows, rows[candidates]))
        best = offered.sum(0, dtype=torch.float64).argmin()
        closest = offered[:, best]
        centres.append(rows[candidates[best]][None])
    return torch.cat(centres)


def _squared_distances(rows: Tensor, centres: Tensor) -> Tensor:
    """(n, k), never below 0."""
    squares = rows.square().sum(1)[:, None] + centres.square().sum(1)[None]
    return torch.addmm(squares, rows, centres.T, alpha=-2).clamp_(min=0)


def _nearest(rows: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest centre of each row (the first of equals) and the squared distance to it."""
    parts = [_squared_distances(block, centres).min(1) for block in rows.split(_BLOCK_ROWS)]
    return torch.cat([part.indices for part in parts]), torch.cat([part.values for part in parts])


def _means(rows: Tensor, labels: Tensor, previous: Tensor) -> Tensor:
    """Mean of each cluster's rows; the previous centre where a cluster is empty. Sums are matrix products: fixed order."""
    totals, counts = torch.zeros_like(previous), previous.new_zeros(len(previous))
    for block, label in zip(rows.split(_BLOCK_ROWS), labels.split(_BLOCK_ROWS), strict=True):
        member = torch.nn.functional.one_hot(label, len(previous)).to(rows.dtype)
        totals.addmm_(member.T, block)
        counts += member.sum(0)
    return torch.where(counts[:, None] > 0, totals / counts.clamp(min=1)[:, None], previous)


def _fill_empty(labels: Tensor, distance: Tensor, k: int) -> Tensor:
    counts = torch.bincount(labels, minlength=k)
    empty = (counts == 0).nonzero().squeeze(1)
    if len(empty) == 0:
        return labels
    farthest = torch.sort(distance, descending=True, stable=True).indices[: len(empty)]
    filled = labels.clone()
    filled[farthest] = empty
    return filled
