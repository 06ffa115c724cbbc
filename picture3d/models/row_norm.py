"""Batch norm over the rows of a sparse tensor, whose number can be anything, one and none included."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class RowBatchNorm(nn.BatchNorm1d):
    """`nn.BatchNorm1d` that falls back to its running statistics where a batch has fewer than two rows.

    One row has no variance and none has no mean: the stock layer refuses the first and fills its statistics with NaN
    on the second. Keys and numbers are otherwise those of the stock layer.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(N, C) to (N, C)."""
        if self.training and input.shape[0] < 2:
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return super().forward(input)
