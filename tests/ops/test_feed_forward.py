"""The feed-forward half that recomputes, against the two stock operations."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from picture3d.ops.feed_forward import gelu_linear


@pytest.mark.parametrize("rows", [0, 1, 30])
def test_values_and_gradients_equal_gelu_and_linear(rows: int):
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, 7), (5, 7), (5,))
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    factors = torch.randn(rows, 5, generator=generator, dtype=torch.float64)
    ours, stock = ([value.clone().requires_grad_() for value in values] for _ in range(2))
    got, expected = gelu_linear(*ours), F.linear(F.gelu(stock[0]), stock[1], stock[2])
    torch.testing.assert_close(got, expected)
    (got * factors).sum().backward()
    (expected * factors).sum().backward()
    for one, other in zip(ours, stock, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_under_autocast_gradients_come_back_in_the_dtype_of_their_parameters():
    hidden = torch.randn(4, 3, dtype=torch.bfloat16, requires_grad=True)
    weight, bias = torch.randn(2, 3, requires_grad=True), torch.randn(2, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = gelu_linear(hidden, weight, bias)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    dtypes = [None if value.grad is None else value.grad.dtype for value in (hidden, weight, bias)]
    assert dtypes == [torch.bfloat16, torch.float32, torch.float32]


def test_the_activation_is_not_kept():
    kept: list[tuple[int, ...]] = []
    weight, bias = torch.randn(2, 3, requires_grad=True), torch.randn(2, requires_grad=True)
    hidden = torch.randn(4, 3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        gelu_linear(hidden, weight, bias)
    assert sorted(kept) == [(2, 3), (4, 3)]
