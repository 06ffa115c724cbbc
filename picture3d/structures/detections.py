"""What a detector answers for one frame."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class DetectedBoxes:
    """K boxes of one frame, in its LiDAR frame."""

    boxes: Tensor  # (K, 7) or (K, 9) float: centre x y z, length, width, height (m), yaw (rad), velocity x y (m/s) where known
    scores: Tensor  # (K,) float in 0..1
    labels: Tensor  # (K,) int64, 1-based training class

    def __len__(self) -> int:
        return len(self.boxes)
