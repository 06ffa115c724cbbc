"""Points of range images, against the public definition in float64 and by hand."""

from __future__ import annotations

import numpy as np
import pytest

from picture3d.errors import DataError
from picture3d.formats.range_image import points_of_range_image
from picture3d.formats.waymo_frame import read_frame
from picture3d.formats.waymo_matrix import read_pixel_poses, read_range_image
from picture3d.structures.poses import Pose
from tests.made_waymo import Made, calibration, echo, floats, image_of, integers, laser, random_pose, streams_of
from tests.waymo_reference import SHAPES, Message, rotation_of, vehicle_points


def full_frame(rng: np.random.Generator, reach: float = 20_000) -> Made:
    """Five LiDARs of the real shapes, within `reach` metres of the origin, every pixel of TOP from a pose of its own."""
    pose = random_pose(rng, reach)
    made = Made(pose=pose.matrix)
    for name, shape in SHAPES.items():
        beams = np.sort(rng.uniform(-0.3, 0.05, shape[0])) if name == 1 else ()
        made.calibrations.append(calibration(name, random_pose(rng, 4).matrix, beams=beams, low=-1.5, high=0.5))
        poses = b""
        if name == 1:
            per_pixel = np.zeros((*shape, 6))
            per_pixel[..., :3] = rng.uniform(-1, 1, 3) + rng.normal(0, 0.01, (*shape, 3))
            per_pixel[..., 3:] = pose.translation + rng.normal(0, 0.5, (*shape, 3))
            poses = floats(per_pixel)
        camera = integers(np.zeros((*shape, 6), int))
        first = echo(floats(image_of(rng, *shape)), poses, camera=camera)
        made.lasers.append(laser(name, first, echo(floats(image_of(rng, *shape, share=0.02)), camera=camera)))
    return made


def test_points_are_those_of_the_definition_in_float64():
    data = full_frame(np.random.default_rng(0)).bytes()
    frame, message = read_frame(data), Message.of(data)
    found_streams = streams_of(frame)
    poses = read_pixel_poses(found_streams[1][0].pose, "poses")
    for name, returns in found_streams.items():
        for which, streams in enumerate(returns):
            image = read_range_image(streams.range_image, "image")
            calibrated = frame.calibrations[name]
            found = points_of_range_image(
                image,
                calibrated.inclinations(len(image), "image"),
                calibrated.vehicle_from_laser,
                pixel_poses=poses if name == 1 else None,
                global_from_vehicle=frame.global_from_vehicle,
            )
            expected = vehicle_points(message, name, which)
            assert len(expected) > 2000
            # Both in float64, 20 km from the origin; the bound is 1e-4 m.
            np.testing.assert_allclose(found.xyz, expected, rtol=0, atol=1e-8)
            row, column = np.nonzero(image[..., 0] > 0)
            assert np.array_equal(found.pixel, row * image.shape[1] + column)
            assert np.array_equal(found.intensity, image[row, column, 1])
            assert np.array_equal(found.elongation, image[row, column, 2])
            assert np.array_equal(found.no_label_zone, image[row, column, 3] == 1)


@pytest.mark.parametrize("yaw", [0.0, 1.0, -2.5])
def test_the_two_columns_of_a_tiny_image_look_left_and_right_however_the_laser_is_turned(yaw):
    image = np.array([[[2, 0.5, 0.1, -1], [3, 0.6, 0.2, 1]]], np.float32)
    found = points_of_range_image(image, np.zeros(1), Pose.from_yaw(yaw, (1.0, 0.0, 2.0)))
    np.testing.assert_allclose(found.xyz, [[1, 2, 2], [1, -3, 2]], atol=1e-12)
    assert found.no_label_zone.tolist() == [False, True]


def test_the_top_row_is_the_last_inclination():
    image = np.zeros((2, 1, 4), np.float32)
    image[0, 0, 0] = 10
    found = points_of_range_image(image, np.radians([-30.0, 30.0]), Pose.identity())
    np.testing.assert_allclose(found.xyz, [[10 * np.cos(np.pi / 6), 0, 5]], atol=1e-12)


def test_pixel_poses_equal_to_the_pose_of_the_frame_change_nothing():
    rng = np.random.default_rng(1)
    image, extrinsic = image_of(rng, 8, 50), random_pose(rng, 4)
    angles = rng.uniform(-0.5, 0.5, 3).astype(np.float32)
    place = rng.uniform(-100, 100, 3).astype(np.float32)
    pose = Pose(rotation_of(*angles.astype(np.float64)[:, None])[0], place.astype(np.float64))
    poses = np.broadcast_to(np.concatenate([angles, place]), (8, 50, 6))
    beams = np.linspace(-0.3, 0.1, 8)
    still = points_of_range_image(image, beams, extrinsic)
    moved = points_of_range_image(image, beams, extrinsic, pixel_poses=poses, global_from_vehicle=pose)
    np.testing.assert_allclose(moved.xyz, still.xyz, atol=1e-10)


def test_only_ranges_above_zero_are_points():
    image = np.zeros((1, 5, 4), np.float32)
    image[0, :, 0] = [-1, 0, np.nan, 1e-3, -np.inf]
    assert points_of_range_image(image, np.zeros(1), Pose.identity()).pixel.tolist() == [3]
    nothing = points_of_range_image(np.full((3, 4, 4), -1, np.float32), np.zeros(3), Pose.identity())
    assert nothing.xyz.shape == (0, 3)
    assert len(nothing.intensity) == len(nothing.no_label_zone) == 0


def test_shapes_that_do_not_belong_together_are_refused():
    image = np.ones((3, 4, 4), np.float32)
    with pytest.raises(DataError, match=r"TOP: shape .* 2 inclinations"):
        points_of_range_image(image, np.zeros(2), Pose.identity(), where="TOP")
    with pytest.raises(DataError, match=r"poses of its pixels have shape \(4, 3, 6\), expected \(3, 4, 6\)"):
        points_of_range_image(
            image,
            np.zeros(3),
            Pose.identity(),
            pixel_poses=np.zeros((4, 3, 6), np.float32),
            global_from_vehicle=Pose.identity(),
        )
