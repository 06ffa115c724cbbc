"""Batch norm over the rows of a sparse tensor, whose number can be anything, one and none included."""

from __future__ import annotations

import torch
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


def fold_row_norm(linear: nn.Linear, norm: RowBatchNorm, rows: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """The linear layer that ``norm(linear(x))`` amounts to, where x are `rows`, each of them `count` times.

    In training the statistics are those of the repeated rows, and the running statistics move with them, as if the rows had
    been written out. The variance follows from the (k, k) covariance of the rows, so nothing of width C is made for it.

    Args:
        linear: k columns to C, with bias.
        norm: batch norm of width C.
        rows: (U, k) float, the different rows.
        count: (U,) int64, how often each occurs.

    Returns:
        weight (C, k) and bias (C,).
    """
    total = int(count.sum()) if norm.training else 0
    with torch.autocast(rows.device.type, enabled=False):
        if norm.training and total >= 2:
            share = count.to(torch.float64) / total
            mean_row = share @ rows.double()
            offset = rows.double() - mean_row
            covariance = ((offset * share[:, None]).T @ offset).to(rows.dtype)
            mean = F.linear(mean_row.to(rows.dtype), linear.weight, linear.bias)
            variance = ((linear.weight @ covariance) * linear.weight).sum(1)
            with torch.no_grad():
                assert norm.running_mean is not None
                assert norm.running_var is not None
                assert norm.num_batches_tracked is not None
                norm.num_batches_tracked.add_(1)
                momentum = norm.momentum if norm.momentum is not None else 1 / int(norm.num_batches_tracked)
                norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
                norm.running_var.lerp_((variance * (total / (total - 1))).to(norm.running_var.dtype), momentum)
        else:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            mean, variance = norm.running_mean, norm.running_var
        scale = norm.weight * torch.rsqrt(variance + norm.eps)
        return linear.weight * scale[:, None], (linear.bias - mean) * scale + norm.bias
