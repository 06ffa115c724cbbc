"""The DSVT encoder: transformer blocks on sets of voxels, attention pooling between stages.

Use::

    config = DsvtConfig(channels=64, ffn_channels=128, heads=4, blocks=(1, 1), set_sizes=(36, 36),
                        windows=((8, 8, 8), (8, 8, 1)), shifts=((0, 0, 0), (4, 4, 0)), strides=((1, 1, 8),))
    encoder = Dsvt(config, grid_shape=(128, 128, 8))       # checks grid, windows and strides together
    result = encoder(voxels)                               # voxels: SparseVoxels, feats (M, 64), shape (128, 128, 8)
    result.stages[0]                                       # SparseVoxels: the M input cells, features after stage 0
    result.output                                          # SparseVoxels: the pooled cells, features after the last stage
    result.output.feats[result.token_of_voxel]             # (M, 64): each input voxel's final token
    config.attention                                       # "bucketed" (fast) or "padded" (as published): same numbers

Published sizes: `dsvt_config.waymo_voxel_192()` and its neighbours. State-dict keys are those of the reference below
``backbone_3d.``. Source: "DSVT: Dynamic Sparse Voxel Transformer with Rotated Sets", CVPR 2023.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from picture3d.errors import ConfigError
from picture3d.models.dsvt_config import DsvtConfig, Triple
from picture3d.models.row_norm import RowBatchNorm, fold_row_norm
from picture3d.ops.attention import AttentionWeights, PositionRows, pooling_attention, set_attention
from picture3d.ops.feed_forward import FeedForwardWeights, feed_forward, feed_forward_plain
from picture3d.ops.scatter import exchange_rows, gather_rows, select_unique_rows
from picture3d.ops.sets import (
    PaddedSets,
    PlacedRuns,
    SetLayout,
    SetRuns,
    WindowPlaces,
    Windows,
    full_sets,
    padded_sets,
    set_partition,
    set_runs,
    window_partitions,
    window_places,
)
from picture3d.structures.voxels import SparseVoxels, voxel_keys

__all__ = ["AttentionPooling", "Dsvt", "DsvtConfig", "DsvtOutput"]


@dataclass(frozen=True, slots=True, eq=False)
class DsvtOutput:
    """What every stage made of the voxels."""

    stages: tuple[SparseVoxels, ...]  # after the last block of each stage, before pooling
    token_of_voxel: Tensor  # (M,) int64: row of `output` into which each input voxel was pooled

    @property
    def output(self) -> SparseVoxels:
        """The last stage's voxels."""
        return self.stages[-1]

    @property
    def joined(self) -> Tensor:
        """(M, 2 C): the final token of each input voxel's pillar, then the voxel's own feature after the first stage."""
        pillar = gather_rows(self.output.feats, self.token_of_voxel)
        return torch.cat([pillar, self.stages[0].feats], dim=1)


class Dsvt(nn.Module):
    """The encoder for one grid.

    Args:
        config: all sizes.
        grid_shape: cells of the input grid along x, y, z.

    Raises:
        ConfigError: if grid, windows and strides do not fit each other; the message names values that would.
    """

    def __init__(self, config: DsvtConfig, grid_shape: Triple) -> None:
        super().__init__()
        self.config = config
        self.stage_shapes = config.stage_shapes(grid_shape)
        self.input_layer = _InputLayer(config, self.stage_shapes)
        for stage, blocks in enumerate(config.blocks):
            self.add_module(f"stage_{stage}", nn.ModuleList([_Block(config) for _ in range(blocks)]))
            norms = nn.ModuleList([nn.LayerNorm(config.channels) for _ in range(blocks)])
            self.add_module(f"residual_norm_stage_{stage}", norms)
        for stage, stride in enumerate(config.strides):
            pooling = AttentionPooling(
                config.channels,
                config.heads,
                stride,
                empty_slots_take_part=config.pooling_quirk,
                padded=config.attention == "padded",
            )
            self.add_module(f"stage_{stage}_reduction", pooling)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, voxels: SparseVoxels) -> DsvtOutput:
        """Encodes M voxels of width `config.channels`; M may be 0, and samples may be empty.

        Raises:
            ConfigError: if the voxels are on another grid than the encoder was made for.
        """
        if voxels.shape != self.stage_shapes[0]:
            raise ConfigError(
                f"dsvt: made for a grid of {self.stage_shapes[0]} cells, these voxels are on {voxels.shape}. Give both the "
                "same grid."
            )
        stages: list[SparseVoxels] = []
        token_of_voxel = torch.arange(len(voxels), device=voxels.coords.device)
        blocks_before = 0
        for stage, blocks in enumerate(self.config.blocks):
            if stage > 0:
                voxels, pooled_row = self.get_submodule(f"stage_{stage - 1}_reduction")(voxels)
                token_of_voxel = pooled_row[token_of_voxel]
            voxels = voxels.with_feats(self._run_stage(stage, blocks_before, voxels))
            stages.append(voxels)
            blocks_before += blocks
        return DsvtOutput(tuple(stages), token_of_voxel)

    def features_at(self, voxels: SparseVoxels, rows: Tensor) -> Tensor:
        """(W, C) features after the last block of the voxels at (W,) different `rows`; for an encoder of one stage.

        All voxels are attended to. What comes after attention in the last layer is computed for these rows only.
        """
        assert self.config.num_stages == 1  # with more, rows of the output are pooled cells
        if self.config.attention == "padded":
            return select_unique_rows(self._run_stage(0, 0, voxels), rows)
        return self._run_stage(0, 0, voxels, rows)

    def stage_windows(self, stage: int, coords: Tensor) -> tuple[Windows, Windows]:
        """The windows of both shifts of a stage for (M, 4) coordinates on its grid."""
        return _both_windows(self.config, self.stage_shapes[stage], stage, coords)

    def _run_stage(self, stage: int, blocks_before: int, voxels: SparseVoxels, wanted: Tensor | None = None) -> Tensor:
        """The features after the blocks of a stage, of all voxels or of those at (W,) `wanted` rows."""
        config, x = self.config, voxels.feats
        windows = self.stage_windows(stage, voxels.coords)
        block_ids = range(blocks_before, blocks_before + config.blocks[stage])
        sets = {
            shift: make_set_layout(windows[shift], config.set_sizes[stage], config.attention)
            for shift in sorted({block_id % 2 for block_id in block_ids})
        }
        # Voxels at one position of their windows share its embedding; finding out how many differ needs the host.
        in_runs = any(isinstance(layout, SetRuns) for layout in sets.values())
        places = {source: window_places(windows[source]) for source in (0, 1)} if in_runs else {}
        blocks = cast(nn.ModuleList, self.get_submodule(f"stage_{stage}"))
        norms = cast(nn.ModuleList, self.get_submodule(f"residual_norm_stage_{stage}"))
        for number, (block_id, block, norm) in enumerate(zip(block_ids, blocks, norms, strict=True)):
            shift = block_id % 2
            # Two embeddings per block, one for each layer. The reference takes them in the windows of shift 0 and 1
            # although both layers use the windows of `shift`; trained weights depend on it.
            sources = (0, 1) if config.posembed_quirk else (shift, shift)
            positions = [
                self.input_layer(stage, number, layer, windows[source], places.get(source))
                for layer, source in enumerate(sources)
            ]
            rows = wanted if block_id == block_ids[-1] else None
            if config.activation_checkpointing and self.training:
                update = cast(Tensor, checkpoint(block, x, positions, sets[shift], rows, use_reentrant=False))
            else:
                update = block(x, positions, sets[shift], rows)
            x = norm(update + (x if rows is None else select_unique_rows(x, rows)))
        return x


def make_set_layout(windows: Windows, set_size: int, attention: str) -> SetLayout:
    """The sets of windows in the layout of the chosen form of attention, "padded" or "bucketed"."""
    if attention == "padded":
        return padded_sets(windows, set_size)
    partition = set_partition(windows, set_size)
    # On a GPU full sets spare reading the lengths back; on a CPU every spare slot costs.
    return full_sets(partition) if windows.window.is_cuda else set_runs(partition)


def _both_windows(config: DsvtConfig, shape: Triple, stage: int, coords: Tensor) -> tuple[Windows, Windows]:
    x, y, z = config.windows[stage]
    fx, fy, fz = config.hybrid_factor
    first, second = window_partitions(
        coords, shape, [((x, y, z), config.shifts[0]), ((x * fx, y * fy, z * fz), config.shifts[1])]
    )
    return first, second


class _InputLayer(nn.Module):
    """The position embeddings of all stages, blocks and shifts."""

    def __init__(self, config: DsvtConfig, shapes: tuple[Triple, ...]) -> None:
        super().__init__()
        self.posembed_layers = nn.ModuleList(
            nn.ModuleList(
                nn.ModuleList(_PositionEmbedding(2 if shape[2] == 1 else 3, config.channels) for _ in range(2))
                for _ in range(blocks)
            )
            for blocks, shape in zip(config.blocks, shapes, strict=True)
        )

    def forward(self, stage: int, block: int, layer: int, windows: Windows, places: WindowPlaces | None) -> PositionRows:
        layers = cast(nn.ModuleList, cast(nn.ModuleList, self.posembed_layers[stage])[block])
        return layers[layer](windows, places)


class _PositionEmbedding(nn.Module):
    def __init__(self, columns: int, channels: int) -> None:
        super().__init__()
        self.columns = columns
        self.position_embedding_head = nn.Sequential(
            nn.Linear(columns, channels), RowBatchNorm(channels), nn.ReLU(), nn.Linear(channels, channels)
        )

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def forward(self, windows: Windows, places: WindowPlaces | None) -> PositionRows:
        """Embeds every voxel, or every place that occurs."""
        half = torch.tensor(windows.size[: self.columns], dtype=self.dtype, device=windows.position.device) / 2
        if places is None:
            return PositionRows(self.position_embedding_head(windows.position[:, : self.columns].to(self.dtype) - half), None)
        position = places.position[:, : self.columns].to(self.dtype) - half
        linear, norm, relu, last = self.position_embedding_head
        weight, bias = fold_row_norm(cast(nn.Linear, linear), cast(RowBatchNorm, norm), position, places.count)
        return PositionRows(last(relu(F.linear(position, weight, bias))), places.place_of_voxel)


class _Block(nn.Module):
    """Two encoder layers: the first on the y-first sets, the second on the x-first sets of the same windows."""

    def __init__(self, config: DsvtConfig) -> None:
        super().__init__()
        self.encoder_list = nn.ModuleList([_EncoderLayer(config) for _ in range(2)])

    def forward(self, x: Tensor, positions: list[PositionRows], sets: SetLayout, wanted: Tensor | None = None) -> Tensor:
        """(N, C) to (N, C), or to (W, C) for the wanted rows alone."""
        first, second = self.encoder_list
        if not isinstance(sets, SetRuns):
            return second(first(x, positions[0], sets, 0), positions[1], sets, 1, wanted)
        # Each layer runs in the order of its sets, so the voxels move once per layer, and not queries, keys and values.
        there, back = sets.voxel_of_place, sets.place_of_voxel
        x = exchange_rows(x, there[0], back[0])
        x = first(x, positions[0].in_order(there[0]), sets.placed, 0)
        x = exchange_rows(x, back[0].index_select(0, there[1]), back[1].index_select(0, there[0]))
        if wanted is not None:
            return second(x, positions[1].in_order(there[1]), sets.placed, 1, back[1].index_select(0, wanted))
        return exchange_rows(second(x, positions[1].in_order(there[1]), sets.placed, 1), back[1], there[1])


class _EncoderLayer(nn.Module):
    def __init__(self, config: DsvtConfig) -> None:
        super().__init__()
        self.win_attn = _AttentionAndFeedForward(config)
        self.norm = nn.LayerNorm(config.channels)

    def forward(
        self, x: Tensor, position: PositionRows, sets: SetLayout | PlacedRuns, axis: int, wanted: Tensor | None = None
    ) -> Tensor:
        attention = self.win_attn
        attended = set_attention(x, position, sets, axis, attention.self_attn.weights(), wanted)
        x = x if wanted is None else select_unique_rows(x, wanted)
        weights = FeedForwardWeights(
            norm1=(attention.norm1.weight, attention.norm1.bias),
            linear1=(attention.linear1.weight, attention.linear1.bias),
            linear2=(attention.linear2.weight, attention.linear2.bias),
            norm2=(attention.norm2.weight, attention.norm2.bias),
            norm3=(self.norm.weight, self.norm.bias),
            eps=self.norm.eps,
        )
        return (feed_forward_plain if isinstance(sets, PaddedSets) else feed_forward)(x, attended, weights)


class _AttentionAndFeedForward(nn.Module):
    """Holds the parameters of an encoder layer but its last norm, under the keys of the reference."""

    def __init__(self, config: DsvtConfig) -> None:
        super().__init__()
        self.self_attn = _AttentionParameters(config.channels, config.heads)
        self.linear1 = nn.Linear(config.channels, config.ffn_channels)
        self.linear2 = nn.Linear(config.ffn_channels, config.channels)
        self.norm1 = nn.LayerNorm(config.channels)
        self.norm2 = nn.LayerNorm(config.channels)


class _AttentionParameters(nn.Module):
    """Holds what `nn.MultiheadAttention` holds, under its keys."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * channels, channels))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * channels))
        self.out_proj = nn.Linear(channels, channels)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def weights(self) -> AttentionWeights:
        return AttentionWeights(self.in_proj_weight, self.in_proj_bias, self.out_proj.weight, self.out_proj.bias, self.heads)


class AttentionPooling(nn.Module):
    """Pools neighbouring voxels into one by attention over the slots of the pooled cell.

    Args:
        channels: width.
        heads: heads of the attention.
        stride: cells that become one, along x, y, z.
        empty_slots_take_part: as published; False leaves empty slots out.
        padded: compute on all slots, as published; the same numbers.
    """

    def __init__(
        self, channels: int, heads: int, stride: Triple, *, empty_slots_take_part: bool = True, padded: bool = False
    ) -> None:
        super().__init__()
        self.stride, self.empty_slots_take_part, self.padded = stride, empty_slots_take_part, padded
        self.pos_embedding = nn.Parameter(torch.empty(stride[0] * stride[1] * stride[2], channels))
        nn.init.xavier_uniform_(self.pos_embedding)
        self.norm = nn.LayerNorm(channels)
        self.self_attn = _AttentionParameters(channels, heads)

    def forward(self, voxels: SparseVoxels) -> tuple[SparseVoxels, Tensor]:
        """Pooled voxels, and for each input voxel the row into which it went, (M,) int64."""
        coords, shape, cell, slot = pool_coords(voxels, self.stride)
        query, attended = pooling_attention(
            voxels.feats,
            cell,
            slot,
            coords.shape[0],
            self.pos_embedding,
            self.self_attn.weights(),
            empty_slots_take_part=self.empty_slots_take_part,
            padded=self.padded,
        )
        return SparseVoxels(coords, self.norm(attended + query), shape, voxels.batch_size), cell


def pool_coords(voxels: SparseVoxels, stride: Triple) -> tuple[Tensor, Triple, Tensor, Tensor]:
    """Where voxels go when `stride` cells become one.

    Returns:
        coordinates (K, 4) int32 of the pooled cells, sorted by key; the pooled grid's shape; for each voxel its pooled row
        (M,) int64 and its slot there (M,) int64, ``((x mod sx) * sy + y mod sy) * sz + z mod sz``.
    """
    step = torch.tensor(stride, device=voxels.coords.device)
    cells = voxels.coords[:, 1:].to(torch.int64)
    pooled, rest = cells // step, cells % step
    slot = (rest[:, 0] * stride[1] + rest[:, 1]) * stride[2] + rest[:, 2]
    x_cells, y_cells, z_cells = (-(-along // by) for along, by in zip(voxels.shape, stride, strict=True))
    shape = (x_cells, y_cells, z_cells)
    keys, row = torch.unique(voxel_keys(torch.cat([voxels.coords[:, :1].long(), pooled], 1), shape), return_inverse=True)
    column, z = keys // z_cells, keys % z_cells
    plane, y = column // y_cells, column % y_cells
    coords = torch.stack([plane // x_cells, plane % x_cells, y, z], 1).to(torch.int32)
    return coords, shape, row, slot
