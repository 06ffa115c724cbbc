"""GPICTURE's hierarchical reconstruction: every encoder layer has to reconstruct, shallow ones points, deep ones features.

Layer l counts with alpha_l * points + (1 - alpha_l) * beta * features. The deepest layer is reconstructed by the decoder, as in
PICTURE; every other layer has a reader of its own that is cheap enough to run beside it: each hidden voxel is given the means
of the layer's visible tokens around it, in three sizes of neighbourhood, and where in these it lies.

Source: "Mutual Information-Driven Self-supervised Point Cloud Pre-training" (GPICTURE), Knowledge-Based Systems, 2025. What
differs, and why: `docs/paper_to_code.md`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from picture3d.config import FrozenConfig
from picture3d.errors import ConfigError
from picture3d.models.dsvt_config import Triple
from picture3d.ops.scatter import gather_rows, segment_mean
from picture3d.pretrain.predictors import Predictors
from picture3d.structures.voxels import voxel_keys

PUBLISHED_ALPHA = (0.97, 0.88, 0.78, 0.64, 0.55, 0.44, 0.36, 0.31)


class HierarchyConfig(FrozenConfig):
    """Whether and how every layer of the encoder has to reconstruct."""

    enabled: bool = Field(default=False, description="a reconstruction for every layer of the encoder, not the last one only")
    alpha: tuple[float, ...] = Field(
        default=(),
        description="share of the points in the loss of each layer, from the first to the last; the rest is the features'. "
        "Empty: the published eight values, interpolated by relative depth for encoders with another number of layers. "
        "`picture3d compare` computes such values from your own checkpoints",
    )
    voxels: int = Field(
        default=4096,
        ge=1,
        description="hidden voxels per batch on which the layers before the last are held to account: evenly spread ones if "
        "there are more",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if any(not 0 <= value <= 1 for value in self.alpha):
            raise ValueError(f"hierarchy.alpha are shares between 0 and 1, got {list(self.alpha)}")
        return self

    def alpha_of_layers(self, layers: int) -> tuple[float, ...]:
        """The share of the points for each of so many layers.

        Raises:
            ConfigError: if alpha is given for another number of layers.
        """
        if self.alpha:
            if len(self.alpha) != layers:
                raise ConfigError(f"hierarchy.alpha has {len(self.alpha)} values, the encoder {layers} layers: give {layers}")
            return self.alpha
        return interpolated_alpha(layers)


def interpolated_alpha(layers: int) -> tuple[float, ...]:
    """The published values at the same relative depth: first and last layer keep theirs, in between it is linear."""
    last = len(PUBLISHED_ALPHA) - 1
    result = []
    for layer in range(layers):
        place = last * layer / (layers - 1) if layers > 1 else last
        below = min(int(place), last - 1)
        share = place - below
        result.append((1 - share) * PUBLISHED_ALPHA[below] + share * PUBLISHED_ALPHA[below + 1])
    return tuple(result)


@dataclass(frozen=True, slots=True, eq=False)
class Neighbourhoods:
    """Which visible voxels lie around which hidden one, in S sizes of neighbourhood. K visible voxels, V hidden ones."""

    cell_of_visible: tuple[Tensor, ...]  # S times (K,) int64
    cell_of_hidden: tuple[Tensor, ...]  # S times (V,) int64; a cell may hold no visible voxel: its mean is 0
    num_cells: tuple[int, ...]
    position: Tensor  # (V, 3 S) float32: place of the hidden voxel in its cells, -1..1 along each axis


def neighbourhoods(visible: Tensor, hidden: Tensor, shape: Triple, sizes: tuple[Triple, ...]) -> Neighbourhoods:
    """Cells of `sizes` voxels over the grid, and who lies in them.

    Args:
        visible: (K, 4) int32 batch, x, y, z.
        hidden: (V, 4) int32.
        shape: cells of the voxel grid.
        sizes: voxels per neighbourhood along x, y, z.
    """
    both = torch.cat([visible, hidden]).long()
    of_visible, of_hidden, counts, positions = [], [], [], []
    for size in sizes:
        step = torch.tensor(size, device=both.device)
        x, y, z = (-(-along // by) for along, by in zip(shape, size, strict=True))
        cells = torch.cat([both[:, :1], both[:, 1:] // step], dim=1)
        unique, row = torch.unique(voxel_keys(cells, (x, y, z)), return_inverse=True)
        of_visible.append(row[: len(visible)])
        of_hidden.append(row[len(visible) :])
        counts.append(len(unique))
        positions.append((2 * (hidden[:, 1:].long() % step) + 1) / step - 1)
    return Neighbourhoods(tuple(of_visible), tuple(of_hidden), tuple(counts), torch.cat(positions, dim=1).float())


class LayerReader(nn.Module):
    """What one layer of the encoder says of hidden voxels: (K, C) visible tokens to (V, C)."""

    def __init__(self, channels: int, sizes: int) -> None:
        super().__init__()
        self.around = nn.ModuleList([nn.Linear(channels, channels) for _ in range(sizes)])
        self.position = nn.Sequential(nn.Linear(3 * sizes, channels), nn.GELU(), nn.Linear(channels, channels))

    def forward(self, tokens: Tensor, around: Neighbourhoods) -> Tensor:
        """(K, C) tokens of the visible voxels to (V, C) of the hidden ones."""
        read = self.position(around.position)
        for linear, visible, hidden, cells in zip(
            self.around, around.cell_of_visible, around.cell_of_hidden, around.num_cells, strict=True
        ):
            read = read + gather_rows(linear(segment_mean(tokens, visible, cells)), hidden)
        return F.gelu(read)


class Hierarchy(nn.Module):
    """Readers and predictors of all layers but the last. Thrown away after pre-training, as the decoder is.

    Args:
        config: which weights, on how many voxels.
        layers: L, layers of the encoder.
        channels: C, its width.
        grid_shape: cells of the voxel grid.
        window: the encoder's first window, voxels: the widest neighbourhood.
        num_points: P, points predicted per voxel.
        teacher_channels: D, length of the teacher's features; None for none.

    Raises:
        ConfigError: if alpha is given for another number of layers.
    """

    def __init__(
        self,
        config: HierarchyConfig,
        layers: int,
        channels: int,
        grid_shape: Triple,
        window: Triple,
        num_points: int,
        teacher_channels: int | None,
    ) -> None:
        super().__init__()
        self.config, self.grid_shape = config, grid_shape
        self.alpha = config.alpha_of_layers(layers)
        height = grid_shape[2]
        near, middle = (2, 2, min(2, height)), (max(2, window[0] // 3), max(2, window[1] // 3), height)
        self.sizes: tuple[Triple, ...] = (near, middle, (window[0], window[1], height))
        self.readers = nn.ModuleList([LayerReader(channels, len(self.sizes)) for _ in range(layers - 1)])
        self.predictors = nn.ModuleList([Predictors(channels, num_points, teacher_channels) for _ in range(layers - 1)])

    def chosen(self, hidden_voxels: int, device: torch.device) -> Tensor:
        """(V,) int64: which of the hidden voxels the layers answer for, at most `config.voxels`, evenly spread."""
        every = torch.arange(hidden_voxels, device=device)
        if hidden_voxels <= self.config.voxels:
            return every
        return every[: self.config.voxels] * hidden_voxels // self.config.voxels
