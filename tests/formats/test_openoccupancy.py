"""nuScenes-Occupancy rows, read by hand-computed examples and damaged ones."""

from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from picture3d.errors import DataError
from picture3d.formats.openoccupancy import IGNORED, OccupiedVoxels, read_openoccupancy, write_openoccupancy


def _saved(folder: Path, rows: object, dtype: str = "int64") -> Path:
    path = folder / "labels.npy"
    np.save(path, np.array(rows, dtype=dtype))
    return path


@pytest.mark.parametrize("dtype", ["int64", "int32", "float32", "uint16"])
def test_columns_are_z_y_x_class_and_rows_come_sorted_by_x_y_z(tmp_path: Path, dtype: str) -> None:
    found = read_openoccupancy(_saved(tmp_path, [[39, 2, 511, 16], [5, 511, 3, 1], [4, 511, 3, 11]], dtype))
    assert found.index.tolist() == [[3, 511, 4], [3, 511, 5], [511, 2, 39]]
    assert found.label.tolist() == [11, 1, 16]
    assert (found.index.dtype, found.label.dtype) == (np.int16, np.uint8)


def test_noise_and_255_are_ignored_classes(tmp_path: Path) -> None:
    found = read_openoccupancy(_saved(tmp_path, [[0, 0, 0, 0], [0, 0, 1, 255], [0, 0, 2, 7]]))
    assert found.label.tolist() == [IGNORED, IGNORED, 7]


def test_a_frame_without_occupied_voxels_is_empty(tmp_path: Path) -> None:
    found = read_openoccupancy(_saved(tmp_path, np.zeros((0, 4))))
    assert found.index.shape == (0, 3)
    assert found.label.shape == (0,)


def test_rows_of_one_voxel_vote_and_the_lowest_class_wins_a_tie(tmp_path: Path) -> None:
    rows = [[1, 1, 1, 3], [2, 2, 2, 9], [1, 1, 1, 5], [2, 2, 2, 4], [1, 1, 1, 5], [3, 3, 3, 0], [3, 3, 3, 16]]
    found = read_openoccupancy(_saved(tmp_path, rows))
    assert found.index.tolist() == [[1, 1, 1], [2, 2, 2], [3, 3, 3]]
    assert found.label.tolist() == [5, 4, 16]


def test_velocity_columns_are_left_out(tmp_path: Path) -> None:
    found = read_openoccupancy(_saved(tmp_path, [[1, 2, 3, 0.25, np.nan, -7.5, 4]], "float64"))
    assert found.index.tolist() == [[3, 2, 1]]
    assert found.label.tolist() == [4]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ([40, 0, 0, 1], "row 1 lies outside"),
        ([0, 512, 0, 1], "row 1 lies outside"),
        ([0, 0, -1, 1], "row 1 lies outside"),
        ([0, 0, 0, 17], "row 1 has a class"),
        ([0, 0, 0, -1], "row 1 has a class"),
        ([0.5, 0, 0, 1], "row 1 is not four whole"),
        ([np.nan, 0, 0, 1], "row 1 is not four whole"),
    ],
)
def test_an_impossible_row_is_named(tmp_path: Path, row: list[float], words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_openoccupancy(_saved(tmp_path, [[9, 9, 9, 1], row], "float64"))


def test_wrong_shapes_pickles_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_openoccupancy(tmp_path / "none.npy")
    with pytest.raises(DataError, match="expected"):
        read_openoccupancy(_saved(tmp_path, np.zeros((3, 5))))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="not a whole numpy array"):
        read_openoccupancy(tmp_path / "objects.npy")


def test_a_size_nobody_has_is_refused_before_memory_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "huge.npy"
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": (1 << 50, 4)})
    with pytest.raises(DataError, match="promises"):
        read_openoccupancy(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(place=25, value=123, cut=128)  # numpy's parser of headers meets an open bracket
@given(place=st.integers(0, 191), value=st.integers(0, 255), cut=st.integers(0, 192))
def test_damaged_bytes_give_only_our_own_error(tmp_path: Path, place: int, value: int, cut: int) -> None:
    data = bytearray(_saved(tmp_path, [[1, 2, 3, 4], [5, 6, 7, 8]]).read_bytes())
    data[place] = value
    path = tmp_path / "damaged.npy"
    path.write_bytes(bytes(data[:cut]) if cut < 192 else bytes(data))
    with suppress(DataError):
        read_openoccupancy(path)


def test_what_is_written_is_read_back_and_noise_is_class_0_in_the_file(tmp_path: Path) -> None:
    voxels = OccupiedVoxels(np.array([[0, 1, 2], [3, 511, 39]], np.int16), np.array([IGNORED, 16], np.uint8))
    write_openoccupancy(tmp_path / "a.npy", voxels)
    rows = np.load(tmp_path / "a.npy")
    assert rows.dtype == np.int32
    assert rows.tolist() == [[2, 1, 0, 0], [39, 511, 3, 16]]
    found = read_openoccupancy(tmp_path / "a.npy")
    assert np.array_equal(found.index, voxels.index)
    assert np.array_equal(found.label, voxels.label)
    write_openoccupancy(tmp_path / "b.npy", OccupiedVoxels(np.zeros((0, 3), np.int16), np.zeros(0, np.uint8)))
    assert len(read_openoccupancy(tmp_path / "b.npy").label) == 0
