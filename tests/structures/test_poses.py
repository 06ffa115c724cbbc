from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from picture3d.structures.poses import Pose

coordinate = st.floats(-1e4, 1e4, allow_nan=False)
part = st.floats(-1, 1, allow_nan=False)


@st.composite
def poses(draw: st.DrawFn) -> Pose:
    wxyz = draw(st.tuples(part, part, part, part).filter(lambda q: np.linalg.norm(q) > 1e-3))
    return Pose.from_quaternion(wxyz, draw(st.tuples(coordinate, coordinate, coordinate)))


def assert_same(a: Pose, b: Pose, tolerance_m: float = 1e-6) -> None:
    np.testing.assert_allclose(a.rotation, b.rotation, atol=1e-9)
    np.testing.assert_allclose(a.translation, b.translation, atol=tolerance_m)


@settings(max_examples=60, deadline=None)
@given(poses(), poses())
def test_composing_poses_is_multiplying_their_matrices(a, b):
    np.testing.assert_allclose((a @ b).matrix, a.matrix @ b.matrix, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(poses())
def test_a_pose_and_its_inverse_cancel(pose):
    assert_same(pose @ pose.inverse(), Pose.identity())
    assert_same(pose.inverse() @ pose, Pose.identity())
    np.testing.assert_allclose(pose.inverse().matrix, np.linalg.inv(pose.matrix), atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(poses())
def test_a_quaternion_there_and_back_is_the_same_rotation(pose):
    q = pose.quaternion_wxyz
    assert q[0] >= 0
    assert abs(np.linalg.norm(q) - 1) < 1e-12
    assert_same(Pose.from_quaternion(q, pose.translation), pose)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_half_turns_keep_their_axis(axis):
    wxyz = np.zeros(4)
    wxyz[1 + axis] = 1.0
    np.testing.assert_allclose(np.abs(Pose.from_quaternion(wxyz, np.zeros(3)).quaternion_wxyz), wxyz, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.floats(-3.1, 3.1))
def test_a_yaw_turns_x_towards_y(yaw):
    pose = Pose.from_yaw(yaw, (1.0, 2.0, 3.0))
    assert abs(pose.yaw - yaw) < 1e-12
    moved = pose.apply(np.array([[1.0, 0.0, 0.0]]))
    np.testing.assert_allclose(moved[0], [1 + np.cos(yaw), 2 + np.sin(yaw), 3.0], atol=1e-12)


def test_points_keep_their_dtype_and_no_points_stay_none():
    pose = Pose.from_yaw(0.3, (1.0, 0.0, 0.0))
    assert pose.apply(np.zeros((2, 3), np.float32)).dtype == np.float32
    assert pose.apply(np.zeros((0, 3))).shape == (0, 3)


@pytest.mark.parametrize("wxyz", [(0, 0, 0, 0), (np.nan, 0, 0, 1), (np.inf, 0, 0, 1)])
def test_a_quaternion_without_direction_is_refused(wxyz):
    with pytest.raises(ValueError, match="no direction"):
        Pose.from_quaternion(wxyz, np.zeros(3))


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"\(2, 2\)"):
        Pose(np.eye(2), np.zeros(3))
    with pytest.raises(ValueError, match=r"\(4,\)"):
        Pose(np.eye(3), np.zeros(4))
