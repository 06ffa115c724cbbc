"""Point Cloud Library files (``.pcd``, version 0.7 and before): ascii, binary and binary_compressed."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from picture3d.errors import WRITE_AGAIN, DataError
from picture3d.files import read_bounded
from picture3d.formats.point_tables import MAX_FILE_BYTES, MAX_POINTS, MAX_TEXT_BYTES, PointTable

_MAX_HEADER = 1 << 16
_MAX_FIELDS = 256
_DTYPES = {
    ("F", 4): "<f4",
    ("F", 8): "<f8",
    **{("I", n): f"<i{n}" for n in (1, 2, 4, 8)},
    **{("U", n): f"<u{n}" for n in (1, 2, 4, 8)},
}


@dataclass(frozen=True, slots=True)
class _Header:
    fields: tuple[str, ...]
    dtypes: tuple[str, ...]
    counts: tuple[int, ...]
    points: int
    data: str
    start: int  # byte after the DATA line

    @property
    def record(self) -> np.dtype:
        """One point as stored; fields get unique names by position."""
        return np.dtype(
            [(f"{i}", dtype, (count,)) for i, (dtype, count) in enumerate(zip(self.dtypes, self.counts, strict=True))]
        )


def read_pcd(path: Path) -> PointTable:
    """Every field with one value per point, by name; padding (``_``) and fields with several values are left out.

    Raises:
        DataError: if the header does not hold together, or the data are cut off or damaged.
    """
    raw = read_bounded(path, max_bytes=MAX_FILE_BYTES)
    header = _read_header(raw, path)
    body = memoryview(raw)[header.start :]
    match header.data:
        case "ascii":
            columns = _ascii(bytes(body), header, path)
        case "binary":
            columns = _binary(body, header, path)
        case "binary_compressed":
            columns = _compressed(body, header, path)
        case other:
            raise DataError(f"{path}: DATA {other} is not ascii, binary or binary_compressed. Store it as one of these.")
    kept = [i for i, name in enumerate(header.fields) if name != "_" and header.counts[i] == 1]
    return {header.fields[i]: columns[i] for i in kept}


def _read_header(raw: bytes, path: Path) -> _Header:
    entries: dict[str, list[str]] = {}
    start = 0
    while "DATA" not in entries:
        end = raw.find(b"\n", start, _MAX_HEADER)
        if end < 0:
            raise DataError(
                f"{path}: no PCD header with a DATA line in the first {_MAX_HEADER} bytes. Check that it is a PCD file."
            )
        words = raw[start:end].decode("latin-1").split()
        start = end + 1
        if words and not words[0].startswith("#"):
            entries[words[0].upper()] = words[1:]
    try:
        fields = tuple(entries["FIELDS"])
        sizes = [int(size) for size in entries["SIZE"]]
        kinds = [kind.upper() for kind in entries["TYPE"]]
        counts = tuple(int(count) for count in entries.get("COUNT", ["1"] * len(fields)))
        width, height = int(entries["WIDTH"][0]), int(entries.get("HEIGHT", ["1"])[0])
        points = int(entries["POINTS"][0]) if "POINTS" in entries else width * height
        data = entries["DATA"][0].lower()
        dtypes = tuple(_DTYPES[kind, size] for kind, size in zip(kinds, sizes, strict=True))
    except (KeyError, ValueError, IndexError) as error:
        raise DataError(f"{path}: the PCD header lacks or garbles {error}. {WRITE_AGAIN}") from None
    if not 0 < len(fields) <= _MAX_FIELDS or not len(fields) == len(dtypes) == len(counts):
        raise DataError(
            f"{path}: the PCD header names {len(fields)} fields, {len(dtypes)} types and {len(counts)} counts. {WRITE_AGAIN}"
        )
    if len(set(fields) - {"_"}) != sum(field != "_" for field in fields):
        raise DataError(f"{path}: the PCD header names a field twice: {' '.join(fields)}. Rename one of them.")
    if any(not 1 <= count <= 4096 for count in counts):
        raise DataError(f"{path}: COUNT {counts} in the PCD header is not possible. {WRITE_AGAIN}")
    if not 0 <= points <= MAX_POINTS or points != width * height:
        raise DataError(
            f"{path}: the PCD header claims {points} points, {width} x {height} (at most {MAX_POINTS} are read). Correct the "
            "header, or store the points in several sweeps."
        )
    return _Header(fields, dtypes, counts, points, data, start)


def _ascii(body: bytes, header: _Header, path: Path) -> list[NDArray[np.generic]]:
    width = sum(header.counts)
    if header.points * width * 2 > len(body) + 1:  # a digit and a space is the least a number takes
        raise DataError(
            f"{path}: {len(body)} bytes of text cannot hold {header.points} points of {width} numbers: it is cut off. "
            f"{WRITE_AGAIN}"
        )
    if len(body) > MAX_TEXT_BYTES:
        raise DataError(
            f"{path}: {len(body)} bytes of text are more than the {MAX_TEXT_BYTES} that are read; store it as binary."
        )
    try:
        numbers = np.array(body.split(), dtype=np.float64)
    except ValueError as error:
        raise DataError(f"{path}: the ascii data hold something else than numbers ({error}). {WRITE_AGAIN}") from None
    if len(numbers) != header.points * width:
        raise DataError(
            f"{path}: {len(numbers)} numbers, {header.points} points need {header.points * width}. It is cut off. {WRITE_AGAIN}"
        )
    table = numbers.reshape(header.points, width)
    starts = np.cumsum([0, *header.counts[:-1]])
    with np.errstate(invalid="ignore", over="ignore"):
        return [table[:, start].astype(dtype) for start, dtype in zip(starts, header.dtypes, strict=True)]


def _binary(body: memoryview, header: _Header, path: Path) -> list[NDArray[np.generic]]:
    record = header.record
    if len(body) < header.points * record.itemsize:
        raise DataError(
            f"{path}: {len(body)} bytes of data, {header.points} points need {header.points * record.itemsize}. It is cut off. "
            f"{WRITE_AGAIN}"
        )
    rows = np.frombuffer(body, record, header.points)
    return [np.ascontiguousarray(rows[f"{i}"][:, 0]) for i in range(len(header.fields))]


def _compressed(body: memoryview, header: _Header, path: Path) -> list[NDArray[np.generic]]:
    """Fields one after the other (all x, then all y, ...), then LZF."""
    expected = header.points * header.record.itemsize
    if len(body) < 8:
        raise DataError(f"{path}: the compressed data are cut off before their sizes. {WRITE_AGAIN}")
    packed, unpacked = struct.unpack_from("<II", body)
    if unpacked != expected or packed > len(body) - 8:
        raise DataError(
            f"{path}: claims {packed} compressed and {unpacked} plain bytes; the file has {len(body) - 8} and {header.points} "
            f"points need {expected}. It is cut off or damaged. {WRITE_AGAIN}"
        )
    data = lzf_decompress(bytes(body[8 : 8 + packed]), expected, str(path))
    columns, start = [], 0
    for dtype, count in zip(header.dtypes, header.counts, strict=True):
        size = np.dtype(dtype).itemsize * count * header.points
        columns.append(np.frombuffer(data, dtype, count * header.points, start).reshape(header.points, count)[:, 0].copy())
        start += size
    return columns


def lzf_decompress(data: bytes, size: int, place: str) -> bytes:
    """Undoes LZF compression.

    A control byte below 32 copies that many bytes plus one as they are; any other repeats 3 to 264 bytes found up to
    8192 bytes earlier in the output, which may overlap what is being written.

    Raises:
        DataError: (naming `place`) if the stream is cut off, points before its beginning, or gives other than `size` bytes.
    """
    out = bytearray(size)
    read = write = 0
    end = len(data)
    try:
        while read < end:
            control = data[read]
            read += 1
            if control < 32:
                length = control + 1
                if read + length > end or write + length > size:
                    raise IndexError
                out[write : write + length] = data[read : read + length]
                read += length
            else:
                length = control >> 5
                if length == 7:
                    length += data[read]
                    read += 1
                length += 2
                distance = ((control & 31) << 8 | data[read]) + 1
                read += 1
                source = write - distance
                if source < 0 or write + length > size:
                    raise IndexError
                if distance >= length:
                    out[write : write + length] = out[source : source + length]
                else:  # the copy runs into itself: its pattern repeats
                    pattern = bytes(out[source:write])
                    out[write : write + length] = (pattern * (length // distance + 1))[:length]
            write += length
    except IndexError:
        raise DataError(f"{place}: the compressed data are damaged at byte {read} of {end}. {WRITE_AGAIN}") from None
    if write != size:
        raise DataError(f"{place}: the compressed data give {write} bytes instead of {size}; they are cut off. {WRITE_AGAIN}")
    return bytes(out)
