"""Linear CKA: how far two sets of features of the same rows agree, whatever rotation and scale either of them has. Effective
rank: how many directions one set really uses.

For column-centred X (n, d) and Y (n, e): |Y'X|_F^2 / (|X'X|_F |Y'Y|_F). This form needs d x e sums and never an n x n matrix,
so rows can be streamed. Sources: Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML 2019; Roy
and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007, here of the covariance's eigenvalues.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


class CrossMoments:
    """Sums over rows from which the CKA of every pair of features is known; they do not grow with the rows.

    Kept in float64 around the means of the first rows seen, so that features far from 0 lose no digits.

    Args:
        left: columns of each feature on the left side, d_i.
        right: columns of each feature on the right side, e_j.
    """

    def __init__(self, left: Sequence[int], right: Sequence[int]) -> None:
        self._left, self._right = list(left), list(right)
        self._origins: list[Tensor] = []  # one row (columns,) per feature, left and right
        self._sums = [torch.zeros(columns, dtype=torch.float64) for columns in (*left, *right)]
        self._own = [torch.zeros(columns, columns, dtype=torch.float64) for columns in (*left, *right)]
        self._cross = torch.zeros(sum(left), sum(right), dtype=torch.float64)
        self.rows = 0  # rows seen

    def add(self, left: Sequence[Tensor], right: Sequence[Tensor]) -> None:
        """Takes in n more rows: (n, d_i) and (n, e_j) tensors of any float dtype.

        Raises:
            ValueError: if columns or rows are not those promised, or a value is not finite.
        """
        columns = [t.shape[1] for t in (*left, *right)]
        if columns != [*self._left, *self._right] or len({len(t) for t in (*left, *right)}) > 1:
            raise ValueError(f"features must have {[*self._left, *self._right]} columns and equal rows, got {columns} columns")
        features = [t.detach().double() for t in (*left, *right)]
        if not all(bool(feature.isfinite().all()) for feature in features):
            raise ValueError("features must be finite numbers")
        if len(features[0]) == 0:
            return
        if not self._origins:
            self._origins = [feature.mean(0) for feature in features]
            device = features[0].device
            self._sums, self._own = [t.to(device) for t in self._sums], [t.to(device) for t in self._own]
            self._cross = self._cross.to(device)
        features = [feature - origin for feature, origin in zip(features, self._origins, strict=True)]
        for feature, total, own in zip(features, self._sums, self._own, strict=True):
            total += feature.sum(0)
            own += feature.mT @ feature
        self._cross += torch.cat(features[: len(self._left)], 1).mT @ torch.cat(features[len(self._left) :], 1)
        self.rows += len(features[0])

    def cka(self) -> Tensor:
        """(left, right) float64 on the CPU, in 0..1; NaN where a feature does not vary (or fewer than two rows were seen)."""
        result = torch.full((len(self._left), len(self._right)), float("nan"), dtype=torch.float64)
        if self.rows < 2:
            return result
        norms: list[float] = []
        for total, own, origin in zip(self._sums, self._own, self._origins, strict=True):
            covariance = own - torch.outer(total, total) / self.rows
            # What rounding leaves of a constant feature is not variation: it is set against the size of the values themselves.
            size = self.rows * origin.square().sum() + own.diagonal().sum()
            constant = bool(covariance.diagonal().sum() <= 1e-24 * size)
            norms.append(float("nan") if constant else float(covariance.norm()))
        sums = self._sums
        rows, columns = _slices(self._left), _slices(self._right)
        for i, row in enumerate(rows):
            for j, column in enumerate(columns):
                k = len(rows) + j
                cross = self._cross[row, column] - torch.outer(sums[i], sums[k]) / self.rows
                value = float(cross.square().sum()) / (norms[i] * norms[k])
                result[i, j] = min(value, 1.0) if value == value else value
        return result


def weight_disparity(before: Sequence[Tensor], after: Sequence[Tensor]) -> tuple[float, float]:
    """Mean and variance of ``after - before`` over all numbers of some tensors; NaN for no numbers.

    Raises:
        ValueError: if shapes differ.
    """
    if [t.shape for t in before] != [t.shape for t in after]:
        raise ValueError("before and after must have the same shapes")
    differences = [(b.double() - a.double()).flatten() for a, b in zip(before, after, strict=True)]
    if not sum(len(d) for d in differences):
        return float("nan"), float("nan")
    every = torch.cat(differences)
    return float(every.mean()), float(every.var(correction=0))


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA of (n, d) and (n, e) features of the same n rows; NaN if either is constant or n < 2."""
    moments = CrossMoments([x.shape[1]], [y.shape[1]])
    moments.add([x], [y])
    return float(moments.cka()[0, 0])


def effective_rank(features: Tensor, weight: Tensor | None = None) -> Tensor:
    """() float32: exponential of the entropy of the covariance's eigenvalues, 1..D; 0 where all rows are the same.

    Args:
        features: (M, D) float; 0 for fewer than two rows.
        weight: (M,) float, 0 or more: how much each row counts; None: all alike.
    """
    if len(features) < 2:
        return features.new_zeros((), dtype=torch.float32)
    rows = features.double()
    share = torch.full_like(rows[:, 0], 1 / len(rows)) if weight is None else weight.double() / weight.double().sum()
    centred = rows - share @ rows
    values = torch.linalg.eigvalsh((centred * share[:, None]).mT @ centred).clamp(min=0)
    total = values.sum()
    # What rounding leaves of a constant feature is not variation: it is set against the size of the values themselves.
    total = torch.where(total > 1e-24 * (share @ rows.square()).sum(), total, 0.0)
    part = values / torch.where(total > 0, total, 1.0)
    entropy = torch.special.entr(part).sum()
    return torch.where(total > 0, entropy.exp(), 0.0).float()


def _slices(sizes: Sequence[int]) -> list[slice]:
    edges = [0]
    for size in sizes:
        edges.append(edges[-1] + size)
    return [slice(a, b) for a, b in pairwise(edges)]
