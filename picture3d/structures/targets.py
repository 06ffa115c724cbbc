"""What a teacher says about one sweep, keyed to the sweep's un-augmented points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from picture3d.structures.frame import Frame


@dataclass(frozen=True, slots=True, eq=False)
class FrameTargets:
    """Teacher features of the M cells that N points of one sweep fall into.

    The row of a point is `point_cell`, in the order of the file the sweep was read from: whoever shuffles, crops or moves
    points carries their row numbers along and finds the target again.
    """

    features: NDArray[np.float16]  # (M, D) float16
    superclass: NDArray[np.uint8]  # (M,) uint8: cluster of the cell within this frame
    point_cell: NDArray[np.int64]  # (N,) int64: row in `features` of each un-augmented point; -1 where it has no target

    def __post_init__(self) -> None:
        if self.features.ndim != 2:
            raise ValueError(f"features must be (M, D), got {self.features.shape}")
        if self.superclass.shape != (len(self.features),):
            raise ValueError(f"superclass has shape {self.superclass.shape}, expected ({len(self.features)},)")
        if self.point_cell.ndim != 1:
            raise ValueError(f"point_cell must be (N,), got {self.point_cell.shape}")
        if len(self.point_cell) and not -1 <= self.point_cell.min() <= self.point_cell.max() < len(self.features):
            raise ValueError(f"point_cell must lie in -1..{len(self.features) - 1}")


class FeatureSource(Protocol):
    """Where loading finds the targets of a frame: a store on disk, or a teacher that is run on the spot."""

    def targets(self, frame: Frame) -> FrameTargets | None:
        """The targets of an un-augmented frame, or None where there are none for it."""
        ...
