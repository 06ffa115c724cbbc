"""A file of numbered blocks of bytes, each read without the others, all checksummed; see `framed_file`.

The index holds a header and a row per block. Memory grows by some 100 bytes per block, for the index.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c

from picture3d.errors import DataError
from picture3d.formats.framed_file import HEAD_BYTES, FramedFile, FramedKind, FramedWriter

_MAX_BLOCK_BYTES = 1 << 31


@dataclass(frozen=True, slots=True)
class Block:
    """A block's row in the index."""

    number: int
    offset: int
    length: int
    crc32c: int
    about: tuple[Any, ...]  # what the writer noted: JSON values


class BlockWriter(FramedWriter):
    """Writes a file block by block; a context manager. The file takes its name when the block ends without an error.

    `header` is written at the end and may be added to until then.
    """

    def __init__(self, path: Path, kind: FramedKind, header: dict[str, Any]) -> None:
        super().__init__(path, kind)
        self.header = header
        self._blocks: list[Block] = []

    def add(self, number: int, data: bytes, *about: Any) -> None:
        """Appends a block; numbers must rise."""
        if self._blocks and number <= self._blocks[-1].number:
            raise ValueError(f"block {number} comes after block {self._blocks[-1].number}")
        self._blocks.append(Block(number, self.write(data), len(data), google_crc32c.value(data), about))

    def index(self) -> tuple[bytes, int]:
        """A header and a row per block."""
        rows = [[b.number, b.offset, b.length, b.crc32c, *b.about] for b in self._blocks]
        tree = {"header": self.header, "blocks": rows}
        return json.dumps(tree, separators=(",", ":"), allow_nan=False).encode(), len(rows)


class BlockFile(FramedFile):
    """Reads blocks. Safe to use from threads, after a fork and after being sent to another process."""

    def __init__(self, path: Path, kind: FramedKind) -> None:
        """Opens a file and reads its index.

        Raises:
            DataError: if it is missing, of another kind or version, or damaged.
        """
        super().__init__(path, kind)
        tree = self.index()
        try:
            self.header: dict[str, Any] = dict(tree["header"])
            rows = [Block(int(n), int(at), int(size), int(own), tuple(about)) for n, at, size, own, *about in tree["blocks"]]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{self.path}: the index at byte {self.index_at} is garbled ({error}). {kind.mend}") from None
        self.blocks = {block.number: block for block in rows}
        inside = all(
            b.offset >= HEAD_BYTES and 0 <= b.length <= _MAX_BLOCK_BYTES and b.offset + b.length <= self.index_at for b in rows
        )
        if len(self.blocks) != self.count or not inside:
            raise DataError(f"{self.path}: the index at byte {self.index_at} contradicts itself. {kind.mend}")

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "kind": self.kind}

    def read(self, number: int) -> bytes:
        """The bytes of a block.

        Raises:
            DataError: if there is no such block, or it does not match its checksum.
        """
        if number not in self.blocks:
            raise DataError(f"{self.path}: there is no block {number} of {len(self.blocks)}. {self.kind.mend}")
        block = self.blocks[number]
        return self.read_at(block.offset, block.length, block.crc32c, f"{self.path}: block {number}").tobytes()

    def check_bytes(self) -> None:
        """Compares every block with its checksum.

        Raises:
            DataError: for the first that does not match.
        """
        for number in self.blocks:
            self.read(number)
