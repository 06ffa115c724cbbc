"""Codecs of stored columns: array <-> bytes. Sizes are bounded before anything is allocated.

``raw``            the array's bytes, little-endian, row by row
``zlib-planes``    lossless: byte i of every row stored together (one plane per byte of a row), then zlib level 1; a plane that
                   would keep more than half of its size is left as it is (stored blocks of the same zlib stream): reading
                   it would cost more time than it saves room
``zlib-table``     lossless, float32 only, for columns of few different values (sensors measure intensity in steps): how many,
                   their bits, then for every row the place of its value, one or two bytes of it as `zlib-planes`
``zlib-grid:STEP`` lossy, float32 only: every value rounded to a multiple of STEP, stored as the difference to the row
                   above, as `zlib-planes`. The error is at most STEP / 2 (plus float32 rounding)

The choice was measured: see docs/data_format.md and benchmarks/prepared_container.py.
"""

from __future__ import annotations

import math
import struct
import threading
import zlib
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

STORED_DTYPES = ("|u1", "<u2", "<u4", "<i2", "<i4", "<i8", "<f2", "<f4", "<f8")
MAX_COLUMN_BYTES = 1 << 30
# Deflate cannot shrink data by more than about 1032 to 1, so a larger claim is a lie and is refused unread.
_MAX_INFLATION = 1040
_ZLIB_LEVEL = 1
_STORED_ABOVE = 0.5  # share of its size that a plane keeps; see benchmarks/prepared_container.py
_STORED_BLOCK = 0xFFFF  # bytes a stored block of a deflate stream can hold
_INFLATED_PIECE = 1 << 16  # compressed bytes inflated at a time: what comes out stays in the processor's cache
_MAX_SCRATCH_BYTES = 1 << 24
_TABLE_HEAD = struct.Struct("<I")  # how many values
_TABLE_VALUES = 1 << 13  # more do not pay
_TABLE_SAMPLE = 1 << 12  # rows that tell whether looking at all of them is worth it


class CodecKind(StrEnum):
    """How a column is stored."""

    RAW = "raw"
    PLANES = "zlib-planes"
    TABLE = "zlib-table"
    GRID = "zlib-grid"


@dataclass(frozen=True, slots=True)
class Codec:
    """A codec with its parameter."""

    kind: CodecKind
    step: float = 0.0  # `GRID` only: distance between neighbouring stored values, in the column's unit

    def __post_init__(self) -> None:
        if self.kind is CodecKind.GRID and not (math.isfinite(self.step) and self.step >= 1e-9):
            raise ValueError(f"codec {self.kind}: the step must be a positive number, got {self.step}")

    @property
    def lossless(self) -> bool:
        """True if `decode(encode(a))` gives `a` to the last bit."""
        return self.kind is not CodecKind.GRID

    def __str__(self) -> str:
        return f"{self.kind}:{self.step!r}" if self.kind is CodecKind.GRID else str(self.kind)

    @staticmethod
    def parse(text: str) -> Codec:
        """From its name in a file, such as ``zlib-grid:0.001``.

        Raises:
            ValueError: if no such codec exists.
        """
        name, _, parameter = text.partition(":")
        try:
            return Codec(CodecKind(name), float(parameter) if parameter else 0.0)
        except ValueError:
            known = ", ".join(CodecKind)
            raise ValueError(f"unknown codec '{text}'; this version reads {known}") from None


RAW = Codec(CodecKind.RAW)
PLANES = Codec(CodecKind.PLANES)
TABLE = Codec(CodecKind.TABLE)


def lossless_codec(column: NDArray[np.generic]) -> Codec:
    """`TABLE` for a float32 column of few different values, if there are enough rows to repeat them; otherwise `PLANES`."""
    if column.dtype != np.float32 or column.ndim != 1 or len(column) < _TABLE_SAMPLE:
        return PLANES
    bits = np.ascontiguousarray(column).view(np.uint32)
    sample = bits[:: len(bits) // _TABLE_SAMPLE]
    if len(np.unique(sample)) > len(sample) // 2:
        return PLANES
    return TABLE if len(np.unique(bits)) <= min(_TABLE_VALUES, len(bits) // 8) else PLANES


def encode(column: NDArray[np.generic], codec: Codec, *, level: int = _ZLIB_LEVEL) -> bytes:
    """The bytes of `column` (any shape with rows first) under `codec`; zlib works harder at a higher `level`.

    Raises:
        ValueError: for a dtype that is not stored, or values that `zlib-grid` cannot hold (not float32, NaN, too far away).
    """
    column = np.ascontiguousarray(column, column.dtype.newbyteorder("<"))
    if dtype_name(column.dtype) not in STORED_DTYPES:
        raise ValueError(f"a column of {column.dtype} cannot be stored; use one of {', '.join(STORED_DTYPES)}")
    match codec.kind:
        case CodecKind.RAW:
            return column.tobytes()
        case CodecKind.PLANES:
            return _deflate(_to_planes(column), level)
        case CodecKind.GRID:
            return _deflate(_to_planes(_to_grid_steps(column, codec.step)), level)
        case CodecKind.TABLE:
            return _to_table(column, level)


def decode(data: bytes | memoryview, codec: Codec, dtype: str, shape: tuple[int, ...]) -> NDArray[np.generic]:
    """The array of `dtype` and `shape` that :func:`encode` turned into `data`; writable.

    Raises:
        ValueError: if the claimed size is absurd or the bytes do not hold exactly that array.
    """
    size = checked_size(dtype, shape)
    match codec.kind:
        case CodecKind.RAW:
            if len(data) != size:
                raise ValueError(f"holds {len(data)} bytes, {dtype} of shape {shape} needs {size}")
            return np.frombuffer(bytearray(data), dtype).reshape(shape)
        case CodecKind.PLANES:
            return _from_planes(_inflate(data, size), dtype, shape)
        case CodecKind.GRID:
            if dtype != "<f4":
                raise ValueError(f"codec {codec} holds <f4, not {dtype}")
            return _from_grid_steps(_from_planes(_inflate(data, size), "<u4", shape), codec.step)
        case CodecKind.TABLE:
            if dtype != "<f4":
                raise ValueError(f"codec {codec} holds <f4, not {dtype}")
            return _from_table(memoryview(data), shape)


def dtype_name(dtype: np.dtype) -> str:
    """The little-endian name under which a dtype is stored."""
    return dtype.newbyteorder("<").str


def checked_size(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of an array of `dtype` and `shape`.

    Raises:
        ValueError: if the dtype is not a stored one, a side is negative, or the array exceeds `MAX_COLUMN_BYTES`.
    """
    if dtype not in STORED_DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(STORED_DTYPES)}")
    if not 1 <= len(shape) <= 4 or any(side < 0 or side > MAX_COLUMN_BYTES for side in shape):
        raise ValueError(f"shape {shape} is not one of a stored column")
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size > MAX_COLUMN_BYTES:
        raise ValueError(f"shape {shape} of {dtype} is {size} bytes, more than the {MAX_COLUMN_BYTES} a column may have")
    return size


class _Scratch(threading.local):
    """Memory that is used again and again: fresh memory costs a third of the time of reading a frame."""

    inflated = np.empty(0, np.uint8)
    places = np.empty(0, np.intp)


_scratch = _Scratch()


def _inflate(data: bytes | memoryview, size: int) -> NDArray[np.uint8]:
    """(size,) uint8, overwritten by the next call of this thread."""
    if size > _MAX_INFLATION * len(data) + 64:
        raise ValueError(f"claims {size} bytes in {len(data)} compressed ones, which zlib cannot hold")
    out = _scratch.inflated
    if len(out) < size:
        out = np.empty(size, np.uint8)
        if size <= _MAX_SCRATCH_BYTES:
            _scratch.inflated = out
    inflator, done = zlib.decompressobj(), 0
    view = memoryview(data)
    try:
        for begin in range(0, len(view), _INFLATED_PIECE):
            # One byte more than allowed shows an overlong stream.
            piece = inflator.decompress(view[begin : begin + _INFLATED_PIECE], size + 1 - done)
            if done + len(piece) > size or inflator.unconsumed_tail:
                done = size + 1
                break
            out[done : done + len(piece)] = np.frombuffer(piece, np.uint8)
            done += len(piece)
    except zlib.error as error:
        raise ValueError(f"is not a zlib stream ({error})") from None
    if done != size or not inflator.eof or inflator.unused_data:
        raise ValueError(f"inflates to something else than the {size} bytes it should hold")
    return out[:size]


def _deflate(planes: NDArray[np.uint8], level: int) -> bytes:
    """A zlib stream (RFC 1950, 1951) of all planes, one after another: each compressed by itself, or in stored blocks."""
    out = [b"\x78\x01"]
    check = 1
    worth = _STORED_ABOVE if level <= _ZLIB_LEVEL else 1.0  # who asks for a higher level wants few bytes
    for plane in planes:
        data = plane.tobytes()
        check = zlib.adler32(data, check)
        deflator = zlib.compressobj(level, zlib.DEFLATED, -zlib.MAX_WBITS)
        short = deflator.compress(data) + deflator.flush(zlib.Z_FULL_FLUSH)
        if len(short) <= worth * len(data):
            out.append(short)
            continue
        for begin in range(0, len(data), _STORED_BLOCK):
            block = data[begin : begin + _STORED_BLOCK]
            out += [struct.pack("<BHH", 0, len(block), len(block) ^ 0xFFFF), block]
    out.append(struct.pack("<BHH", 1, 0, 0xFFFF) + struct.pack(">I", check))  # a last, empty block
    return b"".join(out)


def _to_planes(column: NDArray[np.generic]) -> NDArray[np.uint8]:
    """(bytes of a row, rows)."""
    if column.size == 0:
        return np.zeros((0, 0), np.uint8)
    return column.reshape(-1).view(np.uint8).reshape(len(column), -1).T


def _from_planes(data: NDArray[np.uint8], dtype: str, shape: tuple[int, ...]) -> NDArray[np.generic]:
    if len(data) == 0:
        return np.zeros(shape, dtype)
    planes = data.reshape(-1, shape[0])
    rows = np.empty(planes.shape[::-1], np.uint8)
    for place, plane in enumerate(planes):  # a third of the time that one assignment takes
        rows[:, place] = plane
    return rows.view(dtype).reshape(shape)


def _to_grid_steps(column: NDArray[np.generic], step: float) -> NDArray[np.uint32]:
    """Differences between rows on the grid, zigzag-coded so that small ones of both signs have empty high bytes."""
    if column.dtype != np.float32:
        raise ValueError(f"codec zlib-grid stores float32, not {column.dtype}")
    index = np.rint(column.astype(np.float64) / step)
    if not np.all(np.abs(index) < 2**30):  # also False for NaN
        raise ValueError(f"codec zlib-grid:{step!r} cannot hold NaN, infinity or values beyond {step * 2**30:g}")
    delta = np.diff(index.astype(np.int32), axis=0, prepend=np.zeros((1, *column.shape[1:]), np.int32))
    return ((delta << 1) ^ (delta >> 31)).view(np.uint32)


def _from_grid_steps(zigzag: NDArray[np.generic], step: float) -> NDArray[np.float32]:
    code = zigzag.view(np.uint32)  # this function's own: changed in place, which is half of the time
    odd = code & 1
    np.right_shift(code, 1, out=code)
    np.negative(odd.view(np.int32), out=odd.view(np.int32))
    np.bitwise_xor(code, odd, out=code)
    index = np.cumsum(code.view(np.int32), axis=0, dtype=np.int32, out=code.view(np.int32))
    return np.multiply(index, step, out=odd.view(np.float32), casting="unsafe", dtype=np.float64)


def _to_table(column: NDArray[np.generic], level: int) -> bytes:
    if column.dtype != np.float32:
        raise ValueError(f"codec zlib-table stores float32, not {column.dtype}; take zlib-planes")
    values, place = np.unique(column.reshape(-1).view(np.uint32), return_inverse=True)
    if len(values) > 1 << 16:
        raise ValueError(f"codec zlib-table holds at most {1 << 16} different values, not {len(values)}; take zlib-planes")
    planes = _to_planes(place.astype("|u1" if len(values) <= 256 else "<u2"))
    return _TABLE_HEAD.pack(len(values)) + values.astype("<u4").tobytes() + _deflate(planes, level)


def _from_table(data: memoryview, shape: tuple[int, ...]) -> NDArray[np.float32]:
    rows = math.prod(shape)
    if len(data) < _TABLE_HEAD.size:
        raise ValueError(f"holds {len(data)} bytes, too few for a table of values")
    (count,) = _TABLE_HEAD.unpack(data[: _TABLE_HEAD.size])
    begin = _TABLE_HEAD.size + 4 * count
    if count > 1 << 16 or begin > len(data) or (rows > 0) > (count > 0):
        raise ValueError(f"claims a table of {count} values in {len(data)} bytes")
    values = np.frombuffer(data[_TABLE_HEAD.size : begin], "<f4")
    if rows == 0:
        _inflate(data[begin:], 0)
        return np.zeros(shape, np.float32)
    planes = _inflate(data[begin:], rows if count <= 256 else 2 * rows).reshape(-1, rows)
    if len(_scratch.places) < rows <= _MAX_SCRATCH_BYTES:
        _scratch.places = np.empty(rows, np.intp)
    places = _scratch.places[:rows] if rows <= len(_scratch.places) else np.empty(rows, np.intp)
    if count <= 256:
        places[:] = planes[0]
    else:
        np.left_shift(planes[1], 8, out=places, dtype=np.intp)
        np.bitwise_or(places, planes[0], out=places)
    if rows and int(places.max()) >= count:
        raise ValueError(f"names value {int(places.max())} of a table of {count}")
    return values.take(places).reshape(shape)
