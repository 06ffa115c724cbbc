from __future__ import annotations

import numpy as np
import torch

from picture3d.ops.voxelize import assign_voxels
from picture3d.structures.voxels import VoxelGrid, voxel_keys

GRID = VoxelGrid((-1.0, -2.0, 0.0), (1.0, 2.0, 0.9), (0.1, 0.2, 0.3))  # 20 x 20 x 3 cells


def random_points(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    xyz = torch.rand(count, 3, generator=generator) * torch.tensor([2.6, 4.6, 1.5]) - torch.tensor([1.3, 2.3, 0.3])
    return xyz, torch.randint(0, 3, (count,), generator=generator).sort().values


def test_every_point_falls_into_the_cell_numpy_says():
    xyz, sample = random_points(2000)
    found = assign_voxels(xyz, sample, 3, GRID)
    low, size = np.array(GRID.range_min, np.float32), np.array(GRID.voxel_size, np.float32)
    cell = np.floor((xyz.numpy() - low) / size).astype(int)
    inside = ((cell >= 0) & (cell < GRID.shape)).all(1)
    assert 0.3 < inside.mean() < 0.9
    assert found.point_index.tolist() == np.flatnonzero(inside).tolist()
    rows = np.column_stack([sample.numpy(), cell])[inside]
    expected, inverse = np.unique(rows, axis=0, return_inverse=True)
    assert np.array_equal(found.coords.numpy(), expected)
    assert np.array_equal(found.voxel_of_point.numpy(), inverse.ravel())
    assert found.coords.dtype == torch.int32


def test_rows_are_unique_and_sorted_by_key():
    xyz, sample = random_points(500, seed=1)
    keys = voxel_keys(assign_voxels(xyz, sample, 3, GRID).coords, GRID.shape)
    assert (keys[1:] > keys[:-1]).all()


def test_the_last_cell_is_inside_and_the_upper_border_is_not():
    xyz = torch.tensor([[0.99, 1.99, 0.89], [1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 0.91], [-1.0, -2.0, 0.0]])
    found = assign_voxels(xyz, torch.zeros(5, dtype=torch.int64), 1, GRID)
    assert found.point_index.tolist() == [0, 4]
    assert found.coords.tolist() == [[0, 0, 0, 0], [0, 19, 19, 2]]


def test_cell_borders_follow_float32_rounding():
    grid = VoxelGrid((-51.2, -51.2, -5.0), (51.2, 51.2, 3.0), (0.2, 0.2, 0.2))
    x = torch.arange(-256, 256, dtype=torch.float32) * 0.2
    found = assign_voxels(torch.stack([x, x, x * 0], 1), torch.zeros(512, dtype=torch.int64), 1, grid)
    expected = np.floor((x.numpy() - np.float32(-51.2)) / np.float32(0.2)).astype(int)
    assert np.array_equal(found.coords[found.voxel_of_point, 1].numpy(), expected[found.point_index.numpy()])


def test_points_that_are_not_finite_are_dropped():
    bad = float("nan"), float("inf"), -float("inf")
    xyz = torch.tensor([[0.0, 0.0, 0.1]] + [[v if axis == a else 0.1 for axis in range(3)] for v in bad for a in range(3)])
    sample = torch.zeros(len(xyz), dtype=torch.int64)
    assert assign_voxels(xyz, sample, 1, GRID).point_index.tolist() == [0]
    # A pillar does not look at z, not even at one that is not a number.
    assert len(assign_voxels(xyz, sample, 1, GRID, per_pillar=True).point_index) == 4


def test_pillars_ignore_height():
    xyz = torch.tensor([[0.05, 0.1, -90.0], [0.05, 0.1, 0.5], [0.05, 0.1, 90.0]])
    found = assign_voxels(xyz, torch.zeros(3, dtype=torch.int64), 1, GRID, per_pillar=True)
    assert found.coords.tolist() == [[0, 10, 10, 0]]
    assert found.voxel_of_point.tolist() == [0, 0, 0]


def test_no_points_give_no_voxels():
    found = assign_voxels(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), 2, GRID)
    assert found.coords.shape == (0, 4)
    assert found.num_voxels == len(found.point_index) == len(found.voxel_of_point) == 0
