"""Sums, means and maxima of rows by segment, and their inverse, the gather. All are deterministic, forward and backward.

`index` says which segment a row belongs to and need not be sorted. A segment without rows is all zeros.
Half-precision values are accumulated in float32. Gradients of a maximum that several rows reach are shared equally
among them, as `torch.amax` does, on every device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


def segment_sum(values: Tensor, index: Tensor, num_segments: int) -> Tensor:
    """Sum of the rows of each segment.

    Args:
        values: (N, C) float.
        index: (N,) int64 in [0, num_segments).
        num_segments: number of rows of the result.

    Returns:
        (num_segments, C), in the dtype of `values`; 0 where a segment has no row.
    """
    return _SegmentSum.apply(values, index, num_segments)


def segment_mean(values: Tensor, index: Tensor, num_segments: int) -> Tensor:
    """Mean of the rows of each segment; shapes as :func:`segment_sum`, 0 where a segment has no row."""
    count = segment_count(index, num_segments).clamp(min=1)
    return segment_sum(values, index, num_segments) / count.to(values.dtype)[:, None]


def segment_max(values: Tensor, index: Tensor, num_segments: int) -> Tensor:
    """Maximum, per column, of the rows of each segment; shapes as :func:`segment_sum`, 0 where a segment has no row."""
    return _SegmentMax.apply(values, index, num_segments)


def segment_count(index: Tensor, num_segments: int) -> Tensor:
    """(num_segments,) int64: how many rows each segment has."""
    count = torch.zeros(num_segments, dtype=torch.int64, device=index.device)
    return count.scatter_add_(0, index, torch.ones_like(index))  # integers: the order of additions does not matter


def gather_rows(values: Tensor, index: Tensor) -> Tensor:
    """``values[index]`` whose backward is a deterministic :func:`segment_sum`.

    Args:
        values: (M, C) float.
        index: (N,) int64 in [0, M).

    Returns:
        (N, C).
    """
    return _GatherRows.apply(values, index)


def exchange_rows(values: Tensor, row_of_slot: Tensor, slot_of_row: Tensor) -> Tensor:
    """``values[row_of_slot]`` where each row's gradient comes from one slot only, ``slot_of_row``.

    For permutations, and for padded layouts whose other slots are known to receive no gradient: then both directions
    are plain gathers.

    Args:
        values: (N, C) float.
        row_of_slot: (T,) int64 in [0, N).
        slot_of_row: (N,) int64 in [0, T) with ``row_of_slot[slot_of_row[i]] == i``.

    Returns:
        (T, C).
    """
    return _ExchangeRows.apply(values, row_of_slot, slot_of_row)


def select_unique_rows(values: Tensor, index: Tensor) -> Tensor:
    """``values[index]`` for an index that names no row twice: the backward is a plain write.

    Args:
        values: (M, C) float.
        index: (N,) int64 in [0, M), all different.

    Returns:
        (N, C).
    """
    return _SelectUniqueRows.apply(values, index)


def _sum_rows(values: Tensor, index: Tensor, num_segments: int) -> Tensor:
    wide = values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
    if wide.is_cuda:
        # Additions by atomics come in any order; sorted rows are added one after the other.
        order = torch.argsort(index, stable=True)
        total = torch.segment_reduce(
            wide.index_select(0, order), "sum", lengths=segment_count(index, num_segments), axis=0, unsafe=True, initial=0
        )
    else:
        total = wide.new_zeros(num_segments, wide.shape[1])
        total.scatter_reduce_(0, index[:, None].expand(-1, wide.shape[1]), wide, "sum")
    return total.to(values.dtype)


class _SegmentSum(Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor, num_segments: int) -> Tensor:
        ctx.save_for_backward(index)
        return _sum_rows(values, index, num_segments)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return gather_rows(grads[0], index), None, None


class _GatherRows(Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.num_rows = values.shape[0]
        return values.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return segment_sum(grads[0], index, ctx.num_rows), None


class _ExchangeRows(Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, row_of_slot: Tensor, slot_of_row: Tensor) -> Tensor:
        ctx.save_for_backward(slot_of_row)
        return values.index_select(0, row_of_slot)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (slot_of_row,) = ctx.saved_tensors
        return grads[0].index_select(0, slot_of_row), None, None


class _SelectUniqueRows(Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.num_rows = values.shape[0]
        return values.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return grads[0].new_zeros(ctx.num_rows, grads[0].shape[1]).index_copy_(0, index, grads[0]), None


class _SegmentMax(Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor, num_segments: int) -> Tensor:
        columns = index[:, None].expand(-1, values.shape[1])
        top = values.new_zeros(num_segments, values.shape[1])
        top.scatter_reduce_(0, columns, values, "amax", include_self=False)
        ctx.save_for_backward(values, index, top)
        return top

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        values, index, top = ctx.saved_tensors
        winner = (values == top.index_select(0, index)).float()
        # Sums of ones are exact, in whatever order they are added.
        ties = torch.zeros(top.shape, device=top.device).scatter_add_(0, index[:, None].expand(-1, top.shape[1]), winner)
        share = grads[0].float() / ties.clamp(min=1)
        return (winner * share.index_select(0, index)).to(values.dtype), None, None
