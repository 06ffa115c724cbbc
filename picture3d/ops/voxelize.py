"""Which cell of a regular grid each point falls into."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from picture3d.ops.cylinder import cylinder_cells
from picture3d.structures.cylinder import CylinderGrid
from picture3d.structures.voxels import VoxelGrid


@dataclass(frozen=True, slots=True, eq=False)
class VoxelAssignment:
    """The occupied cells of a batch of point clouds, and the cell of every point that lies inside the grid."""

    coords: Tensor  # (M, 4) int32: batch, x, y, z; unique, sorted by that key; z is 0 for pillars
    point_index: Tensor  # (K,) int64: rows of the points that lie inside the grid, ascending
    voxel_of_point: Tensor  # (K,) int64: row of `coords` for each of them

    @property
    def num_voxels(self) -> int:
        """Number of occupied cells, M."""
        return self.coords.shape[0]


def assign_voxels(
    xyz: Tensor, sample: Tensor, batch_size: int, grid: VoxelGrid, *, per_pillar: bool = False
) -> VoxelAssignment:
    """Sorts points into cells: ``floor((point - range_min) / voxel_size)``, in float32, as trained checkpoints saw it.

    Points outside the grid, and points with a coordinate that is not finite, are dropped.

    Args:
        xyz: (N, 3) metres, in the frame of `grid`.
        sample: (N,) int64, which frame of the batch a point belongs to.
        batch_size: number of frames.
        grid: range and cell size; in a cylinder grid x, y, z of `coords` are radius, angle, height.
        per_pillar: not for a cylinder grid: the grid is one cell high and the height of a point, even a point above the
            range, is not looked at.

    Source: point encoders of DSVT ("Dynamic Sparse Voxel Transformer", Wang et al., CVPR 2023).
    """
    x_cells, y_cells, z_cells = grid.shape
    if isinstance(grid, CylinderGrid):
        index, inside = cylinder_cells(xyz, grid)
    else:
        low = torch.tensor(grid.range_min, dtype=torch.float32, device=xyz.device)
        size = torch.tensor(grid.voxel_size, dtype=torch.float32, device=xyz.device)
        cells = torch.tensor(grid.shape, dtype=torch.float32, device=xyz.device)
        axes = 2 if per_pillar else 3
        index = torch.floor((xyz[:, :axes].float() - low[:axes]) / size[:axes])
        inside = ((index >= 0) & (index < cells[:axes])).all(1)  # comparisons with NaN are false
    point_index = inside.nonzero().squeeze(1)
    index = index.index_select(0, point_index).to(torch.int64)
    key = (sample.index_select(0, point_index) * x_cells + index[:, 0]) * y_cells + index[:, 1]
    if not per_pillar:
        key = key * z_cells + index[:, 2]
    unique, voxel_of_point = torch.unique(key, sorted=True, return_inverse=True)
    depth = 1 if per_pillar else z_cells
    column, z = unique // depth, unique % depth
    row, y = column // y_cells, column % y_cells
    coords = torch.stack([row // x_cells, row % x_cells, y, z], dim=1).to(torch.int32)
    return VoxelAssignment(coords, point_index, voxel_of_point)
