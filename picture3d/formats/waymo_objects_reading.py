"""Reading Waymo's ``Objects`` binaries, whole or segment by segment: what is in memory is one segment, not the file.

Thousands of objects are turned into columns at once (`protobuf_columns`); one that does not look as it should is read by
itself, by the reader whose errors name the byte.
"""

from __future__ import annotations

import itertools
import mmap
from array import array
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from picture3d.errors import WRITE_AGAIN, DataError
from picture3d.files import unreadable
from picture3d.formats import protobuf_wire as wire
from picture3d.formats.protobuf_columns import FieldColumns, doubles, field_columns, floats
from picture3d.formats.waymo_objects import BOX_COLUMN, WaymoObjects

_BLOCK_BYTES = 4 << 20  # turned into columns together
_OBJECT_KEY = 1 << 3 | wire.LENGTH
_COUNT_BOUND = 2**31

Int64Array = NDArray[np.int64]


def read_objects(path: Path) -> WaymoObjects:
    """Reads an ``Objects`` file; fields not named in :class:`WaymoObjects`, and boxes of no-label zones, are passed over.

    Raises:
        DataError: naming the file and the byte, if the file is missing, cut off or not an ``Objects`` file.
    """
    return parse_objects(_mapped(path), str(path))


def parse_objects(data: bytes | mmap.mmap, where: str = "objects") -> WaymoObjects:
    """As :func:`read_objects`, from bytes; `where` names them in errors."""
    return _joined([objects for _, objects in _parts(data, where, 0, len(data))])


class ObjectsFile:
    """The objects of a file, segment by segment. What is kept is where in the file the runs of each segment lie.

    Args:
        path: the file; it is looked through once here, and must not change as long as this is used.

    Raises:
        DataError: naming the file and the byte, if the file is missing, cut off or not an ``Objects`` file.
    """

    def __init__(self, path: Path) -> None:
        self._where, self._data = str(path), _mapped(path)
        self._runs: dict[str, array[int]] = {}  # first byte and one past the last, run after run
        before = None
        for span, objects in _parts(self._data, self._where, 0, len(self._data)):
            for context, begin, end in zip(objects.context, span.field.tolist(), span.end.tolist(), strict=True):
                if context == before:
                    self._runs[context][-1] = end
                else:
                    self._runs.setdefault(context, array("q")).extend((begin, end))
                    before = context
            self._forget()

    @property
    def segments(self) -> tuple[str, ...]:
        """Names of the segments that have an object, in the order of the file."""
        return tuple(self._runs)

    def read(self, segment: str) -> WaymoObjects:
        """All objects of a segment, in the order of the file; none if it has none."""
        runs = self._runs.get(segment, ())
        parts = [
            objects
            for begin, end in zip(runs[::2], runs[1::2], strict=True)
            for _, objects in _parts(self._data, self._where, begin, end)
        ]
        self._forget()
        return _joined(parts)

    def _forget(self) -> None:
        """Lets the system take back the pages of the file that were looked at."""
        if isinstance(self._data, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            self._data.madvise(mmap.MADV_DONTNEED)


class _Field(NamedTuple):
    """Where the value of a field goes, and what it may be."""

    column: str  # of `_Columns`
    wire_type: int
    bound: int | None = None  # of a whole number: from -bound to bound - 1


# Fields by their number, of an object and of the label in it (messages: the label is field 1, its box is field 1 of that).
_OF_OBJECT = {
    2: _Field("score", wire.FIXED32),
    3: _Field("overlaps", wire.VARINT),
    4: _Field("context", wire.LENGTH),
    5: _Field("timestamp", wire.VARINT),
    6: _Field("camera", wire.VARINT, 128),
}
_OF_LABEL = {
    3: _Field("kind", wire.VARINT, 128),
    4: _Field("track_id", wire.LENGTH),
    5: _Field("difficulty", wire.VARINT, 128),
    7: _Field("points", wire.VARINT, _COUNT_BOUND),
}
_ALL = (*_OF_OBJECT.values(), *_OF_LABEL.values())
_MESSAGE = 1  # number of the label in an object, and of the box in a label


class _Spans(NamedTuple):
    """Where N objects lie in a file."""

    field: Int64Array  # (N,) first byte of the field
    begin: Int64Array  # (N,) first byte of the message in it
    end: Int64Array  # (N,) one past the last byte of both


class _Columns:
    """Columns of `count` objects, filled in as their fields are met; `odd` are those that are to be read one by one."""

    def __init__(self, count: int) -> None:
        self.box = np.zeros((count, 7))
        self.score = np.ones(count, np.float32)
        self.integers = {field.column: np.zeros(count, np.int64) for field in _ALL if field.wire_type == wire.VARINT}
        self.texts = {field.column: [""] * count for field in _ALL if field.wire_type == wire.LENGTH}
        self.odd = np.zeros(count, np.bool_)

    def objects(self) -> WaymoObjects:
        """The same as it is handed out."""
        return WaymoObjects(
            box=self.box,
            kind=self.integers["kind"].astype(np.int8),
            score=self.score,
            context=tuple(self.texts["context"]),
            timestamp=self.integers["timestamp"],
            camera=self.integers["camera"].astype(np.int8),
            num_points=self.integers["points"].astype(np.int32),
            difficulty=self.integers["difficulty"].astype(np.int8),
            overlaps_no_label_zone=self.integers["overlaps"] != 0,
            track_id=tuple(self.texts["track_id"]),
        )

    def read(self, raw: NDArray[np.uint8], begin: Int64Array, end: Int64Array) -> None:
        """Fills in the objects ``raw[begin:end]``."""
        labelled = np.zeros(len(begin), np.bool_)
        for part in field_columns(raw, begin, end, self.odd):
            label, found = self._chosen(part, _MESSAGE, wire.LENGTH)
            labelled[found] = True
            self._read_labels(raw, label)
            self._fill(raw, part, _OF_OBJECT)
        self.odd |= ~labelled

    def _read_labels(self, raw: NDArray[np.uint8], label: FieldColumns) -> None:
        damaged = np.zeros(len(label.row), np.bool_)
        for inner in field_columns(raw, label.start, label.stop, damaged):
            part = inner._replace(row=label.row[inner.row])
            self._read_boxes(raw, self._chosen(part, _MESSAGE, wire.LENGTH)[0])
            self._fill(raw, part, _OF_LABEL)
        self.odd[label.row[damaged]] = True

    def _read_boxes(self, raw: NDArray[np.uint8], box: FieldColumns) -> None:
        damaged = np.zeros(len(box.row), np.bool_)
        for inner in field_columns(raw, box.start, box.stop, damaged):
            part = inner._replace(row=box.row[inner.row])
            for number, column in BOX_COLUMN.items():
                value, found = self._chosen(part, number, wire.FIXED64)
                self.box[found, column] = doubles(raw, value.start)
        self.odd[box.row[damaged]] = True

    def _chosen(self, part: FieldColumns, number: int, wire_type: int) -> tuple[FieldColumns, Int64Array]:
        """The fields of a number, and their rows; of another wire type they make their objects odd."""
        mine = part.number == number
        if mine.all() and (part.wire_type == wire_type).all():
            return part, part.row
        self.odd[part.row[mine & (part.wire_type != wire_type)]] = True
        chosen = part.select(mine & (part.wire_type == wire_type))
        return chosen, chosen.row

    def _fill(self, raw: NDArray[np.uint8], part: FieldColumns, known: dict[int, _Field]) -> None:
        for number, field in known.items():
            found, row = self._chosen(part, number, field.wire_type)
            match field.wire_type:
                case wire.FIXED32:
                    self.score[row] = floats(raw, found.start)
                case wire.LENGTH:
                    self._texts(raw, found, self.texts[field.column])
                case _:
                    self.integers[field.column][row] = found.value
                    if field.bound is not None:
                        self.odd[row[(found.value < -field.bound) | (found.value >= field.bound)]] = True

    def _texts(self, raw: NDArray[np.uint8], part: FieldColumns, column: list[str]) -> None:
        """Texts of R fields; neighbours with the same text share it."""
        before, text = None, ""
        for row, start, stop in zip(part.row.tolist(), part.start.tolist(), part.stop.tolist(), strict=True):
            value = raw[start:stop].tobytes()
            if value != before:
                try:
                    before, text = value, str(value, "utf-8")
                except UnicodeDecodeError:
                    self.odd[row] = True
                    continue
            column[row] = text

    def read_one(self, reader: wire.Reader, message: wire.Field, row: int) -> None:
        """Fills in one object.

        Raises:
            DataError: naming the byte, if it is damaged.
        """
        labelled = False
        for part in reader.message(message):
            if part.number == _MESSAGE:
                labelled = True
                for inner in reader.message(part):
                    if inner.number == _MESSAGE:
                        self._read_one_box(reader, inner, row)
                    elif inner.number in _OF_LABEL:
                        self._fill_one(reader, inner, _OF_LABEL[inner.number], row)
            elif part.number in _OF_OBJECT:
                self._fill_one(reader, part, _OF_OBJECT[part.number], row)
        if not labelled:
            raise DataError(
                f"{reader.where}: the object at byte {message.start} has no label. Check that it is an Objects file, as "
                "`picture3d predict` and the official tools write them."
            )

    def _read_one_box(self, reader: wire.Reader, box: wire.Field, row: int) -> None:
        for value in reader.message(box):
            if value.number in BOX_COLUMN:
                self.box[row, BOX_COLUMN[value.number]] = reader.double(value)

    def _fill_one(self, reader: wire.Reader, part: wire.Field, field: _Field, row: int) -> None:
        match field.wire_type:
            case wire.FIXED32:
                self.score[row] = reader.float(part)
            case wire.LENGTH:
                self.texts[field.column][row] = reader.text(part)
            case _:
                value = reader.signed(part)
                if field.bound is not None and not -field.bound <= value < field.bound:
                    place = f"{reader.where}: field {part.number} at byte {part.start}"
                    raise DataError(f"{place} holds {value}. {WRITE_AGAIN}")
                self.integers[field.column][row] = value


def _mapped(path: Path) -> bytes | mmap.mmap:
    try:
        with path.open("rb") as file:
            if path.stat().st_size == 0:
                return b""
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise unreadable(path, error) from error


def _parts(data: bytes | mmap.mmap, where: str, begin: int, end: int) -> Iterator[tuple[_Spans, WaymoObjects]]:
    """The objects between two bytes, some thousands at a time."""
    reader = wire.Reader(memoryview(data), where)
    size = _BLOCK_BYTES
    while begin < end:
        last = min(begin + size, end)
        block = data[begin:last]
        inside, taken = _split(block)
        if taken == 0:
            field = next(reader.fields(begin, end))  # says what is wrong, if something is
            if field.stop > last:
                size = field.stop - begin
                continue
            reader.data(field)
            inside, taken = _Spans(*np.array([[0], [field.start - begin], [field.stop - begin]])), field.stop - begin
        columns = _Columns(len(inside.begin))
        columns.read(np.frombuffer(block, np.uint8), inside.begin, inside.end)
        spans = _Spans(*(column + begin for column in inside))
        for row in np.flatnonzero(columns.odd).tolist():
            start, stop = int(spans.begin[row]), int(spans.end[row])
            columns.read_one(reader, wire.Field(1, wire.LENGTH, 0, start, stop), row)
        yield spans, columns.objects()
        begin, size = begin + taken, _BLOCK_BYTES


def _split(block: bytes) -> tuple[_Spans, int]:
    """Objects that lie in `block` as a whole, and where its last whole field ends; other fields are passed over."""
    position, size = 0, len(block)
    found = array("q")
    while position < size:
        if block[position] != _OBJECT_KEY:
            if (stop := _passed_over(block, position)) is None:
                break
            position = stop
            continue
        at, length, shift = position + 1, 0, 0
        while at < size and block[at] >= 0x80 and shift < 35:
            length |= (block[at] & 0x7F) << shift
            at, shift = at + 1, shift + 7
        if at >= size or block[at] >= 0x80 or (stop := at + 1 + (length | block[at] << shift)) > size:
            break
        found.extend((position, at + 1, stop))
        position = stop
    return _Spans(*np.frombuffer(found, np.int64).reshape(-1, 3).T) if found else _Spans(*np.zeros((3, 0), np.int64)), position


def _passed_over(block: bytes, position: int) -> int | None:
    """Where the field at a position ends, if it lies in `block` as a whole and is no object."""
    try:
        field = next(wire.Reader(block).fields(position))
    except DataError:
        return None
    return None if field.number == 1 else field.stop


def _joined(parts: list[WaymoObjects]) -> WaymoObjects:
    parts = parts or [_Columns(0).objects()]
    joined: dict[str, Any] = {}
    for field in fields(WaymoObjects):
        columns = [getattr(part, field.name) for part in parts]
        texts = isinstance(columns[0], tuple)
        joined[field.name] = tuple(itertools.chain.from_iterable(columns)) if texts else np.concatenate(columns)
    return WaymoObjects(**joined)
