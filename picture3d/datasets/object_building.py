"""Builds a database of objects (`object_database`) from prepared frames, log by log.

Finished logs are kept when a run is broken off, the file takes its name when it is whole, and memory grows neither with frames
nor with objects. The same data and settings give the same bytes.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from picture3d.datasets.detection_classes import DetectionClasses
from picture3d.datasets.object_database import (
    DATABASE_VERSION,
    HEAD,
    MAGIC,
    OBJECT_COLUMNS,
    UNITS,
    ObjectDatabase,
    crc_of,
    database_path,
    layout,
)
from picture3d.datasets.object_parts import (
    POINT_COLUMNS,
    CutSettings,
    ObjectBlock,
    PartFile,
    finished_part,
    part_identity,
    write_part,
)
from picture3d.datasets.prepared import PreparedDataset
from picture3d.errors import ConfigError, DataError
from picture3d.files import replacing
from picture3d.workers import worker_pool

_POINTS_AT_ONCE = 1 << 18


@dataclass(frozen=True, slots=True)
class ObjectsSummary:
    """What a build did, or found finished."""

    path: Path
    logs: int
    logs_made: int  # in this run
    frames: int  # annotated keyframes; 0 if nothing had to be done
    objects: int
    points: int
    bytes: int
    by_category: Mapping[str, int]  # objects
    skipped_boxes: int  # not finite


def build_object_database(
    root: Path,
    *,
    name: str | None = None,
    split: str | None = "train",
    sweeps: int = 1,
    classes: DetectionClasses | None = None,
    every: Mapping[str, int] | None = None,
    min_points: int = 1,
    processes: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> ObjectsSummary:
    """Cuts the objects out of all annotated keyframes of a split; does nothing if that was done from the same frames.

    Args:
        root: folder of prepared frames with boxes.
        name: of the database; by default ``<split>-<sweeps>sweeps``.
        split: of the dataset; None takes every log.
        sweeps: merged into a frame, the keyframe included, as `DataConfig.sweeps`.
        classes: keep the objects of these classes only; None keeps every category.
        every: class -> cut its objects out of every n-th keyframe of a log only, to save space.
        min_points: objects with fewer points are left out.
        processes: logs done at the same time; the bytes do not depend on it.
        progress: called with (keyframes done, keyframes in all).

    Raises:
        ConfigError: for impossible settings.
        DataError: if a frame cannot be read, no frame was annotated, or the file cannot be written.
    """
    if sweeps < 1 or processes < 1 or min_points < 1:
        raise ConfigError(
            f"sweeps {sweeps}, processes {processes} and min_points {min_points} are too few. Give at least 1 of each"
        )
    for wanted, interval in (every or {}).items():
        if interval < 1:
            raise ConfigError(f"every: '{wanted}' is taken from every {interval}th keyframe; give a number from 1")
        if classes is not None and wanted not in classes.names:
            raise ConfigError(f"every: no class '{wanted}'. Choose one of {', '.join(classes.names)}")
    settings = CutSettings(sweeps, None if classes is None else classes.names, every, min_points)
    dataset = PreparedDataset(root)
    path = database_path(root, name or f"{split or 'all'}-{sweeps}sweeps")
    logs = dataset.logs(split)
    identity = {"version": DATABASE_VERSION, "fingerprint": dataset.fingerprint(split), **settings.to_json()}
    counts = {log: len(dataset.summary(log).keyframes) for log in logs}
    total, done = sum(counts.values()), 0
    report = progress or (lambda done, total: None)
    if path.exists():
        try:
            database = ObjectDatabase(path)
            if database.identity == identity:
                report(total, total)
                return _summary(database, made=0, frames=0)
        except DataError:
            pass  # of another version or damaged: made anew
    folder = path.with_suffix(".parts")
    jobs = [_Job(root, log, folder / f"{log}.part", settings) for log in logs]
    made = 0
    for log, was_made in _run(jobs, processes, dataset):
        made += was_made
        done += counts[log]
        report(done, total)
    parts = {log: PartFile(folder / f"{log}.part") for log in logs}
    frames = sum(part.frames for part in parts.values())
    if not frames:
        raise DataError(
            f"{root}: no keyframe of split '{split}' has boxes, so there are no objects to cut out. Name a split with boxes "
            "(--split), or prepare the data with its boxes."
        )
    _merge(path, parts, identity)
    shutil.rmtree(folder, ignore_errors=True)
    return _summary(ObjectDatabase(path), made=made, frames=frames)


# -- one log after the other, or several at once ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Job:
    root: Path
    log: str
    path: Path
    settings: CutSettings


def _run(jobs: Sequence[_Job], processes: int, dataset: PreparedDataset) -> Iterator[tuple[str, bool]]:
    """Makes the partial files that are missing; yields each log and whether it was made now."""
    if processes == 1 or len(jobs) < 2:
        for job in jobs:
            yield job.log, _make(job, dataset)
        return
    with worker_pool(min(processes, len(jobs))) as pool:
        for job, was_made in zip(jobs, pool.map(_make_in_worker, jobs), strict=True):
            yield job.log, was_made


def _make(job: _Job, dataset: PreparedDataset) -> bool:
    if finished_part(job.path, part_identity(dataset, job.log, job.settings)) is not None:
        return False
    write_part(job.path, dataset, job.log, job.settings)
    return True


def _make_in_worker(job: _Job) -> bool:
    return _make(job, PreparedDataset(job.root, open_logs=1))


# -- merging ----------------------------------------------------------------------------------------------------------


def _merge(path: Path, parts: Mapping[str, PartFile], identity: dict[str, Any]) -> None:
    """Writes the database from the partial files, some blocks in memory at a time."""
    objects, points = (sum(getattr(part, what) for part in parts.values()) for what in ("objects", "points"))
    names = [*OBJECT_COLUMNS, "xyz", "intensity"]
    names += ["time_lag"] if identity["sweeps"] > 1 else []  # with one sweep it is 0 everywhere
    names += ["elongation"] if objects and all(part.has_elongation for part in parts.values()) else []
    categories = sorted({category for part in parts.values() for category in part.categories})
    tree: dict[str, Any] = {
        "identity": identity,
        "objects": objects,
        "points": points,
        "skipped_boxes": sum(part.skipped for part in parts.values()),
        "categories": categories,
        "logs": list(parts),
        "columns": dict.fromkeys(names, f"{0:08x}"),  # the checksums follow; the text keeps its length
    }
    length = len(_to_json(tree))
    places = layout(objects, points, HEAD.size + length, names)
    crcs = dict.fromkeys(names, 0)
    with replacing(path) as partial, partial.open("wb") as file:
        ends = {name: place.offset for name, place in places.items()}
        for columns in _batches(parts, categories, names):
            for name, column in columns.items():
                data = np.ascontiguousarray(column, places[name].dtype).tobytes()
                _write_at(file, ends[name], data)
                ends[name] += len(data)
                crcs[name] = google_crc32c.extend(crcs[name], data)
        tree["columns"] = {name: f"{crc:08x}" for name, crc in crcs.items()}
        text = _to_json(tree)
        start = HEAD.pack(MAGIC, DATABASE_VERSION, len(text), google_crc32c.value(text), 0)[:20]
        _write_at(file, 0, start + struct.pack("<I", google_crc32c.value(start)) + text)
        file.truncate(max(place.offset + place.bytes for place in places.values()))


def _batches(
    parts: Mapping[str, PartFile], categories: Sequence[str], names: Sequence[str]
) -> Iterator[dict[str, NDArray[np.generic]]]:
    """The rows of all columns in order, a bounded number of points at a time."""
    first = held = 0
    found: list[dict[str, NDArray[np.generic]]] = []
    for number, part in enumerate(parts.values()):
        recode = np.array([categories.index(name) for name in part.categories], np.uint16)
        for block in part.blocks():
            if not block.objects:
                continue
            found.append(_columns_of(block, recode, number, first, names))
            first += block.points
            held += block.points
            if held >= _POINTS_AT_ONCE:
                yield {name: np.concatenate([columns[name] for columns in found]) for name in names}
                found, held = [], 0
    if found:
        yield {name: np.concatenate([columns[name] for columns in found]) for name in names}


def _columns_of(
    block: ObjectBlock, recode: NDArray[np.uint16], log: int, first: int, names: Sequence[str]
) -> dict[str, NDArray[np.generic]]:
    count = block.columns["count"].astype(np.int64)
    ends = np.cumsum(count)
    points = [block.columns[name] for name in POINT_COLUMNS if name in names]
    crcs = [crc_of([column[end - n : end] for column in points]) for n, end in zip(count, ends, strict=True)]
    return {
        **{name: block.columns[name] for name in names if name in block.columns},
        "first": first + ends - count,
        "category": recode[block.columns["category"].astype(np.intp)],
        "unit": np.full(block.objects, UNITS.index(block.unit), np.uint8),
        "log": np.full(block.objects, log, np.uint32),
        "frame": np.full(block.objects, block.frame, np.uint32),
        "crc32c": np.array(crcs, np.uint32),
    }


def _write_at(file: BinaryIO, offset: int, data: bytes) -> None:
    file.seek(offset)
    file.write(data)


def _to_json(tree: dict[str, Any]) -> bytes:
    return json.dumps(tree, separators=(",", ":"), allow_nan=False).encode()


def _summary(database: ObjectDatabase, *, made: int, frames: int) -> ObjectsSummary:
    counts = np.bincount(database.category, minlength=len(database.categories))
    return ObjectsSummary(
        path=database.path,
        logs=len(database.logs),
        logs_made=made,
        frames=frames,
        objects=len(database),
        points=database.points,
        bytes=database.path.stat().st_size,
        by_category={name: int(n) for name, n in zip(database.categories, counts, strict=True)},
        skipped_boxes=database.skipped_boxes,
    )
