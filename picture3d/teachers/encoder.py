"""A finished encoder of our own as a teacher: frozen, so that what it says of a sweep can be stored as any teacher's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from picture3d.errors import DataError
from picture3d.ops.quantize import Quantisation, quantise_points
from picture3d.ops.scatter import segment_mean
from picture3d.ops.voxelize import VoxelAssignment
from picture3d.structures.batch import PointBatch
from picture3d.structures.points import PointCloud
from picture3d.structures.voxels import VoxelGrid
from picture3d.teachers.protocol import CellFeatures

_LICENCE = "as the data and the weights that the encoder was trained with"


class VoxelFeatures(Protocol):
    """What is needed of an encoder's answer."""

    @property
    def feats(self) -> Tensor:
        """(M, 2 C) final token of each voxel's pillar, then the voxel's own feature after the first stage."""
        ...

    @property
    def assignment(self) -> VoxelAssignment:
        """The M voxels and the points in them."""
        ...


class VoxelEncoder(Protocol):
    """An encoder in evaluation mode; `tasks.encoder.JoinedEncoder` is one."""

    def joined_features(self, batch: PointBatch) -> VoxelFeatures:
        """Encodes a batch."""
        ...


@dataclass(frozen=True, eq=False)
class EncoderTeacher:
    """A frozen encoder as a teacher; see `teachers.protocol.Teacher`. Cells are its voxels.

    A feature is the mean over a cell's points of their voxels' features: pillar token and voxel feature, each normalised over
    its channels (a layer norm without parameters), both together of length 1. Cells outside the encoder's range have zeros.
    """

    network: VoxelEncoder
    batch_of: Callable[[PointCloud], PointBatch]  # one sweep as the encoder's input, every point in its row
    dimension: int  # 2 C
    fingerprint: str
    quantisation: Quantisation
    device: torch.device
    name: str = "encoder"
    licence: str = _LICENCE

    def cell_features(self, points: PointCloud) -> CellFeatures:
        """(M, D) float32 features of the cells and the cell of every point.

        Raises:
            DataError: if the sweep lacks a column the encoder was trained with.
        """
        batch = self.batch_of(points).to(self.device)
        if len(batch.xyz) != len(points):
            raise DataError(
                f"teacher {self.name}: {len(batch.xyz)} points were made of a sweep of {len(points)}. Prepare the data without "
                "points that are not finite."
            )
        with torch.inference_mode():
            found = self.network.joined_features(batch)
            halves = found.feats.float().chunk(2, dim=1)
            voxels = torch.cat([F.layer_norm(half, half.shape[1:]) for half in halves], dim=1) / math.sqrt(self.dimension)
            quantised = quantise_points(torch.from_numpy(points.xyz).to(self.device), self.quantisation)
            cell = quantised.point_cell[found.assignment.point_index]
            known = (cell >= 0).nonzero().squeeze(1)
            rows = voxels[found.assignment.voxel_of_point[known]]
            features = torch.zeros((len(quantised.cells), self.dimension), device=self.device)
            if len(rows):
                features = segment_mean(rows, cell[known], len(quantised.cells))
        return CellFeatures(features.clone(), quantised.point_cell.clone())


def voxel_quantisation(grid: VoxelGrid, *, cylinder: bool) -> Quantisation:
    """Cells of the size of a grid's voxels; they lie as its voxels do where the range begins at a multiple of their size."""
    first, second, third = grid.voxel_size
    if cylinder:
        return Quantisation("cylindrical", (first, math.degrees(second), third))
    return Quantisation("cartesian", (first, second, third))
