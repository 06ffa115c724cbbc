"""The decoder layer of TransFusion: proposals attend to the cells around them.

State-dict keys are those below ``dense_head.decoder.`` of OpenPCDet checkpoints. Two twins give the same numbers:
`published_decoder` copies the neighbourhood of every proposal at full width (344 MB at 200 proposals, 41 x 41 cells, width 256)
and is kept for reading and testing; :meth:`LocalDecoder.forward` embeds positions once per cell of the map and never
projects a cell (see `ops.local_attention`).

Each proposal is its own sequence of length 1, so self-attention is its value projection. Position embeddings are added to keys
and to values, as published. Source: "TransFusion", Bai et al., CVPR 2022, section 3.2; neighbourhoods as in DSVT.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from picture3d.models.row_norm import SequenceBatchNorm, shared_batch_norm
from picture3d.ops.local_attention import local_attention
from picture3d.ops.processes import group_of_step


class PositionEmbedding(nn.Module):
    """Two layers from x, y in cells to `channels`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.position_embedding_head = nn.Sequential(
            nn.Conv1d(2, channels, 1), SequenceBatchNorm(channels), nn.ReLU(), nn.Conv1d(channels, channels, 1)
        )

    def forward(self, positions: Tensor, counts: Tensor | None = None) -> Tensor:
        """(N, 2) to (N, channels).

        Args:
            positions: x and y in cells.
            counts: (N,) how often each position stands in the batch that the norm takes its statistics from, in training.
        """
        first, norm, _, last = self.position_embedding_head
        assert isinstance(first, nn.Conv1d)
        assert isinstance(norm, nn.BatchNorm1d)
        assert isinstance(last, nn.Conv1d)
        weight, bias = first.weight[:, :, 0], first.bias
        if not norm.training and norm.running_mean is not None and norm.running_var is not None:
            # Fixed statistics: the norm goes into the layer, a pass over every cell less.
            scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
            assert bias is not None
            hidden = F.linear(positions, weight * scale[:, None], (bias - norm.running_mean) * scale + norm.bias)
        else:
            hidden = F.linear(positions, weight, bias)
            group = group_of_step() if norm.training else None
            if group is not None:
                hidden = shared_batch_norm(norm, hidden, group, counts)
            else:
                hidden = norm(hidden) if counts is None else _counted_norm(norm, hidden, counts)
        return F.linear(F.relu(hidden, inplace=True), last.weight[:, :, 0], last.bias)


def _counted_norm(norm: nn.BatchNorm1d, hidden: Tensor, counts: Tensor) -> Tensor:
    """Batch normalisation of rows that each stand for `counts` equal ones; running statistics move as they would there."""
    kept, hidden = hidden.dtype, hidden if hidden.dtype == torch.float64 else hidden.float()  # half counts badly
    counts = counts.to(hidden.dtype)
    total = counts.sum()
    share = (counts / total)[:, None]
    mean = (share * hidden).sum(0)
    variance = (share * (hidden - mean).square()).sum(0)
    if norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None:
        with torch.no_grad():
            momentum = 0.1 if norm.momentum is None else norm.momentum
            norm.running_mean.lerp_(mean.detach().to(norm.running_mean.dtype), momentum)
            unbiased = variance.detach() * (total / (total - 1).clamp(min=1))
            norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), momentum)
            norm.num_batches_tracked += 1
    return ((hidden - mean) * torch.rsqrt(variance + norm.eps) * norm.weight + norm.bias).to(kept)


class LocalDecoder(nn.Module):
    """One post-norm decoder layer.

    Args:
        channels: width D.
        heads: of attention.
        ffn_channels: hidden width of the feed-forward part.
        radius: cells in each direction that a proposal attends to.
        wrap: as published: neighbours beyond the map along y are cells of the adjacent x row, with their own positions;
            False leaves them out.
    """

    def __init__(self, channels: int, heads: int, ffn_channels: int, radius: int, wrap: bool = True) -> None:
        super().__init__()
        self.radius, self.wrap = radius, wrap
        self.self_attn = nn.MultiheadAttention(channels, heads)
        self.multihead_attn = nn.MultiheadAttention(channels, heads)
        self.linear1, self.linear2 = nn.Linear(channels, ffn_channels), nn.Linear(ffn_channels, channels)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))
        self.self_posembed, self.cross_posembed = PositionEmbedding(channels), PositionEmbedding(channels)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, cells: Tensor, query: Tensor, place: Tensor) -> Tensor:
        """New features of the proposals.

        Args:
            cells: (B, D, X, Y) map.
            query: (B, P, D) features of the proposals.
            place: (B, P) int64 flat cell (x * Y + y) of each.

        Returns:
            (B, P, D).
        """
        batch, channels, size_x, size_y = cells.shape
        index, masked = self.neighbours(place, size_x, size_y)
        counts = torch.bincount(index.flatten(), minlength=size_x * size_y) if self.training else None
        embedded = self.cross_posembed(cell_positions(size_x, size_y, cells), counts)
        # The embedding first: the sum takes its layout, row by row, and needs no copy to be gathered from.
        keys = (embedded.view(size_x, size_y, channels) + cells.permute(0, 2, 3, 1)).reshape(-1, channels)
        offset = torch.arange(batch, device=cells.device)[:, None, None] * (size_x * size_y)
        rows, masked = (index + offset).flatten(0, 1), masked.flatten(0, 1)

        at, position = self._after_self_attention(query, place, size_y)
        attention = self.multihead_attn
        heads, width = attention.num_heads, channels // attention.num_heads
        to_query, to_key, to_value = attention.in_proj_weight.view(3, heads, width, channels).unbind(0)
        query_bias, _, value_bias = attention.in_proj_bias.view(3, heads, width).unbind(0)
        projected = torch.einsum("qc,hdc->qhd", at + position, to_query) + query_bias
        folded = torch.einsum("qhd,hdc->qhc", projected * width**-0.5, to_key)
        met = local_attention(folded.to(keys.dtype), keys, rows, masked)
        value = torch.einsum("qhc,hdc->qhd", met, to_value) + value_bias
        return self._after_cross_attention(at, attention.out_proj(value.flatten(1))).view(query.shape)

    def neighbours(self, place: Tensor, size_x: int, size_y: int) -> tuple[Tensor, Tensor]:
        """(B, P, K) flat cells around each proposal, clamped into the map, and which of them take no part."""
        step = torch.arange(-self.radius, self.radius + 1, device=place.device)
        dx, dy = (offset.flatten() for offset in torch.meshgrid(step, step, indexing="ij"))
        index = place[..., None] + dx * size_y + dy
        masked = (index < 0) | (index >= size_x * size_y)
        if not self.wrap:
            y = (place % size_y)[..., None] + dy
            masked |= (y < 0) | (y >= size_y)
        return index.clamp(0, size_x * size_y - 1), masked

    def _after_self_attention(self, query: Tensor, place: Tensor, size_y: int) -> tuple[Tensor, Tensor]:
        """(B P, D) features after the first norm, and position embeddings; a sequence of one attends to itself only."""
        position = self.self_posembed(positions_of(place.flatten(), size_y, query))
        features, attention = query.flatten(0, 1), self.self_attn
        to_value, bias = attention.in_proj_weight.chunk(3)[2], attention.in_proj_bias.chunk(3)[2]
        return self.norm1(features + attention.out_proj(F.linear(features + position, to_value, bias))), position

    def _after_cross_attention(self, features: Tensor, met: Tensor) -> Tensor:
        features = self.norm2(features + met)
        return self.norm3(features + self.linear2(F.relu(self.linear1(features))))


def published_decoder(decoder: LocalDecoder, cells: Tensor, query: Tensor, place: Tensor) -> Tensor:
    """What `decoder` computes, as published: with every key in memory. Arguments as :meth:`LocalDecoder.forward`."""
    batch, channels, size_x, size_y = cells.shape
    proposals = place.shape[1]
    index, masked = decoder.neighbours(place, size_x, size_y)
    flat = cells.flatten(2).transpose(1, 2)  # (B, X Y, D)
    keys = torch.stack([flat[sample][index[sample]] for sample in range(batch)]).flatten(0, 1)  # (B P, K, D)
    key_position = positions_of(index.flatten(), size_y, cells)
    keys = (keys + decoder.cross_posembed(key_position).view(batch * proposals, -1, channels)).transpose(0, 1)
    position = decoder.self_posembed(positions_of(place.flatten(), size_y, query))[None]
    at = query.reshape(1, batch * proposals, channels)
    own = at + position
    at = decoder.norm1(at + decoder.self_attn(own, own, own)[0])
    met = decoder.multihead_attn(at + position, keys, keys, key_padding_mask=masked.flatten(0, 1))[0]
    return decoder._after_cross_attention(at, met).view(query.shape)


def positions_of(place: Tensor, size_y: int, like: Tensor) -> Tensor:
    """(N, 2) x and y, in cells, of the centres of flat cells."""
    x = torch.div(place, size_y, rounding_mode="floor")
    return (torch.stack([x, place % size_y], 1) + 0.5).to(like.dtype)


def cell_positions(size_x: int, size_y: int, like: Tensor) -> Tensor:
    """(X Y, 2) positions of all cells, in flat order."""
    return positions_of(torch.arange(size_x * size_y, device=like.device), size_y, like)
