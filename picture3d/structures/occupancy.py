"""Which cells of the space around a sensor are occupied, and by what: sparse semantic occupancy of one frame."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FREE = 0  # in dense arrays; a cell that is not listed
IGNORED = 255  # occupied, but nobody could name it: left out of losses and scores


@dataclass(frozen=True, slots=True)
class OccupancyGrid:
    """A box of space cut into cubes. Cell (0, 0, 0) has its lowest corner at `origin`."""

    shape: tuple[int, int, int]  # cells along x, y, z
    origin: tuple[float, float, float]  # metres, the lowest corner
    cell_m: float  # metres, the side of a cell
    frame: str = "lidar"  # frame of reference: the LiDAR of the keyframe

    def __post_init__(self) -> None:
        if any(not 1 <= side <= np.iinfo(np.int16).max for side in self.shape):
            raise ValueError(f"an occupancy grid has 1 to 32767 cells along each axis, got {self.shape}")
        if not (self.cell_m > 0 and np.isfinite([*self.origin, self.cell_m]).all()):
            raise ValueError(f"an occupancy grid needs a finite origin and a positive cell, got {self.origin}, {self.cell_m}")

    @property
    def cells(self) -> int:
        """How many cells there are."""
        return self.shape[0] * self.shape[1] * self.shape[2]

    @property
    def end(self) -> tuple[float, float, float]:
        """The highest corner, metres."""
        x, y, z = (low + side * self.cell_m for low, side in zip(self.origin, self.shape, strict=True))
        return x, y, z

    @property
    def turns(self) -> bool:
        """Whether a quarter turn about z maps cells onto cells: as long as wide, and the sensor in the middle."""
        middle = [self.origin[axis] + self.shape[axis] * self.cell_m / 2 for axis in (0, 1)]
        return self.shape[0] == self.shape[1] and max(abs(value) for value in middle) <= 1e-6 * self.cell_m * self.shape[0]

    def keys(self, index: NDArray[np.integer]) -> NDArray[np.int64]:
        """(M,) int64 keys ``(x * Y + y) * Z + z`` of (M, 3) cells; they rise in the order of x, then y, then z."""
        keys = index[:, 0].astype(np.int64)
        for axis in (1, 2):
            keys *= self.shape[axis]
            keys += index[:, axis]
        return keys

    def cells_of(self, keys: NDArray[np.integer]) -> NDArray[np.int16]:
        """(M, 3) int16 cells x, y, z of (M,) keys; the inverse of :meth:`keys`."""
        # Quotients by a scalar are vectorised, remainders are not; half the bytes take half the time.
        keys = np.asarray(keys).astype(np.uint32 if self.cells <= 1 << 32 else np.int64)
        column = keys // self.shape[2]
        x = column // self.shape[1]
        out = np.empty((len(keys), 3), np.int16)
        out[:, 0], out[:, 1], out[:, 2] = x, column - x * self.shape[1], keys - column * self.shape[2]
        return out

    def contains(self, points: NDArray[np.floating]) -> NDArray[np.bool_]:
        """(N,) which points (N, 3) lie inside; NaN lies outside."""
        return self.locate(points)[1]

    def locate(self, points: NDArray[np.floating]) -> tuple[NDArray[np.int16], NDArray[np.bool_]]:
        """The cells (M, 3) of those points (N, 3) that lie inside, and (N,) which these are; NaN lies outside."""
        scaled = (np.asarray(points, np.float64) - self.origin) / self.cell_m
        inside: NDArray[np.bool_] = np.all((scaled >= 0) & (scaled < self.shape), axis=1)
        return scaled[inside].astype(np.int16), inside


@dataclass(frozen=True, slots=True, eq=False)
class Occupancy:
    """The occupied cells of one frame, sorted by x, then y, then z, none twice; every other cell is free."""

    index: NDArray[np.int16]  # (M, 3) cells x, y, z
    label: NDArray[np.uint8]  # (M,) class 1..254, or IGNORED
    grid: OccupancyGrid

    def __post_init__(self) -> None:
        if self.index.dtype != np.int16 or self.index.ndim != 2 or self.index.shape[1] != 3:
            raise ValueError(f"occupied cells must be (M, 3) int16, got {self.index.shape} {self.index.dtype}")
        if self.label.dtype != np.uint8 or self.label.shape != (len(self.index),):
            raise ValueError(f"{len(self.index)} occupied cells need as many uint8 labels, got {self.label.shape}")
        if len(self.index) == 0:
            return
        _refuse_outside(self.index, self.grid)
        keys = self.grid.keys(self.index)
        if (keys[1:] <= keys[:-1]).any():
            raise ValueError("occupied cells must be sorted by x, then y, then z, and none may come twice")
        if self.label.min() == FREE:
            raise ValueError(f"label {FREE} means free: such a cell is not listed")

    def __len__(self) -> int:
        return len(self.index)

    @staticmethod
    def empty(grid: OccupancyGrid) -> Occupancy:
        """Nothing is occupied."""
        return Occupancy(np.zeros((0, 3), np.int16), np.zeros(0, np.uint8), grid)

    @staticmethod
    def of_cells(index: NDArray[np.integer], label: NDArray[np.uint8], grid: OccupancyGrid) -> Occupancy:
        """From cells (M, 3) inside the grid in any order.

        Raises:
            ValueError: if a cell lies outside or comes twice, or a label is 0.
        """
        _refuse_outside(index, grid)
        order = np.argsort(grid.keys(index), kind="stable")
        return Occupancy(np.asarray(index, np.int16).reshape(-1, 3)[order], label[order], grid)

    @staticmethod
    def of_dense(dense: NDArray[np.uint8], grid: OccupancyGrid) -> Occupancy:
        """From a (X, Y, Z) uint8 array in which 0 is free.

        Raises:
            ValueError: if its shape is not the grid's.
        """
        if dense.shape != grid.shape:
            raise ValueError(f"the array has shape {dense.shape}, the grid {grid.shape}")
        flat = np.flatnonzero(dense.ravel())
        return Occupancy(grid.cells_of(flat), dense.ravel()[flat].astype(np.uint8), grid)

    def dense(self) -> NDArray[np.uint8]:
        """(X, Y, Z) uint8: the label of every cell, 0 where it is free."""
        out = np.full(self.grid.shape, FREE, np.uint8)
        out.ravel()[self.keys] = self.label
        return out

    @property
    def keys(self) -> NDArray[np.int64]:
        """(M,) int64, rising: see :meth:`OccupancyGrid.keys`."""
        return self.grid.keys(self.index)

    @property
    def centres(self) -> NDArray[np.float64]:
        """(M, 3) float64 middles of the cells in the grid's frame, metres."""
        return (self.index.astype(np.float64) + 0.5) * self.grid.cell_m + np.asarray(self.grid.origin)

    def at(self, points: NDArray[np.floating]) -> NDArray[np.uint8]:
        """(N,) uint8 labels of the cells that points (N, 3) lie in; FREE where the cell is free or outside of the grid."""
        out = np.full(len(points), FREE, np.uint8)
        if len(self) == 0:
            return out
        cells, inside = self.grid.locate(points)
        wanted, known = self.grid.keys(cells), self.keys
        row = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
        out[inside] = np.where(known[row] == wanted, self.label[row], FREE)
        return out

    def moved(self, *, mirror_x: bool = False, mirror_y: bool = False, quarter_turns: int = 0) -> Occupancy:
        """Mirrored, then turned about z by quarter turns counter-clockwise: the motions that lose nothing.

        Args:
            mirror_x: x becomes -x.
            mirror_y: y becomes -y.
            quarter_turns: of 90 degrees, any whole number.

        Raises:
            ValueError: if the grid is not centred on the sensor (or, for odd turns, not square), so that cells would not
                fall on cells.
        """
        middle = [self.grid.origin[axis] + self.grid.shape[axis] * self.grid.cell_m / 2 for axis in (0, 1)]
        turns = quarter_turns % 4
        for axis, needed in ((0, mirror_x or turns > 0), (1, mirror_y or turns > 0)):
            if needed and abs(middle[axis]) > 1e-6 * self.grid.cell_m * self.grid.shape[axis]:
                raise ValueError(f"the grid's middle is {middle} m off the sensor: mirrored cells would not fall on cells")
        if turns % 2 and not self.grid.turns:
            raise ValueError(f"a grid of {self.grid.shape} cells is not square: turned cells would not fall on cells")
        if turns >= 2:
            mirror_x, mirror_y = not mirror_x, not mirror_y  # half a turn
        x, y, z = self.index.T
        last_x, last_y = np.int16(self.grid.shape[0] - 1), np.int16(self.grid.shape[1] - 1)
        x, y = last_x - x if mirror_x else x, last_y - y if mirror_y else y
        if turns % 2:
            x, y = last_y - y, x  # (x, y) -> (-y, x)
        return Occupancy.of_cells(np.stack([x, y, z], axis=1), self.label, self.grid)


def _refuse_outside(index: NDArray[np.integer], grid: OccupancyGrid) -> None:
    # Column by column: numpy is several times slower along a short axis.
    for axis, side in enumerate(grid.shape):
        column = index[:, axis]
        if len(column) and not 0 <= int(column.min()) <= int(column.max()) < side:
            raise ValueError(f"an occupied cell lies outside of the grid of {grid.shape} cells")
