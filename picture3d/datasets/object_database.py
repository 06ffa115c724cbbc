"""A database of annotated objects with their points, made from prepared frames: ``PREPARED/objects/<name>.objects``.

One file: a 24-byte head, a JSON description, then every column as one uncompressed little-endian array, so that it is mapped
into memory and shared by all loading processes. The description carries a CRC-32C per column, every object one of its points.

`object_building` makes it. One under a URL is fetched whole (`formats.remote`) and mapped from this machine's cache.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from picture3d.datasets.detection_classes import DetectionClasses
from picture3d.datasets.object_parts import (
    POINT_COLUMNS,
)
from picture3d.datasets.prepared import FrameKey, check_log_name
from picture3d.errors import DataError
from picture3d.formats.remote import remote_folder
from picture3d.structures.points import IntensityUnit

DATABASE_VERSION = 1
MAGIC = b"P3DOBJ\r\n"
HEAD = struct.Struct("<8sIIII")  # magic, version, length of the description, its CRC-32C, CRC of the 20 bytes before
_MAX_DESCRIPTION = 1 << 26
_ALIGNMENT = 64
UNITS = tuple(IntensityUnit)
_LOOK = "Look at its permissions and the disk."
_MEND = "The file is damaged: delete it and run `picture3d data objects` again."

# One row per object; the columns of points are those of `object_parts.POINT_COLUMNS`, one row per point.
OBJECT_COLUMNS: dict[str, tuple[str, int]] = {
    "box": ("<f8", 9),  # x y z l w h (m), yaw (rad), vx vy (m/s, NaN where unknown): LiDAR frame of the keyframe
    "first": ("<i8", 1),  # row of its first point
    "count": ("<u4", 1),  # points
    "category": ("<u2", 1),  # row in `ObjectDatabase.categories`
    "difficulty": ("|i1", 1),  # as annotated; -1 where the dataset tells none
    "unit": ("|u1", 1),  # of the intensity: row in the members of `IntensityUnit`
    "log": ("<u4", 1),  # row in `ObjectDatabase.logs`
    "frame": ("<u4", 1),  # index of the keyframe in its log
    "crc32c": ("<u4", 1),  # of its points, column after column
}


@dataclass(frozen=True, slots=True, eq=False)
class StoredObject:
    """One object as it was seen in its keyframe; P points."""

    row: int  # in the database
    box: NDArray[np.float64]  # (9,) x y z l w h (m), yaw (rad), vx vy (m/s, NaN where unknown), LiDAR frame
    category: str
    difficulty: int  # -1 where the dataset tells none
    log: str
    frame: int
    xyz: NDArray[np.float32]  # (P, 3) float32, metres from the box's centre, axes of the LiDAR frame: not turned by the yaw
    intensity: NDArray[np.float32]  # (P,) float32, in `unit`
    unit: IntensityUnit
    time_lag: NDArray[np.float32]  # (P,) float32, seconds before the keyframe; 0 for its own points
    elongation: NDArray[np.float32] | None  # (P,) float32

    @property
    def points_lidar_m(self) -> NDArray[np.float32]:
        """(P, 3) float32 points in the LiDAR frame, where they were measured."""
        return (self.xyz.astype(np.float64) + self.box[:3]).astype(np.float32)


class ObjectDatabase:
    """Reads a database. The columns are mapped, not read; it can be sent to another process and is opened anew there."""

    def __init__(self, path: Path) -> None:
        """Opens a database, checks its description and the columns of the objects (not those of the points).

        Raises:
            DataError: if the file is missing, of another version, cut off or damaged.
        """
        self.path = Path(path)
        self._open()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.path = state["path"]
        self._open()

    def __len__(self) -> int:
        return len(self.count)

    @property
    def has_elongation(self) -> bool:
        """Whether the points have an elongation."""
        return "elongation" in self._columns

    @property
    def has_difficulty(self) -> bool:
        """Whether any object was annotated with a difficulty."""
        return bool((self.difficulty >= 0).any())

    @property
    def box(self) -> NDArray[np.float64]:
        """(n, 9) float64, mapped: see `StoredObject.box`."""
        return self._columns["box"]

    @property
    def count(self) -> NDArray[np.uint32]:
        """(n,) uint32, mapped: points of each object."""
        return self._columns["count"]

    @property
    def category(self) -> NDArray[np.uint16]:
        """(n,) uint16, mapped: row of each object in `categories`."""
        return self._columns["category"]

    @property
    def difficulty(self) -> NDArray[np.int8]:
        """(n,) int8, mapped: as annotated; -1 where the dataset tells none."""
        return self._columns["difficulty"]

    def classes(self, classes: DetectionClasses) -> NDArray[np.int64]:
        """(n,) int64: 1-based training class of each object, 0 for what no class stands for."""
        return classes.of(self.categories)[self.category] if self.categories else np.zeros(len(self), np.int64)

    def cut_from(self, frames: Iterable[FrameKey]) -> NDArray[np.bool_]:
        """(n,) bool: which objects were cut out of these keyframes."""
        number = {log: row for row, log in enumerate(self.logs)}
        wanted = [(number[key.log] << 32) | key.index for key in frames if key.log in number]
        of_object = (self._columns["log"].astype(np.int64) << 32) | self._columns["frame"].astype(np.int64)
        return np.isin(of_object, np.array(wanted, np.int64))

    def object(self, row: int) -> StoredObject:
        """One object; only its own bytes are touched, and checked.

        Raises:
            DataError: if its points do not match their checksum; the message names the byte.
        """
        columns = self._columns
        first, count = int(columns["first"][row]), int(columns["count"][row])
        points = {name: columns[name][first : first + count] for name in POINT_COLUMNS if name in columns}
        if len(points["xyz"]) != count or crc_of(list(points.values())) != int(columns["crc32c"][row]):
            offset = self._told.columns["xyz"].offset + 12 * first
            raise DataError(
                f"{self.path}: the points of object {row} (xyz at byte {offset}) do not match their checksum. {_MEND}"
            )
        return StoredObject(
            row=row,
            box=np.array(columns["box"][row]),
            category=self.categories[int(columns["category"][row])],
            difficulty=int(columns["difficulty"][row]),
            log=self.logs[int(columns["log"][row])],
            frame=int(columns["frame"][row]),
            xyz=np.array(points["xyz"]),
            intensity=np.array(points["intensity"]),
            unit=UNITS[int(columns["unit"][row])],
            time_lag=np.array(points["time_lag"]) if "time_lag" in points else np.zeros(count, np.float32),
            elongation=np.array(points["elongation"]) if "elongation" in points else None,
        )

    def verify(self) -> None:
        """Reads every column and compares it with its checksum, in bounded memory.

        Raises:
            DataError: for the first column that is damaged.
        """
        for name in self._columns:
            self._check_column(name)

    def _open(self) -> None:
        remote = remote_folder(self.path.parent)
        if remote is None:
            try:
                with self.path.open("rb") as file:
                    told = _describe(file, self.path)
            except FileNotFoundError:
                raise DataError(
                    f"{self.path}: no such database. Make it with `picture3d data objects PREPARED --sweeps N`, N being "
                    "data.sweeps, or paste nothing: data.objects=null."
                ) from None
            except OSError as error:
                raise DataError(
                    f"{self.path}: cannot be read ({error.strerror or error}). Look at its permissions and the disk."
                ) from error
            self._columns = _map_columns(self.path, told)
        else:
            name = self.path.name
            told = remote.begin(name, lambda file: _describe(file, self.path))
            kept = f"objects-{self.path.stem}.{told.crc32c:08x}"
            check = partial(_check_columns, told=told, path=self.path)
            self._columns = remote.open(name, kept, told.bytes, lambda path: _map_columns(path, told), check)
        self._told = told
        self.identity, self.sweeps, self.categories, self.logs = told.identity, told.sweeps, told.categories, told.logs
        self.points, self.skipped_boxes = told.points, told.skipped_boxes
        for name in OBJECT_COLUMNS:
            self._check_column(name)
        for name, limit in (("category", len(self.categories)), ("log", len(self.logs)), ("unit", len(UNITS))):
            column = self._columns[name]
            if len(column) and int(column.max()) >= limit:
                raise DataError(f"{self.path}: column {name} names row {int(column.max())} of {limit}. {_MEND}")

    def _check_column(self, name: str) -> None:
        _check_columns({name: self._columns[name]}, told=self._told, path=self.path)


@dataclass(frozen=True, slots=True)
class _Description:
    """What stands at the beginning of the file."""

    identity: dict[str, Any]
    sweeps: int
    categories: tuple[str, ...]
    logs: tuple[str, ...]
    points: int
    skipped_boxes: int
    columns: dict[str, Place]
    crcs: dict[str, int]
    bytes: int  # of the whole file
    crc32c: int  # of the description, which holds the checksums of all columns


def _describe(file: BinaryIO, path: Path) -> _Description:
    """Reads the head and the description at the beginning of a file; `path` is what errors call it."""
    head = file.read(HEAD.size)
    if len(head) < HEAD.size or head[:8] != MAGIC:
        raise DataError(f"{path}: not a database of objects. Make one with `picture3d data objects PREPARED`.")
    _, version, length, crc, own_crc = HEAD.unpack(head)
    if own_crc != google_crc32c.value(head[:20]) or length > _MAX_DESCRIPTION:
        raise DataError(f"{path}: the head at byte 0 does not match its checksum. {_MEND}")
    if version != DATABASE_VERSION:
        raise DataError(
            f"{path}: version {version}, this picture3d reads version {DATABASE_VERSION}. Run `picture3d data objects` again."
        )
    text = file.read(length)
    if google_crc32c.value(text) != crc:
        raise DataError(f"{path}: the description at byte {HEAD.size} does not match its checksum. {_MEND}")
    try:
        tree = json.loads(text)
        identity: dict[str, Any] = tree["identity"]
        points, crcs = int(tree["points"]), tree["columns"]
        columns = layout(int(tree["objects"]), points, HEAD.size + length, [str(name) for name in crcs])
        told = _Description(
            identity=identity,
            sweeps=int(identity["sweeps"]),
            categories=tuple(str(name) for name in tree["categories"]),
            logs=tuple(str(name) for name in tree["logs"]),
            points=points,
            skipped_boxes=int(tree["skipped_boxes"]),
            columns=columns,
            crcs={name: int(crcs[name], 16) for name in columns},
            bytes=max((place.offset + place.bytes for place in columns.values()), default=0),
            crc32c=crc,
        )
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError, AttributeError) as error:
        raise DataError(f"{path}: the description lacks or garbles {error}. {_MEND}") from None
    missing = sorted((OBJECT_COLUMNS.keys() | {"xyz", "intensity"}) - columns.keys())
    if missing:
        raise DataError(f"{path}: the description lacks the columns {', '.join(missing)}. {_MEND}")
    return told


def _map_columns(path: Path, told: _Description) -> dict[str, Any]:
    """The columns of a whole file on this machine."""
    try:
        size = path.stat().st_size
        if size != told.bytes:
            raise DataError(f"{path}: holds {size} bytes where its description says {told.bytes}; it is cut off. {_MEND}")
        columns: dict[str, Any] = {}
        for name, place in told.columns.items():
            empty = 0 in place.shape  # an empty array cannot be mapped
            columns[name] = (
                np.zeros(place.shape, place.dtype)
                if empty
                else np.memmap(path, place.dtype, "r", place.offset, place.shape).view(np.ndarray)
            )
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}). {_LOOK}") from error
    return columns


def _check_columns(columns: Mapping[str, Any], *, told: _Description, path: Path) -> None:
    for name, column in columns.items():
        if crc_of([column]) != told.crcs[name]:
            at = told.columns[name].offset
            raise DataError(f"{path}: column {name} at byte {at} does not match its checksum. {_MEND}")


def database_path(root: Path, name: str) -> Path:
    """Where the database `name` of the prepared frames in `root` is."""
    return root / "objects" / f"{check_log_name(name)}.objects"


def databases_of(root: Path) -> list[str]:
    """Names of the finished databases of the prepared frames in `root`, sorted."""
    return sorted(path.stem for path in (root / "objects").glob("*.objects"))


@dataclass(frozen=True, slots=True)
class Place:
    """Where a column is."""

    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def bytes(self) -> int:
        """Bytes the column takes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def layout(objects: int, points: int, start: int, names: Sequence[str]) -> dict[str, Place]:
    """The columns one after the other from byte `start` on, each at a multiple of `_ALIGNMENT`."""
    if objects < 0 or points < 0:
        raise ValueError(f"{objects} objects and {points} points")
    places = {}
    for name in names:
        dtype, width = (OBJECT_COLUMNS | POINT_COLUMNS)[name]
        rows = objects if name in OBJECT_COLUMNS else points
        start = -(-start // _ALIGNMENT) * _ALIGNMENT
        places[name] = Place(dtype, (rows, width) if width > 1 else (rows,), start)
        start += places[name].bytes
    return places


def crc_of(columns: Sequence[NDArray[np.generic]]) -> int:
    """CRC-32C of the columns' bytes, one column after the other, in pieces."""
    crc, piece = 0, 1 << 20
    for column in columns:
        for start in range(0, len(column), piece):
            crc = google_crc32c.extend(crc, np.ascontiguousarray(column[start : start + piece]).tobytes())
    return crc
