"""A car with a LiDAR drives through a town: sweeps with their truth, one after the other, without touching the disk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from picture3d.config import FrozenConfig
from picture3d.structures.boxes import Boxes
from picture3d.structures.frame import Frame
from picture3d.structures.poses import Pose
from picture3d.synthetic.lidar import LabelledSweep, SpinningLidar, scan
from picture3d.synthetic.world import Town, TownConfig, build_town

# LIDAR_TOP of the nuScenes cars, nearly: x of the sensor points to the car's right, y forward.
EGO_FROM_LIDAR = Pose.from_yaw(-np.pi / 2, (0.94, 0.0, 1.84))
FIRST_TIMESTAMP_US = 1_600_000_000_000_000
# Boxes are made for things within this distance of the car.
BOX_RADIUS_M = 75.0


class DriveConfig(FrozenConfig):
    """How long and how densely to record."""

    keyframes: int = 20  # 2 Hz
    sweeps_per_keyframe: int = 9  # sweeps between two keyframes; 9 is the sensor's own 20 Hz
    keyframe_gap_s: float = 0.5
    town: TownConfig = TownConfig()
    lidar: SpinningLidar = SpinningLidar()

    @property
    def sweeps(self) -> int:
        """Number of sweeps of the drive, keyframes included; the last sweep is a keyframe."""
        return max(self.keyframes - 1, 0) * (self.sweeps_per_keyframe + 1) + min(self.keyframes, 1)


@dataclass(frozen=True, slots=True, eq=False)
class DriveStep:
    """One sweep of a drive and everything true about its moment."""

    index: int  # position in the drive
    time_s: float  # since the start of the drive
    timestamp_us: int
    is_keyframe: bool
    global_from_ego: Pose
    ego_from_lidar: Pose
    sweep: LabelledSweep
    boxes_global: Boxes | None  # keyframes only: things near the car in the global frame, with their points counted

    @property
    def global_from_lidar(self) -> Pose:
        """LiDAR to global."""
        return self.global_from_ego @ self.ego_from_lidar

    def frame(self, log: str) -> Frame:
        """The step as a frame: labels are lidarseg indices 0..31, boxes in the LiDAR frame."""
        boxes = None if self.boxes_global is None else moved_boxes(self.boxes_global, self.global_from_lidar.inverse())
        return Frame(
            log=log,
            index=self.index,
            token=f"{log}-{self.index:06d}",
            timestamp_us=self.timestamp_us,
            points=self.sweep.points,
            global_from_ego=self.global_from_ego,
            ego_from_lidar=self.ego_from_lidar,
            is_keyframe=self.is_keyframe,
            labels=self.sweep.labels,
            instances=self.sweep.instances,
            boxes=boxes,
        )


def drive(seed: int, config: DriveConfig = DriveConfig(), *, start: int = 0) -> Iterator[DriveStep]:  # noqa: B008 - frozen
    """Sweeps of a drive through the town of `seed`, from number `start` on; each a pure function of (seed, config, number)."""
    town = build_town(seed, config.town)
    for index in range(start, config.sweeps):
        yield drive_step(town, config, index)


def drive_step(town: Town, config: DriveConfig, index: int) -> DriveStep:
    """Sweep number `index` of the drive through `town`."""
    gap_us = config.keyframe_gap_s * 1e6 / (config.sweeps_per_keyframe + 1)
    since_us = round(index * gap_us)
    time_s = since_us / 1e6
    global_from_ego = town.ego_pose(time_s)
    global_from_lidar = global_from_ego @ EGO_FROM_LIDAR
    # Keyed by time: a keyframe is the same whatever the number of sweeps between keyframes.
    rng = np.random.default_rng([town.seed, 0x73776570, since_us])
    sweep = scan(town, global_from_lidar, time_s, rng, config.lidar)
    is_keyframe = index % (config.sweeps_per_keyframe + 1) == 0
    boxes = _boxes_around(town, global_from_lidar, time_s, sweep) if is_keyframe else None
    return DriveStep(index, time_s, FIRST_TIMESTAMP_US + since_us, is_keyframe, global_from_ego, EGO_FROM_LIDAR, sweep, boxes)


def _boxes_around(town: Town, global_from_lidar: Pose, time_s: float, sweep: LabelledSweep) -> Boxes:
    away = np.linalg.norm(town.poses(time_s)[:, :2] - global_from_lidar.translation[:2], axis=1)
    boxes = town.boxes(time_s, np.flatnonzero(away < BOX_RADIUS_M))
    points = global_from_lidar.apply(sweep.points.xyz.astype(np.float64))
    return replace(boxes, num_points=count_points(boxes, points))


def count_points(boxes: Boxes, points: np.ndarray) -> np.ndarray:
    """(B,) int32: points (N, 3), in the frame of the boxes, inside each box, faces included."""
    counts = np.zeros(len(boxes), np.int32)
    order = np.argsort(points[:, 0], kind="stable")
    points = points[order]
    reach = np.linalg.norm(boxes.size[:, :2], axis=1) / 2
    low = np.searchsorted(points[:, 0], boxes.center[:, 0] - reach)
    high = np.searchsorted(points[:, 0], boxes.center[:, 0] + reach, side="right")
    for i in range(len(boxes)):
        offset = points[low[i] : high[i]] - boxes.center[i]
        c, s = np.cos(boxes.yaw[i]), np.sin(boxes.yaw[i])
        along, across = c * offset[:, 0] + s * offset[:, 1], c * offset[:, 1] - s * offset[:, 0]
        half = boxes.size[i] / 2
        inside = (np.abs(along) <= half[0]) & (np.abs(across) <= half[1]) & (np.abs(offset[:, 2]) <= half[2])
        counts[i] = inside.sum()
    return counts


def moved_boxes(boxes: Boxes, pose: Pose) -> Boxes:
    """Boxes in another frame; yaw follows the heading's shadow on the new xy plane."""
    heading = np.stack([np.cos(boxes.yaw), np.sin(boxes.yaw), np.zeros(len(boxes))], 1) @ pose.rotation.T
    velocity = np.concatenate([boxes.velocity, np.zeros((len(boxes), 1))], 1) @ pose.rotation.T
    return replace(
        boxes, center=pose.apply(boxes.center), yaw=np.arctan2(heading[:, 1], heading[:, 0]), velocity=velocity[:, :2]
    )  # fmt: skip
