"""What the footer of a Parquet file says of its columns, read without pyarrow, which can end the process on a damaged one.

The footer is a thrift struct in the compact protocol (source: ``parquet.thrift`` of parquet-format, FileMetaData, RowGroup,
ColumnChunk and ColumnMetaData; ``thrift-compact-protocol.md`` of Apache Thrift). Only numbers of rows and values are taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from picture3d.errors import DataError
from picture3d.files import unreadable

_MAGIC = b"PAR1"
_MAX_FOOTER = 1 << 26
_MAX_DEPTH = 32
_BOOLS, _INTEGERS, _BYTE, _DOUBLE, _BINARY, _LISTS, _MAP, _STRUCT, _UUID = (1, 2), (4, 5, 6), 3, 7, 8, (9, 10), 11, 12, 13
# Field numbers of parquet.thrift.
_ROW_GROUPS, _COLUMNS, _NUM_ROWS, _META_DATA, _PATH, _NUM_VALUES = 4, 1, 3, 3, 3, 5


@dataclass(frozen=True, slots=True)
class ColumnSize:
    """One column of one row group."""

    row_group: int
    column: str  # its path, joined by dots
    rows: int  # of the row group
    values: int  # with those inside of lists, and those absent


def column_sizes(path: Path) -> list[ColumnSize]:
    """The columns of every row group of a file, as its footer claims.

    Raises:
        DataError: if the file cannot be read, or its footer is damaged.
    """
    try:
        with path.open("rb") as file:
            end = file.seek(0, 2)
            file.seek(max(0, end - 8))
            tail = file.read(8)
            length = int.from_bytes(tail[:4], "little")
            if tail[4:] != _MAGIC or length > min(end - 12, _MAX_FOOTER):
                raise DataError(f"{path}: does not end as a Parquet file does; it is cut off. Download it again.")
            file.seek(end - 8 - length)
            data = file.read(length)
    except OSError as error:
        raise unreadable(path, error) from error
    try:
        footer = _Compact(data).struct()
        return [
            ColumnSize(number, ".".join(part.decode() for part in meta[_PATH]), int(group[_NUM_ROWS]), int(meta[_NUM_VALUES]))
            for number, group in enumerate(footer[_ROW_GROUPS])
            for meta in (chunk[_META_DATA] for chunk in group[_COLUMNS])
        ]
    except (IndexError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: not a whole Parquet file (its footer is damaged: {error}). Download it again.") from None


class _Compact:
    """Values of thrift's compact protocol; a struct is a dict by field number. Damage raises IndexError or ValueError."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
        if depth > _MAX_DEPTH:
            raise ValueError("nested too deeply")
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            kind = head & 15
            number = number + (head >> 4) if head >> 4 else self._signed()
            fields[number] = kind == _BOOLS[0] if kind in _BOOLS else self._value(kind, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if kind in _INTEGERS:
            return self._signed()
        if kind == _BYTE or kind in _BOOLS:  # a bool in a list takes a byte
            return self._byte()
        if kind in (_DOUBLE, _UUID):
            return self._take(8 if kind == _DOUBLE else 16)
        if kind == _BINARY:
            return self._take(self._varint())
        if kind in _LISTS:
            head = self._byte()
            count = self._count(self._varint() if head >> 4 == 15 else head >> 4)
            return [self._item(head & 15, depth) for _ in range(count)]
        if kind == _MAP:
            count = self._count(self._varint())
            kinds = self._byte() if count else 0
            return [(self._item(kinds >> 4, depth), self._item(kinds & 15, depth)) for _ in range(count)]
        return self._item(kind, depth)

    def _item(self, kind: int, depth: int) -> Any:
        if kind == _STRUCT:
            return self.struct(depth + 1)
        if kind in _LISTS or kind == _MAP:
            if depth >= _MAX_DEPTH:
                raise ValueError("nested too deeply")
            return self._value(kind, depth + 1)
        if kind not in (*_BOOLS, *_INTEGERS, _BYTE, _DOUBLE, _BINARY, _UUID):
            raise ValueError(f"there is no type {kind}")
        return self._value(kind, depth)

    def _count(self, count: int) -> int:
        if count > len(self._data) - self._at:  # an item takes a byte at least
            raise ValueError(f"a list of {count} items is longer than the footer")
        return count

    def _byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1]

    def _take(self, count: int) -> bytes:
        if count > len(self._data) - self._at:
            raise ValueError("cut off")
        self._at += count
        return self._data[self._at - count : self._at]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("a number of more than ten bytes")

    def _signed(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
