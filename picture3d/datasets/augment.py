"""Augmentation of whole frames: flips, rotation, scaling, translation. Points and boxes go through the same transform."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from picture3d.config import FrozenConfig
from picture3d.structures.boxes import Boxes
from picture3d.structures.occupancy import Occupancy


class AugmentConfig(FrozenConfig):
    """What is drawn for a frame, in this order. The defaults are those of the published nuScenes segmentation recipe."""

    flip_x: bool = Field(default=True, description="Mirror y with probability 1/2 (a flip along the x axis).")
    flip_y: bool = Field(default=True, description="Mirror x with probability 1/2.")
    rotation: float = Field(
        default=0.78539816, ge=0, description="Rotate about z by an angle drawn from -rotation..rotation, rad."
    )
    scale: tuple[float, float] = Field(default=(0.9, 1.1), description="Scale by a factor drawn from this range.")
    translation: float = Field(default=0.5, ge=0, description="Shift each axis by a normal draw of this sigma, in metres.")
    quarter_turns: bool = Field(default=False, description="Turn by 0, 90, 180 or 270 degrees besides; cells stay cells.")

    @property
    def keeps_cells(self) -> bool:
        """Whether every draw takes the cells of a grid around the sensor to cells: flips and quarter turns alone do."""
        return self.rotation == 0 and self.scale == (1.0, 1.0) and self.translation == 0


@dataclass(frozen=True, slots=True, eq=False)
class Augmentation:
    """One drawn transform: ``p' = scale * rotation(yaw) @ flip(p) + translation``."""

    flip_x: bool = False
    flip_y: bool = False
    yaw: float = 0.0  # radians, counter-clockwise from x
    scale: float = 1.0
    translation: tuple[float, float, float] = (0.0, 0.0, 0.0)  # metres
    quarter_turns: int = 0  # of 90 degrees counter-clockwise, added to the yaw without rounding

    @property
    def linear(self) -> NDArray[np.float64]:
        """(3, 3) float64: the transform without its translation. Its determinant is negative after a single flip."""
        c, s = np.cos(self.yaw), np.sin(self.yaw)
        for _ in range(self.quarter_turns % 4):
            c, s = -s, c
        rotation = np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])
        flip = np.array([-1.0 if self.flip_y else 1.0, -1.0 if self.flip_x else 1.0, 1.0])
        return self.scale * rotation * flip

    def points(self, xyz: NDArray[np.float32]) -> NDArray[np.float32]:
        """(N, 3) float32 points, moved; rows keep their order, so row numbers go on naming the same points."""
        return affine(xyz, self.linear, self.translation)

    def boxes(self, boxes: Boxes) -> Boxes:
        """Boxes, moved: centres as points, sizes scaled, headings wrapped to [-pi, pi), velocities turned and scaled."""
        yaw = -boxes.yaw if self.flip_x else boxes.yaw
        yaw = np.pi - yaw if self.flip_y else yaw
        turned = self.yaw + self.quarter_turns * (np.pi / 2)
        return replace(
            boxes,
            center=boxes.center @ self.linear.T + np.asarray(self.translation),
            size=boxes.size * self.scale,
            yaw=(yaw + turned + np.pi) % (2 * np.pi) - np.pi,
            velocity=boxes.velocity @ self.linear[:2, :2].T,
            acceleration=None if boxes.acceleration is None else boxes.acceleration @ self.linear[:2, :2].T,
        )

    def occupancy(self, occupancy: Occupancy) -> Occupancy:
        """Occupied cells, moved without loss.

        Raises:
            ValueError: if cells would not fall on cells: turned by anything but quarters, scaled, shifted.
        """
        if self.yaw != 0 or self.scale != 1 or any(self.translation):
            raise ValueError("only flips and quarter turns take the cells of a grid to cells")
        return occupancy.moved(mirror_x=self.flip_y, mirror_y=self.flip_x, quarter_turns=self.quarter_turns)


def affine(
    xyz: NDArray[np.float32], linear: NDArray[np.float64], translation: NDArray[np.float64] | tuple[float, float, float]
) -> NDArray[np.float32]:
    """(N, 3) float32 points ``linear @ p + translation``, computed in float64.

    Written out by columns: a matrix product may round differently with another number of threads, and what a sample holds
    must not depend on how many workers load it.
    """
    x, y, z = (np.ascontiguousarray(xyz[:, axis], np.float64) for axis in range(3))
    out = np.empty((len(xyz), 3), np.float32)
    for axis in range(3):
        column = np.full(len(xyz), float(translation[axis]))
        for factor, values in zip(linear[axis], (x, y, z), strict=True):
            if factor != 0.0:
                column += factor * values
        out[:, axis] = column
    return out


def draw_augmentation(config: AugmentConfig, rng: np.random.Generator) -> Augmentation:
    """Draws one transform. The same numbers are taken from `rng` whatever is switched on, `quarter_turns` aside: one more."""
    flip_x, flip_y = rng.random(2) < 0.5
    yaw = rng.uniform(-1.0, 1.0) * config.rotation
    low, high = config.scale
    scale = low + (high - low) * rng.random()
    dx, dy, dz = (float(v) for v in rng.standard_normal(3) * config.translation)
    turns = int(rng.integers(4)) if config.quarter_turns else 0
    flips = bool(flip_x) and config.flip_x, bool(flip_y) and config.flip_y
    return Augmentation(*flips, float(yaw), float(scale), (dx, dy, dz), turns)
