"""The objects of one log, cut out of its keyframes, and the partial file (`<log>.part`) that keeps them until all are done.

A partial file is a `block_file` with one block per annotated keyframe: the columns of its objects one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from picture3d.datasets.detection_classes import DetectionClasses
from picture3d.datasets.object_geometry import rows_inside
from picture3d.datasets.prepared import FrameKey, PreparedDataset
from picture3d.datasets.samples import move_sweep, without_ego
from picture3d.errors import DataError
from picture3d.formats.block_file import Block, BlockFile, BlockWriter
from picture3d.formats.framed_file import FramedKind
from picture3d.structures.points import IntensityUnit

KIND = FramedKind(
    mark=b"P3DOBP\r\n",
    version=2,
    what="a file of one log's objects",
    mend="Delete the file and run `picture3d data objects` again: only this log is done anew.",
)

# Order and little-endian dtype of the columns of a block: one row per object, then one row per point.
OBJECT_COLUMNS: dict[str, tuple[str, int]] = {
    "box": ("<f8", 9),  # x y z l w h (m), yaw (rad), vx vy (m/s, NaN where unknown): LiDAR frame of the keyframe
    "count": ("<u4", 1),  # points
    "category": ("<u2", 1),  # row in the table of categories
    "difficulty": ("|i1", 1),  # as annotated; -1 where the dataset tells none
}
POINT_COLUMNS: dict[str, tuple[str, int]] = {
    "xyz": ("<f4", 3),  # metres from the box's centre, axes of the LiDAR frame
    "intensity": ("<f4", 1),  # as stored in the prepared frames
    "time_lag": ("<f4", 1),  # seconds before the keyframe
    "elongation": ("<f4", 1),
}


@dataclass(frozen=True, slots=True)
class CutSettings:
    """Which objects are cut out, and of how many sweeps."""

    sweeps: int = 1  # merged into a frame, the keyframe included, as `DataConfig.sweeps` does
    classes: tuple[str, ...] | None = None  # keep the objects of these classes; None keeps every category
    every: Mapping[str, int] | None = None  # class -> take it from every n-th keyframe of a log only
    min_points: int = 1  # objects with fewer points are left out

    def to_json(self) -> dict[str, Any]:
        """What must agree for finished work to be kept."""
        return {
            "sweeps": self.sweeps,
            "classes": None if self.classes is None else list(self.classes),
            "every": dict(sorted((self.every or {}).items())),
            "min_points": self.min_points,
        }


@dataclass(frozen=True, slots=True, eq=False)
class ObjectBlock:
    """The B objects of one keyframe with their P points, object after object."""

    frame: int  # index of the keyframe in its log
    unit: IntensityUnit
    categories: tuple[str, ...]  # table that `category` is a row of
    columns: dict[str, NDArray[np.generic]]  # `OBJECT_COLUMNS` (B rows) and `POINT_COLUMNS` (P rows); elongation may lack
    skipped: int = 0  # boxes that were not finite

    @property
    def objects(self) -> int:
        """B."""
        return len(self.columns["count"])

    @property
    def points(self) -> int:
        """P."""
        return len(self.columns["intensity"])


def cut_objects(dataset: PreparedDataset, key: FrameKey, settings: CutSettings, *, position: int = 0) -> ObjectBlock | None:
    """The objects of one keyframe with the points inside of their boxes; None if the frame was not annotated.

    Points of earlier sweeps are moved by the poses and the car's own are left out, as a training sample is made. A box that is
    not finite is skipped and counted. A point in two boxes belongs to both.

    Args:
        dataset: the prepared frames.
        key: the keyframe.
        settings: which objects, of how many sweeps.
        position: of the keyframe among those of its log, for `CutSettings.every`.

    Raises:
        DataError: if a frame is damaged, has no poses for several sweeps, or its sweeps differ in unit of intensity.
    """
    reader = dataset.reader(key.log)
    frame = reader.frame(key.index, {"boxes", "elongation"})
    if frame.boxes is None:
        return None
    clouds, moved, lags = [frame.points], [frame.points.xyz], [0.0]
    for earlier in frame.previous[: settings.sweeps - 1]:
        sweep = reader.frame(earlier, {"elongation"})
        if sweep.points.intensity_unit != frame.points.intensity_unit:
            raise DataError(f"{key}: sweep {earlier} has another unit of intensity. Prepare this log again in one run.")
        points = without_ego(sweep.points)
        clouds.append(points)
        moved.append(move_sweep(points.xyz, sweep, frame))
        lags.append((frame.timestamp_us - sweep.timestamp_us) * 1e-6)
    xyz = np.concatenate(moved)
    point_columns = {
        "intensity": np.concatenate([points.intensity for points in clouds]),
        "time_lag": np.repeat(np.array(lags, np.float32), [len(points) for points in clouds]),
    }
    elongation = [points.elongation for points in clouds if points.elongation is not None]
    if len(elongation) == len(clouds):
        point_columns["elongation"] = np.concatenate(elongation)

    boxes = frame.boxes
    table = np.concatenate([boxes.center, boxes.size, boxes.yaw[:, None], boxes.velocity], axis=1)
    finite = np.isfinite(table[:, :7]).all(axis=1)
    rows = np.flatnonzero(finite & _wanted(boxes.category, settings, position))
    inside = rows_inside(xyz, table[rows])
    kept = [i for i, found in enumerate(inside) if len(found) >= settings.min_points]
    rows, inside = rows[kept], [inside[i] for i in kept]
    counts = np.array([len(found) for found in inside], np.uint32)
    points = np.concatenate([np.zeros(0, np.int64), *inside])
    owner = np.repeat(rows, counts)
    names = tuple(sorted({boxes.category[row] for row in rows}))
    difficulty = np.full(len(boxes), -1, np.int8) if boxes.difficulty is None else boxes.difficulty
    columns: dict[str, NDArray[np.generic]] = {
        "box": table[rows],
        "count": counts,
        "category": np.array([names.index(boxes.category[row]) for row in rows], np.uint16),
        "difficulty": difficulty[rows].astype(np.int8),
        "xyz": (xyz[points].astype(np.float64) - boxes.center[owner]).astype(np.float32),
        **{name: column[points] for name, column in point_columns.items()},
    }
    return ObjectBlock(key.index, frame.points.intensity_unit, names, columns, skipped=int(np.count_nonzero(~finite)))


def _wanted(categories: tuple[str, ...], settings: CutSettings, position: int) -> NDArray[np.bool_]:
    wanted = np.ones(len(categories), np.bool_)
    if settings.classes is not None:
        wanted &= DetectionClasses(settings.classes).of(categories) > 0
    for name, interval in (settings.every or {}).items():
        if position % interval:
            wanted &= DetectionClasses((name,)).of(categories) == 0
    return wanted


@dataclass(frozen=True, slots=True)
class _BlockEntry:
    """What the index says of a keyframe's block."""

    frame: int
    objects: int
    points: int
    elongation: bool
    unit: IntensityUnit


def _entry_of(block: Block) -> _BlockEntry:
    objects, points, elongation, unit = block.about
    entry = _BlockEntry(block.number, int(objects), int(points), bool(elongation), IntensityUnit(unit))
    if min(entry.objects, entry.points) < 0 or block.length != _block_bytes(entry):
        raise ValueError(f"{block.length} bytes for {objects} objects of {points} points")
    return entry


def _block_bytes(entry: _BlockEntry) -> int:
    per_object = sum(np.dtype(dtype).itemsize * width for dtype, width in OBJECT_COLUMNS.values())
    per_point = sum(
        np.dtype(dtype).itemsize * width
        for name, (dtype, width) in POINT_COLUMNS.items()
        if entry.elongation or name != "elongation"
    )
    return entry.objects * per_object + entry.points * per_point


class PartFile:
    """A finished partial file: which objects a log has, and its blocks one by one. Open only while blocks are read."""

    def __init__(self, path: Path) -> None:
        """Reads the index.

        Raises:
            DataError: if the file is missing or damaged.
        """
        self.path = path
        with closing(BlockFile(path, KIND)) as file:
            try:
                self.identity: dict[str, Any] = dict(file.header["identity"])
                self.categories: tuple[str, ...] = tuple(str(name) for name in file.header["categories"])
                self.skipped = int(file.header["skipped"])
                self._entries = [_entry_of(block) for block in file.blocks.values()]
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise DataError(f"{path}: the index at byte {file.index_at} lacks or garbles {error}. {KIND.mend}") from None

    @property
    def frames(self) -> int:
        """Annotated keyframes."""
        return len(self._entries)

    @property
    def objects(self) -> int:
        """Objects of the log."""
        return sum(entry.objects for entry in self._entries)

    @property
    def points(self) -> int:
        """Points of all objects."""
        return sum(entry.points for entry in self._entries)

    @property
    def has_elongation(self) -> bool:
        """Whether every frame that has objects tells the elongation."""
        return all(entry.elongation for entry in self._entries if entry.objects)

    def blocks(self) -> Iterator[ObjectBlock]:
        """The blocks in order of time, each checked against its checksum.

        Raises:
            DataError: if one is damaged; the message names the byte.
        """
        with closing(BlockFile(self.path, KIND)) as file:
            for entry in self._entries:
                yield self._block(entry, file.read(entry.frame))

    def _block(self, entry: _BlockEntry, data: bytes) -> ObjectBlock:
        columns: dict[str, NDArray[np.generic]] = {}
        offset = 0
        for name, (dtype, width) in (OBJECT_COLUMNS | POINT_COLUMNS).items():
            if name == "elongation" and not entry.elongation:
                continue
            rows = entry.objects if name in OBJECT_COLUMNS else entry.points
            column = np.frombuffer(data, dtype, rows * width, offset)
            columns[name] = column.reshape(rows, width) if width > 1 else column
            offset += column.nbytes
        return ObjectBlock(entry.frame, entry.unit, self.categories, columns)


def part_identity(dataset: PreparedDataset, log: str, settings: CutSettings) -> dict[str, Any]:
    """What a partial file was made from: the log's own checksum and the settings."""
    return {"version": KIND.version, "log": log, "log_crc32c": dataset.summary(log).crc32c, **settings.to_json()}


def finished_part(path: Path, identity: dict[str, Any]) -> PartFile | None:
    """The partial file that an earlier run finished from the same log, every byte checked, or None if it has to be made."""
    if not path.exists():
        return None
    try:
        part = PartFile(path)
        if part.identity != identity:
            return None
        for _ in part.blocks():
            pass
    except DataError:
        return None
    return part


def write_part(path: Path, dataset: PreparedDataset, log: str, settings: CutSettings) -> PartFile:
    """Cuts the objects out of every keyframe of a log, one frame in memory at a time.

    Raises:
        DataError: if a frame cannot be read, or the file cannot be written.
    """
    categories: dict[str, int] = {}  # in order of their first object
    skipped = 0
    dtypes = OBJECT_COLUMNS | POINT_COLUMNS
    with BlockWriter(path, KIND, {"identity": part_identity(dataset, log, settings)}) as file:
        for position, index in enumerate(dataset.summary(log).keyframes):
            block = cut_objects(dataset, FrameKey(log, index), settings, position=position)
            if block is None:
                continue
            codes = np.array([categories.setdefault(name, len(categories)) for name in block.categories], np.uint16)
            columns = {**block.columns, "category": codes[block.columns["category"].astype(np.intp)]}
            data = b"".join(
                np.ascontiguousarray(columns[name], dtype).tobytes() for name, (dtype, _) in dtypes.items() if name in columns
            )
            file.add(index, data, block.objects, block.points, "elongation" in columns, str(block.unit))
            skipped += block.skipped
        file.header |= {"categories": list(categories), "skipped": skipped}
    return PartFile(path)
