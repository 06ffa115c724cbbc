"""Rays against surfaces whose distance can be written down, and what a sweep of a town must satisfy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from picture3d.datasets.label_sets import label_set
from picture3d.structures.poses import Pose
from picture3d.synthetic.drive import EGO_FROM_LIDAR, DriveConfig, count_points, drive
from picture3d.synthetic.ground import Ground
from picture3d.synthetic.lidar import SpinningLidar, scan
from picture3d.synthetic.primitives import BOX, CYLINDER, ELLIPSOID, Primitives, part, place
from picture3d.synthetic.raycast import cast, ray_fan

ELEVATIONS = np.deg2rad(np.linspace(-30.0, 10.0, 32))
FAN = ray_fan(720, ELEVATIONS)
EXACT = SpinningLidar(range_sigma_m=0.0, blind_share=0.0, reach=1e9)


def _one(kind: int, half: tuple[float, float, float], at: tuple[float, float, float], yaw: float = 0.0) -> Primitives:
    parts = np.array([part(kind, (0.0, 0.0, 0.0), half, reflectivity=100.0)])
    return place([parts], np.array([[*at, yaw]]), np.array([17], np.uint8), np.array([1], np.uint16))


def _hits(primitives: Primitives) -> tuple[np.ndarray, np.ndarray]:
    hits = cast(FAN, primitives, np.random.default_rng(0))
    rays = np.flatnonzero(hits.primitive >= 0)
    return rays, FAN.directions[rays].astype(np.float64) * hits.range_m[rays, None]


def test_a_sphere_is_hit_where_the_quadratic_formula_says():
    center, radius = np.array([6.0, 3.0, -0.5]), 1.5
    rays, points = _hits(_one(ELLIPSOID, (radius, radius, radius), (6.0, 3.0, -0.5)))
    d = FAN.directions.astype(np.float64)
    b = d @ center
    discriminant = b**2 - center @ center + radius**2
    expected = np.flatnonzero((discriminant > 1e-6) & (b > 0))
    assert set(expected) <= set(rays)
    assert len(rays) - len(expected) <= 2  # rays that graze
    np.testing.assert_allclose(np.linalg.norm(points - center, axis=1), radius, atol=2e-3)
    inner = np.isin(rays, expected)
    near = b[rays[inner]] - np.sqrt(discriminant[rays[inner]])
    np.testing.assert_allclose(np.linalg.norm(points[inner], axis=1), near, atol=2e-3)


@pytest.mark.parametrize("yaw", [0.0, 0.7])
def test_points_on_a_box_lie_on_one_of_its_faces_that_looks_at_the_sensor(yaw: float):
    half, at = (2.0, 1.0, 0.8), (8.0, -4.0, 0.0)
    rays, points = _hits(_one(BOX, half, at, yaw))
    assert len(rays) > 50
    local = Pose.from_yaw(yaw, at).inverse().apply(points)
    on_face = np.abs(np.abs(local) - np.array(half)) < 2e-3
    assert (on_face.any(1) & (np.abs(local) <= np.array(half) + 2e-3).all(1)).all()
    sensor = Pose.from_yaw(yaw, at).inverse().apply(np.zeros((1, 3)))[0]
    axis = on_face.argmax(1)
    rows = np.arange(len(local))
    outward = np.sign(local[rows, axis]) * (sensor[axis] - local[rows, axis])
    assert (outward > -1e-2).all()


def test_points_on_a_cylinder_lie_on_its_side_or_caps():
    _, points = _hits(_one(CYLINDER, (0.5, 0.5, 2.0), (-5.0, 2.0, 0.0)))
    local = points - np.array([-5.0, 2.0, 0.0])
    radius = np.hypot(local[:, 0], local[:, 1])
    side, cap = np.abs(radius - 0.5) < 2e-3, np.abs(np.abs(local[:, 2]) - 2.0) < 2e-3
    assert len(points) > 50
    assert (side | cap).all()


def test_what_is_near_hides_what_is_far():
    near, far = _one(BOX, (0.5, 3.0, 3.0), (4.0, 0.0, 0.0)), _one(BOX, (0.5, 1.0, 1.0), (9.0, 0.0, 0.0))
    hits = cast(FAN, far.joined(near), np.random.default_rng(0))
    assert (hits.primitive == 1).sum() > 100
    assert (hits.primitive == 0).sum() == 0


@dataclass(frozen=True)
class _EmptyWorld:
    ground: Ground

    def primitives_near(self, x: float, y: float, radius_m: float, time_s: float) -> Primitives:
        return Primitives.empty()


def test_an_empty_plane_returns_rings_of_ground_at_the_height_of_the_sensor():
    world = _EmptyWorld(Ground.flat())
    sweep = scan(world, Pose(np.eye(3), np.array([4.0, 4.0, 1.84])), 0.0, np.random.default_rng(0), EXACT)
    assert (sweep.instances == 0).all()
    assert len(np.unique(sweep.labels)) == 1
    assert len(sweep.points) > 1000
    xyz = sweep.points.xyz
    # Roughness pushes a return along its ray, never nearer.
    depth = 1.84 / np.sin(-np.arctan2(xyz[:, 2], np.hypot(xyz[:, 0], xyz[:, 1])))
    extra = np.linalg.norm(xyz, axis=1) - depth
    assert extra.min() > -0.02
    assert np.median(np.abs(extra)) < 0.05


def test_rings_tell_the_elevation():
    sweep = next(iter(drive(5, DriveConfig(keyframes=1)))).sweep
    xyz, ring = sweep.points.xyz, sweep.points.ring
    assert ring is not None
    elevation = np.rad2deg(np.arctan2(xyz[:, 2], np.hypot(xyz[:, 0], xyz[:, 1])))
    np.testing.assert_allclose(elevation, -30.67 + ring * (10.67 + 30.67) / 31, atol=1e-2)


def test_a_town_shows_every_class_and_its_boxes_hold_their_points():
    labels = label_set("nuscenes-32")
    seen = np.zeros(17, int)
    for seed in (5, 6, 7):
        step = list(drive(seed, DriveConfig(keyframes=2, sweeps_per_keyframe=0)))[-1]
        seen += np.bincount(labels.to_train(step.sweep.labels), minlength=17)
        boxes = step.boxes_global
        assert boxes is not None
        points = step.global_from_lidar.apply(step.sweep.points.xyz.astype(np.float64))
        np.testing.assert_array_equal(boxes.num_points, count_points(boxes, points))
        assert 15_000 < len(step.sweep.points) < 34_689
    assert (seen[1:] > 0).all(), dict(zip(labels.train_names, seen, strict=True))


def test_the_same_seed_drives_the_same_drive():
    config = DriveConfig(keyframes=2, sweeps_per_keyframe=1)
    one, two = list(drive(9, config)), list(drive(9, config))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a.sweep.points.xyz, b.sweep.points.xyz)
        np.testing.assert_array_equal(a.sweep.labels, b.sweep.labels)
        np.testing.assert_array_equal(a.global_from_ego.matrix, b.global_from_ego.matrix)
    later = list(drive(9, config, start=2))
    np.testing.assert_array_equal(later[0].sweep.points.xyz, one[2].sweep.points.xyz)


def test_the_sensor_stands_where_nuscenes_has_it():
    np.testing.assert_allclose(EGO_FROM_LIDAR.translation, [0.94, 0.0, 1.84])
    # y of the LiDAR looks along x of the car.
    np.testing.assert_allclose(EGO_FROM_LIDAR.rotation @ np.array([0.0, 1.0, 0.0]), [1.0, 0.0, 0.0], atol=1e-12)
