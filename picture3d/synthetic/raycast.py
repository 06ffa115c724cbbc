"""First hits of a regular fan of rays on many primitives, by numpy.

Each primitive's window of azimuth and elevation picks the rays that could meet it; all (ray, primitive) pairs of one kind
are then tested at once, and the nearest hit of each ray is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from picture3d.synthetic.primitives import BOX, CYLINDER, ELLIPSOID, Primitives

Float32Array = NDArray[np.float32]
Int32Array = NDArray[np.int32]
_CORNERS = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], dtype=np.float32)
# Windows are widened by this angle, so that rounding never drops a ray that would hit.
_SLACK_RAD = 1e-4


@dataclass(frozen=True, slots=True, eq=False)
class RayFan:
    """A spinning sensor's rays: azimuth a turns clockwise from -x, ring r goes up; ray number = a * rings + r.

    A sector holds the C columns from azimuth `first` on, and numbers its rays from there.
    """

    directions: Float32Array  # (C * R, 3) unit vectors in the LiDAR frame (x right, y forward, z up)
    elevations: NDArray[np.float64]  # (R,) radians, ascending
    azimuths: int  # A, of the whole turn
    first: int = 0  # azimuth of the first column

    @property
    def rings(self) -> int:
        """Number of beams R."""
        return len(self.elevations)

    @property
    def columns(self) -> int:
        """Number of azimuths C that there are rays for; A for a whole turn."""
        return len(self.directions) // self.rings

    def sector(self, first: int, columns: int) -> RayFan:
        """The rays of `columns` azimuths from `first` on, past the end of the turn too, of a whole turn."""
        turn = self.directions.reshape(self.azimuths, self.rings, 3)
        chosen = turn[(first + np.arange(columns)) % self.azimuths]
        return RayFan(np.ascontiguousarray(chosen.reshape(-1, 3)), self.elevations, self.azimuths, first % self.azimuths)


def ray_fan(azimuths: int, elevations_rad: NDArray[np.float64]) -> RayFan:
    """The fan of `azimuths` equal steps times the given ascending elevations."""
    angle = np.pi - 2 * np.pi * np.arange(azimuths) / azimuths
    flat = np.cos(elevations_rad)[None, :]
    directions = np.stack(
        [
            np.cos(angle)[:, None] * flat,
            np.sin(angle)[:, None] * flat,
            np.broadcast_to(np.sin(elevations_rad), (azimuths, len(elevations_rad))),
        ],
        -1,
    )
    return RayFan(np.ascontiguousarray(directions.reshape(-1, 3), dtype=np.float32), elevations_rad, azimuths)


@dataclass(frozen=True, slots=True, eq=False)
class Hits:
    """The nearest primitive of every ray of the fan, and every hit behind it."""

    range_m: Float32Array  # (rays,) metres, inf where nothing was hit
    primitive: Int32Array  # (rays,) row of the primitive, -1 where nothing was hit
    cosine: Float32Array  # (rays,) of the angle between ray and surface normal, 1 where nothing was hit
    every_ray: Int32Array  # (H,) ray of every hit, hidden ones included
    every_primitive: Int32Array  # (H,) primitive of every hit
    every_range_m: Float32Array  # (H,) range of every hit


def cast(fan: RayFan, primitives: Primitives, rng: np.random.Generator) -> Hits:
    """First hits of the fan, which starts at the origin, on primitives given in the LiDAR frame.

    `rng` draws how deep rays go into porous primitives (foliage). A primitive around the origin is not seen from inside.
    """
    rays = len(fan.directions)
    nearest = np.full(rays, np.inf, np.float32)
    first = np.full(rays, -1, np.int32)
    cosine = np.ones(rays, np.float32)
    to_unit, origin = _unit_frames(primitives)
    window = _windows(fan, primitives)
    all_rays: list[Int32Array] = []
    all_primitives: list[Int32Array] = []
    all_ranges: list[Float32Array] = []
    for kind in (BOX, CYLINDER, ELLIPSOID):
        rows = np.flatnonzero((primitives.kind == kind) & (window[:, 1] > 0) & (window[:, 3] > 0)).astype(np.int32)
        if not len(rows):
            continue
        ray, counts = _candidates(fan, window[rows])
        enter, leave = _interval(kind, fan, ray, to_unit[rows], origin[rows], counts)
        hit = np.flatnonzero((enter < leave) & (enter > 0))
        owner = np.repeat(rows, counts)[hit]
        range_m, ray = enter[hit], ray[hit]
        porous = np.flatnonzero(primitives.free_path[owner] > 0)
        if len(porous):
            depth = rng.standard_exponential(len(porous), dtype=np.float32) * primitives.free_path[owner[porous]]
            range_m[porous] += depth
            through = porous[range_m[porous] > leave[hit[porous]]]
            keep = np.ones(len(hit), bool)
            keep[through] = False
            range_m, ray, owner = range_m[keep], ray[keep], owner[keep]
        all_ranges.append(range_m)
        all_rays.append(ray)
        all_primitives.append(owner)
    if all_rays:
        every_ray, every_primitive = np.concatenate(all_rays), np.concatenate(all_primitives)
        ranges = np.concatenate(all_ranges)
        # Far to near: of several writes to one place numpy keeps the last, the nearest hit.
        order = np.argsort(ranges, kind="stable")[::-1]
        nearest[every_ray[order]] = ranges[order]
        first[every_ray[order]] = every_primitive[order]
        seen = np.flatnonzero(first >= 0)
        cosine[seen] = _cosine(fan.directions[seen], nearest[seen], first[seen], primitives, to_unit, origin)
    else:
        every_ray = every_primitive = np.zeros(0, np.int32)
        ranges = np.zeros(0, np.float32)
    return Hits(nearest, first, cosine, every_ray, every_primitive, ranges)


def _unit_frames(primitives: Primitives) -> tuple[Float32Array, Float32Array]:
    """Matrices (P, 3, 3) that take directions to where a primitive is a unit shape, and the origin (P, 3) there."""
    to_unit = primitives.rotation.transpose(0, 2, 1) / primitives.half[:, :, None]
    origin = -(to_unit * primitives.center[:, None, :]).sum(-1)
    return to_unit.astype(np.float32), origin.astype(np.float32)


def _windows(fan: RayFan, primitives: Primitives) -> NDArray[np.int64]:
    """(P, 4): first column, number of columns, first ring, number of rings that can meet each primitive."""
    centre = primitives.center.T.astype(np.float32)
    edges = (primitives.rotation * primitives.half[:, None, :]).astype(np.float32)  # columns: half edges
    # Corners first, primitives last: numpy reduces over a short first axis much faster than over a short last one.
    corners = centre + sum(_CORNERS[:, k, None, None] * edges[:, :, k].T for k in range(3))  # (8, 3, P)
    x, y, z = corners[:, 0], corners[:, 1], corners[:, 2]
    closest = np.zeros(len(primitives), np.float32)
    for ux, uy in (centre[:2], edges[:, :2, 0].T, edges[:, :2, 1].T):
        # All corners lie beyond a line across this direction: so does the primitive.
        along = (x * ux + y * uy) / np.maximum(np.sqrt(ux * ux + uy * uy), np.float32(1e-9))
        closest = np.maximum(closest, np.maximum(along.min(0), -along.max(0)))
    farthest = np.sqrt((x * x + y * y).max(0))
    around = closest < 0.05  # above, below or inside: any azimuth
    high, low = z.max(0), z.min(0)
    near = np.maximum(closest, np.float32(0.05))
    top = np.arctan2(high, np.where(high > 0, near, farthest)) + _SLACK_RAD
    bottom = np.arctan2(low, np.where(low < 0, near, farthest)) - _SLACK_RAD
    first_ring = np.searchsorted(fan.elevations, bottom)
    rings = np.searchsorted(fan.elevations, top, side="right") - first_ring
    middle = np.arctan2(centre[1], centre[0])
    # Angles of the corners from the middle: by cross and dot product, so that nothing wraps.
    turn = np.arctan2(y * centre[0] - x * centre[1], x * centre[0] + y * centre[1])
    per_radian = fan.azimuths / (2 * np.pi)
    first = np.ceil((np.pi - middle - turn.max(0) - _SLACK_RAD) * per_radian).astype(np.int64)
    last = np.floor((np.pi - middle - turn.min(0) + _SLACK_RAD) * per_radian).astype(np.int64)
    count = np.where(around, fan.azimuths, np.clip(last - first + 1, 0, fan.azimuths))
    first, count = _within_sector(fan, first, count)
    return np.stack([first, count, first_ring, np.maximum(rings, 0)], 1)


def _within_sector(
    fan: RayFan, first: NDArray[np.int64], count: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Windows of azimuths as first column and number of columns of the fan."""
    first = (first - fan.first) % fan.azimuths
    if fan.columns == fan.azimuths:
        return first, count
    past_the_turn = first + count - fan.azimuths  # > 0: the window comes round to column 0
    tail = np.clip(fan.columns - first, 0, count)
    begin = np.where(past_the_turn > 0, 0, np.minimum(first, fan.columns - 1))
    # A window that enters the sector at both ends takes all of it.
    return begin, np.where(past_the_turn > 0, np.where(tail > 0, fan.columns, np.minimum(past_the_turn, fan.columns)), tail)


def _candidates(fan: RayFan, window: NDArray[np.int64]) -> tuple[Int32Array, NDArray[np.int64]]:
    """Ray number of every pair (N,), grouped by window, and the number of pairs of each window."""
    # One run of rings per (window, azimuth); runs are then laid out one after the other.
    runs = window[:, 1]
    start = np.repeat(window[:, 0] - np.cumsum(runs) + runs, runs) + np.arange(runs.sum())
    start %= fan.azimuths
    length = np.repeat(window[:, 3], runs)
    begin = start * fan.rings + np.repeat(window[:, 2], runs)
    ray = np.repeat((begin - np.cumsum(length) + length).astype(np.int32), length)
    ray += np.arange(len(ray), dtype=np.int32)
    return ray, runs * window[:, 3]


def _interval(
    kind: int, fan: RayFan, ray: Int32Array, to_unit: Float32Array, origin: Float32Array, counts: NDArray[np.int64]
) -> tuple[Float32Array, Float32Array]:
    """Ranges (N,) at which each ray enters and leaves its unit shape; enter >= leave where it misses."""
    dx, dy, dz = (column[ray] for column in np.ascontiguousarray(fan.directions.T))

    def component(axis: int) -> tuple[Float32Array, Float32Array]:
        mx, my, mz = (np.repeat(np.ascontiguousarray(to_unit[:, axis, k]), counts) for k in range(3))
        return mx * dx + my * dy + mz * dz, np.repeat(np.ascontiguousarray(origin[:, axis]), counts)

    def slab(d: Float32Array, o: Float32Array) -> tuple[Float32Array, Float32Array]:
        inverse = 1 / np.where(np.abs(d) < 1e-12, np.float32(1e-12), d)
        middle, reach = -o * inverse, np.abs(inverse)
        return np.subtract(middle, reach, dtype=np.float32), np.add(middle, reach, dtype=np.float32)

    if kind == BOX:
        enter, leave = slab(*component(0))
        for axis in (1, 2):
            a, b = slab(*component(axis))
            np.maximum(enter, a, out=enter)
            np.minimum(leave, b, out=leave)
        return enter, leave
    round_axes = [component(axis) for axis in range(2 if kind == CYLINDER else 3)]
    squared = np.maximum(sum(d * d for d, _ in round_axes), np.float32(1e-20))
    along = -sum(o * d for d, o in round_axes) / squared
    # The distance of the nearest point of the line from the axis: no difference of large squares.
    inside = 1 - sum((o + along * d) ** 2 for d, o in round_axes)
    reach = np.where(inside > 0, np.sqrt(np.maximum(inside, 0) / squared), -np.float32(1))
    enter, leave = np.subtract(along, reach, dtype=np.float32), np.add(along, reach, dtype=np.float32)
    if kind == CYLINDER:
        a, b = slab(*component(2))
        np.maximum(enter, a, out=enter)
        np.minimum(leave, b, out=leave)
        enter[reach < 0] = np.inf
    return enter, leave


def _cosine(
    directions: Float32Array,
    range_m: Float32Array,
    first: Int32Array,
    primitives: Primitives,
    to_unit: Float32Array,
    origin: Float32Array,
) -> Float32Array:
    """Cosine (n,) between rays and the normals of the surfaces that they hit."""
    heading = np.einsum("nij,nj->ni", to_unit[first], directions)
    point = origin[first] + range_m[:, None] * heading
    kind = primitives.kind[first]
    normal = point.copy()
    face = np.abs(point).argmax(1)
    cap = (kind == CYLINDER) & (np.abs(point[:, 2]) > 0.999)
    flat = np.where(cap, 2, face)
    one = np.zeros_like(point)
    one[np.arange(len(point)), flat] = 1
    faceted = (kind == BOX) | cap
    normal[faceted] = one[faceted]
    normal[(kind == CYLINDER) & ~cap, 2] = 0
    # A normal n of the unit shape is M^T n outside, whose length is that of n / half.
    length = np.linalg.norm(normal / primitives.half[first], axis=1)
    return (np.abs((normal * heading).sum(1)) / np.maximum(length, 1e-9)).clip(0, 1).astype(np.float32)
