"""A teacher whose features can be computed by hand, and datasets of made frames for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from picture3d.ops.quantize import Quantisation, quantise_points
from picture3d.structures.frame import Frame
from picture3d.structures.points import IntensityUnit, PointCloud
from picture3d.structures.poses import Pose
from picture3d.teachers.protocol import CellFeatures


@dataclass(eq=False)
class FourierTeacher:
    """Features are cosines of the cell's first point: smooth, of unequal channels, the same on every machine up to rounding."""

    name: str = "fourier"
    dimension: int = 8
    licence: str = "Apache-2.0"
    fingerprint: str = "00c0ffee"
    quantisation: Quantisation = field(default_factory=lambda: Quantisation("cartesian", (0.5, 0.5, 0.5)))
    calls: int = 0
    fails_at: int | None = None  # the call that raises
    scale: float = 1.0

    def cell_features(self, points: PointCloud) -> CellFeatures:
        self.calls += 1
        if self.calls == self.fails_at:
            raise KeyboardInterrupt
        xyz = torch.from_numpy(points.xyz)
        cells = quantise_points(xyz, self.quantisation)
        wave = torch.arange(1, self.dimension + 1) / 10
        features = torch.cos(xyz[cells.representative] @ torch.ones(3, 1) * wave) * wave * self.scale
        return CellFeatures(features, cells.point_cell)


def made_points(count: int, seed: int = 0) -> PointCloud:
    rng = np.random.default_rng(seed)
    xyz = rng.uniform(-10, 10, (count, 3)).astype(np.float32)
    return PointCloud(xyz, rng.random(count).astype(np.float32), IntensityUnit.UNIT)


def made_frame(log: str, index: int, points: PointCloud) -> Frame:
    return Frame(log, index, f"{log}-{index}", index, points, None, Pose.identity())


@dataclass(frozen=True)
class Key:
    log: str
    index: int


@dataclass
class MadeDataset:
    """Logs of frames; every second frame is a keyframe. The first frame of each log is empty."""

    root: Path
    sizes: dict[str, int]
    points: int = 300
    seed: int = 0

    def logs(self, split: str | None = None) -> Sequence[str]:
        return sorted(self.sizes)

    def keyframes(self, split: str | None = None) -> Sequence[Key]:
        return [Key(log, index) for log in self.logs() for index in range(0, self.sizes[log], 2)]

    def frame(self, key: Any, columns: Any = None) -> Frame:
        count = self.points if key.index else 0
        return made_frame(key.log, key.index, made_points(count, self.seed + 100 * ord(key.log[-1]) + key.index))
