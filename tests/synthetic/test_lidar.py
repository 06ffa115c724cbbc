"""The sensor: beams, frames, noise, labels; looked at in worlds of one object."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from picture3d.formats.lidarseg_categories import INDEX_OF
from picture3d.structures.points import IntensityUnit
from picture3d.structures.poses import Pose
from picture3d.synthetic.ground import Ground
from picture3d.synthetic.lidar import SpinningLidar, scan
from picture3d.synthetic.primitives import BOX, Primitives, part, place

HIGH = Pose(np.eye(3), np.array([4.0, 4.0, 1.84]))
SHARP = SpinningLidar(range_sigma_m=0.0, blind_share=0.0, reach=1e9)


@dataclass(frozen=True)
class Stage:
    """Level road and whatever is put on it."""

    primitives: Primitives = field(default_factory=Primitives.empty)
    ground: Ground = field(default_factory=Ground.flat)

    def primitives_near(self, x: float, y: float, radius_m: float, time_s: float) -> Primitives:
        return self.primitives


def box_on_road(x: float, y: float, reflectivity: float = 50.0) -> Stage:
    rows = np.array([part(BOX, (0, 0, 1.0), (1, 1, 1), reflectivity=reflectivity)])
    return Stage(
        place([rows], np.array([[x, y, 0, 0]]), np.array([INDEX_OF["vehicle.car"]], np.uint8), np.array([7], np.uint16))
    )


def test_ring_zero_is_the_lowest_beam_and_every_ring_has_its_elevation():
    sweep = scan(box_on_road(8, 4), HIGH, 0.0, np.random.default_rng(0))
    xyz, ring = sweep.points.xyz.astype(np.float64), sweep.points.ring
    assert ring is not None
    elevation = np.degrees(np.arcsin(xyz[:, 2] / np.linalg.norm(xyz, axis=1)))
    np.testing.assert_allclose(elevation, np.linspace(-30.67, 10.67, 32)[ring], atol=1e-3)
    assert ring.min() == 0


def test_points_come_azimuth_by_azimuth_and_upwards_in_each():
    sweep = scan(Stage(), HIGH, 0.0, np.random.default_rng(0))
    xyz, ring = sweep.points.xyz, sweep.points.ring
    assert ring is not None
    azimuth = np.round((np.pi - np.arctan2(xyz[:, 1], xyz[:, 0])) / (2 * np.pi) * 1084).astype(int) % 1084
    assert (np.diff(azimuth * 32 + ring) > 0).all()


def test_an_empty_world_gives_ground_only():
    sweep = scan(Stage(), HIGH, 0.0, np.random.default_rng(0))
    assert set(np.unique(sweep.labels)) == {INDEX_OF["flat.driveable_surface"]}
    assert (sweep.instances == 0).all()
    np.testing.assert_allclose(sweep.points.xyz[:, 2], -1.84, atol=0.1)


def test_without_noise_points_lie_on_the_object_in_the_sensors_axes():
    # The car heads north (global +y); the sensor's x is to its right, that is east, its y forward.
    sweep = scan(box_on_road(9, 4), HIGH, 0.0, np.random.default_rng(0), SHARP)
    on_box = sweep.labels == INDEX_OF["vehicle.car"]
    assert (sweep.instances[on_box] == 7).all()
    assert on_box.sum() > 100
    front = sweep.points.xyz[on_box]
    assert (np.isclose(front[:, 0], 4.0, atol=1e-3) | np.isclose(front[:, 2], 0.16, atol=1e-3)).all()
    assert sweep.visible_share[7] == pytest.approx(1.0, abs=0.1)  # its foot may be lost to the road


def test_the_pose_carries_points_back_to_where_things_are():
    pose = Pose.from_yaw(0.7, (4.0, 4.0, 1.84))
    stage = box_on_road(-3, 9)
    sweep = scan(stage, pose, 0.0, np.random.default_rng(0), SHARP)
    points = pose.apply(sweep.points.xyz[sweep.labels == INDEX_OF["vehicle.car"]].astype(np.float64))
    assert len(points) > 50
    assert (np.abs(points - (-3, 9, 1)) <= 1.001).all()


def test_a_thing_behind_another_is_less_visible():
    hidden = box_on_road(14, 4)
    wall = place(
        [np.array([part(BOX, (0, 0, 1.5), (0.1, 0.6, 1.5), reflectivity=30.0)])],
        np.array([[9.0, 4.0, 0, 0]]),
        np.array([INDEX_OF["static.manmade"]], np.uint8),
        np.array([0], np.uint16),
    )
    both = Stage(hidden.primitives.joined(wall))
    assert scan(both, HIGH, 0.0, np.random.default_rng(0)).visible_share[7] < 0.6


def test_range_noise_has_the_stated_size():
    lidar = SpinningLidar(blind_share=0.0, reach=1e9)
    noisy = scan(Stage(), HIGH, 0.0, np.random.default_rng(0), lidar).points.xyz
    sharp = scan(Stage(), HIGH, 0.0, np.random.default_rng(0), SHARP).points.xyz
    error = np.linalg.norm(noisy.astype(np.float64), axis=1) - np.linalg.norm(sharp.astype(np.float64), axis=1)
    assert error.std() == pytest.approx(0.02, rel=0.05)


def test_dark_and_far_things_return_less():
    def returns(x: float, reflectivity: float) -> int:
        sweep = scan(box_on_road(x, 4, reflectivity), HIGH, 0.0, np.random.default_rng(0))
        return int((sweep.instances == 7).sum())

    assert returns(54, 3.0) < 0.8 * returns(54, 90.0)


def test_intensity_is_a_byte_and_follows_the_material():
    dark, bright = (scan(box_on_road(9, 4, r), HIGH, 0.0, np.random.default_rng(0)) for r in (10.0, 80.0))
    for sweep in (dark, bright):
        values = sweep.points.intensity
        assert sweep.points.intensity_unit is IntensityUnit.RAW_255
        assert values.dtype == np.float32
        assert values.min() >= 0
        assert values.max() <= 255
        assert (values == np.rint(values)).all()
    assert np.median(bright.points.intensity[bright.instances == 7]) > 4 * np.median(dark.points.intensity[dark.instances == 7])
