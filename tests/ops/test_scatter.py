from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from picture3d.ops.scatter import (
    exchange_rows,
    gather_rows,
    segment_count,
    segment_max,
    segment_mean,
    segment_sum,
    select_unique_rows,
)


def by_loop(values: Tensor, index: Tensor, num_segments: int, reduce: str) -> Tensor:
    rows = []
    for segment in range(num_segments):
        chosen = values[index == segment]
        if len(chosen) == 0:
            rows.append(values.new_zeros(values.shape[1]))
        else:
            rows.append({"sum": chosen.sum(0), "mean": chosen.mean(0), "max": chosen.amax(0)}[reduce])
    return torch.stack(rows) if rows else values.new_zeros(0, values.shape[1])


REDUCERS = {"sum": segment_sum, "mean": segment_mean, "max": segment_max}


@pytest.mark.parametrize("reduce", REDUCERS)
@settings(max_examples=25, deadline=None)
@given(rows=st.integers(0, 40), segments=st.integers(1, 9), columns=st.integers(1, 5), seed=st.integers(0, 999))
def test_values_and_gradients_equal_a_loop_over_segments(reduce: str, rows: int, segments: int, columns: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, segments, (rows,), generator=generator)
    # Few distinct values, all negative: ties are frequent, and an empty segment must not win with its zero.
    values = -torch.randint(1, 4, (rows, columns), generator=generator).double()
    ours, theirs = values.clone().requires_grad_(), values.clone().requires_grad_()
    out, expected = REDUCERS[reduce](ours, index, segments), by_loop(theirs, index, segments, reduce)
    torch.testing.assert_close(out, expected)
    if rows:
        weight = torch.rand(out.shape, generator=generator, dtype=torch.float64)
        (out * weight).sum().backward()
        (expected * weight).sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_maximum_reached_twice_shares_its_gradient_equally():
    values = torch.tensor([[2.0], [5.0], [5.0], [5.0]], requires_grad=True)
    segment_max(values, torch.tensor([0, 0, 0, 1]), 2).backward(torch.tensor([[1.0], [7.0]]))
    assert values.grad is not None
    assert values.grad.flatten().tolist() == [0.0, 0.5, 0.5, 7.0]


def test_empty_segments_are_zero_and_counts_say_so():
    index = torch.tensor([3, 1, 3])
    assert segment_count(index, 5).tolist() == [0, 1, 0, 2, 0]
    for reducer in REDUCERS.values():
        assert (reducer(torch.full((3, 2), -1.0), index, 5)[[0, 2, 4]] == 0).all()


def test_bfloat16_sums_are_accumulated_in_float32():
    ones = torch.ones(1000, 1, dtype=torch.bfloat16)  # a running bfloat16 sum would stop at 256
    total = segment_sum(ones, torch.zeros(1000, dtype=torch.int64), 1)
    assert total.dtype == torch.bfloat16
    assert total.item() == 1000


def test_gathered_rows_and_their_gradient_equal_plain_indexing():
    values = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([5, 0, 0, 2, 5, 5])
    assert torch.equal(gather_rows(values, index), values[index])
    assert torch.autograd.gradcheck(lambda v: gather_rows(v, index), (values,))


def test_uniquely_selected_rows_and_their_gradient_equal_plain_indexing():
    values = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([5, 0, 2])
    assert torch.equal(select_unique_rows(values, index), values[index])
    assert torch.autograd.gradcheck(lambda v: select_unique_rows(v, index), (values,))


def test_exchanged_rows_take_their_gradient_from_the_named_slot():
    values = torch.randn(3, 2, requires_grad=True)
    row_of_slot, slot_of_row = torch.tensor([2, 0, 0, 1]), torch.tensor([1, 3, 0])
    out = exchange_rows(values, row_of_slot, slot_of_row)
    assert torch.equal(out, values[row_of_slot])
    grad = torch.arange(8.0).view(4, 2)
    out.backward(grad)
    assert values.grad is not None
    assert torch.equal(values.grad, grad[slot_of_row])


def test_sums_do_not_depend_on_the_run():
    generator = torch.Generator().manual_seed(0)
    values, index = torch.randn(20000, 8, generator=generator), torch.randint(0, 50, (20000,), generator=generator)
    assert torch.equal(segment_sum(values, index, 50), segment_sum(values, index, 50))
