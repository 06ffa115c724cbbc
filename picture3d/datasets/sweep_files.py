"""One sweep, its labels, or the poses of many, from a file of the common kinds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from picture3d.errors import DataError
from picture3d.files import read_bounded
from picture3d.formats.pcd import read_pcd
from picture3d.formats.ply import read_ply
from picture3d.formats.point_tables import MAX_FILE_BYTES, MAX_TEXT_BYTES, PointTable, read_bin, read_npy, read_npy_array
from picture3d.structures.points import IntensityUnit, PointCloud
from picture3d.structures.poses import Pose

SWEEP_SUFFIXES = (".bin", ".pcd", ".npy", ".ply")
LABEL_SUFFIXES = (".npy", ".label", ".bin", ".txt")

# Names under which common tools write a column; the first one present is taken.
_INTENSITY = ("intensity", "i", "reflectance", "reflectivity", "remission", "scalar_intensity", "scalar_Intensity")
_RING = ("ring", "laser_number", "laser_id", "channel", "scalar_ring")


def read_points(path: Path, layout: tuple[str, ...], unit: IntensityUnit) -> PointCloud:
    """One sweep file; the suffix says which kind. Non-finite points are still there.

    Raises:
        DataError: if the file is damaged or has no x, y, z.
    """
    match path.suffix.lower():
        case ".bin":
            table = read_bin(path, layout)
        case ".npy":
            table = read_npy(path, layout)
        case ".pcd":
            table = read_pcd(path)
        case ".ply":
            table = read_ply(path)
        case other:
            raise DataError(
                f"{path}: '{other}' is none of {', '.join(SWEEP_SUFFIXES)}. Convert it, or move it out of the folder."
            )
    absent = [axis for axis in "xyz" if axis not in table]
    if absent:
        raise DataError(
            f"{path}: has no column {', '.join(absent)} (its columns: {', '.join(table) or 'none'}). Rename its columns, or "
            "store it again with x, y and z."
        )
    with np.errstate(over="ignore", invalid="ignore"):  # what becomes infinite is counted and left out later
        xyz = np.stack([table[axis].astype(np.float32) for axis in "xyz"], axis=1)
        intensity = _column(table, _INTENSITY, np.float32)
        ring = _column(table, _RING, np.float32)
        return PointCloud(
            xyz=xyz,
            intensity=np.zeros(len(xyz), np.float32) if intensity is None else intensity,
            intensity_unit=unit if intensity is not None else IntensityUnit.UNIT,
            ring=None if ring is None else np.nan_to_num(np.clip(ring, -1, 32767), nan=-1).astype(np.int16),
            elongation=_column(table, ("elongation",), np.float32),
            time_s=_column(table, ("time_s",), np.float32),
        )


def read_labels(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint16] | None]:
    """(N,) class ids and, from ``.label`` files, (N,) instance ids.

    Raises:
        DataError: if the file is damaged, or a class id is not in 0..255.
    """
    instances = None
    match path.suffix.lower():
        case ".npy":
            labels = read_npy_array(path)
        case ".label":
            data = read_bounded(path, max_bytes=MAX_FILE_BYTES)
            if len(data) % 4:
                raise DataError(f"{path}: {len(data)} bytes are no whole number of uint32; the file is cut off. Copy it again.")
            both = np.frombuffer(data, "<u4")
            labels, instances = both & 0xFFFF, (both >> 16).astype(np.uint16)
        case ".bin":
            labels = np.frombuffer(read_bounded(path, max_bytes=MAX_FILE_BYTES), np.uint8)
        case _:
            try:
                labels = np.array(read_bounded(path, max_bytes=MAX_TEXT_BYTES).split(), dtype=np.float64)
            except ValueError as error:
                raise DataError(f"{path}: holds something else than integers ({error}). Save them as integers.") from None
    if labels.ndim != 1 or labels.dtype.kind not in "fiu":
        raise DataError(f"{path}: holds {labels.dtype} {labels.shape}, expected one integer per point. Save them as such.")
    with np.errstate(invalid="ignore"):
        classes = labels.astype(np.uint8)
    wrong = np.flatnonzero(classes != labels)
    if len(wrong):
        raise DataError(
            f"{path}: label {labels[wrong[0]]} of point {wrong[0]} is not an integer in 0..255; map the labels first."
        )
    return classes, instances


def read_poses(path: Path) -> list[Pose]:
    """Poses of a text file, one per line: 12 numbers, rotation and translation row by row.

    Rotations are made orthonormal again, since text keeps few digits.

    Raises:
        DataError: naming the line that is not a rigid transform.
    """
    found = []
    for number, line in enumerate(read_bounded(path, max_bytes=MAX_TEXT_BYTES).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            matrix = np.array([float(word) for word in line.replace(b",", b" ").split()]).reshape(3, 4)
        except ValueError as error:
            raise DataError(
                f"{path}, line {number}: expected 12 numbers ({error}). Write the upper three rows of the 4 x 4 matrix "
                "global_from_lidar in each line."
            ) from None
        rotation = matrix[:, :3]
        if (
            not np.isfinite(matrix).all()
            or np.abs(rotation @ rotation.T - np.eye(3)).max() > 1e-2
            or np.linalg.det(rotation) < 0
        ):
            raise DataError(
                f"{path}, line {number}: is not a rotation and a translation (rows of a 3 x 4 matrix). Correct it: "
                "global_from_lidar, row by row."
            )
        u, _, vt = np.linalg.svd(rotation)
        found.append(Pose(u @ vt, matrix[:, 3]))
    return found


def _column(table: PointTable, names: tuple[str, ...], dtype: type[np.float32]) -> NDArray[np.float32] | None:
    found = next((table[name] for name in names if name in table), None)
    return None if found is None else found.astype(dtype)
