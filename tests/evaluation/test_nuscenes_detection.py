"""The nuScenes detection metric against the devkit, real numbers, a plain greedy twin and answers by hand."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from picture3d.errors import DataError
from picture3d.evaluation.nuscenes_detection import CLASSES, DISTANCES, ERRORS, _candidates, _match, score_detections
from picture3d.formats.nuscenes_results import (
    RACK,
    DetectionColumns,
    read_labels,
    read_results,
    rotation_of_yaw,
    write_results,
)
from picture3d.structures.poses import Pose
from tests.nuscenes_submissions import draw, write_labels
from tests.sample_data import load_numpy_pickle, sample_path

REPOSITORY = Path(__file__).resolve().parent.parent.parent
PYTHON = REPOSITORY / ".venv-oracles" / "bin" / "python"


def boxes(samples=("a",), **columns):
    """Cars of one by one by one metre at the origin of sample 0, but for what is given."""
    count = len(columns.get("sample", columns.get("translation", [0])))
    base = {
        "sample": np.zeros(count, np.int64),
        "translation": np.zeros((count, 3)),
        "size": np.ones((count, 3)),
        "rotation": rotation_of_yaw(np.zeros(count)),
        "velocity": np.zeros((count, 2)),
        "label": np.zeros(count, np.int64),
        "score": np.full(count, 0.5),
        "attribute": np.full(count, -1),
        "num_points": np.full(count, 5),
        "ego": np.zeros((len(samples), 3)),
    }
    return DetectionColumns(samples, **base | {name: np.asarray(value) for name, value in columns.items()})


def at(*xs):
    return np.array([[x, 0.0, 0.0] for x in xs]).reshape(-1, 3)


def nothing(samples=("a",)):
    return boxes(samples, translation=np.zeros((0, 3)))


def equal_summaries(ours, theirs, tolerance):
    for name in CLASSES:
        for distance in map(str, DISTANCES):
            assert ours["label_aps"][name][distance] == pytest.approx(theirs["label_aps"][name][distance], abs=tolerance)
        for error in ERRORS:
            pair = ours["label_tp_errors"][name][error], theirs["label_tp_errors"][name][error]
            assert pair[0] == pytest.approx(pair[1], abs=tolerance, nan_ok=True), (name, error)
    for key in ("mean_ap", "nd_score", "tp_errors", "tp_scores", "mean_dist_aps"):
        assert ours[key] == pytest.approx(theirs[key], abs=tolerance), key
    assert ours["cfg"] == theirs["cfg"]


@pytest.mark.long
@pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-oracles: run `make oracles` for the nuScenes devkit")
@pytest.mark.parametrize("digits", [1, 12], ids=["many equal scores", "no equal scores"])
def test_the_devkit_scores_a_synthetic_submission_the_same(tmp_path, digits):
    truth, found = draw(40, 40, 80, seed=digits, score_digits=digits)
    write_labels(tmp_path / "labels.json", truth)
    write_results(tmp_path / "results.json", [found])
    script = REPOSITORY / "tests" / "oracles" / "nuscenes_detection_check.py"
    command = [PYTHON, script, tmp_path / "results.json", tmp_path / "labels.json"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-4000:]
    theirs = json.loads(done.stdout.rpartition("ANSWER ")[2])
    ours = score_detections(read_labels(tmp_path / "labels.json")[0], read_results(tmp_path / "results.json")[0]).to_json()
    assert 0.05 < theirs["mean_ap"] < 0.9
    equal_summaries(ours, theirs, 1e-6)


def mini_val_labels(folder):
    parts = []
    for info in load_numpy_pickle(folder / "nuscenes_infos_val.pkl")["infos"]:
        global_from_ego = Pose.from_quaternion(info["ego2global_rotation"], info["ego2global_translation"])
        pose = global_from_ego @ Pose.from_quaternion(info["lidar2ego_rotation"], info["lidar2ego_translation"])
        names = np.array(info["gt_names"])
        rows = np.flatnonzero(np.isin(names, CLASSES))
        gt = np.asarray(info["gt_boxes"], np.float64)[rows]
        turned = [(pose @ Pose.from_yaw(-yaw - np.pi / 2)).quaternion_wxyz for yaw in gt[:, 6]]
        velocity = np.asarray(info["gt_velocity"], np.float64)[rows]
        # The infos turned (vx, vy, 0) into the LiDAR frame and dropped z: it is what makes the global vz zero again.
        upward = -velocity @ pose.rotation[2, :2] / pose.rotation[2, 2]
        velocity = np.concatenate([velocity, upward[:, None]], axis=1) @ pose.rotation.T
        parts.append(
            boxes(
                (info["token"],),
                sample=np.zeros(len(rows), np.int64),
                translation=pose.apply(gt[:, :3]),
                size=gt[:, [4, 3, 5]],
                rotation=np.array(turned).reshape(-1, 4),
                velocity=velocity[:, :2],
                label=np.array([CLASSES.index(name) for name in names[rows]], np.int64),
                num_points=np.asarray(info["num_lidar_pts"])[rows] + np.asarray(info["num_radar_pts"])[rows],
                ego=global_from_ego.translation[None],
            )
        )
    return DetectionColumns.join(parts)


def test_golden_a_real_submission_of_mini_val_gets_the_official_numbers():
    folder = sample_path("nuscenes/mini_val_detection_eval")
    official = json.loads((folder / "metrics_summary.json").read_text())
    found, meta = read_results(folder / "results_nusc.json")
    assert len(found) == 905
    assert meta == official["meta"]
    ours = score_detections(mini_val_labels(folder), found).to_json(meta)
    for name in CLASSES:
        assert ours["label_aps"][name] == pytest.approx(official["label_aps"][name], abs=1e-6)
        for error, tolerance in (("trans_err", 1e-6), ("scale_err", 1e-6), ("orient_err", 1e-4), ("vel_err", 1e-3)):
            pair = ours["label_tp_errors"][name][error], official["label_tp_errors"][name][error]
            assert pair[0] == pytest.approx(pair[1], abs=tolerance, nan_ok=True), (name, error)
    assert ours["mean_ap"] == pytest.approx(0.07551617930781714, abs=1e-6)
    # The truth has no attributes here, so only that error and NDS differ; the layout is the official one.
    assert set(official) - {"eval_time"} <= set(ours)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("spread", [2.0, 45.0], ids=["crowded", "apart"])
def test_offers_find_the_same_matches_as_taking_turns(distance, spread):
    truth, found = draw(6, 30, 60, seed=7)
    truth.translation[:, :2] *= spread / 1000
    found.translation[:, :2] *= spread / 1000
    order = np.lexsort((np.arange(len(found)), found.score))[::-1]
    found = DetectionColumns(
        found.samples, **{n: getattr(found, n)[order] for n in found.__slots__ if n not in {"samples", "ego"}}, ego=found.ego
    )
    taken, expected = set(), []
    for row in range(len(found)):
        same = np.flatnonzero((truth.sample == found.sample[row]) & (truth.label == found.label[row]))
        gaps = [(np.hypot(*(found.translation[row] - truth.translation[t])[:2]), t) for t in same if t not in taken]
        best, label = min(gaps, default=(np.inf, -1))
        expected.append(label if best < distance else -1)
        taken.add(expected[-1])
        taken.discard(-1)
    assert max(expected) >= 0
    np.testing.assert_array_equal(_match(_candidates(found, truth), len(found), len(truth), distance), expected)


def test_perfect_predictions_score_one_but_for_classes_that_never_occur():
    truth = boxes(translation=at(0, 10, 20, 30), attribute=[5, 5, 6, 7])
    scores = score_detections(truth, replace(truth, score=np.array([0.9, 0.8, 0.7, 0.6])))
    assert scores.aps[0] == pytest.approx(1)
    assert (scores.aps[1:] == 0).all()
    assert scores.errors[0] == pytest.approx(0, abs=1e-12)
    assert (scores.errors[1:8] == 1).all()
    assert np.isnan(scores.errors[8, 2:]).all()
    assert np.isnan(scores.errors[9, 3:]).all()
    assert scores.mean_ap == pytest.approx(0.1)


def test_the_errors_of_one_match_are_what_one_computes_by_hand():
    truth = boxes(size=[[4.0, 2.0, 1.0]], velocity=[[3.0, 0.0]], attribute=[5])
    found = boxes(
        translation=[[0.3, 0.4, 9.0]],
        size=[[4.0, 1.0, 1.0]],
        rotation=rotation_of_yaw(np.array([1.5 * np.pi])),
        velocity=[[3.0, 4.0]],
        attribute=[6],
    )
    scores = score_detections(truth, found)
    assert scores.errors[0] == pytest.approx([0.5, 0.5, np.pi / 2, 4.0, 1.0])
    assert scores.aps[0] == pytest.approx([0, 1, 1, 1])  # 0.5 m is not nearer than 0.5 m


def test_a_barrier_may_be_turned_by_half_a_circle_and_a_car_may_not():
    turned = {"rotation": rotation_of_yaw(np.array([np.pi - 0.1, np.pi - 0.1]))}
    base = boxes(translation=at(0, 5), label=[0, 9])
    errors = score_detections(base, boxes(translation=at(0, 5), label=[0, 9], **turned)).errors
    assert errors[[0, 9], 2] == pytest.approx([np.pi - 0.1, 0.1])


def test_no_labels_or_no_predictions_in_a_sample_or_at_all_score_zero():
    for truth, found in ((nothing(), nothing()), (boxes(), nothing()), (nothing(), boxes())):
        scores = score_detections(truth, found)
        assert (scores.nds, scores.mean_ap) == (0, 0)
    truth, found = boxes(("a", "b"), sample=[0]), boxes(("b", "a"), sample=[1])
    assert score_detections(truth, found).aps[0] == pytest.approx(1)


def test_boxes_without_points_beyond_the_range_or_in_a_rack_do_not_count():
    truth = boxes(translation=at(0, 49.9, 50.0, 1.0), num_points=[0, 3, 3, -1])
    assert score_detections(truth, nothing()).labels[0] == 2
    unknown = replace(truth, ego=np.full((1, 3), np.nan))
    scores = score_detections(unknown, replace(nothing(), ego=np.full((1, 3), np.nan)))
    assert (scores.labels[0], scores.samples_without_ego) == (3, 1)
    # A rack of 4 m x 1 m turned to y: the centre at y = 1.9 is in it, the one at x = 1.9 is not.
    rack = {"size": [[4.0, 1.0, 2.0], *[[1.0, 1, 1]] * 3], "rotation": rotation_of_yaw(np.array([np.pi / 2, 0, 0, 0]))}
    places = np.array([[0, 0, 0], [0, 1.9, 0], [1.9, 0, 0], [0, 1.9, 0]])
    racked = boxes(translation=places, label=[RACK, 7, 7, 5], **rack)
    assert score_detections(racked, nothing()).labels[[7, 5]].tolist() == [1, 1]
    assert score_detections(racked, nothing(), bike_racks=False).labels[7] == 2


def test_of_equal_scores_the_later_prediction_comes_first():
    scores = score_detections(boxes(), boxes(translation=at(1.9, 0.1), score=[0.5, 0.5]))
    assert scores.errors[0, 0] == pytest.approx(0.1)
    assert score_detections(boxes(), boxes(translation=at(0.1, 1.9), score=[0.5, 0.5])).errors[0, 0] == pytest.approx(1.9)


def test_a_box_of_zero_size_is_matched_with_the_full_size_error():
    assert score_detections(boxes(), boxes(size=np.zeros((1, 3)))).errors[0, :2] == pytest.approx([0, 1])
    assert score_detections(boxes(size=np.zeros((1, 3))), boxes(size=np.zeros((1, 3)))).errors[0, 1] == 1


def test_what_cannot_be_scored_is_refused_by_name():
    with pytest.raises(DataError, match="sample a: a prediction's score is not finite"):
        score_detections(boxes(), boxes(score=[np.nan]))
    with pytest.raises(DataError, match="predictions for 2 samples without labels: x, y"):
        score_detections(boxes(), boxes(("a", "x", "y"), sample=[0]))
    with pytest.raises(DataError, match="no predictions for 1 of 2 samples: b"):
        score_detections(boxes(("a", "b"), sample=[0]), boxes())
    with pytest.raises(DataError, match="sample a: 501 predictions, 500 are allowed"):
        score_detections(boxes(), boxes(sample=np.zeros(501, np.int64)))
    with pytest.raises(DataError, match="size is negative"):
        score_detections(boxes(), boxes(size=[[1.0, -1.0, 1.0]]))


def test_five_hundred_predictions_on_one_place_find_their_labels_in_order():
    truth = boxes(translation=at(*np.linspace(0, 1, 20)))
    found = boxes(sample=np.zeros(500, np.int64), score=np.linspace(1, 0.1, 500))
    scores = score_detections(truth, found)
    assert scores.aps[0, 1:] == pytest.approx(1, abs=0.1)
