"""Voxel grids and sparse voxels. Coordinates are int32 columns (batch, x, y, z); rows are unique and sorted by that key."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from picture3d.errors import ConfigError


@dataclass(frozen=True, slots=True)
class VoxelGrid:
    """A regular grid over a box of space. Cell (0, 0, 0) starts at `range_min`."""

    range_min: tuple[float, float, float]  # metres, x y z
    range_max: tuple[float, float, float]  # metres, x y z
    voxel_size: tuple[float, float, float]  # metres, x y z

    def __post_init__(self) -> None:
        for axis, low, high, size in zip("xyz", self.range_min, self.range_max, self.voxel_size, strict=True):
            cells = (high - low) / size if size > 0 else float("nan")
            if not cells >= 0.5:
                raise ConfigError(
                    f"grid: {axis} from {low} to {high} m in cells of {size} m holds no cell. Make the cells smaller, or the "
                    "range longer."
                )
            if abs(cells - round(cells)) > 1e-3:
                fits = low + round(cells) * size
                raise ConfigError(
                    f"grid: {axis} from {low} to {high} m is {cells:.3f} cells of {size} m, not a whole number. Set "
                    f"range_max {axis} = {fits:g} for {round(cells)} cells."
                )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of cells along x, y, z."""
        x, y, z = (
            round((high - low) / size) for low, high, size in zip(self.range_min, self.range_max, self.voxel_size, strict=True)
        )
        return x, y, z


@dataclass(frozen=True, slots=True, eq=False)
class SparseVoxels:
    """Occupied cells of a batch of grids, with one feature row each."""

    coords: Tensor  # (M, 4) int32: batch, x, y, z — cell indices, not metres; unique, sorted by that key
    feats: Tensor  # (M, C) float
    shape: tuple[int, int, int]  # cells along x, y, z
    batch_size: int

    def __len__(self) -> int:
        return self.coords.shape[0]

    def select(self, rows: Tensor) -> SparseVoxels:
        """The voxels chosen by a boolean mask (M,); the order is kept."""
        return SparseVoxels(self.coords[rows], self.feats[rows], self.shape, self.batch_size)

    def with_feats(self, feats: Tensor) -> SparseVoxels:
        """The same cells with other features."""
        return SparseVoxels(self.coords, feats, self.shape, self.batch_size)


def voxel_keys(coords: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """(M,) int64 keys ``((batch * X + x) * Y + y) * Z + z`` of (M, 4) coordinates inside a grid of `shape` cells."""
    x_cells, y_cells, z_cells = shape
    b, x, y, z = coords.to(torch.int64).unbind(1)
    return ((b * x_cells + x) * y_cells + y) * z_cells + z
