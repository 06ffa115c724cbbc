"""The town's plan: winding roads that cross, what covers the ground, and closed ways around the blocks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from picture3d.synthetic.ground import MARKING, OTHER_FLAT, ROAD, SIDEWALK, TERRAIN

CELL_M = 0.2
BLOCKS = 2  # blocks inside the grid of roads along each axis
_LANE, _CYCLE_STRIP, _PARKING_LANE = 3.1, 0.9, 2.3


@dataclass(frozen=True, slots=True)
class Road:
    """A road along x (or along y): the other coordinate is ``offset + sway * sin(along / bend + phase)``."""

    along_x: bool
    offset: float
    sway: float
    bend: float
    phase: float
    median: float  # half width of a raised strip in the middle, metres; 0: none
    verge: float  # width of the strip of grass between kerb and pavement, metres
    walk: float  # width of the pavement, metres
    parking_lanes: tuple[bool, bool]  # on the side of smaller and of larger coordinates

    def half(self, side: int) -> float:
        """From the middle to the kerb on a side (-1 or +1), metres."""
        return self.median + _LANE + _CYCLE_STRIP + (_PARKING_LANE if self.parks(side) else 0.0)

    def parks(self, side: int) -> bool:
        """Whether cars may stand at the kerb of a side."""
        return self.parking_lanes[side > 0]

    def edge(self, side: int) -> float:
        """From the middle to the far edge of the pavement."""
        return self.half(side) + self.verge + self.walk

    def track(self, name: str, side: int) -> float:
        """From the middle to where something goes or stands: "lane", "cycle", "parking" or "pavement"."""
        match name:
            case "lane":
                return self.median + _LANE / 2
            case "cycle":
                return self.median + _LANE + 0.35
            case "parking":
                return self.half(side) - _PARKING_LANE / 2 + 0.1
            case "pavement":
                return self.half(side) + self.verge + self.walk / 2
        raise ValueError(f"no track named {name!r}")

    @property
    def widest_half(self) -> float:
        """The larger distance from the middle to a kerb."""
        return max(self.half(-1), self.half(1))

    @property
    def widest_edge(self) -> float:
        """The larger distance from the middle to the far edge of a pavement."""
        return max(self.edge(-1), self.edge(1))

    def line(self, along: NDArray[np.floating] | float) -> NDArray[np.float64]:
        """The middle of the road at positions along it."""
        return self.offset + self.sway * np.sin(np.asarray(along) / self.bend + self.phase)

    def tilt(self, along: NDArray[np.floating] | float) -> NDArray[np.float64]:
        """Derivative of `line`."""
        return self.sway / self.bend * np.cos(np.asarray(along) / self.bend + self.phase)

    def beside(self, along: NDArray[np.floating] | float, distance: NDArray[np.floating] | float) -> NDArray[np.float64]:
        """(..., 2) points at signed `distance` from the middle, towards growing y (or x)."""
        tilt = self.tilt(along)
        stretch = np.sqrt(1 + tilt**2)
        a, b = np.asarray(along) - distance * tilt / stretch, self.line(along) + distance / stretch
        return np.stack([a, b] if self.along_x else [b, a], -1)

    def heading(self, along: NDArray[np.floating] | float) -> NDArray[np.float64]:
        """Yaw of the road towards growing `along`."""
        tilt = self.tilt(along)
        return np.arctan2(tilt, 1.0) if self.along_x else np.arctan2(1.0, tilt)


@dataclass(frozen=True, slots=True, eq=False)
class Way:
    """A closed line that things move along."""

    points: NDArray[np.float64]  # (n, 2) metres, first = last
    length: NDArray[np.float64]  # (n,) metres from the first point
    yaw: NDArray[np.float64]  # (n,) radians, unwrapped

    def at(self, s: NDArray[np.floating] | float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Positions (..., 2) and yaws (...) at distances `s`, which wrap around."""
        s = np.asarray(s, dtype=np.float64)
        total = self.length[-1]
        inside = s % total
        position = np.stack([np.interp(inside, self.length, self.points[:, k]) for k in (0, 1)], -1)
        turns = np.floor(s / total) * (self.yaw[-1] - self.yaw[0])
        return position, np.interp(inside, self.length, self.yaw) + turns


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Roads of a town; `roads_x` run along x from south to north, `roads_y` along y from west to east."""

    size_m: float
    roads_x: tuple[Road, ...]
    roads_y: tuple[Road, ...]
    drives_right: bool

    def way(self, block: tuple[int, int], lane: str) -> Way:
        """The closed way around an inner block, at the roads' distance `lane` ("lane", "cycle" or "pavement")."""
        return _around(self, block, lane)


def plan_town(rng: np.random.Generator, margin_m: float) -> Plan:
    """Roads with random spacing, bends and cross-sections."""

    def roads(along_x: bool) -> list[Road]:
        at, made = margin_m, []
        for i in range(BLOCKS + 1):
            median = float(rng.choice([0.0, 0.5, 0.9], p=[0.5, 0.3, 0.2]))
            if i == 1 and along_x:  # every car goes past some raised strip
                median = 0.7
            verge = float(rng.choice([0.0, 1.6, 2.8], p=[0.25, 0.35, 0.4]))
            parking = (bool(rng.random() < 0.6), bool(rng.random() < 0.6))
            sway, bend, phase = rng.uniform(1.0, 5.0), rng.uniform(35, 60), rng.uniform(0, 2 * np.pi)
            made.append(Road(along_x, at, sway, bend, phase, median, verge, rng.uniform(2.4, 4.6), parking))
            at += rng.uniform(80, 105)
        return made

    roads_x, roads_y = roads(True), roads(False)
    size = max(roads_x[-1].offset, roads_y[-1].offset) + margin_m
    return Plan(float(np.ceil(size / 2) * 2), tuple(roads_x), tuple(roads_y), bool(rng.random() < 0.7))


def paint(plan: Plan) -> NDArray[np.uint8]:
    """Cover codes of the whole town, cells of CELL_M, rows along y."""
    cells = round(plan.size_m / CELL_M)
    centre = ((np.arange(cells) + 0.5) * CELL_M).astype(np.float32)
    kerb = np.full((cells, cells), np.inf, np.float32)
    walk = np.full((cells, cells), np.inf, np.float32)
    median = np.zeros((cells, cells), bool)
    marking = np.zeros((cells, cells), bool)
    for road in (*plan.roads_x, *plan.roads_y):
        stretch = np.sqrt(1 + road.tilt(centre) ** 2).astype(np.float32)
        line = road.line(centre).astype(np.float32)
        # Only the band around the road is touched.
        low = max(int((line.min() - road.widest_edge - 2) / CELL_M), 0)
        high = min(int((line.max() + road.widest_edge + 2) / CELL_M) + 1, cells)
        band = (slice(low, high), slice(None))
        signed = (centre[low:high, None] - line[None, :]) / stretch[None, :]
        distance, half = np.abs(signed), np.where(signed > 0, np.float32(road.half(1)), np.float32(road.half(-1)))
        dashes = (centre % 7.0 < 3.0)[None, :]
        lines = ((distance < 0.12) & dashes) if road.median == 0 else (np.abs(distance - road.median - 0.2) < 0.1)
        lines |= np.abs(distance - road.median - _LANE - _CYCLE_STRIP) < 0.1
        inner = distance - half
        beyond = np.where(inner < road.verge, np.where(inner < 0, -1, np.inf), inner - road.verge - road.walk).astype(
            np.float32
        )
        for target, value, join in (
            (kerb, inner, np.minimum),
            (walk, beyond, np.minimum),
            (median, distance < road.median, np.logical_or),
            (marking, lines, np.logical_or),
        ):
            view = target[band] if road.along_x else target[band[::-1]]
            join(view, value if road.along_x else value.T, out=view)
    cover = np.full((cells, cells), TERRAIN, np.uint8)
    cover[walk < 0] = SIDEWALK
    on_road = kerb < 0
    cover[on_road] = ROAD
    cover[marking & on_road] = MARKING
    cover[median & on_road] = OTHER_FLAT
    for rx in plan.roads_x:
        for ry in plan.roads_y:
            _paint_crossing(cover, on_road, centre, rx, ry)
    return cover


def crossing_of(rx: Road, ry: Road) -> tuple[float, float]:
    """Where the middles of two roads meet."""
    x, y = ry.offset, rx.offset
    for _ in range(8):
        y = float(rx.line(x))
        x = float(ry.line(y))
    return x, y


def _paint_crossing(
    cover: NDArray[np.uint8], on_road: NDArray[np.bool_], centre: NDArray[np.float32], rx: Road, ry: Road
) -> None:
    """No medians or lines inside a crossing; zebra stripes and a corner of pavement around it."""
    x, y = crossing_of(rx, ry)
    reach_x, reach_y = ry.widest_half + 8, rx.widest_half + 8
    cols = np.flatnonzero(np.abs(centre - x) < reach_x)
    rows = np.flatnonzero(np.abs(centre - y) < reach_y)
    area = np.ix_(rows, cols)
    gx, gy = np.abs(centre[cols] - x)[None, :], np.abs(centre[rows] - y)[:, None]
    local, road = cover[area], on_road[area]
    local[road & (gx < ry.widest_half + 7) & (gy < rx.widest_half + 7)] = ROAD
    zebra_x = (gx > ry.widest_half + 2) & (gx < ry.widest_half + 5) & (gy < rx.widest_half) & (gy % 1.0 < 0.5)
    zebra_y = (gy > rx.widest_half + 2) & (gy < rx.widest_half + 5) & (gx < ry.widest_half) & (gx % 1.0 < 0.5)
    local[road & (zebra_x | zebra_y)] = MARKING
    local[(gx < ry.widest_edge) & (gy < rx.widest_edge) & (local == TERRAIN)] = SIDEWALK
    cover[area] = local


def _around(plan: Plan, block: tuple[int, int], lane: str) -> Way:
    i, j = block
    south, north, west, east = plan.roads_x[j], plan.roads_x[j + 1], plan.roads_y[i], plan.roads_y[i + 1]
    # Anticlockwise, each side at its distance towards the block.
    sides = [(south, 1), (east, -1), (north, -1), (west, 1)]
    lines = [(road, side * road.track(lane, side)) for road, side in sides]
    corners = [_meet(*lines[k], *lines[k - 1]) for k in range(4)]
    cut = {"lane": 9.0, "cycle": 8.0}.get(lane, 3.0)
    pieces: list[NDArray[np.float64]] = []
    for k, (road, distance) in enumerate(lines):
        axis = 0 if road.along_x else 1
        start, end = corners[k][axis], corners[(k + 1) % 4][axis]
        sign = np.sign(end - start)
        along = np.arange(start + sign * cut, end - sign * cut, sign * 1.0)
        pieces.append(road.beside(along, distance))
    points: list[NDArray[np.float64]] = []
    for k, piece in enumerate(pieces):
        following = pieces[(k + 1) % 4]
        corner = np.array(corners[(k + 1) % 4])
        t = np.linspace(0, 1, 14)[1:-1, None]
        points += [piece, (1 - t) ** 2 * piece[-1] + 2 * t * (1 - t) * corner + t**2 * following[0]]
    ring = np.concatenate([*points, points[0][:1]])
    if plan.drives_right:  # the right-hand lane keeps its block on the right
        ring = ring[::-1]
    length = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(ring, axis=0), axis=1))])
    even = np.linspace(0, length[-1], int(length[-1] / 0.5) + 1)
    ring = np.stack([np.interp(even, length, ring[:, k]) for k in (0, 1)], 1)
    step = np.roll(ring[:-1], -1, axis=0) - np.roll(ring[:-1], 1, axis=0)
    yaw = np.unwrap(np.arctan2(step[:, 1], step[:, 0]))
    whole = yaw[0] + (2 * np.pi if not plan.drives_right else -2 * np.pi)
    return Way(ring, even, np.append(yaw, whole))


def _meet(a: Road, a_distance: float, b: Road, b_distance: float) -> tuple[float, float]:
    """Where the lines beside two crossing roads meet."""
    rx, dx, ry, dy = (a, a_distance, b, b_distance) if a.along_x else (b, b_distance, a, a_distance)
    x, y = crossing_of(rx, ry)
    for _ in range(8):
        # One point moved along each line to the other's coordinate; offsets are nearly perpendicular.
        y = float(rx.line(x) + dx * np.sqrt(1 + rx.tilt(x) ** 2))
        x = float(ry.line(y) + dy * np.sqrt(1 + ry.tilt(y) ** 2))
    return x, y
