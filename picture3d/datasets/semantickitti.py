"""SemanticKITTI (velodyne scans, labels, poses of KITTI odometry) -> prepared frames. One sequence becomes one log."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from picture3d.datasets.label_sets import SEMANTICKITTI, SEMANTICKITTI_IDS
from picture3d.datasets.prepared import LogHeader, PreparedSummary
from picture3d.datasets.preparing import (
    LogPlan,
    Progress,
    check_clock,
    checksum,
    damaged_plan,
    file_size,
    finite_points,
    keep_points,
    previous_sweeps,
    refuse_missing,
    write_logs,
)
from picture3d.datasets.sweep_files import read_points, read_poses
from picture3d.errors import FETCH_AGAIN, DataError
from picture3d.files import read_bounded
from picture3d.formats.columns import PLANES, Codec
from picture3d.formats.point_tables import MAX_FILE_BYTES, MAX_TEXT_BYTES
from picture3d.structures.frame import Frame
from picture3d.structures.points import IntensityUnit
from picture3d.structures.poses import Pose

# Sequences of the official splits.
SPLITS: dict[str, tuple[str, ...]] = {
    "train": ("00", "01", "02", "03", "04", "05", "06", "07", "09", "10"),
    "val": ("08",),
    "test": tuple(f"{number:02d}" for number in range(11, 22)),
}
_PREPARER = "semantickitti/1"  # raise when the same raw data would give other prepared frames
_LAYOUT = ("x", "y", "z", "intensity")
_RATE_HZ = 10.0  # of the scanner, where there is no times.txt
_UNKNOWN = 255

_COMPACT = np.full(1 << 16, _UNKNOWN, np.uint8)
_COMPACT[list(SEMANTICKITTI_IDS)] = np.arange(len(SEMANTICKITTI_IDS))


@dataclass(frozen=True, slots=True, eq=False)
class Scan:
    """A scan of a sequence and what belongs to it."""

    path: Path
    label: Path | None
    global_from_lidar: Pose | None
    timestamp_us: int


def prepare_semantickitti(
    raw: Path,
    out: Path,
    *,
    sweeps: int = 9,
    skip_missing: bool = False,
    name: str = "semantickitti",
    xyz_codec: Codec = PLANES,
    processes: int = 1,
    progress: Progress | None = None,
) -> PreparedSummary:
    """Prepares the sequences on disk; a rerun makes only what is missing. A sequence with a damaged file is set aside.

    A log ``NN`` holds all scans of ``sequences/NN/velodyne`` as keyframes, in the frame of the LiDAR, which is the ego frame
    too. Labels hold the position of the official id in its sorted list (label set ``semantickitti``), instances the
    high 16 bits. ``poses.txt`` moves the camera; with ``Tr`` (camera from LiDAR) of ``calib.txt`` the pose of the LiDAR is
    ``inv(Tr) @ pose @ Tr``. Poses, times and labels are optional. Logs are split as the benchmark does (val is 08).

    Args:
        raw: the folder that holds ``sequences/``, or ``dataset/sequences/``.
        out: folder for the prepared frames.
        sweeps: how many earlier scans each frame is linked to, where there are poses.
        skip_missing: leave out scans and labels that should be there, and say how many.
        name: name of the dataset.
        xyz_codec: how coordinates are stored; the default is lossless.
        processes: logs made side by side. The bytes do not depend on it.
        progress: called with (frames done, frames in all).

    Raises:
        DataError: if there is nothing to read, files are missing (unless `skip_missing`), or no sequence could be read.
    """
    settings = {"preparer": _PREPARER, "sweeps": sweeps, "xyz_codec": str(xyz_codec)}
    plans: list[LogPlan] = []
    missing: list[Path] = []
    for folder in semantickitti_sequences(raw):
        try:
            scans, absent = list_scans(folder)
            missing += absent
            if scans:
                plans.append(_plan(folder.name, scans, name, settings))
        except DataError as error:
            plans.append(damaged_plan(LogHeader(folder.name, name, SEMANTICKITTI.name, settings), error))
    refuse_missing(raw, missing, skip_missing=skip_missing)
    if not plans:
        raise DataError(f"{raw}: no sequence holds a scan velodyne/*.bin. Download the velodyne archive first.")
    present = [plan.header.log for plan in plans]
    splits = {split: [log for log in present if log in members] for split, members in SPLITS.items()}
    return write_logs(
        out,
        plans,
        name=name,
        label_set_name=SEMANTICKITTI.name,
        splits=splits,
        missing_files=len(missing),
        xyz_codec=xyz_codec,
        processes=processes,
        progress=progress,
    )


def read_semantickitti_labels(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
    """(N,) compact class ids (position in ``SEMANTICKITTI_IDS``) and (N,) instance ids of a ``.label`` file.

    Raises:
        DataError: if the file is cut off, or holds an id that is none of the official ones.
    """
    data = read_bounded(path, max_bytes=MAX_FILE_BYTES)
    if len(data) % 4:
        raise DataError(f"{path}: {len(data)} bytes are no whole number of uint32; the file is cut off. Copy it again.")
    both = np.frombuffer(data, "<u4")
    classes = _COMPACT[both & 0xFFFF]
    wrong = np.flatnonzero(classes == _UNKNOWN)
    if len(wrong):
        raise DataError(
            f"{path}: class {both[wrong[0]] & 0xFFFF} of point {wrong[0]} (byte {4 * wrong[0]}) is none of the official ids. "
            "Take the labels as downloaded; those already mapped to 0..19 go through `prepare points --label-set plain`."
        )
    return classes, (both >> 16).astype(np.uint16)


def read_lidar_calibration(path: Path) -> Pose:
    """``camera_from_lidar``, the line ``Tr`` of a ``calib.txt``.

    Raises:
        DataError: if there is no such line, or it is no rigid transform.
    """
    for number, line in enumerate(read_bounded(path, max_bytes=MAX_TEXT_BYTES).decode(errors="replace").splitlines(), start=1):
        key, _, values = line.partition(":")
        if key.strip() != "Tr":
            continue
        try:
            matrix = np.array([float(word) for word in values.split()]).reshape(3, 4)
        except ValueError as error:
            raise DataError(
                f"{path}, line {number}: expected 12 numbers after 'Tr:' ({error}). Download data_odometry_calib again."
            ) from None
        rotation = matrix[:, :3]
        if not np.isfinite(matrix).all() or np.abs(rotation @ rotation.T - np.eye(3)).max() > 1e-2:
            raise DataError(
                f"{path}, line {number}: Tr is not a rotation and a translation. Download data_odometry_calib again."
            )
        u, _, vt = np.linalg.svd(rotation)
        return Pose(u @ vt, matrix[:, 3])
    raise DataError(f"{path}: has no line 'Tr:' (camera from LiDAR); download data_odometry_calib again.")


def semantickitti_sequences(raw: Path) -> list[Path]:
    """The folders of the sequences that have scans, in order.

    Raises:
        DataError: if there are none.
    """
    for root in (raw / "sequences", raw / "dataset" / "sequences"):
        if root.is_dir():
            found = sorted(path for path in root.iterdir() if (path / "velodyne").is_dir())
            if found:
                return found
            raise DataError(f"{root}: no sequence has a folder velodyne/. Download the velodyne archive first.")
    raise DataError(f"{raw}: holds neither sequences/ nor dataset/sequences/. Name the folder above `sequences`.")


def list_scans(folder: Path) -> tuple[list[Scan], list[Path]]:
    """The scans of a sequence in order, and the files that should be there and are not.

    Raises:
        DataError: if poses, times or calibration are damaged, or do not fit the scans.
    """
    numbers: dict[int, Path] = {}
    for path in (folder / "velodyne").glob("*.bin"):
        if not path.stem.isdigit():
            raise DataError(
                f"{path}: scans are called by their number, 000000.bin, 000001.bin and so on. Rename it, or move it out of the "
                "folder."
            )
        if int(path.stem) in numbers:
            raise DataError(f"{path}: has the same number as {numbers[int(path.stem)].name}. Remove one of the two.")
        numbers[int(path.stem)] = path
    if not numbers:
        return [], []
    poses, times = _poses(folder), _times(folder / "times.txt")
    last = max(numbers)
    lengths = {name: len(v) for name, v in (("poses.txt", poses), ("times.txt", times)) if v is not None}
    for file, length in lengths.items():
        if length <= last:
            raise DataError(
                f"{folder / file}: {length} lines, but scan {numbers[last].name} needs line {last + 1}. Download the "
                "calibration (poses and times) again."
            )
    if len(set(lengths.values())) > 1:
        raise DataError(
            f"{folder}: {len(poses or ())} poses in poses.txt, but {len(times or ())} times in times.txt. Download the "
            "calibration (poses and times) again."
        )
    has_labels = (folder / "labels").is_dir()
    count = max(lengths.values(), default=last + 1)
    missing: list[Path] = []
    scans: list[Scan] = []
    for number in range(count):
        if number not in numbers:
            missing.append(folder / "velodyne" / f"{number:06d}.bin")
            continue
        path = numbers[number]
        label = folder / "labels" / f"{path.stem}.label" if has_labels else None
        if label is not None and not label.is_file():
            missing.append(label)
            label = None
        time = round(number * 1e6 / _RATE_HZ) if times is None else times[number]
        scans.append(Scan(path, label, None if poses is None else poses[number], time))
    return scans, missing


def _poses(folder: Path) -> list[Pose] | None:
    """`global_from_lidar` of every scan; global is the LiDAR frame of the first pose's origin."""
    path = folder / "poses.txt"
    if not path.exists():
        return None
    camera_from_lidar = read_lidar_calibration(folder / "calib.txt")
    lidar_from_camera = camera_from_lidar.inverse()
    return [lidar_from_camera @ pose @ camera_from_lidar for pose in read_poses(path)]


def _times(path: Path) -> list[int] | None:
    if not path.exists():
        return None
    try:
        seconds = np.array(read_bounded(path, max_bytes=MAX_TEXT_BYTES).split(), dtype=np.float64)
    except ValueError as error:
        raise DataError(f"{path}: holds something else than seconds ({error}). {FETCH_AGAIN}") from None
    if not np.isfinite(seconds).all() or (np.abs(seconds) > 1e10).any():
        raise DataError(f"{path}: holds a time that is not a number of seconds. {FETCH_AGAIN}")
    times = [round(second * 1e6) for second in seconds.tolist()]
    check_clock(times, path)
    return times


def _plan(log: str, scans: Sequence[Scan], dataset: str, settings: dict[str, Any]) -> LogPlan:
    def line(scan: Scan) -> list[object]:
        pose = None if scan.global_from_lidar is None else scan.global_from_lidar.matrix[:3].ravel().tolist()
        label = None if scan.label is None else file_size(scan.label)
        return [scan.path.name, file_size(scan.path), label, scan.timestamp_us, pose]

    source = {**settings, "raw_crc32c": checksum(line(scan) for scan in scans)}
    header = LogHeader(log, dataset, SEMANTICKITTI.name, source)
    return LogPlan(header, len(scans), partial(_frames, log, scans, settings["sweeps"]))


def _frames(log: str, scans: Sequence[Scan], sweeps: int) -> Iterator[tuple[Frame, int]]:
    for index, scan in enumerate(scans):
        previous = previous_sweeps(index, sweeps) if scan.global_from_lidar is not None else ()
        yield frame_of_scan(scan, log, index, previous=previous)


def frame_of_scan(scan: Scan, log: str, index: int, *, previous: tuple[int, ...] = ()) -> tuple[Frame, int]:
    """A frame, and how many points it lost because they were not finite.

    Raises:
        DataError: if a file is missing or damaged, or labels and points are not as many.
    """
    points = read_points(scan.path, _LAYOUT, IntensityUnit.UNIT)
    labels = instances = None
    if scan.label is not None:
        labels, instances = read_semantickitti_labels(scan.label)
        if len(labels) != len(points):
            raise DataError(
                f"{scan.label}: {len(labels)} labels for the {len(points)} points of {scan.path}. Download both again."
            )
    points, labels, instances, lost = keep_points(finite_points(points), points, labels, instances)
    frame = Frame(
        log=log,
        index=index,
        token=scan.path.stem,
        timestamp_us=scan.timestamp_us,
        points=points,
        global_from_ego=scan.global_from_lidar,
        ego_from_lidar=Pose.identity(),
        labels=labels,
        instances=instances,
        previous=previous,
    )
    return frame, lost
