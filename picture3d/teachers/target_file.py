"""The stored targets of one log, one file (`<log>.targets`): every frame a block of its own, read without the others.

Layout: a 16-byte head, one block per frame (features, then one superclass byte per cell), a JSON index, a 40-byte trailer
that says where the index is. Blocks, index, head and trailer carry a CRC-32C each.
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import astuple, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from picture3d.errors import DataError
from picture3d.files import whole_file
from picture3d.teachers.feature_codecs import FeatureCodec, decode_features, encoded_size

FORMAT_VERSION = 1
_MAGIC = b"P3DTGT\r\n"
_HEAD = struct.Struct("<8sII")  # magic, version, CRC-32C of the 12 bytes before it
_TRAILER = struct.Struct("<QQIIII8s")  # index offset, index length, index CRC, frames, version, CRC of the 28 before, magic
_MAX_INDEX_BYTES = 1 << 28
_MAX_BLOCK_BYTES = 1 << 31
_MEND = "Delete the file and run `picture3d targets` again: only this log is done anew."


@dataclass(frozen=True, slots=True)
class TargetEntry:
    """A frame's line in the index."""

    frame: int  # position of the frame in its log
    points: int  # N
    cells: int  # M
    xyz_crc32c: int  # of the frame's xyz bytes: other points, other targets
    cells_crc32c: int  # of `point_cell` as int32: the rows fit only the cells they were made for
    codec: FeatureCodec
    cosine: float  # mean cosine between the teacher's features and the stored ones
    offset: int
    length: int
    crc32c: int  # of the block


class TargetWriter:
    """Writes the targets of one log; a context manager. The file takes its name when the block ends without an error."""

    def __init__(self, path: Path, *, log: str, settings_digest: str, dimension: int) -> None:
        self.path = path
        self.entries: list[TargetEntry] = []
        self._header = {"log": log, "settings": settings_digest, "dimension": dimension}
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
        if kind is None:
            try:
                self._write_index()
            except OSError as failure:
                return self._whole.__exit__(type(failure), failure, failure.__traceback__)
        return self._whole.__exit__(kind, error, trace)

    def add(
        self,
        frame: int,
        features: bytes,
        codec: FeatureCodec,
        cosine: float,
        superclass: NDArray[np.uint8],
        *,
        points: int,
        xyz_crc32c: int,
        cells_crc32c: int,
    ) -> None:
        """Appends a frame; `features` are encoded with `codec`, one row per entry of `superclass`."""
        block = features + superclass.tobytes()
        self.entries.append(
            TargetEntry(
                frame=frame,
                points=points,
                cells=len(superclass),
                xyz_crc32c=xyz_crc32c,
                cells_crc32c=cells_crc32c,
                codec=codec,
                cosine=round(cosine, 6),
                offset=self._offset,
                length=len(block),
                crc32c=google_crc32c.value(block),
            )
        )
        self._write(block)

    def _write_index(self) -> None:
        tree = {**self._header, "frames": [astuple(entry) for entry in self.entries]}
        index = json.dumps(tree, separators=(",", ":"), allow_nan=False).encode()
        start = struct.pack("<QQIII", self._offset, len(index), google_crc32c.value(index), len(self.entries), FORMAT_VERSION)
        self._write(index)
        self._write(start + struct.pack("<I", google_crc32c.value(start)) + _MAGIC)

    def _write(self, data: bytes) -> None:
        if self._file is None:
            raise ValueError("TargetWriter is a context manager: use `with TargetWriter(...) as log:`")
        self._file.write(data)
        self._offset += len(data)


class TargetFile:
    """Reads the targets of one log. Safe to use from threads, after a fork and after being sent to another process."""

    def __init__(self, path: Path) -> None:
        """Opens the file and reads its index.

        Raises:
            DataError: if it is missing, not a file of targets, of another version, or damaged.
        """
        self.path = Path(path)
        self._open()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.path = state["path"]
        self._open()

    def __del__(self) -> None:
        if getattr(self, "_handle", -1) >= 0:
            os.close(self._handle)

    @property
    def frames(self) -> tuple[int, ...]:
        """Which frames of the log have targets."""
        return tuple(self.entries)

    def read(self, entry: TargetEntry) -> tuple[NDArray[np.float16], NDArray[np.uint8]]:
        """(M, D) float16 features and (M,) uint8 superclasses of a frame; nothing else of the file is touched.

        Raises:
            DataError: if the block is damaged.
        """
        place = f"{self.path}: frame {entry.frame}"
        block = self._read(entry.offset, entry.length, entry.crc32c, place)
        split = entry.length - entry.cells
        return decode_features(block[:split], entry.codec, entry.cells, self.dimension), block[split:]

    def _open(self) -> None:
        self._handle = -1
        try:
            self._handle = os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            self._size = os.fstat(self._handle).st_size
        except FileNotFoundError:
            raise DataError(f"{self.path}: no such file. Run `picture3d targets` first.") from None
        except OSError as error:
            raise DataError(f"{self.path}: cannot be opened ({error.strerror or error}).") from error
        tail = self._size - _TRAILER.size
        if tail < _HEAD.size:
            raise DataError(f"{self.path}: {self._size} bytes are too few, it is cut off. {_MEND}")
        head = self._pread(0, _HEAD.size).tobytes()
        magic, version, crc = _HEAD.unpack(head)
        if magic != _MAGIC or crc != google_crc32c.value(head[:12]):
            raise DataError(f"{self.path}: not a file of teacher targets (byte 0 does not hold its mark). {_MEND}")
        if version != FORMAT_VERSION:
            raise DataError(f"{self.path}: format version {version}, this picture3d reads {FORMAT_VERSION}. {_MEND}")
        trailer = self._pread(tail, _TRAILER.size).tobytes()
        offset, length, crc, frames, version, own_crc, magic = _TRAILER.unpack(trailer)
        if magic != _MAGIC or own_crc != google_crc32c.value(trailer[:28]):
            raise DataError(f"{self.path}: the trailer at byte {tail} is damaged or the file is cut off. {_MEND}")
        if offset + length != tail or length > _MAX_INDEX_BYTES:
            raise DataError(f"{self.path}: the trailer at byte {tail} points outside of the file. {_MEND}")
        index = self._read(offset, length, crc, f"{self.path}: index").tobytes()
        try:
            tree = json.loads(index)
            self.log, self.settings_digest = str(tree["log"]), str(tree["settings"])
            self.dimension = int(tree["dimension"])
            entries = [_entry(row) for row in tree["frames"]]
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise DataError(f"{self.path}: the index at byte {offset} is garbled ({error}). {_MEND}") from None
        self.entries = {entry.frame: entry for entry in entries}
        if len(self.entries) != frames or not all(self._plausible(entry) for entry in entries):
            raise DataError(f"{self.path}: the index at byte {offset} contradicts itself. {_MEND}")

    def _plausible(self, entry: TargetEntry) -> bool:
        if not (0 <= entry.cells <= entry.points and 0 < self.dimension <= 1 << 16):
            return False
        size = encoded_size(entry.codec, entry.cells, self.dimension) + entry.cells
        inside = _HEAD.size <= entry.offset and entry.offset + entry.length <= self._size
        return inside and entry.length == size <= _MAX_BLOCK_BYTES

    def _read(self, offset: int, length: int, crc: int, place: str) -> NDArray[np.uint8]:
        data = self._pread(offset, length)
        if len(data) != length or google_crc32c.value(data) != crc:
            raise DataError(f"{place}: the {length} bytes at byte {offset} do not match their checksum. {_MEND}")
        return data

    def _pread(self, offset: int, length: int) -> NDArray[np.uint8]:
        """Up to `length` bytes at `offset`, fewer at the end of the file; writable."""
        data = np.empty(length, np.uint8)
        done = 0
        while done < length:
            try:
                count = os.preadv(self._handle, [data.data[done:]], offset + done)
            except OSError as error:
                raise DataError(f"{self.path}: cannot be read at byte {offset} ({error.strerror or error}).") from error
            if count == 0:
                break
            done += count
        return data[:done]


def _entry(row: list[Any]) -> TargetEntry:
    frame, points, cells, xyz, own, codec, cosine, offset, length, crc = row
    return TargetEntry(
        int(frame),
        int(points),
        int(cells),
        int(xyz),
        int(own),
        FeatureCodec(codec),
        float(cosine),
        int(offset),
        int(length),
        int(crc),
    )
