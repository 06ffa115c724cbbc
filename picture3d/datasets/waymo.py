"""The Waymo Open Dataset v1.x (tfrecords of perception frames) -> prepared frames. One segment becomes one log.

Points of all LiDARs and both returns, boxes and poses are in the vehicle frame of their own frame, which is the LiDAR frame
of prepared data (`ego_from_lidar` is the identity). Every frame is a keyframe.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from picture3d.datasets.label_sets import WAYMO
from picture3d.datasets.prepared import LogHeader, PreparedSummary
from picture3d.datasets.preparing import (
    LogPlan,
    Progress,
    check_clock,
    checksum,
    finite_points,
    keep_points,
    previous_sweeps,
    refuse_missing,
    write_logs,
)
from picture3d.errors import FETCH_AGAIN, DataError
from picture3d.files import read_bounded
from picture3d.formats.columns import PLANES, Codec
from picture3d.formats.point_tables import MAX_TEXT_BYTES
from picture3d.formats.range_image import points_of_range_image
from picture3d.formats.tfrecord import read_records, record_lengths
from picture3d.formats.waymo_frame import (
    LASER_NAMES,
    TOP,
    LaserLabels,
    WaymoFrame,
    read_frame,
)
from picture3d.formats.waymo_objects import CYCLIST, PEDESTRIAN, SIGN, UNKNOWN, VEHICLE
from picture3d.structures.boxes import Boxes
from picture3d.structures.frame import Frame
from picture3d.structures.points import IntensityUnit, PointCloud
from picture3d.structures.poses import Pose

# Folders of the download -> names of the splits.
SPLIT_FOLDERS = {"training": "train", "validation": "val", "testing": "test"}
# The layout of OpenPCDet and the code made from it: all segments in one folder, their splits in lists beside it.
FLAT_FOLDER, LISTS_FOLDER = "raw_data", "ImageSets"
_LISTS = ("train", "val", "test")
CATEGORIES = {UNKNOWN: "unknown", VEHICLE: "vehicle", PEDESTRIAN: "pedestrian", SIGN: "sign", CYCLIST: "cyclist"}
_PREPARER = "waymo/1"  # raise when the same raw data would give other prepared frames
_SEGMENT = re.compile(r"segment-(.+?)(_with_camera_labels)?")
_FARTHEST_M = 1e4
_MAX_INSTANCE = np.iinfo(np.uint16).max
_MAX_CLASS = np.iinfo(np.uint8).max


def prepare_waymo(
    raw: Path,
    out: Path,
    *,
    sweeps: int = 9,
    skip_missing: bool = False,
    name: str = "waymo",
    xyz_codec: Codec = PLANES,
    processes: int = 1,
    progress: Progress | None = None,
) -> PreparedSummary:
    """Prepares the segments on disk; a rerun makes only what is missing or was made from other files.

    A segment whose file is damaged is set aside: it is not in the dataset, the summary says why, and the others go on. Boxes of
    type "unknown" are left out; categories are vehicle, pedestrian, sign and cyclist.

    Args:
        raw: the folder that :func:`waymo_segments` takes.
        out: folder for the prepared frames.
        sweeps: how many earlier frames each frame is linked to; how many are used is chosen when frames are loaded.
        skip_missing: leave out segments that ``ImageSets`` lists and that are not on disk, and say how many.
        name: name of the dataset.
        xyz_codec: how coordinates are stored; the default is lossless.
        processes: segments made side by side; each needs the memory of one frame. The bytes do not depend on it.
        progress: called with (frames done, frames in all).

    Raises:
        DataError: if there is nothing to read, two files hold the same segment, segments are missing (unless `skip_missing`),
            no file could be read, or `out` cannot be written.
    """
    plans: list[LogPlan] = []
    splits: dict[str, list[str]] = {}
    files: dict[str, Path] = {}
    segments, missing = waymo_segments(raw)
    for path, split in segments:
        log = segment_name(path)
        if log in files:
            raise DataError(f"{path}: holds segment {log}, as {files[log]} does. Remove one of the two.")
        files[log] = path
        splits.setdefault(split, []).append(log)
        plans.append(_plan(path, log, split, name, {"preparer": _PREPARER, "sweeps": sweeps, "xyz_codec": str(xyz_codec)}))
    if not plans:
        raise DataError(
            f"{raw}: no tfrecord in {', '.join(f'{folder}/' for folder in (*SPLIT_FOLDERS, FLAT_FOLDER))}, and no Parquet "
            "component (v2) in their folders. Name the folder above them; a segment belongs to the split whose folder it lies "
            f"in, one of {FLAT_FOLDER}/ to that whose list in {LISTS_FOLDER}/ names it."
        )
    refuse_missing(raw, missing, skip_missing=skip_missing)
    return write_logs(
        out,
        plans,
        name=name,
        label_set_name=WAYMO.name,
        splits=splits,
        missing_files=len(missing),
        xyz_codec=xyz_codec,
        processes=processes,
        progress=progress,
    )


def waymo_segments(raw: Path) -> tuple[list[tuple[Path, str]], list[Path]]:
    """The tfrecords of v1 on disk, each with its split, and those that a list names and that are not there.

    `raw` holds ``training/``, ``validation/`` or ``testing/`` as they are downloaded; or ``raw_data/`` with all segments and
    ``ImageSets/train.txt``, ``val.txt``, ``test.txt`` that name the files of each split, one a line. Without ``ImageSets``
    everything in ``raw_data/`` is for training.

    Raises:
        DataError: if two lists name the same segment, or none names a segment of ``raw_data/``.
    """
    found = [(path, split) for folder, split in SPLIT_FOLDERS.items() for path in segment_files(raw / folder)]
    flat = segment_files(raw / FLAT_FOLDER)
    lists = raw / LISTS_FOLDER
    if not flat or not lists.is_dir():
        return found + [(path, "train") for path in flat], []
    split_of: dict[str, str] = {}
    for split in _LISTS:
        path = lists / f"{split}.txt"
        for line in read_bounded(path, max_bytes=MAX_TEXT_BYTES).decode(errors="replace").split() if path.is_file() else ():
            name = segment_name(Path(line))
            if split_of.setdefault(name, split) != split:
                raise DataError(f"{path}: segment {name} is in the list of split {split_of[name]} too. Remove it from one.")
    unnamed = [path for path in flat if segment_name(path) not in split_of]
    if unnamed:
        raise DataError(
            f"{lists}: no list names {unnamed[0].name} ({len(unnamed)} such), so it has no split. Add it to a list or move it "
            f"out of {FLAT_FOLDER}/."
        )
    present = {segment_name(path) for path in flat}
    missing = [raw / FLAT_FOLDER / f"segment-{name}.tfrecord" for name in split_of if name not in present]
    return found + [(path, split_of[segment_name(path)]) for path in flat], missing


def segment_files(folder: Path) -> list[Path]:
    """The tfrecords of a folder, in order of their names: in itself, or in one folder inside it per downloaded archive."""
    return sorted(path for pattern in ("*.tfrecord", "*/*.tfrecord") for path in folder.glob(pattern) if path.is_file())


def segment_name(path: Path) -> str:
    """Name of the segment that a file holds, by the file's name as published; without ``segment-...``, the whole stem."""
    stem = path.name.removesuffix(".tfrecord")
    match = _SEGMENT.fullmatch(stem)
    return match.group(1) if match else stem


def frame_of_waymo(
    raw: WaymoFrame, log: str, index: int, where: str, *, previous: tuple[int, ...] = (), annotated: bool = True
) -> tuple[Frame, int]:
    """A frame and the number of points it lost because they were not finite.

    Points come LiDAR by LiDAR (1 to 5), first return before second, row by row. `labels` and `instances` are there if the
    frame has 3-D segmentation; points of LiDARs without it are of class 0, undefined.

    Args:
        raw: from :func:`picture3d.formats.waymo_frame.read_frame` or :func:`picture3d.formats.waymo_v2.read_segment`.
        log, index: where it belongs.
        where: what errors call the frame.
        previous: indices of earlier frames, newest first.
        annotated: False if no labels mean that nobody looked, rather than that nothing was there.

    Raises:
        DataError: if a range image, its poses or its classes are damaged or contradict each other.
    """
    points, labels, instances = _points(raw, where)
    points, labels, instances, lost = keep_points(finite_points(points), points, labels, instances)
    farthest = float(np.abs(points.xyz).max(initial=0))
    if farthest > _FARTHEST_M:
        raise DataError(
            f"{where}: a point lies {farthest:.3g} m from the car, in its range images or poses (they see 75 m). {FETCH_AGAIN}"
        )
    frame = Frame(
        log=log,
        index=index,
        token=f"{log}_{index:03d}",
        timestamp_us=raw.timestamp_us,
        points=points,
        global_from_ego=raw.global_from_vehicle,
        ego_from_lidar=Pose.identity(),
        labels=labels,
        instances=instances,
        boxes=boxes_of_labels(raw.labels, raw.global_from_vehicle) if annotated or len(raw.labels) else None,
        previous=previous,
    )
    return frame, lost


def boxes_of_labels(labels: LaserLabels, global_from_vehicle: Pose) -> Boxes:
    """The labels that are of a known type; velocity and acceleration turned into the vehicle frame.

    Raises:
        DataError: if a label is of a type that this version does not know.
    """
    if len(labels) and int(labels.kind.max()) not in CATEGORIES:
        raise DataError(
            f"a label is of type {labels.kind.max()} (known are 0 to {max(CATEGORIES)}). Use a picture3d that knows this "
            "version of the data."
        )
    keep = np.flatnonzero(labels.kind != UNKNOWN)
    # Rows times a rotation: what is global becomes the vehicle's.
    velocity, acceleration = (v @ global_from_vehicle.rotation for v in (labels.velocity, labels.acceleration))
    return Boxes(
        center=labels.center,
        size=labels.size,
        yaw=labels.heading,
        velocity=velocity[:, :2],
        category=tuple(CATEGORIES[int(kind)] for kind in labels.kind),
        track_id=labels.id,
        num_points=labels.num_points,
        difficulty=labels.difficulty,
        acceleration=acceleration[:, :2],
    ).select(keep)


@np.errstate(over="ignore")  # what float32 cannot hold is not finite and will be dropped
def _points(raw: WaymoFrame, where: str) -> tuple[PointCloud, NDArray[np.uint8] | None, NDArray[np.uint16] | None]:
    # One list per column; a frame without a return is a frame without points.
    parts: dict[str, list[NDArray]] = {
        "xyz": [np.zeros((0, 3), np.float32)], "intensity": [np.zeros(0, np.float32)], "elongation": [np.zeros(0, np.float32)],
        "sensor": [np.zeros(0, np.uint8)], "return_index": [np.zeros(0, np.uint8)], "no_label_zone": [np.zeros(0, np.bool_)],
        "labels": [np.zeros(0, np.uint8)], "instances": [np.zeros(0, np.uint16)],
    }  # fmt: skip
    segmented = False
    for name in sorted(raw.lasers):
        poses: NDArray[np.float32] | None = None
        for number, streams in enumerate(raw.lasers[name], start=1):
            place = f"{where}, LiDAR {LASER_NAMES[name]}, return {number}"
            image = streams.read_range_image(f"{place}, range image")
            if image is None:
                continue
            if name not in raw.calibrations:
                raise DataError(f"{place}: the frame holds no calibration of it. {FETCH_AGAIN}")
            if name == TOP and poses is None:
                poses = _top_poses(raw, place)
            calibration = raw.calibrations[name]
            found = points_of_range_image(
                image,
                calibration.inclinations(len(image), place),
                calibration.vehicle_from_laser,
                pixel_poses=poses,
                global_from_vehicle=raw.global_from_vehicle,
                where=place,
            )
            count = len(found.pixel)
            labels, instances = np.zeros(count, np.uint8), np.zeros(count, np.uint16)
            classes = streams.read_segmentation(f"{place}, segmentation")
            if classes is not None:
                segmented = True
                labels, instances = _segmentation(classes, image.shape[:2], found.pixel, f"{place}, segmentation")
            for column, part in (
                ("xyz", found.xyz.astype(np.float32)),
                ("intensity", found.intensity),
                ("elongation", found.elongation),
                ("sensor", np.full(count, name, np.uint8)),
                ("return_index", np.full(count, number, np.uint8)),
                ("no_label_zone", found.no_label_zone),
                ("labels", labels),
                ("instances", instances),
            ):
                parts[column].append(part)
    whole = {column: np.concatenate(pieces) for column, pieces in parts.items()}
    labels, instances = whole.pop("labels"), whole.pop("instances")
    points = PointCloud(**whole, intensity_unit=IntensityUnit.RAW_UNBOUNDED)
    return points, labels if segmented else None, instances if segmented else None


def _top_poses(raw: WaymoFrame, place: str) -> NDArray[np.float32]:
    """Both returns of the TOP LiDAR are moved by the poses stored with the first."""
    poses = raw.lasers[TOP][0].read_pixel_poses(f"{place}, poses of the pixels")
    if poses is None:
        raise DataError(
            f"{place}: the frame lacks the poses of its pixels (v1: range_image_pose_compressed of the first return; v2: "
            f"lidar_pose), without which its points cannot be placed. {FETCH_AGAIN}"
        )
    return poses


def _segmentation(
    image: NDArray[np.integer], shape: Sequence[int], pixel: NDArray[np.int64], place: str
) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
    if image.shape[:2] != tuple(shape):
        raise DataError(f"{place}: has {image.shape[:2]} pixels, its range image {tuple(shape)}. {FETCH_AGAIN}")
    chosen = image.reshape(-1, 2)[pixel]
    for column, (what, largest) in enumerate((("instance", _MAX_INSTANCE), ("class", _MAX_CLASS))):
        strange = chosen[(chosen[:, column] < 0) | (chosen[:, column] > largest), column]
        if len(strange):
            raise DataError(f"{place}: a point has {what} {strange[0]} (those stored are 0 to {largest}). {FETCH_AGAIN}")
    return chosen[:, 1].astype(np.uint8), chosen[:, 0].astype(np.uint16)


def _plan(path: Path, log: str, split: str, dataset: str, settings: Mapping[str, Any]) -> LogPlan:
    lengths: list[tuple[int, int]] = []
    try:
        lengths += record_lengths(path)
    except DataError:
        lengths = [(path.stat().st_size, 0)]  # reading the frames says what is wrong, and where
    source = {**settings, "split": split, "raw_crc32c": checksum([path.name, *lengths])}
    header = LogHeader(log, dataset, WAYMO.name, source)
    return LogPlan(header, len(lengths), partial(_frames, path, log, split, int(settings["sweeps"])))


def _frames(path: Path, log: str, split: str, sweeps: int) -> Iterator[tuple[Frame, int]]:
    before: int | None = None
    index = -1
    for index, (offset, payload) in enumerate(read_records(path)):
        where = f"{path}, record {index} at byte {offset}"
        raw = read_frame(payload, where)
        if _SEGMENT.fullmatch(path.stem) and raw.context != log:
            raise DataError(
                f"{where}: belongs to segment {raw.context}, not to the one that the file is named after. Give the file the "
                "name it was downloaded with."
            )
        check_clock([raw.timestamp_us] if before is None else [before, raw.timestamp_us], where)
        before = raw.timestamp_us
        yield frame_of_waymo(
            raw, log, index, where, previous=previous_sweeps(index, sweeps), annotated=split != "test"
        )  # fmt: skip
    if index < 0:
        raise DataError(f"{path}: holds no record; fetch it again.")
