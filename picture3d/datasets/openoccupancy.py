"""nuScenes-Occupancy labels (OpenOccupancy), found and stored beside prepared frames.

A keyframe's label file is found by its scene and the token of its LiDAR sweep, as the dataset names it:
``nuScenes-Occupancy-v0.1/scene_<scene token>/occupancy/<sample_data token>.npy``. It is read once; what
:func:`read_openoccupancy` finds in it is stored without loss, see `occupancy_store`. A log is written whole or not at all,
``occupancy.json`` last.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import google_crc32c

from picture3d.datasets.occupancy_store import (
    FORMAT,
    KIND,
    LogOccupancy,
    add_occupancy,
    grid_tree,
    occupancy_folder,
    occupancy_path,
)
from picture3d.datasets.prepared import PreparedDataset
from picture3d.errors import DataError
from picture3d.files import refuse_url, unreadable, write_json
from picture3d.formats.block_file import BlockFile, BlockWriter
from picture3d.formats.openoccupancy import GRID_ORIGIN, GRID_SHAPE, VOXEL_SIZE, read_openoccupancy
from picture3d.structures.occupancy import Occupancy, OccupancyGrid

NUSCENES_OCCUPANCY = OccupancyGrid(GRID_SHAPE, GRID_ORIGIN, VOXEL_SIZE)

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class OccupancySummary:
    """What attaching did; counts over all logs that are not set aside."""

    folder: Path
    logs: int
    logs_made: int  # in this run; the others were finished before
    keyframes: int
    labelled: int
    voxels: int
    bytes: int  # stored
    label_bytes: int  # of the official files they were made from
    other_files: int  # label files of the scenes that belong to no prepared keyframe
    set_aside: tuple[str, ...]  # one message for each log with a label file that cannot be read


@dataclass(frozen=True, slots=True)
class LabelFile:
    """The label file of a keyframe."""

    frame: int  # place in its log
    token: str
    path: Path
    size: int


def attach_occupancy(labels: Path, dataset: PreparedDataset, *, progress: Progress | None = None) -> OccupancySummary:
    """Stores the label file of every keyframe that has one; logs that an earlier run finished are kept.

    One frame is in memory at a time. A log with a label file that cannot be read is set aside: it is not attached, the others
    are.

    Args:
        labels: ``nuScenes-Occupancy-v0.1``, or the folder that holds it.
        dataset: frames that `prepare nuscenes` made.
        progress: called with (keyframes done, keyframes in all).

    Raises:
        DataError: if the frames are not nuScenes', no label file belongs to any of them, the files of a scene are named after
            other sweeps than its keyframes, or the folder cannot be written.
    """
    refuse_url(dataset.root)
    root, scenes = label_folder(labels)
    folder = occupancy_folder(dataset.root)
    present = [log for log in dataset.logs() if f"scene_{_scene(dataset, log)}" in scenes]
    done, total = 0, sum(len(dataset.summary(log).keyframes) for log in present)
    if total == 0:
        raise _no_labels(root, dataset)
    (folder / "occupancy.json").unlink(missing_ok=True)
    logs: dict[str, LogOccupancy] = {}
    set_aside: dict[str, str] = {}
    made = other_files = label_bytes = 0
    for log in dataset.logs():
        keyframes = len(dataset.summary(log).keyframes)
        files, others = label_files(root, scenes, dataset, log)
        other_files += others
        path, header = occupancy_path(dataset.root, log), _header(dataset, log, files)
        found = _finished(path, header) if files else None
        if found is None and files:
            try:
                _write_log(path, header, files, lambda frames, done=done: progress and progress(done + frames, total))
            except _DamagedLabelError as error:
                set_aside[log] = f"{log} is set aside: {error}"
            else:
                made += 1
                found = _finished(path, header)
        if log not in set_aside:
            logs[log] = _summary(keyframes, found)
            label_bytes += sum(file.size for file in files)
        done += keyframes if log in present else 0
        if progress is not None:
            progress(done, total)
    kept = {occupancy_path(dataset.root, log) for log, entry in logs.items() if entry.labelled}
    if not kept and set_aside:
        raise DataError(
            f"{root}: no log could be attached. Mend the first of these and run again: {next(iter(set_aside.values()))}"
        )
    if not kept:
        raise _no_labels(root, dataset)
    for stale in folder.glob("*.occ*"):
        if stale not in kept:
            stale.unlink()
    tree = {
        "format": FORMAT,
        "version": KIND.version,
        "labels": "nuScenes-Occupancy",
        "grid": grid_tree(NUSCENES_OCCUPANCY),
        "logs": {log: asdict(entry) for log, entry in logs.items()},
        "set_aside": sorted(set_aside),
    }
    write_json(folder / "occupancy.json", tree)
    return OccupancySummary(
        folder=folder,
        logs=len(logs),
        logs_made=made,
        keyframes=sum(entry.keyframes for entry in logs.values()),
        labelled=sum(entry.labelled for entry in logs.values()),
        voxels=sum(entry.voxels for entry in logs.values()),
        bytes=sum(entry.bytes for entry in logs.values()),
        label_bytes=label_bytes,
        other_files=other_files,
        set_aside=tuple(set_aside.values()),
    )


# -- finding label files ----------------------------------------------------------------------------------------------


def label_folder(labels: Path) -> tuple[Path, frozenset[str]]:
    """The folder that holds `scene_*` (this one, or a nuScenes-Occupancy... in it), and their names.

    Raises:
        DataError: if there is none.
    """
    candidates = [labels]
    if labels.is_dir():
        candidates += sorted(path for path in labels.glob("nuScenes-Occupancy*") if path.is_dir())
    for folder in candidates:
        scenes = frozenset(name for name, _ in _listed(folder) if name.startswith("scene_"))
        if scenes:
            return folder, scenes
    raise DataError(
        f"{labels}: holds no folder scene_<token>, nor nuScenes-Occupancy-v0.1 with such folders. "
        "Name the folder of the unpacked nuScenes-Occupancy labels."
    )


def _no_labels(root: Path, dataset: PreparedDataset) -> DataError:
    first = next((_scene(dataset, log) for log in dataset.logs()), "<scene token>")
    return DataError(
        f"{root}: has no label file for any keyframe of {dataset.root}, such as scene_{first}/occupancy/<token>.npy. "
        "Take the labels of the same nuScenes version (mini, trainval)."
    )


def _scene(dataset: PreparedDataset, log: str) -> str:
    scene = dataset.reader(log).header.source.get("scene")
    if not isinstance(scene, str) or not scene:
        raise DataError(
            f"{dataset.root}: log '{log}' does not say which nuScenes scene it is. Prepare the frames with "
            "`picture3d prepare nuscenes`: nuScenes-Occupancy labels belong to these."
        )
    return scene


def label_file_name(dataset: PreparedDataset, log: str, token: str) -> Path:
    """``scene_<scene token>/occupancy/<token>.npy``: where the labels of a keyframe lie, and predictions are looked for.

    Raises:
        DataError: if the log is not of nuScenes, or a token cannot be the name of a file.
    """
    names = f"scene_{_scene(dataset, log)}", f"{token}.npy"
    for name in names:
        if Path(name).name != name:
            raise DataError(
                f"{dataset.root}: log '{log}' has a token that cannot name a file: {name!r}. Prepare the frames again."
            )
    return Path(names[0]) / "occupancy" / names[1]


def label_files(root: Path, scenes: frozenset[str], dataset: PreparedDataset, log: str) -> tuple[list[LabelFile], int]:
    """The label files of a log's keyframes, and how many others its scene has. Names are looked up, never built from tokens.

    Raises:
        DataError: if the log is not of nuScenes, its scene has files and none of them is named after a keyframe, or the folder
            of the scene was there when the scenes were listed and is gone.
    """
    name = f"scene_{_scene(dataset, log)}"
    if name not in scenes:
        return [], 0
    folder = root / name / "occupancy"
    sizes = {file: size for file, size in _listed(folder) if file.endswith(".npy")}
    if not sizes and not (root / name).is_dir():
        raise DataError(
            f"{root / name}: has vanished since the run began. Bring it back and run again: what is attached is kept."
        )
    reader = dataset.reader(log)
    tokens = [(index, reader.token(index)) for index in reader.keyframes]
    files = [
        LabelFile(index, token, folder / f"{token}.npy", sizes[f"{token}.npy"])
        for index, token in tokens
        if f"{token}.npy" in sizes
    ]
    if sizes and tokens and not files:
        raise DataError(
            f"{folder}: none of its {len(sizes)} files is named after a keyframe of log '{log}' (such as {tokens[0][1]}.npy). "
            "Label files carry the token of the keyframe's LIDAR_TOP sample_data. Take the labels of the version that was "
            "prepared (mini, trainval)."
        )
    return files, len(sizes) - len(files)


def _listed(folder: Path) -> list[tuple[str, int]]:
    """Names and sizes in a folder; none if it is not there."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry.name, entry.stat().st_size) for entry in entries if entry.is_file() or entry.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise unreadable(folder, error) from error


# -- writing ----------------------------------------------------------------------------------------------------------


class _DamagedLabelError(DataError):
    """A label file that cannot be read: the log is set aside, which a full disk is no reason for."""


def _header(dataset: PreparedDataset, log: str, files: list[LabelFile]) -> dict[str, Any]:
    crc = 0
    for file in files:
        crc = google_crc32c.extend(crc, f"{file.frame}:{file.token}:{file.size};".encode())
    return {"log": log, "scene": _scene(dataset, log), "files_crc32c": crc, "grid": grid_tree(NUSCENES_OCCUPANCY)}


def _write_log(path: Path, header: dict[str, Any], files: list[LabelFile], tick: Callable[[int], object]) -> None:
    with BlockWriter(path, KIND, header) as out:
        for done, file in enumerate(files):
            tick(done)
            try:
                found = read_openoccupancy(file.path)
            except DataError as error:
                raise _DamagedLabelError(str(error)) from None
            add_occupancy(out, file.frame, file.token, Occupancy(found.index, found.label, NUSCENES_OCCUPANCY))


def _finished(path: Path, header: dict[str, Any]) -> BlockFile | None:
    """The file of a log if an earlier run finished it from the same label files."""
    if not path.exists():
        return None
    try:
        file = BlockFile(path, KIND)
    except DataError:
        return None
    return file if file.header == header else None


def _summary(keyframes: int, file: BlockFile | None) -> LogOccupancy:
    if file is None:
        return LogOccupancy(keyframes, 0, 0, 0, 0)
    voxels = sum(int(block.about[1]) for block in file.blocks.values())
    return LogOccupancy(keyframes, len(file.blocks), voxels, file.size, file.crc32c)
