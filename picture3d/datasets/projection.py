"""What preparing a full dataset will take, computed from what a sample of it took: hours of one core, bytes, peak memory."""

from __future__ import annotations

import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

from picture3d.datasets.check_nuscenes import is_raw_nuscenes
from picture3d.datasets.nuscenes import nuscenes_frames
from picture3d.datasets.prepared import LogHeader, LogReader, LogWriter, PreparedDataset, log_path
from picture3d.datasets.waymo import SPLIT_FOLDERS, frame_of_waymo, segment_name, waymo_segments
from picture3d.datasets.waymo_v2 import frames_of_segment, segments_of, waymo_version
from picture3d.errors import DataError
from picture3d.formats.columns import PLANES, Codec
from picture3d.formats.nuscenes_tables import read_tables
from picture3d.formats.tfrecord import read_records
from picture3d.formats.waymo_frame import read_frame
from picture3d.structures.frame import Frame

Kind = Literal["waymo", "waymo-v2", "nuscenes"]
_SCENES = 850  # of nuScenes v1.0-trainval, whose tables are read as a whole


@dataclass(frozen=True, slots=True)
class FullSize:
    """A split of a published dataset."""

    dataset: str
    split: str
    keyframes: int
    logs: int  # segments or scenes


# Source: the datasets' own statistics.
FULL_SIZES = (
    FullSize("waymo", "training", 158_081, 798),
    FullSize("waymo", "validation", 39_987, 202),
    FullSize("nuscenes", "train", 28_130, 700),
    FullSize("nuscenes", "val", 6_019, 150),
)


@dataclass(frozen=True, slots=True)
class Measured:
    """What a sample took. Sizes and times are of its frames alone, the sweeps before keyframes included."""

    kind: Kind
    frames: int
    keyframes: int
    points: int
    bytes: int  # of the logs
    frame_seconds: float | None  # CPU time of reading, converting and writing; None if only prepared frames were there
    read_seconds: float  # CPU time of reading the prepared frames again, decoded and checked
    table_seconds: float = 0.0  # CPU time of reading the tables, once a run; nuScenes
    table_scenes: int = 0  # scenes that the tables tell of
    table_bytes: int = 0  # memory that they added
    peak_bytes: int | None = None  # of the process that prepared, tables included; None where that is not known
    logs: int = 1  # that the frames are of

    def frames_of(self, full: FullSize) -> float:
        """Frames that a full split has, with as many sweeps before a keyframe as here; the first of a log has none."""
        if self.keyframes == self.logs:
            return full.keyframes * self.frames / self.keyframes
        each = (self.frames - self.logs) / (self.keyframes - self.logs)
        return full.logs + (full.keyframes - full.logs) * each


@dataclass(frozen=True, slots=True)
class Projection:
    """A full split, by the measured numbers."""

    full: FullSize
    hours: float | None  # of one core, to prepare
    bytes: int  # on disk
    peak_bytes: int | None  # of one process that does all; does not grow with the frames, but with the tables of nuScenes
    epoch_hours: float  # of one core, to read and decode every frame once
    table_bytes: int = 0  # of the peak; held once, however many processes work

    def memory(self, processes: int) -> int | None:
        """Bytes that many processes hold at most, working on logs side by side."""
        if self.peak_bytes is None:
            return None
        return self.table_bytes + processes * (self.peak_bytes - self.table_bytes)


def kind_of_raw(raw: Path) -> Kind | None:
    """What a raw folder holds, of what can be projected.

    Raises:
        DataError: if it holds both versions of Waymo.
    """
    if is_raw_nuscenes(raw):
        return "nuscenes"
    version = waymo_version(raw)
    return None if version is None else "waymo" if version == 1 else "waymo-v2"


def measure_raw(raw: Path, frames: int, *, xyz_codec: Codec = PLANES, sweeps: int = 9) -> Measured:
    """Prepares the first frames of a raw folder into a temporary one, and reads them again. Run it in a process of its own.

    Args:
        raw: root of raw Waymo, v1 or v2, or of raw nuScenes (its largest version is taken).
        frames: how many; fewer if there are fewer.
        xyz_codec: how coordinates are stored.
        sweeps: earlier sweeps kept for each keyframe; nuScenes.

    Raises:
        ConfigError: if pyarrow is needed and not installed.
        DataError: if the folder holds none of these, or what it holds is damaged.
    """
    kind = kind_of_raw(raw)
    if kind is None:
        raise DataError(f"{raw}: holds neither raw Waymo nor raw nuScenes, whose full sizes are known. Name such a folder.")
    before, table_seconds, table_scenes = peak_memory() or 0, 0.0, 0
    if kind == "nuscenes":
        version = max((path.parent for path in raw.glob("v1.0-*/scene.json")), key=_size_of_folder).name
        start = time.process_time()
        tables = read_tables(raw, version)
        table_seconds, table_scenes = time.process_time() - start, len(tables.scenes)
        source = nuscenes_frames(raw, tables, version, sweeps=sweeps)
    else:
        source = _waymo(raw, kind)
    table_bytes = max(0, (peak_memory() or 0) - before) if kind == "nuscenes" else 0
    with tempfile.TemporaryDirectory(prefix="picture3d-") as folder:
        paths, count, keyframes, points, seconds = _write(source, Path(folder), frames, xyz_codec)
        peak = peak_memory()
        size = sum(path.stat().st_size for path in paths)
        read_seconds, _ = _time_reading(paths, count)
        return Measured(
            kind, count, keyframes, points, size, seconds, read_seconds, table_seconds, table_scenes, table_bytes, peak,
            len(paths),
        )  # fmt: skip


def measure_prepared(root: Path, frames: int) -> Measured:
    """Bytes of a prepared folder, and the time to read some of its frames; how long it took to prepare is not told there.

    Args:
        root: prepared Waymo or nuScenes.
        frames: how many frames are read; the bytes are those of all.

    Raises:
        DataError: if it is no such folder, or a log is damaged.
    """
    dataset = PreparedDataset(root)
    labels = None if dataset.label_set is None else dataset.label_set.name
    kinds: dict[str | None, Kind] = {"waymo": "waymo", "nuscenes-32": "nuscenes"}
    if labels not in kinds:
        raise DataError(
            f"{root}: was prepared neither from Waymo nor from nuScenes, whose full sizes are known. Name a folder that was."
        )
    logs = dataset.logs()
    summaries = [dataset.summary(log) for log in logs]
    total, keyframes = sum(s.frames for s in summaries), sum(len(s.keyframes) for s in summaries)
    if not keyframes:
        raise DataError(f"{root}: holds no keyframe to measure. Prepare some frames first.")
    size = sum(log_path(root, log).stat().st_size for log in logs)
    seconds, read = _time_reading([log_path(root, log) for log in logs], frames)
    points = sum(s.points for s in summaries)
    return Measured(kinds[labels], total, keyframes, points, size, None, seconds / read * total, logs=len(logs))


def project(measured: Measured) -> list[Projection]:
    """The full splits of the dataset that was measured. Times and bytes grow with frames, memory with tables alone."""
    dataset = "nuscenes" if measured.kind == "nuscenes" else "waymo"
    more_tables = max(1.0, _SCENES / measured.table_scenes) if measured.table_scenes else 1.0
    found: list[Projection] = []
    for full in FULL_SIZES:
        if full.dataset != dataset:
            continue
        share = measured.frames_of(full) / measured.frames
        hours = None
        if measured.frame_seconds is not None:
            hours = (measured.frame_seconds * share + measured.table_seconds * more_tables) / 3600
        tables = round(measured.table_bytes * more_tables)
        peak = None if measured.peak_bytes is None else measured.peak_bytes - measured.table_bytes + tables
        epoch = measured.read_seconds * share / 3600
        found.append(Projection(full, hours, math.ceil(measured.bytes * share), peak, epoch, tables))
    return found


def _waymo(raw: Path, kind: Kind) -> Iterator[tuple[Frame, int]]:
    if kind == "waymo-v2":
        for folder, split in SPLIT_FOLDERS.items():
            yield from chain.from_iterable(frames_of_segment(raw / folder, name, split) for name in segments_of(raw / folder))
        return
    for path, _ in waymo_segments(raw)[0]:
        for index, (offset, payload) in enumerate(read_records(path)):
            where = f"{path}, record {index} at byte {offset}"
            yield frame_of_waymo(read_frame(payload, where), segment_name(path), index, where)


def _write(
    source: Iterator[tuple[Frame, int]], folder: Path, most: int, codec: Codec
) -> tuple[list[Path], int, int, int, float]:
    """Writes a log per log of the first frames: its files, how many frames, keyframes and points they hold, and CPU seconds."""
    paths: list[Path] = []
    count = keyframes = points = 0
    start = first = time.process_time()
    with ExitStack() as stack:
        writer: LogWriter | None = None
        for frame, _ in source:
            if writer is None or writer.header.log != frame.log:
                stack.close()
                paths.append(folder / f"{len(paths)}.p3d")
                writer = stack.enter_context(LogWriter(paths[-1], LogHeader(frame.log, "sample"), xyz_codec=codec))
            writer.add(frame)
            count, keyframes, points = count + 1, keyframes + int(frame.is_keyframe), points + len(frame.points)
            first = time.process_time() if count == 1 else first
            # Up to a keyframe: the sweeps before the next one belong to that.
            if count >= most and frame.is_keyframe:
                break
    if not keyframes:
        raise DataError("the raw folder holds no keyframe to measure. Download some sweeps first.")
    end = time.process_time()
    # The first frame pays for what is imported and opened once; it is taken to cost what the others do.
    return paths, count, keyframes, points, (end - first) * count / (count - 1) if count > 1 else end - start


def _time_reading(paths: list[Path], most: int) -> tuple[float, int]:
    """CPU seconds to read and decode frames, and how many they were."""
    start, count = time.process_time(), 0
    for path in paths:
        reader = LogReader(path)
        for index in range(min(reader.summary.frames, most - count)):
            reader.frame(index)
            count += 1
    return time.process_time() - start, count


def _size_of_folder(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.json"))


def peak_memory() -> int | None:
    """The most memory this process ever held, in bytes; None where the system does not tell."""
    if sys.platform.startswith("linux"):
        # Not getrusage: a process that was just started counts what its parent held.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return None
    if os.name != "posix":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
