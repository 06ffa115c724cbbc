"""Five LiDARs: rays are pixels of the public definition, sectors look from their places, second echoes come from behind."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from picture3d.formats.lidarseg_categories import INDEX_OF
from picture3d.structures.poses import Pose
from picture3d.synthetic.ground import Ground
from picture3d.synthetic.primitives import BOX, Primitives, part, place
from picture3d.synthetic.waymo_lidar import LASERS, TOP, EchoModel, Laser, Shot, euler_of, pose_of, scan_pixels

HERE = Pose(np.eye(3), np.array([4.0, 4.0, 0.0]))
ROAD = Ground.flat()
SHARP = EchoModel(max_range_m=75.0, range_sigma_m=0.0, reach=1e9, blind_share=0.0)


def sharp(laser: Laser) -> Laser:
    return replace(laser, echoes=SHARP)


def standing(*parts: list[float], label: str = "static.manmade", at: tuple[float, float] = (4.0, 4.0)) -> Primitives:
    """Parts whose positions are relative to the car."""
    index = np.array([INDEX_OF[label]], np.uint8)
    return place([np.array(parts)], np.array([[*at, 0, 0]]), index, np.zeros(1, np.uint16))


def whole(laser: Laser, pose: Pose = HERE) -> list[Shot]:
    return [Shot(pose, laser.first_column, laser.field_columns)]


def defined_direction(laser: Laser, row: int, column: int) -> np.ndarray:
    """LiDAR frame, from the definition, one pixel at a time."""
    if laser.beam_inclinations is None:
        beams = [
            (k + 0.5) / laser.height * (laser.inclination_max - laser.inclination_min) + laser.inclination_min
            for k in range(laser.height)
        ]
    else:
        beams = list(laser.beam_inclinations)
    up = beams[::-1][row]
    matrix = laser.vehicle_from_laser.matrix
    ratio = (laser.width - column - 0.5) / laser.width
    azimuth = (ratio * 2 - 1) * np.pi - np.arctan2(matrix[1, 0], matrix[0, 0])
    return np.array([np.cos(azimuth) * np.cos(up), np.sin(azimuth) * np.cos(up), np.sin(up)])


@pytest.mark.parametrize("laser", LASERS, ids=lambda laser: str(laser.name))
def test_pixels_and_the_fans_rays_look_where_the_definition_says(laser):
    fan, laser_from_fan = laser.fan()
    rng = np.random.default_rng(laser.name)
    rows, columns = rng.integers(0, laser.height, 40), rng.integers(0, laser.width, 40)
    expected = np.stack([defined_direction(laser, r, c) for r, c in zip(rows, columns, strict=True)])
    np.testing.assert_allclose(laser.directions(rows * laser.width + columns), expected, atol=1e-14)
    rays = fan.directions[columns * fan.rings + laser.height - 1 - rows]
    np.testing.assert_allclose(laser_from_fan.apply(rays.astype(np.float64)), expected, atol=3e-7)


def test_the_sizes_are_those_of_the_dataset():
    assert [(laser.name, laser.height, laser.width) for laser in LASERS] == [
        (1, 64, 2650), (2, 200, 600), (3, 200, 600), (4, 200, 600), (5, 200, 600),
    ]  # fmt: skip
    steps = np.diff(LASERS[0].inclinations)
    assert (steps > 0).all()
    assert steps.max() / steps.min() > 2  # not evenly spaced
    for laser in LASERS:
        assert laser.inclination_min < laser.inclinations[0]
        assert laser.inclinations[-1] < laser.inclination_max


@pytest.mark.parametrize("laser", LASERS, ids=lambda laser: str(laser.name))
def test_points_on_level_ground_lie_on_it_and_inside_the_field_of_view(laser):
    first, second = scan_pixels(sharp(laser), whole(laser), Primitives.empty(), ROAD, np.random.default_rng(0))
    assert len(first) > 10_000
    assert len(second) == 0
    np.testing.assert_allclose(first.xyz_global[:, 2], 0.0, atol=2e-4)
    assert len(np.unique(first.pixel)) == len(first)
    if laser.name != TOP:
        mount = HERE @ laser.vehicle_from_laser
        offset = first.xyz_global - mount.translation
        outward = offset[:, 0] * np.cos(laser.outward_rad) + offset[:, 1] * np.sin(laser.outward_rad)
        # Mounts are tilted by a degree or two, so the edge of the field of view leans.
        assert (outward > -0.05 * np.linalg.norm(offset, axis=1)).all()


def test_points_on_a_wall_straight_ahead_are_in_the_middle_columns_of_the_top_lidar():
    laser = LASERS[0]
    wall = standing(part(BOX, (20.5, 0, 5.0), (0.5, 2.0, 5.0), reflectivity=50))
    first, _ = scan_pixels(sharp(laser), whole(laser), wall, ROAD, np.random.default_rng(0))
    hit = first.primitive == 0
    np.testing.assert_allclose(first.xyz_global[hit, 0], 24.0, atol=2e-4)
    column = first.pixel[hit] % laser.width
    assert abs(column.mean() - (laser.width - 1) / 2) < 5
    # Left of the car, y is larger and the column smaller.
    assert np.corrcoef(column, first.xyz_global[hit, 1])[0, 1] < -0.99


def test_columns_of_several_places_see_the_same_wall_from_each():
    laser = LASERS[0]
    wall = standing(part(BOX, (20.5, 0, 5.0), (0.5, 60.0, 5.0), reflectivity=50))
    places = [Pose(np.eye(3), np.array([4.0 + k, 4.0, 0.0])) for k in range(5)]
    shots = [Shot(pose, 530 * k, 530) for k, pose in enumerate(places)]
    first, _ = scan_pixels(sharp(laser), shots, wall, ROAD, np.random.default_rng(0))
    hit = first.primitive == 0
    np.testing.assert_allclose(first.xyz_global[hit, 0], 24.0, atol=3e-4)
    for k, pose in enumerate(places):
        there = first.pixel % laser.width // 530 == k
        away = np.linalg.norm(first.xyz_global - (pose @ laser.vehicle_from_laser).translation, axis=1)
        np.testing.assert_allclose(away[there], first.range_m[there], rtol=1e-6)


def test_second_echoes_come_from_the_wall_behind_the_leaves():
    laser = LASERS[0]
    hedge = part(BOX, (10.0, 0, 5.0), (0.4, 3.0, 5.0), reflectivity=20, free_path=0.1)
    wall = part(BOX, (15.0, 0, 5.0), (0.5, 9.0, 5.0), reflectivity=50)
    hidden = part(BOX, (17.0, 0, 5.0), (0.5, 9.0, 5.0), reflectivity=50)
    near = standing(hedge, wall, hidden)
    first, second = scan_pixels(sharp(laser), whole(laser), near, ROAD, np.random.default_rng(0))
    in_leaves = first.primitive == 0
    assert in_leaves.sum() > 1000
    assert np.isin(second.pixel, first.pixel[in_leaves]).all()
    # Only where the ground is less than a metre behind the leaves there is no second echo.
    without = in_leaves & ~np.isin(first.pixel, second.pixel)
    assert first.xyz_global[without, 2].max() < 0.25
    assert set(np.unique(second.primitive)) == {-1, 1}
    np.testing.assert_allclose(second.xyz_global[second.primitive == 1, 0], 18.5, atol=2e-4)
    np.testing.assert_allclose(second.xyz_global[second.primitive == -1, 2], 0.0, atol=2e-4)
    by_pixel = dict(zip(first.pixel.tolist(), first.range_m.tolist(), strict=True))
    assert all(r > by_pixel[p] + 0.99 for p, r in zip(second.pixel.tolist(), second.range_m.tolist(), strict=True))
    assert first.elongation[in_leaves].min() > first.elongation[first.primitive == 1].min()


def test_a_second_echo_needs_a_first_one():
    laser = replace(LASERS[0], echoes=SHARP._replace(blind_share=0.5))
    hedge = part(BOX, (10.0, 0, 5.0), (0.4, 3.0, 5.0), reflectivity=20, free_path=0.1)
    first, second = scan_pixels(laser, whole(laser), standing(hedge), ROAD, np.random.default_rng(0))
    assert 0 < len(second) < 0.4 * len(first)
    assert np.isin(second.pixel, first.pixel).all()


def test_the_same_generator_gives_the_same_echoes():
    laser, near = LASERS[2], standing(part(BOX, (3, 6, 1), (1, 1, 1), reflectivity=40))
    a, _ = scan_pixels(laser, whole(laser), near, ROAD, np.random.default_rng(3))
    b, _ = scan_pixels(laser, whole(laser), near, ROAD, np.random.default_rng(3))
    assert np.array_equal(a.pixel, b.pixel)
    assert np.array_equal(a.range_m, b.range_m)


def test_euler_angles_turn_about_x_then_y_then_z():
    def about(axis: int, angle: float) -> np.ndarray:
        c, s = np.cos(angle), np.sin(angle)
        i, j = [(1, 2), (2, 0), (0, 1)][axis]
        out = np.eye(3)
        out[i, i] = out[j, j] = c
        out[i, j], out[j, i] = -s, s
        return out

    rng = np.random.default_rng(0)
    for _ in range(20):
        roll, pitch, yaw = rng.uniform((-3, -1.5, -3), (3, 1.5, 3))
        pose = pose_of(np.array([roll, pitch, yaw, 1.0, 2.0, 3.0]))
        np.testing.assert_allclose(pose.rotation, about(2, yaw) @ about(1, pitch) @ about(0, roll), atol=1e-14)
        np.testing.assert_allclose(euler_of(pose), [roll, pitch, yaw, 1, 2, 3], atol=2e-6)
