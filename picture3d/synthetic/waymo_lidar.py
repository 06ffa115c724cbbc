"""The five LiDARs of the Waymo cars looking at the town: their rays are exactly the pixels of range images.

Geometry of a range image of H rows and W columns (the public definition, ``range_image_utils`` of the Waymo Open Dataset):
row 0 is the highest beam; column c looks, in the vehicle frame, towards azimuth ``pi - 2 pi (c + 1/2) / W`` (to the rear at
both edges, straight ahead in the middle). In the LiDAR's own frame that azimuth is smaller by the yaw of
``vehicle_from_laser``, and the point is
``range * (cos(azimuth) cos(inclination), sin(azimuth) cos(inclination), sin(inclination))``.

Ranges, sizes and fields of view are those of the paper (Sun et al., "Scalability in Perception for Autonomous Driving", 2020,
table 2); mounts are like those of the published calibrations, rounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from picture3d.structures.poses import Pose
from picture3d.synthetic.ground import COVER_LABEL, COVER_REFLECTIVITY, Ground
from picture3d.synthetic.lidar import Surfaces, look, measure
from picture3d.synthetic.primitives import Primitives
from picture3d.synthetic.raycast import Hits, RayFan, ray_fan

TOP, FRONT, SIDE_LEFT, SIDE_RIGHT, REAR = 1, 2, 3, 4, 5
# A second echo is told apart from the first if it comes from at least this much farther away.
ECHO_GAP_M = 1.0
# Echoes from behind leaves: their angle of incidence is not computed.
_SECOND_COSINE = 0.5
_SCALE = 1 / 100  # intensity of a surface of the town's brightness 100 is 1


class EchoModel(NamedTuple):
    """See :class:`picture3d.synthetic.lidar.Echoes`."""

    max_range_m: float
    range_sigma_m: float
    reach: float
    blind_share: float


@dataclass(frozen=True, slots=True, eq=False)
class Laser:
    """One LiDAR of the car."""

    name: int  # as in the format: 1 TOP, 2 FRONT, 3 SIDE_LEFT, 4 SIDE_RIGHT, 5 REAR
    height: int  # rows of its range image
    width: int  # columns
    vehicle_from_laser: Pose
    inclination_min: float  # radians, edges of the field of view
    inclination_max: float
    beam_inclinations: NDArray[np.float64] | None  # (H,) radians, ascending; None: evenly spaced
    outward_rad: float  # azimuth in the vehicle frame that the middle of its field of view looks to
    field_columns: int  # columns around it that see; W for a whole turn
    echoes: EchoModel

    @property
    def inclinations(self) -> NDArray[np.float64]:
        """(H,) radians, ascending: of the beams from the lowest row up."""
        if self.beam_inclinations is not None:
            return self.beam_inclinations
        share = (np.arange(self.height) + 0.5) / self.height
        return self.inclination_min + share * (self.inclination_max - self.inclination_min)

    @property
    def first_column(self) -> int:
        """The first of the columns that see; they go on past the right edge of the image."""
        middle = (np.pi - self.outward_rad) / (2 * np.pi) * self.width
        return 0 if self.field_columns == self.width else round(middle - self.field_columns / 2) % self.width

    def directions(self, pixels: NDArray[np.integer]) -> NDArray[np.float64]:
        """(n, 3) unit vectors, LiDAR frame, of pixels ``row * W + column``."""
        row, column = np.divmod(pixels, self.width)
        azimuth = np.pi - 2 * np.pi * (column + 0.5) / self.width - self.vehicle_from_laser.yaw
        inclination = self.inclinations[self.height - 1 - row]
        flat = np.cos(inclination)
        return np.stack([np.cos(azimuth) * flat, np.sin(azimuth) * flat, np.sin(inclination)], 1)

    def fan(self) -> tuple[RayFan, Pose]:
        """All rays, and `laser_from_fan`: column c is the fan's azimuth c, row r its ring H - 1 - r."""
        turn = -np.pi / self.width - self.vehicle_from_laser.yaw
        return _fan(self.width, tuple(self.inclinations.tolist())), Pose.from_yaw(turn)


@lru_cache(maxsize=4)
def _fan(width: int, inclinations: tuple[float, ...]) -> RayFan:
    return ray_fan(width, np.array(inclinations))


def _mount(yaw_deg: float, pitch_deg: float, roll_deg: float, x: float, y: float, z: float) -> Pose:
    return pose_of(np.array([*np.radians([roll_deg, pitch_deg, yaw_deg]), x, y, z]))


def pose_of(euler: NDArray[np.floating]) -> Pose:
    """The pose of (roll, pitch, yaw, x, y, z): turned about x, then y, then z, then moved; radians and metres."""
    (cr, cp, cy), (sr, sp, sy) = np.cos(euler[:3].astype(np.float64)), np.sin(euler[:3].astype(np.float64))
    rotation = np.array(
        [
            [cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr],
            [sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr],
            [-sp, cp * sr, cp * cr],
        ]
    )
    return Pose(rotation, euler[3:].astype(np.float64))


def euler_of(pose: Pose) -> NDArray[np.float32]:
    """(6,) float32 roll, pitch, yaw, x, y, z of a pose, as range images store it; pitch within a right angle."""
    r = pose.rotation
    angles = [np.arctan2(r[2, 1], r[2, 2]), np.arctan2(-r[2, 0], np.hypot(r[2, 1], r[2, 2])), np.arctan2(r[1, 0], r[0, 0])]
    return np.array([*angles, *pose.translation], np.float32)


def _top_inclinations() -> NDArray[np.float64]:
    """64 beams from -17.6 to 2.4 degrees, three times denser at the horizon than below."""
    share = np.arange(64) / 63
    return np.radians(-17.6 + 20.0 * (0.5 * share + 0.5 * (1 - (1 - share) ** 2)))


def _side(name: int, yaw_deg: float, mount: Pose) -> Laser:
    # Their beams are sparser than the pixels: about a fifth of the pixels in view hold a point.
    echoes = EchoModel(20.0, 0.01, 120.0, 0.8)
    return Laser(name, 200, 600, mount, -np.pi / 2, np.pi / 6, None, np.radians(yaw_deg), 300, echoes)


LASERS: tuple[Laser, ...] = (
    Laser(
        TOP, 64, 2650, _mount(148.0, -0.1, 0.35, 1.43, 0.0, 2.18), np.radians(-17.85), np.radians(2.5), _top_inclinations(),
        0.0, 2650, EchoModel(75.0, 0.015, 250.0, 0.01),
    ),
    _side(FRONT, 0.0, _mount(0.3, -1.2, 0.2, 4.07, 0.0, 0.69)),
    _side(SIDE_LEFT, 90.0, _mount(88.8, 1.3, 0.3, 3.25, 1.03, 0.98)),
    _side(SIDE_RIGHT, -90.0, _mount(-92.2, 1.4, 0.2, 3.25, -1.03, 0.98)),
    _side(REAR, 180.0, _mount(178.4, 1.5, 0.5, -1.16, 0.0, 0.46)),
)  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Returns:
    """Echoes that one LiDAR saw, with the truth about each: n of them."""

    pixel: NDArray[np.int64]  # (n,) row * W + column
    range_m: NDArray[np.float32]  # (n,) as measured
    intensity: NDArray[np.float32]  # (n,) raw: 0 and up, not bounded
    elongation: NDArray[np.float32]  # (n,)
    xyz_global: NDArray[np.float64]  # (n, 3) metres
    label: NDArray[np.uint8]  # (n,) lidarseg category
    primitive: NDArray[np.int32]  # (n,) row of the primitive met, -1 on the ground
    cover: NDArray[np.uint8]  # (n,) cover of the ground, without meaning elsewhere
    instance: NDArray[np.uint16]  # (n,) instance of the town, 0 = scenery

    def __len__(self) -> int:
        return len(self.pixel)

    @staticmethod
    def joined(parts: list[Returns]) -> Returns:
        """The echoes of all parts, one after the other."""
        return Returns(*(np.concatenate([getattr(p, name) for p in parts]) for name in Returns.__slots__))


class Shot(NamedTuple):
    """Columns of a range image that look from one place: `first` and the `columns` - 1 after it, past the right edge too."""

    global_from_vehicle: Pose
    first: int
    columns: int


def scan_pixels(
    laser: Laser, shots: list[Shot], near: Primitives, ground: Ground, rng: np.random.Generator
) -> tuple[Returns, Returns]:
    """First and second returns of a LiDAR whose columns look in turn from the places of `shots`.

    Second returns come from behind leaves, where at least `ECHO_GAP_M` lies between the two. `near` is in the global frame.
    """
    turn, laser_from_fan = laser.fan()
    first, second = [], []
    for shot in shots:
        fan = turn.sector(shot.first, shot.columns)
        global_from_laser = shot.global_from_vehicle @ laser.vehicle_from_laser
        met, hits, ground_m, cover = look(
            near, ground, global_from_laser @ laser_from_fan, fan, laser.echoes.max_range_m, rng
        )  # fmt: skip
        behind = _behind_leaves(met, hits, near, ground_m, cover, laser.echoes.max_range_m)
        first.append(_returns(laser, fan, global_from_laser, met, near, rng))
        later = _returns(laser, fan, global_from_laser, behind, near, rng)
        # Without a first return the second is not a second.
        second.append(_select(later, np.isin(later.pixel, first[-1].pixel)))
    return Returns.joined(first), Returns.joined(second)


def _returns(
    laser: Laser, fan: RayFan, global_from_laser: Pose, met: Surfaces, near: Primitives, rng: np.random.Generator
) -> Returns:
    seen, measured, brightness = measure(met, near, laser.echoes, rng)
    column, ring = np.divmod(met.rays[seen], fan.rings)
    pixel = (laser.height - 1 - ring) * laser.width + (fan.first + column) % laser.width
    range_m = np.maximum(measured, 0.05).astype(np.float32)
    leafy = met.of(near, np.where(near.free_path > 0, 0.4, 0.0), np.zeros(len(COVER_REFLECTIVITY)))[seen]
    elongation = np.rint(((1 - met.cosine[seen]) * 0.3 + leafy) * 64) / 64
    return Returns(
        pixel=pixel,
        range_m=range_m,
        intensity=brightness * np.float32(_SCALE),
        elongation=elongation.astype(np.float32),
        xyz_global=np.asarray(
            global_from_laser.apply(laser.directions(pixel) * range_m[:, None].astype(np.float64)), np.float64
        ),
        label=met.of(near, near.label, COVER_LABEL)[seen].astype(np.uint8),
        primitive=np.where(met.solid, met.primitive, -1)[seen].astype(np.int32),
        cover=met.cover[seen],
        instance=met.of(near, near.instance, np.zeros(len(COVER_LABEL), np.uint16))[seen].astype(np.uint16),
    )


def _select(returns: Returns, keep: NDArray[np.bool_]) -> Returns:
    return Returns(*(getattr(returns, name)[keep] for name in Returns.__slots__))


def _behind_leaves(
    met: Surfaces, hits: Hits, near: Primitives, ground_m: NDArray[np.float32], cover: NDArray[np.uint8], max_range_m: float
) -> Surfaces:
    """What the rays that ended in leaves would have met next."""
    leafy = met.solid & (near.free_path[met.primitive] > 0) if len(near) else met.solid
    least = np.full(len(ground_m), np.inf, np.float32)  # by ray of the fan
    least[met.rays[leafy]] = met.range_m[leafy] + np.float32(ECHO_GAP_M)
    next_m = np.where(ground_m > least, ground_m, np.float32(np.inf))
    what = np.full(len(ground_m), -1, np.int32)
    later = np.flatnonzero((hits.every_range_m > least[hits.every_ray]) & (hits.every_range_m < next_m[hits.every_ray]))
    later = later[np.argsort(hits.every_range_m[later], kind="stable")[::-1]]  # of several writes the last, nearest, stays
    next_m[hits.every_ray[later]] = hits.every_range_m[later]
    what[hits.every_ray[later]] = hits.every_primitive[later]
    rays = np.flatnonzero(next_m < max_range_m)
    return Surfaces(
        rays=rays,
        range_m=next_m[rays],
        solid=what[rays] >= 0,
        primitive=np.maximum(what[rays], 0),
        cover=cover[rays],
        cosine=np.full(len(rays), _SECOND_COSINE, np.float32),
    )
