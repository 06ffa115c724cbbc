from __future__ import annotations

import struct
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from picture3d.errors import DataError
from picture3d.formats.pcd import lzf_decompress, read_pcd

RNG = np.random.default_rng(0)
RECORD = np.dtype([("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("intensity", "<f4"), ("_", "V2"), ("ring", "<u2"), ("t", "<f8")])


def points(count: int = 50) -> np.ndarray:
    rows = np.zeros(count, RECORD)
    for name in ("x", "y", "z", "intensity", "t"):
        rows[name] = RNG.normal(size=count).astype(np.float32) * 20
    rows["ring"] = RNG.integers(0, 64, count)
    return rows


def header(count: int, data: str) -> bytes:
    return (
        "# .PCD v0.7 - Point Cloud Data file format\nVERSION 0.7\nFIELDS x y z intensity _ ring t\nSIZE 4 4 4 4 1 2 8\n"
        f"TYPE F F F F U U F\nCOUNT 1 1 1 1 2 1 1\nWIDTH {count}\nHEIGHT 1\n"
        f"VIEWPOINT 0 0 0 1 0 0 0\nPOINTS {count}\nDATA {data}\n"
    ).encode()


def ascii_file(rows: np.ndarray) -> bytes:
    lines = [
        " ".join([*(repr(float(r[n])) for n in "xyz"), repr(float(r["intensity"])), "0 0", str(r["ring"]), repr(float(r["t"]))])
        for r in rows
    ]
    return header(len(rows), "ascii") + "\n".join(lines).encode() + b"\n"


def binary_file(rows: np.ndarray) -> bytes:
    return header(len(rows), "binary") + rows.tobytes()


def lzf_compress(data: bytes) -> bytes:
    """Greedy and slow, straight from the format's description: literal runs and references to the last 8192 bytes."""
    out, literals, seen, i = bytearray(), bytearray(), {}, 0

    def flush() -> None:
        for start in range(0, len(literals), 32):
            run = literals[start : start + 32]
            out.append(len(run) - 1)
            out.extend(run)
        literals.clear()

    while i < len(data):
        key = data[i : i + 3]
        at = seen.get(key)
        seen[key] = i
        if at is not None and len(key) == 3 and i - at <= 8192:
            length = 3
            while length < 264 and i + length < len(data) and data[at + length] == data[i + length]:
                length += 1
            flush()
            distance, code = i - at - 1, length - 2
            out.extend([code << 5 | distance >> 8] if code < 7 else [7 << 5 | distance >> 8, code - 7])
            out.append(distance & 255)
            i += length
        else:
            literals.append(data[i])
            i += 1
    flush()
    return bytes(out)


def compressed_file(rows: np.ndarray) -> bytes:
    plain = b"".join(np.ascontiguousarray(rows[name]).tobytes() for name in RECORD.names or ())
    packed = lzf_compress(plain)
    return header(len(rows), "binary_compressed") + struct.pack("<II", len(packed), len(plain)) + packed


def read(tmp_path: Path, content: bytes) -> dict[str, np.ndarray]:
    path = tmp_path / "a.pcd"
    path.write_bytes(content)
    return read_pcd(path)


@pytest.mark.parametrize("write", [ascii_file, binary_file, compressed_file])
@pytest.mark.parametrize("count", [0, 1, 50])
def test_each_kind_of_data_gives_the_points_that_were_written(tmp_path, write, count):
    rows = points(count)
    table = read(tmp_path, write(rows))
    assert list(table) == ["x", "y", "z", "intensity", "ring", "t"]
    for name, column in table.items():
        assert column.dtype == RECORD[name]
        assert np.array_equal(column, rows[name]), name


@pytest.mark.parametrize("data", [b"a" * 1000, b"ab" * 500 + b"abc" * 300, bytes(range(256)) * 40, b"", b"x", RNG.bytes(3000)])
def test_lzf_gives_back_what_was_compressed(data):
    assert lzf_decompress(lzf_compress(data), len(data), "here") == data


def test_lzf_reads_a_stream_written_by_hand():
    # two literals "ab", then a reference of length 6 at distance 2, which overlaps itself, then one literal "c"
    assert lzf_decompress(bytes([1, 97, 98, 4 << 5, 1, 0, 99]), 9, "here") == b"ababababc"


@pytest.mark.parametrize("write", [ascii_file, binary_file, compressed_file])
def test_a_file_cut_off_anywhere_is_refused_or_complete(tmp_path, write):
    content = write(points(3))
    last_number = len(content.split()[-1]) + 1 if write is ascii_file else 1  # text does not tell 1.25 from 1.2 cut off
    for end in range(len(content) - last_number):
        with pytest.raises(DataError, match=r"a\.pcd"):
            read(tmp_path, content[:end])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"POINTS 5", b"POINTS 99999999999"),
        (b"POINTS 5", b"POINTS -5"),
        (b"WIDTH 5", b"WIDTH 7"),
        (b"SIZE 4 4 4 4 1 2 8", b"SIZE 4 4 4 4 1 2 3"),
        (b"COUNT 1 1 1 1 2 1 1", b"COUNT 1 1 1 1 2 1 999999999"),
        (b"FIELDS x y z intensity _ ring t", b"FIELDS x x z intensity _ ring t"),
        (b"FIELDS x y z intensity _ ring t", b"FIELDS x y z"),
        (b"DATA binary", b"DATA zip"),
    ],
)
def test_a_header_that_does_not_hold_together_is_refused(tmp_path, old, new):
    with pytest.raises(DataError, match=r"a\.pcd"):
        read(tmp_path, binary_file(points(5)).replace(old, new))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([ascii_file, binary_file, compressed_file]), st.integers(0, 10_000), st.binary(min_size=1, max_size=4))
def test_overwritten_bytes_give_points_or_our_own_error(write, at, patch):
    content = bytearray(write(points(4)))
    at %= len(content)
    content[at : at + len(patch)] = patch
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.pcd")
        path.write_bytes(content)
        with suppress(DataError):
            read_pcd(path)
