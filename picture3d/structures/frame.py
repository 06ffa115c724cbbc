"""A frame: one sweep and everything known about it. All datasets are read into this value."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from picture3d.structures.boxes import Boxes
from picture3d.structures.points import PointCloud
from picture3d.structures.poses import Pose


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """One sweep of one log. Points and boxes are in the LiDAR frame of this sweep."""

    log: str  # name of the log (scene, segment, folder) this frame belongs to
    index: int  # position in the log, in order of time
    token: str  # the dataset's own name of this sweep, unique in the log
    timestamp_us: int  # microseconds
    points: PointCloud
    global_from_ego: Pose | None  # None where the dataset has no poses
    ego_from_lidar: Pose
    is_keyframe: bool = True  # annotated, or to be used as a training frame of its own
    labels: NDArray[np.uint8] | None = None  # (N,) semantic class of each point in the log's label set
    instances: NDArray[np.uint16] | None = None  # (N,) panoptic id of each point
    boxes: Boxes | None = None  # None: not annotated
    previous: tuple[int, ...] = ()  # indices of earlier sweeps of the same log, newest first

    def __post_init__(self) -> None:
        for name, column in (("labels", self.labels), ("instances", self.instances)):
            if column is not None and len(column) != len(self.points):
                raise ValueError(f"{self.log}[{self.index}] has {len(column)} {name} for {len(self.points)} points")

    @property
    def global_from_lidar(self) -> Pose | None:
        """LiDAR to global, or None where the dataset has no poses."""
        return None if self.global_from_ego is None else self.global_from_ego @ self.ego_from_lidar
