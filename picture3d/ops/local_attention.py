"""Attention of a few queries over neighbourhoods of a large map, without a copy of the neighbourhoods.

Every query has its own list of cells. They are gathered a few queries at a time, forwards and again backwards, so memory does
not grow with queries x cells x width. What the cells hold is key and value at once: the projections of a multi-head
attention are linear, so they are applied to the few queries and to the few results instead of to every cell,

    q_h . (W_k x + b_k) = (W_k^T q_h) . x + a constant that softmax ignores,     sum a (W_v x + b_v) = W_v (sum a x) + b_v.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_BYTES_AT_ONCE_CPU = 1 << 22  # gathered cells stay in the cache
_BYTES_AT_ONCE_GPU = 1 << 28


def local_attention(query: Tensor, cells: Tensor, index: Tensor, masked: Tensor) -> Tensor:
    """(Q, heads, D): for each query and head, the softmax-weighted mean of its cells. Differentiable in `query` and `cells`.

    Args:
        query: (Q, heads, D), scaled, and carried into the space of the cells.
        cells: (N, D).
        index: (Q, K) int64 rows of `cells`.
        masked: (Q, K) bool, True where a cell takes no part; at least one of each query's does.
    """
    return _LocalAttention.apply(query, cells, index, masked)


class _LocalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, cells: Tensor, index: Tensor, masked: Tensor) -> Tensor:
        ctx.save_for_backward(query, cells, index, masked)
        out = torch.empty_like(query)
        for part, room in _parts(index, cells):
            near, share = _shares(query[part], cells, index[part], masked[part], room)
            out[part] = share @ near
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = grads
        query, cells, index, masked = ctx.saved_tensors
        grad_query, grad_cells = torch.empty_like(query), torch.zeros_like(cells)
        for part, room in _parts(index, cells):
            near, share = _shares(query[part], cells, index[part], masked[part], room)
            grad_share = grad[part] @ near.mT
            grad_logit = share * (grad_share - (share * grad_share).sum(-1, keepdim=True))
            grad_query[part] = grad_logit @ near
            grad_near = share.mT @ grad[part] + grad_logit.mT @ query[part]
            grad_cells.index_add_(0, index[part].flatten(), grad_near.flatten(0, 1))
        return grad_query, grad_cells, None, None


def _parts(index: Tensor, cells: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Queries to take at once, and room for their cells: one piece of memory for all, fresh pages cost more than the copy."""
    most = _BYTES_AT_ONCE_GPU if cells.is_cuda else _BYTES_AT_ONCE_CPU
    step = max(1, most // max(1, index.shape[1] * cells.shape[1] * cells.element_size()))
    room = cells.new_empty(min(step, len(index)) * index.shape[1], cells.shape[1])
    for start in range(0, len(index), step):
        yield slice(start, start + step), room


def _shares(query: Tensor, cells: Tensor, index: Tensor, masked: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
    """Gathered cells (q, K, D), in `room`, and their shares (q, heads, K)."""
    near = torch.index_select(cells, 0, index.flatten(), out=room[: index.numel()]).view(*index.shape, -1)
    logit = (query @ near.mT).masked_fill_(masked[:, None], -torch.inf)
    return near, logit.softmax(-1)
