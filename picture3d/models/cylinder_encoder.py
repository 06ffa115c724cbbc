"""The point encoder of cylindrical segmentation: a deeper network on every point, maximum over the cell, then one more layer.

Source: "Cylindrical and Asymmetrical 3D Convolution Networks for LiDAR Segmentation", CVPR 2021, with the output width of the
DSVT encoder behind it.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from picture3d.errors import ConfigError
from picture3d.models.row_norm import RowBatchNorm
from picture3d.models.voxel_encoder import EncodedVoxels, VoxelEncoder
from picture3d.ops.cylinder import polar_centers, polar_of
from picture3d.ops.scatter import segment_max
from picture3d.ops.voxelize import VoxelAssignment, assign_voxels
from picture3d.structures.batch import PointBatch
from picture3d.structures.cylinder import CylinderGrid
from picture3d.structures.voxels import SparseVoxels, VoxelGrid

_WIDTHS = (64, 128, 256)


class CylinderEncoder(nn.Module):
    """Points to features of cylinder cells; the same interface as :class:`VoxelEncoder`.

    A point enters as its offset to the middle of its cell (radius, angle, height; not clamped), radius, angle, z, x, y and its
    features. Width 9 with intensity alone, as published.

    State-dict keys are those of the reference below ``vfe.``: ``pre_norm``, ``vfe_layers.{0,1,2}.{0,1}``, ``vfe_layers.3``,
    ``compression_layers.0``.

    Args:
        in_features: number of columns in `PointBatch.features` that are used (the first ones).
        channels: width C of the result.
        grid: range and cell size.
        momentum: of the running statistics.
    """

    def __init__(self, in_features: int, channels: int, grid: CylinderGrid, *, momentum: float = 0.1) -> None:
        super().__init__()
        if in_features < 0 or channels < 1:
            raise ConfigError(
                f"cylinder encoder: in_features {in_features} or channels {channels} are too few. Set them to at least 0 and 1"
            )
        self.grid, self.pillars, self.in_features = grid, False, in_features
        self.grid_shape = grid.shape
        inputs = 8 + in_features
        self.pre_norm = RowBatchNorm(inputs, eps=1e-5, momentum=momentum)
        widths = (inputs, *_WIDTHS)
        layers: list[nn.Module] = [
            nn.Sequential(nn.Linear(a, b), RowBatchNorm(b, eps=1e-5, momentum=momentum), nn.ReLU())
            for a, b in itertools.pairwise(widths)
        ]
        self.vfe_layers = nn.ModuleList([*layers, nn.Linear(_WIDTHS[-1], _WIDTHS[-1])])
        self.compression_layers = nn.Sequential(nn.Linear(_WIDTHS[-1], channels), nn.ReLU())

    def forward(self, batch: PointBatch) -> EncodedVoxels:
        """Encodes a batch; 0 points, or none inside the grid, give 0 voxels.

        Raises:
            ConfigError: if the points have fewer feature columns than the encoder was made for.
        """
        if batch.features.shape[1] < self.in_features:
            raise ConfigError(
                f"cylinder encoder: made for {self.in_features} point features, this batch has {batch.features.shape[1]}. "
                f"Set the features of the data and in_features of the encoder to the same number."
            )
        assignment = assign_voxels(batch.xyz, batch.sample, batch.batch_size, self.grid)
        # Metres and radians whose thousandths matter: the inputs do not survive bfloat16.
        with torch.autocast(batch.xyz.device.type, enabled=False):
            hidden = self.pre_norm(self.point_inputs(batch, assignment))
            hidden = self.vfe_layers[0](hidden)
        for layer in list(self.vfe_layers)[1:]:
            hidden = layer(hidden)
        feats = self.compression_layers(segment_max(hidden, assignment.voxel_of_point, assignment.num_voxels))
        voxels = SparseVoxels(assignment.coords, feats, self.grid_shape, batch.batch_size)
        return EncodedVoxels(voxels, assignment, self.compression_layers(hidden))

    def point_inputs(self, batch: PointBatch, assignment: VoxelAssignment) -> Tensor:
        """(K, 8 + F) float32: polar offset to the cell's middle, radius, angle, z, x, y, features."""
        xyz = batch.xyz.float().index_select(0, assignment.point_index)
        features = batch.features[:, : self.in_features].float().index_select(0, assignment.point_index)
        polar = polar_of(xyz)
        centre = polar_centers(assignment.coords[:, 1:].index_select(0, assignment.voxel_of_point), self.grid)
        return torch.cat([polar - centre, polar, xyz[:, :2], features], dim=1)


def point_encoder(
    in_features: int,
    channels: int,
    grid: VoxelGrid,
    pillars: bool = False,
    *,
    momentum: float = 0.01,
    unit_inputs: bool = False,
) -> VoxelEncoder | CylinderEncoder:
    """The point encoder that belongs to a grid; arguments as :class:`VoxelEncoder`. That of a cylinder normalises its inputs.

    Raises:
        ConfigError: for pillars on a cylinder grid.
    """
    if not isinstance(grid, CylinderGrid):
        return VoxelEncoder(in_features, channels, grid, pillars, momentum=momentum, unit_inputs=unit_inputs)
    if pillars:
        raise ConfigError("a cylinder grid has no pillars. Set grid.pillars=false, or use a grid of x, y, z")
    return CylinderEncoder(in_features, channels, grid)
