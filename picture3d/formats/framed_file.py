"""What the files of our own formats share: a head, pieces of bytes, a JSON index, a trailer; checksummed, whole or not at all.

Layout: a 16-byte head (mark, version, CRC-32C), whatever the format puts between, the index, a 40-byte trailer that says where
the index is. A piece is read by its place and checksum, nothing else of the file is touched.
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from picture3d.errors import DataError
from picture3d.files import unreadable, whole_file

_HEAD = struct.Struct("<8sII")  # mark, version, CRC-32C of the 12 bytes before it
_TRAILER = struct.Struct("<QQIIII8s")  # index offset, index length, index CRC, entries, version, CRC of the 28 before, mark
_MAX_INDEX_BYTES = 1 << 28
HEAD_BYTES = _HEAD.size


@dataclass(frozen=True, slots=True)
class FramedKind:
    """What tells one format from another, and what its errors say."""

    mark: bytes  # 8 bytes
    version: int
    what: str  # "a picture3d log"
    mend: str  # a sentence: what to do about a damaged file
    absent: str = ""  # a sentence: what to do about a missing one, if that is something else


class FramedWriter:
    """Writes a file piece by piece; a context manager. The file takes its name when the block ends without an error.

    A format says in :meth:`index` what its index is.
    """

    def __init__(self, path: Path, kind: FramedKind) -> None:
        self.path = path
        self.kind = kind
        self.offset = 0  # bytes written so far
        self.index_crc32c = 0  # known when the file is finished
        self._whole = whole_file(path)
        self._file: BinaryIO | None = None

    def index(self) -> tuple[bytes, int]:
        """The index as JSON, and how many entries it has."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        self._file = self._whole.__enter__()
        start = self.kind.mark + struct.pack("<I", self.kind.version)
        self.write(start + struct.pack("<I", google_crc32c.value(start)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        if error is not None:
            return self._whole.__exit__(kind, error, trace)
        try:
            self._finish()
        except BaseException as failure:
            self._whole.__exit__(type(failure), failure, failure.__traceback__)
            raise
        self._whole.__exit__(None, None, None)
        return None

    def write(self, data: bytes) -> int:
        """Appends a piece; returns the byte it begins at."""
        if self._file is None:
            raise ValueError(f"{type(self).__name__} is a context manager: use `with {type(self).__name__}(...) as file:`")
        begin = self.offset
        self._file.write(data)
        self.offset += len(data)
        return begin

    def _finish(self) -> None:
        index, count = self.index()
        self.index_crc32c = google_crc32c.value(index)
        start = struct.pack("<QQIII", self.offset, len(index), self.index_crc32c, count, self.kind.version)
        self.write(index)
        self.write(start + struct.pack("<I", google_crc32c.value(start)) + self.kind.mark)


class FramedFile:
    """Reads pieces. Safe to use from threads, after a fork and after being sent to another process (it is opened anew)."""

    def __init__(self, path: Path, kind: FramedKind) -> None:
        """Opens a file and finds its index.

        Raises:
            DataError: if it is missing, of another kind or version, or its head or trailer is damaged.
        """
        self._handle = -1
        self.path = Path(path)
        self.kind = kind
        try:
            self._handle = os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            self.size = os.fstat(self._handle).st_size
        except FileNotFoundError:
            raise DataError(f"{self.path}: no such file. {kind.absent or kind.mend}") from None
        except OSError as error:
            raise unreadable(self.path, error) from error
        # Where the index is, how long, its checksum (which stands for the checksums of all pieces), and its entries.
        self.index_at, self._index_bytes, self.crc32c, self.count = self._trailer()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def close(self) -> None:
        """Closes the file; reading afterwards is an error."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def __del__(self) -> None:
        if getattr(self, "_handle", -1) >= 0:
            os.close(self._handle)

    def read_at(self, offset: int, length: int, crc: int, place: str) -> NDArray[np.uint8]:
        """(length,) bytes, writable; `place` is what errors call them.

        Raises:
            DataError: if they lie outside of the file or do not match their checksum.
        """
        if offset < 0 or length < 0 or offset + length > self.size:
            raise DataError(
                f"{place}: bytes {offset} to {offset + length} lie outside of the file of {self.size}. {self.kind.mend}"
            )
        data = self._pread(offset, length)
        if len(data) != length or google_crc32c.value(data) != crc:
            raise DataError(f"{place}: the {length} bytes at byte {offset} do not match their checksum. {self.kind.mend}")
        return data

    def index(self) -> dict[str, Any]:
        """The index.

        Raises:
            DataError: if it is damaged.
        """
        data = self.read_at(self.index_at, self._index_bytes, self.crc32c, f"{self.path}: index")
        try:
            tree = json.loads(data.tobytes())
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.path}: the index at byte {self.index_at} is not JSON ({error}). {self.kind.mend}") from None
        if not isinstance(tree, dict):
            raise DataError(f"{self.path}: the index at byte {self.index_at} is not a JSON object. {self.kind.mend}")
        return tree

    def _trailer(self) -> tuple[int, int, int, int]:
        path, kind = self.path, self.kind
        tail = self.size - _TRAILER.size
        if tail < HEAD_BYTES:
            raise DataError(f"{path}: {self.size} bytes are too few for {kind.what}, it is cut off. {kind.mend}")
        head = self._pread(0, HEAD_BYTES).tobytes()
        mark, version, crc = _HEAD.unpack(head)
        if mark != kind.mark:
            raise DataError(f"{path}: not {kind.what} (byte 0 does not hold its mark). {kind.mend}")
        if crc != google_crc32c.value(head[:12]):
            raise DataError(f"{path}: the head at byte 0 does not match its checksum. {kind.mend}")
        if version != kind.version:
            raise DataError(f"{path}: format version {version}, this picture3d reads version {kind.version}. {kind.mend}")
        trailer = self._pread(tail, _TRAILER.size).tobytes()
        offset, length, crc, count, version, own_crc, mark = _TRAILER.unpack(trailer)
        if mark != kind.mark or own_crc != google_crc32c.value(trailer[:28]):
            raise DataError(f"{path}: the trailer at byte {tail} is damaged or the file is cut off. {kind.mend}")
        if version != kind.version or offset + length != tail or length > _MAX_INDEX_BYTES:
            raise DataError(f"{path}: the trailer at byte {tail} points outside of the file. {kind.mend}")
        return offset, length, crc, count

    def _pread(self, offset: int, length: int) -> NDArray[np.uint8]:
        """Up to `length` bytes at `offset`, fewer at the end of the file."""
        data = np.empty(length, np.uint8)
        done = 0
        while done < length:
            try:
                count = os.preadv(self._handle, [data.data[done:]], offset + done)
            except OSError as error:
                raise DataError(
                    f"{self.path}: cannot be read at byte {offset} ({error.strerror or error}). Check its permissions and "
                    "the disk it lies on."
                ) from error
            if count == 0:
                break
            done += count
        return data[:done]
