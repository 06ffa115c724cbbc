"""What a training step receives: the points of a batch of frames, with labels and teacher targets where they exist."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class PointBatch:
    """Points of `batch_size` frames, sample after sample. Targets are reached through `point_cell`, whatever was augmented."""

    xyz: Tensor  # (N, 3) float32, metres, LiDAR frame (after augmentation)
    features: Tensor  # (N, F) float32: intensity, then what the recipe asks for (time lag in s, elongation)
    sample: Tensor  # (N,) int64, ascending: which frame of the batch a point belongs to
    batch_size: int  # known, never derived from the largest index: a frame may be empty
    frame_names: tuple[str, ...]  # "log/index" of each sample
    labels: Tensor | None = None  # (N,) int64 training class; 0 = ignored
    cell_features: Tensor | None = None  # (K, D) float16/32: teacher features, one row per teacher cell, over the batch
    cell_superclass: Tensor | None = None  # (K,) int64: superclass of each teacher cell within its frame
    point_cell: Tensor | None = None  # (N,) int64: row in `cell_features`; -1 where a point has no target
    boxes: Tensor | None = None  # (G, 9) float32: x y z, length width height, yaw, vx vy; sample after sample
    box_class: Tensor | None = None  # (G,) int64: 1-based training class
    box_sample: Tensor | None = None  # (G,) int64, ascending: which frame of the batch a box belongs to

    def to(self, device: torch.device | str) -> PointBatch:
        """The same batch on another device."""
        moved = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in moved.items()})
