"""Positions in cylindrical coordinates, the cells of a cylinder grid they fall into, and where those cells are."""

from __future__ import annotations

import torch
from torch import Tensor

from picture3d.structures.cylinder import CylinderGrid


def polar_of(xyz: Tensor) -> Tensor:
    """(N, 3) float32 radius (metres), angle (radians, -pi..pi, counter-clockwise from x) and height of (N, 3) metres."""
    x, y, z = xyz.float().unbind(1)
    return torch.stack([(x * x + y * y).sqrt(), torch.atan2(y, x), z], dim=1)


def cylinder_cells(xyz: Tensor, grid: CylinderGrid) -> tuple[Tensor, Tensor]:
    """The cell of each point, in float32 as trained weights saw it.

    Args:
        xyz: (N, 3) metres.
        grid: range, cell size, and whether points outside are clamped into it.

    Returns:
        (N, 3) float32 whole numbers, cell along radius, angle, height; and (N,) bool, whether the point belongs to the grid.
        A point with a coordinate that is not finite never does.
    """
    polar = polar_of(xyz)
    low = torch.tensor(grid.range_min, dtype=torch.float32, device=xyz.device)
    high = torch.tensor(grid.range_max, dtype=torch.float32, device=xyz.device)
    size = torch.tensor(grid.voxel_size, dtype=torch.float32, device=xyz.device)
    cells = torch.tensor(grid.shape, dtype=torch.float32, device=xyz.device)
    inside = polar.isfinite().all(1)
    if not grid.clamp:
        inside &= ((polar >= low) & (polar <= high)).all(1)
    clamped = torch.minimum(torch.maximum(polar, low), high)
    index = torch.floor((clamped - low) / size)
    return torch.minimum(index.clamp(min=0), cells - 1), inside


def polar_centers(cells: Tensor, grid: CylinderGrid) -> Tensor:
    """(V, 3) float32 radius, angle, height of the middle of (V, 3) cells."""
    low = torch.tensor(grid.range_min, dtype=torch.float32, device=cells.device)
    size = torch.tensor(grid.voxel_size, dtype=torch.float32, device=cells.device)
    return cells.float() * size + size / 2 + low


def cylinder_centers_m(cells: Tensor, grid: CylinderGrid) -> Tensor:
    """(V, 3) float32 x, y, z in metres of the middle of (V, 3) cells."""
    radius, angle, height = polar_centers(cells, grid).unbind(1)
    return torch.stack([radius * angle.cos(), radius * angle.sin(), height], dim=1)
