"""Boxes drawn over a bird's-eye picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw

Rgb = tuple[int, int, int]


def footprints(center: ArrayLike, size: ArrayLike, yaw: ArrayLike) -> NDArray[np.float64]:
    """(B, 4, 2) corners of boxes seen from above, metres: front left, front right, rear right, rear left."""
    center, size, yaw = (np.asarray(a, np.float64) for a in (center, size, yaw))
    along = np.stack([np.cos(yaw), np.sin(yaw)], 1)[:, None, :] * size[:, None, 0:1] / 2
    across = np.stack([-np.sin(yaw), np.cos(yaw)], 1)[:, None, :] * size[:, None, 1:2] / 2
    signs = np.array([[1, 1], [1, -1], [-1, -1], [-1, 1]], np.float64)
    return center[:, None, :2] + signs[None, :, 0:1] * along + signs[None, :, 1:2] * across


def draw_boxes(
    picture: Image.Image,
    center: ArrayLike,
    size: ArrayLike,
    yaw: ArrayLike,
    *,
    colors: Sequence[Rgb],
    extent_m: float = 50.0,
    center_m: tuple[float, float] = (0.0, 0.0),
    width_px: int = 2,
) -> Image.Image:
    """A copy of a picture of :func:`picture3d.view.pictures.bird_eye` with boxes on it; a stroke shows where each is heading.

    Args:
        picture: square, made with the same `extent_m` and `center_m`.
        center: (B, 3) metres.
        size: (B, 3) metres: length, width, height.
        yaw: (B,) radians, counter-clockwise from x.
        colors: one for each box.
        extent_m: half the side of the square that the picture shows.
        center_m: its middle.
        width_px: width of the lines.
    """
    drawn = picture.copy()
    draw = ImageDraw.Draw(drawn)
    scale = picture.width / (2 * extent_m)
    middle = np.asarray(center, np.float64).reshape(-1, 3)[:, :2]
    for corners, heart, color in zip(footprints(center, size, yaw), middle, colors, strict=True):
        u = (np.append(corners[:, 0], [heart[0], corners[:2, 0].mean()]) - center_m[0] + extent_m) * scale
        v = (center_m[1] + extent_m - np.append(corners[:, 1], [heart[1], corners[:2, 1].mean()])) * scale
        outline = list(zip(u[[0, 1, 2, 3, 0]].tolist(), v[[0, 1, 2, 3, 0]].tolist(), strict=True))
        draw.line(outline, fill=color, width=width_px)
        draw.line([(float(u[4]), float(v[4])), (float(u[5]), float(v[5]))], fill=color, width=width_px)
    return drawn
