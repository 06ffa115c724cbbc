"""What is annotated: types and classes of things and surfaces, and the no-label zone's outline."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from picture3d.formats.lidarseg_categories import INDEX_OF
from picture3d.synthetic import scenery, shapes, waymo_truth
from picture3d.synthetic.ground import MARKING, OTHER_FLAT, PARKING, ROAD, SIDEWALK, TERRAIN
from picture3d.synthetic.primitives import Primitives, place
from picture3d.synthetic.waymo_lidar import Returns
from picture3d.synthetic.waymo_truth import NoLabelZone, no_label_zone, point_classes, things_near
from picture3d.synthetic.world import build_town

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def town():
    return build_town(3)


def echoes(primitive: np.ndarray, cover: np.ndarray) -> Returns:
    n = len(primitive)
    zero = np.zeros(n, np.float32)
    return Returns(
        pixel=np.arange(n), range_m=zero, intensity=zero, elongation=zero, xyz_global=np.zeros((n, 3)),
        label=np.zeros(n, np.uint8), primitive=primitive.astype(np.int32), cover=cover.astype(np.uint8),
        instance=np.zeros(n, np.uint16),
    )  # fmt: skip


def classes_of(parts: np.ndarray, label: str, *, instance: int = 0, things: tuple = ()) -> set[int]:
    near = place([parts], np.zeros((1, 4)), np.array([INDEX_OF[label]], np.uint8), np.array([instance], np.uint16))
    found = point_classes(SimpleNamespace(things=things), near, echoes(np.arange(len(near)), np.zeros(len(near))))  # type: ignore[arg-type]
    return set(found.tolist())


def test_every_cover_of_the_ground_has_its_class():
    codes = np.array([ROAD, MARKING, PARKING, OTHER_FLAT, SIDEWALK, TERRAIN])
    found = point_classes(SimpleNamespace(things=()), Primitives.empty(), echoes(np.full(6, -1), codes))  # type: ignore[arg-type]
    assert found.tolist() == [18, 19, 18, 20, 22, 21]


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("vehicle.car", 1), ("vehicle.truck", 2), ("vehicle.bus.bendy", 3), ("vehicle.trailer", 4),
        ("vehicle.construction", 4), ("human.pedestrian.child", 7), ("movable_object.trafficcone", 11),
        ("movable_object.barrier", 0),
    ],
)  # fmt: skip
def test_every_category_has_its_class(label, expected):
    assert classes_of(shapes.car(RNG), label) == {expected}


def test_a_bicycle_with_a_rider_is_a_bicyclist():
    things = tuple(SimpleNamespace(attribute=name) for name in ("cycle.without_rider", "cycle.with_rider"))
    parts = shapes.bicycle(RNG, ridden=True)
    assert classes_of(parts, "vehicle.bicycle", instance=1, things=things) == {12}
    assert classes_of(parts, "vehicle.bicycle", instance=2, things=things) == {6}
    assert classes_of(parts, "vehicle.motorcycle", instance=1, things=things) == {13}
    assert classes_of(parts, "vehicle.motorcycle", instance=2, things=things) == {5}


def test_street_furniture_and_plants_are_told_apart_by_their_parts():
    assert classes_of(scenery.sign(RNG), "static.manmade") == {8, 10}  # plate and post
    assert classes_of(scenery.traffic_light(RNG), "static.manmade") >= {9, 10}
    assert 10 in classes_of(scenery.lamp(RNG), "static.manmade")
    assert classes_of(scenery.building(RNG, 10, 8, 6), "static.manmade") == {14}
    assert classes_of(scenery.tree(RNG), "static.vegetation") == {15, 16}


def test_points_are_inside_an_outline_that_is_not_convex():
    zone = NoLabelZone("L", np.array([[0, 0], [4, 0], [4, 1], [1, 1], [1, 3], [0, 3]], float))
    xy = np.array([[0.5, 0.5], [3.5, 0.5], [0.5, 2.5], [2, 2], [-0.1, 1], [4.1, 0.5], [0.5, 3.1], [1.01, 1.01]])
    assert zone.contains(xy).tolist() == [True, True, True, False, False, False, False, False]
    assert zone.contains(np.zeros((0, 2))).tolist() == []
    backwards = NoLabelZone("L", zone.outline[::-1])
    assert np.array_equal(backwards.contains(xy), zone.contains(xy))


def test_the_zone_lies_beside_the_way_of_the_car(town):
    zone = no_label_zone(town)
    way = np.stack([town.ego_pose(t).translation[:2] for t in np.arange(0, 4, 0.1)])
    assert not zone.contains(way).any()
    assert np.linalg.norm(zone.outline[:, None] - way[None], axis=2).min() < 12


def test_things_have_types_of_the_specification_and_signs_are_plates(town):
    centre = town.ego_pose(1.0).translation
    near = town.primitives_near(float(centre[0]), float(centre[1]), 80.0, 1.0)
    labelled = things_near(town, near, centre, 1.0)
    ids = [name.split("-") for name in labelled.boxes.track_id]
    for (_, _, *rest), kind in zip(ids, labelled.type.tolist(), strict=True):
        if rest[0] == "sign":
            assert kind == waymo_truth.SIGN
            continue
        thing = town.things[int(rest[0]) - 1]
        assert thing.category.startswith(("vehicle.", "human.pedestrian."))
        assert kind == (4 if thing.category == "vehicle.bicycle" else {"v": 1, "h": 2}[thing.category[0]])
        assert thing.category != "vehicle.bicycle" or thing.attribute == "cycle.with_rider"
    assert set(labelled.type.tolist()) == {1, 2, 3, 4}
    signs = labelled.boxes.select(labelled.type == waymo_truth.SIGN)
    assert (signs.size[:, 0] < 0.3).all()  # thin along the heading
    assert (signs.size[:, 1:] > 0.6).all()
    assert len(set(labelled.boxes.track_id)) == len(labelled.boxes)
    assert np.linalg.norm(labelled.boxes.center[:, :2] - centre[:2], axis=1).max() < 76


def test_acceleration_is_the_change_of_velocity(town):
    centre = town.ego_pose(1.0).translation
    before, now, after = (things_near(town, Primitives.empty(), centre, 1.0 + k * 0.02).boxes for k in (-1, 0, 1))
    row = {name: k for k, name in enumerate(now.track_id)}
    common = [name for name in now.track_id if name in before.track_id and name in after.track_id]
    assert now.acceleration is not None
    found = np.array([now.acceleration[row[name]] for name in common])
    change = np.array([after.velocity[after.track_id.index(n)] - before.velocity[before.track_id.index(n)] for n in common])
    moving = np.abs(found).max(1) > 0.05
    assert moving.sum() > 5
    # Both are differences over ways made of short straight pieces; at their corners they differ.
    assert np.median(np.abs(found - change / 0.04)[moving]) < 0.1
    assert (np.abs(found[~moving] - change[~moving] / 0.04) < 0.1).mean() > 0.9
