"""The geometry of `ops.box_iou` for arrays: which points lie in which boxes, which boxes meet seen from above.

Few points of a frame lie in or near a box, so a coarse map of where boxes are leaves the exact test for those alone.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from picture3d.ops.box_iou import bev_overlap, points_in_boxes

_ROUNDING_M2 = 1e-9  # boxes that only touch may seem to share the last digits of an area
_CELL_M = 0.5
_MAX_CELLS = 1024  # along an axis: cells grow where boxes are far apart


def inside_any(xyz: NDArray[np.float32], boxes: NDArray[np.float64]) -> NDArray[np.bool_]:
    """(N,) bool: which of (N, 3) points lie in one of (B, 7+) boxes, faces included.

    Raises:
        ValueError: if a box is not finite.
    """
    near = _near(xyz, boxes)
    inside = np.zeros(len(xyz), np.bool_)
    inside[near] = (points_in_boxes(torch.from_numpy(xyz[near]), torch.from_numpy(boxes)) >= 0).numpy()
    return inside


def rows_inside(xyz: NDArray[np.float32], boxes: NDArray[np.float64]) -> list[NDArray[np.int64]]:
    """For each of (B, 7+) boxes the rows of the (N, 3) points inside, ascending, faces included.

    A point in two boxes is counted for both.

    Raises:
        ValueError: if a box is not finite.
    """
    near = np.flatnonzero(inside_any(xyz, boxes))
    candidates = torch.from_numpy(xyz[near])
    exact = torch.from_numpy(boxes)
    found = [(points_in_boxes(candidates, exact[i : i + 1]) == 0).numpy() for i in range(len(boxes))]
    return [near[inside] for inside in found]


def meet_from_above(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.bool_]:
    """(A, B) bool: which of (A, 7+) and (B, 7+) boxes share area seen from above.

    Raises:
        ValueError: if a box is not finite.
    """
    return (bev_overlap(torch.from_numpy(a), torch.from_numpy(b)) > _ROUNDING_M2).numpy()


def _near(xyz: NDArray[np.float32], boxes: NDArray[np.float64]) -> NDArray[np.intp]:
    """Rows of the points that share a cell of a coarse map, seen from above, with a box; one that is inside always does."""
    reach = np.hypot(boxes[:, 3], boxes[:, 4])[:, None] / 2
    low, high = boxes[:, :2] - reach, boxes[:, :2] + reach
    if not len(boxes) or not np.isfinite(low).all() or not np.isfinite(high).all():
        return np.arange(len(xyz) if len(boxes) else 0)  # the exact test says what is wrong with a box
    origin, far = low.min(axis=0) - _CELL_M, high.max(axis=0) + _CELL_M
    cell = np.maximum((far - origin) / _MAX_CELLS, _CELL_M)
    shape = np.ceil((far - origin) / cell).astype(int) + 1
    # A cell more on either side: coordinates are rounded to float32.
    first = np.maximum(np.floor((low - origin) / cell).astype(int) - 1, 0)
    last = np.floor((high - origin) / cell).astype(int) + 2
    occupied = np.zeros(shape, np.bool_)
    for (x0, y0), (x1, y1) in zip(first, last, strict=True):
        occupied[x0:x1, y0:y1] = True
    column, row = ((xyz[:, axis] - np.float32(origin[axis])) * np.float32(1 / cell[axis]) for axis in range(2))
    on_map = np.flatnonzero((column >= 0) & (column < shape[0]) & (row >= 0) & (row < shape[1]))
    return on_map[occupied[column[on_map].astype(np.intp), row[on_map].astype(np.intp)]]
