"""Towns: the same for the same seed, every class near the car, boxes around their points, nothing on top of the car."""

from __future__ import annotations

import numpy as np
import pytest

from picture3d.formats.lidarseg_categories import INDEX_OF, LIDARSEG_CATEGORIES
from picture3d.synthetic.drive import DriveConfig, drive, drive_step
from picture3d.synthetic.ground import MARKING, ROAD
from picture3d.synthetic.world import Town, TownConfig, build_town

# The 16 classes that segmentation is scored on, by their lidarseg categories.
TRAINING_CLASSES = {
    "barrier": ["movable_object.barrier"],
    "bicycle": ["vehicle.bicycle"],
    "bus": ["vehicle.bus.rigid", "vehicle.bus.bendy"],
    "car": ["vehicle.car"],
    "construction_vehicle": ["vehicle.construction"],
    "motorcycle": ["vehicle.motorcycle"],
    "pedestrian": ["human.pedestrian.adult", "human.pedestrian.child", "human.pedestrian.construction_worker"],
    "traffic_cone": ["movable_object.trafficcone"],
    "trailer": ["vehicle.trailer"],
    "truck": ["vehicle.truck"],
    "driveable_surface": ["flat.driveable_surface"],
    "other_flat": ["flat.other"],
    "sidewalk": ["flat.sidewalk"],
    "terrain": ["flat.terrain"],
    "manmade": ["static.manmade"],
    "vegetation": ["static.vegetation"],
}


@pytest.fixture(scope="module", params=[1, 2])
def town(request) -> Town:
    return build_town(request.param)


def class_counts(town: Town, config: DriveConfig) -> np.ndarray:
    labels = np.concatenate([drive_step(town, config, i).sweep.labels for i in range(config.sweeps)])
    return np.bincount(labels, minlength=32)


def test_the_categories_are_thirty_two_and_named_once():
    assert len(LIDARSEG_CATEGORIES) == len(set(LIDARSEG_CATEGORIES)) == 32
    assert [INDEX_OF[name] for name in ("noise", "vehicle.car", "flat.driveable_surface", "vehicle.ego")] == [0, 17, 24, 31]


def test_the_same_seed_builds_the_same_town_and_another_seed_another(town):
    again, other = build_town(town.seed), build_town(town.seed + 100)
    near = [t.primitives_near(150.0, 150.0, 100.0, 3.0) for t in (town, again, other)]
    assert np.array_equal(near[0].center, near[1].center)
    assert np.array_equal(town.ground.cover, again.ground.cover)
    assert not np.array_equal(near[0].center[:50], near[2].center[:50])


def test_every_training_class_is_seen_on_a_short_drive(town):
    config = DriveConfig(keyframes=6, sweeps_per_keyframe=0, keyframe_gap_s=3.0)
    counts = class_counts(town, config)
    seen = {name: sum(int(counts[INDEX_OF[c]]) for c in members) for name, members in TRAINING_CLASSES.items()}
    assert min(seen.values()) >= 20, seen


def test_the_mix_of_classes_resembles_a_real_street(town):
    config = DriveConfig(keyframes=6, sweeps_per_keyframe=0, keyframe_gap_s=3.0)
    counts = class_counts(town, config)
    share = counts / counts.sum()
    assert 0.25 < share[INDEX_OF["flat.driveable_surface"]] < 0.55
    assert share[INDEX_OF["static.manmade"]] > 0.05
    assert share[INDEX_OF["static.vegetation"]] > 0.04
    assert counts.sum() / config.sweeps > 20_000


def test_boxes_contain_the_points_of_their_things_and_of_hardly_anything_else(town):
    config = DriveConfig(keyframes=3, sweeps_per_keyframe=0, keyframe_gap_s=4.0)
    inside = own = labelled = 0
    for i in range(config.sweeps):
        step = drive_step(town, config, i)
        boxes = step.boxes_global
        assert boxes is not None
        points = step.global_from_lidar.apply(step.sweep.points.xyz.astype(np.float64))
        for k in range(len(boxes)):
            mine = points[step.sweep.instances == int(boxes.track_id[k])] - boxes.center[k]
            c, s = np.cos(boxes.yaw[k]), np.sin(boxes.yaw[k])
            local = np.stack([c * mine[:, 0] + s * mine[:, 1], c * mine[:, 1] - s * mine[:, 0], mine[:, 2]], 1)
            within = (np.abs(local) <= boxes.size[k] / 2).all(1)
            own += len(mine)
            inside += int(within.sum())
            labels = step.sweep.labels[step.sweep.instances == int(boxes.track_id[k])]
            labelled += int((labels == INDEX_OF[boxes.category[k]]).sum())
            assert boxes.num_points[k] >= within.sum()
    assert own > 3000
    assert inside > 0.99 * own  # range noise carries a few through a face
    assert labelled == own


def test_nothing_drives_or_stands_where_the_car_is(town):
    for time_s in np.arange(0, 60, 1.0):
        ego = town.ego_pose(float(time_s))
        boxes = town.boxes(float(time_s))
        middle = ego.apply(np.array([[1.4, 0.0, 0.8]]))[0]
        offset = middle - boxes.center
        c, s = np.cos(boxes.yaw), np.sin(boxes.yaw)
        local = np.stack([c * offset[:, 0] + s * offset[:, 1], c * offset[:, 1] - s * offset[:, 0], offset[:, 2]], 1)
        assert not (np.abs(local) < boxes.size / 2).all(1).any(), f"at {time_s} s"


def test_the_car_stays_on_the_road_and_upright_on_its_slope(town):
    for time_s in np.arange(0, 90, 0.9):
        pose = town.ego_pose(float(time_s))
        x, y, z = pose.translation
        assert town.ground.code(np.array(x), np.array(y)) in (ROAD, MARKING)
        assert z == pytest.approx(float(town.ground.height(np.array(x), np.array(y))))
        np.testing.assert_allclose(pose.rotation @ pose.rotation.T, np.eye(3), atol=1e-12)
        assert pose.rotation[2, 2] > 0.99


def test_the_car_moves_at_a_varying_speed_and_turns(town):
    times = np.arange(0, 60, 0.5)
    poses = [town.ego_pose(float(t)) for t in times]
    speed = np.linalg.norm(np.diff([p.translation for p in poses], axis=0), axis=1) / 0.5
    assert 0.3 < speed.min() < speed.max() < 18
    assert speed.max() > 1.2 * speed.min()
    forward = np.array([p.rotation[:2, 0] for p in poses])
    moved = np.diff([p.translation[:2] for p in poses], axis=0)
    assert ((moved * forward[:-1]).sum(1) > 0.8 * np.linalg.norm(moved, axis=1)).all()  # it looks where it goes
    assert np.ptp(np.unwrap([p.yaw for p in poses])) > 1.0


def test_velocities_are_the_derivative_of_the_boxes(town):
    before, now, after = (town.boxes(t) for t in (9.9, 10.0, 10.1))
    travelled = (after.center - before.center)[:, :2] / 0.2
    np.testing.assert_allclose(now.velocity, travelled, atol=0.25)
    speed = np.linalg.norm(now.velocity, axis=1)
    standing = np.array([thing.way < 0 for thing in town.things])
    assert (speed[standing] == 0).all()
    assert (speed[~standing] > 0.5).mean() > 0.9


def test_without_traffic_nothing_moves():
    town = build_town(1, TownConfig(traffic=False))
    assert all(thing.way < 0 for thing in town.things)
    step = next(iter(drive(1, DriveConfig(keyframes=1, town=TownConfig(traffic=False)))))
    assert len(step.sweep.points) > 10_000


def test_instances_carry_the_label_of_their_category(town):
    step = drive_step(town, DriveConfig(keyframes=1), 0)
    owned = step.sweep.instances > 0
    expected = np.array([INDEX_OF[town.things[i - 1].category] for i in step.sweep.instances[owned]])
    assert (step.sweep.labels[owned] == expected).all()
    scenery = step.sweep.labels[~owned]
    assert {LIDARSEG_CATEGORIES[i].split(".")[0] for i in np.unique(scenery)} <= {"flat", "static"}
