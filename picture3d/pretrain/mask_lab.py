"""Masks that look at where a voxel is and not at what it is: in blocks, by range, by direction. The rivals of I2Mask.

`block` and `radial` order the voxels of a sample, the first of them are hidden; `range_aware` sorts them into rings of which
each hides its share. How many are hidden, and which, is decided in `pretrain/masking.py`, by the same rule for every kind, so
that two kinds can be compared at the same number of hidden voxels.

Sources: "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022 (block against random masks); Occupancy-MAE,
arXiv 2206.09900 (range-aware masks); R-MAE, arXiv 2406.07833 (whole angular sectors are hidden).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from picture3d.ops.cylinder import polar_centers
from picture3d.ops.processes import rand_rows
from picture3d.structures.cylinder import CylinderGrid
from picture3d.structures.voxels import VoxelGrid


@dataclass(frozen=True, slots=True, eq=False)
class VoxelPlaces:
    """Where the M voxels of a batch are."""

    coords: Tensor  # (M, 4) int32: batch, x, y, z
    shape: tuple[int, int, int]  # cells along x, y, z
    range_m: Tensor  # (M,) float32: horizontal distance of the centre from the origin of the LiDAR frame
    azimuth_rad: Tensor  # (M,) float32: direction of the centre, -pi..pi, counter-clockwise from x


def voxel_places(coords: Tensor, grid: VoxelGrid) -> VoxelPlaces:
    """The places of (M, 4) `coords` (batch, x, y, z) in `grid`."""
    if isinstance(grid, CylinderGrid):
        polar = polar_centers(coords[:, 1:], grid)
        return VoxelPlaces(coords, grid.shape, polar[:, 0], polar[:, 1])
    low = torch.tensor(grid.range_min[:2], dtype=torch.float32, device=coords.device)
    size = torch.tensor(grid.voxel_size[:2], dtype=torch.float32, device=coords.device)
    centre = (coords[:, 1:3].float() + 0.5) * size + low
    return VoxelPlaces(coords, grid.shape, centre.norm(dim=1), torch.atan2(centre[:, 1], centre[:, 0]))


def range_ring(places: VoxelPlaces, edges_m: tuple[float, ...]) -> Tensor:
    """(M,) int64 ring of each voxel: 0 up to the first edge, ``len(edges_m)`` beyond the last."""
    edges = torch.tensor(edges_m, dtype=torch.float32, device=places.range_m.device)
    return torch.bucketize(places.range_m.contiguous(), edges)


def block_order(places: VoxelPlaces, batch_size: int, block_cells: int, generator: torch.Generator) -> Tensor:
    """(M,) int64 keys: block after block in random order, row by row inside; the first n are n voxels in whole blocks, but one.

    Blocks are columns of `block_cells` x `block_cells` cells over the whole height; where they begin is drawn too, one offset
    for the batch.

    Args:
        places: of the voxels.
        batch_size: number of samples.
        block_cells: edge of a block, cells.
        generator: on any device; the same state gives the same order.
    """
    x_cells, y_cells, z_cells = places.shape
    across, along = -(-x_cells // block_cells) + 1, -(-y_cells // block_cells) + 1
    device = places.coords.device
    offset = torch.randint(block_cells, (2,), generator=generator, device=generator.device).to(device)
    turn = _random_ranks(batch_size, across * along, generator).to(device)
    sample, x, y, z = places.coords.long().unbind(1)
    block_x, block_y = (x + offset[0]) // block_cells, (y + offset[1]) // block_cells
    inside = (((x + offset[0]) % block_cells) * block_cells + (y + offset[1]) % block_cells) * z_cells + z
    return turn[sample, block_x * along + block_y] * (block_cells * block_cells * z_cells) + inside


def radial_order(places: VoxelPlaces, batch_size: int, sectors: int, generator: torch.Generator) -> Tensor:
    """(M,) float64 keys: sector after sector in random order, counter-clockwise inside; where they begin is drawn per sample.

    Args:
        places: of the voxels.
        batch_size: number of samples.
        sectors: sectors of the full turn.
        generator: on any device; the same state gives the same order.
    """
    device = places.coords.device
    start = rand_rows(batch_size, generator).to(device)
    turn = _random_ranks(batch_size, sectors, generator).to(device)
    sample = places.coords[:, 0].long()
    position = ((places.azimuth_rad.double() / (2 * math.pi) + start[sample].double()) % 1.0) * sectors
    sector = position.floor().clamp(max=sectors - 1)
    return turn[sample, sector.long()].double() + (position - sector).clamp(max=1 - 1e-9)


def _random_ranks(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """(rows, columns) int64, each row a permutation."""
    return rand_rows(rows, generator, (columns,)).argsort(1)
