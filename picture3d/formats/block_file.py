"""A file of numbered blocks of bytes, each read without the others, all checksummed; written whole or not at all.

Layout: a 16-byte head (mark, version, CRC-32C), the blocks, a JSON index (a header and a row per block), a 40-byte trailer
that says where the index is. Memory grows by some 100 bytes per block, for the index.
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

from picture3d.errors import DataError
from picture3d.files import whole_file

_HEAD = struct.Struct("<8sII")  # mark, version, CRC-32C of the 12 bytes before it
_TRAILER = struct.Struct("<QQIIII8s")  # index offset, index length, index CRC, blocks, version, CRC of the 28 before, mark
_MAX_INDEX_BYTES = 1 << 28
_MAX_BLOCK_BYTES = 1 << 31


@dataclass(frozen=True, slots=True)
class BlockKind:
    """What tells one kind of file from another, and how a damaged one is mended."""

    mark: bytes  # 8 bytes
    version: int
    what: str  # "a file of occupancy labels"
    mend: str  # a sentence for the user


@dataclass(frozen=True, slots=True)
class Block:
    """A block's row in the index."""

    number: int
    offset: int
    length: int
    crc32c: int
    about: tuple[Any, ...]  # what the writer noted: JSON values


class BlockWriter:
    """Writes a file block by block; a context manager. The file takes its name when the block ends without an error."""

    def __init__(self, path: Path, kind: BlockKind, header: dict[str, Any]) -> None:
        self.path = path
        self.kind = kind
        self._header = header
        self._blocks: list[Block] = []
        self._whole = whole_file(path)
        self._file: BinaryIO | None = None
        self._offset = 0

    def __enter__(self) -> Self:
        self._file = self._whole.__enter__()
        start = self.kind.mark + struct.pack("<I", self.kind.version)
        self._write(start + struct.pack("<I", google_crc32c.value(start)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        if kind is None:
            try:
                self._finish()
            except OSError as failure:
                return self._whole.__exit__(type(failure), failure, failure.__traceback__)
        return self._whole.__exit__(kind, error, trace)

    def add(self, number: int, data: bytes, *about: Any) -> None:
        """Appends a block; numbers must rise."""
        if self._blocks and number <= self._blocks[-1].number:
            raise ValueError(f"block {number} comes after block {self._blocks[-1].number}")
        self._blocks.append(Block(number, self._offset, len(data), google_crc32c.value(data), about))
        self._write(data)

    def _finish(self) -> None:
        rows = [[b.number, b.offset, b.length, b.crc32c, *b.about] for b in self._blocks]
        index = json.dumps({"header": self._header, "blocks": rows}, separators=(",", ":"), allow_nan=False).encode()
        crc = google_crc32c.value(index)
        start = struct.pack("<QQIII", self._offset, len(index), crc, len(rows), self.kind.version)
        self._write(index)
        self._write(start + struct.pack("<I", google_crc32c.value(start)) + self.kind.mark)

    def _write(self, data: bytes) -> None:
        if self._file is None:
            raise ValueError("BlockWriter is a context manager: use `with BlockWriter(...) as file:`")
        self._file.write(data)
        self._offset += len(data)


class BlockFile:
    """Reads blocks. Safe to use from threads, after a fork and after being sent to another process."""

    def __init__(self, path: Path, kind: BlockKind) -> None:
        """Opens a file and reads its index.

        Raises:
            DataError: if it is missing, of another kind or version, or damaged.
        """
        self.path = Path(path)
        self.kind = kind
        self._open()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "kind": self.kind}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"], state["kind"])

    def __del__(self) -> None:
        if getattr(self, "_handle", -1) >= 0:
            os.close(self._handle)

    def read(self, number: int) -> bytes:
        """The bytes of a block.

        Raises:
            DataError: if there is no such block, or it does not match its checksum.
        """
        if number not in self.blocks:
            raise DataError(f"{self.path}: there is no block {number}; it has {len(self.blocks)}")
        block = self.blocks[number]
        return self._read(block.offset, block.length, block.crc32c, f"{self.path}: block {number}")

    def _open(self) -> None:
        self._handle = -1
        kind = self.kind
        try:
            self._handle = os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            self.size = os.fstat(self._handle).st_size
        except FileNotFoundError:
            raise DataError(f"{self.path}: no such file. {kind.mend}") from None
        except OSError as error:
            raise DataError(f"{self.path}: cannot be opened ({error.strerror or error}).") from error
        tail = self.size - _TRAILER.size
        if tail < _HEAD.size:
            raise DataError(f"{self.path}: {self.size} bytes are too few for {kind.what}, it is cut off. {kind.mend}")
        head = self._pread(0, _HEAD.size)
        mark, version, crc = _HEAD.unpack(head)
        if mark != kind.mark or crc != google_crc32c.value(head[:12]):
            raise DataError(f"{self.path}: not {kind.what} (byte 0 does not hold its mark). {kind.mend}")
        if version != kind.version:
            raise DataError(f"{self.path}: format version {version}, this picture3d reads {kind.version}. {kind.mend}")
        trailer = self._pread(tail, _TRAILER.size)
        offset, length, crc, count, version, own_crc, mark = _TRAILER.unpack(trailer)
        if mark != kind.mark or own_crc != google_crc32c.value(trailer[:28]):
            raise DataError(f"{self.path}: the trailer at byte {tail} is damaged or the file is cut off. {kind.mend}")
        if offset + length != tail or length > _MAX_INDEX_BYTES or version != kind.version:
            raise DataError(f"{self.path}: the trailer at byte {tail} points outside of the file. {kind.mend}")
        self.crc32c = crc  # of the index, which holds the checksum of every block
        index = self._read(offset, length, crc, f"{self.path}: index")
        try:
            tree = json.loads(index)
            self.header: dict[str, Any] = dict(tree["header"])
            rows = [Block(int(n), int(at), int(size), int(own), tuple(about)) for n, at, size, own, *about in tree["blocks"]]
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise DataError(f"{self.path}: the index at byte {offset} is garbled ({error}). {kind.mend}") from None
        self.blocks = {block.number: block for block in rows}
        inside = all(_HEAD.size <= b.offset and 0 <= b.length <= _MAX_BLOCK_BYTES and b.offset + b.length <= tail for b in rows)
        if len(self.blocks) != count or not inside:
            raise DataError(f"{self.path}: the index at byte {offset} contradicts itself. {kind.mend}")

    def _read(self, offset: int, length: int, crc: int, place: str) -> bytes:
        data = self._pread(offset, length)
        if len(data) != length or google_crc32c.value(data) != crc:
            raise DataError(f"{place}: the {length} bytes at byte {offset} do not match their checksum. {self.kind.mend}")
        return data

    def _pread(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes at `offset`, fewer at the end of the file."""
        parts: list[bytes] = []
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
