"""Oriented boxes of one frame."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Boxes:
    """B boxes in one frame of reference; every column has B rows."""

    center: NDArray[np.float64]  # (B, 3) metres, the geometric centre
    size: NDArray[np.float64]  # (B, 3) metres: length (along the heading), width, height
    yaw: NDArray[np.float64]  # (B,) radians, counter-clockwise from x
    velocity: NDArray[np.float64]  # (B, 2) metres per second along x and y; NaN where unknown
    category: tuple[str, ...]  # dataset's own category names
    track_id: tuple[str, ...]  # the same object keeps its id in a log
    num_points: NDArray[np.int32]  # (B,) LiDAR points inside, as the dataset counts them; -1 where unknown

    def __post_init__(self) -> None:
        count = len(self.category)
        shapes = {
            "center": (self.center.shape, (count, 3)),
            "size": (self.size.shape, (count, 3)),
            "yaw": (self.yaw.shape, (count,)),
            "velocity": (self.velocity.shape, (count, 2)),
            "num_points": (self.num_points.shape, (count,)),
            "track_id": ((len(self.track_id),), (count,)),
        }
        for name, (found, expected) in shapes.items():
            if found != expected:
                raise ValueError(f"{name} has shape {found}, expected {expected} for {count} boxes")

    def __len__(self) -> int:
        return len(self.category)

    @staticmethod
    def empty() -> Boxes:
        """No boxes: the frame was annotated and holds none."""
        return Boxes(np.zeros((0, 3)), np.zeros((0, 3)), np.zeros(0), np.zeros((0, 2)), (), (), np.zeros(0, np.int32))
