"""`score nuscenes-detection` on prepared frames and on files."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from picture3d.cli import app
from picture3d.commands.score_nuscenes import prepared_labels
from picture3d.errors import DataError
from picture3d.evaluation.nuscenes_detection import score_detections
from picture3d.formats.nuscenes_results import read_results, write_results
from picture3d.structures.boxes import Boxes
from picture3d.structures.poses import Pose
from tests.datasets.made_frames import made_frame, write_made_dataset
from tests.nuscenes_submissions import draw, write_labels


def test_the_command_prints_the_official_summary_or_a_table(tmp_path):
    truth, found = draw(6, 20, 30, seed=3)
    write_labels(tmp_path / "labels.json", truth)
    write_results(tmp_path / "results.json", [found])
    words = ["score", "nuscenes-detection", str(tmp_path / "results.json"), "--labels", str(tmp_path / "labels.json")]
    summary = json.loads(CliRunner().invoke(app, [*words, "--json"]).output)
    scores = score_detections(truth, found)
    assert summary["nd_score"] == scores.nds > 0
    assert summary["meta"]["use_lidar"] is True
    assert set(summary["label_aps"]["car"]) == {"0.5", "1.0", "2.0", "4.0"}
    table = CliRunner().invoke(app, words).output
    assert f"NDS {100 * scores.nds:.2f}" in table
    assert "construction_vehicle" in table


def tilted_dataset(root, **changes):
    """One frame on a road that tilts by 2 degrees: a car with radar points only, a bicycle in no rack, a tree."""
    tilt = Pose.from_quaternion([np.cos(0.0175), np.sin(0.0175), 0, 0], [0, 0, 0])
    ego = Pose.from_yaw(2.0, [500.0, -300.0, 2.0]) @ tilt
    boxes = Boxes(
        center=np.array([[10.0, 2, 0], [5, 5, 0], [3, 3, 3]]),
        size=np.array([[4.0, 2, 1.5], [2, 1, 1], [1, 1, 9]]),
        yaw=np.array([0.7, -2.0, 0]),
        velocity=np.array([[3.0, 4.0], [np.nan, np.nan], [0, 0]]),
        category=("vehicle.car", "vehicle.bicycle", "static.vegetation"),
        track_id=("0", "1", "2"),
        num_points=np.array([0, 7, 100], np.int32),
        num_radar_points=np.array([2, 0, 0], np.int32),
        attribute=("vehicle.moving", "cycle.without_rider", ""),
    )
    frame = made_frame(boxes=replace(boxes, **changes), global_from_ego=ego)
    write_made_dataset(root, {"log-a": [frame, made_frame(index=1, boxes=Boxes.empty())]}, splits={"val": ["log-a"]})
    return frame


def test_prepared_labels_are_those_of_the_frame_in_the_global_frame(tmp_path):
    frame = tilted_dataset(tmp_path / "data")
    labels = prepared_labels(tmp_path / "data", "val")
    pose = frame.global_from_lidar
    assert pose is not None
    assert frame.boxes is not None
    assert frame.global_from_ego is not None
    assert labels.samples == (frame.token, "log-a-1-ü")
    np.testing.assert_allclose(labels.translation, pose.apply(frame.boxes.center[:2]), atol=1e-9)
    np.testing.assert_allclose(labels.ego[0], frame.global_from_ego.translation)
    assert labels.label.tolist() == [0, 7]
    assert labels.num_points.tolist() == [2, 7]
    assert np.linalg.norm(labels.velocity[0]) == pytest.approx(5, rel=1e-3)
    expected = frame.boxes.yaw[:2] + 0.1 + 2.0
    assert np.abs(np.angle(np.exp(1j * (labels.yaw - expected)))).max() < 1e-3


def test_perfect_predictions_on_prepared_frames_score_one(tmp_path):
    tilted_dataset(tmp_path / "data")
    labels = prepared_labels(tmp_path / "data", "val")
    write_results(tmp_path / "results.json", [replace(labels, score=np.array([0.9, 0.8]))])
    words = ["score", "nuscenes-detection", str(tmp_path / "results.json"), "--labels", str(tmp_path / "data"), "--json"]
    summary = json.loads(CliRunner().invoke(app, words).output)
    assert [summary["mean_dist_aps"][name] for name in ("car", "bicycle", "bus")] == pytest.approx([1, 1, 0])
    assert list(summary["label_tp_errors"]["car"].values()) == pytest.approx([0] * 5, abs=1e-9)
    assert len(read_results(tmp_path / "results.json")[0]) == 2


def test_frames_without_attributes_boxes_or_poses_are_refused(tmp_path):
    tilted_dataset(tmp_path / "a", attribute=None)
    with pytest.raises(DataError, match="no attributes and radar counts"):
        prepared_labels(tmp_path / "a", "val")
    for name, frame in (("boxes", made_frame(boxes=None)), ("pose", made_frame(global_from_ego=None))):
        write_made_dataset(tmp_path / name, {"log-a": [frame]}, splits={"val": ["log-a"]})
        with pytest.raises(DataError, match=f"has no {name}"):
            prepared_labels(tmp_path / name, "val")
