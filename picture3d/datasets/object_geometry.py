"""The geometry of `ops.box_iou` for arrays: which points lie in which boxes, which boxes meet seen from above."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from picture3d.ops.box_iou import bev_overlap, points_in_boxes

_ROUNDING_M2 = 1e-9  # boxes that only touch may seem to share the last digits of an area


def inside_any(xyz: NDArray[np.float32], boxes: NDArray[np.float64]) -> NDArray[np.bool_]:
    """(N,) bool: which of (N, 3) points lie in one of (B, 7+) boxes, faces included.

    Raises:
        ValueError: if a box is not finite.
    """
    return (points_in_boxes(torch.from_numpy(xyz), torch.from_numpy(boxes)) >= 0).numpy()


def rows_inside(xyz: NDArray[np.float32], boxes: NDArray[np.float64]) -> list[NDArray[np.int64]]:
    """For each of (B, 7+) boxes the rows of the (N, 3) points inside, ascending, faces included.

    A point in two boxes is counted for both.

    Raises:
        ValueError: if a box is not finite.
    """
    # Few points lie in a box at all, so looking at those box by box costs little.
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
