"""nuScenes-Occupancy labels (OpenOccupancy): one `.npy` per keyframe, a row (z, y, x, class) for every occupied voxel.

Rows (z, y, x, vx, vy, vz, class) are read too; the velocities are left out.
The grid has 512 x 512 x 40 voxels of 0.2 m over [-51.2, 51.2) x [-51.2, 51.2) x [-5, 3) metres in the frame of the LiDAR.
Column order and the meaning of class 0 follow the public loader of OpenOccupancy (`LoadOccupancy`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from picture3d.errors import DataError
from picture3d.files import read_bounded, whole_file
from picture3d.formats.npy import array_of_npy

GRID_SHAPE = (512, 512, 40)  # voxels along x, y, z
GRID_ORIGIN = (-51.2, -51.2, -5.0)  # metres, the lowest corner
VOXEL_SIZE = 0.2  # metres
NOISE = 0  # class of an occupied voxel nobody could name; training and scoring leave it out
IGNORED = 255  # what the public loader turns `NOISE` into
CLASSES = 17  # 0 noise, then the 16 of lidarseg

_VOXELS = GRID_SHAPE[0] * GRID_SHAPE[1] * GRID_SHAPE[2]
# A quarter of all voxels occupied, seven float64 columns, and the header.
_MAX_BYTES = _VOXELS // 4 * 7 * 8 + (1 << 16)
_MEND = "Unpack this file of the nuScenes-Occupancy download again."


@dataclass(frozen=True, slots=True)
class OccupiedVoxels:
    """The occupied voxels of one keyframe, sorted by x, then y, then z; every voxel not named is free."""

    index: NDArray[np.int16]  # (M, 3) x, y, z from the lowest corner of the grid
    label: NDArray[np.uint8]  # (M,) 1..16 as lidarseg, or IGNORED where the file says noise (0) or 255


def read_openoccupancy(path: Path) -> OccupiedVoxels:
    """The occupied voxels in an official `.npy` file; M = 0 is allowed.

    Of a voxel that several rows name, the most frequent class is kept, of equally frequent ones the lowest, as the public
    loader votes.

    Raises:
        DataError: if the file is missing, too large, not a plain numpy array of (M, 4) or (M, 7) numbers, or names a
            voxel outside of the grid or a class that does not exist.
    """
    try:
        rows = array_of_npy(read_bounded(path, max_bytes=_MAX_BYTES))
    except ValueError as error:
        raise DataError(f"{path}: not a whole numpy array of numbers ({error}). {_MEND}") from None
    if rows.ndim != 2 or rows.shape[1] not in (4, 7) or rows.dtype.kind not in "iuf":
        raise DataError(
            f"{path}: expected (M, 4) or (M, 7) numbers z, y, x, ..., class; found {rows.shape} of {rows.dtype}. {_MEND}"
        )
    rows: NDArray[Any] = rows[:, [0, 1, 2, -1]]
    _refuse(path, ~np.isfinite(rows).all(1) | (rows != np.floor(rows)).any(1), "is not four whole numbers")
    limits = np.array(GRID_SHAPE[::-1])
    _refuse(path, ((rows[:, :3] < 0) | (rows[:, :3] >= limits)).any(1), "lies outside of the grid of 40 x 512 x 512 (z, y, x)")
    label = rows[:, 3]
    _refuse(path, (label < 0) | ((label >= CLASSES) & (label != IGNORED)), "has a class that is neither 0..16 nor 255")
    label = np.where(label == NOISE, IGNORED, label).astype(np.int64)
    z, y, x = rows[:, :3].astype(np.int64).T
    voxel = (x * GRID_SHAPE[1] + y) * GRID_SHAPE[2] + z
    votes, count = np.unique(voxel * 256 + label, return_counts=True)
    voxel, label = votes // 256, votes % 256
    order = np.lexsort((label, -count, voxel))
    voxel, first = np.unique(voxel[order], return_index=True)
    index = np.stack(np.unravel_index(voxel, GRID_SHAPE), axis=1)
    return OccupiedVoxels(index.astype(np.int16), label[order][first].astype(np.uint8))


def write_openoccupancy(path: Path, voxels: OccupiedVoxels) -> None:
    """Writes a file as the dataset has them: int32 rows (z, y, x, class), `IGNORED` as noise (0); whole or not at all.

    Raises:
        DataError: if it cannot be written.
    """
    label = np.where(voxels.label == IGNORED, NOISE, voxels.label)
    rows = np.concatenate([voxels.index[:, ::-1], label[:, None]], axis=1, dtype=np.int32)
    with whole_file(path) as file:
        np.lib.format.write_array(file, rows, allow_pickle=False)


def _refuse(path: Path, wrong: NDArray[np.bool_] | np.bool_, what: str) -> None:
    if wrong.any():
        raise DataError(f"{path}: row {int(wrong.argmax())} {what}. {_MEND}")
