"""A procedural town, made from a seed: ground, scenery, annotated things, and the way of the ego car.

Global frame: x east, y north, z up, metres; the town covers [0, size_m) in x and y. Everything that moves follows a closed
way around a block, so a drive can be as long as one likes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from picture3d.config import FrozenConfig
from picture3d.formats.lidarseg_categories import INDEX_OF
from picture3d.structures.boxes import Boxes
from picture3d.structures.poses import Pose
from picture3d.synthetic import scenery as looks
from picture3d.synthetic.furnish import Furnisher
from picture3d.synthetic.ground import Ground
from picture3d.synthetic.primitives import Primitives, extent, place, rotation_yaw_pitch
from picture3d.synthetic.streets import BLOCKS, CELL_M, Road, Way, crossing_of, paint, plan_town
from picture3d.synthetic.things import Thing
from picture3d.synthetic.traffic import Traffic, set_off

# Boxes stand off the surface by this, so that range noise (sigma 0.02 m) seldom carries a point out.
BOX_MARGIN_M = 0.06


class TownConfig(FrozenConfig):
    """Settings of a town; everything else follows from its seed."""

    margin_m: float = 75.0  # from the outer roads to the edge of the town
    hill_m: float = 0.7  # amplitude of the longest wave of the ground
    traffic: bool = True  # False: nothing moves


@dataclass(frozen=True, slots=True, eq=False)
class _Route:
    """The things that move along one way."""

    way: int
    things: NDArray[np.intp]  # (m,)
    start: NDArray[np.float64]  # (m,)
    side: NDArray[np.float64]  # (m,)
    sense: NDArray[np.float64]  # (m,)
    speed: NDArray[np.float64]  # (4, m)

    @staticmethod
    def of(way: int, things: tuple[Thing, ...]) -> _Route:
        rows = [i for i, thing in enumerate(things) if thing.way == way]
        start, side, sense = (np.array([getattr(things[i], name) for i in rows], float) for name in ("start", "side", "sense"))
        return _Route(way, np.array(rows, np.intp), start, side, sense, np.array([things[i].speed for i in rows]).T)


@dataclass(frozen=True, slots=True, eq=False)
class Town:
    """Everything there is. Thing i has instance number i + 1; 0 is scenery and ground."""

    seed: int
    size_m: float
    ground: Ground
    things: tuple[Thing, ...]
    ways: tuple[Way, ...]
    ego_way: int
    ego_pace: tuple[float, float, float, float]
    _start_poses: NDArray[np.float64]  # (things, 4), right for what stands
    _routes: tuple[_Route, ...]
    _fixed: Primitives  # scenery and standing things, global frame
    _fixed_reach: NDArray[np.float64]  # (P,) radius of each
    _moving: Primitives  # movers, each in its own frame
    _mover_of: NDArray[np.intp]  # (Q,) thing of each moving primitive
    _extent: NDArray[np.float64]  # (things, 2, 3) corners in the thing's own frame

    def primitives_near(self, x: float, y: float, radius_m: float, time_s: float) -> Primitives:
        """Everything standing within `radius_m` of (x, y), global frame."""
        fixed = self._fixed.select(_within(self._fixed, self._fixed_reach, x, y, radius_m))
        if not len(self._moving):
            return fixed
        poses = self.poses(time_s)
        close = (np.hypot(poses[:, 0] - x, poses[:, 1] - y) < radius_m)[self._mover_of]
        moving, pose = self._moving.select(close), poses[self._mover_of[close]]
        return fixed.joined(moving.moved(rotation_yaw_pitch(pose[:, 3], np.zeros(len(pose))), pose[:, :3]))

    def poses(self, time_s: float) -> NDArray[np.float64]:
        """(things, 4): ground point x, y, z and yaw of every thing at a time."""
        poses = self._start_poses.copy()
        for route in self._routes:
            position, yaw = self.ways[route.way].at(route.sense * (route.start + _progress(route.speed, time_s)))
            yaw = yaw + np.where(route.sense < 0, np.pi, 0.0)
            across = route.side * route.sense
            x, y = position[:, 0] - np.sin(yaw) * across, position[:, 1] + np.cos(yaw) * across
            poses[route.things] = np.stack([x, y, self.ground.surface(x, y), yaw], 1)
        return poses

    def boxes(self, time_s: float, keep: NDArray[np.intp] | None = None) -> Boxes:
        """Boxes of the things with the numbers `keep` (all by default), global frame; `num_points` is -1."""
        rows = np.arange(len(self.things)) if keep is None else keep
        poses = self.poses(time_s)[rows]
        step = 0.05
        velocity = (self.poses(time_s + step)[rows, :2] - self.poses(time_s - step)[rows, :2]) / (2 * step)
        low, high = self._extent[rows, 0], self._extent[rows, 1]
        centre = poses[:, :3].copy()
        middle = (low + high) / 2
        c, s = np.cos(poses[:, 3]), np.sin(poses[:, 3])
        centre += np.stack([c * middle[:, 0] - s * middle[:, 1], s * middle[:, 0] + c * middle[:, 1], middle[:, 2]], 1)
        return Boxes(
            center=centre,
            size=high - low + 2 * BOX_MARGIN_M,
            yaw=(poses[:, 3] + np.pi) % (2 * np.pi) - np.pi,
            velocity=velocity,
            category=tuple(self.things[i].category for i in rows),
            track_id=tuple(str(i + 1) for i in rows),
            num_points=np.full(len(rows), -1, np.int32),
        )

    def ego_pose(self, time_s: float) -> Pose:
        """`global_from_ego` (x forward, on the ground below the rear axle), tilted with the ground."""
        position, yaw = self.ways[self.ego_way].at(_progress(np.array(self.ego_pace), time_s))
        x, y = float(position[0]), float(position[1])
        slope_x, slope_y = self.ground.slope(x, y)
        up = np.array([-slope_x, -slope_y, 1.0])
        up /= np.linalg.norm(up)
        forward = np.array([np.cos(yaw), np.sin(yaw), 0.0])
        forward -= up * (forward @ up)
        forward /= np.linalg.norm(forward)
        rotation = np.stack([forward, np.cross(up, forward), up], 1)
        return Pose(rotation, np.array([x, y, float(self.ground.height(np.array(x), np.array(y)))]))


def build_town(seed: int, config: TownConfig = TownConfig()) -> Town:  # noqa: B008 - frozen
    """The town of a seed: the same value for the same seed and config."""
    rng = np.random.default_rng([seed, 0x70776E])
    plan = plan_town(rng, config.margin_m)
    length = np.array([150.0, 95.0, 60.0]) * rng.uniform(0.85, 1.2, 3)
    heading = rng.uniform(0, 2 * np.pi, 3)
    waves = np.stack(
        [
            config.hill_m * np.array([1.0, 0.45, 0.12]),
            2 * np.pi / length * np.cos(heading),
            2 * np.pi / length * np.sin(heading),
            rng.uniform(0, 2 * np.pi, 3),
        ],
        1,
    )
    maker = Furnisher(plan, paint(plan), rng, waves)
    _fill_plots(maker)
    for roads, others in ((plan.roads_x, plan.roads_y), (plan.roads_y, plan.roads_x)):
        for road in roads:
            _line_road(maker, road, others)
    for rx in plan.roads_x:
        for ry in plan.roads_y:
            _corner_lights(maker, crossing_of(rx, ry), ry.widest_half, rx.widest_half)
    block = (int(rng.integers(BLOCKS)), int(rng.integers(BLOCKS)))
    traffic = set_off(plan, block, rng)
    things = (*maker.things, *(traffic.things if config.traffic else ()))
    return _assemble(seed, maker, things, traffic)


def _fill_plots(maker: Furnisher) -> None:
    plan = maker.plan
    kinds = ["houses"] * 9 + ["park"] * 4 + ["yard"] * 2 + ["lot"] * 2
    deck: list[str] = []
    spans = []
    for roads in (plan.roads_y, plan.roads_x):
        edges = [0.0]
        for road in roads:
            reach = road.widest_edge + road.sway + 0.5
            edges += [road.offset - reach, road.offset + reach]
        edges.append(plan.size_m)
        spans.append([(edges[k], edges[k + 1]) for k in range(0, len(edges), 2)])
    for x0, x1 in spans[0]:
        for y0, y1 in spans[1]:
            maker.plot((x0, y0), (x1, y1), maker.deal(deck, kinds))


def _line_road(maker: Furnisher, road: Road, others: tuple[Road, ...]) -> None:
    ends = [0.0]
    cuts = [0.0]
    for other in others:
        x, y = crossing_of(road, other) if road.along_x else crossing_of(other, road)
        ends.append(x if road.along_x else y)
        cuts.append(other.widest_half)
    ends.append(maker.plan.size_m)
    cuts.append(0.0)
    for k in range(len(ends) - 1):
        for side in (-1, 1):
            maker.street(road, side, ends[k], ends[k + 1], (cuts[k], cuts[k + 1]))


def _corner_lights(maker: Furnisher, middle: tuple[float, float], half_x: float, half_y: float) -> None:
    for k, (sx, sy) in enumerate(((1, 1), (-1, 1), (-1, -1), (1, -1))):
        x, y = middle[0] + sx * (half_x + 1.6), middle[1] + sy * (half_y + 1.6)
        maker.fixed(looks.traffic_light(maker.rng), "static.manmade", x, y, k * np.pi / 2 + np.pi / 2)


def _assemble(seed: int, maker: Furnisher, things: tuple[Thing, ...], traffic: Traffic) -> Town:
    number = np.arange(len(things))
    category = np.array([INDEX_OF[t.category] for t in things], np.uint8)
    moves = np.array([t.way >= 0 for t in things], bool)
    scenery_pose = np.array(maker.scenery_pose).reshape(-1, 4)
    scenery = place(
        maker.scenery, scenery_pose, np.array(maker.scenery_label, np.uint8), np.zeros(len(scenery_pose), np.uint16)
    )
    standing, movers = np.flatnonzero(~moves), np.flatnonzero(moves)
    poses = np.array([t.pose for t in things]).reshape(-1, 4)
    parked = place(
        [things[i].parts for i in standing], poses[standing], category[standing], (number[standing] + 1).astype(np.uint16)
    )
    moving = place(
        [things[i].parts for i in movers], np.zeros((len(movers), 4)), category[movers], (number[movers] + 1).astype(np.uint16)
    )
    fixed = scenery.joined(parked)
    return Town(
        seed=seed,
        size_m=maker.plan.size_m,
        ground=Ground(maker.waves, maker.cover, CELL_M),
        things=things,
        ways=traffic.ways,
        ego_way=traffic.ego_way,
        ego_pace=traffic.ego_pace,
        _start_poses=poses,
        _routes=tuple(_Route.of(way, things) for way in sorted({t.way for t in things if t.way >= 0})),
        _fixed=fixed,
        _fixed_reach=np.linalg.norm(fixed.half, axis=1),
        _moving=moving,
        _mover_of=moving.instance.astype(np.intp) - 1,
        _extent=np.array([extent(t.parts) for t in things]).reshape(-1, 2, 3),
    )


def _progress(speed: NDArray[np.float64], time_s: float) -> NDArray[np.float64]:
    """Metres travelled since time 0 at a speed that swings around its mean and never turns back."""
    mean, swing, rate, phase = speed
    return mean * time_s + swing / rate * (np.sin(rate * time_s + phase) - np.sin(phase))


def _within(primitives: Primitives, reach: NDArray[np.float64], x: float, y: float, radius_m: float) -> NDArray[np.bool_]:
    return (primitives.center[:, 0] - x) ** 2 + (primitives.center[:, 1] - y) ** 2 < (radius_m + reach) ** 2
