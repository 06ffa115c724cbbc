"""Colours for points: classes, ramps for intensity and height, principal components of features, masks, mistakes.

Every function takes one value per point and returns (N, 3) uint8 sRGB, made for the dark ground of `view/pictures.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Rgb = tuple[int, int, int]
Colors = NDArray[np.uint8]  # (N, 3) sRGB

GREY: Rgb = (88, 97, 108)  # ignored, unknown, without a value
VISIBLE: Rgb = (96, 110, 126)
HIDDEN: Rgb = (255, 150, 66)
TRUE_POINTS: Rgb = (88, 196, 255)
REBUILT: Rgb = (255, 150, 66)
RIGHT: Rgb = (70, 80, 92)
WRONG: Rgb = (255, 92, 92)

# The classes of the nuScenes lidarseg challenge. Families share a hue: ground is muted, vehicles are blue to green, people and
# two-wheelers red to pink, what blocks a lane is orange.
_NUSCENES: dict[str, Rgb] = {
    "barrier": (246, 196, 84),
    "bicycle": (255, 168, 206),
    "bus": (38, 214, 200),
    "car": (72, 150, 255),
    "construction_vehicle": (204, 226, 92),
    "motorcycle": (244, 96, 178),
    "pedestrian": (255, 82, 82),
    "traffic_cone": (255, 134, 38),
    "trailer": (170, 214, 255),
    "truck": (134, 124, 255),
    "driveable_surface": (92, 106, 126),
    "other_flat": (132, 110, 128),
    "sidewalk": (160, 138, 190),
    "terrain": (150, 160, 96),
    "manmade": (206, 172, 136),
    "vegetation": (82, 166, 104),
}
_OTHERS: tuple[Rgb, ...] = tuple(_NUSCENES.values())

# Control points of a ramp whose lightness only rises: night blue, blue, teal, green, yellow. It begins light enough to be seen.
_RAMP: tuple[Rgb, ...] = ((66, 62, 138), (52, 104, 166), (38, 146, 160), (74, 188, 130), (166, 220, 92), (252, 236, 120))


def class_colors(class_names: Sequence[str]) -> Colors:
    """(C, 3): the colour of every class. Index 0 is the ignored class and grey; unknown names take turns through a palette."""
    others = iter(range(len(class_names)))
    table = [_NUSCENES.get(name) or _OTHERS[next(others) % len(_OTHERS)] for name in class_names]
    if table:
        table[0] = GREY
    return np.array(table, np.uint8).reshape(-1, 3)


def label_colors(labels: NDArray[np.integer], class_names: Sequence[str]) -> Colors:
    """(N,) classes to (N, 3); a number that no class has is grey."""
    table = class_colors(class_names)
    known = (labels >= 0) & (labels < len(table))
    colors = np.full((len(labels), 3), GREY, np.uint8)
    colors[known] = table[labels[known]]
    return colors


def ramp_table(size: int = 256) -> Colors:
    """(size, 3): the ramp from lowest to highest."""
    at = np.linspace(0, len(_RAMP) - 1, size)
    return np.rint(np.stack([np.interp(at, range(len(_RAMP)), channel) for channel in zip(*_RAMP, strict=True)], 1)).astype(
        np.uint8
    )


def ramp_colors(values: ArrayLike, *, limits: tuple[float, float] | None = None, gamma: float = 1.0) -> Colors:
    """(N,) numbers to (N, 3) along the ramp.

    Args:
        values: (N,) float; what is not finite becomes grey.
        limits: values at the ends of the ramp; by default the 2nd and 98th percentile.
        gamma: below 1 spreads out the low end, as intensities need.
    """
    values = np.asarray(values, np.float64)
    finite = np.isfinite(values)
    colors = np.full((len(values), 3), GREY, np.uint8)
    if finite.any():
        low, high = limits if limits is not None else _percentiles(values[finite], 2, 98)
        share = np.clip((values[finite] - low) / max(high - low, 1e-12), 0, 1) ** gamma
        colors[finite] = ramp_table()[np.rint(share * 255).astype(np.intp)]
    return colors


@dataclass(frozen=True, slots=True, eq=False)
class PcaBasis:
    """Three directions in a feature space and the values that become dark and bright along each."""

    mean: NDArray[np.float64]  # (D,)
    directions: NDArray[np.float64]  # (3, D), by falling variance, the largest entry of each positive
    low: NDArray[np.float64]  # (3,)
    high: NDArray[np.float64]  # (3,)


def pca_basis(features: ArrayLike) -> PcaBasis:
    """The three principal directions of (N, D) features; rows that are not finite are left out.

    Made once and handed to `pca_colors`, it gives several pictures the same colours for the same features. Directions that do
    not exist (fewer than three rows or columns) are zero and give a constant.
    """
    rows = _finite_rows(features)
    dimension = rows.shape[1]
    mean = rows.mean(0) if len(rows) else np.zeros(dimension)
    directions = np.zeros((3, dimension))
    if len(rows) > 1:
        values, vectors = np.linalg.eigh(np.cov(rows - mean, rowvar=False).reshape(dimension, dimension))
        found = [vectors[:, i] for i in np.argsort(values)[::-1][:3] if values[i] > 1e-12 * max(values.max(), 1e-300)]
        for i, vector in enumerate(found):
            directions[i] = vector * np.sign(vector[np.abs(vector).argmax()])
    along = (rows - mean) @ directions.T if len(rows) else np.zeros((1, 3))
    low, high = _percentiles(along, 2, 98)
    return PcaBasis(mean, directions, np.asarray(low), np.asarray(high))


def pca_colors(features: ArrayLike, basis: PcaBasis | None = None) -> Colors:
    """(N, D) features to (N, 3): first three principal components as red, green and blue.

    Each component is scaled between its 2nd and 98th percentile, so that a few outliers do not wash out the rest. The sign of a
    component is fixed, so the same features have the same colours on every machine. Rows that are not finite are grey.
    """
    rows = np.asarray(features, np.float64)
    basis = basis if basis is not None else pca_basis(rows)
    finite = np.isfinite(rows).all(1)
    along = (rows[finite] - basis.mean) @ basis.directions.T
    width = basis.high - basis.low
    share = np.where(width > 1e-12, (along - basis.low) / np.maximum(width, 1e-12), 0.5)
    colors = np.full((len(rows), 3), GREY, np.uint8)
    colors[finite] = np.rint(48 + 200 * np.clip(share, 0, 1)).astype(np.uint8)
    return colors


def mask_colors(hidden: NDArray[np.bool_]) -> Colors:
    """(N,) bool to (N, 3): hidden points glow, visible ones stay quiet."""
    return np.where(np.asarray(hidden, bool)[:, None], np.array(HIDDEN), np.array(VISIBLE)).astype(np.uint8)


def mistake_colors(labels: NDArray[np.integer], predicted: NDArray[np.integer]) -> Colors:
    """(N, 3): wrong points red, right ones quiet, ignored ones (label 0) grey."""
    colors = np.where((labels == predicted)[:, None], np.array(RIGHT), np.array(WRONG)).astype(np.uint8)
    colors[labels == 0] = np.array(GREY) // 2
    return colors


def group_colors(groups: NDArray[np.integer]) -> Colors:
    """(N,) group numbers (superclasses) to (N, 3); negative numbers are grey."""
    palette = np.array([_OTHERS[i] for i in (3, 7, 14, 5, 15, 9, 2, 0, 6, 4, 8, 13, 1, 12)], np.uint8)
    return np.where((groups >= 0)[:, None], palette[np.maximum(groups, 0) % len(palette)], np.array(GREY)).astype(np.uint8)


def _finite_rows(features: ArrayLike) -> NDArray[np.float64]:
    rows = np.asarray(features, np.float64)
    if rows.ndim != 2:
        raise ValueError(f"features must be (N, D), got {rows.shape}")
    return rows[np.isfinite(rows).all(1)]


def _percentiles(values: NDArray[np.float64], low: float, high: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    found = np.percentile(values, [low, high], axis=0)
    return found[0], found[1]
