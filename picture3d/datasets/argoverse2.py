"""Argoverse 2 sensor logs -> prepared frames. One log becomes one log. Needs the extra `arrow`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from picture3d.datasets.prepared import LogHeader, PreparedSummary
from picture3d.datasets.preparing import (
    LogPlan,
    Progress,
    check_clock,
    checksum,
    checksum_file,
    damaged_plan,
    file_size,
    finite_points,
    keep_points,
    previous_sweeps,
    refuse_missing,
    write_logs,
)
from picture3d.errors import FETCH_AGAIN, DataError
from picture3d.formats.columns import PLANES, Codec
from picture3d.formats.feather import read_feather
from picture3d.structures.boxes import Boxes
from picture3d.structures.frame import Frame
from picture3d.structures.points import IntensityUnit, PointCloud
from picture3d.structures.poses import Pose

SPLITS = ("train", "val", "test")
# The 30 categories of the sensor dataset, in the order of letters.
CATEGORIES = (
    "ANIMAL", "ARTICULATED_BUS", "BICYCLE", "BICYCLIST", "BOLLARD", "BOX_TRUCK", "BUS", "CONSTRUCTION_BARREL",
    "CONSTRUCTION_CONE", "DOG", "LARGE_VEHICLE", "MESSAGE_BOARD_TRAILER", "MOBILE_PEDESTRIAN_CROSSING_SIGN", "MOTORCYCLE",
    "MOTORCYCLIST", "OFFICIAL_SIGNALER", "PEDESTRIAN", "RAILED_VEHICLE", "REGULAR_VEHICLE", "SCHOOL_BUS", "SIGN", "STOP_SIGN",
    "STROLLER", "TRAFFIC_LIGHT_TRAILER", "TRUCK", "TRUCK_CAB", "VEHICULAR_TRAILER", "WHEELCHAIR", "WHEELED_DEVICE",
    "WHEELED_RIDER",
)  # fmt: skip
UP_LIDAR, DOWN_LIDAR = 1, 2  # the values of `PointCloud.sensor`
_TABLES = ("city_SE3_egovehicle.feather", "annotations.feather")  # the test split has no annotations
_PREPARER = "argoverse2/1"  # raise when the same raw data would give other prepared frames
_LASERS_UP = 32  # lasers below this number sit in the upper LiDAR: seen from there each keeps one elevation angle
_MAX_GAP_S = 1.5  # a velocity over a longer gap is unknown; twice as much for a central difference

_POSE = dict.fromkeys(("qw", "qx", "qy", "qz", "tx_m", "ty_m", "tz_m"), "f")
_POSES = {"timestamp_ns": "i", **_POSE}
_CALIBRATION = {"sensor_name": "s", **_POSE}
_SWEEP = {"x": "f", "y": "f", "z": "f", "intensity": "f", "laser_number": "i", "offset_ns": "i"}
_ANNOTATIONS = {
    "timestamp_ns": "i",
    "track_uuid": "s",
    "category": "s",
    "length_m": "f",
    "width_m": "f",
    "height_m": "f",
    **_POSE,
    "num_interior_pts": "i",
}


@dataclass(frozen=True, slots=True, eq=False)
class Annotations:
    """The boxes of a log by sweep, and the velocity of each."""

    rows: dict[str, NDArray[Any]]  # sorted by time
    velocity: NDArray[np.float64]  # (B, 2) metres per second along x and y of the ego frame at the time of the box

    def boxes(self, timestamp_ns: int) -> Boxes | None:
        """The boxes of the sweep of that time in its ego frame, or None where it was not annotated."""
        times = self.rows["timestamp_ns"]
        of = slice(int(np.searchsorted(times, timestamp_ns, "left")), int(np.searchsorted(times, timestamp_ns, "right")))
        if of.start == of.stop:
            return None
        part = {name: column[of] for name, column in self.rows.items()}
        return Boxes(
            center=np.stack([part["tx_m"], part["ty_m"], part["tz_m"]], axis=1),
            size=np.stack([part["length_m"], part["width_m"], part["height_m"]], axis=1),
            yaw=_yaw(part),
            velocity=self.velocity[of],
            category=tuple(part["category"].tolist()),
            track_id=tuple(part["track_uuid"].tolist()),
            num_points=part["num_interior_pts"].astype(np.int32),
        )


@dataclass(frozen=True, slots=True, eq=False)
class ArgoverseLog:
    """A log whose tables have been read; its sweeps are read one by one."""

    name: str
    files: tuple[Path, ...]  # of the sweeps, in order of time
    missing: tuple[Path, ...]  # sweeps that are annotated and not on disk
    poses: dict[int, Pose]  # city_from_ego by time in nanoseconds; of every sweep
    annotations: Annotations | None  # None in the test split

    def frame(self, index: int, sweeps: int = 0) -> tuple[Frame, int]:
        """A sweep, linked to the `sweeps` before it, and the number of points it lost because they were not finite.

        Raises:
            DataError: as :func:`read_sweep`.
        """
        path = self.files[index]
        points = read_sweep(path)
        points, _, _, lost = keep_points(finite_points(points), points)
        time = int(path.stem)
        frame = Frame(
            log=self.name,
            index=index,
            token=path.stem,
            timestamp_us=time // 1000,
            points=points,
            global_from_ego=self.poses[time],
            ego_from_lidar=Pose.identity(),
            boxes=None if self.annotations is None else self.annotations.boxes(time),
            previous=previous_sweeps(index, sweeps),
        )
        return frame, lost


def open_argoverse2(folder: Path) -> ArgoverseLog:
    """The tables of a log, checked, and the names of its sweeps.

    Raises:
        ConfigError: if pyarrow is not installed.
        DataError: if a table is missing or damaged, or there is no sweep, or no pose at the time of one.
    """
    files, missing = _sweeps(folder)
    tables = [folder / name for name in _TABLES]
    poses = read_city_poses(tables[0])
    _refuse_no_pose(files, poses, tables[0])
    annotations = read_annotations(tables[1], poses) if tables[1].exists() else None
    return ArgoverseLog(folder.resolve().name, tuple(files), tuple(missing), poses, annotations)


def prepare_argoverse2(
    raw: Path,
    out: Path,
    *,
    sweeps: int = 9,
    skip_missing: bool = False,
    name: str = "argoverse2",
    xyz_codec: Codec = PLANES,
    processes: int = 1,
    progress: Progress | None = None,
) -> PreparedSummary:
    """Prepares the sensor logs on disk; a rerun makes only what is missing. A log with a damaged file is set aside.

    All sweeps of a log are keyframes. Points and boxes are in the ego frame of the sweep's time, as the dataset stores them
    (both LiDARs merged, ego motion within the sweep removed), so ``ego_from_lidar`` is the identity; `ring` is the laser number
    0..63, `sensor` 1 for the upper and 2 for the lower LiDAR, `time_s` the offset from the sweep's timestamp. Timestamps keep
    microseconds, tokens the nanoseconds of the file name. Velocities are central differences of a track's boxes in the city.

    Args:
        raw: folder of ``train/``, ``val/``, ``test/``, each with one folder per log; or one folder of logs, which then all form
            the training split unless its own name is that of a split; or a single log.
        out: folder for the prepared frames.
        sweeps: how many earlier sweeps each frame is linked to.
        skip_missing: leave out sweeps that are annotated but not on disk, and say how many.
        name: name of the dataset.
        xyz_codec: how coordinates are stored; the default is lossless.
        processes: logs made side by side. The bytes do not depend on it.
        progress: called with (frames done, frames in all).

    Raises:
        ConfigError: if pyarrow is not installed.
        DataError: if there is nothing to read, files are missing (unless `skip_missing`), or no log could be read.
    """
    settings = {"preparer": _PREPARER, "sweeps": sweeps, "xyz_codec": str(xyz_codec)}
    plans: list[LogPlan] = []
    missing: list[Path] = []
    splits: dict[str, list[str]] = {}
    for split, folders in argoverse2_logs(raw).items():
        for folder in folders:
            log = folder.resolve().name
            splits.setdefault(split, []).append(log)
            try:
                plan, absent = _plan(folder, name, settings)
                plans.append(plan)
                missing += absent
            except DataError as error:
                plans.append(damaged_plan(LogHeader(log, name, None, settings), error))
    refuse_missing(raw, missing, skip_missing=skip_missing)
    return write_logs(
        out,
        plans,
        name=name,
        label_set_name=None,
        splits=splits,
        missing_files=len(missing),
        xyz_codec=xyz_codec,
        processes=processes,
        progress=progress,
    )


def read_sweep(path: Path) -> PointCloud:
    """One sweep in the ego frame, intensity 0..255; non-finite points are still there.

    Raises:
        DataError: if the file is damaged, or a laser number or an intensity is out of range.
    """
    table = read_feather(path, _SWEEP)
    laser = table["laser_number"]
    if len(laser) and not (laser.min() >= 0 and laser.max() < 2 * _LASERS_UP):
        raise DataError(
            f"{path}: laser numbers {laser.min()} to {laser.max()}, expected 0 to {2 * _LASERS_UP - 1}. {FETCH_AGAIN}"
        )
    with np.errstate(over="ignore"):
        xyz = np.stack([table[axis] for axis in "xyz"], axis=1).astype(np.float32)
    return PointCloud(
        xyz=xyz,
        intensity=table["intensity"].astype(np.float32),
        intensity_unit=IntensityUnit.RAW_255,
        ring=laser.astype(np.int16),
        time_s=(table["offset_ns"] * 1e-9).astype(np.float32),
        sensor=np.where(laser < _LASERS_UP, UP_LIDAR, DOWN_LIDAR).astype(np.uint8),
    )


def read_city_poses(path: Path) -> dict[int, Pose]:
    """``city_from_ego`` by timestamp in nanoseconds.

    Raises:
        DataError: if the table is damaged, a time occurs twice, or a pose is none.
    """
    rows = read_feather(path, _POSES)
    times = rows["timestamp_ns"]
    unique, counts = np.unique(times, return_counts=True)
    if len(unique) != len(times):
        raise DataError(f"{path}: the time {unique[counts > 1][0]} ns occurs twice. {FETCH_AGAIN}")
    return dict(zip(times.tolist(), _poses(rows, path), strict=True))


def read_calibration(path: Path) -> dict[str, Pose]:
    """``ego_from_sensor`` by name; the LiDARs are ``up_lidar`` and ``down_lidar``.

    Raises:
        DataError: if the table is damaged, or a pose is none.
    """
    rows = read_feather(path, _CALIBRATION)
    return dict(zip(rows["sensor_name"].tolist(), _poses(rows, path), strict=True))


def read_annotations(path: Path, city_from_ego: dict[int, Pose]) -> Annotations:
    """All boxes of a log, checked, with velocities.

    A velocity is the difference of the positions in the city at the track's annotations before and after (one-sided at the
    ends of a track), NaN for a track of one box and where the two are more than 1.5 s apart (3 s if central).

    Raises:
        DataError: if the table is damaged, a box is impossible, or there is no pose at the time of a box.
    """
    rows = read_feather(path, _ANNOTATIONS)
    rows = {name: column[np.argsort(rows["timestamp_ns"], kind="stable")] for name, column in rows.items()}
    unknown = sorted(set(rows["category"].tolist()) - set(CATEGORIES))
    if unknown:
        raise DataError(
            f"{path}: category {', '.join(unknown[:5])} is none of the 30 of Argoverse 2. Take the annotations of the sensor "
            "dataset, or rename the category."
        )
    numbers = np.stack([rows[key] for key in (*_POSE, "length_m", "width_m", "height_m")], axis=1)
    sizes, upright = numbers[:, 7:], np.abs(numbers[:, 1:3]).max(axis=1, initial=0) < 1e-3
    wrong = np.flatnonzero(~np.isfinite(numbers).all(axis=1) | (sizes <= 0).any(axis=1) | ~upright)
    if len(wrong):
        row = int(wrong[0])
        track, time = rows["track_uuid"][row], rows["timestamp_ns"][row]
        raise DataError(f"{path}: the box of track {track} at {time} ns is not an upright box of positive size. {FETCH_AGAIN}")
    times, of = np.unique(rows["timestamp_ns"], return_inverse=True)
    absent = [time for time in times.tolist() if time not in city_from_ego]
    if absent:
        raise DataError(
            f"{path}: no ego pose at {absent[0]} ns, where boxes are annotated ({len(absent)} such times). Download the log "
            "again, its city_SE3_egovehicle.feather too."
        )
    if not len(times):
        return Annotations(rows, np.zeros((0, 2)))
    rotation = np.stack([city_from_ego[time].rotation for time in times.tolist()])[of]
    translation = np.stack([city_from_ego[time].translation for time in times.tolist()])[of]
    in_city = np.einsum("bij,bj->bi", rotation, numbers[:, 4:7]) + translation
    velocity = np.einsum("bji,bj->bi", rotation, _velocities(rows, in_city, path))
    return Annotations(rows, np.ascontiguousarray(velocity[:, :2]))


def _velocities(rows: dict[str, NDArray[Any]], position: NDArray[np.float64], path: Path) -> NDArray[np.float64]:
    """(B, 3) metres per second in the axes of the city."""
    _, track = np.unique(rows["track_uuid"].astype(str), return_inverse=True)
    order = np.lexsort((rows["timestamp_ns"], track))
    track, time, position = track[order], rows["timestamp_ns"][order], position[order]
    index = np.arange(len(track))
    same = track[1:] == track[:-1]
    twice = np.flatnonzero(same & (time[1:] == time[:-1]))
    if len(twice):
        row = order[twice[0]]
        raise DataError(
            f"{path}: track {rows['track_uuid'][row]} has two boxes at {rows['timestamp_ns'][row]} ns. {FETCH_AGAIN}"
        )
    first = index - np.concatenate([[False], same])
    last = index + np.concatenate([same, [False]])
    seconds = (time[last] - time[first]) * 1e-9
    central = (first != index) & (last != index)
    known = (seconds > 0) & (seconds <= _MAX_GAP_S * np.where(central, 2, 1))
    out = np.full(position.shape, np.nan)
    out[order[known]] = (position[last] - position[first])[known] / seconds[known, None]
    return out


def argoverse2_logs(raw: Path) -> dict[str, list[Path]]:
    """Split -> folders of its logs, for the folders that :func:`prepare_argoverse2` takes.

    Raises:
        DataError: if there is no log.
    """
    if _is_log(raw):
        return {_split_of(raw.resolve().parent.name): [raw]}
    for root in (raw, raw / "sensor"):
        named = {split: _log_folders(root / split) for split in SPLITS if (root / split).is_dir()}
        if any(named.values()):
            return named
    found = _log_folders(raw) if raw.is_dir() else []
    if not found:
        raise DataError(
            f"{raw}: no log, that is no folder with sensors/lidar/*.feather, here or in train/, val/, test/. Name the folder "
            "above `train`, or that of a log."
        )
    return {_split_of(raw.resolve().name): found}


def _split_of(name: str) -> str:
    return name if name in SPLITS else "train"


def _log_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if _is_log(path))


def _is_log(folder: Path) -> bool:
    return (folder / "sensors" / "lidar").is_dir()


def _sweeps(folder: Path) -> tuple[list[Path], list[Path]]:
    """The sweeps of a log in order of time, and those that are annotated and not on disk."""
    lidar = folder / "sensors" / "lidar"
    files: dict[int, Path] = {}
    for path in lidar.glob("*.feather"):
        if not path.stem.isdigit():
            raise DataError(f"{path}: sweeps are called by their time in nanoseconds. Remove the file, or name it so.")
        files[int(path.stem)] = path
    times = sorted(files)
    if not times:
        raise DataError(f"{lidar}: holds no sweep. Download the log again, or remove its folder.")
    if times[-1] >= 1 << 63:
        raise DataError(
            f"{files[times[-1]]}: {times[-1]} is no time in nanoseconds. Remove the file, or name it by its sweep's time."
        )
    check_clock([time // 1000 for time in times], lidar)
    table = folder / _TABLES[1]
    annotated = np.unique(read_feather(table, {"timestamp_ns": "i"})["timestamp_ns"]).tolist() if table.exists() else []
    return [files[time] for time in times], [lidar / f"{time}.feather" for time in annotated if time not in files]


def _refuse_no_pose(files: Sequence[Path], poses: dict[int, Pose], table: Path) -> None:
    without = [path for path in files if int(path.stem) not in poses]
    if without:
        raise DataError(
            f"{table}: no pose at the time of {without[0].name} ({len(without)} such sweeps). Download the log again, its "
            "city_SE3_egovehicle.feather too."
        )


def _plan(folder: Path, dataset: str, settings: dict[str, Any]) -> tuple[LogPlan, list[Path]]:
    """What a log will hold, and the sweeps that are annotated and not on disk."""
    files, missing = _sweeps(folder)
    tables = [folder / name for name in _TABLES]
    _refuse_no_pose(files, read_city_poses(tables[0]), tables[0])
    sizes = [[path.name, file_size(path)] for path in files]
    # Tables are read in full for the checksum: an edited box seldom changes the size of its file.
    contents = [checksum_file(path) for path in tables if path.exists()]
    header = LogHeader(folder.resolve().name, dataset, None, {**settings, "raw_crc32c": checksum([*sizes, contents])})
    return LogPlan(header, len(files), partial(_frames, folder, settings["sweeps"])), missing


def _frames(folder: Path, sweeps: int) -> Iterator[tuple[Frame, int]]:
    log = open_argoverse2(folder)
    for index in range(len(log.files)):
        yield log.frame(index, sweeps)


def _yaw(rows: dict[str, NDArray[Any]]) -> NDArray[np.float64]:
    """Heading of upright quaternions, radians counter-clockwise from x."""
    w, x, y, z = (rows[key] for key in ("qw", "qx", "qy", "qz"))
    return np.arctan2(2 * (w * z + x * y), w * w + x * x - y * y - z * z)


def _poses(rows: dict[str, NDArray[Any]], path: Path) -> list[Pose]:
    numbers = np.stack([rows[key] for key in _POSE], axis=1)
    wrong = np.flatnonzero(~np.isfinite(numbers).all(axis=1) | (np.abs(np.linalg.norm(numbers[:, :4], axis=1) - 1) > 1e-2))
    if len(wrong):
        raise DataError(f"{path}: row {wrong[0]} is not a unit quaternion and a translation. {FETCH_AGAIN}")
    return [Pose.from_quaternion(row[:4], row[4:]) for row in numbers]
