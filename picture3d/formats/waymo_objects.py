"""Waymo's ``Objects`` binaries: the boxes of a submission, or of the labels it is scored against.

Source: the field numbers of waymo-open-dataset's metrics.proto (Objects, Object) and label.proto (Label).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from picture3d.files import whole_file
from picture3d.formats import protobuf_wire as wire

UNKNOWN, VEHICLE, PEDESTRIAN, SIGN, CYCLIST = range(5)

# Columns of the box message by field number: x 1, y 2, z 3, width 4, length 5, height 6, heading 7.
BOX_COLUMN = {1: 0, 2: 1, 3: 2, 5: 3, 4: 4, 6: 5, 7: 6}
_COLUMN_FIELD = {column: number for number, column in BOX_COLUMN.items()}


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
