"""What a training step receives: the points of a batch of frames, with labels and teacher targets where they exist."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from picture3d.structures.occupancy import OccupancyGrid


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
    occupancy_cell: Tensor | None = None  # (K, 4) int32 occupied cells: frame of the batch, x, y, z; sorted by that key
    occupancy_class: Tensor | None = None  # (K,) uint8: class 1..16, or 255: not to be learned from
    occupancy_grid: OccupancyGrid | None = None  # where the cells are; every frame of the batch is labelled

    def dense_occupancy(self) -> Tensor:
        """(batch_size, X, Y, Z) uint8 class of every cell, 0 where it is free; for 512 x 512 x 40 cells 10 MB a frame.

        Raises:
            ValueError: if the batch was loaded without occupancy labels.
        """
        if self.occupancy_cell is None or self.occupancy_class is None or self.occupancy_grid is None:
            raise ValueError("the batch holds no occupancy labels")
        dense = self.occupancy_class.new_zeros((self.batch_size, *self.occupancy_grid.shape))
        dense[tuple(self.occupancy_cell.long().unbind(1))] = self.occupancy_class
        return dense

    def without_frames(self) -> PointBatch:
        """A batch of no frame with the same columns: what a process holds that has no part of the last batch of an epoch."""
        rows = {f.name: getattr(self, f.name)[:0] for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, batch_size=0, frame_names=(), **rows)

    def to(self, device: torch.device | str) -> PointBatch:
        """The same batch on another device."""
        moved = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in moved.items()})
