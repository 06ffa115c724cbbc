"""The Waymo Open Dataset v2 (Parquet components) -> the prepared frames that v1 gives; see :mod:`picture3d.datasets.waymo`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from picture3d.datasets.label_sets import WAYMO
from picture3d.datasets.prepared import LogHeader, PreparedSummary
from picture3d.datasets.preparing import LogPlan, Progress, checksum, checksum_file, previous_sweeps, write_logs
from picture3d.datasets.waymo import FLAT_FOLDER, SPLIT_FOLDERS, frame_of_waymo, segment_files
from picture3d.errors import DataError
from picture3d.formats.columns import PLANES, Codec
from picture3d.formats.waymo_v2 import (
    BOX,
    CALIBRATION,
    LIDAR,
    REQUIRED,
    SEGMENTATION,
    SUFFIX,
    VEHICLE_POSE,
    component_file,
    frame_count,
    read_segment,
)
from picture3d.structures.frame import Frame

_PREPARER = "waymo-v2/1"  # raise when the same raw data would give other prepared frames
_SMALL = (VEHICLE_POSE, CALIBRATION, BOX)  # their content is told by a checksum, of the others the size


def is_waymo_v2(raw: Path) -> bool:
    """True if a folder holds components of v2, in ``training/lidar/*.parquet`` for example."""
    return any(segments_of(raw / folder) for folder in SPLIT_FOLDERS)


def waymo_version(raw: Path) -> int | None:
    """1 if a folder holds tfrecords of Waymo, 2 if it holds components of v2, None if neither.

    Raises:
        DataError: if it holds both.
    """
    first = any(segment_files(raw / folder) for folder in (*SPLIT_FOLDERS, FLAT_FOLDER))
    if is_waymo_v2(raw):
        if first:
            raise DataError(f"{raw}: holds tfrecords (v1) and Parquet components (v2). Keep one version in this folder.")
        return 2
    return 1 if first else None


def segments_of(folder: Path) -> list[str]:
    """Names of the segments that have any of the required components or boxes in the folder of a split, in order."""
    return sorted({path.stem for component in (*REQUIRED, BOX) for path in (folder / component).glob(f"*{SUFFIX}")})


def prepare_waymo_v2(
    raw: Path,
    out: Path,
    *,
    sweeps: int = 9,
    name: str = "waymo",
    xyz_codec: Codec = PLANES,
    processes: int = 1,
    progress: Progress | None = None,
) -> PreparedSummary:
    """Prepares the segments on disk; frames, logs and what is set aside are as :func:`prepare_waymo` has them.

    A segment needs ``lidar``, ``lidar_pose``, ``lidar_calibration`` and ``vehicle_pose``, and ``lidar_box`` where its split has
    that folder; ``lidar_segmentation`` is read where it is. A segment that lacks a component is set aside. Without any
    ``lidar_box`` frames have no boxes at all.

    Args:
        raw: the folder that holds ``training/``, ``validation/`` or ``testing/`` with a folder per component in each.
        out: folder for the prepared frames.
        sweeps: how many earlier frames each frame is linked to; how many are used is chosen when frames are loaded.
        name: name of the dataset.
        xyz_codec: how coordinates are stored; the default is lossless.
        processes: segments made side by side. The bytes do not depend on it.
        progress: called with (frames done, frames in all).

    Raises:
        ConfigError: if pyarrow is not installed.
        DataError: if there is nothing to read, a segment is in two splits, none could be read, or `out` cannot be written.
    """
    plans: list[LogPlan] = []
    splits: dict[str, list[str]] = {}
    home: dict[str, Path] = {}
    for folder, split in SPLIT_FOLDERS.items():
        for segment in segments_of(raw / folder):
            if segment in home:
                raise DataError(f"{raw / folder}: holds segment {segment}, as {home[segment]} does. Remove one of the two.")
            home[segment] = raw / folder
            splits.setdefault(split, []).append(segment)
            settings = {"preparer": _PREPARER, "sweeps": sweeps, "xyz_codec": str(xyz_codec), "split": split}
            plans.append(_plan(raw / folder, segment, name, settings))
    if not plans:
        raise DataError(
            f"{raw}: no {LIDAR}/*{SUFFIX} in {', '.join(f'{folder}/' for folder in SPLIT_FOLDERS)}. Name the folder above them."
        )
    return write_logs(
        out,
        plans,
        name=name,
        label_set_name=WAYMO.name,
        splits=splits,
        xyz_codec=xyz_codec,
        processes=processes,
        progress=progress,
    )


def frames_of_segment(folder: Path, segment: str, split: str, sweeps: int = 0) -> Iterator[tuple[Frame, int]]:
    """The frames of a segment, each with the number of points it lost because they were not finite.

    Args:
        folder: of the split.
        segment: name of the segment.
        split: test frames without boxes were not annotated; in the other splits there was nothing to annotate.
        sweeps: how many earlier frames each frame is linked to.

    Raises:
        ConfigError: if pyarrow is not installed.
        DataError: if a component is missing, damaged, or contradicts another.
    """
    annotated = split != "test" and (folder / BOX).is_dir()
    for index, raw in enumerate(read_segment(folder, segment)):
        where = f"{component_file(folder, LIDAR, segment)}, time {raw.timestamp_us} us"
        yield frame_of_waymo(raw, segment, index, where, previous=previous_sweeps(index, sweeps), annotated=annotated)


def _plan(folder: Path, segment: str, dataset: str, settings: Mapping[str, Any]) -> LogPlan:
    seen: list[list[object]] = []
    for component in (*REQUIRED, BOX, SEGMENTATION):
        path = component_file(folder, component, segment)
        if path.is_file():
            seen.append([component, checksum_file(path) if component in _SMALL else path.stat().st_size])
    try:
        count = frame_count(folder, segment)
    except DataError:
        count = 1  # reading the frames says what is wrong, and where
    header = LogHeader(segment, dataset, WAYMO.name, {**settings, "raw_crc32c": checksum(seen)})
    return LogPlan(header, count, partial(frames_of_segment, folder, segment, settings["split"], int(settings["sweeps"])))
