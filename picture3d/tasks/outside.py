"""Classes for all points of a sweep, those outside the grid included: every labelled point is scored."""

from __future__ import annotations

import torch
from torch import Tensor

from picture3d.ops.cylinder import cylinder_centers_m
from picture3d.ops.voxelize import VoxelAssignment
from picture3d.structures.batch import PointBatch
from picture3d.structures.cylinder import CylinderGrid
from picture3d.structures.voxels import VoxelGrid

NO_ANSWER = 0  # scored as a miss
# Pairs of point and voxel whose distances are looked at together: bounds the scratch memory.
_PAIRS_PER_CHUNK = 4_000_000


def classes_of_points(
    batch: PointBatch,
    assignment: VoxelAssignment,
    grid: VoxelGrid,
    point_class: Tensor,
    voxel_class: Tensor,
    wanted: Tensor | None = None,
) -> Tensor:
    """A class for each of the N points.

    A point inside the grid has its own. A point outside takes the class of the occupied voxel of its frame whose centre is
    nearest, in metres; what lies beyond the range of a grid is mostly more of what lies at its edge. A point whose
    coordinates are not finite, or whose frame has no point inside the grid, gets `NO_ANSWER`.

    Args:
        batch: N points.
        assignment: the K points inside the grid, in M voxels.
        grid: the grid of `assignment`.
        point_class: (K,) int64.
        voxel_class: (M,) int64.
        wanted: (N,) bool, the points outside that are to be answered; None: all. The others get `NO_ANSWER`.

    Returns:
        (N,) int64.
    """
    answer = torch.full_like(batch.sample, NO_ANSWER)
    answer[assignment.point_index] = point_class
    outside = batch.xyz.isfinite().all(1)
    outside[assignment.point_index] = False
    if wanted is not None:
        outside &= wanted
    centres = _voxel_centres_m(assignment, grid)
    for sample in range(batch.batch_size):
        points = (outside & (batch.sample == sample)).nonzero().squeeze(1)
        voxels = (assignment.coords[:, 0] == sample).nonzero().squeeze(1)
        if len(points) and len(voxels):
            nearest = _nearest(batch.xyz[points].float(), centres[voxels])
            answer[points] = voxel_class[voxels[nearest]]
    return answer


def _voxel_centres_m(assignment: VoxelAssignment, grid: VoxelGrid) -> Tensor:
    """(M, 3) float32 metres; a pillar, which is one cell high, has its centre at half its height."""
    if isinstance(grid, CylinderGrid):
        return cylinder_centers_m(assignment.coords[:, 1:], grid)
    low = torch.tensor(grid.range_min, device=assignment.coords.device)
    size = torch.tensor(grid.voxel_size, device=assignment.coords.device)
    return (assignment.coords[:, 1:].float() + 0.5) * size + low


def _nearest(points: Tensor, centres: Tensor) -> Tensor:
    """(P,) int64: row of the centre (V, 3) nearest to each point (P, 3); V >= 1."""
    found = []
    for chunk in points.split(max(1, _PAIRS_PER_CHUNK // len(centres))):
        squared = (chunk[:, None, 0] - centres[None, :, 0]).square()
        for axis in (1, 2):
            squared += (chunk[:, None, axis] - centres[None, :, axis]).square()
        found.append(squared.argmin(1))
    return torch.cat(found)
