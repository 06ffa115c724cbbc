"""What moves: vehicles, cyclists and walkers, each on a closed way around its block."""

from __future__ import annotations

from dataclasses import dataclass, replace

from picture3d.synthetic import shapes
from picture3d.synthetic.streets import BLOCKS, Plan, Way
from picture3d.synthetic.things import STANDING, Rng, Thing, length_of, pedestrian

Pace = tuple[float, float, float, float]  # as Thing.speed
_DRIVERS = ("car", "truck", "bus", "motorcycle", "road train", "construction")
_DRIVER_SHARES = (0.66, 0.07, 0.04, 0.13, 0.06, 0.04)
# Free lane before and behind the ego car at the start; distances in the lane hardly change afterwards.
_EGO_GAP_M = 14.0


@dataclass(frozen=True, slots=True, eq=False)
class Traffic:
    """All ways, what moves on them, and which way the ego car takes at what pace."""

    ways: tuple[Way, ...]
    things: tuple[Thing, ...]
    ego_way: int
    ego_pace: Pace


def set_off(plan: Plan, ego_block: tuple[int, int], rng: Rng) -> Traffic:
    """Traffic around every inner block; the ego car starts at the beginning of its block's lane."""
    ways: list[Way] = []
    things: list[Thing] = []
    ego_way, ego_pace = -1, (0.0, 0.0, 1.0, 0.0)
    for block in ((i, j) for i in range(BLOCKS) for j in range(BLOCKS)):
        lane, cycle, walk = (len(ways) + k for k in range(3))
        ways += [plan.way(block, name) for name in ("lane", "cycle", "pavement")]
        # Everything in one lane keeps the same speed, so nothing runs into anything.
        mean = rng.uniform(5.0, 9.0)
        pace = (mean, mean * rng.uniform(0.2, 0.7), rng.uniform(0.2, 0.45), rng.uniform(0, 6.28))
        if block == ego_block:
            ego_way, ego_pace = lane, pace
        length = [float(ways[k].length[-1]) for k in (lane, cycle, walk)]
        things += _drivers(lane, length[0], pace, rng, keep_free=block == ego_block)
        things += _cyclists(cycle, length[1], rng)
        things += _walkers(walk, length[2], rng)
    return Traffic(tuple(ways), tuple(things), ego_way, ego_pace)


def _drivers(way: int, total: float, pace: Pace, rng: Rng, *, keep_free: bool) -> list[Thing]:
    things: list[Thing] = []
    at = _EGO_GAP_M if keep_free else rng.uniform(0, 20)
    end = total - (_EGO_GAP_M if keep_free else 8.0)
    while True:
        name = str(rng.choice(_DRIVERS, p=_DRIVER_SHARES))
        if name == "road train":
            front, back = shapes.truck(rng), shapes.trailer(rng)
            pieces = [("vehicle.trailer", back), ("vehicle.truck", front)]
        elif name == "motorcycle":
            pieces = [("vehicle.motorcycle", shapes.motorcycle(rng, ridden=True))]
        else:
            pieces = [(STANDING[name][0], STANDING[name][1](rng))]
        if at + sum(length_of(parts) + 0.8 for _, parts in pieces) > end:
            return things
        for category, parts in pieces:
            at += length_of(parts) / 2
            attribute = "cycle.with_rider" if name == "motorcycle" else "vehicle.moving"
            things.append(Thing(category, parts, attribute, way=way, start=at, speed=pace))
            at += length_of(parts) / 2 + 0.8
        at += float(rng.exponential(14.0) + 6.0)


def _cyclists(way: int, total: float, rng: Rng) -> list[Thing]:
    things: list[Thing] = []
    pace = (rng.uniform(3.5, 5.5), 0.0, 1.0, 0.0)
    at = rng.uniform(0, 15)
    while at < total - 5:
        if rng.random() < 0.75:
            parts, category = shapes.bicycle(rng, ridden=True), "vehicle.bicycle"
        else:
            parts, category = shapes.motorcycle(rng, ridden=True), "vehicle.motorcycle"
        side = rng.uniform(-0.1, 0.1)
        things.append(Thing(category, parts, "cycle.with_rider", way=way, start=at, side=side, speed=pace))
        at += float(rng.exponential(18.0) + 8.0)
    return things


def _walkers(way: int, total: float, rng: Rng) -> list[Thing]:
    things: list[Thing] = []
    for sense in (1, -1):
        speed = (rng.uniform(1.0, 1.6), 0.0, 1.0, 0.0)
        at = rng.uniform(0, 20)
        while at < total - 4:
            for abreast in range(int(rng.choice([1, 1, 2]))):
                # Those who walk the other way keep to the other half of the pavement.
                side = sense * 0.65 - 0.35 + 0.7 * abreast
                walker = pedestrian(rng, "pedestrian.moving")
                things.append(replace(walker, way=way, start=sense * (at + 0.5 * abreast), side=side, sense=sense, speed=speed))
            at += float(rng.exponential(9.0) + 2.5)
    return things
