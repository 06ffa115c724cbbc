"""First hits against closed forms, and against a plain search over every ray and every primitive in float64."""

from __future__ import annotations

import numpy as np
import pytest

from picture3d.synthetic.primitives import BOX, CYLINDER, ELLIPSOID, Primitives, part, place
from picture3d.synthetic.raycast import cast, ray_fan

FAN = ray_fan(1084, np.radians(np.linspace(-30.67, 10.67, 32)))


def one(*parts: list[float]) -> Primitives:
    return place([np.array(parts)], np.zeros((1, 4)), np.array([17], np.uint8), np.array([1], np.uint16))


def hit_points(primitives: Primitives) -> tuple[np.ndarray, np.ndarray]:
    hits = cast(FAN, primitives, np.random.default_rng(0))
    rays = np.flatnonzero(np.isfinite(hits.range_m))
    return FAN.directions[rays].astype(np.float64) * hits.range_m[rays, None], hits.cosine[rays]


def test_hits_on_a_box_lie_on_its_near_faces():
    points, cosine = hit_points(one(part(BOX, (10, 0, 0), (1, 2, 1.5), reflectivity=1)))
    np.testing.assert_allclose(points[:, 0], 9.0, atol=1e-4)  # seen from straight ahead only the front face shows
    assert np.abs(points[:, 1]).max() <= 2.0001
    assert np.abs(points[:, 2]).max() <= 1.5001
    np.testing.assert_allclose(cosine, 9.0 / np.linalg.norm(points, axis=1), atol=1e-4)


def test_hits_on_an_ellipsoid_satisfy_its_equation_and_face_the_sensor():
    center, half = np.array([0.0, -12.0, -0.5]), np.array([1.5, 0.7, 1.0])
    points, cosine = hit_points(one(part(ELLIPSOID, tuple(center), tuple(half), reflectivity=1)))
    unit = (points - center) / half
    np.testing.assert_allclose((unit**2).sum(1), 1.0, atol=1e-4)
    normal = unit / half
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    expected = -(normal * points).sum(1) / np.linalg.norm(points, axis=1)
    assert (expected > -1e-3).all()
    np.testing.assert_allclose(cosine, expected.clip(0, 1), atol=2e-3)


def test_hits_on_a_cylinder_lie_on_its_wall_or_its_cap():
    points, _ = hit_points(one(part(CYLINDER, (-6, 3, -2), (0.8, 0.8, 1.0), reflectivity=1)))
    radius = np.hypot(points[:, 0] + 6, points[:, 1] - 3)
    wall = np.abs(radius - 0.8) < 1e-3
    cap = np.abs(points[:, 2] + 1) < 1e-3
    assert (wall | cap).all()
    assert wall.any()
    assert cap.any()  # the sensor looks down on it


def brute_force(primitives: Primitives) -> np.ndarray:
    """(rays,) nearest solid hit by testing everything in float64."""
    directions = FAN.directions.astype(np.float64)
    nearest = np.full(len(directions), np.inf)
    for i in range(len(primitives)):
        to_unit = primitives.rotation[i].T / primitives.half[i][:, None]
        o, d = -to_unit @ primitives.center[i], directions @ to_unit.T
        with np.errstate(divide="ignore", invalid="ignore"):
            slabs = np.stack([(-1 - o) / d, (1 - o) / d])
            low, high = slabs.min(0), slabs.max(0)
            if primitives.kind[i] == BOX:
                enter, leave = low.max(1), high.min(1)
            else:
                k = 2 if primitives.kind[i] == CYLINDER else 3
                a, b, c = (d[:, :k] ** 2).sum(1), d[:, :k] @ o[:k], o[:k] @ o[:k] - 1
                root = np.sqrt(b * b - a * c)
                enter, leave = (-b - root) / a, (-b + root) / a
                if k == 2:
                    enter, leave = np.maximum(enter, low[:, 2]), np.minimum(leave, high[:, 2])
            hit = (enter < leave) & (enter > 0)
        nearest[hit] = np.minimum(nearest[hit], enter[hit])
    return nearest


@pytest.mark.parametrize("seed", range(3))
def test_culling_by_windows_finds_what_a_plain_search_finds(seed):
    rng = np.random.default_rng(seed)
    count = 150
    rows = [
        part(
            int(rng.integers(3)),
            tuple(rng.normal(0, (25, 25, 3))),
            tuple(rng.uniform(0.05, 4, 3)),
            reflectivity=1,
            yaw=rng.uniform(0, 6.28),
            pitch=rng.normal(0, 0.4),
        )
        for _ in range(count)
    ]
    # Long walls beside the sensor, one overhead: the hard cases of the windows.
    rows += [part(BOX, (5, 3, 0), (60, 0.1, 2), reflectivity=1, yaw=0.1), part(BOX, (0, 0, 4), (6, 6, 0.2), reflectivity=1)]
    primitives = one(*rows)
    hits = cast(FAN, primitives, np.random.default_rng(0))
    expected = brute_force(primitives)
    same = np.isclose(hits.range_m, expected, atol=2e-3, rtol=1e-4) | (np.isinf(hits.range_m) & np.isinf(expected))
    # float32 decides otherwise only where a ray grazes an edge.
    assert (~same).sum() <= 5


def test_the_nearest_of_two_things_hides_the_other():
    hits = cast(
        FAN,
        one(part(BOX, (10, 0, 0), (1, 9, 9), reflectivity=1), part(BOX, (5, 0, 0), (0.5, 5, 5), reflectivity=1)),
        np.random.default_rng(0),
    )
    assert set(np.unique(hits.primitive)) == {-1, 1}
    assert 0 in hits.every_primitive  # but it is known to be behind


def test_rays_go_into_leaves_and_some_through():
    leafy = one(part(ELLIPSOID, (10, 0, 0), (2, 2, 2), reflectivity=1, free_path=1.0))
    solid = one(part(ELLIPSOID, (10, 0, 0), (2, 2, 2), reflectivity=1))
    soft, hard = (cast(FAN, p, np.random.default_rng(1)).range_m for p in (leafy, solid))
    inside = np.isfinite(soft)
    assert 0.5 * np.isfinite(hard).sum() < inside.sum() < np.isfinite(hard).sum()
    assert (soft[inside] >= hard[inside]).all()
    points = FAN.directions[inside].astype(np.float64) * soft[inside, None] - (10, 0, 0)
    assert (np.linalg.norm(points, axis=1) <= 2.001).all()


def test_nothing_gives_no_hits():
    hits = cast(FAN, Primitives.empty(), np.random.default_rng(0))
    assert np.isinf(hits.range_m).all()
    assert (hits.primitive == -1).all()
    assert len(hits.every_ray) == 0


@pytest.mark.parametrize(("first", "columns"), [(0, 271), (1000, 200), (541, 1), (900, 1083), (1085, 1084)])
def test_a_sector_sees_what_the_whole_turn_sees_there(first, columns):
    rng = np.random.default_rng(5)
    rows = [
        part(kind, tuple(rng.uniform(-9, 9, 3)), tuple(rng.uniform(0.2, 3, 3)), reflectivity=1, yaw=rng.uniform(0, 6))
        for kind in (BOX, CYLINDER, ELLIPSOID)
        for _ in range(25)
    ]
    rows.append(part(BOX, (0, 0, -3), (5, 5, 0.1), reflectivity=1))  # below the sensor: every azimuth
    things, small = one(*rows), np.random.default_rng(0)
    sector = FAN.sector(first, columns)
    assert sector.columns == columns
    whole, part_of_it = cast(FAN, things, small), cast(sector, things, small)
    there = (first + np.arange(columns)) % FAN.azimuths
    assert np.array_equal(part_of_it.range_m, whole.range_m.reshape(-1, FAN.rings)[there].ravel())
    assert np.array_equal(part_of_it.primitive, whole.primitive.reshape(-1, FAN.rings)[there].ravel())


def test_every_hit_has_its_range():
    things = one(part(BOX, (10, 0, 0), (1, 2, 1.5), reflectivity=1), part(BOX, (20, 0, 0), (1, 2, 1.5), reflectivity=1))
    hits = cast(FAN, things, np.random.default_rng(0))
    x = FAN.directions[hits.every_ray, 0] * hits.every_range_m
    np.testing.assert_allclose(x, np.where(hits.every_primitive == 0, 9.0, 19.0), atol=1e-4)
    assert set(hits.every_primitive.tolist()) == {0, 1}
