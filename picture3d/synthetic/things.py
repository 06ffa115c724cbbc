"""What is annotated: vehicles, people, barriers and cones, each with its looks and its place or its way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from picture3d.synthetic import shapes
from picture3d.synthetic.primitives import Parts, extent

Rng = np.random.Generator
# Short name -> category, what it looks like, attribute while it stands (empty: none).
STANDING: dict[str, tuple[str, Callable[[Rng], Parts], str]] = {
    "car": ("vehicle.car", shapes.car, "vehicle.parked"),
    "truck": ("vehicle.truck", shapes.truck, "vehicle.parked"),
    "trailer": ("vehicle.trailer", shapes.trailer, "vehicle.parked"),
    "bus": ("vehicle.bus.rigid", shapes.rigid_bus, "vehicle.stopped"),
    "bendy": ("vehicle.bus.bendy", shapes.bendy_bus, "vehicle.stopped"),
    "construction": ("vehicle.construction", shapes.construction_vehicle, "vehicle.stopped"),
    "motorcycle": ("vehicle.motorcycle", shapes.motorcycle, "cycle.without_rider"),
    "bicycle": ("vehicle.bicycle", shapes.bicycle, "cycle.without_rider"),
    "barrier": ("movable_object.barrier", shapes.barrier, ""),
    "cone": ("movable_object.trafficcone", shapes.traffic_cone, ""),
    "bin": ("movable_object.pushable_pullable", shapes.trash_bin, ""),
}


@dataclass(frozen=True, slots=True, eq=False)
class Thing:
    """One annotated object: where it stands, or the way that it moves along."""

    category: str
    parts: Parts
    attribute: str  # nuScenes attribute name, empty: none
    pose: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)  # x, y, z, yaw while it stands
    way: int = -1  # index of its way, -1: stands
    start: float = 0.0  # metres along the way at time 0
    side: float = 0.0  # metres to the left of the way
    sense: int = 1  # -1: against the way
    speed: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 0.0)  # mean m/s, swing m/s, angular rate rad/s, phase


def pedestrian(rng: Rng, attribute: str, *, worker: bool = False) -> Thing:
    """An adult, a child now and then, or a construction worker, not yet placed."""
    child = not worker and rng.random() < 0.15
    category = "human.pedestrian." + ("construction_worker" if worker else "child" if child else "adult")
    return Thing(category, shapes.pedestrian(rng, child=child, worker=worker), attribute)


def length_of(parts: Parts) -> float:
    """Length along x, metres."""
    low, high = extent(parts)
    return float(high[0] - low[0])
