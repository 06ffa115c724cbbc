"""Hits on the ground: level plane in closed form, hills by their own height, kerbs by their step."""

from __future__ import annotations

import numpy as np

from picture3d.synthetic.ground import COVER_STEP, ROAD, SIDEWALK, TERRAIN, Ground
from picture3d.synthetic.raycast import ray_fan

FAN = ray_fan(360, np.radians(np.linspace(-30.67, 10.67, 32)))


def test_a_level_plane_is_hit_at_height_over_sine():
    reached, codes, cosine = Ground.flat(ROAD).cast(np.array([4.0, 4.0, 1.84]), FAN.directions, 100.0)
    down = -FAN.directions[:, 2]
    expected = np.where(down > 0, 1.84 / np.maximum(down, 1e-9), np.inf)
    hit = expected < 100
    np.testing.assert_allclose(reached[hit], expected[hit], rtol=2e-3)  # marched in float32; the flattest beam is at 79 m
    assert np.isinf(reached[~hit & (expected > 105)]).all()
    assert (codes[hit] == ROAD).all()
    np.testing.assert_allclose(cosine[hit], down[hit], atol=1e-5)


def test_a_raised_cover_is_hit_at_its_step():
    origin = np.array([4.0, 4.0, 1.84])
    reached, codes, _ = Ground.flat(SIDEWALK).cast(origin, FAN.directions, 60.0)
    hit = np.isfinite(reached)
    z = origin[2] + reached[hit] * FAN.directions[hit, 2]
    np.testing.assert_allclose(z, COVER_STEP[SIDEWALK], atol=0.01)
    assert (codes[hit] == SIDEWALK).all()


def test_hits_on_hills_lie_on_the_surface():
    waves = np.array([[0.8, 0.05, 0.01, 0.3], [0.2, -0.02, 0.09, 2.0]])
    ground = Ground(waves, np.zeros((500, 500), np.uint8), 0.4)
    origin = np.array([100.0, 100.0, float(ground.height(np.array(100.0), np.array(100.0))) + 1.84])
    reached, _, _ = ground.cast(origin, FAN.directions, 80.0)
    hit = np.isfinite(reached)
    assert hit.sum() > 5000
    points = origin + FAN.directions[hit].astype(np.float64) * reached[hit, None]
    above = points[:, 2] - ground.height(points[:, 0], points[:, 1])
    assert np.abs(above).max() < 0.06
    assert np.median(np.abs(above)) < 0.003


def test_a_kerb_is_hit_on_its_face_and_hides_nothing_above_it():
    cover = np.full((400, 400), ROAD, np.uint8)
    cover[:, 225:] = TERRAIN  # from x = 45 m on
    ground = Ground(np.zeros((1, 4)), cover, 0.2)
    origin = np.array([40.0, 40.0, 1.84])
    reached, codes, _ = ground.cast(origin, FAN.directions, 60.0)
    hit = np.isfinite(reached)
    points = origin + FAN.directions[hit].astype(np.float64) * reached[hit, None]
    raised = codes[hit] == TERRAIN
    assert (points[raised, 0] > 44.99).all()
    assert (points[~raised, 0] < 45.01).all()
    assert (points[:, 2] > -0.01).all()
    assert (points[:, 2] < COVER_STEP[TERRAIN] + 0.01).all()
    level = points[raised & (points[:, 0] > 46), 2]
    np.testing.assert_allclose(level, COVER_STEP[TERRAIN], atol=0.012)


def test_rays_that_all_go_up_hit_nothing():
    up = FAN.directions[FAN.directions[:, 2] > 0.06]
    reached, _, _ = Ground.flat().cast(np.array([0.0, 0.0, 1.0]), up, 50.0)
    assert np.isinf(reached).all()
