"""The protobuf wire format: tagged fields of a message, read and written by field number, without generated code.

A message is a row of fields; each is a varint key ``number << 3 | wire type`` and a value (protobuf.dev, "Encoding"). Wire
types: 0 varint, 1 eight bytes, 2 length and bytes, 5 four bytes. Nothing is copied while reading: values of type 2 are slices
of the buffer, and every offset in a message or an error counts from the start of the buffer first given.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from picture3d.errors import FETCH_AGAIN, DataError

VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5
_MAX_VARINT_BYTES = 10


class Field(NamedTuple):
    """One field of a message. `value` is the varint; for the other wire types the bytes are ``buffer[start:stop]``."""

    number: int
    wire_type: int
    value: int  # the varint as an unsigned 64 bit number; 0 for the other wire types
    start: int
    stop: int


class Reader:
    """Reads one message, and the messages inside it, from a buffer.

    Args:
        buffer: the bytes; kept, not copied.
        where: what the errors call the buffer, for example the file name.
    """

    def __init__(self, buffer: bytes | bytearray | memoryview, where: str = "message") -> None:
        self.buffer = memoryview(buffer).cast("B")
        self.where = where

    def fields(self, start: int = 0, stop: int | None = None) -> Iterator[Field]:
        """The fields of the message in ``buffer[start:stop]``, in the order of the file, unknown ones too.

        Raises:
            DataError: naming the byte, if the message is cut off or is not a protobuf message.
        """
        buffer = self.buffer
        stop = len(buffer) if stop is None else stop
        position = start
        while position < stop:
            key_at = position
            key = buffer[position]
            position += 1
            if key >= 0x80:
                key, position = self._varint(key_at, stop)
            number, wire_type = key >> 3, key & 7
            if number == 0:
                raise DataError(
                    f"{self.where}: field number 0 at byte {key_at}: this is not the message it should be. {FETCH_AGAIN}"
                )
            value = 0
            begin = position
            if wire_type == VARINT:
                value, position = self._varint(position, stop)
            elif wire_type == LENGTH:
                length, begin = self._varint(position, stop)
                position = begin + length
            elif wire_type == FIXED64:
                position += 8
            elif wire_type == FIXED32:
                position += 4
            else:
                raise DataError(
                    f"{self.where}: wire type {wire_type} at byte {key_at}: this is not the message it should be. {FETCH_AGAIN}"
                )
            if position > stop:
                raise DataError(
                    f"{self.where}: cut off: field {number} at byte {key_at} ends at byte {position}, "
                    f"its message at byte {stop}; fetch the file again"
                )
            yield Field(number, wire_type, value, begin, position)

    def double(self, field: Field) -> float:
        """A ``double``; raises DataError if the field is of another wire type."""
        self._expect(field, FIXED64)
        return struct.unpack_from("<d", self.buffer, field.start)[0]

    def float(self, field: Field) -> float:
        """A ``float``; raises DataError if the field is of another wire type."""
        self._expect(field, FIXED32)
        return struct.unpack_from("<f", self.buffer, field.start)[0]

    def unsigned(self, field: Field) -> int:
        """A ``uint64``, ``bool`` or ``enum``; raises DataError if the field is of another wire type."""
        self._expect(field, VARINT)
        return field.value

    def signed(self, field: Field) -> int:
        """An ``int32`` or ``int64`` (two's complement, not zigzag); raises DataError if the field is of another wire type."""
        self._expect(field, VARINT)
        return field.value - (1 << 64) if field.value >> 63 else field.value

    def data(self, field: Field) -> memoryview:
        """``bytes``, a packed field or a message, as a slice of the buffer; raises DataError on another wire type."""
        self._expect(field, LENGTH)
        return self.buffer[field.start : field.stop]

    def text(self, field: Field) -> str:
        """A ``string``; raises DataError if the field is of another wire type or not UTF-8."""
        try:
            return str(self.data(field), "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self.where}: field {field.number} at byte {field.start} is not UTF-8 text. {FETCH_AGAIN}"
            ) from error

    def message(self, field: Field) -> Iterator[Field]:
        """The fields of the message inside `field`; raises DataError on another wire type or a damaged message."""
        self._expect(field, LENGTH)
        return self.fields(field.start, field.stop)

    def doubles(self, field: Field) -> NDArray[np.float64]:
        """The values of one piece of a repeated ``double``: many if packed, one if not; join the pieces of a message."""
        return self._numbers(field, FIXED64, "<f8")

    def floats(self, field: Field) -> NDArray[np.float32]:
        """The values of one piece of a repeated ``float``: many if packed, one if not; join the pieces of a message."""
        return self._numbers(field, FIXED32, "<f4")

    def integers(self, field: Field) -> NDArray[np.int64]:
        """The values of one piece of a repeated ``int32``, ``int64`` or ``enum``, packed or not.

        Raises:
            DataError: if the field is of another wire type or its last varint is cut off.
        """
        if field.wire_type == VARINT:
            return np.array([self.signed(field)], dtype=np.int64)
        return unpack_varints(self.data(field), self.where, field.start).view(np.int64)

    def _numbers(self, field: Field, single: int, dtype: str) -> NDArray:
        if field.wire_type != single:
            self._expect(field, LENGTH)
        raw = self.buffer[field.start : field.stop]
        if len(raw) % np.dtype(dtype).itemsize:
            raise DataError(
                f"{self.where}: packed field {field.number} at byte {field.start} has {len(raw)} bytes, not whole numbers. "
                f"{FETCH_AGAIN}"
            )
        return np.frombuffer(raw, dtype=dtype)

    def _expect(self, field: Field, wire_type: int) -> None:
        if field.wire_type != wire_type:
            raise DataError(
                f"{self.where}: field {field.number} at byte {field.start} has wire type {field.wire_type}, not {wire_type}: "
                f"this is not the message it should be. {FETCH_AGAIN}"
            )

    def _varint(self, position: int, stop: int) -> tuple[int, int]:
        begin, value, shift = position, 0, 0
        while position < stop:
            byte = self.buffer[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value & 0xFFFF_FFFF_FFFF_FFFF, position
            shift += 7
            if position - begin == _MAX_VARINT_BYTES:
                raise DataError(f"{self.where}: a number at byte {begin} is longer than 10 bytes. {FETCH_AGAIN}")
        raise DataError(f"{self.where}: cut off inside the number at byte {begin}; fetch the file again")


def unpack_varints(data: bytes | memoryview, where: str = "message", offset: int = 0) -> NDArray[np.uint64]:
    """All varints of `data`, vectorised; `where` and `offset` (of its first byte) are for errors.

    Raises:
        DataError: if the last number is cut off, or one is longer than ten bytes.
    """
    raw = np.frombuffer(data, dtype=np.uint8)
    if raw.size == 0:
        return np.zeros(0, dtype=np.uint64)
    ends = np.flatnonzero(raw < 0x80)
    starts = np.concatenate(([0], ends[:-1] + 1)) if ends.size else np.zeros(1, dtype=np.int64)
    if ends.size == 0 or ends[-1] != raw.size - 1:
        begin = offset + (int(ends[-1]) + 1 if ends.size else 0)
        raise DataError(f"{where}: cut off inside the number at byte {begin}; fetch the file again")
    lengths = ends - starts + 1
    if lengths.max() > _MAX_VARINT_BYTES:
        begin = offset + int(starts[lengths > _MAX_VARINT_BYTES][0])
        raise DataError(f"{where}: a number at byte {begin} is longer than 10 bytes. {FETCH_AGAIN}")
    place = np.arange(raw.size) - np.repeat(starts, lengths)
    return np.add.reduceat((raw & 0x7F).astype(np.uint64) << (7 * place).astype(np.uint64), starts)


def pack_varints(values: NDArray[np.integer]) -> bytes:
    """The varints of many integers of an array of any shape, row by row, vectorised; negative ones as :func:`write_varint`."""
    numbers = np.ascontiguousarray(values).astype(np.int64).view(np.uint64).ravel()
    if numbers.size and numbers.max() < 0x80:
        return numbers.astype(np.uint8).tobytes()
    # One row of ten 7-bit digits per number; what lies beyond its highest digit is left out.
    widest = (int(numbers.max()).bit_length() + 6) // 7 if numbers.size else 1
    digits = (numbers[:, None] >> (7 * np.arange(widest, dtype=np.uint64))) & np.uint64(0x7F)
    lengths = np.maximum(widest - (digits[:, ::-1] != 0).argmax(1), 1)
    lengths[numbers == 0] = 1
    place = np.arange(widest)
    digits |= np.where(place < lengths[:, None] - 1, np.uint64(0x80), np.uint64(0))
    return digits[place < lengths[:, None]].astype(np.uint8).tobytes()


def write_varint(value: int) -> bytes:
    """A varint; negative numbers as two's complement of 64 bits."""
    value &= 0xFFFF_FFFF_FFFF_FFFF
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def write_integer(number: int, value: int) -> bytes:
    """A field of type ``int32``, ``int64``, ``uint64``, ``bool`` or ``enum``."""
    return write_varint(number << 3 | VARINT) + write_varint(value)


def write_double(number: int, value: float) -> bytes:
    """A field of type ``double``."""
    return write_varint(number << 3 | FIXED64) + struct.pack("<d", value)


def write_float(number: int, value: float) -> bytes:
    """A field of type ``float``."""
    return write_varint(number << 3 | FIXED32) + struct.pack("<f", value)


def write_data(number: int, value: bytes) -> bytes:
    """A field of type ``bytes``, ``string`` (UTF-8) or message, or a packed field."""
    return write_varint(number << 3 | LENGTH) + write_varint(len(value)) + value


def write_packed_integers(number: int, values: Iterable[int]) -> bytes:
    """A packed repeated field of integers."""
    return write_data(number, b"".join(write_varint(value) for value in values))
