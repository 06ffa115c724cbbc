from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from picture3d.errors import DataError
from picture3d.formats.ply import read_ply

ROWS = np.zeros(7, [("x", "f4"), ("y", "f4"), ("z", "f8"), ("red", "u1"), ("intensity", "f4")])
for _name in ROWS.dtype.names or ():
    ROWS[_name] = np.random.default_rng(0).integers(0, 200, 7) / (1 if _name == "red" else 8)


def ply(form: str, rows: np.ndarray = ROWS) -> bytes:
    head = (
        f"ply\nformat {form} 1.0\ncomment made here\nelement vertex {len(rows)}\nproperty float x\nproperty float32 y\n"
        "property double z\nproperty uchar red\nproperty float intensity\nelement face 1\n"
        "property list uchar int vertex_indices\nend_header\n"
    ).encode()
    if form == "ascii":
        text = "\n".join(" ".join(repr(v) for v in row.tolist()) for row in rows)
        return head + text.encode() + b"\n3 0 1 2\n"
    order = ">" if "big" in form else "<"
    return head + rows.astype(rows.dtype.newbyteorder(order)).tobytes() + b"\x03" + bytes(12)


def read(tmp_path: Path, content: bytes) -> dict[str, np.ndarray]:
    path = tmp_path / "a.ply"
    path.write_bytes(content)
    return read_ply(path)


@pytest.mark.parametrize("form", ["ascii", "binary_little_endian", "binary_big_endian"])
@pytest.mark.parametrize("count", [0, 1, 7])
def test_each_format_gives_the_vertices_that_were_written(tmp_path, form, count):
    table = read(tmp_path, ply(form, ROWS[:count]))
    assert list(table) == list(ROWS.dtype.names or ())
    for name, column in table.items():
        assert column.dtype.isnative
        assert np.array_equal(column, ROWS[:count][name]), name


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"element vertex 7", b"element vertex 99999999999"),
        (b"element vertex 7", b"element vertex -1"),
        (b"element vertex 7", b"element vertex 70000"),
        (b"element vertex 7", b"element edge 7\nelement vertex 7"),
        (b"property float x", b"property list uchar int x"),
        (b"property float x", b"property complex x"),
        (b"property float x", b"property float y"),
        (b"format binary_little_endian", b"format binary_pdp_endian"),
        (b"end_header", b"end_headr_"),
        (b"ply\n", b"plz\n"),
    ],
)
def test_a_header_that_does_not_hold_together_is_refused(tmp_path, old, new):
    content = ply("binary_little_endian")
    assert old in content
    with pytest.raises(DataError, match=r"a\.ply"):
        read(tmp_path, content.replace(old, new))


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(["ascii", "binary_little_endian", "binary_big_endian"]),
    st.integers(0, 10_000),
    st.binary(min_size=1, max_size=4),
)
def test_overwritten_bytes_give_points_or_our_own_error(form, at, patch):
    content = bytearray(ply(form))
    at %= len(content)
    content[at : at + len(patch)] = patch
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.ply")
        path.write_bytes(content)
        with suppress(DataError):
            read_ply(path)
