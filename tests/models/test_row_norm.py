"""The folded norm against the layers it stands for, on rows that are written out."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from picture3d.models.row_norm import RowBatchNorm, fold_row_norm


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("count", [[3, 1, 5, 2], [2], [1], []])
def test_the_folded_norm_equals_linear_and_norm_on_repeated_rows(training: bool, count: list[int]):
    generator = torch.Generator().manual_seed(0)
    rows = 10 * torch.randn(len(count), 3, generator=generator, dtype=torch.float64) + 4
    times = torch.tensor(count, dtype=torch.int64)
    torch.manual_seed(1)
    linear, norm = nn.Linear(3, 7).double(), RowBatchNorm(7).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    norm.running_mean, norm.running_var = torch.randn(7).double(), torch.rand(7).double() + 0.5
    other_linear, other_norm = copy.deepcopy(linear), copy.deepcopy(norm)
    norm.train(training)
    other_norm.train(training)
    factors = torch.randn(int(times.sum()), 7, generator=generator, dtype=torch.float64)

    weight, bias = fold_row_norm(linear, norm, rows, times)
    got = F.linear(rows, weight, bias).repeat_interleave(times, 0)
    expected = other_norm(other_linear(rows.repeat_interleave(times, 0)))
    torch.testing.assert_close(got, expected)
    (got * factors).sum().backward()
    (expected * factors).sum().backward()
    for mine, stock in zip(
        (*linear.parameters(), *norm.parameters()), (*other_linear.parameters(), *other_norm.parameters()), strict=True
    ):
        torch.testing.assert_close(mine.grad, stock.grad)
    for name, value in other_norm.state_dict().items():
        torch.testing.assert_close(norm.state_dict()[name], value)
