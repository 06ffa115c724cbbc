from __future__ import annotations

from dataclasses import FrozenInstanceError

import numpy as np
import pytest

from picture3d.structures.boxes import Boxes
from picture3d.structures.frame import Frame
from picture3d.structures.points import IntensityUnit, PointCloud
from picture3d.structures.poses import Pose


def cloud(points: int = 4, **columns) -> PointCloud:
    return PointCloud(
        np.arange(3 * points, dtype=np.float32).reshape(points, 3), np.zeros(points, np.float32), IntensityUnit.UNIT, **columns
    )


def frame(points: PointCloud, **changes) -> Frame:
    return Frame("log", 3, "token", 0, points, changes.pop("pose", None), Pose.from_yaw(0.0, (0, 0, 1.8)), **changes)


@pytest.mark.parametrize("shape", [(4,), (4, 2), (3, 4), (4, 3, 1)])
def test_points_that_are_not_rows_of_three_are_refused(shape):
    with pytest.raises(ValueError, match=r"xyz must be \(N, 3\)"):
        PointCloud(np.zeros(shape, np.float32), np.zeros(4, np.float32), IntensityUnit.UNIT)


@pytest.mark.parametrize("column", ["ring", "elongation", "time_s"])
def test_a_column_of_another_length_is_named(column):
    with pytest.raises(ValueError, match=f"column {column} has 3 rows, xyz has 4"):
        cloud(4, **{column: np.zeros(3)})


def test_selecting_takes_the_same_rows_of_every_column():
    points = cloud(4, ring=np.arange(4, dtype=np.int16))
    chosen = points.select(np.array([2, 0]))
    assert chosen.xyz[:, 0].tolist() == [6.0, 0.0]
    assert chosen.ring is not None
    assert chosen.ring.tolist() == [2, 0]
    assert len(points.select(np.zeros(4, bool))) == 0
    assert list(points.columns()) == ["xyz", "intensity", "ring"]


def test_values_cannot_be_replaced():
    points = cloud()
    with pytest.raises(FrozenInstanceError):
        points.xyz = np.zeros((4, 3), np.float32)  # type: ignore[misc]


@pytest.mark.parametrize("column", ["labels", "instances"])
def test_a_frame_has_as_many_labels_as_points(column):
    with pytest.raises(ValueError, match=rf"log\[3\] has 5 {column} for 4 points"):
        frame(cloud(4), **{column: np.zeros(5, np.uint8)})


def test_the_lidar_pose_is_ego_after_calibration_and_none_without_poses():
    assert frame(cloud()).global_from_lidar is None
    pose = frame(cloud(), pose=Pose.from_yaw(np.pi / 2, (10, 0, 0))).global_from_lidar
    assert pose is not None
    np.testing.assert_allclose(pose.apply(np.array([[1.0, 0.0, 0.0]])), [[10.0, 1.0, 1.8]], atol=1e-12)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("center", np.zeros((1, 3))),
        ("size", np.zeros((2, 2))),
        ("yaw", np.zeros((2, 1))),
        ("velocity", np.zeros((2, 3))),
        ("num_points", np.zeros(3, np.int32)),
        ("track_id", ("a",)),
    ],
)
def test_a_box_column_of_another_shape_is_named(column, value):
    values = {
        "center": np.zeros((2, 3)),
        "size": np.ones((2, 3)),
        "yaw": np.zeros(2),
        "velocity": np.zeros((2, 2)),
        "category": ("car", "car"),
        "track_id": ("a", "b"),
        "num_points": np.zeros(2, np.int32),
    }
    with pytest.raises(ValueError, match=f"{column} has shape .* for 2 boxes"):
        Boxes(**{**values, column: value})
    assert len(Boxes(**values)) == 2
    assert len(Boxes.empty()) == 0


def test_selecting_boxes_takes_the_same_rows_of_every_column_by_index_or_mask():
    boxes = Boxes(
        center=np.arange(9.0).reshape(3, 3),
        size=np.ones((3, 3)),
        yaw=np.array([0.0, 0.1, 0.2]),
        velocity=np.zeros((3, 2)),
        category=("a", "b", "c"),
        track_id=("0", "1", "2"),
        num_points=np.array([5, 6, 7], np.int32),
        attribute=("", "moving", "parked"),
        difficulty=np.array([0, 1, 2], np.int8),
    )
    chosen = boxes.select(np.array([2, 0]))
    assert (chosen.category, chosen.track_id, chosen.attribute) == (("c", "a"), ("2", "0"), ("parked", ""))
    assert chosen.difficulty is not None
    assert (chosen.num_points.tolist(), chosen.difficulty.tolist(), chosen.yaw.tolist()) == ([7, 5], [2, 0], [0.2, 0.0])
    assert (chosen.acceleration, chosen.num_radar_points) == (None, None)
    assert boxes.select(np.array([False, True, False])).category == ("b",)
    assert len(boxes.select(np.zeros(3, bool))) == 0
    with pytest.raises(ValueError, match="difficulty has shape"):
        Boxes(np.zeros((1, 3)), np.ones((1, 3)), np.zeros(1), np.zeros((1, 2)), ("a",), ("0",), np.zeros(1, np.int32),
              difficulty=np.zeros(2, np.int8))  # fmt: skip
