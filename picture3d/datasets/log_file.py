"""One log, one file (`<log>.p3d`): frames in order of time, each column of each frame on its own, checksummed.

Layout, described with byte tables in docs/data_format.md: a 16-byte head, then for every frame its columns and its JSON
record (where the columns are, poses, token, links), then a JSON index of the records, then a 40-byte trailer that says where
the index is. A frame is read by the index, its record and the columns asked for; nothing else of the file is touched.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Collection
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from picture3d import __version__
from picture3d.datasets.frame_columns import BOX_COLUMNS, OPTIONAL_COLUMNS, boxes_of, columns_of, frame_of, record_of
from picture3d.errors import DataError
from picture3d.files import whole_file
from picture3d.formats.columns import PLANES, Codec, checked_size, decode, dtype_name, encode
from picture3d.structures.boxes import Boxes
from picture3d.structures.frame import Frame

FORMAT_VERSION = 1
_MAGIC = b"P3DLOG\r\n"
_HEAD = struct.Struct("<8sII")  # magic, version, CRC-32C of the 12 bytes before it
_TRAILER = struct.Struct("<QQIIII8s")  # index offset, index length, index CRC, frames, version, CRC of the 28 before, magic
_MAX_INDEX_BYTES = 1 << 28
_MAX_RECORD_BYTES = 1 << 20


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
        raise DataError(f"{log!r} cannot name a log: use letters, digits, '-', '_', '+' and '.', not starting with '.'")
    return log


class LogWriter(AbstractContextManager["LogWriter"]):
    """Writes one log, frame by frame, in memory that does not grow with frames beyond some 50 bytes each for the index.

    The file takes its name when the ``with`` block ends without an error; `summary` is known from then on.
    """

    def __init__(self, path: Path, header: LogHeader, *, xyz_codec: Codec = PLANES) -> None:
        check_log_name(header.log)
        self.path = path
        self.header = header
        self.summary: LogSummary | None = None
        self._xyz_codec = xyz_codec
        self._entries: list[_FrameEntry] = []
        self._whole = whole_file(path)
        self._file: BinaryIO | None = None
        self._offset = 0

    def __enter__(self) -> Self:
        self._file = self._whole.__enter__()
        start = _MAGIC + struct.pack("<I", FORMAT_VERSION)
        self._write(start + struct.pack("<I", google_crc32c.value(start)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        if error is not None:
            return self._whole.__exit__(kind, error, trace)
        try:
            summary = self._finish()
        except BaseException as failure:
            self._whole.__exit__(type(failure), failure, failure.__traceback__)
            raise
        self._whole.__exit__(None, None, None)
        self.summary = summary
        return None

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
            raise DataError(f"{place} of log '{frame.log}': expected frame {len(self._entries)} of log '{self.header.log}'")
        if any(not 0 <= earlier < frame.index for earlier in frame.previous):
            raise DataError(f"{place}: previous {frame.previous} must be indices of earlier sweeps of the same log")
        columns = columns_of(frame, place)
        chunks = {}
        for name, column in columns.items():
            codec = self._xyz_codec if name == "xyz" else PLANES
            try:
                data = encode(column, codec)
            except DataError as error:
                raise DataError(f"{place}, column {name}: {error}") from None
            chunks[name] = {
                "codec": str(codec),
                "dtype": dtype_name(column.dtype),
                "shape": list(column.shape),
                "offset": self._offset,
                "length": len(data),
                "crc32c": google_crc32c.value(data),
            }
            self._write(data)
        record = _to_json(record_of(frame, chunks), place)
        entry = _FrameEntry(
            offset=self._offset,
            length=len(record),
            crc=google_crc32c.value(record),
            points=len(frame.points),
            keyframe=frame.is_keyframe,
            labelled=frame.labels is not None,
            boxes=-1 if frame.boxes is None else len(frame.boxes),
        )
        self._write(record)
        self._entries.append(entry)

    def _finish(self) -> LogSummary:
        rows = [[e.offset, e.length, e.crc, e.points, int(e.keyframe), int(e.labelled), e.boxes] for e in self._entries]
        index = _to_json({"header": asdict(self.header), "frames": rows}, str(self.path))
        crc = google_crc32c.value(index)
        start = struct.pack("<QQIII", self._offset, len(index), crc, len(rows), FORMAT_VERSION)
        self._write(index)
        self._write(start + struct.pack("<I", google_crc32c.value(start)) + _MAGIC)
        return _summarise(self._entries, self._offset, crc)

    def _write(self, data: bytes) -> None:
        if self._file is None:
            raise ValueError("LogWriter is a context manager: use `with LogWriter(path, header) as log:`")
        self._file.write(data)
        self._offset += len(data)


class LogReader:
    """Reads one log. Safe to use from threads, after a fork and after being sent to another process."""

    def __init__(self, path: Path) -> None:
        """Opens a log and reads its index.

        Raises:
            DataError: if the file is missing, not a log, of another version, or its index is damaged.
        """
        self.path = Path(path)
        self._open()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.path = state["path"]
        self._open()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def keyframes(self) -> tuple[int, ...]:
        """Indices of the keyframes, in order of time."""
        return self.summary.keyframes

    def close(self) -> None:
        """Closes the file; reading afterwards is an error."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def __del__(self) -> None:
        if getattr(self, "_handle", -1) >= 0:
            os.close(self._handle)

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
                self._read(offset, length, crc, f"{place}, column {name}")

    def _open(self) -> None:
        self._handle = -1
        try:
            self._handle = os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            self._size = os.fstat(self._handle).st_size
        except FileNotFoundError:
            raise DataError(f"{self.path}: no such log. Run the `prepare` command that made this dataset again.") from None
        except OSError as error:
            raise DataError(f"{self.path}: cannot be opened ({error.strerror or error}).") from error
        if self._size < _HEAD.size + _TRAILER.size:
            raise DataError(f"{self.path}: {self._size} bytes are too few for a log, it is cut off. {_MEND}")
        self._check_head(self._pread(0, _HEAD.size))
        tail = self._size - _TRAILER.size
        trailer = self._pread(tail, _TRAILER.size)
        offset, length, crc, frames, version, own_crc, magic = _TRAILER.unpack(trailer)
        if magic != _MAGIC or own_crc != google_crc32c.value(trailer[:28]):
            raise DataError(f"{self.path}: the trailer at byte {tail} is damaged or the file is cut off. {_MEND}")
        if version != FORMAT_VERSION or offset + length != tail or length > _MAX_INDEX_BYTES:
            raise DataError(f"{self.path}: the trailer at byte {tail} points outside of the file. {_MEND}")
        index = _from_json(self._read(offset, length, crc, f"{self.path}: index"), f"{self.path}: index")
        try:
            self.header = LogHeader(**index["header"])
            self._entries = [_entry_of(row) for row in index["frames"]]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{self.path}: the index at byte {offset} lacks {error}. {_MEND}") from None
        if len(self._entries) != frames:
            raise DataError(f"{self.path}: the index at byte {offset} lists {len(self._entries)} of {frames} frames. {_MEND}")
        self.summary = _summarise(self._entries, self._size, crc)

    def _check_head(self, head: bytes) -> None:
        magic, version, crc = _HEAD.unpack(head)
        if magic != _MAGIC:
            raise DataError(f"{self.path}: not a picture3d log (byte 0 does not hold its mark). Prepare the raw data first.")
        if crc != google_crc32c.value(head[:12]):
            raise DataError(f"{self.path}: the head at byte 0 does not match its checksum. {_MEND}")
        if version != FORMAT_VERSION:
            raise DataError(
                f"{self.path}: format version {version}, this picture3d reads version {FORMAT_VERSION}. "
                "Prepare the raw data again, or use the picture3d that wrote the file."
            )

    def _entry(self, index: int) -> tuple[_FrameEntry, str]:
        """A frame's line in the index, and its name for messages."""
        if not 0 <= index < len(self._entries):
            raise DataError(f"{self.path}: there is no frame {index}, the log has frames 0 to {len(self._entries) - 1}")
        return self._entries[index], f"{self.path}: frame {index}"

    def _record(self, entry: _FrameEntry, place: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """A frame's record, and where its columns are."""
        record = _from_json(self._read(entry.offset, entry.length, entry.crc, f"{place}, record"), f"{place}, record")
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
            return decode(self._read(offset, length, crc, place), codec, dtype, shape)
        except DataError as error:
            if str(error).startswith(place):
                raise
            raise DataError(f"{place} at byte {offset}: {error}. {_MEND}") from None

    def _read(self, offset: int, length: int, crc: int, place: str) -> bytes:
        if offset < 0 or length < 0 or offset + length > self._size:
            raise DataError(f"{place}: bytes {offset} to {offset + length} lie outside of the file of {self._size}. {_MEND}")
        data = self._pread(offset, length)
        if len(data) != length or google_crc32c.value(data) != crc:
            raise DataError(f"{place}: the {length} bytes at byte {offset} do not match their checksum. {_MEND}")
        return data

    def _pread(self, offset: int, length: int) -> bytes:
        parts = []
        while length > 0:
            try:
                part = os.pread(self._handle, length, offset)
            except OSError as error:
                raise DataError(f"{self.path}: cannot be read at byte {offset} ({error.strerror or error}).") from error
            if not part:
                break
            parts.append(part)
            offset, length = offset + len(part), length - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


_MEND = "The file is damaged: delete it and run the `prepare` command again, only this log is made anew."


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
        raise DataError(f"{place}: a pose or another number is not finite; such a frame cannot be stored") from None


def _from_json(data: bytes, place: str) -> dict[str, Any]:
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not JSON ({error}). {_MEND}") from None
    if not isinstance(tree, dict):
        raise DataError(f"{place}: not a JSON object. {_MEND}")
    return tree
