"""Linear CKA: how far two sets of features of the same rows agree, whatever rotation and scale either of them has.

For column-centred X (n, d) and Y (n, e): |Y'X|_F^2 / (|X'X|_F |Y'Y|_F). This form needs d x e sums and never an n x n matrix,
so rows can be streamed. Source: Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML 2019.
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
        self._origin: Tensor | None = None  # (D,) of all features side by side
        self._sum = torch.zeros(sum(self._left) + sum(self._right), dtype=torch.float64)
        self._products = torch.zeros(len(self._sum), len(self._sum), dtype=torch.float64)
        self.rows = 0  # rows seen

    def add(self, left: Sequence[Tensor], right: Sequence[Tensor]) -> None:
        """Takes in n more rows: (n, d_i) and (n, e_j) tensors of any float dtype.

        Raises:
            ValueError: if columns or rows are not those promised, or a value is not finite.
        """
        columns = [t.shape[1] for t in (*left, *right)]
        if columns != [*self._left, *self._right] or len({len(t) for t in (*left, *right)}) > 1:
            raise ValueError(f"features of {columns} columns given, {[*self._left, *self._right]} and equal rows wanted")
        rows = torch.cat([t.detach().double() for t in (*left, *right)], dim=1)
        if not bool(rows.isfinite().all()):
            raise ValueError("a feature is not a finite number")
        if len(rows) == 0:
            return
        if self._origin is None:
            self._origin = rows.mean(0)
            self._sum, self._products = self._sum.to(rows.device), self._products.to(rows.device)
        rows = rows - self._origin
        self._sum += rows.sum(0)
        self._products += rows.mT @ rows
        self.rows += len(rows)

    def cka(self) -> Tensor:
        """(left, right) float64 on the CPU, in 0..1; NaN where a feature does not vary (or fewer than two rows were seen)."""
        result = torch.full((len(self._left), len(self._right)), float("nan"), dtype=torch.float64)
        if self.rows < 2 or self._origin is None:
            return result
        covariance = self._products - torch.outer(self._sum, self._sum) / self.rows
        # What rounding leaves of a constant feature is not variation: its size is set against that of the values themselves.
        scale = self._origin.square() * self.rows + self._products.diagonal()
        slices = _slices([*self._left, *self._right])
        norms = [covariance[s, s].norm() for s in slices]
        constant = [bool(covariance.diagonal()[s].sum() <= 1e-24 * scale[s].sum()) for s in slices]
        for i in range(len(self._left)):
            for j in range(len(self._right)):
                k = len(self._left) + j
                if not (constant[i] or constant[k]):
                    cross = covariance[slices[i], slices[k]].square().sum()
                    result[i, j] = float((cross / (norms[i] * norms[k])).clamp(0, 1))
        return result


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA of (n, d) and (n, e) features of the same n rows; NaN if either is constant or n < 2."""
    moments = CrossMoments([x.shape[1]], [y.shape[1]])
    moments.add([x], [y])
    return float(moments.cka()[0, 0])


def _slices(sizes: Sequence[int]) -> list[slice]:
    edges = [0]
    for size in sizes:
        edges.append(edges[-1] + size)
    return [slice(a, b) for a, b in pairwise(edges)]
