"""Raw nuScenes v1.0 -> prepared frames. One scene becomes one log of its LiDAR sweeps in order of time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from picture3d.datasets.label_sets import NUSCENES_32
from picture3d.datasets.nuscenes_splits import official_split
from picture3d.datasets.prepared import LogHeader, PreparedSummary
from picture3d.datasets.preparing import (
    LogPlan,
    Progress,
    checksum,
    finite_points,
    keep_points,
    refuse_missing,
    write_logs,
)
from picture3d.errors import DataError
from picture3d.files import read_json_object
from picture3d.formats.columns import PLANES, Codec
from picture3d.formats.nuscenes_tables import (
    RawAnnotation,
    RawScene,
    RawSweep,
    RawTables,
    path_inside,
    read_lidarseg,
    read_panoptic,
    read_sweep,
    read_tables,
)
from picture3d.structures.boxes import Boxes
from picture3d.structures.frame import Frame
from picture3d.structures.points import IntensityUnit, PointCloud
from picture3d.structures.poses import Pose

SPLITS_FILE = "picture3d_splits.json"
LABEL_FOLDERS = ("lidarseg", "panoptic")
_PREPARER = "nuscenes/2"  # raise when the same raw data would give other prepared frames
_MAX_SPLITS_BYTES = 1 << 24
_MAX_TIME_DIFF_S = 1.5  # a velocity over a longer gap is unknown; twice as much for a central difference


@dataclass(frozen=True, slots=True, eq=False)
class _Plan:
    """What one log will hold."""

    header: LogHeader
    tables: RawTables  # of its scene alone, so that a process that makes it is sent no more than it needs
    sweeps: tuple[RawSweep, ...]  # kept ones, in order of time
    previous: tuple[tuple[int, ...], ...]  # of each, indices into `sweeps`, newest first


def prepare_nuscenes(
    raw: Path,
    out: Path,
    *,
    version: str = "v1.0-mini",
    sweeps: int = 9,
    skip_missing: bool = False,
    name: str | None = None,
    xyz_codec: Codec = PLANES,
    processes: int = 1,
    progress: Progress | None = None,
) -> PreparedSummary:
    """Prepares a raw nuScenes dataset; a rerun makes only what is missing.

    A log holds the scene's LIDAR_TOP keyframes and the `sweeps` sweeps before each. Points are in the LiDAR frame of their own
    sweep. Boxes are in the LiDAR frame of their keyframe, all of them kept, with the number of LiDAR points that the
    table states and the velocity as the devkit defines it (see :func:`velocity_global`), NaN where it is unknown. A scene with
    a damaged file is set aside.

    Args:
        raw: the folder that holds ``samples/``, ``sweeps/``, ``v1.0-*/`` and, for labels, ``lidarseg/`` and ``panoptic/``;
            these two may lie beside it as well.
        out: folder for the prepared frames.
        version: name of the table folder.
        sweeps: how many earlier sweeps are kept for each keyframe.
        skip_missing: leave out files that tables list and that are not on disk, and say how many.
        name: name of the dataset; by default ``nuscenes-`` and the version.
        xyz_codec: how coordinates are stored; the default is lossless.
        processes: scenes made side by side; the tables are read once. The bytes do not depend on it.
        progress: called with (frames done, frames in all).

    Raises:
        DataError: if tables are missing, damaged or contradict each other, files are missing (unless `skip_missing`), or no
            scene could be read.
    """
    tables = read_tables(raw, version)
    _check_categories(tables, raw / version)
    name = name or f"nuscenes-{version}"
    settings = {"preparer": _PREPARER, "version": version, "sweeps": sweeps, "xyz_codec": str(xyz_codec)}
    plans, missing = _plans(raw, tables, name, sweeps, settings)
    refuse_missing(raw, missing, skip_missing=skip_missing)
    splits = _splits(raw, version, [plan.header.log for plan in plans])
    if not plans:
        raise DataError(f"{raw}: no LIDAR_TOP sweep of {version} is on disk. Download samples/LIDAR_TOP first.")

    logs = [LogPlan(plan.header, len(plan.sweeps), partial(_frames, raw, plan)) for plan in plans]
    return write_logs(
        out,
        logs,
        name=name,
        label_set_name=NUSCENES_32.name,
        splits=splits,
        missing_files=len(missing),
        xyz_codec=xyz_codec,
        processes=processes,
        progress=progress,
    )


def nuscenes_frames(raw: Path, tables: RawTables, version: str, *, sweeps: int = 9) -> Iterator[tuple[Frame, int]]:
    """The frames that :func:`prepare_nuscenes` would store, scene after scene, and how many points each lost.

    Sweeps and labels that are not on disk are passed over.

    Raises:
        DataError: if a file is damaged.
    """
    for scene in tables.scenes:
        plan, _ = _plan(raw, tables, scene, "nuscenes", sweeps, {"version": version})
        if plan is not None:
            yield from _frames(raw, plan)


def velocity_global(annotation: RawAnnotation, tables: RawTables) -> NDArray[np.float64]:
    """(3,) float64 velocity of an annotated object, m/s, global axes; NaN where it is unknown.

    The central difference between the object's annotations in the samples before and after, one-sided at the ends of its
    track. Unknown for an object seen once, and where the two are more than 1.5 s apart (3 s if central).
    """
    first = tables.annotations.get(annotation.prev, annotation)
    last = tables.annotations.get(annotation.next, annotation)
    seconds = (tables.sample_time_us[last.sample_token] - tables.sample_time_us[first.sample_token]) * 1e-6
    central = first is not annotation and last is not annotation
    if not 0 < seconds <= _MAX_TIME_DIFF_S * (2 if central else 1):
        return np.full(3, np.nan)
    return (np.array(last.translation) - np.array(first.translation)) / seconds


def boxes_in_lidar(sample_token: str, global_from_lidar: Pose, tables: RawTables) -> Boxes:
    """The boxes of a sample in the frame of its LiDAR; see :class:`Boxes` for the convention."""
    annotations = [tables.annotations[token] for token in tables.of_sample.get(sample_token, ())]
    if not annotations:
        return Boxes.empty()
    lidar_from_global = global_from_lidar.inverse()
    boxes = [lidar_from_global @ Pose.from_quaternion(a.rotation, a.translation) for a in annotations]
    width, length, height = np.array([a.size_wlh for a in annotations], np.float64).T
    velocities = np.array([velocity_global(a, tables) for a in annotations])
    return Boxes(
        center=np.array([box.translation for box in boxes]),
        size=np.stack([length, width, height], axis=1),
        yaw=np.array([box.yaw for box in boxes]),
        velocity=(velocities @ lidar_from_global.rotation.T)[:, :2],
        category=tuple(a.category for a in annotations),
        track_id=tuple(a.instance_token for a in annotations),
        num_points=np.array([a.num_lidar_pts for a in annotations], np.int32),
        num_radar_points=np.array([a.num_radar_pts for a in annotations], np.int32),
        attribute=tuple(a.attribute for a in annotations),
    )


def _plans(raw: Path, tables: RawTables, dataset: str, sweeps: int, settings: dict[str, Any]) -> tuple[list[_Plan], list[str]]:
    """One plan per scene that has a sweep on disk, and the listed files that are not there."""
    plans: dict[str, _Plan] = {}
    missing: list[str] = []
    for scene in tables.scenes:
        plan, absent = _plan(raw, tables, scene, dataset, sweeps, settings)
        missing += absent
        if plan is None:
            continue
        if scene.name in plans:
            raise DataError(
                f"{raw / settings['version'] / 'scene.json'}: two scenes are called {scene.name!r}. Rename one of them."
            )
        plans[scene.name] = plan
    return list(plans.values()), missing


def _plan(
    raw: Path, tables: RawTables, scene: RawScene, dataset: str, sweeps: int, settings: dict[str, Any]
) -> tuple[_Plan | None, list[str]]:
    """What the log of a scene will hold, None if it has no sweep on disk, and the listed files that are not there."""
    present: list[RawSweep] = []
    missing: list[str] = []
    sizes: dict[str, int] = {}
    listed = tables.sweeps[scene.token]
    for sweep in _needed(listed, sweeps):
        size = _size(path_inside(raw, sweep.filename))
        if size < 0:
            missing.append(sweep.filename)
            continue
        for label_file in (sweep.lidarseg, sweep.panoptic):
            if label_file is not None:
                sizes[label_file] = _size(label_path(raw, label_file))
                if sizes[label_file] < 0:
                    missing.append(label_file)
        sizes[sweep.filename] = size
        present.append(sweep)
    if not present:
        return None, missing
    keyframe_samples = [sweep.sample_token for sweep in present if sweep.is_keyframe]
    source: dict[str, Any] = {
        **settings,
        "scene": scene.token,
        "keyframe_samples": keyframe_samples,
        "raw_crc32c": _fingerprint(present, sizes, keyframe_samples, tables),
    }
    header = LogHeader(log=scene.name, dataset=dataset, label_set=NUSCENES_32.name, source=source)
    return _Plan(header, tables.of_scene(scene), tuple(present), _links(listed, present, sweeps)), missing


def _needed(listed: tuple[RawSweep, ...], sweeps: int) -> list[RawSweep]:
    """The keyframes and the `sweeps` sweeps before each."""
    wanted: set[int] = set()
    for index, sweep in enumerate(listed):
        if sweep.is_keyframe:
            wanted.update(range(max(0, index - sweeps), index + 1))
    return [listed[index] for index in sorted(wanted)]


def _links(listed: tuple[RawSweep, ...], kept: list[RawSweep], sweeps: int) -> tuple[tuple[int, ...], ...]:
    """For every kept sweep the kept ones among the `sweeps` listed before it, newest first."""
    position = {sweep.token: index for index, sweep in enumerate(listed)}
    at = [position[sweep.token] for sweep in kept]
    return tuple(tuple(j for j in range(i - 1, -1, -1) if at[i] - at[j] <= sweeps)[:sweeps] for i in range(len(kept)))


def _frames(raw: Path, plan: _Plan) -> Iterator[tuple[Frame, int]]:
    """The frames of a log, and how many points each lost because they were not finite."""
    for index, sweep in enumerate(plan.sweeps):
        yield frame_of_sweep(raw, plan.tables, sweep, plan.header.log, index, previous=plan.previous[index])


def frame_of_sweep(
    raw: Path, tables: RawTables, sweep: RawSweep, log: str, index: int, *, previous: tuple[int, ...] = ()
) -> tuple[Frame, int]:
    """A frame, and how many points it lost because they were not finite. Labels whose file is not on disk are left out.

    Raises:
        DataError: if a file is missing or damaged, or labels and points are not as many.
    """
    path = path_inside(raw, sweep.filename)
    columns = read_sweep(path)
    labels = _per_point(raw, sweep.lidarseg, read_lidarseg, len(columns), path)
    instances = _per_point(raw, sweep.panoptic, read_panoptic, len(columns), path)
    points = PointCloud(
        xyz=np.ascontiguousarray(columns[:, :3]),
        intensity=np.ascontiguousarray(columns[:, 3]),
        intensity_unit=IntensityUnit.RAW_255,
        ring=np.clip(np.nan_to_num(columns[:, 4], nan=0), 0, 32767).astype(np.int16),
    )
    finite = finite_points(points) & np.isfinite(columns[:, 4])
    points, labels, instances, lost = keep_points(finite, points, labels, instances)
    frame = Frame(
        log=log,
        index=index,
        token=sweep.token,
        timestamp_us=sweep.timestamp_us,
        points=points,
        global_from_ego=sweep.global_from_ego,
        ego_from_lidar=sweep.ego_from_lidar,
        is_keyframe=sweep.is_keyframe,
        labels=labels,
        instances=instances,
        boxes=_boxes(sweep, tables),
        previous=previous,
    )
    return frame, lost


def _boxes(sweep: RawSweep, tables: RawTables) -> Boxes | None:
    if not sweep.is_keyframe or not tables.annotations:
        return None
    return boxes_in_lidar(sweep.sample_token, sweep.global_from_ego @ sweep.ego_from_lidar, tables)


def _per_point(raw: Path, filename: str | None, read: Callable[[Path], Any], count: int, sweep: Path) -> Any:
    """The labels of a sweep, or None where none are listed or their file is among those left out."""
    if filename is None:
        return None
    path = label_path(raw, filename)
    if _size(path) < 0:
        return None
    labels = read(path)
    if len(labels) != count:
        raise DataError(f"{path}: {len(labels)} labels for the {count} points of {sweep}. Download both again.")
    return labels


def label_path(raw: Path, filename: str) -> Path:
    """Where a file of labels lies that a table names: in the raw folder, or in ``lidarseg/`` or ``panoptic/`` beside it.

    Raises:
        DataError: if the name steps out of the folder.
    """
    path = path_inside(raw, filename)
    first = PurePosixPath(filename).parts[0]
    if first in LABEL_FOLDERS and not (raw / first).exists() and (raw.resolve().parent / first).is_dir():
        return path_inside(raw.resolve().parent, filename)
    return path


def _size(path: Path) -> int:
    """Bytes of a file, or -1 if it is not there."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _fingerprint(sweeps: list[RawSweep], sizes: dict[str, int], samples: list[str], tables: RawTables) -> int:
    """A checksum of what a log is made from: tables in full, files by name and size."""

    def lines() -> Iterator[list[object]]:
        for sweep in sweeps:
            poses = [p.matrix[:3].ravel().tolist() for p in (sweep.global_from_ego, sweep.ego_from_lidar)]
            files = [(file, sizes.get(file)) for file in (sweep.filename, sweep.lidarseg, sweep.panoptic) if file]
            yield [sweep.token, sweep.timestamp_us, sweep.is_keyframe, files, poses]
        for sample in samples:
            for token in tables.of_sample.get(sample, ()):
                a = tables.annotations[token]
                yield [
                    a.translation, a.size_wlh, a.rotation, a.instance_token, a.category, a.prev, a.next, a.num_lidar_pts,
                    a.num_radar_pts, a.attribute,
                ]  # fmt: skip

    return checksum(lines())


def _check_categories(tables: RawTables, folder: Path) -> None:
    """The ids in label files are those of `category.json`; they must mean what the label set says."""
    for name, index in tables.category_index.items():
        if not 0 <= index < len(NUSCENES_32.class_names) or NUSCENES_32.class_names[index] != name:
            raise DataError(
                f"{folder / 'category.json'}: '{name}' has index {index}, which is not the official lidarseg id. Take "
                "category.json and the label files from the official lidarseg download."
            )


def _splits(raw: Path, version: str, logs: list[str]) -> dict[str, list[str]]:
    """Split -> logs that are there: from the dataset's own file if it has one, else the official lists."""
    path = raw / SPLITS_FILE
    splits: dict[str, list[str]] = {"train": [], "val": []}
    if not path.exists():
        for log in logs:
            splits.setdefault(official_split(version, log), []).append(log)
        return {split: members for split, members in splits.items() if members or split in ("train", "val")}
    listed = read_json_object(path, max_bytes=_MAX_SPLITS_BYTES).get("splits")
    if not isinstance(listed, dict):
        raise DataError(
            f"{path}: has no object 'splits' that maps each split to its scene names. Write it so, or remove it for the "
            "official splits."
        )
    for split, members in listed.items():
        if not isinstance(members, list):
            raise DataError(
                f"{path}: split '{split}' is not a list of scene names. Write one, or remove the file for the official splits."
            )
        splits[str(split)] = [log for log in logs if log in members]
    return splits
