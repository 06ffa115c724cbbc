"""PICTURE's two reconstruction losses on hidden voxels: where their points lie, and what the teacher says of them.

Two things are not in the paper and off unless asked for: the second loss on visible voxels (`visible_features_weight`), and
features in which every direction counts (`features_scale`).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from picture3d.config import FrozenConfig
from picture3d.ops.chamfer import chamfer
from picture3d.ops.cylinder import cylinder_centers_m
from picture3d.ops.processes import mean_count
from picture3d.ops.scatter import segment_count
from picture3d.ops.voxelize import VoxelAssignment
from picture3d.structures.cylinder import CylinderGrid
from picture3d.structures.voxels import VoxelGrid


class LossConfig(FrozenConfig):
    """What the decoder has to reconstruct, and how much each part counts. A weight of 0 leaves that part out."""

    coordinates_weight: float = Field(default=1.0, ge=0, description="weight of the Chamfer loss on points")
    features_weight: float = Field(
        default=3.0, ge=0, description="weight of the Smooth-L1 loss on teacher features of hidden voxels"
    )
    visible_features_weight: float = Field(
        default=0.0,
        ge=0,
        description="weight of the same loss on visible voxels, told from the encoder's own output; not in the paper",
    )
    features_scale: Literal["teacher", "whitened"] = Field(
        default="teacher",
        description="teacher: features are predicted as they are, as published; whitened: each direction in which they vary "
        "counts alike, so that what is rare is learnt too",
    )
    whitening_floor: float = Field(
        default=0.06,
        gt=0,
        description="whitened: added to the standard deviation of each direction, as a share of that of all together; larger "
        "values take less noise up",
    )
    num_predicted_points: int = Field(default=16, ge=1, description="points predicted per hidden voxel")
    num_target_points: int = Field(default=64, ge=1, description="true points per hidden voxel they are compared with")

    @property
    def teaches_features(self) -> bool:
        """Whether any loss looks at a teacher's features."""
        return self.features_weight > 0 or self.visible_features_weight > 0


def voxel_centers_m(coords: Tensor, grid: VoxelGrid) -> Tensor:
    """(V, 3) float32 centres, in metres, of the cells (V, 4) `coords` (batch, x, y, z)."""
    if isinstance(grid, CylinderGrid):
        return cylinder_centers_m(coords[:, 1:], grid)
    low = torch.tensor(grid.range_min, dtype=torch.float32, device=coords.device)
    size = torch.tensor(grid.voxel_size, dtype=torch.float32, device=coords.device)
    return (coords[:, 1:].float() + 0.5) * size + low


def target_points_m(xyz: Tensor, assignment: VoxelAssignment, grid: VoxelGrid, rows: Tensor, count: int) -> Tensor:
    """The points that hidden voxels are to reconstruct.

    The first `count` points of each voxel in the order of the cloud, repeated cyclically where there are fewer.

    Args:
        xyz: (N, 3) float32 points of the batch, metres.
        assignment: which of them lie in which voxel.
        grid: where the voxels are.
        rows: (V,) int64 voxels wanted.
        count: T, points per voxel.

    Returns:
        (V, T, 3) float32, metres, relative to the centre of the voxel.
    """
    order = assignment.voxel_of_point.argsort(stable=True)
    size = segment_count(assignment.voxel_of_point, assignment.num_voxels)
    first = (size.cumsum(0) - size)[rows]
    slot = torch.arange(count, device=xyz.device) % size[rows].clamp(min=1, max=count)[:, None]
    point = assignment.point_index[order[first[:, None] + slot]]
    return xyz[point].float() - voxel_centers_m(assignment.coords[rows], grid)[:, None]


def coordinates_loss(predicted_m: Tensor, target_m: Tensor) -> Tensor:
    """Mean Chamfer distance of hidden voxels, in square metres; 0 with a graph where nothing is hidden.

    Args:
        predicted_m: (V, P, 3) predicted points relative to the voxel centre.
        target_m: (V, T, 3) true points relative to the voxel centre.
    """
    return chamfer(predicted_m, target_m).sum() / mean_count(len(predicted_m), predicted_m)


def features_loss(predicted: Tensor, target: Tensor, has_target: Tensor) -> Tensor:
    """Mean Smooth-L1 (transition at 1) over all elements of voxels that have a target; 0 with a graph where none has.

    Args:
        predicted: (V, D) any float dtype; compared in float32.
        target: (V, D).
        has_target: (V,) bool; other rows count nothing, whatever they hold.
    """
    # The targets themselves are replaced: a NaN behind a plain selection would come back through the gradient.
    target = torch.where(has_target[:, None], target.float(), 0.0)
    per_voxel = F.smooth_l1_loss(predicted.float(), target, reduction="none", beta=1.0).mean(1)
    return torch.where(has_target, per_voxel, 0.0).sum() / mean_count(has_target.sum(), per_voxel)
