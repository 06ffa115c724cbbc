"""A car with five LiDARs drives through a town at 10 Hz: frames with their truth, without touching the disk.

A frame lasts 0.1 s, during which the TOP LiDAR turns once and the car moves on: the columns of its range image look from
`sectors` places along the way. The vehicle pose of the frame is that of its middle, as in the public data, and what moves in
the town stands where it is at that moment, so that boxes fit the points; the side LiDARs look from there too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from picture3d.config import FrozenConfig
from picture3d.structures.boxes import Boxes
from picture3d.structures.poses import Pose
from picture3d.synthetic.drive import FIRST_TIMESTAMP_US, count_points, moved_boxes
from picture3d.synthetic.primitives import Primitives
from picture3d.synthetic.waymo_lidar import LASERS, TOP, Laser, Returns, Shot, euler_of, pose_of, scan_pixels
from picture3d.synthetic.waymo_truth import LabelledThings, NoLabelZone, no_label_zone, point_classes, things_near
from picture3d.synthetic.world import Town, TownConfig

FRAME_GAP_US = 100_000


class WaymoConfig(FrozenConfig):
    """How long to record, and how."""

    frames: int = 200  # 10 Hz
    sectors: int = 10  # places that the columns of the TOP LiDAR look from
    segmentation_every: int = 5  # every n-th frame has classes of the TOP LiDAR's points: 2 Hz
    town: TownConfig = TownConfig()


@dataclass(frozen=True, slots=True, eq=False)
class LaserImages:
    """What one LiDAR saw in a frame."""

    laser: Laser
    returns: tuple[Returns, Returns]
    in_zone: tuple[NDArray[np.bool_], NDArray[np.bool_]]  # of each return: in the no-label zone
    column_pose: NDArray[np.float32] | None  # TOP: (W, 6) roll, pitch, yaw, x, y, z of global_from_vehicle, by column
    classes: tuple[NDArray[np.uint8], NDArray[np.uint8]] | None  # TOP, on annotated frames: Segmentation.Type of each return


@dataclass(frozen=True, slots=True, eq=False)
class WaymoFrame:
    """One frame and everything true about it."""

    index: int
    timestamp_us: int  # of its first column
    global_from_vehicle: Pose  # of its middle
    lasers: tuple[LaserImages, ...]  # in the order of `LASERS`
    boxes: Boxes  # seen things, vehicle frame, points of both returns counted; category is the type's name
    box_type: NDArray[np.int64]  # (B,) Label.Type
    global_velocity: NDArray[np.float64]  # (B, 2) m/s along the global axes
    global_acceleration: NDArray[np.float64]  # (B, 2) m/s^2 along the global axes
    num_top_points: NDArray[np.int32]  # (B,) points of the TOP LiDAR
    zone: NoLabelZone

    def points(self, name: int, which: int) -> NDArray[np.float64]:
        """(n, 3) echoes, metres, vehicle frame, of LiDAR `name` (1..5); `which` is 0 for the first return, 1 for the second."""
        images = next(images for images in self.lasers if images.laser.name == name)
        vehicle_from_global = self.global_from_vehicle.inverse()
        return np.asarray(vehicle_from_global.apply(images.returns[which].xyz_global), np.float64)


def waymo_frame(town: Town, config: WaymoConfig, index: int) -> WaymoFrame:
    """Frame number `index` of the drive through `town`: a pure function of its arguments."""
    begin_us = index * FRAME_GAP_US
    middle_s = (begin_us + FRAME_GAP_US / 2) / 1e6
    global_from_vehicle = town.ego_pose(middle_s)
    x, y = float(global_from_vehicle.translation[0]), float(global_from_vehicle.translation[1])
    zone = no_label_zone(town)
    annotated = index % config.segmentation_every == 0
    lasers: list[LaserImages] = []
    top_near = Primitives.empty()
    for laser in LASERS:
        # Mounts are up to 4.1 m from the origin of the vehicle.
        near = town.primitives_near(x, y, laser.echoes.max_range_m + 5.0, middle_s)
        shots, column_pose = [Shot(global_from_vehicle, laser.first_column, laser.field_columns)], None
        if laser.name == TOP:
            top_near = near
            shots, column_pose = _turn(town, config, laser, begin_us / 1e6)
        # Keyed by moment and LiDAR: a frame does not depend on those before it.
        rng = np.random.default_rng([town.seed, 0x7761796D, begin_us, laser.name])
        returns = scan_pixels(laser, shots, near, town.ground, rng)
        first, second = (zone.contains(echo.xyz_global[:, :2]) for echo in returns)
        classes = None
        if laser.name == TOP and annotated:
            classes = (point_classes(town, near, returns[0]), point_classes(town, near, returns[1]))
        lasers.append(LaserImages(laser, returns, (first, second), column_pose, classes))
    things = things_near(town, top_near, global_from_vehicle.translation, middle_s)
    return _labelled(index, FIRST_TIMESTAMP_US + begin_us, global_from_vehicle, tuple(lasers), things, zone)


def _turn(town: Town, config: WaymoConfig, laser: Laser, begin_s: float) -> tuple[list[Shot], NDArray[np.float32]]:
    """Where the columns of the TOP LiDAR look from, and the same as the format stores it."""
    edges = np.linspace(0, laser.width, config.sectors + 1).astype(np.int64)
    shots: list[Shot] = []
    column_pose = np.empty((laser.width, 6), np.float32)
    for first, end in pairwise(edges.tolist()):
        time_s = begin_s + FRAME_GAP_US / 1e6 * (first + end) / 2 / laser.width
        column_pose[first:end] = euler_of(town.ego_pose(time_s))
        # The rays leave from the stored pose, not from the one that was rounded to it.
        shots.append(Shot(pose_of(column_pose[first]), first, end - first))
    return shots, column_pose


def _labelled(
    index: int,
    timestamp_us: int,
    global_from_vehicle: Pose,
    lasers: tuple[LaserImages, ...],
    things: LabelledThings,
    zone: NoLabelZone,
) -> WaymoFrame:
    """Counts points and keeps what was seen outside the zone."""
    vehicle_from_global = global_from_vehicle.inverse()
    boxes = moved_boxes(things.boxes, vehicle_from_global)
    by_laser = {
        images.laser.name: count_points(
            boxes, vehicle_from_global.apply(np.concatenate([echo.xyz_global for echo in images.returns]))
        )
        for images in lasers
    }
    total = np.sum(list(by_laser.values()), 0, dtype=np.int32)
    keep = np.flatnonzero((total > 0) & ~zone.contains(things.boxes.center[:, :2]))
    assert things.boxes.acceleration is not None
    return WaymoFrame(
        index=index,
        timestamp_us=timestamp_us,
        global_from_vehicle=global_from_vehicle,
        lasers=lasers,
        boxes=replace(boxes, num_points=total).select(keep),
        box_type=things.type[keep],
        global_velocity=things.boxes.velocity[keep],
        global_acceleration=things.boxes.acceleration[keep],
        num_top_points=by_laser[TOP][keep],
        zone=zone,
    )
