"""A task and batches small enough to train in milliseconds, with dropout, running statistics and drawn noise in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from picture3d.structures.batch import PointBatch


def batch(number: int, *, points: int = 16) -> PointBatch:
    generator = torch.Generator().manual_seed(number)
    return PointBatch(
        xyz=torch.randn(points, 3, generator=generator),
        features=torch.randn(points, 1, generator=generator),
        sample=torch.zeros(points, dtype=torch.int64),
        batch_size=1,
        frame_names=(f"log/{number}",),
    )


class Batches:
    def __init__(self, steps_per_epoch: int = 4) -> None:
        self.steps_per_epoch = steps_per_epoch
        self.closed = 0

    def epoch(self, epoch: int, start_step: int) -> Iterator[PointBatch]:
        try:
            for step in range(start_step, self.steps_per_epoch):
                yield batch(1000 * epoch + step)
        finally:
            self.closed += 1


class TinyTask:
    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(seed)
        self.module = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 1)).to(dtype)
        self.seen: list[str] = []

    def loss(self, batch: PointBatch, generator: torch.Generator) -> Mapping[str, Tensor]:
        self.seen += batch.frame_names
        noise = torch.randn(batch.xyz.shape, generator=generator, device=batch.xyz.device)
        predicted = self.module(batch.xyz + 0.1 * noise)
        return {"total": (predicted - batch.features).square().mean(), "mean": predicted.mean()}


class MeanTask:
    """Loss (w - mean of xyz)^2: gradients that can be computed by hand."""

    def __init__(self, start: float = 0.0) -> None:
        self.module = nn.ParameterDict({"w": nn.Parameter(torch.tensor(start))})

    def loss(self, batch: PointBatch, generator: torch.Generator) -> Mapping[str, Tensor]:
        return {"total": (self.module["w"] - batch.xyz.mean()).square()}
