"""Batch norms: over the rows of a sparse tensor, whose number can be anything, over maps, and over several processes at once.

Where processes compute a step together (`ops.processes`) the statistics are those of all their rows, however unevenly the rows
are spread: forward, backward and running statistics are those of one norm over the rows of all. PyTorch's own synchronised norm
runs on CUDA only.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from picture3d.ops.processes import add_to_loss, group_of_step


class RowBatchNorm(nn.BatchNorm1d):
    """`nn.BatchNorm1d` that falls back to its running statistics where a batch has fewer than two rows.

    One row has no variance and none has no mean: the stock layer refuses the first and fills its statistics with NaN
    on the second. Keys and numbers are otherwise those of the stock layer.
    """

    synchronised = True

    def forward(self, input: Tensor) -> Tensor:
        """(N, C) to (N, C)."""
        group = group_of_step()
        if self.training and group is not None:
            return shared_batch_norm(self, input, group)
        if self.training and input.shape[0] < 2:
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return super().forward(input)


class SequenceBatchNorm(nn.BatchNorm1d):
    """`nn.BatchNorm1d` for rows or sequences, with the statistics of all processes of a step."""

    synchronised = True

    def forward(self, input: Tensor) -> Tensor:
        """(N, C) or (B, C, L) to the same."""
        group = group_of_step()
        return shared_batch_norm(self, input, group) if self.training and group is not None else super().forward(input)


class MapBatchNorm(nn.BatchNorm2d):
    """`nn.BatchNorm2d` with the statistics of all processes of a step."""

    synchronised = True

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        group = group_of_step()
        return shared_batch_norm(self, input, group) if self.training and group is not None else super().forward(input)


def fold_row_norm(linear: nn.Linear, norm: RowBatchNorm, rows: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """The linear layer that ``norm(linear(x))`` amounts to, where x are `rows`, each of them `count` times.

    In training the statistics are those of the repeated rows, and the running statistics move with them, as if the rows had
    been written out; several processes together take those of all their rows. The variance follows from the (k, k)
    covariance of the rows, so nothing of width C is made for it.

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
        mean_row = moments = rows
        if norm.training:
            share = count.to(torch.float64) / max(1, total)
            mean_row = share @ rows.double()
            offset = rows.double() - mean_row
            moments = (offset * share[:, None]).T @ offset
            group = group_of_step()
            if group is not None:  # rows are data: no gradient passes through their moments
                total, mean_row, moments = _moments_of_all(total, mean_row, moments, group)
        if norm.training and total >= 2:
            covariance = moments.to(rows.dtype)
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


def _moments_of_all(total: int, mean: Tensor, moments: Tensor, group: dist.ProcessGroup) -> tuple[int, Tensor, Tensor]:
    """Rows in all, their (k,) mean and (k, k) biased covariance, from those of each process; float64."""
    own = torch.cat([mean.new_tensor([total]), mean, moments.flatten()])
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, own, group=group)
    each = torch.stack(everyone)
    rows, means, within = each[:, 0], each[:, 1 : 1 + len(mean)], each[:, 1 + len(mean) :].unflatten(1, moments.shape)
    weight = rows / rows.sum().clamp(min=1)
    mean = weight @ means
    between = means - mean
    spread = (weight[:, None, None] * (within + between[:, :, None] * between[:, None, :])).sum(0)
    return int(rows.sum()), mean, spread


def shared_batch_norm(
    norm: nn.BatchNorm1d | nn.BatchNorm2d, x: Tensor, group: dist.ProcessGroup, counts: Tensor | None = None
) -> Tensor:
    """What `norm` in training says of its rows among the rows of all processes; its running statistics move.

    With fewer than two rows in all, the running statistics are used and stay.

    Args:
        norm: with weights and running statistics.
        x: (N, C) or (B, C, ...) any float dtype; computed in float32 at least. There may be no row.
        group: the processes; all of them have to call.
        counts: (N,) for how many equal rows each of (N, C) stands; None: one.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    values = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    with torch.no_grad():
        total, mean, variance = _statistics(values, group, None if counts is None else counts.to(values.dtype))
        enough = total >= 2
        tracked = norm.num_batches_tracked
        tracked += enough.to(tracked.dtype)
        momentum = 1.0 / tracked.clamp(min=1).double() if norm.momentum is None else norm.momentum
        unbiased = variance * (total / (total - 1).clamp(min=1))
        for running, new in ((norm.running_mean, mean), (norm.running_var, unbiased)):
            running.copy_(torch.where(enough, running.double() * (1 - momentum) + new * momentum, running.double()))
        mean = torch.where(enough, mean, norm.running_mean.double()).to(values.dtype)
        variance = torch.where(enough, variance, norm.running_var.double())
        inverse = (variance + norm.eps).rsqrt().to(values.dtype)
        share = torch.where(enough, 1 / total.clamp(min=1), 0.0).to(values.dtype)  # of a row in the statistics
    y, zero = cast(tuple[Tensor, Tensor], _SharedNorm.apply(x, norm.weight, norm.bias, mean, inverse, share, counts, group))
    add_to_loss(zero)
    return y


def _statistics(values: Tensor, group: dist.ProcessGroup, counts: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Rows in all, (C,) mean and (C,) biased variance over the rows of all processes, float64."""
    channels = values.shape[1]
    own = torch.zeros(1 + 2 * channels, dtype=torch.float64, device=values.device)
    if counts is not None:
        own[0] = counts.sum()
        weight = counts.double()[:, None] / own[0].clamp(min=1)
        own[1 : 1 + channels] = (weight * values).sum(0)
        own[1 + channels :] = (weight * (values - own[1 : 1 + channels]).square()).sum(0)
    elif values.numel():
        own[0] = values.numel() // channels
        variance, mean = torch.var_mean(values, _all_but_channels(values), correction=0)
        own[1 : 1 + channels], own[1 + channels :] = mean, variance
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, own, group=group)
    each = torch.stack(everyone)
    rows, means, variances = each[:, :1], each[:, 1 : 1 + channels], each[:, 1 + channels :]
    total = rows.sum()
    weight = rows / total.clamp(min=1)
    mean = (weight * means).sum(0)
    # Chan, Golub and LeVeque, Updating formulae for computing sample variances, 1979: nothing cancels.
    return total, mean, (weight * (variances + (means - mean).square())).sum(0)


class _SharedNorm(torch.autograd.Function):
    """Normalisation by statistics that depend on the rows of all processes, and its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        inverse: Tensor,
        share: Tensor,
        counts: Tensor | None,
        group: dist.ProcessGroup,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight, mean, inverse, share, counts)
        ctx.group = group
        scale = inverse * weight
        shift = bias - mean * scale
        y = torch.addcmul(_column(shift, x), x.to(mean.dtype), _column(scale, x)).to(x.dtype)
        return y, mean.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight, mean, inverse, share, counts = ctx.saved_tensors
        gradient = gradients[0].to(mean.dtype)
        normal = (x.to(mean.dtype) - _column(mean, x)) * _column(inverse, x)
        dims = _all_but_channels(x)
        own = torch.stack([gradient.sum(dims), (gradient * normal).sum(dims)])
        of_all = own.clone()
        dist.all_reduce(of_all, group=ctx.group)
        through = _column(of_all[0] * share, x) + normal * _column(of_all[1] * share, x)
        if counts is not None:
            through = through * counts.to(mean.dtype)[:, None]
        wanted = (gradient - through) * _column(inverse * weight, x)
        return wanted.to(x.dtype), own[1].to(weight.dtype), own[0].to(weight.dtype), None, None, None, None, None


def _all_but_channels(x: Tensor) -> list[int]:
    return [dim for dim in range(x.ndim) if dim != 1]


def _column(per_channel: Tensor, x: Tensor) -> Tensor:
    """(C,) so that it meets the channels of `x`."""
    return per_channel.view([-1 if dim == 1 else 1 for dim in range(x.ndim)])
