"""Point encoders of DSVT: a small network on every point, maximum over the points of a voxel (or pillar).

Source: "DSVT: Dynamic Sparse Voxel Transformer with Rotated Sets", CVPR 2023, its dynamic voxel and pillar encoders.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from picture3d.errors import ConfigError
from picture3d.models.row_norm import RowBatchNorm
from picture3d.ops.scatter import gather_rows, segment_max, segment_mean
from picture3d.ops.voxelize import VoxelAssignment, assign_voxels
from picture3d.structures.batch import PointBatch
from picture3d.structures.cylinder import CylinderGrid
from picture3d.structures.voxels import SparseVoxels, VoxelGrid


@dataclass(frozen=True, slots=True, eq=False)
class EncodedVoxels:
    """What the point encoder hands on."""

    voxels: SparseVoxels  # M occupied cells with C features
    assignment: VoxelAssignment  # K of the N points are inside the grid; their cell
    point_features: Tensor  # (K, C) of the points inside, before the maximum


class VoxelEncoder(nn.Module):
    """Points to voxel features.

    A point enters as its raw x, y, z and features, its offset to the mean of its voxel's points and its offset to the
    voxel's centre. With `pillars` the grid is one cell high, the height of a point does not matter to the assignment,
    and heights are measured from the middle of one cell above the bottom of the range.

    State-dict keys are those of the reference below ``vfe.``: ``pfn_layers.{0,1}.linear.weight``, ``...norm.*``.

    Args:
        in_features: number of columns in `PointBatch.features` that are used (the first ones).
        channels: width C of the result, even.
        grid: range and cell size.
        pillars: one cell per column.
        momentum: of the running statistics.
        unit_inputs: x and y count in tens of metres and offsets in halves of a cell, so that all inputs are of one size. As
            published all are metres: a place in the voxel is then a hundredth of x and y, and the first layer learns it late.
    """

    input_size: Tensor  # (inputs,) float32: what each column is divided by

    def __init__(
        self,
        in_features: int,
        channels: int,
        grid: VoxelGrid,
        pillars: bool = False,
        *,
        momentum: float = 0.01,
        unit_inputs: bool = False,
    ) -> None:
        super().__init__()
        if channels < 2 or channels % 2:
            raise ConfigError(f"voxel encoder: {channels} channels cannot be halved. Set an even number of at least 2")
        if in_features < 0:
            raise ConfigError(f"voxel encoder: in_features is {in_features}. Set it to the number of features of a point")
        if isinstance(grid, CylinderGrid):
            raise ConfigError("voxel encoder: made for cells of x, y, z. Take the cylinder encoder for a cylinder grid")
        self.grid, self.pillars, self.in_features = grid, pillars, in_features
        x_cells, y_cells, z_cells = grid.shape
        self.grid_shape = (x_cells, y_cells, 1 if pillars else z_cells)
        inputs = 3 + in_features + 3 + 3
        size = unit_input_size(grid.voxel_size, in_features) if unit_inputs else torch.ones(inputs)
        self.register_buffer("input_size", size, persistent=False)
        self.pfn_layers = nn.ModuleList(
            [_PointLayer(inputs, channels // 2, momentum), _PointLayer(channels, channels, momentum)]
        )

    def forward(self, batch: PointBatch) -> EncodedVoxels:
        """Encodes a batch; 0 points, or none inside the grid, give 0 voxels.

        Raises:
            ConfigError: if the points have fewer feature columns than the encoder was made for.
        """
        if batch.features.shape[1] < self.in_features:
            raise ConfigError(
                f"voxel encoder: made for {self.in_features} point features, this batch has {batch.features.shape[1]}. "
                f"Set the features of the data and in_features of the encoder to the same number."
            )
        assignment = assign_voxels(batch.xyz, batch.sample, batch.batch_size, self.grid, per_pillar=self.pillars)
        first, second = self.pfn_layers
        # Metres up to 75 with centimetres that matter: the inputs do not survive bfloat16.
        with torch.autocast(batch.xyz.device.type, enabled=False):
            hidden = first(self.point_inputs(batch, assignment) / self.input_size)
        voxel, count = assignment.voxel_of_point, assignment.num_voxels
        points = second(hidden, segment_max(hidden, voxel, count), voxel)
        feats = segment_max(points, voxel, count)
        voxels = SparseVoxels(assignment.coords, feats, self.grid_shape, batch.batch_size)
        return EncodedVoxels(voxels, assignment, points)

    def point_inputs(self, batch: PointBatch, assignment: VoxelAssignment) -> Tensor:
        """(K, 3 + F + 3 + 3) float32: raw values, offset to the voxel's mean, offset to its centre."""
        xyz = batch.xyz.float().index_select(0, assignment.point_index)
        features = batch.features[:, : self.in_features].float().index_select(0, assignment.point_index)
        voxel = assignment.voxel_of_point
        mean = segment_mean(xyz, voxel, assignment.num_voxels).index_select(0, voxel)
        low = torch.tensor(self.grid.range_min, dtype=torch.float32, device=xyz.device)
        size = torch.tensor(self.grid.voxel_size, dtype=torch.float32, device=xyz.device)
        cell = assignment.coords[:, 1:].index_select(0, voxel).float()
        centre = cell * size + (size / 2 + low)
        return torch.cat([xyz, features, xyz - mean, xyz - centre], dim=1)


def unit_input_size(voxel_size: tuple[float, float, float], in_features: int) -> Tensor:
    """(3 + F + 3 + 3,) float32: what each column of the point inputs is divided by if they are brought to one size.

    Weights of the first layer for unit inputs are those for metres, times this. It knows nothing of the range: encoders of one
    cell size may look at wider or narrower ones.
    """
    half = torch.tensor(voxel_size) / 2
    return torch.cat([torch.tensor([10.0, 10.0, 1.0]), torch.ones(in_features), half, half])


class _PointLayer(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, momentum: float) -> None:
        super().__init__()
        self.linear = nn.Linear(in_channels, out_channels, bias=False)
        self.norm = RowBatchNorm(out_channels, eps=1e-3, momentum=momentum)

    def forward(self, values: Tensor, of_voxel: Tensor | None = None, voxel: Tensor | None = None) -> Tensor:
        """(K, I) values of points, in the second layer joined with the (M, J) values of their voxels, to (K, C).

        Points and voxels are multiplied apart: the product of a voxel is the same for all its points.
        """
        if of_voxel is None or voxel is None:
            return torch.relu(self.norm(self.linear(values)))
        own, shared = self.linear.weight.split([values.shape[1], of_voxel.shape[1]], dim=1)
        products = F.linear(values, own)
        return torch.relu(self.norm(products.add_(gather_rows(F.linear(of_voxel, shared), voxel))))
