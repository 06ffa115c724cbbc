"""The Waymo Open Dataset v2 (perception): one segment as Parquet components, read to the frames of v1.

Layout: ``<split>/<component>/<segment>.parquet``. Rows are keyed by ``key.frame_timestamp_micros`` and ``key.laser_name``;
columns are called ``[<Component>].<field>`` (source: the public definitions in ``waymo_open_dataset/v2/perception``, the files
``base.py``, ``lidar.py``, ``context.py``, ``pose.py`` and ``box.py``). Range images are stored as numbers and a shape. A
segment of v2 becomes the same `WaymoFrame` as its tfrecord, so that points, boxes and classes are made by the same code.

The three components with images (``lidar``, ``lidar_pose``, ``lidar_segmentation``) are read once from begin to end, a few rows
at a time: they must be in order of time, as a whole or LiDAR by LiDAR.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from picture3d.errors import FETCH_AGAIN, DataError
from picture3d.formats.parquet import open_parquet, read_parquet, refuse_absurd, rows_of
from picture3d.formats.waymo_frame import (
    LASER_NAMES,
    LaserCalibration,
    LaserLabels,
    LaserReturn,
    WaymoFrame,
    pose_of_numbers,
)
from picture3d.formats.waymo_matrix import MAX_PIXELS, POSE_CHANNELS, RANGE_CHANNELS, SEGMENTATION_CHANNELS
from picture3d.structures.poses import Pose

SUFFIX = ".parquet"
LIDAR, LIDAR_POSE, SEGMENTATION = "lidar", "lidar_pose", "lidar_segmentation"
CALIBRATION, VEHICLE_POSE, BOX = "lidar_calibration", "vehicle_pose", "lidar_box"
REQUIRED = (LIDAR, LIDAR_POSE, CALIBRATION, VEHICLE_POSE)
_NAME, _TIME, _LASER = "key.segment_context_name", "key.frame_timestamp_micros", "key.laser_name"
# Rows decoded at a time: the five LiDARs of a frame, 20 MB.
_BATCH = 5
_INT8, _INT32 = np.iinfo(np.int8).max, np.iinfo(np.int32).max


@dataclass(frozen=True, slots=True, eq=False)
class _Images:
    """What a component stores: the images of one or two returns, and their number type."""

    prefix: str
    channels: int
    returns: int
    dtype: type[np.float32] | type[np.int32]

    @property
    def columns(self) -> list[str]:
        return [f"{self.prefix}.range_image_return{i + 1}.{part}" for i in range(self.returns) for part in ("values", "shape")]


_COMPONENTS = {
    LIDAR: _Images("[LiDARComponent]", RANGE_CHANNELS, 2, np.float32),
    LIDAR_POSE: _Images("[LiDARPoseComponent]", POSE_CHANNELS, 1, np.float32),
    SEGMENTATION: _Images("[LiDARSegmentationLabelComponent]", SEGMENTATION_CHANNELS, 2, np.int32),
}


@dataclass(frozen=True, slots=True, eq=False)
class StoredReturn:
    """One return of one LiDAR; None where there is no such image. See :class:`picture3d.formats.waymo_frame.LaserReturn`."""

    range_image: NDArray[np.float32] | None  # (H, W, 4)
    pixel_poses: NDArray[np.float32] | None  # (H, W, 6)
    segmentation: NDArray[np.int32] | None  # (H, W, 2)

    def read_range_image(self, where: str) -> NDArray[np.float32] | None:
        """Range, intensity, elongation, no-label zone."""
        return self.range_image

    def read_pixel_poses(self, where: str) -> NDArray[np.float32] | None:
        """Roll, pitch, yaw, x, y, z of the vehicle."""
        return self.pixel_poses

    def read_segmentation(self, where: str) -> NDArray[np.integer] | None:
        """Instance and class."""
        return self.segmentation


def component_file(folder: Path, component: str, segment: str) -> Path:
    """Where a component of a segment is; `folder` is that of the split."""
    return folder / component / f"{segment}{SUFFIX}"


def frame_count(folder: Path, segment: str) -> int:
    """Frames of a segment, by the footer of its ``vehicle_pose``.

    Raises:
        ConfigError: if pyarrow is not installed.
        DataError: if that component is missing or damaged.
    """
    return rows_of(component_file(folder, VEHICLE_POSE, segment))


def read_segment(folder: Path, segment: str) -> Iterator[WaymoFrame]:
    """The frames of a segment in order of time, one in memory at a time.

    ``lidar_box`` and ``lidar_segmentation`` may be absent; where there is a folder ``lidar_box``, it must have the segment.
    Frames have no `zones`: v2 tells them per pixel only.

    Raises:
        ConfigError: if pyarrow is not installed.
        DataError: naming file, row and column, if a component is missing, damaged, of another segment, or contradicts another.
    """
    poses = _vehicle_poses(component_file(folder, VEHICLE_POSE, segment), segment)
    calibrations = _calibrations(component_file(folder, CALIBRATION, segment))
    labels = _Labels(component_file(folder, BOX, segment)) if (folder / BOX).is_dir() else None
    images = {name: ImageRows(component_file(folder, name, segment), name) for name in (LIDAR, LIDAR_POSE)}
    if component_file(folder, SEGMENTATION, segment).is_file():
        images[SEGMENTATION] = ImageRows(component_file(folder, SEGMENTATION, segment), SEGMENTATION)
    for component in images.values():
        component.refuse_other_times(poses)
    if labels is not None:
        labels.refuse_other_times(poses)
    for time, pose in poses.items():
        taken = {name: component.take(time) for name, component in images.items()}
        lasers: dict[int, tuple[LaserReturn, LaserReturn]] = {}
        for laser, returns in taken[LIDAR].items():
            pixel_poses = taken[LIDAR_POSE].get(laser, (None,))[0]
            classes = taken.get(SEGMENTATION, {}).get(laser, (None, None))
            first, second = (
                StoredReturn(returns[i], pixel_poses if i == 0 else None, classes[i]) for i in range(2)
            )  # fmt: skip
            lasers[laser] = (first, second)
        found = _no_labels() if labels is None else labels.at(time)
        yield WaymoFrame(segment, time, pose, calibrations, lasers, found, ())


class ImageRows:
    """The images of a component, taken frame by frame in order of time; a few rows are in memory, never a row group.

    `take` raises DataError naming file, row and column if an image is damaged or larger than is believed.
    """

    def __init__(self, path: Path, name: str) -> None:
        """Reads the keys of all rows; `name` is that of a component with images, ``lidar`` for example.

        Raises:
            ConfigError: if pyarrow is not installed.
            DataError: if the file is missing or damaged, or its rows are in no order of time.
        """
        self._path, self._images = path, _COMPONENTS[name]
        keys = read_parquet(path, {_TIME: "i", _LASER: "i"})
        self._times, lasers = keys[_TIME], keys[_LASER]
        strange = sorted(set(lasers.tolist()) - LASER_NAMES.keys())
        if strange:
            raise DataError(f"{path}: LiDAR {strange[0]} is none of 1 to 5. {FETCH_AGAIN}")
        present = sorted(set(lasers.tolist()))
        groups = [present] if (np.diff(self._times) >= 0).all() else [[laser] for laser in present]
        for laser in present:
            wrong = np.flatnonzero(np.diff(self._times[lasers == laser]) <= 0)
            if len(wrong):
                row = np.flatnonzero(lasers == laser)[wrong[0] + 1]
                raise DataError(
                    f"{path}, row {row}: LiDAR {laser} is not in order of time there, or occurs twice. {FETCH_AGAIN}"
                )
        self._streams = [_Ahead(self._rows(group)) for group in groups]

    def refuse_other_times(self, frames: dict[int, Pose]) -> None:
        """Every row must belong to a frame."""
        for time in self._times.tolist():
            if time not in frames:
                raise DataError(f"{self._path}: a row of time {time} us, at which {VEHICLE_POSE} has no frame. {FETCH_AGAIN}")

    def take(self, time: int) -> dict[int, tuple[NDArray[Any] | None, ...]]:
        """LiDAR -> the images of its returns at that time; to be asked in order of time."""
        found: dict[int, tuple[NDArray[Any] | None, ...]] = {}
        for stream in self._streams:
            while stream.head is not None and stream.head[0] == time:
                _, laser, images = stream.head
                found[laser] = images
                stream.advance()
        return found

    def _rows(self, lasers: Sequence[int]) -> Iterator[tuple[int, int, tuple[NDArray[Any] | None, ...]]]:
        columns = self._images.columns
        with open_parquet(self._path, [_TIME, _LASER, *columns]) as file:
            refuse_absurd(self._path, columns, MAX_PIXELS * self._images.channels)
            row = 0
            for batch in file.iter_batches(_BATCH, columns=[_TIME, _LASER, *columns], use_threads=False):
                for i in range(batch.num_rows):
                    laser = batch.column(_LASER)[i].as_py()
                    if laser in lasers:
                        place = f"{self._path}, row {row + i}"
                        yield batch.column(_TIME)[i].as_py(), laser, self._returns(batch, i, place)
                row += batch.num_rows

    def _returns(self, batch: Any, i: int, place: str) -> tuple[NDArray[Any] | None, ...]:
        names = self._images.columns
        pairs = [(names[2 * k], names[2 * k + 1]) for k in range(self._images.returns)]
        return tuple(
            self._image(batch.column(values)[i], batch.column(shape)[i], f"{place}, {values}") for values, shape in pairs
        )

    def _image(self, values: Any, shape: Any, place: str) -> NDArray[Any] | None:
        import pyarrow as pa

        if not values.is_valid:
            return None
        if not isinstance(values, pa.ListScalar) or not isinstance(shape, pa.ListScalar) or not shape.is_valid:
            raise DataError(f"{place}: expected a list of numbers, and a shape beside it. {FETCH_AGAIN}")
        dims, stored, channels = tuple(shape.as_py()), values.values, self._images.channels
        if len(dims) != 3 or None in dims or dims[2] != channels or min(dims) < 1 or dims[0] * dims[1] > MAX_PIXELS:
            raise DataError(
                f"{place}: has shape {dims}, expected (rows, columns, {channels}) of at most {MAX_PIXELS} pixels. {FETCH_AGAIN}"
            )
        whole = self._images.dtype is np.int32
        if stored.null_count or not (pa.types.is_integer(stored.type) if whole else pa.types.is_float32(stored.type)):
            wanted = "whole numbers" if whole else "float"
            raise DataError(
                f"{place}: holds {stored.type}, {stored.null_count} of them absent; expected {wanted}. {FETCH_AGAIN}"
            )
        if len(stored) != math.prod(dims):
            raise DataError(f"{place}: holds {len(stored)} numbers, its shape {dims} needs {math.prod(dims)}. {FETCH_AGAIN}")
        return stored.to_numpy(zero_copy_only=True).reshape(dims)


class _Ahead:
    """A stream of rows with the next one in sight."""

    def __init__(self, rows: Iterator[tuple[int, int, tuple[NDArray[Any] | None, ...]]]) -> None:
        self._rows = rows
        self.head = next(rows, None)

    def advance(self) -> None:
        self.head = next(self._rows, None)


def _vehicle_poses(path: Path, segment: str) -> dict[int, Pose]:
    """Poses by time, in order of time."""
    column = "[VehiclePoseComponent].world_from_vehicle.transform"
    rows = read_parquet(path, {_NAME: "s", _TIME: "i", column: "m"})
    others = sorted(set(rows[_NAME].tolist()) - {segment})
    if others:
        raise DataError(
            f"{path}: belongs to segment {others[0]}, not to the one that the file is named after. Give the file the name it "
            "was downloaded with."
        )
    if not len(rows[_TIME]):
        raise DataError(f"{path}: holds no frame; fetch it again.")
    order = np.argsort(rows[_TIME], kind="stable")
    times = rows[_TIME][order].tolist()
    twice = [time for before, time in pairwise(times) if before == time]
    if twice:
        raise DataError(f"{path}: two frames have the time {twice[0]} us. {FETCH_AGAIN}")
    return {
        time: pose_of_numbers(rows[column][row], f"{path}, row {row}: the pose") for time, row in zip(times, order, strict=True)
    }


def _calibrations(path: Path) -> dict[int, LaserCalibration]:
    matrix, beams = "[LiDARCalibrationComponent].extrinsic.transform", "[LiDARCalibrationComponent].beam_inclination"
    rows = read_parquet(path, {_LASER: "i", matrix: "m", f"{beams}.min": "f?", f"{beams}.max": "f?", f"{beams}.values": "l"})
    found: dict[int, LaserCalibration] = {}
    for row, laser in enumerate(rows[_LASER].tolist()):
        place = f"{path}, row {row}"
        if laser not in LASER_NAMES or laser in found:
            raise DataError(f"{place}: LiDAR {laser} is not known, or calibrated twice. {FETCH_AGAIN}")
        given = rows[f"{beams}.values"][row]
        inclinations = np.zeros(0) if given is None else given
        if not np.isfinite(inclinations).all():
            raise DataError(f"{place}: a beam inclination of LiDAR {laser} is not finite. {FETCH_AGAIN}")
        low, high = (float(rows[f"{beams}.{end}"][row]) for end in ("min", "max"))
        pose = pose_of_numbers(rows[matrix][row], f"{place}: the extrinsic of LiDAR {laser}")
        found[laser] = LaserCalibration(laser, inclinations, low, high, pose)
    return found


class _Labels:
    """All boxes of a segment, by time."""

    _BOX = tuple(f"box.{part}" for part in ("center.x", "center.y", "center.z", "size.x", "size.y", "size.z", "heading"))
    _MOTION = tuple(f"{part}.{axis}" for part in ("speed", "acceleration") for axis in "xyz")
    _COUNTS = ("type", "difficulty_level.detection", "difficulty_level.tracking")
    _POINTS = ("num_lidar_points_in_box", "num_top_lidar_points_in_box")

    def __init__(self, path: Path) -> None:
        self._path = path
        kinds = {
            **dict.fromkeys(self._BOX, "f"),
            **dict.fromkeys(self._MOTION, "f?"),
            **dict.fromkeys(self._COUNTS, "i?"),
            **dict.fromkeys(self._POINTS, "i"),
        }
        named = {f"[LiDARBoxComponent].{name}": kind for name, kind in kinds.items()}
        rows = read_parquet(path, {_TIME: "i", "key.laser_object_id": "s", **named})
        order = np.argsort(rows[_TIME], kind="stable")
        rows = {name.removeprefix("[LiDARBoxComponent]."): column[order] for name, column in rows.items()}
        self._times, self._ids = rows[_TIME], rows["key.laser_object_id"]
        self._box, self._motion, self._counts, self._points = (
            np.stack([rows[name] for name in names], axis=1) for names in (self._BOX, self._MOTION, self._COUNTS, self._POINTS)
        )
        whole = np.isfinite(self._box).all(axis=1) & (self._box[:, 3:6] >= 0).all(axis=1)
        whole &= ((self._counts >= 0) & (self._counts <= _INT8)).all(axis=1) & (np.abs(self._points) <= _INT32).all(axis=1)
        if not whole.all():
            row = int(np.argmin(whole))
            raise DataError(
                f"{path}: label '{self._ids[row]}' at {self._times[row]} us has a box that lacks a number or is of a negative "
                f"size, or a type, difficulty or count that cannot be: {self._counts[row].tolist()}. {FETCH_AGAIN}"
            )

    def refuse_other_times(self, frames: dict[int, Pose]) -> None:
        """Every label must belong to a frame."""
        for time in np.unique(self._times).tolist():
            if time not in frames:
                raise DataError(f"{self._path}: a label of time {time} us, at which {VEHICLE_POSE} has no frame. {FETCH_AGAIN}")

    def at(self, time: int) -> LaserLabels:
        """The labels of a frame, in the order of the file."""
        begin, end = (int(np.searchsorted(self._times, time, side)) for side in ("left", "right"))
        box, motion, counts, points = (part[begin:end] for part in (self._box, self._motion, self._counts, self._points))
        return LaserLabels(
            center=box[:, :3],
            size=box[:, 3:6],
            heading=box[:, 6],
            kind=counts[:, 0].astype(np.int8),
            id=tuple(self._ids[begin:end].tolist()),
            difficulty=counts[:, 1].astype(np.int8),
            tracking_difficulty=counts[:, 2].astype(np.int8),
            num_points=points[:, 0].astype(np.int32),
            num_top_points=points[:, 1].astype(np.int32),
            velocity=motion[:, :3],
            acceleration=motion[:, 3:],
        )


def _no_labels() -> LaserLabels:
    none, small, counts = np.zeros((0, 3)), np.zeros(0, np.int8), np.zeros(0, np.int32)
    return LaserLabels(none, none, np.zeros(0), small, (), small, small, counts, counts, none, none)
