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


@dataclass(frozen=True, slots=True, eq=False)
class LabelledSweep:
    """One sweep with the truth about every point. Rows go azimuth by azimuth, in each from the lowest ring up."""

    points: PointCloud  # LiDAR frame: x right, y forward, z up; intensity 0..255; ring 0 = lowest
    labels: NDArray[np.uint8]  # (N,) lidarseg category index, 0..31
    instances: NDArray[np.uint16]  # (N,) instance number of the town, 0 = scenery
    visible_share: NDArray[np.float32]  # (I + 1,) by instance: share of its silhouette's rays that reach it; 0 where none could


def scan(
    town: Scenery,
    global_from_lidar: Pose,
    time_s: float,
    rng: np.random.Generator,
    lidar: SpinningLidar = SpinningLidar(),  # noqa: B008 - frozen
) -> LabelledSweep:
    """One turn of the sensor at `global_from_lidar`. All randomness comes from `rng`."""
    fan = lidar.fan()
    origin, rotation = global_from_lidar.translation, global_from_lidar.rotation
    near = town.primitives_near(float(origin[0]), float(origin[1]), lidar.max_range_m, time_s)
    hits = cast(fan, near.seen_from(rotation, origin), rng)
    ground_m, cover, ground_cosine = town.ground.cast(
        origin, (fan.directions @ rotation.T.astype(np.float32)), lidar.max_range_m
    )
    solid = hits.range_m <= ground_m
    range_m = np.minimum(hits.range_m, ground_m)
    rays = np.flatnonzero(range_m < lidar.max_range_m)
    range_m, solid, which = range_m[rays], solid[rays], np.maximum(hits.primitive[rays], 0)
    if len(near):
        labels = np.where(solid, near.label[which], COVER_LABEL[cover[rays]])
        instances = np.where(solid, near.instance[which], 0).astype(np.uint16)
        brightness = np.where(solid, near.reflectivity[which], COVER_REFLECTIVITY[cover[rays]])
        soft = np.where(solid, 0, COVER_ROUGHNESS[cover[rays]])
    else:
        labels, instances = COVER_LABEL[cover[rays]], np.zeros(len(rays), np.uint16)
        brightness, soft = COVER_REFLECTIVITY[cover[rays]], COVER_ROUGHNESS[cover[rays]]
    cosine = np.where(solid, hits.cosine[rays], ground_cosine[rays])
    brightness = brightness * (0.35 + 0.65 * cosine)
    signal = lidar.reach * (brightness + 4) * (0.15 + cosine) * (2 / np.maximum(range_m, 2)) ** 2
    seen = np.flatnonzero(rng.random(len(rays), dtype=np.float32) < (1 - lidar.blind_share) * -np.expm1(-signal))
    noise = rng.standard_normal((3, len(seen)), dtype=np.float32)
    measured = range_m[seen] + noise[0] * np.float32(lidar.range_sigma_m) + np.abs(noise[1]) * soft[seen].astype(np.float32)
    intensity = np.clip(np.rint(brightness[seen] * np.exp(0.3 * noise[2])), 0, 255).astype(np.float32)
    points = PointCloud(
        xyz=fan.directions[rays[seen]] * measured[:, None],
        intensity=intensity,
        intensity_unit=IntensityUnit.RAW_255,
        ring=(rays[seen] % fan.rings).astype(np.int16),
    )
    return LabelledSweep(points, labels[seen].astype(np.uint8), instances[seen], _visible_share(hits, near, solid, rays))


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
