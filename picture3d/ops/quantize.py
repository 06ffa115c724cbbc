"""Points to the cells of a teacher: Cartesian or cylindrical, the first point of a cell speaks for it.

Cells are sorted by their indices, so the rows of a result depend on which cells are occupied and never on the order of points.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Quantisation:
    """How a teacher cuts space into cells. Cell indices are floors: absolute, possibly negative."""

    kind: Literal["cylindrical", "cartesian"] = "cylindrical"
    # cylindrical: radius in metres, angle in degrees, height in metres; cartesian: x, y, z in metres
    cell: tuple[float, float, float] = (0.1, 1.0, 0.1)

    def __post_init__(self) -> None:
        object.__setattr__(self, "cell", tuple(float(size) for size in self.cell))
        if self.kind not in ("cylindrical", "cartesian"):
            raise ValueError(f"quantisation kind must be cylindrical or cartesian, got {self.kind!r}")
        if len(self.cell) != 3 or not all(math.isfinite(size) and size > 0 for size in self.cell):
            raise ValueError(f"quantisation needs three positive cell sizes, got {self.cell}")


@dataclass(frozen=True, slots=True, eq=False)
class QuantisedPoints:
    """The M cells that N points occupy."""

    cells: Tensor  # (M, 3) int32, unique, sorted by (first, second, third) index
    representative: Tensor  # (M,) int64: first point of each cell, in the order of the points
    point_cell: Tensor  # (N,) int64: cell of each point; -1 for points that are not finite


def continuous_cells(xyz: Tensor, quantisation: Quantisation) -> Tensor:
    """(N, 3) float32 positions in units of cells, before the floor; computed in float32 as SLidR and Seal do."""
    xyz = xyz.float()
    if quantisation.kind == "cartesian":
        return xyz / torch.tensor(quantisation.cell, dtype=torch.float32, device=xyz.device)
    x, y, z = xyz.unbind(1)
    radius_m, angle_deg, height_m = quantisation.cell
    radius = torch.sqrt(x * x + y * y) / radius_m
    angle = torch.atan2(y, x) * 180.0 / math.pi / angle_deg
    return torch.stack([radius, angle, z / height_m], dim=1)


def quantise_points(xyz: Tensor, quantisation: Quantisation) -> QuantisedPoints:
    """Assigns (N, 3) points, in metres, to cells. N may be 0."""
    position = continuous_cells(xyz, quantisation)
    finite = torch.isfinite(position).all(1)
    kept = finite.nonzero().squeeze(1)
    index = position[kept].floor().to(torch.int64)
    if len(kept) == 0:
        empty = torch.zeros(0, dtype=torch.int64, device=xyz.device)
        return QuantisedPoints(
            empty.new_zeros((0, 3), dtype=torch.int32), empty, torch.full_like(finite, -1, dtype=torch.int64)
        )
    low, high = index.amin(0), index.amax(0)
    extent = high - low + 1
    keys = ((index[:, 0] - low[0]) * extent[1] + (index[:, 1] - low[1])) * extent[2] + (index[:, 2] - low[2])
    _, inverse = torch.unique(keys, return_inverse=True)
    count = int(inverse.max()) + 1
    first = torch.full((count,), len(kept), dtype=torch.int64, device=xyz.device)
    first.scatter_reduce_(0, inverse, torch.arange(len(kept), device=xyz.device), "amin")
    point_cell = torch.full((len(xyz),), -1, dtype=torch.int64, device=xyz.device)
    point_cell[kept] = inverse
    return QuantisedPoints(index[first].to(torch.int32), kept[first], point_cell)
