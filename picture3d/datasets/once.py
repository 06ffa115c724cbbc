"""ONCE (one roof LiDAR, 2 Hz, poses, some annotated sequences) -> prepared frames. One sequence becomes one log.

The layout is the one of the published development kit: ``data/<sequence>/<sequence>.json``,
``data/<sequence>/lidar_roof/<frame>.bin``, ``ImageSets/<split>.txt``. The LiDAR's x points to the **left** and its y to the
**back** of the car, z up (source: https://once-for-auto-driving.github.io/documentation.html).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from picture3d.datasets.object_geometry import rows_inside
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
from picture3d.datasets.sweep_files import read_points
from picture3d.errors import FETCH_AGAIN, DataError
from picture3d.files import read_bounded, read_json_object
from picture3d.formats.columns import PLANES, Codec
from picture3d.formats.nuscenes_tables import path_inside
from picture3d.formats.point_tables import MAX_TEXT_BYTES
from picture3d.structures.boxes import Boxes
from picture3d.structures.frame import Frame
from picture3d.structures.points import IntensityUnit
from picture3d.structures.poses import Pose

CATEGORIES = ("Car", "Truck", "Bus", "Pedestrian", "Cyclist")
# Lists in ImageSets -> splits. The raw lists may contain one another: a sequence belongs to the smallest that names it.
SPLIT_LISTS = {
    "train": "train",
    "val": "val",
    "test": "test",
    "test_set": "test",
    "raw_small": "raw_small",
    "raw_medium": "raw_medium",
    "raw_large": "raw_large",
}
EGO_FROM_LIDAR = Pose(np.array([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]), np.zeros(3))
_PREPARER = "once/1"  # raise when the same raw data would give other prepared frames
_LAYOUT = ("x", "y", "z", "intensity")
_MAX_JSON_BYTES = 1 << 28
_MAX_NAME = 64


@dataclass(frozen=True, slots=True, eq=False)
class OnceFrame:
    """What the file of a sequence says of one sweep."""

    frame_id: str  # name of the sweep's file: milliseconds since 1970
    global_from_lidar: Pose | None
    boxes: Boxes | None  # in the LiDAR frame, points not counted; None where nobody annotated

    @property
    def timestamp_us(self) -> int:
        """Microseconds since 1970."""
        return int(self.frame_id) * 1000


@dataclass(frozen=True, slots=True)
class _Source:
    """A sequence on disk."""

    folder: Path
    present: tuple[bool, ...]  # of every frame in order of time: is its sweep there?

    @property
    def info(self) -> Path:
        return self.folder / f"{self.folder.name}.json"

    def sweep(self, frame: OnceFrame) -> Path:
        return sweep_file(self.folder, frame)

    def frames(self) -> list[OnceFrame]:
        """Those whose sweep is there."""
        return [frame for frame, there in zip(read_once_sequence(self.info), self.present, strict=True) if there]


def prepare_once(
    raw: Path,
    out: Path,
    *,
    sweeps: int = 4,
    skip_missing: bool = False,
    name: str = "once",
    xyz_codec: Codec = PLANES,
    processes: int = 1,
    progress: Progress | None = None,
) -> PreparedSummary:
    """Prepares the sequences on disk; a rerun makes only what is missing. A sequence with a damaged file is set aside.

    All sweeps are keyframes, in the frame of the LiDAR; ``ego_from_lidar`` turns x forward. Frames without annotations have
    no boxes at all (None). Velocities are unknown, tracks have no names, the points in each box are counted here. A sequence
    that no list names is an error, as is one that two of train, val and test name; without ``ImageSets`` all are ``train``.

    Args:
        raw: the folder that holds ``data/`` and ``ImageSets/``.
        out: folder for the prepared frames.
        sweeps: how many earlier sweeps each frame is linked to, where both have a pose.
        skip_missing: leave out sweeps, and sequences, whose files are not on disk, and say how many files.
        name: name of the dataset.
        xyz_codec: how coordinates are stored; the default is lossless.
        processes: logs made side by side. The bytes do not depend on it.
        progress: called with (frames done, frames in all).

    Raises:
        DataError: if there is nothing to read, the lists contradict each other, files are missing (unless `skip_missing`), or
            no sequence could be read.
    """
    settings = {"preparer": _PREPARER, "sweeps": sweeps, "xyz_codec": str(xyz_codec)}
    plans: list[LogPlan] = []
    missing: list[Path] = []
    splits: dict[str, list[str]] = {}
    for sequence, split in once_sequences(raw).items():
        try:
            source, absent = _source(raw / "data" / sequence)
            missing += absent
            if source is None or not any(source.present):
                continue
            plans.append(_plan(source, name, settings))
        except DataError as error:
            plans.append(damaged_plan(LogHeader(sequence, name, None, settings), error))
        splits.setdefault(split, []).append(sequence)
    refuse_missing(raw, missing, skip_missing=skip_missing)
    if not plans:
        raise DataError(f"{raw}: no sequence holds a sweep data/*/lidar_roof/*.bin. Download a LiDAR archive first.")
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


def once_sequences(raw: Path) -> dict[str, str]:
    """Sequences on disk in order of their names -> their splits.

    Raises:
        DataError: if there is no sequence, a list names something outside of the folder, or the lists contradict each other
            or leave a sequence out.
    """
    data = raw / "data"
    present = sorted(path.name for path in data.iterdir() if path.is_dir()) if data.is_dir() else []
    if not present:
        raise DataError(f"{raw}: holds no data/<sequence>/. Name the folder above `data` and `ImageSets`.")
    lists = raw / "ImageSets"
    if not lists.is_dir():
        return dict.fromkeys(present, "train")
    split_of: dict[str, str] = {}
    for stem, split in SPLIT_LISTS.items():
        path = lists / f"{stem}.txt"
        if not path.exists():
            continue
        for sequence in read_bounded(path, max_bytes=MAX_TEXT_BYTES).decode(errors="replace").split():
            path_inside(data, sequence)
            before = split_of.setdefault(sequence, split)
            if before != split and not (before.startswith("raw") and split.startswith("raw")):
                raise DataError(
                    f"{path}: sequence {sequence} is in the list of split {before} too; scores would be flattered. Delete it "
                    "in one of the two."
                )
    unnamed = [sequence for sequence in present if sequence not in split_of]
    if unnamed:
        raise DataError(
            f"{lists}: no list names sequence {unnamed[0]} ({len(unnamed)} such), so it has no split. Add it to a list or "
            "move it out of data/."
        )
    return {sequence: split_of[sequence] for sequence in present}


def read_once_sequence(path: Path) -> list[OnceFrame]:
    """The frames that ``<sequence>.json`` lists, in order of time.

    A pose is (x, y, z, w) of a quaternion and a translation in metres, LiDAR to global; none, or a quaternion of zeros, means
    that the pose is unknown. Boxes are centre, length, width, height, yaw.

    Raises:
        DataError: if the file is missing, not JSON, or a frame in it is not one.
    """
    frames = read_json_object(path, max_bytes=_MAX_JSON_BYTES).get("frames")
    if not isinstance(frames, list):
        raise DataError(f"{path}: has no list 'frames'; it is not the file of an ONCE sequence. {FETCH_AGAIN}")
    found: list[OnceFrame] = []
    for index, frame in enumerate(frames):
        frame_id = str(frame.get("frame_id")) if isinstance(frame, dict) else ""
        if not (frame_id.isascii() and frame_id.isdigit() and len(frame_id) <= 15):
            raise DataError(
                f"{path}, frames[{index}]: {frame_id[:_MAX_NAME]!r} is no frame_id, the sweep's time in milliseconds. "
                f"{FETCH_AGAIN}"
            )
        place = f"{path}, frame {frame_id}"
        found.append(OnceFrame(frame_id, _pose(frame.get("pose"), place), _boxes(frame.get("annos"), place)))
    found.sort(key=lambda frame: int(frame.frame_id))
    check_clock([frame.timestamp_us for frame in found], path)
    return found


def frame_of_once(frame: OnceFrame, sweep: Path, log: str, index: int, *, previous: tuple[int, ...] = ()) -> tuple[Frame, int]:
    """A frame with its points, and how many it lost because they were not finite.

    Args:
        frame: from :func:`read_once_sequence`.
        sweep: its ``.bin`` file, rows of x, y, z (metres), intensity (0..255), float32.
        log, index: where it belongs.
        previous: indices of earlier frames, newest first.

    Raises:
        DataError: if the file is missing or cut off.
    """
    points = read_points(sweep, _LAYOUT, IntensityUnit.RAW_255)
    points, _, _, lost = keep_points(finite_points(points), points)
    made = Frame(
        log=log,
        index=index,
        token=frame.frame_id,
        timestamp_us=frame.timestamp_us,
        points=points,
        global_from_ego=None if frame.global_from_lidar is None else frame.global_from_lidar @ EGO_FROM_LIDAR.inverse(),
        ego_from_lidar=EGO_FROM_LIDAR,
        boxes=None if frame.boxes is None else _counted(frame.boxes, points.xyz),
        previous=previous,
    )
    return made, lost


def _source(folder: Path) -> tuple[_Source | None, list[Path]]:
    """A sequence, and the files that should be there and are not."""
    info = folder / f"{folder.name}.json"
    if not info.is_file():
        return None, [info]  # LiDAR and annotations come in different archives
    frames = read_once_sequence(info)
    present = tuple(sweep_file(folder, frame).is_file() for frame in frames)
    absent = [sweep_file(folder, frame) for frame, there in zip(frames, present, strict=True) if not there]
    return _Source(folder, present), absent


def sweep_file(folder: Path, frame: OnceFrame) -> Path:
    """Where the points of a frame are; `folder` is that of its sequence."""
    return folder / "lidar_roof" / f"{frame.frame_id}.bin"


def _plan(source: _Source, dataset: str, settings: dict[str, Any]) -> LogPlan:
    # Frames are read again when they are made: a plan of a million of them would fill the memory.
    sizes = [[frame.frame_id, file_size(source.sweep(frame))] for frame in source.frames()]
    contents = checksum_file(source.info)
    header = LogHeader(source.folder.name, dataset, None, {**settings, "raw_crc32c": checksum([*sizes, contents])})
    return LogPlan(header, len(sizes), partial(_frames, source, settings["sweeps"]))


def _frames(source: _Source, sweeps: int) -> Iterator[tuple[Frame, int]]:
    frames = source.frames()
    for index, frame in enumerate(frames):
        earlier = previous_sweeps(index, sweeps) if frame.global_from_lidar is not None else ()
        previous = tuple(i for i in earlier if frames[i].global_from_lidar is not None)
        yield frame_of_once(frame, source.sweep(frame), source.folder.name, index, previous=previous)


def _pose(tree: object, place: str) -> Pose | None:
    if tree is None or tree == []:
        return None
    numbers = _numbers(tree, (7,), f"{place}, pose")
    if not numbers[:4].any():
        return None
    if abs(np.linalg.norm(numbers[:4]) - 1) > 1e-2:
        raise DataError(f"{place}, pose: {numbers[:4].tolist()} is no unit quaternion (x, y, z, w). {FETCH_AGAIN}")
    return Pose.from_quaternion(numbers[[3, 0, 1, 2]], numbers[4:])


def _boxes(tree: object, place: str) -> Boxes | None:
    if tree is None:
        return None
    if not isinstance(tree, dict) or not isinstance(tree.get("names"), list):
        raise DataError(f"{place}: its annos are no object with names and boxes_3d. {FETCH_AGAIN}")
    names: Sequence[Any] = tree["names"]
    unknown = [name for name in names if name not in CATEGORIES]
    if unknown:
        raise DataError(f"{place}: category {str(unknown[0])[:_MAX_NAME]!r} is none of {', '.join(CATEGORIES)}. {FETCH_AGAIN}")
    rows = _numbers(tree.get("boxes_3d") or np.zeros((0, 7)), (len(names), 7), f"{place}, boxes_3d")
    thin = np.flatnonzero((rows[:, 3:6] <= 0).any(axis=1))
    if len(thin):
        raise DataError(f"{place}, boxes_3d: box {thin[0]} has a side of {rows[thin[0], 3:6].min():g} m. {FETCH_AGAIN}")
    count = len(names)
    return Boxes(
        center=rows[:, :3],
        size=rows[:, 3:6],
        yaw=rows[:, 6],
        velocity=np.full((count, 2), np.nan),
        category=tuple(names),
        track_id=("",) * count,
        num_points=np.full(count, -1, np.int32),
    )


def _counted(boxes: Boxes, xyz: NDArray[np.float32]) -> Boxes:
    rows = np.concatenate([boxes.center, boxes.size, boxes.yaw[:, None]], axis=1)
    counts = np.array([len(inside) for inside in rows_inside(xyz, rows)], np.int32)
    return replace(boxes, num_points=counts)


def _numbers(tree: object, shape: tuple[int, ...], place: str) -> NDArray[np.float64]:
    try:
        numbers = np.array(tree, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise DataError(f"{place}: holds something else than numbers. {FETCH_AGAIN}") from None
    if numbers.shape != shape:
        raise DataError(f"{place}: has shape {numbers.shape}, expected {shape}. {FETCH_AGAIN}")
    if not np.isfinite(numbers).all():
        raise DataError(f"{place}: holds NaN or infinity. {FETCH_AGAIN}")
    return numbers
