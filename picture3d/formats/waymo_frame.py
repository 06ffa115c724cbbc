"""One ``Frame`` of the Waymo Open Dataset v1.x (perception), read by field number: LiDARs, labels and poses, no images.

Source: the field numbers of waymo-open-dataset's dataset.proto (Frame, Context, LaserCalibration, Laser, RangeImage, the
Transform, Polygon2dProto) and label.proto (Label). Fields that are not named here are stepped over without being read, those
of newer versions too. Range images stay compressed (`waymo_matrix`) until they are asked for, one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from picture3d.errors import FETCH_AGAIN, DataError
from picture3d.formats.protobuf_wire import Field, Reader
from picture3d.formats.waymo_matrix import read_pixel_poses, read_range_image, read_segmentation
from picture3d.structures.poses import Pose

TOP, FRONT, SIDE_LEFT, SIDE_RIGHT, REAR = 1, 2, 3, 4, 5
LASER_NAMES = {TOP: "TOP", FRONT: "FRONT", SIDE_LEFT: "SIDE_LEFT", SIDE_RIGHT: "SIDE_RIGHT", REAR: "REAR"}
# Transforms are rotations to float32 or better; what is farther off is another matrix.
_RIGID_TOLERANCE = 1e-3
_BOX_NUMBERS = 7
_INT8, _INT32 = np.iinfo(np.int8).max, np.iinfo(np.int32).max


@dataclass(frozen=True, slots=True, eq=False)
class LaserCalibration:
    """Where a LiDAR sits and how its beams lie."""

    name: int  # 1 TOP, 2 FRONT, 3 SIDE_LEFT, 4 SIDE_RIGHT, 5 REAR
    beam_inclinations: NDArray[np.float64]  # (H,) radians, ascending, bottom row first; (0,) where only the range is given
    inclination_min: float  # radians, lower edge of the lowest row
    inclination_max: float  # radians, upper edge of the highest row
    vehicle_from_laser: Pose

    def inclinations(self, height: int, where: str) -> NDArray[np.float64]:
        """(height,) radians, bottom row first: as given, or the middles of equal parts of the range.

        Raises:
            DataError: (naming `where`) if another number of beams is given, or there is no range.
        """
        if len(self.beam_inclinations):
            if len(self.beam_inclinations) != height:
                raise DataError(
                    f"{where}: the range image has {height} rows, but the calibration gives the inclinations of "
                    f"{len(self.beam_inclinations)} beams. {FETCH_AGAIN}"
                )
            return self.beam_inclinations
        low, high = self.inclination_min, self.inclination_max
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise DataError(
                f"{where}: the calibration gives neither beam inclinations nor a range of them ({low} to {high}). {FETCH_AGAIN}"
            )
        return low + (np.arange(height) + 0.5) / height * (high - low)


class LaserReturn(Protocol):
    """One return of one LiDAR, however it is stored. Errors call it `where`; None where the file has no such image."""

    def read_range_image(self, where: str) -> NDArray[np.float32] | None:
        """See :func:`read_range_image`."""
        ...

    def read_pixel_poses(self, where: str) -> NDArray[np.float32] | None:
        """See :func:`read_pixel_poses`."""
        ...

    def read_segmentation(self, where: str) -> NDArray[np.integer] | None:
        """See :func:`read_segmentation`."""
        ...


class CompressedReturn(NamedTuple):
    """The zlib streams of one return of one LiDAR; empty where the file has none. See the `read_*` functions below."""

    range_image: memoryview  # MatrixFloat (H, W, 4): range, intensity, elongation, in no-label zone
    pose: memoryview  # MatrixFloat (H, W, 6): roll, pitch, yaw, x, y, z of the vehicle when the pixel was measured
    segmentation: memoryview  # MatrixInt32 (H, W, 2): instance, class

    def read_range_image(self, where: str) -> NDArray[np.float32] | None:
        """See :func:`read_range_image`."""
        return read_range_image(self.range_image, where) if len(self.range_image) else None

    def read_pixel_poses(self, where: str) -> NDArray[np.float32] | None:
        """See :func:`read_pixel_poses`."""
        return read_pixel_poses(self.pose, where) if len(self.pose) else None

    def read_segmentation(self, where: str) -> NDArray[np.integer] | None:
        """See :func:`read_segmentation`."""
        return read_segmentation(self.segmentation, where) if len(self.segmentation) else None


@dataclass(frozen=True, slots=True, eq=False)
class LaserLabels:
    """B boxes in the vehicle frame; every column has B rows."""

    center: NDArray[np.float64]  # (B, 3) metres
    size: NDArray[np.float64]  # (B, 3) length, width, height, metres
    heading: NDArray[np.float64]  # (B,) radians, counter-clockwise from x
    kind: NDArray[np.int8]  # (B,) 0 unknown, 1 vehicle, 2 pedestrian, 3 sign, 4 cyclist
    id: tuple[str, ...]  # (B,) the same object keeps it in the segment
    difficulty: NDArray[np.int8]  # (B,) of detection: 1, 2; 0 = not set
    tracking_difficulty: NDArray[np.int8]  # (B,)
    num_points: NDArray[np.int32]  # (B,) of all LiDARs; -1 = not counted
    num_top_points: NDArray[np.int32]  # (B,) of the TOP LiDAR; -1 = not counted
    velocity: NDArray[np.float64]  # (B, 3) metres per second, global axes; NaN = not given, z 0 before v1.3
    acceleration: NDArray[np.float64]  # (B, 3) metres per second squared, global axes; the same

    def __len__(self) -> int:
        return len(self.id)


@dataclass(frozen=True, slots=True, eq=False)
class NoLabelZone:
    """An area of the global frame that was not annotated."""

    id: str
    outline: NDArray[np.float64]  # (n, 2) x, y in metres, not closed


@dataclass(frozen=True, slots=True, eq=False)
class WaymoFrame:
    """What a frame says about its LiDARs. The streams refer to the bytes that were read."""

    context: str  # name of the segment
    timestamp_us: int
    global_from_vehicle: Pose
    calibrations: dict[int, LaserCalibration]  # by LiDAR
    lasers: Mapping[int, tuple[LaserReturn, LaserReturn]]  # by LiDAR: first and second return; empty messages left out
    labels: LaserLabels
    zones: tuple[NoLabelZone, ...]


def read_frame(data: bytes | memoryview, where: str = "frame") -> WaymoFrame:
    """A frame from the payload of its record; `where` is what errors call it, for example file and offset.

    Raises:
        DataError: naming the byte in the record, if the message is damaged, lacks its context, time or pose, or holds a
            transform that is not a rotation and a translation.
    """
    reader = Reader(data, where)
    context, calibrations = "", {}
    timestamp: int | None = None
    pose: Pose | None = None
    lasers: dict[int, tuple[CompressedReturn, CompressedReturn]] = {}
    labels: list[Field] = []
    zones: list[NoLabelZone] = []
    for field in reader.fields():
        match field.number:
            case 1:
                context, calibrations = _context(reader, field)
            case 2:
                timestamp = reader.signed(field)
            case 3:
                pose = _transform(reader, field, "pose")
            case 5:
                # Files whose range images were taken out keep a nameless, empty message for each LiDAR.
                if field.start == field.stop:
                    continue
                name, returns = _laser(reader, field)
                if name in lasers:
                    raise DataError(f"{where}: LiDAR {name} occurs twice, again at byte {field.start}. {FETCH_AGAIN}")
                lasers[name] = returns
            case 6:
                labels.append(field)
            case 7:
                zones.append(_zone(reader, field))
    if not context or timestamp is None or pose is None:
        what = "context name (1.1)" if not context else "timestamp (2)" if timestamp is None else "pose (3)"
        raise DataError(f"{where}: holds no {what}: this is not a Frame of the Waymo Open Dataset v1.x. {FETCH_AGAIN}")
    return WaymoFrame(context, timestamp, pose, calibrations, lasers, _labels(reader, labels), tuple(zones))


def _context(reader: Reader, field: Field) -> tuple[str, dict[int, LaserCalibration]]:
    name, calibrations = "", {}
    for inner in reader.message(field):
        if inner.number == 1:
            name = reader.text(inner)
        elif inner.number == 3:
            calibration = _calibration(reader, inner)
            if calibration.name in calibrations:
                raise DataError(
                    f"{reader.where}: LiDAR {calibration.name} is calibrated twice, again at byte {inner.start}. {FETCH_AGAIN}"
                )
            calibrations[calibration.name] = calibration
    return name, calibrations


def _calibration(reader: Reader, field: Field) -> LaserCalibration:
    name, low, high = 0, math.nan, math.nan
    beams: list[NDArray[np.float64]] = []
    extrinsic: Pose | None = None
    for inner in reader.message(field):
        match inner.number:
            case 1:
                name = reader.signed(inner)
            case 2:
                beams.append(reader.doubles(inner))
            case 3:
                low = reader.double(inner)
            case 4:
                high = reader.double(inner)
            case 5:
                extrinsic = _transform(reader, inner, f"extrinsic of LiDAR {name}")
    if name not in LASER_NAMES or extrinsic is None:
        raise DataError(
            f"{reader.where}: the laser calibration at byte {field.start} is of LiDAR {name}, or has no extrinsic. "
            f"{FETCH_AGAIN}"
        )
    inclinations = np.concatenate([np.zeros(0), *beams])
    if not np.isfinite(inclinations).all():
        raise DataError(
            f"{reader.where}: a beam inclination of LiDAR {name} is not finite, in bytes {field.start} to {field.stop}. "
            f"{FETCH_AGAIN}"
        )
    return LaserCalibration(name, inclinations, low, high, extrinsic)


def _transform(reader: Reader, field: Field, what: str) -> Pose:
    pieces = [reader.doubles(inner) for inner in reader.message(field) if inner.number == 1]
    return pose_of_numbers(np.concatenate([np.zeros(0), *pieces]), f"{reader.where}: the {what} at byte {field.start}")


def pose_of_numbers(values: NDArray[np.float64], place: str) -> Pose:
    """A pose from the numbers of a 4 x 4 matrix, row by row.

    Raises:
        DataError: (naming `place`) if they are not 16, or no rotation and translation.
    """
    if values.size != 16:
        raise DataError(f"{place} has {values.size} numbers, expected the 16 of a 4 x 4 matrix. {FETCH_AGAIN}")
    matrix = values.reshape(4, 4)
    rotation = matrix[:3, :3]
    believable = np.isfinite(values).all() and np.abs(rotation).max() < 1 + _RIGID_TOLERANCE
    off = np.abs(rotation @ rotation.T - np.eye(3)).max() if believable else np.inf
    if not off < _RIGID_TOLERANCE or np.linalg.det(rotation) < 0 or not np.array_equal(matrix[3], [0, 0, 0, 1]):
        raise DataError(f"{place} is not a rotation and a translation. {FETCH_AGAIN}")
    return Pose(rotation, matrix[:3, 3])


def _laser(reader: Reader, field: Field) -> tuple[int, tuple[CompressedReturn, CompressedReturn]]:
    name = 0
    nothing = CompressedReturn(*[memoryview(b"")] * 3)
    returns = [nothing, nothing]
    for inner in reader.message(field):
        if inner.number == 1:
            name = reader.signed(inner)
        elif inner.number in (2, 3):
            streams = {part.number: reader.data(part) for part in reader.message(inner) if part.number in (2, 4, 6)}
            returns[inner.number - 2] = CompressedReturn(*(streams.get(number, memoryview(b"")) for number in (2, 4, 6)))
    if name not in LASER_NAMES:
        raise DataError(f"{reader.where}: LiDAR {name} at byte {field.start} is none of 1 to 5. {FETCH_AGAIN}")
    return name, (returns[0], returns[1])


def _zone(reader: Reader, field: Field) -> NoLabelZone:
    sides: dict[int, list[NDArray[np.float64]]] = {1: [np.zeros(0)], 2: [np.zeros(0)]}
    name = ""
    for inner in reader.message(field):
        if inner.number in sides:
            sides[inner.number].append(reader.doubles(inner))
        elif inner.number == 3:
            name = reader.text(inner)
    x, y = np.concatenate(sides[1]), np.concatenate(sides[2])
    if len(x) != len(y):
        raise DataError(f"{reader.where}: the no-label zone at byte {field.start} has {len(x)} x but {len(y)} y. {FETCH_AGAIN}")
    return NoLabelZone(name, np.stack([x, y], 1))


def _labels(reader: Reader, fields: list[Field]) -> LaserLabels:
    count = len(fields)
    box = np.full((count, _BOX_NUMBERS), np.nan)
    # By field number of Metadata: speed x, y; acceleration x, y; speed z; acceleration z. Older files do not have the last two.
    motion = np.tile([np.nan, np.nan, np.nan, np.nan, 0.0, 0.0], (count, 1))
    integers = np.zeros((count, 5), np.int64)  # type, detection difficulty, tracking difficulty, points, TOP points
    integers[:, 3:] = -1
    column = {3: 0, 5: 1, 6: 2, 7: 3, 13: 4}
    names: list[str] = []
    for row, field in enumerate(fields):
        name = ""
        for inner in reader.message(field):
            if inner.number == 1:
                _doubles_into(reader, reader.message(inner), box[row])
            elif inner.number == 2:
                _doubles_into(reader, reader.message(inner), motion[row])
            elif inner.number in column:
                integers[row, column[inner.number]] = reader.signed(inner)
            elif inner.number == 4:
                name = reader.text(inner)
        names.append(name)
        place = f"{reader.where}: label '{name}' (bytes {field.start} to {field.stop})"
        if not np.isfinite(box[row]).all() or box[row, 3:6].min() < 0:
            raise DataError(f"{place} has a box that lacks a number, or of a negative size. {FETCH_AGAIN}")
        if not ((integers[row, :3] >= 0) & (integers[row, :3] <= _INT8)).all() or (abs(integers[row, 3:]) > _INT32).any():
            raise DataError(f"{place} has a type, difficulty or count that cannot be: {integers[row].tolist()}. {FETCH_AGAIN}")
    return LaserLabels(
        center=box[:, :3],
        size=box[:, [4, 3, 5]],
        heading=box[:, 6],
        kind=integers[:, 0].astype(np.int8),
        id=tuple(names),
        difficulty=integers[:, 1].astype(np.int8),
        tracking_difficulty=integers[:, 2].astype(np.int8),
        num_points=integers[:, 3].astype(np.int32),
        num_top_points=integers[:, 4].astype(np.int32),
        velocity=motion[:, [0, 1, 4]],
        acceleration=motion[:, [2, 3, 5]],
    )


def _doubles_into(reader: Reader, fields: Iterator[Field], row: NDArray[np.float64]) -> None:
    """Writes ``double`` field n into ``row[n - 1]``."""
    for field in fields:
        if field.number <= len(row):
            row[field.number - 1] = reader.double(field)
