"""Occupancy scores by hand, against a dense float64 twin, and against reference numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from picture3d.errors import DataError
from picture3d.evaluation.occupancy import OccupancyMatrix, OccupancyScores
from picture3d.structures.occupancy import IGNORED, Occupancy, OccupancyGrid
from tests.sample_data import golden_files

NAMES = ("free", "car", "road", "tree")


def scores_of(truth: np.ndarray, prediction: np.ndarray, names: tuple[str, ...] = NAMES) -> OccupancyScores:
    matrix = OccupancyMatrix(names)
    for true, found in zip(np.atleast_2d(truth), np.atleast_2d(prediction), strict=True):
        grid = OccupancyGrid((true.size, 1, 1), (0.0, 0.0, 0.0), 0.2)
        shape = grid.shape
        matrix.add(
            Occupancy.of_dense(true.reshape(shape).astype(np.uint8), grid),
            Occupancy.of_dense(found.reshape(shape).astype(np.uint8), grid),
        )
    return matrix.scores()


def plain_scores(truth: np.ndarray, prediction: np.ndarray, classes: int) -> tuple[list[float], float]:
    """IoU of classes 1.. (NaN where there is none) and of the geometry, from whole grids and one loop over the classes."""
    scored = truth != IGNORED
    truth, prediction = truth[scored], prediction[scored]
    ious = []
    for c in range(1, classes):
        union = np.sum((truth == c) | (prediction == c))
        ious.append(np.sum((truth == c) & (prediction == c)) / union if union else np.nan)
    union = np.sum((truth > 0) | (prediction > 0))
    return ious, np.sum((truth > 0) & (prediction > 0)) / union if union else np.nan


def test_eight_cells_by_hand():
    #                           hit  swap false miss noise noise free hit
    scores = scores_of(np.array([1, 1, 0, 2, 255, 255, 0, 2]), np.array([1, 2, 3, 0, 1, 0, 0, 2]))
    assert scores.iou == (None, 1 / 2, 1 / 3, 0.0)
    assert scores.miou == pytest.approx((1 / 2 + 1 / 3) / 3)
    assert scores.geometric_iou == 3 / 5
    assert (scores.precision, scores.recall) == (3 / 4, 3 / 4)
    assert (scores.frames, scores.cells, scores.ignored) == (1, 6, 2)
    assert scores.confusion[0].tolist() == [1, 0, 0, 1]


def test_a_class_in_neither_is_left_out_of_the_mean_and_named():
    scores = scores_of(np.array([1, 1, 0]), np.array([1, 0, 0]))
    assert scores.iou == (None, 0.5, None, None)
    assert scores.absent == ("road", "tree")
    assert scores.miou == 0.5
    assert scores.miou_of_all == pytest.approx(0.5 / 3)


def test_frames_without_anything_have_no_scores_and_valid_json():
    scores = scores_of(np.zeros((2, 5), int), np.zeros((2, 5), int))
    assert (scores.miou, scores.geometric_iou, scores.precision, scores.recall) == (None, None, None, None)
    assert (scores.frames, scores.cells) == (2, 10)
    assert "NaN" not in json.dumps(scores.to_json())
    assert scores.table_rows()[-1] == ("geometric IoU", "-", "0", "0")
    everything_missed = scores_of(np.array([1, 2]), np.array([0, 0]))
    assert (everything_missed.geometric_iou, everything_missed.precision, everything_missed.recall) == (0.0, None, 0.0)


@given(st.integers(0, 10_000), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_counting_occupied_cells_alone_gives_what_whole_grids_give(seed: int, share_true: float, share_found: float):
    rng = np.random.default_rng(seed)
    shape = (3, 60)
    truth = np.where(rng.random(shape) < share_true, rng.choice([1, 2, 3, IGNORED], shape), 0)
    found = np.where(rng.random(shape) < share_found, rng.integers(1, 4, shape), 0)
    scores = scores_of(truth, found)
    ious, geometry = plain_scores(truth, found, len(NAMES))
    assert [np.nan if value is None else value for value in scores.iou[1:]] == pytest.approx(ious, nan_ok=True)
    assert (np.nan if scores.geometric_iou is None else scores.geometric_iou) == pytest.approx(geometry, nan_ok=True)
    assert scores.cells + scores.ignored == truth.size


def test_other_grids_and_unknown_classes_are_refused_in_words():
    matrix = OccupancyMatrix(NAMES)
    grid, other = (OccupancyGrid((2, 2, 2), (0.0, 0.0, 0.0), cell) for cell in (0.2, 0.4))
    with pytest.raises(DataError, match="the truth lies on"):
        matrix.add(Occupancy.empty(grid), Occupancy.empty(other))
    one = Occupancy.of_cells(np.zeros((1, 3), np.int64), np.array([4], np.uint8), grid)
    with pytest.raises(DataError, match="frame-7: prediction holds label 4"):
        matrix.add(Occupancy.empty(grid), one, where="frame-7")


@pytest.mark.parametrize("path", golden_files("openpcdet", "occ_head_parts"))
def test_golden_confusion_and_means_of_the_reference(path: Path):
    golden = np.load(path)
    truth, prediction = golden["gt"], golden["prediction"]
    grid = OccupancyGrid((24, 20, 16), (0.0, 0.0, 0.0), 0.2)
    matrix = OccupancyMatrix(("free", *(f"class_{c}" for c in range(1, 17))))
    matrix.add(Occupancy.of_dense(truth.astype(np.uint8), grid), Occupancy.of_dense(prediction.astype(np.uint8), grid))
    scores = matrix.scores()
    assert np.array_equal(scores.confusion, golden["confusion"])
    assert scores.miou_of_all == pytest.approx(float(golden["miou_16"]), abs=1e-6)
    assert scores.geometric_iou == pytest.approx(float(golden["geometric_iou"]), abs=1e-6)
    assert [value or 0.0 for value in scores.iou[1:]] == pytest.approx(golden["class_iou"][1:].tolist(), abs=1e-6)
