"""Waymo's ``Objects`` binaries: the boxes of a submission, or of the labels it is scored against.

Source: the field numbers of waymo-open-dataset's metrics.proto (Objects, Object) and label.proto (Label).
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from picture3d.errors import DataError
from picture3d.files import whole_file
from picture3d.formats import protobuf_wire as wire

_ROWS_AT_ONCE = 1 << 16  # turned into columns together: a parsed row takes ten times the memory

UNKNOWN, VEHICLE, PEDESTRIAN, SIGN, CYCLIST = range(5)

# Columns of the box message by field number: x 1, y 2, z 3, width 4, length 5, height 6, heading 7.
_BOX_COLUMN = {1: 0, 2: 1, 3: 2, 5: 3, 4: 4, 6: 5, 7: 6}
_COLUMN_FIELD = {column: number for number, column in _BOX_COLUMN.items()}


@dataclass(frozen=True, slots=True, eq=False)
class WaymoObjects:
    """N boxes of many frames; every column has N rows. Boxes lie in the vehicle frame of their own frame."""

    box: NDArray[np.float64]  # (N, 7) x, y, z of the centre, length, width, height in metres; heading in radians, CCW from x
    kind: NDArray[np.int8]  # (N,) 0 unknown, 1 vehicle, 2 pedestrian, 3 sign, 4 cyclist
    score: NDArray[np.float32]  # (N,) confidence; 1 where the file gives none
    context: tuple[str, ...]  # (N,) name of the segment
    timestamp: NDArray[np.int64]  # (N,) microseconds
    camera: NDArray[np.int8]  # (N,) camera of a 2-D box; 0 where not set
    num_points: NDArray[np.int32]  # (N,) LiDAR points in the box; 0 where the file gives none
    difficulty: NDArray[np.int8]  # (N,) detection difficulty level, 1 or 2; 0 where not set
    overlaps_no_label_zone: NDArray[np.bool_]  # (N,)
    track_id: tuple[str, ...]  # (N,) "" where not set

    def __post_init__(self) -> None:
        count = len(self.context)
        for field in fields(self):
            column = getattr(self, field.name)
            if len(column) != count:
                raise ValueError(f"{field.name} has {len(column)} rows, expected {count}")
        if self.box.shape != (count, 7):
            raise ValueError(f"box has shape {self.box.shape}, expected {(count, 7)}")

    def __len__(self) -> int:
        return len(self.context)


def make_objects(
    box: NDArray[np.float64],
    kind: NDArray[np.integer],
    context: str,
    timestamp: int,
    *,
    score: NDArray[np.floating] | None = None,
    num_points: NDArray[np.integer] | None = None,
    difficulty: NDArray[np.integer] | None = None,
) -> WaymoObjects:
    """The boxes of one frame as :class:`WaymoObjects`; what is not given is 1 (score) or not set."""
    count = len(box)
    return WaymoObjects(
        box=np.asarray(box, dtype=np.float64).reshape(count, 7),
        kind=np.asarray(kind, dtype=np.int8),
        score=np.ones(count, dtype=np.float32) if score is None else np.asarray(score, dtype=np.float32),
        context=(context,) * count,
        timestamp=np.full(count, timestamp, dtype=np.int64),
        camera=np.zeros(count, dtype=np.int8),
        num_points=np.zeros(count, dtype=np.int32) if num_points is None else np.asarray(num_points, dtype=np.int32),
        difficulty=np.zeros(count, dtype=np.int8) if difficulty is None else np.asarray(difficulty, dtype=np.int8),
        overlaps_no_label_zone=np.zeros(count, dtype=np.bool_),
        track_id=("",) * count,
    )


def read_objects(path: Path) -> WaymoObjects:
    """Reads an ``Objects`` file; fields not named in :class:`WaymoObjects`, and boxes of no-label zones, are passed over.

    Raises:
        DataError: naming the file and the byte, if the file is missing, cut off or not an ``Objects`` file.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    return parse_objects(data, str(path))


def parse_objects(data: bytes, where: str = "objects") -> WaymoObjects:
    """As :func:`read_objects`, from bytes; `where` names them in errors."""
    reader = wire.Reader(data, where)
    found = (_parse_object(reader, field) for field in reader.fields() if field.number == 1)
    parts = [_columns(rows) for rows in iter(lambda: list(itertools.islice(found, _ROWS_AT_ONCE)), [])] or [_columns([])]
    joined: dict[str, Any] = {}
    for field in fields(WaymoObjects):
        columns = [getattr(part, field.name) for part in parts]
        texts = isinstance(columns[0], tuple)
        joined[field.name] = tuple(itertools.chain.from_iterable(columns)) if texts else np.concatenate(columns)
    return WaymoObjects(**joined)


def _columns(rows: list[_Row]) -> WaymoObjects:
    count = len(rows)
    return WaymoObjects(
        box=np.array([row.box for row in rows], dtype=np.float64).reshape(count, 7),
        kind=np.array([row.kind for row in rows], dtype=np.int8),
        score=np.array([row.score for row in rows], dtype=np.float32),
        context=tuple(row.context for row in rows),
        timestamp=np.array([row.timestamp for row in rows], dtype=np.int64),
        camera=np.array([row.camera for row in rows], dtype=np.int8),
        num_points=np.array([row.num_points for row in rows], dtype=np.int32),
        difficulty=np.array([row.difficulty for row in rows], dtype=np.int8),
        overlaps_no_label_zone=np.array([row.overlaps for row in rows], dtype=np.bool_),
        track_id=tuple(row.track_id for row in rows),
    )


def write_objects(path: Path, objects: WaymoObjects | Iterable[WaymoObjects]) -> None:
    """Writes an ``Objects`` file, whole or not at all; columns that are not set (0, "") are left out.

    `objects` may be a generator of parts: no more than one of them is in memory.

    Raises:
        DataError: if the file cannot be written.
    """
    with whole_file(path) as file:
        for part in (objects,) if isinstance(objects, WaymoObjects) else objects:
            for row in range(len(part)):
                file.write(wire.write_data(1, _object_bytes(part, row)))


@dataclass(slots=True)
class _Row:
    box: list[float]
    kind: int = 0
    score: float = 1.0
    context: str = ""
    timestamp: int = 0
    camera: int = 0
    num_points: int = 0
    difficulty: int = 0
    overlaps: bool = False
    track_id: str = ""


def _parse_object(reader: wire.Reader, field: wire.Field) -> _Row:
    row = _Row([0.0] * 7)
    labelled = False
    for part in reader.message(field):
        match part.number:
            case 1:
                labelled = True
                _parse_label(reader, part, row)
            case 2:
                row.score = reader.float(part)
            case 3:
                row.overlaps = bool(reader.unsigned(part))
            case 4:
                row.context = sys.intern(reader.text(part))  # one text for all boxes of a segment
            case 5:
                row.timestamp = reader.signed(part)
            case 6:
                row.camera = _small(reader, part)
    if not labelled:
        raise DataError(f"{reader.where}: the object at byte {field.start} has no label; is this an Objects file?")
    return row


def _parse_label(reader: wire.Reader, label: wire.Field, row: _Row) -> None:
    for part in reader.message(label):
        match part.number:
            case 1:
                for value in reader.message(part):
                    if value.number in _BOX_COLUMN:
                        row.box[_BOX_COLUMN[value.number]] = reader.double(value)
            case 3:
                row.kind = _small(reader, part)
            case 4:
                row.track_id = reader.text(part)
            case 5:
                row.difficulty = _small(reader, part)
            case 7:
                row.num_points = _small(reader, part, 2**31)


def _small(reader: wire.Reader, field: wire.Field, bound: int = 128) -> int:
    value = reader.signed(field)
    if not -bound <= value < bound:
        raise DataError(f"{reader.where}: field {field.number} at byte {field.start} holds {value}; the file is damaged")
    return value


def _object_bytes(objects: WaymoObjects, row: int) -> bytes:
    box = b"".join(wire.write_double(_COLUMN_FIELD[column], float(value)) for column, value in enumerate(objects.box[row]))
    label = [wire.write_data(1, box), wire.write_integer(3, int(objects.kind[row]))]
    if objects.track_id[row]:
        label.append(wire.write_data(4, objects.track_id[row].encode()))
    if objects.difficulty[row]:
        label.append(wire.write_integer(5, int(objects.difficulty[row])))
    if objects.num_points[row]:
        label.append(wire.write_integer(7, int(objects.num_points[row])))
    parts = [wire.write_data(1, b"".join(label)), wire.write_float(2, float(objects.score[row]))]
    if objects.overlaps_no_label_zone[row]:
        parts.append(wire.write_integer(3, 1))
    parts.append(wire.write_data(4, objects.context[row].encode()))
    parts.append(wire.write_integer(5, int(objects.timestamp[row])))
    if objects.camera[row]:
        parts.append(wire.write_integer(6, int(objects.camera[row])))
    return b"".join(parts)
