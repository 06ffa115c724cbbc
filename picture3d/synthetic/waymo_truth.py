"""What the Waymo Open Dataset would annotate in a town: boxes of four types, 23 classes of points, a no-label zone.

Types follow the public labeling specification (vehicles, motorcycles included, pedestrians, cyclists, signs; no parked
bicycles, cones or barriers); classes are those of ``segmentation.proto``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from picture3d.formats.lidarseg_categories import INDEX_OF, LIDARSEG_CATEGORIES
from picture3d.structures.boxes import Boxes
from picture3d.synthetic.primitives import BOX, CYLINDER, Primitives
from picture3d.synthetic.scenery import SIGN_PLATE_REFLECTIVITY, TRAFFIC_LIGHT_REFLECTIVITY
from picture3d.synthetic.waymo_lidar import Returns
from picture3d.synthetic.world import BOX_MARGIN_M, Town

VEHICLE, PEDESTRIAN, SIGN, CYCLIST = 1, 2, 3, 4  # Label.Type
TYPE_NAMES = {VEHICLE: "vehicle", PEDESTRIAN: "pedestrian", SIGN: "sign", CYCLIST: "cyclist"}
BOX_RADIUS_M = 75.0

# Segmentation.Type
UNDEFINED, CAR, TRUCK, BUS, OTHER_VEHICLE, MOTORCYCLIST, BICYCLIST, PERSON, SIGN_CLASS, TRAFFIC_LIGHT, POLE = range(11)
CONE, BICYCLE, MOTORCYCLE, BUILDING, VEGETATION, TREE_TRUNK, CURB, ROAD_CLASS, LANE_MARKER, OTHER_GROUND = range(11, 21)
WALKABLE, SIDEWALK_CLASS = 21, 22

# By cover code: road, marking, parking, other flat, sidewalk, terrain.
_COVER_CLASS = np.array([ROAD_CLASS, LANE_MARKER, ROAD_CLASS, OTHER_GROUND, SIDEWALK_CLASS, WALKABLE], np.uint8)
_CLASS_OF_CATEGORY = {
    "vehicle.car": CAR,
    "vehicle.emergency.police": CAR,
    "vehicle.truck": TRUCK,
    "vehicle.emergency.ambulance": TRUCK,
    "vehicle.bus.rigid": BUS,
    "vehicle.bus.bendy": BUS,
    "vehicle.trailer": OTHER_VEHICLE,
    "vehicle.construction": OTHER_VEHICLE,
    "vehicle.motorcycle": MOTORCYCLE,
    "vehicle.bicycle": BICYCLE,
    "movable_object.trafficcone": CONE,
    "static.manmade": BUILDING,
    "static.vegetation": VEGETATION,
}
_CLASS_OF_LABEL = np.array(
    [
        PERSON if name.startswith("human.pedestrian") else _CLASS_OF_CATEGORY.get(name, UNDEFINED)
        for name in LIDARSEG_CATEGORIES
    ],
    np.uint8,
)
_POLE_RADIUS_M = 0.3


@dataclass(frozen=True, slots=True, eq=False)
class NoLabelZone:
    """An area of the global frame without labels, given by its outline."""

    id: str
    outline: NDArray[np.float64]  # (n, 2) corners in order, not closed; need not be convex

    def contains(self, xy: NDArray[np.float64]) -> NDArray[np.bool_]:
        """(n,) bool for points (n, 2): an odd number of edges lies to the right of the point."""
        inside = np.zeros(len(xy), bool)
        x, y = xy[:, 0], xy[:, 1]
        for (x0, y0), (x1, y1) in zip(self.outline, np.roll(self.outline, -1, 0), strict=True):
            if y0 == y1:
                continue
            inside ^= ((y0 > y) != (y1 > y)) & (x < x0 + (y - y0) * ((x1 - x0) / (y1 - y0)))
        return inside


def no_label_zone(town: Town) -> NoLabelZone:
    """An L-shaped yard to the right of the road, that the car passes in its first seconds."""
    pose = town.ego_pose(2.0)
    c, s = np.cos(pose.yaw), np.sin(pose.yaw)
    corners = np.array([[-14, -7], [-14, -33], [20, -33], [20, -20], [4, -20], [4, -7]], np.float64)
    turned = np.stack([c * corners[:, 0] - s * corners[:, 1], s * corners[:, 0] + c * corners[:, 1]], 1)
    return NoLabelZone(f"town-{town.seed}-yard", turned + pose.translation[:2])


@dataclass(frozen=True, slots=True, eq=False)
class LabelledThings:
    """Everything of the four types near the car, in the global frame; rows of all columns belong together."""

    boxes: Boxes  # category is the type's name; velocity and acceleration along the global axes
    type: NDArray[np.int64]  # (B,) Label.Type


def things_near(town: Town, near: Primitives, center: NDArray[np.float64], time_s: float) -> LabelledThings:
    """What would be annotated within `BOX_RADIUS_M` of `center` (3,), were it seen; points are not counted yet."""
    types = np.array([_type_of(thing.category, thing.attribute) for thing in town.things], np.int64)
    away = np.linalg.norm(town.poses(time_s)[:, :2] - center[:2], axis=1)
    rows = np.flatnonzero((away < BOX_RADIUS_M) & (types > 0))
    boxes = town.boxes(time_s, rows)
    step = 0.05
    before, now, after = (town.poses(time_s + k * step)[rows, :2] for k in (-1, 0, 1))
    acceleration = (after - 2 * now + before) / step**2
    # Signs stand on the side of the road as scenery; a sign's label is its plate.
    plates = np.flatnonzero(_plates(near))
    plates = plates[np.linalg.norm(near.center[plates, :2] - center[:2], axis=1) < BOX_RADIUS_M]
    place = near.center[plates]
    types = np.concatenate([types[rows], np.full(len(plates), SIGN)])
    return LabelledThings(
        Boxes(
            center=np.concatenate([boxes.center, place]),
            size=np.concatenate([boxes.size, 2 * near.half[plates] + 2 * BOX_MARGIN_M]),
            yaw=np.concatenate([boxes.yaw, np.arctan2(near.rotation[plates, 1, 0], near.rotation[plates, 0, 0])]),
            velocity=np.concatenate([boxes.velocity, np.zeros((len(plates), 2))]),
            category=tuple(TYPE_NAMES[int(kind)] for kind in types),
            track_id=(
                *(f"town-{town.seed}-{name}" for name in boxes.track_id),
                *(f"town-{town.seed}-sign-{x * 100:.0f}-{y * 100:.0f}-{z * 100:.0f}" for x, y, z in place),
            ),
            num_points=np.full(len(types), -1, np.int32),
            acceleration=np.concatenate([acceleration, np.zeros((len(plates), 2))]),
        ),
        types,
    )


def point_classes(town: Town, near: Primitives, returns: Returns) -> NDArray[np.uint8]:
    """(n,) Segmentation.Type of each echo; `near` are the primitives that its rows count."""
    of_primitive = _CLASS_OF_LABEL[near.label]
    manmade = near.label == INDEX_OF["static.manmade"]
    of_primitive[manmade & (near.kind == CYLINDER) & (near.half[:, 0] < _POLE_RADIUS_M)] = POLE
    of_primitive[_plates(near)] = SIGN_CLASS
    of_primitive[manmade & (near.kind == BOX) & (near.reflectivity == TRAFFIC_LIGHT_REFLECTIVITY)] = TRAFFIC_LIGHT
    vegetation = near.label == INDEX_OF["static.vegetation"]
    of_primitive[vegetation & (near.kind == CYLINDER) & (near.free_path == 0)] = TREE_TRUNK
    ridden = np.array([False, *(thing.attribute == "cycle.with_rider" for thing in town.things)])[near.instance]
    of_primitive[ridden & (of_primitive == BICYCLE)] = BICYCLIST
    of_primitive[ridden & (of_primitive == MOTORCYCLE)] = MOTORCYCLIST
    on_ground = _COVER_CLASS[returns.cover]
    return np.where(returns.primitive >= 0, of_primitive[returns.primitive], on_ground) if len(near) else on_ground


def _plates(near: Primitives) -> NDArray[np.bool_]:
    """(P,) bool: plates of traffic signs."""
    solid_box = (near.kind == BOX) & (near.free_path == 0) & (near.instance == 0)
    return solid_box & (near.reflectivity == np.float32(SIGN_PLATE_REFLECTIVITY))


def _type_of(category: str, attribute: str) -> int:
    """Label.Type of a thing of the town, 0 if it is not annotated."""
    if category == "vehicle.bicycle":
        return CYCLIST if attribute == "cycle.with_rider" else 0
    if category.startswith("vehicle."):
        return VEHICLE
    return PEDESTRIAN if category.startswith("human.pedestrian.") else 0
