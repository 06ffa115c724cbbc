"""The cylindrical grid of LiDAR segmentation: cells of radius, angle and height instead of x, y and z.

Source: "Cylindrical and Asymmetrical 3D Convolution Networks for LiDAR Segmentation" (Cylinder3D), CVPR 2021.
"""

from __future__ import annotations

from dataclasses import dataclass

from picture3d.errors import ConfigError
from picture3d.structures.voxels import VoxelGrid


@dataclass(frozen=True, slots=True)
class CylinderGrid(VoxelGrid):
    """A regular grid over (radius, angle, height) about the z axis of the LiDAR frame: metres, radians, metres.

    The x, y, z of `coords`, `shape` and of the fields stand for radius, angle and height. Cell 0 begins at `range_min`; the
    last cell begins at `range_max` and holds only what lies exactly there, hence ``cells = extent / size + 1``, the convention
    that trained weights saw. The grid is not closed in angle: the first and the last cell are not neighbours.
    """

    clamp: bool = False  # True: points outside belong to the nearest cell, as published; False: they are dropped

    def __post_init__(self) -> None:
        for axis, low, high, size in zip(
            ("radius", "angle", "height"), self.range_min, self.range_max, self.voxel_size, strict=True
        ):
            steps = (high - low) / size if size > 0 else float("nan")
            if not steps >= 0.5:
                raise ConfigError(
                    f"cylinder grid: {axis} from {low} to {high} in cells of {size} holds no cell. Make the cells smaller, or "
                    "the range longer."
                )
            if abs(steps - round(steps)) > 1e-3:
                raise ConfigError(
                    f"cylinder grid: {axis} from {low} to {high} is {steps:.3f} steps of {size}, not a whole number. Take a "
                    f"size of {(high - low) / round(steps)!r} for {round(steps) + 1} cells."
                )
        if self.range_min[0] < 0:
            raise ConfigError(
                f"cylinder grid: the radius begins at {self.range_min[0]}, but cannot be negative. Set it to 0 or more"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of cells along radius, angle, height."""
        x, y, z = (
            round((high - low) / size) + 1
            for low, high, size in zip(self.range_min, self.range_max, self.voxel_size, strict=True)
        )
        return x, y, z


def cylinder_cell_size(
    range_min: tuple[float, float, float], range_max: tuple[float, float, float], cells: tuple[int, int, int]
) -> tuple[float, float, float]:
    """The cell size (metres, radians, metres) that divides a range into `cells`: ``extent / (cells - 1)``."""
    radius, angle, height = ((high - low) / (n - 1) for low, high, n in zip(range_min, range_max, cells, strict=True))
    return radius, angle, height
