"""One log, one file (`<log>.p3d`): frames in order of time, each column of each frame on its own, checksummed.

Layout, described with byte tables in docs/data_format.md: a 16-byte head, then for every frame its columns and its JSON
record (where the columns are, poses, token, links), then a JSON index of the records, then a 40-byte trailer that says where
the index is. A frame is read by the index, its record and the columns asked for; nothing else of the file is touched.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from picture3d import __version__
from picture3d.datasets.frame_columns import BOX_COLUMNS, OPTIONAL_COLUMNS, boxes_of, columns_of, frame_of, record_of
from picture3d.errors import DataError
from picture3d.formats.columns import PLANES, Codec, checked_size, decode, dtype_name, encode, lossless_codec
from picture3d.formats.framed_file import FramedFile, FramedKind, FramedWriter
from picture3d.structures.boxes import Boxes
from picture3d.structures.frame import Frame

FORMAT_VERSION = 1
_MEND = "Delete the file and run the `prepare` command again: only this log is made anew."
KIND = FramedKind(
    b"P3DLOG\r\n", FORMAT_VERSION, "a picture3d log", _MEND, "Run the `prepare` command that made this dataset again."
)


@dataclass(frozen=True, slots=True)
class LogHeader:
    """What holds for a whole log."""

    log: str  # name of the log; the file is `<log>.p3d`
    dataset: str  # name of the dataset it belongs to
    label_set: str | None = None  # what the labels mean: a name for `label_sets.label_set`
    source: dict[str, Any] = field(default_factory=dict)  # how it was made (JSON): a rerun redoes a log made otherwise
    made_by: str = f"picture3d {__version__}"


@dataclass(frozen=True, slots=True)
class LogSummary:
    """What a log holds, known without reading a frame."""

    bytes: int
    crc32c: int  # of the index, which holds the checksum of every record, which holds that of every column
    frames: int
    keyframes: tuple[int, ...]
    points: int
    labelled: int  # frames with a label per point
    boxes: int


@dataclass(frozen=True, slots=True)
class _FrameEntry:
    """A frame's line in the index."""

    offset: int
    length: int
    crc: int
    points: int
    keyframe: bool
    labelled: bool
    boxes: int  # -1: not annotated


def _entry_of(row: list[int]) -> _FrameEntry:
    offset, length, crc, points, keyframe, labelled, boxes = (int(number) for number in row)
    return _FrameEntry(offset, length, crc, points, bool(keyframe), bool(labelled), boxes)


def check_log_name(log: str) -> str:
    """`log`, if it can be the name of a file in the dataset's folder.

    Raises:
        DataError: if it is empty, hidden, too long, or could leave the folder.
    """
    if not log or log.startswith(".") or len(log.encode()) > 200 or any(c in '/\\:"*?<>|' or ord(c) < 32 for c in log):
        raise DataError(f"{log!r} cannot name a log. Use letters, digits, '-', '_', '+' and '.', not starting with '.'")
    return log


class LogWriter(FramedWriter):
    """Writes one log, frame by frame, in memory that does not grow with frames beyond some 50 bytes each for the index.

    The file takes its name when the ``with`` block ends without an error; `summary` is known from then on.
    """

    def __init__(self, path: Path, header: LogHeader, *, xyz_codec: Codec = PLANES) -> None:
        check_log_name(header.log)
        super().__init__(path, KIND)
        self.header = header
        self.summary: LogSummary | None = None
        self._xyz_codec = xyz_codec
        self._entries: list[_FrameEntry] = []

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        done = super().__exit__(kind, error, trace)
        if error is None:
            self.summary = _summarise(self._entries, self.offset, self.index_crc32c)
        return done

    @property
    def finished(self) -> LogSummary:
        """What was written; known once the ``with`` block has ended."""
        if self.summary is None:
            raise ValueError("the log is not finished; its summary is known after the `with` block")
        return self.summary

    def add(self, frame: Frame) -> None:
        """Appends the next frame.

        Raises:
            DataError: if the frame is of another log or out of order, links to itself or a later sweep, or holds
                columns of a wrong dtype or non-finite points or poses.
        """
        place = f"{self.path}: frame {frame.index}"
        if frame.log != self.header.log or frame.index != len(self._entries):
            raise DataError(
                f"{place} of log '{frame.log}': expected frame {len(self._entries)} of log '{self.header.log}'. Hand in the "
                "frames of one log in their order."
            )
        if any(not 0 <= earlier < frame.index for earlier in frame.previous):
            raise DataError(
                f"{place}: previous {frame.previous} must be indices of earlier sweeps of the same log. Correct the reader "
                "that made this frame."
            )
        columns = columns_of(frame, place)
        chunks = {}
        for name, column in columns.items():
            codec = self._xyz_codec if name == "xyz" else lossless_codec(column)
            try:
                data = encode(column, codec)
            except ValueError as error:
                raise DataError(
                    f"{place}, column {name}: {error}. Choose another step for coordinates (--xyz-step), or 0 to store them "
                    "exactly."
                ) from None
            chunks[name] = {
                "codec": str(codec),
                "dtype": dtype_name(column.dtype),
                "shape": list(column.shape),
                "offset": self.write(data),
                "length": len(data),
                "crc32c": google_crc32c.value(data),
            }
        record = _to_json(record_of(frame, chunks), place)
        entry = _FrameEntry(
            offset=self.write(record),
            length=len(record),
            crc=google_crc32c.value(record),
            points=len(frame.points),
            keyframe=frame.is_keyframe,
            labelled=frame.labels is not None,
            boxes=-1 if frame.boxes is None else len(frame.boxes),
        )
        self._entries.append(entry)

    def index(self) -> tuple[bytes, int]:
        """What holds for the log, and a row per frame.

        Raises:
            DataError: if the header holds a number that is not finite.
        """
        rows = [[e.offset, e.length, e.crc, e.points, int(e.keyframe), int(e.labelled), e.boxes] for e in self._entries]
        return _to_json({"header": asdict(self.header), "frames": rows}, str(self.path)), len(rows)


class LogReader(FramedFile):
    """Reads one log. Safe to use from threads, after a fork and after being sent to another process."""

    def __init__(self, path: Path) -> None:
        """Opens a log and reads its index.

        Raises:
            DataError: if the file is missing, not a log, of another version, or its index is damaged.
        """
        super().__init__(path, KIND)
        tree = self.index()
        try:
            self.header = LogHeader(**tree["header"])
            self._entries = [_entry_of(row) for row in tree["frames"]]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{self.path}: the index at byte {self.index_at} lacks {error}. {_MEND}") from None
        if len(self._entries) != self.count:
            listed = f"lists {len(self._entries)} of {self.count} frames"
            raise DataError(f"{self.path}: the index at byte {self.index_at} {listed}. {_MEND}")
        self.summary = _summarise(self._entries, self.size, self.crc32c)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def keyframes(self) -> tuple[int, ...]:
        """Indices of the keyframes, in order of time."""
        return self.summary.keyframes

    def frame(self, index: int, columns: Collection[str] | None = None) -> Frame:
        """Reads one frame and nothing else of the file.

        Args:
            index: position in the log.
            columns: which of `OPTIONAL_COLUMNS` (``ring``, ``labels``, ``boxes``...) to read where present; None reads all.
                xyz and intensity are always read.

        Raises:
            DataError: if a checksum or size does not fit; the message names file, frame, column and byte offset.
        """
        entry, place = self._entry(index)
        wanted = OPTIONAL_COLUMNS if columns is None else frozenset(columns)
        if not wanted <= OPTIONAL_COLUMNS:
            raise ValueError(f"unknown columns {sorted(wanted - OPTIONAL_COLUMNS)}; known: {sorted(OPTIONAL_COLUMNS)}")
        record, stored = self._record(entry, place)
        names = {"xyz", "intensity", *wanted, *(BOX_COLUMNS if "boxes" in wanted else ())}
        arrays = {name: self._column(chunk, name, place) for name, chunk in stored.items() if name in names}
        try:
            return frame_of(
                self.header.log,
                index,
                record,
                arrays,
                num_points=entry.points,
                is_keyframe=entry.keyframe,
                with_boxes="boxes" in wanted and entry.boxes >= 0,
            )
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            raise DataError(f"{place}, record at byte {entry.offset}: {type(error).__name__}: {error}. {_MEND}") from None

    def boxes(self, index: int) -> Boxes | None:
        """The boxes of a frame without its points; None if it was not annotated.

        Raises:
            DataError: as :meth:`frame`.
        """
        entry, place = self._entry(index)
        if entry.boxes < 0:
            return None
        _, stored = self._record(entry, place)
        arrays = {name: self._column(chunk, name, place) for name, chunk in stored.items() if name in BOX_COLUMNS}
        try:
            return boxes_of(arrays)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{place}, record at byte {entry.offset}: {type(error).__name__}: {error}. {_MEND}") from None

    def labelled(self, index: int) -> bool:
        """Whether a frame has a label for each of its points, from the index alone."""
        return self._entries[index].labelled

    def token(self, index: int) -> str:
        """The dataset's own name of a frame, from its record alone.

        Raises:
            DataError: as :meth:`frame`.
        """
        entry, place = self._entry(index)
        record, _ = self._record(entry, place)
        return str(record.get("token", ""))

    def num_points(self, index: int) -> int:
        """Points of a frame, from the index alone."""
        return self._entries[index].points

    def verify(self) -> None:
        """Reads every frame.

        Raises:
            DataError: for the first damage found.
        """
        for index in range(len(self)):
            self.frame(index)

    def check_bytes(self) -> None:
        """Compares every record and column with its checksum, decoding no column.

        Raises:
            DataError: for the first damage found.
        """
        for index in range(len(self)):
            entry, place = self._entry(index)
            _, stored = self._record(entry, place)
            for name, chunk in stored.items():
                try:
                    offset, length, crc = int(chunk["offset"]), int(chunk["length"]), int(chunk["crc32c"])
                except (KeyError, TypeError, ValueError, OverflowError) as error:
                    raise DataError(f"{place}, column {name}: the record does not describe it ({error}). {_MEND}") from None
                self.read_at(offset, length, crc, f"{place}, column {name}")

    def _entry(self, index: int) -> tuple[_FrameEntry, str]:
        """A frame's line in the index, and its name for messages."""
        if not 0 <= index < len(self._entries):
            raise DataError(
                f"{self.path}: there is no frame {index}, the log has frames 0 to {len(self._entries) - 1}. Name one of these."
            )
        return self._entries[index], f"{self.path}: frame {index}"

    def _record(self, entry: _FrameEntry, place: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """A frame's record, and where its columns are."""
        record = _from_json(self.read_at(entry.offset, entry.length, entry.crc, f"{place}, record"), f"{place}, record")
        stored = record.get("columns")
        if not isinstance(stored, dict) or not {"xyz", "intensity"} <= stored.keys():
            raise DataError(f"{place}, record at byte {entry.offset}: lists no points. {_MEND}")
        return record, stored

    def _column(self, chunk: Any, name: str, place: str) -> NDArray[np.generic]:
        place = f"{place}, column {name}"
        try:
            codec, dtype, shape = Codec.parse(chunk["codec"]), chunk["dtype"], tuple(int(side) for side in chunk["shape"])
            offset, length, crc = int(chunk["offset"]), int(chunk["length"]), int(chunk["crc32c"])
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise DataError(f"{place}: the record does not describe it ({error}). {_MEND}") from None
        try:
            checked_size(dtype, shape)
            data = self.read_at(offset, length, crc, place).data
            return decode(data, codec, dtype, shape)
        except ValueError as error:
            raise DataError(f"{place} at byte {offset}: {error}. {_MEND}") from None


def _summarise(entries: list[_FrameEntry], size: int, crc: int) -> LogSummary:
    return LogSummary(
        bytes=size,
        crc32c=crc,
        frames=len(entries),
        keyframes=tuple(index for index, entry in enumerate(entries) if entry.keyframe),
        points=sum(entry.points for entry in entries),
        labelled=sum(entry.labelled for entry in entries),
        boxes=sum(max(entry.boxes, 0) for entry in entries),
    )


def _to_json(tree: dict[str, Any], place: str) -> bytes:
    try:
        return json.dumps(tree, separators=(",", ":"), allow_nan=False).encode()
    except ValueError:
        raise DataError(
            f"{place}: a pose or another number is not finite, so it cannot be stored. Correct the poses of the raw data, or "
            "leave this sweep out"
        ) from None


def _from_json(data: NDArray[np.uint8], place: str) -> dict[str, Any]:
    try:
        tree = json.loads(data.tobytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not JSON ({error}). {_MEND}") from None
    if not isinstance(tree, dict):
        raise DataError(f"{place}: not a JSON object. {_MEND}")
    return tree
