"""Oriented boxes of one frame."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

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
    # What only some datasets tell; None where they do not.
    num_radar_points: NDArray[np.int32] | None = None  # (B,) nuScenes
    attribute: tuple[str, ...] | None = None  # nuScenes: "vehicle.moving"...; "" where a box has none
    difficulty: NDArray[np.int8] | None = None  # (B,) Waymo: 1, 2 as annotated, 0 = not set
    acceleration: NDArray[np.float64] | None = None  # (B, 2) metres per second squared along x and y; Waymo

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
        if self.num_radar_points is not None:
            shapes["num_radar_points"] = (self.num_radar_points.shape, (count,))
        if self.attribute is not None:
            shapes["attribute"] = ((len(self.attribute),), (count,))
        if self.difficulty is not None:
            shapes["difficulty"] = (self.difficulty.shape, (count,))
        if self.acceleration is not None:
            shapes["acceleration"] = (self.acceleration.shape, (count, 2))
        for name, (found, expected) in shapes.items():
            if found != expected:
                raise ValueError(f"{name} has shape {found}, expected {expected} for {count} boxes")

    def __len__(self) -> int:
        return len(self.category)

    def select(self, index: NDArray[np.bool_] | NDArray[np.integer]) -> Boxes:
        """The boxes chosen by a boolean mask or an index, in that order."""
        rows = np.flatnonzero(index) if index.dtype == np.bool_ else index
        chosen: dict[str, object] = {}
        for field in fields(self):
            column = getattr(self, field.name)
            chosen[field.name] = tuple(column[int(row)] for row in rows) if isinstance(column, tuple) else column
            if isinstance(column, np.ndarray):
                chosen[field.name] = column[rows]
        return replace(self, **chosen)

    @staticmethod
    def empty() -> Boxes:
        """No boxes: the frame was annotated and holds none."""
        return Boxes(np.zeros((0, 3)), np.zeros((0, 3)), np.zeros(0), np.zeros((0, 2)), (), (), np.zeros(0, np.int32))
