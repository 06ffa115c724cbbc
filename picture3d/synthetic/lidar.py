"""A 32-beam spinning LiDAR (HDL-32E) looking at the town.

All rays of a sweep leave at the sweep's timestamp: the distortion by the car's own motion during a turn is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from picture3d.config import FrozenConfig
from picture3d.structures.points import IntensityUnit, PointCloud
from picture3d.structures.poses import Pose
from picture3d.synthetic.ground import COVER_LABEL, COVER_REFLECTIVITY, COVER_ROUGHNESS, Ground
from picture3d.synthetic.primitives import Primitives
from picture3d.synthetic.raycast import Hits, RayFan, cast, ray_fan


class Scenery(Protocol):
    """What a LiDAR can look at."""

    @property
    def ground(self) -> Ground:
        """Height and cover."""
        ...

    def primitives_near(self, x: float, y: float, radius_m: float, time_s: float) -> Primitives:
        """Everything standing within `radius_m` of (x, y) at a time, global frame."""
        ...


class SpinningLidar(FrozenConfig):
    """Sensor model; the defaults are those of the HDL-32E on the nuScenes cars."""

    beams: int = 32
    lowest_deg: float = -30.67  # ring 0
    highest_deg: float = 10.67
    azimuths: int = 1084
    max_range_m: float = 100.0
    range_sigma_m: float = 0.02
    # A return is seen with probability 1 - exp(-signal); signal = reach * brightness * (2 m / range)^2.
    reach: float = 40.0
    blind_share: float = 0.01  # returns lost for no reason

    def fan(self) -> RayFan:
        """The rays of one turn, in the LiDAR frame."""
        return _fan(self.azimuths, self.beams, self.lowest_deg, self.highest_deg)


@lru_cache(maxsize=8)
def _fan(azimuths: int, beams: int, lowest_deg: float, highest_deg: float) -> RayFan:
    return ray_fan(azimuths, np.radians(np.linspace(lowest_deg, highest_deg, beams)))


class Echoes(Protocol):
    """How well a sensor sees. A return is seen with probability 1 - exp(-signal), see :class:`SpinningLidar`."""

    @property
    def max_range_m(self) -> float:
        """Returns from farther away are not seen."""
        ...

    @property
    def range_sigma_m(self) -> float:
        """Standard deviation of a measured range."""
        ...

    @property
    def reach(self) -> float:
        """Strength of the signal."""
        ...

    @property
    def blind_share(self) -> float:
        """Share of returns lost for no reason."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class LabelledSweep:
    """One sweep with the truth about every point. Rows go azimuth by azimuth, in each from the lowest ring up."""

    points: PointCloud  # LiDAR frame: x right, y forward, z up; intensity 0..255; ring 0 = lowest
    labels: NDArray[np.uint8]  # (N,) lidarseg category index, 0..31
    instances: NDArray[np.uint16]  # (N,) instance number of the town, 0 = scenery
    visible_share: NDArray[np.float32]  # (I + 1,) by instance: share of its silhouette's rays that reach it; 0 where none could


@dataclass(frozen=True, slots=True, eq=False)
class Surfaces:
    """What rays of a fan met: n of them, each within the sensor's range."""

    rays: NDArray[np.intp]  # (n,) number of the ray in its fan
    range_m: NDArray[np.float32]  # (n,) true range
    solid: NDArray[np.bool_]  # (n,) a primitive; otherwise the ground
    primitive: NDArray[np.int32]  # (n,) row of the primitive, 0 on the ground
    cover: NDArray[np.uint8]  # (n,) code of the ground's cover, without meaning on primitives
    cosine: NDArray[np.float32]  # (n,) of the angle of incidence

    def of(self, near: Primitives, on_primitive: NDArray, on_ground: NDArray) -> NDArray:
        """(n,) values: `on_primitive` (P,) of the primitive met, or `on_ground` (covers,) of the cover."""
        ground = on_ground[self.cover]
        return np.where(self.solid, on_primitive[self.primitive], ground) if len(near) else ground


def look(
    near: Primitives, ground: Ground, global_from_fan: Pose, fan: RayFan, max_range_m: float, rng: np.random.Generator
) -> tuple[Surfaces, Hits, NDArray[np.float32], NDArray[np.uint8]]:
    """What the rays of `fan`, leaving `global_from_fan`, meet first.

    Returns:
        the surfaces, all hits on the primitives `near` (global frame), and for every ray range and cover where it meets the
        ground.
    """
    origin, rotation = global_from_fan.translation, global_from_fan.rotation
    hits = cast(fan, near.seen_from(rotation, origin), rng)
    ground_m, cover, ground_cosine = ground.cast(origin, (fan.directions @ rotation.T.astype(np.float32)), max_range_m)
    solid = hits.range_m <= ground_m
    range_m = np.minimum(hits.range_m, ground_m)
    rays = np.flatnonzero(range_m < max_range_m)
    solid = solid[rays]
    met = Surfaces(
        rays=rays,
        range_m=range_m[rays],
        solid=solid,
        primitive=np.where(solid, hits.primitive[rays], 0),
        cover=cover[rays],
        cosine=np.where(solid, hits.cosine[rays], ground_cosine[rays]),
    )
    return met, hits, ground_m, cover


def measure(
    met: Surfaces, near: Primitives, sensor: Echoes, rng: np.random.Generator
) -> tuple[NDArray[np.intp], NDArray[np.float32], NDArray[np.float32]]:
    """Rows (m,) of `met` that the sensor sees, their measured ranges (m,) and intensities (m,), whole numbers 0..255."""
    brightness = met.of(near, near.reflectivity, COVER_REFLECTIVITY) * (0.35 + 0.65 * met.cosine)
    soft = met.of(near, np.zeros(max(len(near), 1), np.float32), COVER_ROUGHNESS)
    signal = sensor.reach * (brightness + 4) * (0.15 + met.cosine) * (2 / np.maximum(met.range_m, 2)) ** 2
    seen = np.flatnonzero(rng.random(len(met.rays), dtype=np.float32) < (1 - sensor.blind_share) * -np.expm1(-signal))
    noise = rng.standard_normal((3, len(seen)), dtype=np.float32)
    measured = met.range_m[seen] + noise[0] * np.float32(sensor.range_sigma_m) + np.abs(noise[1]) * soft[seen]
    intensity = np.clip(np.rint(brightness[seen] * np.exp(0.3 * noise[2])), 0, 255).astype(np.float32)
    return seen, measured, intensity


def scan(
    town: Scenery,
    global_from_lidar: Pose,
    time_s: float,
    rng: np.random.Generator,
    lidar: SpinningLidar = SpinningLidar(),  # noqa: B008 - frozen
) -> LabelledSweep:
    """One turn of the sensor at `global_from_lidar`. All randomness comes from `rng`."""
    fan = lidar.fan()
    x, y = float(global_from_lidar.translation[0]), float(global_from_lidar.translation[1])
    near = town.primitives_near(x, y, lidar.max_range_m, time_s)
    met, hits, _, _ = look(near, town.ground, global_from_lidar, fan, lidar.max_range_m, rng)
    seen, measured, intensity = measure(met, near, lidar, rng)
    labels = met.of(near, near.label, COVER_LABEL)
    instances = met.of(near, near.instance, np.zeros(len(COVER_LABEL), np.uint16))
    points = PointCloud(
        xyz=fan.directions[met.rays[seen]] * measured[:, None],
        intensity=intensity,
        intensity_unit=IntensityUnit.RAW_255,
        ring=(met.rays[seen] % fan.rings).astype(np.int16),
    )
    return LabelledSweep(
        points,
        labels[seen].astype(np.uint8),
        instances[seen].astype(np.uint16),
        _visible_share(hits, near, met.solid, met.rays),
    )


def _visible_share(hits: Hits, near: Primitives, solid: NDArray[np.bool_], rays: NDArray[np.intp]) -> NDArray[np.float32]:
    """By instance: rays that end on it / rays that would if nothing else were there."""
    if not len(near):
        return np.zeros(1, np.float32)
    instance = near.instance[hits.every_primitive]
    objects = instance > 0
    ray, instance = hits.every_ray[objects].astype(np.int64), instance[objects].astype(np.int64)
    total = int(near.instance.max()) + 1
    silhouette = np.bincount(np.unique(ray * total + instance) % total, minlength=total)
    ends = near.instance[hits.primitive[rays[solid]]]
    reached = np.bincount(ends, minlength=total)
    return (reached[:total] / np.maximum(silhouette, 1)).astype(np.float32)
