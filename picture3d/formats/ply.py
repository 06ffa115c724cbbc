"""Polygon files (``.ply``): the vertices of ascii, binary_little_endian and binary_big_endian files; faces are not read."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from picture3d.errors import WRITE_AGAIN, DataError
from picture3d.files import read_bounded
from picture3d.formats.point_tables import MAX_FILE_BYTES, MAX_POINTS, MAX_TEXT_BYTES, PointTable

_MAX_HEADER = 1 << 16
_TYPES = {
    "char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1", "short": "i2", "int16": "i2", "ushort": "u2", "uint16": "u2",
    "int": "i4", "int32": "i4", "uint": "u4", "uint32": "u4", "float": "f4", "float32": "f4", "double": "f8", "float64": "f8",
}  # fmt: skip


def read_ply(path: Path) -> PointTable:
    """Every scalar property of the vertices, by name.

    Raises:
        DataError: if the header does not hold together, the vertices do not come first, or the data are cut off.
    """
    raw = read_bounded(path, max_bytes=MAX_FILE_BYTES)
    form, count, properties, start = _read_header(raw, path)
    record = np.dtype([(name, (">" if form == "binary_big_endian" else "<") + kind) for name, kind in properties])
    body = memoryview(raw)[start:]
    if form == "ascii":
        return _ascii(bytes(body), count, record, path)
    if len(body) < count * record.itemsize:
        raise DataError(
            f"{path}: {len(body)} bytes of data, {count} vertices need {count * record.itemsize}. It is cut off. {WRITE_AGAIN}"
        )
    rows = np.frombuffer(body, record, count)
    return {name: rows[name].astype(record[name].newbyteorder("=")) for name, _ in properties}


def _read_header(raw: bytes, path: Path) -> tuple[str, int, list[tuple[str, str]], int]:
    """Format, number of vertices, their properties (name, type), and the byte where the data start."""
    start, lines = 0, []
    while not lines or lines[-1] != ["end_header"]:
        end = raw.find(b"\n", start, _MAX_HEADER)
        if end < 0 or (not lines and raw[:3] != b"ply"):
            raise DataError(f"{path}: no PLY header in the first {_MAX_HEADER} bytes. Check that it is a PLY file.")
        lines.append(raw[start:end].decode("latin-1").split())
        start = end + 1
    form, element, count = "", "", -1
    properties: list[tuple[str, str]] = []
    try:
        for words in lines[1:-1]:
            match words:
                case ["format", name, _]:
                    form = name
                case ["element", "vertex", number] if not element:
                    element, count = "vertex", int(number)
                case ["element", name, number]:
                    if not element and int(number) > 0:
                        raise DataError(
                            f"{path}: the vertices must be the file's first element, '{name}' comes before them. Write the "
                            "vertices first."
                        )
                    element = name if element or name != "vertex" else element
                case ["property", "list", *_] if element == "vertex":
                    raise DataError(
                        f"{path}: the vertices have a list property, which points cannot have. Leave it out, or move it to "
                        "another element."
                    )
                case ["property", kind, name] if element == "vertex":
                    properties.append((name, _TYPES[kind]))
                case _:
                    continue  # comments, obj_info, properties of other elements
    except (KeyError, ValueError) as error:
        raise DataError(f"{path}: the PLY header lacks or garbles {error}. {WRITE_AGAIN}") from None
    if form not in ("ascii", "binary_little_endian", "binary_big_endian"):
        raise DataError(
            f"{path}: format '{form}' is not ascii, binary_little_endian or binary_big_endian. Store it as one of these."
        )
    if not 0 <= count <= MAX_POINTS:
        raise DataError(
            f"{path}: the PLY header claims {count} vertices (0 to {MAX_POINTS} are read). Correct the header, or store the "
            "points in several sweeps."
        )
    names = [name for name, _ in properties]
    if not names or len(set(names)) != len(names):
        raise DataError(
            f"{path}: the vertices have no properties, or two of one name: {' '.join(names)}. Rename one of them, or write x, "
            "y and z."
        )
    return form, count, properties, start


def _ascii(body: bytes, count: int, record: np.dtype, path: Path) -> PointTable:
    names = record.names or ()
    if count * len(names) * 2 > len(body) + 1:  # a digit and a space is the least a number takes
        raise DataError(
            f"{path}: {len(body)} bytes of text cannot hold {count} vertices of {len(names)} numbers: it is cut off. "
            f"{WRITE_AGAIN}"
        )
    if len(body) > MAX_TEXT_BYTES:
        raise DataError(
            f"{path}: {len(body)} bytes of text are more than the {MAX_TEXT_BYTES} that are read; store it as binary."
        )
    words = body.split(maxsplit=count * len(names))[: count * len(names)]
    try:
        numbers = np.array(words, dtype=np.float64)
    except ValueError as error:
        raise DataError(f"{path}: the vertices hold something else than numbers ({error}). {WRITE_AGAIN}") from None
    if len(numbers) != count * len(names):
        raise DataError(
            f"{path}: {len(numbers)} numbers, {count} vertices need {count * len(names)}. It is cut off. {WRITE_AGAIN}"
        )
    table = numbers.reshape(count, len(names))
    with np.errstate(invalid="ignore", over="ignore"):
        return {name: table[:, i].astype(record[name]) for i, name in enumerate(names)}
