"""Boxes in the LiDAR frame against the boxes of both challenges."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from picture3d.datasets.detection_classes import NUSCENES_DETECTION, WAYMO_DETECTION
from picture3d.errors import DataError
from picture3d.evaluation import nuscenes_frames, waymo_frames
from picture3d.formats.nuscenes_results import ATTRIBUTES, CLASSES
from picture3d.structures.boxes import Boxes
from picture3d.structures.detections import DetectedBoxes
from picture3d.structures.frame import Frame
from picture3d.structures.poses import Pose
from tests.datasets.made_frames import made_frame


def detected(boxes: list[list[float]], labels: list[int], scores: list[float] | None = None) -> DetectedBoxes:
    rows = torch.tensor(boxes, dtype=torch.float64).reshape(len(labels), -1)
    return DetectedBoxes(rows, torch.tensor(scores or [0.5] * len(labels)), torch.tensor(labels).long())


def level_frame() -> Frame:
    """A car at (100, 50), turned by 90 degrees; its LiDAR is 2 m up and turned back, so that the axes are global again."""
    return made_frame(
        global_from_ego=Pose.from_yaw(np.pi / 2, [100.0, 50.0, 0.0]), ego_from_lidar=Pose.from_yaw(-np.pi / 2, [0.0, 0.0, 2.0])
    )


def test_a_submission_has_global_boxes_and_attributes_by_class_and_speed():
    rows = [
        [10, 0, -1, 4, 2, 1.5, 0.3, 3.0, 0.0],  # car, moving
        [10, 5, -1, 4, 2, 1.5, 0.3, 0.1, 0.0],  # car, at rest
        [0, 8, -1, 1, 1, 1.7, -0.3, 0.0, 0.5],  # pedestrian, moving
        [0, 9, -1, 1, 1, 1.7, -0.3, 0.0, 0.0],  # pedestrian, at rest
        [3, 9, -1, 2, 1, 1.7, -0.3, 0.0, 0.0],  # bicycle, at rest
        [3, 3, -1, 1, 1, 1.0, 1.0, 9.0, 0.0],  # cone
    ]
    labels = [
        NUSCENES_DETECTION.names.index(n) + 1 for n in ("car", "car", "pedestrian", "pedestrian", "bicycle", "traffic_cone")
    ]
    found = nuscenes_frames.detections_of_frame(level_frame(), "sample", detected(rows, labels), NUSCENES_DETECTION.names)
    assert found.samples == ("sample",)
    np.testing.assert_allclose(found.translation[0], [110, 50, 1], atol=1e-12)
    np.testing.assert_allclose(found.velocity[:3], [[3, 0], [0.1, 0], [0, 0.5]], atol=1e-12)
    np.testing.assert_allclose(found.yaw, [0.3, 0.3, -0.3, -0.3, -0.3, 1.0], atol=1e-12)
    assert found.size[0].tolist() == [4, 2, 1.5]
    assert [CLASSES[i] for i in found.label] == ["car", "car", "pedestrian", "pedestrian", "bicycle", "traffic_cone"]
    named = [ATTRIBUTES[i] if i >= 0 else "" for i in found.attribute]
    assert named == [
        "vehicle.moving", "vehicle.parked", "pedestrian.moving", "pedestrian.standing", "cycle.without_rider", ""
    ]  # fmt: skip


def test_a_detector_without_velocities_gives_unknown_ones_and_resting_attributes():
    found = nuscenes_frames.detections_of_frame(level_frame(), "s", detected([[1, 1, 0, 9, 3, 3, 0]], [2]), ("car", "bus"))
    assert np.isnan(found.velocity).all()
    assert ATTRIBUTES[found.attribute[0]] == "vehicle.stopped"


def test_only_the_500_best_boxes_of_a_frame_are_handed_in():
    scores = np.random.default_rng(0).permutation(700) / 700
    boxes = [[float(i), 0, 0, 1, 1, 1, 0] for i in range(700)]
    found = nuscenes_frames.detections_of_frame(level_frame(), "s", detected(boxes, [1] * 700, scores.tolist()), ("car",))
    assert len(found) == 500
    assert found.score.min() == pytest.approx(np.sort(scores)[200])
    assert (np.diff(found.translation[:, 0]) > 0).all(), "the order stays"


def test_nothing_found_is_a_sample_without_boxes():
    empty = DetectedBoxes(torch.zeros(0, 9), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert nuscenes_frames.detections_of_frame(level_frame(), "s", empty, ("car",)).samples == ("s",)
    assert len(waymo_frames.detections_of_frame(level_frame(), empty, WAYMO_DETECTION.names)) == 0


def test_what_no_challenge_takes_is_refused_in_words():
    one = detected([[1, 1, 0, 9, 3, 3, 0]], [1])
    with pytest.raises(DataError, match="tram: not a class of the nuScenes challenge"):
        nuscenes_frames.detections_of_frame(level_frame(), "s", one, ("tram",))
    with pytest.raises(DataError, match="tram: not a class of the Waymo challenge"):
        waymo_frames.detections_of_frame(level_frame(), one, ("tram",))
    with pytest.raises(DataError, match="has no pose"):
        nuscenes_frames.detections_of_frame(replace(level_frame(), global_from_ego=None), "s", one, ("car",))
    broken = detected([[1, 1, 0, 9, 3, 3, 0]], [1], [float("nan")])
    for frames, classes in ((nuscenes_frames, "car"), (waymo_frames, "Vehicle")):
        arguments = ("s",) if frames is nuscenes_frames else ()
        with pytest.raises(DataError, match="log-a/0: the detector gave a box or score that is not finite"):
            frames.detections_of_frame(level_frame(), *arguments, broken, (classes,))


def test_waymo_objects_are_in_the_vehicle_frame():
    found = waymo_frames.detections_of_frame(
        level_frame(), detected([[10, 0, -1, 4, 2, 1.5, 0.3], [1, 2, 0, 1, 1, 2, -3]], [1, 3]), WAYMO_DETECTION.names
    )
    np.testing.assert_allclose(found.box[0], [0, -10, 1, 4, 2, 1.5, 0.3 - np.pi / 2], atol=1e-12)
    assert found.kind.tolist() == [1, 4]
    assert found.context == ("log-a", "log-a")
    assert found.timestamp.tolist() == [level_frame().timestamp_us] * 2


def test_waymo_labels_keep_points_and_difficulty_and_leave_other_categories_out():
    frame = level_frame()
    boxes = Boxes(
        center=np.zeros((4, 3)),
        size=np.ones((4, 3)),
        yaw=np.zeros(4),
        velocity=np.zeros((4, 2)),
        category=("VEHICLE", "sign", "tree", "Cyclist"),
        track_id=("", "", "", ""),
        num_points=np.array([7, 0, 3, -1], np.int32),
        difficulty=np.array([2, 0, 1, 1], np.int8),
    )
    labels = waymo_frames.labels_of_frame(replace(frame, boxes=boxes))
    assert labels.kind.tolist() == [1, 3, 4]
    assert labels.num_points.tolist() == [7, 0, 1]
    assert labels.difficulty.tolist() == [2, 0, 1]
    with pytest.raises(DataError, match="log-a/0 has no boxes"):
        waymo_frames.labels_of_frame(replace(frame, boxes=None))
