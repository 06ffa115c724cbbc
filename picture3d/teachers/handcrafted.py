"""The hand-crafted teacher: what can be said of a sweep with a ruler. No weights, no download, nothing learnt.

Every feature is a function of sums over cells: counts, first and second moments, lowest and highest points. Positions are taken
in steps of 2**-14 m and intensities in steps of 2**-12, so that all sums are whole numbers and exact: neither the order of the
points nor the device changes them. Neighbourhoods are cubes of 3 x 3 x 3 blocks around the block of a cell, not balls; shape
features after Demantke et al., "Dimensionality based scale selection in 3D lidar point clouds" (2011). Nothing depends on the
heading of the sensor, so rotating a sweep about z (by quarter turns, because of the cells) leaves the features as they are.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from picture3d.errors import DataError
from picture3d.ops.quantize import Quantisation, quantise_points
from picture3d.structures.points import PointCloud
from picture3d.teachers.minkunet import unit_intensity
from picture3d.teachers.protocol import CellFeatures

CELL_M = 0.25  # a power of two: cells nest in blocks without a rounding error
_QUANTISATION = Quantisation("cartesian", (CELL_M, CELL_M, CELL_M))
_STEPS_PER_M = 1 << 14
_CELL_STEPS = int(CELL_M * _STEPS_PER_M)
_REACH_STEPS = (1 << 31) - 1  # 131 km: whatever lies farther is taken to lie there
_INTENSITY_STEPS = 1 << 12
_BLOCKS = (2, 6)  # cells per block and side: cubes of 1.5 m and of 4.5 m
_COLUMN = 6  # cells per ground column and side: 1.5 m
_GROUND_REACH = 2  # the ground of a column is sought in 5 x 5 columns: 7.5 m
_GROUND_SHARE = 0.05  # points of a column below its low height: echoes from below the street
_GROUND_POINTS = 4  # a column of fewer points does not say where the ground is
_SHAPE_POINTS = 3  # fewer points have no shape
_CLIP = 3.0  # standard deviations

# Name, mean and standard deviation of every column before it is standardised: over the cells of 24 sweeps of synthetic towns
# and of 7 real nuScenes keyframes, both alike in weight (tools/handcrafted_scales.py). Another sensor needs no others: they
# only bring the columns to one size.
COLUMNS: tuple[tuple[str, float, float], ...] = (
    ("height_m", 1.86, 2.13),
    ("near_ground", 0.301, 0.376),
    ("column_top_m", 3.14, 2.77),
    ("intensity", 0.0749, 0.0623),
    ("intensity_mean", 0.0761, 0.054),
    ("intensity_spread", 0.0267, 0.025),
    ("linearity_near", 0.579, 0.308),
    ("planarity_near", 0.368, 0.296),
    ("sphericity_near", 0.0526, 0.0941),
    ("variation_near", 0.0301, 0.0495),
    ("flat_near", 0.194, 0.282),
    ("upright_near", 0.103, 0.197),
    ("height_spread_m_near", 0.19, 0.166),
    ("density_near", 8.47, 0.674),
    ("linearity_far", 0.479, 0.236),
    ("planarity_far", 0.413, 0.242),
    ("sphericity_far", 0.108, 0.122),
    ("variation_far", 0.0608, 0.0608),
    ("flat_far", 0.261, 0.275),
    ("upright_far", 0.088, 0.165),
    ("height_spread_m_far", 0.625, 0.386),
    ("density_far", 10.4, 0.711),
)


@dataclass(frozen=True, eq=False)
class HandcraftedTeacher:
    """Measured features as a teacher; see `teachers.protocol.Teacher`. `COLUMNS` names what each column holds.

    Columns, per cell of 0.25 m (near: cube of 1.5 m around it, far: 4.5 m):

    - height_m: mean height above the ground, -1..8 m; near_ground: ``exp(-height / 0.3 m)``; column_top_m: height of the
      highest point of its column of 1.5 m, -1..12 m. The ground of a column is the lowest of the 5 % quantiles of the 5 x 5
      columns around it, of those with 4 points at least.
    - intensity: mean of the cell, 0..1; intensity_mean, intensity_spread: mean and standard deviation in the near cube.
    - linearity ``(l1 - l2) / l1``, planarity ``(l2 - l3) / l1``, sphericity ``l3 / l1``, variation ``l3 / (l1 + l2 + l3)`` of
      the eigenvalues l1 >= l2 >= l3 of the covariance; flat: planarity times the squared z of the normal; upright: linearity
      times the squared z of the main direction. Squares have no sign to choose, and the factors are 0 where a direction is
      arbitrary.
    - height_spread_m: standard deviation of z; density: ``ln(points * range**2)``, range at least 1 m.

    Each column is standardised with fixed numbers, held within 3 standard deviations and divided by the root of the number of
    columns: rows have a length of about 1, as those of the learnt teachers. The shape columns of a cube with fewer than 3
    points, or of points that coincide, are 0, the mean.
    """

    device: torch.device | str = "cpu"
    name: str = "handcrafted"
    licence: str = "Apache-2.0"
    quantisation: Quantisation = _QUANTISATION

    @property
    def dimension(self) -> int:
        """Length of a feature."""
        return len(COLUMNS)

    @property
    def fingerprint(self) -> str:
        """Digest of all numbers that shape the features."""
        settings = (1, CELL_M, _BLOCKS, _COLUMN, _GROUND_REACH, _GROUND_SHARE, _GROUND_POINTS, _SHAPE_POINTS, _CLIP, COLUMNS)
        return hashlib.sha256(repr(settings).encode()).hexdigest()[:16]

    def cell_features(self, points: PointCloud) -> CellFeatures:
        """(M, D) float32 features of the cells and the cell of every point.

        Raises:
            DataError: if the unit of the intensity is unknown, or an intensity is not finite.
        """
        measured, point_cell = self.measure(points)
        mean = torch.tensor([mean for _, mean, _ in COLUMNS], dtype=torch.float64, device=measured.device)
        deviation = torch.tensor([deviation for *_, deviation in COLUMNS], dtype=torch.float64, device=measured.device)
        standard = ((measured - mean) / deviation).nan_to_num(nan=0.0).clamp(-_CLIP, _CLIP)
        return CellFeatures((standard / math.sqrt(len(COLUMNS))).float(), point_cell)

    def measure(self, points: PointCloud) -> tuple[Tensor, Tensor]:
        """The columns in their own units, before they are standardised.

        Returns:
            (M, D) float64, NaN where a cube has no shape, and (N,) int64 row of every point, -1 for points that are not finite.

        Raises:
            DataError: as `cell_features`.
        """
        intensity = unit_intensity(points, self.name)
        finite = np.isfinite(points.xyz).all(1)
        if not np.isfinite(intensity[finite]).all():
            raise DataError(
                f"teacher {self.name}: the intensity of {int((~np.isfinite(intensity[finite])).sum())} points is not finite; "
                f"prepare the data anew, or drop these points"
            )
        xyz = torch.from_numpy(np.ascontiguousarray(points.xyz, dtype=np.float32)).to(self.device)
        quantised = quantise_points(xyz, self.quantisation)
        rows = (quantised.point_cell >= 0).nonzero().squeeze(1)
        cell_of_point = quantised.point_cell[rows]
        steps = (xyz[rows].double() * _STEPS_PER_M).floor().clamp(-_REACH_STEPS, _REACH_STEPS).to(torch.int64)
        echo = torch.from_numpy(np.ascontiguousarray(intensity, dtype=np.float32)).to(self.device)[rows].double()
        echo = (echo.clamp(0, 1) * _INTENSITY_STEPS).round().to(torch.int64)
        # The clamp of the steps holds for the cells too, or a point 200 km away would belong to no block.
        cells = _lowest(steps.div(_CELL_STEPS, rounding_mode="floor"), cell_of_point, len(quantised.cells))
        own = _Moments.of(cells, 1, steps, echo, cell_of_point)
        near, far = (own.blocks(cells, size) for size in _BLOCKS)
        height, top = _heights_m(cells, steps, cell_of_point, own)
        range_m = (own.mean_steps(cells)[:, :2] / _STEPS_PER_M).norm(dim=1).clamp(min=1.0)
        near_cube, far_cube = near.around(cells), far.around(cells)
        columns = [
            height.clamp(-1, 8),
            (-height.clamp(min=0) / 0.3).exp(),
            top.clamp(-1, 12),
            own.intensity()[0],
            *near_cube.intensity(),
            *near_cube.shape(range_m),
            *far_cube.shape(range_m),
        ]
        return torch.stack(columns, dim=1), quantised.point_cell


# Second moments in the order in which they are kept: rows and columns of the covariance.
_PAIRS = ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2))


@dataclass(frozen=True, slots=True, eq=False)
class _Moments:
    """Whole-number sums over the points of R blocks, positions relative to the middle of each row's block."""

    keys: Tensor  # (R, 3) int64 block indices, sorted
    row: Tensor  # (M,) int64 block of every cell
    size: int  # cells per side of a block
    sums: Tensor  # (R, 12) int64: count, intensity, its square, x, y, z, then the products of _PAIRS

    @staticmethod
    def of(cells: Tensor, size: int, steps: Tensor, echo: Tensor, cell_of_point: Tensor) -> _Moments:
        """Of the cells themselves."""
        local = steps - cells[cell_of_point] * _CELL_STEPS - _CELL_STEPS // 2
        products = [local[:, a] * local[:, b] for a, b in _PAIRS]
        table = torch.stack([torch.ones_like(echo), echo, echo * echo, *local.unbind(1), *products], dim=1)
        return _Moments(cells, torch.arange(len(cells), device=cells.device), size, _sum(table, cell_of_point, len(cells)))

    def blocks(self, cells: Tensor, size: int) -> _Moments:
        """Of blocks of `size` cells per side, from the cells' own."""
        index = cells.div(size, rounding_mode="floor")
        keys, row = _unique_rows(index)
        # From the middle of the cell to the middle of its block.
        shift = (2 * (cells - index * size) + 1 - size) * (_CELL_STEPS // 2)
        return _Moments(keys, row, size, _sum(_shifted(self.sums, shift), row, len(keys)))

    def around(self, cells: Tensor) -> _Cubes:
        """Sums over 3 x 3 x 3 blocks around the block of every cell."""
        find = _Finder(self.keys)
        total = self.sums.clone()
        edge = self.size * _CELL_STEPS
        for offset in _offsets(3, 1):
            if any(offset):
                here, there = find(offset)
                shift = torch.tensor(offset, device=cells.device) * edge
                # Every block is met at most once per offset, so adding is plain writing.
                total[here] += _shifted(self.sums[there], shift.expand(len(there), -1))
        return _Cubes(total, self.row)

    def mean_steps(self, cells: Tensor) -> Tensor:
        """(R, 3) float64 mean position in steps; for the cells themselves only."""
        return cells * _CELL_STEPS + _CELL_STEPS // 2 + self.sums[:, 3:6].double() / self.sums[:, :1]

    def intensity(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, (M,) float64 each."""
        return _Cubes(self.sums, self.row).intensity()


@dataclass(frozen=True, slots=True, eq=False)
class _Cubes:
    """Sums around R blocks, and the block of each of M cells."""

    sums: Tensor  # (R, 12) int64, as in `_Moments`
    row: Tensor  # (M,) int64

    def intensity(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, (M,) float64 each."""
        count, echo, squares = self.sums[:, :3].double().unbind(1)
        mean = echo / count
        # Whole numbers below 2**53: a constant intensity has spread 0 and not nearly 0.
        spread = (squares / count - mean * mean).clamp(min=0).sqrt()
        return (mean / _INTENSITY_STEPS)[self.row], (spread / _INTENSITY_STEPS)[self.row]

    def shape(self, range_m: Tensor) -> list[Tensor]:
        """The eight shape columns, (M,) float64 each."""
        count = self.sums[:, 0].double()
        mean, second = self.sums[:, 3:6] / count[:, None], self.sums[:, 6:] / count[:, None]
        covariance = mean.new_zeros((len(count), 3, 3))
        for at, (a, b) in enumerate(_PAIRS):
            covariance[:, a, b] = covariance[:, b, a] = (second[:, at] - mean[:, a] * mean[:, b]) / _STEPS_PER_M**2
        value, direction = torch.linalg.eigh(covariance)
        l3, l2, l1 = value.clamp(min=0).unbind(1)
        unknown = (count < _SHAPE_POINTS) | (l1 <= 0)
        safe = torch.where(l1 > 0, l1, 1.0)
        linearity, planarity, sphericity = (l1 - l2) / safe, (l2 - l3) / safe, l3 / safe
        flat = planarity * direction[:, 2, 0].square()
        upright = linearity * direction[:, 2, 2].square()
        known = [
            linearity,
            planarity,
            sphericity,
            l3 / (safe + l2 + l3),
            flat,
            upright,
            covariance[:, 2, 2].clamp(min=0).sqrt(),
        ]
        columns = [torch.where(unknown, math.nan, column)[self.row] for column in known]
        return [*columns, count.log()[self.row] + 2 * range_m.log()]


def _heights_m(cells: Tensor, steps: Tensor, cell_of_point: Tensor, own: _Moments) -> tuple[Tensor, Tensor]:
    """(M,) float64 mean height of every cell above the ground, and that of the highest point of its column."""
    columns, column_of_cell = _unique_rows(torch.nn.functional.pad(cells[:, :2].div(_COLUMN, rounding_mode="floor"), (0, 1)))
    column, z = column_of_cell[cell_of_point], steps[:, 2]
    count = torch.bincount(column, minlength=len(columns))
    order = z.argsort(stable=True)
    order = order[column[order].argsort(stable=True)]
    start = count.cumsum(0) - count
    low = z[order[start + (_GROUND_SHARE * (count - 1)).floor().to(torch.int64)]]
    nowhere = torch.iinfo(torch.int64).max
    says = torch.where(count >= _GROUND_POINTS, low, nowhere)
    ground, find = says.clone(), _Finder(columns)
    for offset in _offsets(2, _GROUND_REACH):
        if any(offset):
            here, there = find((*offset, 0))
            ground[here] = torch.minimum(ground[here], says[there])
    ground = torch.where(ground == nowhere, low, ground).double()
    top = z[order[start + count - 1]].double()
    mean_z = own.mean_steps(cells)[:, 2]
    return (mean_z - ground[column_of_cell]) / _STEPS_PER_M, ((top - ground) / _STEPS_PER_M)[column_of_cell]


class _Finder:
    """Finds, for rows of block indices, the row that lies at an offset."""

    def __init__(self, keys: Tensor) -> None:
        low = keys.amin(0) - _GROUND_REACH if len(keys) else keys.new_zeros(3)
        extent = (keys.amax(0) + _GROUND_REACH - low + 1) if len(keys) else keys.new_ones(3)
        self.stride = torch.stack([extent[1] * extent[2], extent[2], torch.ones_like(extent[2])])
        self.numbers = ((keys - low) * self.stride).sum(1)  # ascending, as the rows are sorted

    def __call__(self, offset: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Rows that have a neighbour there, and the neighbour of each."""
        wanted = self.numbers + (torch.tensor(offset, device=self.stride.device) * self.stride).sum()
        at = torch.searchsorted(self.numbers, wanted).clamp(max=max(0, len(self.numbers) - 1))
        here = (self.numbers[at] == wanted).nonzero().squeeze(1)
        return here, at[here]


def _shifted(sums: Tensor, shift: Tensor) -> Tensor:
    """The sums with every point moved by `shift`, (R, 3) int64."""
    count, first = sums[:, :1], sums[:, 3:6]
    products = [
        sums[:, 6 + at] + shift[:, a] * first[:, b] + shift[:, b] * first[:, a] + shift[:, a] * shift[:, b] * count[:, 0]
        for at, (a, b) in enumerate(_PAIRS)
    ]
    return torch.cat([sums[:, :3], first + shift * count, torch.stack(products, dim=1)], dim=1)


def _sum(values: Tensor, index: Tensor, rows: int) -> Tensor:
    """Sums of whole numbers by segment: exact in any order."""
    return values.new_zeros((rows, values.shape[1])).index_add_(0, index, values)


def _lowest(values: Tensor, index: Tensor, rows: int) -> Tensor:
    """(rows, C) smallest value of each segment."""
    total = values.new_zeros((rows, values.shape[1]))
    return total.scatter_reduce_(0, index[:, None].expand_as(values), values, "amin", include_self=False)


def _unique_rows(index: Tensor) -> tuple[Tensor, Tensor]:
    """(R, 3) different rows in ascending order, and the row of each of the given ones."""
    if not len(index):
        return index, index.new_zeros(0)
    low = index.amin(0)
    extent = index.amax(0) - low + 1
    number = ((index[:, 0] - low[0]) * extent[1] + index[:, 1] - low[1]) * extent[2] + index[:, 2] - low[2]
    numbers, row = torch.unique(number, return_inverse=True)
    rest = numbers.div(extent[2], rounding_mode="floor")
    parts = [rest.div(extent[1], rounding_mode="floor"), rest % extent[1], numbers % extent[2]]
    return torch.stack(parts, dim=1) + low, row


def _offsets(axes: int, reach: int) -> list[tuple[int, ...]]:
    steps = range(-reach, reach + 1)
    pairs = [(a, b) for a in steps for b in steps]
    return pairs if axes == 2 else [(*pair, c) for pair in pairs for c in steps]
