"""Multi-head attention inside sets of voxels, and over the slots of a pooled cell.

Twins with one signature, chosen by the layout that is handed in: :class:`~picture3d.ops.sets.PaddedSets` is the published
computation, kept for reading and testing; :class:`~picture3d.ops.sets.SetRuns` (on a CPU) and
:class:`~picture3d.ops.sets.FullSets` (on a GPU, where lengths stay on the device) give the same numbers several times faster.
Repeated keys are masked in the published form, so attention goes over the distinct voxels of a set in both.

Queries and keys are made of features plus position embeddings, values of the features alone.

Source: "DSVT: Dynamic Sparse Voxel Transformer with Rotated Sets", CVPR 2023, sections 3.2 and 3.4.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from picture3d.ops.scatter import exchange_rows, gather_rows, segment_count, segment_max, segment_sum, select_unique_rows
from picture3d.ops.sets import FullSets, PaddedSets, PlacedRuns, SetLayout, SetRuns


@dataclass(frozen=True, slots=True, eq=False)
class AttentionWeights:
    """The parameters of a multi-head attention of width C, in the layout of `torch.nn.MultiheadAttention`."""

    in_weight: Tensor  # (3 C, C): query, key, value
    in_bias: Tensor  # (3 C,)
    out_weight: Tensor  # (C, C)
    out_bias: Tensor  # (C,)
    heads: int

    @property
    def channels(self) -> int:
        """Width C."""
        return self.out_bias.shape[0]


@dataclass(frozen=True, slots=True, eq=False)
class PositionRows:
    """Position embeddings of N voxels, kept once for all voxels that share one."""

    values: Tensor  # (U, C)
    row_of_voxel: Tensor | None  # (N,) int64; None: voxel i has row i

    def of_voxels(self) -> Tensor:
        """(N, C): the embedding of every voxel."""
        return self.values if self.row_of_voxel is None else gather_rows(self.values, self.row_of_voxel)

    def in_order(self, voxels: Tensor) -> PositionRows:
        """The embeddings of the voxels at (N,) rows, in that order."""
        return PositionRows(self.values, voxels if self.row_of_voxel is None else self.row_of_voxel.index_select(0, voxels))


def set_attention(
    x: Tensor,
    position: PositionRows,
    sets: SetLayout | PlacedRuns,
    axis: int,
    weights: AttentionWeights,
    wanted: Tensor | None = None,
) -> Tensor:
    """Every voxel attends to the voxels of its set.

    Args:
        x: (N, C) features: what values are made of; queries and keys are made of their sum with the position embeddings.
        position: position embeddings of the N voxels.
        sets: the sets of N voxels, in any layout.
        axis: which of the two orders of `sets`; rows of `PlacedRuns` lie in the one they are to be used in.
        weights: projections and number of heads.
        wanted: (W,) int64 different rows whose answer is wanted; None: all of them.

    Returns:
        (N, C), or (W, C).
    """
    if isinstance(sets, PlacedRuns):
        return _run_attention(x, position, sets.blocks, weights, wanted)
    if isinstance(sets, SetRuns):
        there, back = sets.voxel_of_place[axis], sets.place_of_voxel[axis]
        asked = back if wanted is None else back.index_select(0, wanted)
        return _run_attention(exchange_rows(x, there, back), position.in_order(there), sets.placed.blocks, weights, asked)
    query_key = x + position.of_voxels()
    if isinstance(sets, PaddedSets):
        attended = _padded_attention(query_key, x, sets.voxel[axis], sets.repeated[axis], weights)
    else:
        attended = _full_attention(query_key, x, sets, axis, weights)
    return attended if wanted is None else select_unique_rows(attended, wanted)


def _padded_attention(query_key: Tensor, value: Tensor, voxel: Tensor, repeated: Tensor, weights: AttentionWeights) -> Tensor:
    sets, slots = voxel.shape
    heads, width = weights.heads, weights.channels // weights.heads
    rows = voxel.flatten()
    qk_weight, v_weight = weights.in_weight.split([2 * weights.channels, weights.channels])
    qk_bias, v_bias = weights.in_bias.split([2 * weights.channels, weights.channels])
    query, key = F.linear(gather_rows(query_key, rows), qk_weight, qk_bias).view(sets, slots, 2, heads, width).unbind(2)
    values = F.linear(gather_rows(value, rows), v_weight, v_bias).view(sets, slots, heads, width)
    scores = torch.einsum("sqhw,skhw->shqk", query * width**-0.5, key)
    scores = _at_least_float32(scores).masked_fill(repeated[:, None, None, :], float("-inf"))
    mixed = torch.einsum("shqk,skhw->sqhw", scores.softmax(-1).to(values.dtype), values)
    out = F.linear(mixed.reshape(sets * slots, weights.channels), weights.out_weight, weights.out_bias)
    first = (~repeated).flatten().nonzero().squeeze(1)  # a voxel takes the output of its first slot
    slot_of_voxel = torch.empty(value.shape[0], dtype=torch.int64, device=value.device)
    slot_of_voxel[rows[first]] = first
    return select_unique_rows(out, slot_of_voxel)


def _full_attention(query_key: Tensor, value: Tensor, sets: FullSets, axis: int, weights: AttentionWeights) -> Tensor:
    channels, heads = weights.channels, weights.heads
    count, slots = sets.spare.shape
    voxel_of_slot, slot_of_voxel = sets.voxel_of_slot[axis], sets.slot_of_voxel[axis]
    qk_weight, v_weight = weights.in_weight.split([2 * channels, channels])
    qk_bias, v_bias = weights.in_bias.split([2 * channels, channels])
    # Project the N voxels once, then move them into their slots. A spare slot is masked as a key and dropped as a query,
    # so no gradient comes back from it, and the backward of the move is a plain gather too.
    qk = exchange_rows(F.linear(query_key, qk_weight, qk_bias), voxel_of_slot, slot_of_voxel)
    v = exchange_rows(F.linear(value, v_weight, v_bias), voxel_of_slot, slot_of_voxel)
    query, key = qk.view(count, slots, 2, heads, channels // heads).permute(2, 0, 3, 1, 4)
    values = v.view(count, slots, heads, channels // heads).transpose(1, 2)
    mixed = F.scaled_dot_product_attention(query, key, values, attn_mask=~sets.spare[:, None, None, :])
    slots_out = mixed.transpose(1, 2).reshape(count * slots, channels)
    return F.linear(select_unique_rows(slots_out, slot_of_voxel), weights.out_weight, weights.out_bias)


def _run_attention(
    x: Tensor, position: PositionRows, blocks: tuple[tuple[int, int], ...], weights: AttentionWeights, wanted: Tensor | None
) -> Tensor:
    if position.row_of_voxel is None:
        position = position.in_order(torch.arange(len(x), device=x.device))
    mixed = _RunAttention.apply(
        x, position.values, position.row_of_voxel, weights.in_weight, weights.in_bias, blocks, weights.heads
    )
    if wanted is not None:
        mixed = select_unique_rows(mixed, wanted)
    return F.linear(mixed, weights.out_weight, weights.out_bias)


class _RunAttention(Function):
    """Projections and softmax attention inside each set, all sets of one length by the same few products.

    PyTorch's own attention on a CPU walks over sets and heads one at a time and takes twice as long. Written with
    its backward, so that gradients of all blocks go into one tensor instead of being padded with zeros and added up, and so
    that nothing is kept but the features, queries, keys and values: what is cheap to make is made again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        position: Tensor,
        row_of_place: Tensor,
        in_weight: Tensor,
        in_bias: Tensor,
        blocks: tuple[tuple[int, int], ...],
        heads: int,
    ) -> Tensor:
        channels = x.shape[1]
        width = channels // heads
        scaled = _scale_of_queries(channels, heads, in_bias)
        query_key = x + position.index_select(0, row_of_place)
        qk = F.linear(query_key, in_weight[: 2 * channels] * scaled[:, None], in_bias[: 2 * channels] * scaled)
        del query_key
        v = F.linear(x, in_weight[2 * channels :], in_bias[2 * channels :])
        out = torch.empty_like(v)
        qkv = v.new_empty(3 * v.numel())
        for rows, sets, length in _rows_of_blocks(blocks):
            block = _of_block(qkv, rows, sets, heads, length, width)
            block[:2].copy_(qk[rows].view(sets, length, 2, heads, width).permute(2, 0, 3, 1, 4))
            block[2].copy_(v[rows].view(sets, length, heads, width).transpose(1, 2))
            query, key, values = block.flatten(1, 2)
            mixed = torch.bmm(_shares(query, key), values).view(sets, heads, length, width)
            out[rows].view(sets, length, heads, width).copy_(mixed.transpose(1, 2))
        ctx.save_for_backward(x, position, row_of_place, in_weight, in_bias, qkv)
        ctx.blocks, ctx.heads = blocks, heads
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, Tensor, Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = grads
        x, position, row_of_place, in_weight, in_bias, qkv = ctx.saved_tensors
        heads, channels = ctx.heads, grad.shape[1]
        width = channels // heads
        grad_qk, grad_v = grad.new_empty(len(grad), 2 * channels), torch.empty_like(grad)
        for rows, sets, length in _rows_of_blocks(ctx.blocks):
            query, key, values = _of_block(qkv, rows, sets, heads, length, width).flatten(1, 2)
            share = _shares(query, key)  # computing them again costs little, keeping them as much as keys and values
            wanted = grad[rows].view(sets, length, heads, width).transpose(1, 2).reshape(sets * heads, length, width)
            grad_values = torch.bmm(share.mT, wanted)
            grad_share = torch.bmm(wanted, values.mT)
            grad_scores = torch.ops.aten._softmax_backward_data(
                _at_least_float32(grad_share), _at_least_float32(share), -1, _at_least_float32(share).dtype
            ).to(share.dtype)
            places = grad_qk[rows].view(sets, length, 2, heads, width)
            for part, product in enumerate((torch.bmm(grad_scores, key), torch.bmm(grad_scores.mT, query))):
                places[:, :, part].copy_(product.view(sets, heads, length, width).transpose(1, 2))
            grad_v[rows].view(sets, length, heads, width).copy_(grad_values.view(sets, heads, length, width).transpose(1, 2))
        scaled = _scale_of_queries(channels, heads, in_bias)
        weight = in_weight.to(grad.dtype)
        grad_weight, grad_bias = torch.empty_like(weight), torch.cat([grad_qk.sum(0) * scaled, grad_v.sum(0)])
        query_key = (x + position.index_select(0, row_of_place)).to(grad.dtype)
        torch.mm(grad_qk.T, query_key, out=grad_weight[: 2 * channels])
        grad_weight[: 2 * channels] *= scaled[:, None].to(grad.dtype)
        torch.mm(grad_v.T, x.to(grad.dtype), out=grad_weight[2 * channels :])
        del query_key
        grad_x = grad_qk @ (weight[: 2 * channels] * scaled[:, None].to(grad.dtype))
        grad_position = segment_sum(grad_x, row_of_place, len(position)).to(position.dtype)
        grad_x.addmm_(grad_v, weight[2 * channels :])
        grad_weight, grad_bias = grad_weight.to(in_weight.dtype), grad_bias.to(in_bias.dtype)
        return grad_x.to(x.dtype), grad_position, None, grad_weight, grad_bias, None, None


def _scale_of_queries(channels: int, heads: int, like: Tensor) -> Tensor:
    """(2 C,) factors of the projections to queries and keys: what scales the scores is part of the queries."""
    scaled = like.new_ones(2 * channels)
    scaled[:channels] = (channels // heads) ** -0.5
    return scaled


def _rows_of_blocks(blocks: tuple[tuple[int, int], ...]) -> Iterator[tuple[slice, int, int]]:
    """Rows, number of sets and their length, block after block."""
    start = 0
    for sets, length in blocks:
        yield slice(start, start + sets * length), sets, length
        start += sets * length


def _of_block(qkv: Tensor, rows: slice, sets: int, heads: int, length: int, width: int) -> Tensor:
    """Queries, keys and values of a block, (3, sets, heads, length, width), in the memory of all blocks."""
    each = 3 * heads * width
    return qkv[each * rows.start : each * rows.stop].view(3, sets, heads, length, width)


def _shares(query: Tensor, key: Tensor) -> Tensor:
    """(B, L, L) attention of scaled queries (B, L, w) over keys (B, L, w)."""
    return torch.softmax(_at_least_float32(torch.bmm(query, key.mT)), -1).to(query.dtype)


def pooling_attention(
    feats: Tensor,
    cell: Tensor,
    slot: Tensor,
    num_cells: int,
    slot_embedding: Tensor,
    weights: AttentionWeights,
    *,
    empty_slots_take_part: bool,
    padded: bool = False,
) -> tuple[Tensor, Tensor]:
    """Pools the voxels of each cell: the maximum of its slots asks, and all its slots answer.

    Keys are slot features plus the slot's embedding, values are slot features. In the published form an empty slot takes
    part as a voxel of zeros, in the maximum (which is then never negative) and in the attention.

    Args:
        feats: (N, C).
        cell: (N,) int64, pooled cell of a voxel.
        slot: (N,) int64 in [0, P), its slot there; no two voxels share cell and slot.
        num_cells: number of pooled cells M; none is empty.
        slot_embedding: (P, C).
        weights: projections and number of heads.
        empty_slots_take_part: True = as published.
        padded: compute on a table of all slots, as published, instead of on the voxels only; the same numbers.

    Returns:
        query (M, C) and attended (M, C).
    """
    pool = _pool_by_table if padded else _pool_by_voxel
    return pool(feats, cell, slot, num_cells, slot_embedding, weights, empty_slots_take_part)


def _pool_by_table(
    feats: Tensor, cell: Tensor, slot: Tensor, num_cells: int, slot_embedding: Tensor, weights: AttentionWeights, holes: bool
) -> tuple[Tensor, Tensor]:
    slots, channels = slot_embedding.shape
    heads, width = weights.heads, channels // weights.heads
    place = cell * slots + slot
    table = feats.new_zeros(num_cells * slots, channels).index_copy(0, place, feats).view(num_cells, slots, channels)
    empty = torch.ones(num_cells * slots, dtype=torch.bool, device=feats.device).index_fill_(0, place, False)
    empty = empty.view(num_cells, slots, 1)
    query = (table if holes else table.masked_fill(empty, float("-inf"))).amax(1)
    q_weight, k_weight, v_weight = weights.in_weight.chunk(3)
    q_bias, k_bias, v_bias = weights.in_bias.chunk(3)
    asked = F.linear(query, q_weight, q_bias).view(num_cells, 1, heads, width)
    keys = F.linear(table + slot_embedding, k_weight, k_bias).view(num_cells, slots, heads, width)
    values = F.linear(table, v_weight, v_bias).view(num_cells, slots, heads, width)
    scores = _at_least_float32((asked * width**-0.5 * keys).sum(-1))
    if not holes:
        scores = scores.masked_fill(empty, float("-inf"))
    mixed = (scores.softmax(1).to(values.dtype)[..., None] * values).sum(1)
    return query, F.linear(mixed.view(num_cells, channels), weights.out_weight, weights.out_bias)


def _pool_by_voxel(
    feats: Tensor, cell: Tensor, slot: Tensor, num_cells: int, slot_embedding: Tensor, weights: AttentionWeights, holes: bool
) -> tuple[Tensor, Tensor]:
    slots, channels = slot_embedding.shape
    heads, width = weights.heads, channels // weights.heads
    place = cell * slots + slot
    query = segment_max(feats, cell, num_cells)
    if holes:
        has_hole = segment_count(cell, num_cells) < slots
        query = torch.where(has_hole[:, None], query.clamp(min=0), query)
    q_weight, k_weight, v_weight = weights.in_weight.chunk(3)
    q_bias, k_bias, v_bias = weights.in_bias.chunk(3)
    asked = F.linear(query, q_weight, q_bias) * width**-0.5
    keys = F.linear(feats + gather_rows(slot_embedding, slot).to(feats.dtype), k_weight, k_bias)
    scores = _at_least_float32((gather_rows(asked, cell) * keys).view(-1, heads, width).sum(-1))
    # An empty slot is a voxel of zeros: its key is its projected embedding, the same in every cell, and its value the bias.
    if holes:
        empty_keys = F.linear(slot_embedding, k_weight, k_bias).view(slots, heads, width)
        table = torch.einsum("mhw,phw->mph", asked.view(num_cells, heads, width), empty_keys.to(asked.dtype))
        table = _at_least_float32(table).reshape(num_cells * slots, heads)
    else:
        table = scores.new_full((num_cells * slots, heads), float("-inf"))
    share = table.index_copy(0, place, scores).view(num_cells, slots, heads).softmax(1).view(num_cells * slots, heads)
    values = F.linear(feats, v_weight)  # shares add up to one, so the bias is added once, whatever slots are empty
    weighted = select_unique_rows(share, place).to(values.dtype)[..., None] * values.view(-1, heads, width)
    mixed = segment_sum(weighted.reshape(-1, channels), cell, num_cells) + v_bias
    return query, F.linear(mixed, weights.out_weight, weights.out_bias)


def _at_least_float32(scores: Tensor) -> Tensor:
    """Softmax is not taken in half precision."""
    return scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
