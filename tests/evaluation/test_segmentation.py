"""Segmentation scores against hand-computed tables, a reference confusion matrix and scikit-learn."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix, jaccard_score

from picture3d.errors import DataError
from picture3d.evaluation.segmentation import ConfusionMatrix
from tests.sample_data import golden_files

NAMES = ("ignored", "car", "road", "tree")


def scores_of(truth: list[int], prediction: list[int], names: tuple[str, ...] = NAMES):
    matrix = ConfusionMatrix(names)
    matrix.add(np.array(truth), np.array(prediction))
    return matrix.scores()


def test_iou_of_six_points_by_hand():
    scores = scores_of([1, 1, 1, 2, 2, 3], [1, 1, 2, 2, 2, 1])
    assert scores.confusion.tolist() == [[0, 0, 0, 0], [0, 2, 1, 0], [0, 0, 2, 0], [0, 1, 0, 0]]
    assert scores.iou == (None, 2 / 4, 2 / 3, 0.0)
    assert scores.miou == pytest.approx((1 / 2 + 2 / 3) / 3)
    assert scores.accuracy == pytest.approx(4 / 6)
    assert scores.num_points == 6


def test_points_with_ignored_truth_count_nowhere_whatever_is_predicted():
    with_noise = scores_of([1, 2, 0, 0, 0], [1, 2, 1, 3, 0])
    assert with_noise.num_ignored == 3
    assert with_noise.num_points == 2
    assert with_noise.iou == (None, 1.0, 1.0, None)


def test_no_answer_is_a_miss_and_no_false_alarm():
    scores = scores_of([1, 1, 2, 2], [1, 0, 2, 2])
    assert scores.iou == (None, 0.5, 1.0, None)


def test_a_class_in_neither_truth_nor_prediction_is_left_out_and_named():
    scores = scores_of([1, 2], [1, 2])
    assert scores.absent == ("tree",)
    assert scores.miou == 1.0
    assert scores.table_rows() == [
        ("car", "100.0", "1", "1"),
        ("road", "100.0", "1", "1"),
        ("tree", "absent", "0", "0"),
        ("mIoU (2 classes)", "100.0", "2", ""),
    ]


def test_a_class_that_is_only_predicted_scores_zero_and_counts():
    scores = scores_of([1, 1], [1, 3])
    assert scores.iou == (None, 0.5, None, 0.0)
    assert scores.miou == 0.25


@pytest.mark.parametrize("truth", [[], [0, 0]])
def test_without_a_scored_point_there_is_no_mean(truth: list[int]):
    matrix = ConfusionMatrix(NAMES)
    matrix.add(np.array(truth, np.int64), np.ones(len(truth), np.int64))
    scores = matrix.scores()
    assert scores.miou is None
    assert scores.accuracy is None
    assert scores.table_rows()[-1] == ("mIoU (0 classes)", "-", "0", "")
    assert json.loads(json.dumps(scores.to_json(), allow_nan=False))["miou"] is None


@settings(max_examples=30, deadline=None)
@given(points=st.integers(1, 300), classes=st.integers(2, 9), seed=st.integers(0, 1000), parts=st.integers(1, 5))
def test_frames_added_one_by_one_equal_scikit_learn_on_all(points: int, classes: int, seed: int, parts: int):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, classes, points).astype(np.uint8)
    prediction = rng.integers(0, classes, points).astype(np.int32)
    matrix = ConfusionMatrix(tuple(f"c{i}" for i in range(classes)))
    for t, p in zip(np.array_split(truth, parts), np.array_split(prediction, parts), strict=True):
        matrix.add(t, p)
    scores, scored = matrix.scores(), truth != 0
    if not scored.any():
        assert scores.miou is None
        return
    labels = list(range(classes))
    np.testing.assert_array_equal(scores.confusion, confusion_matrix(truth[scored], prediction[scored], labels=labels))
    expected = jaccard_score(truth[scored], prediction[scored], labels=labels, average=None, zero_division=0)  # pyright: ignore
    np.testing.assert_allclose([0.0 if iou is None else iou for iou in scores.iou[1:]], np.asarray(expected)[1:], atol=1e-12)


@pytest.mark.parametrize("path", golden_files("openpcdet", "occ_head_parts"))
def test_confusion_matrix_and_mean_equal_the_golden_occupancy_metric(path: Path):
    stored = np.load(path)
    matrix = ConfusionMatrix(tuple(str(i) for i in range(17)), ignored=255)
    matrix.add(stored["gt"], stored["prediction"])
    scores = matrix.scores()
    np.testing.assert_array_equal(scores.confusion, stored["confusion"])
    np.testing.assert_allclose([iou or 0.0 for iou in scores.iou[1:]], stored["class_iou"][1:], rtol=1e-6)
    assert scores.absent or scores.miou == pytest.approx(float(stored["miou_16"]), rel=1e-6)


@pytest.mark.parametrize(
    ("truth", "prediction", "words"),
    [
        ([1, 4], [1, 1], "truth holds label 4"),
        ([1, -1], [1, 1], "truth holds label -1"),
        ([1, 1], [1, 31], "prediction holds label 31"),
        ([1, 1], [1, -2], "prediction holds label -2"),
        ([1, 1], [1], "shape"),
        ([1.0, 2.0], [1, 1], "integers"),
    ],
)
def test_labels_that_no_class_has_are_refused_by_name(truth: list[int], prediction: list[int], words: str):
    with pytest.raises(DataError, match=words) as refused:
        ConfusionMatrix(NAMES).add(np.array(truth), np.array(prediction), where="scene-0061/3")
    assert "scene-0061/3" in str(refused.value)


def test_a_refused_frame_leaves_the_counts_as_they_were():
    matrix = ConfusionMatrix(NAMES)
    with pytest.raises(DataError):
        matrix.add(np.array([1, 0]), np.array([9, 1]))
    assert matrix.scores().num_points == 0
    assert matrix.scores().num_ignored == 0


def test_scores_do_not_change_when_more_is_added():
    matrix = ConfusionMatrix(NAMES)
    matrix.add(np.array([1]), np.array([1]))
    before = matrix.scores()
    matrix.add(np.array([1]), np.array([2]))
    assert before.confusion.sum() == 1


def test_a_single_class_is_refused():
    with pytest.raises(ValueError, match="at least one more"):
        ConfusionMatrix(("ignored",))
