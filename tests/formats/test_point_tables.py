from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from picture3d.errors import DataError
from picture3d.formats.point_tables import parse_layout, read_bin, read_npy, read_npy_array

ROWS = np.arange(15, dtype=np.float32).reshape(3, 5)


def test_a_layout_names_the_columns_and_leaves_some_out(tmp_path):
    ROWS.tofile(tmp_path / "a.bin")
    table = read_bin(tmp_path / "a.bin", parse_layout("x, y,z,-,ring"))
    assert list(table) == ["x", "y", "z", "ring"]
    assert np.array_equal(table["ring"], ROWS[:, 4])


@pytest.mark.parametrize("layout", ["", "x,y", "x,y,z,x", "x,y,z,,", "a,b,c"])
def test_a_layout_without_xyz_is_refused(layout):
    with pytest.raises(DataError, match="layout"):
        parse_layout(layout)


def test_a_file_that_does_not_fit_the_layout_is_refused(tmp_path):
    ROWS.tofile(tmp_path / "a.bin")
    with pytest.raises(DataError, match=r"a\.bin: 60 bytes"):
        read_bin(tmp_path / "a.bin", parse_layout("x,y,z,intensity"))


@pytest.mark.parametrize("rows", [ROWS, ROWS[:0], ROWS.astype(np.float64), np.asfortranarray(ROWS), ROWS.astype(">f4")])
def test_numpy_files_of_any_number_type_are_read(tmp_path, rows):
    np.save(tmp_path / "a.npy", rows)
    table = read_npy(tmp_path / "a.npy", parse_layout("x,y,z,intensity,ring"))
    assert np.array_equal(table["intensity"], rows[:, 3])


def test_a_structured_numpy_file_names_its_own_columns(tmp_path):
    rows = np.zeros(4, [("x", "f4"), ("y", "f4"), ("z", "f4"), ("i", "u1")])
    rows["i"] = 7
    np.save(tmp_path / "a.npy", rows)
    assert np.array_equal(read_npy(tmp_path / "a.npy", ("x", "y", "z"))["i"], np.full(4, 7))


def test_a_numpy_file_that_needs_pickle_is_never_opened(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="not a plain numpy array"):
        read_npy_array(tmp_path / "a.npy")


def test_a_numpy_header_that_claims_too_much_is_refused_unread(tmp_path):
    np.save(tmp_path / "a.npy", ROWS)
    content = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(content.replace(b"(3, 5), }" + b" " * 12, b"(3000000000000, 5), }"))
    with pytest.raises(DataError, match=r"a\.npy"):
        read_npy_array(tmp_path / "a.npy")


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10_000), st.binary(min_size=1, max_size=6))
def test_overwritten_bytes_give_an_array_or_our_own_error(at, patch):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.npy")
        np.save(path, ROWS)
        content = bytearray(path.read_bytes())
        at %= len(content)
        content[at : at + len(patch)] = patch
        path.write_bytes(content)
        with suppress(DataError):
            read_npy(path, parse_layout("x,y,z,intensity,ring"))
