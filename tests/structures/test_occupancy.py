"""Sparse occupancy against dense arrays and points moved in float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from picture3d.structures.occupancy import FREE, Occupancy, OccupancyGrid

GRID = OccupancyGrid((6, 6, 4), (-3.0, -3.0, -1.0), 1.0)


def some(seed: int, grid: OccupancyGrid = GRID, share: float = 0.3) -> tuple[np.ndarray, Occupancy]:
    rng = np.random.default_rng(seed)
    dense = np.where(rng.random(grid.shape) < share, rng.integers(1, 256, grid.shape), 0).astype(np.uint8)
    return dense, Occupancy.of_dense(dense, grid)


@given(st.integers(0, 1000), st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_dense_and_sparse_say_the_same(seed: int, share: float):
    dense, sparse = some(seed, share=share)
    assert np.array_equal(sparse.dense(), dense)
    assert len(sparse) == np.count_nonzero(dense)
    assert np.array_equal(GRID.cells_of(sparse.keys), sparse.index)
    for row in range(len(sparse)):
        assert dense[tuple(sparse.index[row])] == sparse.label[row]


def test_cells_come_sorted_whatever_their_order():
    cells = np.array([[5, 0, 1], [0, 3, 2], [0, 3, 1]])
    found = Occupancy.of_cells(cells, np.array([1, 2, 3], np.uint8), GRID)
    assert found.index.tolist() == [[0, 3, 1], [0, 3, 2], [5, 0, 1]]
    assert found.label.tolist() == [3, 2, 1]
    assert found.centres[0].tolist() == [-2.5, 0.5, 0.5]


def test_points_find_the_label_of_their_cell_and_nothing_outside():
    dense, sparse = some(1)
    points = np.random.default_rng(2).uniform(-4, 4, (500, 3))
    points = np.concatenate([points, [[np.nan, 0, 0], [3.0, 0, 0], [-3.0, -3.0, -1.0], [np.inf, 0, 0]]])
    found = sparse.at(points)
    for point, label in zip(points, found, strict=True):
        cell = np.floor(point - GRID.origin)
        inside = bool(np.all(cell >= 0) and np.all(cell < GRID.shape))
        assert label == (dense[tuple(cell.astype(int))] if inside else FREE)


def test_an_empty_frame_has_no_cells_and_moves():
    empty = Occupancy.empty(GRID)
    assert len(empty) == 0
    assert empty.dense().sum() == 0
    assert empty.at(np.zeros((2, 3))).tolist() == [0, 0]
    assert len(empty.moved(mirror_x=True, quarter_turns=1)) == 0
    assert len(Occupancy.of_cells(np.zeros((0, 3), np.int64), np.zeros(0, np.uint8), GRID)) == 0


@pytest.mark.parametrize("mirror_x", [False, True])
@pytest.mark.parametrize("mirror_y", [False, True])
@pytest.mark.parametrize("turns", [0, 1, 2, 3, -1, 6])
def test_moved_cells_lie_where_their_moved_middles_lie(mirror_x: bool, mirror_y: bool, turns: int):
    _, sparse = some(3)
    moved = sparse.moved(mirror_x=mirror_x, mirror_y=mirror_y, quarter_turns=turns)
    flip = np.diag([-1.0 if mirror_x else 1.0, -1.0 if mirror_y else 1.0, 1.0])
    c, s = np.cos(turns * np.pi / 2), np.sin(turns * np.pi / 2)
    points = sparse.centres @ (np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ flip).T
    assert len(moved) == len(sparse)
    assert np.array_equal(moved.at(points), sparse.label)


def test_four_quarter_turns_change_nothing():
    _, sparse = some(4)
    turned = sparse
    for _ in range(4):
        turned = turned.moved(quarter_turns=1)
    assert np.array_equal(turned.index, sparse.index)
    assert np.array_equal(turned.label, sparse.label)


def test_motions_that_cells_do_not_survive_are_refused():
    aside = OccupancyGrid((6, 6, 4), (-2.0, -3.0, -1.0), 1.0)
    with pytest.raises(ValueError, match="off the sensor"):
        Occupancy.empty(aside).moved(mirror_x=True)
    assert len(some(5, aside)[1].moved(mirror_y=True)) > 0
    oblong = OccupancyGrid((6, 4, 4), (-3.0, -2.0, -1.0), 1.0)
    with pytest.raises(ValueError, match="not square"):
        Occupancy.empty(oblong).moved(quarter_turns=1)
    assert len(some(6, oblong)[1].moved(quarter_turns=2)) > 0


@pytest.mark.parametrize(
    ("index", "label", "words"),
    [
        ([[0, 0, 4]], [1], "outside"),
        ([[-1, 0, 0]], [1], "outside"),
        ([[1, 0, 0], [0, 0, 0]], [1, 1], "sorted"),
        ([[1, 0, 0], [1, 0, 0]], [1, 2], "none may come twice"),
        ([[1, 0, 0]], [0], "means free"),
        ([[1, 0, 0]], [1, 2], "as many"),
        ([[1, 0]], [1], r"\(M, 3\)"),
    ],
)
def test_cells_that_cannot_be_are_refused(index, label, words):
    with pytest.raises(ValueError, match=words):
        Occupancy(np.array(index, np.int16), np.array(label, np.uint8), GRID)


@pytest.mark.parametrize(
    ("shape", "origin", "cell"),
    [((0, 4, 4), (0, 0, 0), 1.0), ((40000, 4, 4), (0, 0, 0), 1.0), ((4, 4, 4), (0, 0, 0), 0.0),
     ((4, 4, 4), (0, np.nan, 0), 1.0)],
)  # fmt: skip
def test_grids_that_cannot_be_are_refused(shape, origin, cell):
    with pytest.raises(ValueError, match="occupancy grid"):
        OccupancyGrid(shape, origin, cell)


def test_of_cells_refuses_cells_beyond_int16_too():
    with pytest.raises(ValueError, match="outside"):
        Occupancy.of_cells(np.array([[65536, 0, 0]]), np.ones(1, np.uint8), GRID)
