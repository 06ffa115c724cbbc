"""The second half of a post-norm encoder layer, which keeps less for the backward than its operations one by one do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


@dataclass(frozen=True, slots=True, eq=False)
class FeedForwardWeights:
    """The parameters of the second half of an encoder layer of width C: three layer norms around two linear layers."""

    norm1: tuple[Tensor, Tensor]  # weight (C,), bias (C,)
    linear1: tuple[Tensor, Tensor]  # weight (F, C), bias (F,)
    linear2: tuple[Tensor, Tensor]  # weight (C, F), bias (C,)
    norm2: tuple[Tensor, Tensor]
    norm3: tuple[Tensor, Tensor]
    eps: float  # of the norms


def feed_forward(x: Tensor, attended: Tensor, weights: FeedForwardWeights) -> Tensor:
    """From what attention says to the output of an encoder layer.

    With ``h = norm1(x + attended)``: ``norm3(norm2(h + linear2(gelu(linear1(h)))) + x)``, GELU in its exact (erf) form.
    Kept for the backward are `x` and the sums that enter the first two norms; the rows of width F in between, which would take
    as much again, are made anew from them. `feed_forward_plain` is the readable twin. Sums and norms are taken in float32 at
    least, products in the dtype of `attended`.

    Args:
        x: (N, C) input of the layer.
        attended: (N, C), in any float dtype.
        weights: of the layer.

    Returns:
        (N, C) float32, or float64 if `x` is.
    """
    flat = (*weights.norm1, *weights.linear1, *weights.linear2, *weights.norm2, *weights.norm3)
    return _FeedForward.apply(x, attended, weights.eps, *flat)


def feed_forward_plain(x: Tensor, attended: Tensor, weights: FeedForwardWeights) -> Tensor:
    """The same, operation by operation."""

    def norm(values: Tensor, of: tuple[Tensor, Tensor]) -> Tensor:
        return F.layer_norm(values, values.shape[1:], *of, weights.eps)

    hidden = norm(x + attended, weights.norm1)
    hidden = norm(hidden + F.linear(F.gelu(F.linear(hidden, *weights.linear1)), *weights.linear2), weights.norm2)
    return norm(hidden + x, weights.norm3)


class _FeedForward(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, attended: Tensor, eps: float, *weights: Tensor) -> Tensor:
        norm1, (weight1, bias1, weight2, bias2), norm2, norm3 = weights[:2], weights[2:6], weights[6:8], weights[8:]
        low = attended.dtype
        with torch.autocast(x.device.type, enabled=False):
            sum1 = x.to(torch.promote_types(x.dtype, torch.float32)) + attended
            hidden, *spread1 = _norm(sum1, norm1, eps)
            inner = _gelu(F.linear(hidden.to(low), weight1.to(low), bias1.to(low)))
            sum2 = hidden.add_(F.linear(inner, weight2.to(low), bias2.to(low)))
            del inner
            normal, *spread2 = _norm(sum2, norm2, eps)
            out, *spread3 = _norm(normal.add_(x), norm3, eps)
        ctx.save_for_backward(x, sum1, sum2, *spread1, *spread2, *spread3, *weights)
        ctx.eps, ctx.low = eps, low
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = grads
        x, sum1, sum2, *rest = ctx.saved_tensors
        spread1, spread2, spread3, weights = rest[0:2], rest[2:4], rest[4:6], rest[6:]
        norm1, (weight1, bias1, weight2, bias2), norm2, norm3 = weights[:2], weights[2:6], weights[6:8], weights[8:]
        low = ctx.low
        sum3 = _norm(sum2, norm2, ctx.eps)[0].add_(x)
        grad_sum3, *grads3 = _norm_backward(grad, sum3, spread3, norm3)
        del sum3
        grad_sum2, *grads2 = _norm_backward(grad_sum3, sum2, spread2, norm2)
        hidden = _norm(sum1, norm1, ctx.eps)[0].to(low)
        inner = F.linear(hidden, weight1.to(low), bias1.to(low))
        grad_low = grad_sum2.to(low)
        grad_linear2 = (grad_low.T @ _gelu(inner)).to(weight2.dtype), grad_sum2.sum(0).to(bias2.dtype)
        grad_inner = torch.ops.aten.gelu_backward((grad_low @ weight2.to(low)).T, inner.T).T  # turned as in `_gelu`
        grad_linear1 = (grad_inner.T @ hidden).to(weight1.dtype), grad_inner.sum(0).to(bias1.dtype)
        del hidden, inner
        if low == grad_sum2.dtype:
            grad_hidden = grad_sum2.addmm_(grad_inner, weight1)
        else:
            grad_hidden = grad_sum2.add_(grad_inner @ weight1.to(low))
        grad_sum1, *grads1 = _norm_backward(grad_hidden, sum1, spread1, norm1)
        grad_x = grad_sum3.add_(grad_sum1).to(x.dtype)
        return grad_x, grad_sum1.to(low), None, *grads1, *grad_linear1, *grad_linear2, *grads2, *grads3


def _gelu(rows: Tensor) -> Tensor:
    """GELU of the rows seen as columns, in the same memory.

    Rows that lie one after the other go to oneDNN, which compiles an operation for each number of rows and keeps it; with
    sparse voxels every step brings new numbers. PyTorch's own takes as long and is closer to float64 (5e-7, not 1e-6).
    """
    return F.gelu(rows.T).T


def _norm(values: Tensor, of: tuple[Tensor, ...] | list[Tensor], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Layer norm over columns, and the means and reciprocal deviations of the rows."""
    weight, bias = of
    return torch.native_layer_norm(values, values.shape[1:], weight.to(values.dtype), bias.to(values.dtype), eps)


def _norm_backward(
    grad: Tensor, values: Tensor, spread: list[Tensor], of: tuple[Tensor, ...] | list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    weight, bias = of
    mean, inverse = spread
    wanted = [True, True, True]
    grad_values, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad.contiguous(), values, values.shape[1:], mean, inverse, weight.to(values.dtype), bias.to(values.dtype), wanted
    )
    return grad_values, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)
