"""What a teacher is: a frozen network that turns one sweep into features, said once for every teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from picture3d.ops.quantize import Quantisation
from picture3d.structures.points import PointCloud


@dataclass(frozen=True, slots=True, eq=False)
class CellFeatures:
    """Teacher features of the M cells that a sweep of N points occupies."""

    features: Tensor  # (M, D) float32, on the teacher's device; one row per cell, in the order of the quantisation
    point_cell: Tensor  # (N,) int64, same device: row in `features` of every point; -1 where a point lies in no cell

    def __post_init__(self) -> None:
        if self.features.ndim != 2 or self.point_cell.ndim != 1:
            found = f"{tuple(self.features.shape)} and {tuple(self.point_cell.shape)}"
            raise ValueError(f"expected features (M, D) and point_cell (N,), got {found}")

    def of_points(self) -> Tensor:
        """(N, D) float32: the feature of every point's cell; zeros for points in no cell."""
        padded = torch.cat([self.features, self.features.new_zeros((1, self.features.shape[1]))])
        return padded[self.point_cell]  # -1 is the row of zeros


class Teacher(Protocol):
    """A network whose features are the high-level targets. It sees each sweep alone and is never trained here."""

    @property
    def name(self) -> str:
        """Short name; also the folder of its stored features."""
        ...

    @property
    def dimension(self) -> int:
        """D: length of a feature."""
        ...

    @property
    def licence(self) -> str:
        """What the weights may be used for: an SPDX name or one sentence."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes whenever the weights or anything else that shapes the features changes (a digest of the weights)."""
        ...

    @property
    def quantisation(self) -> Quantisation:
        """How points become cells. Kept with the stored features, so that cells are derived again from the points."""
        ...

    def cell_features(self, points: PointCloud) -> CellFeatures:
        """The features once per cell, and the cell of every point. Same points, same result, whatever ran before."""
        ...
