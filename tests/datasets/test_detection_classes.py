"""From the categories of datasets to the classes of a head."""

from __future__ import annotations

from picture3d.datasets.detection_classes import NUSCENES_DETECTION, WAYMO_DETECTION, DetectionClasses
from picture3d.formats.lidarseg_categories import LIDARSEG_CATEGORIES
from picture3d.formats.nuscenes_results import CLASSES


def test_the_nuscenes_categories_of_the_detection_challenge_get_its_ten_classes():
    found = dict(zip(LIDARSEG_CATEGORIES, NUSCENES_DETECTION.of(LIDARSEG_CATEGORIES), strict=True))
    counted = {name: NUSCENES_DETECTION.names[index - 1] for name, index in found.items() if index}
    assert len(counted) == 14  # of 23 categories that boxes have
    assert set(counted.values()) == set(CLASSES) == set(NUSCENES_DETECTION.names)
    assert found["human.pedestrian.personal_mobility"] == found["animal"] == found["static_object.bicycle_rack"] == 0


def test_a_class_is_its_own_category_in_capitals_or_not():
    assert WAYMO_DETECTION.of(["VEHICLE", "Sign", "cyclist", "Pedestrian", ""]).tolist() == [1, 0, 3, 2, 0]
    assert DetectionClasses(("REGULAR_VEHICLE",)).of(["regular_vehicle", "BUS"]).tolist() == [1, 0]
    assert DetectionClasses(("car",)).of([]).shape == (0,)


def test_a_truck_of_once_is_a_vehicle_only_where_there_is_no_class_for_trucks():
    assert DetectionClasses(("Vehicle", "Truck")).of(["Car", "Truck", "Bus"]).tolist() == [1, 2, 1]
    assert WAYMO_DETECTION.of(["vehicle.car", "vehicle.truck"]).tolist() == [0, 0]
