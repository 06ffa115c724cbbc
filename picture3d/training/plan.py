"""What is trained, on what, and for how long. Everything that trains knows a task as a module and a loss, and nothing more."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Literal, Protocol, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from picture3d.config import FrozenConfig
from picture3d.structures.batch import PointBatch
from picture3d.training.optim import OptimConfig


class Task(Protocol):
    """What is trained."""

    @property
    def module(self) -> nn.Module:
        """The network, on the device it is to be trained on."""
        ...

    def loss(self, batch: PointBatch, generator: torch.Generator) -> Mapping[str, Tensor]:
        """Scalars by name: "total" is minimised, the others are logged. `generator` is on the module's device."""
        ...


class BatchSource(Protocol):
    """Where batches come from. Each is a pure function of the epoch and its position in it."""

    @property
    def steps_per_epoch(self) -> int:
        """Batches per epoch."""
        ...

    def epoch(self, epoch: int, start_step: int) -> Iterator[PointBatch]:
        """The batches of an epoch from position `start_step` on."""
        ...


class TrainingConfig(FrozenConfig):
    """How long and how to train."""

    epochs: int | None = Field(default=1, ge=1, description="passes over the data; null: only max_steps counts")
    max_steps: int | None = Field(default=None, ge=1, description="stop after so many optimiser steps; the schedule ends there")
    batch_size: int = Field(default=2, ge=1, description="frames per batch, in each process")
    accumulate: int = Field(default=1, ge=1, description="batches whose gradients are averaged into one optimiser step")
    precision: Literal["float32", "bf16"] = Field(
        default="float32", description="bf16: autocast; float32 where the GPU has none"
    )
    log_every: int = Field(default=1, ge=1, description="steps per line of metrics.jsonl; losses are means over them")
    checkpoint_every: int = Field(default=500, ge=1, description="steps between checkpoints; one is always written at the end")
    keep_last: int = Field(default=2, ge=1, description="newest checkpoints kept, besides the best")
    seed: int = Field(default=0, ge=0, description="seed of everything random in training")
    threads: int = Field(default=0, ge=0, description="CPU threads of the command; 0: as it was started")
    optim: OptimConfig = OptimConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.epochs is None and self.max_steps is None:
            raise ValueError("give epochs or max_steps: training would never end")
        return self

    def planned_steps(self, batches_per_epoch: int) -> int:
        """Optimiser steps in all."""
        by_epochs = math.ceil(batches_per_epoch / self.accumulate) * self.epochs if self.epochs is not None else math.inf
        return int(min(by_epochs, self.max_steps if self.max_steps is not None else math.inf))

    def planned_epochs(self, batches_per_epoch: int) -> int:
        """Epochs that are begun in all."""
        return math.ceil(self.planned_steps(batches_per_epoch) / max(1, math.ceil(batches_per_epoch / self.accumulate)))
