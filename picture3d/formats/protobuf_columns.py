"""Many small protobuf messages at once: the fields of all of them as columns, without a loop over messages.

What `protobuf_wire.Reader` says about one message, this says about thousands that are alike: first the first field of each,
then the second of each, and so on. A message that is damaged is only marked; the reader of single messages says what is wrong
with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from picture3d.formats.protobuf_wire import FIXED32, FIXED64, LENGTH, VARINT

_MAX_VARINT_BYTES = 10

Int64Array = NDArray[np.int64]


class FieldColumns(NamedTuple):
    """One field of each of R messages; the columns mean what `protobuf_wire.Field` says."""

    row: Int64Array  # (R,) which message, ascending
    number: Int64Array  # (R,)
    wire_type: Int64Array  # (R,)
    value: Int64Array  # (R,) the varint, as a signed number
    start: Int64Array  # (R,)
    stop: Int64Array  # (R,)

    def select(self, chosen: NDArray[np.bool_]) -> FieldColumns:
        """The chosen rows."""
        return FieldColumns(*(column[chosen] for column in self))


def field_columns(
    raw: NDArray[np.uint8], begin: Int64Array, end: Int64Array, damaged: NDArray[np.bool_]
) -> Iterator[FieldColumns]:
    """The n-th fields of the messages ``raw[begin:end]``, n = 1, 2, ... until no message has one.

    Args:
        raw: (B,) the bytes.
        begin: (M,) first byte of each message.
        end: (M,) one past its last byte; within `raw`.
        damaged: (M,) set to True here where a message is cut off or is none; its further fields are not given.
    """
    row = np.flatnonzero((begin < end) & ~damaged)
    position, end = begin[row], end[row]
    while len(row):
        key, at, bad = _varints(raw, position, end)
        number, wire_type = key >> 3, key & 7
        bad |= number <= 0
        value, after, cut = _varints(raw, at, end)  # of the fields that have one: a number, or a length
        varies = (wire_type == VARINT) | (wire_type == LENGTH)
        bad |= varies & cut
        start = np.where(wire_type == LENGTH, after, at)
        bad |= (wire_type == LENGTH) & ((value < 0) | (value > end - start))
        length = np.zeros_like(at)
        for kind, size in ((FIXED64, 8), (FIXED32, 4), (LENGTH, value), (VARINT, after - at)):
            length = np.where(wire_type == kind, size, length)
        stop = start + np.where(bad, 0, length)
        bad |= (stop > end) | ((wire_type != FIXED32) & (wire_type != FIXED64) & ~varies)
        damaged[row[bad]] = True
        good = ~bad
        value = np.where(wire_type == VARINT, value, 0)
        fields = FieldColumns(row, number, wire_type, value, start, stop).select(good)
        yield fields
        more = (fields.stop < end[good]) & ~damaged[fields.row]
        row, position, end = fields.row[more], fields.stop[more], end[good][more]


def doubles(raw: NDArray[np.uint8], start: Int64Array) -> NDArray[np.float64]:
    """(R,) eight bytes from each of R places, as doubles."""
    return raw[start[:, None] + np.arange(8)].view("<f8")[:, 0]


def floats(raw: NDArray[np.uint8], start: Int64Array) -> NDArray[np.float32]:
    """(R,) four bytes from each of R places, as floats."""
    return raw[start[:, None] + np.arange(4)].view("<f4")[:, 0]


def _varints(raw: NDArray[np.uint8], position: Int64Array, end: Int64Array) -> tuple[Int64Array, Int64Array, NDArray[np.bool_]]:
    """Number at each position, the position after it, and whether it is cut off or too long."""
    last = len(raw) - 1
    byte = raw[np.minimum(position, last)].astype(np.int64)
    bad = position >= end
    value, after = byte & 0x7F, position + 1
    rows = np.flatnonzero((byte >= 0x80) & ~bad)
    for place in range(1, _MAX_VARINT_BYTES + 1):
        if not len(rows):
            break
        at = after[rows]
        gone = (at >= end[rows]) | (place == _MAX_VARINT_BYTES)
        bad[rows[gone]] = True
        rows, at = rows[~gone], at[~gone]
        byte = raw[at].astype(np.int64)
        value[rows] |= (byte & 0x7F) << (7 * place)
        after[rows] += 1
        rows = rows[byte >= 0x80]
    return value, after, bad
