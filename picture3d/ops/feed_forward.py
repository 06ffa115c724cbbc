"""The second half of a feed-forward layer, which keeps less for the backward than its two operations do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def gelu_linear(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``linear(gelu(hidden))`` with the exact (erf) GELU, which is computed again in the backward instead of being kept.

    Args:
        hidden: (N, F) any float dtype; computed in it.
        weight: (C, F).
        bias: (C,).

    Returns:
        (N, C), in the dtype of `hidden`.
    """
    return _GeluLinear.apply(hidden, weight, bias)


class _GeluLinear(Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.bias_dtype = bias.dtype
        with torch.autocast(hidden.device.type, enabled=False):  # under autocast `hidden` is low already, and decides
            return F.linear(F.gelu(hidden), weight.to(hidden.dtype), bias.to(hidden.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = grads
        hidden, weight = ctx.saved_tensors
        grad_weight = (grad.T @ F.gelu(hidden)).to(weight.dtype)
        grad_hidden = torch.ops.aten.gelu_backward(grad @ weight.to(grad.dtype), hidden)
        return grad_hidden, grad_weight, grad.sum(0).to(ctx.bias_dtype)
