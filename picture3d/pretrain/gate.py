"""GPICTURE's differential gate: the features' loss is let in when the encoder's shallow layers have stopped changing.

After each epoch the encoder looks at the same few sweeps. c is the mean linear CKA of its first layers now and an epoch before;
the next epoch's features count beta = 0 if c < delta, else 1 - exp(-gamma (c - delta)). In the first two epochs beta is 0.

Source: "Mutual Information-Driven Self-supervised Point Cloud Pre-training" (GPICTURE), Knowledge-Based Systems, 2025.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor, nn

from picture3d.config import FrozenConfig
from picture3d.errors import TrainingError
from picture3d.ops.similarity import linear_cka


class GateConfig(FrozenConfig):
    """Whether and how the features' loss waits for the shallow layers."""

    enabled: bool = Field(default=False, description="let the features' loss in only when shallow layers have settled")
    gamma: float = Field(default=10.0, gt=0, description="how steeply the gate opens above delta")
    delta: float = Field(default=0.2, ge=0, lt=1, description="agreement of two epochs' shallow layers below which it is shut")
    layers: int = Field(default=4, ge=1, description="shallow layers that are compared; all, if the encoder has fewer")
    interval: int | None = Field(
        default=None,
        ge=1,
        description="batches that count as an epoch for the gate; null: one pass over the data. For runs counted in steps",
    )
    frames: int = Field(default=1, ge=1, description="sweeps of the sample, evenly spread over the training frames")
    voxels: int = Field(default=4096, ge=2, description="voxels of the sample that are compared, evenly spread")

    def beta(self, agreement: float) -> float:
        """Weight of the features for a CKA of 0..1; 0 for NaN, where nothing could be compared."""
        if not agreement >= self.delta:
            return 0.0
        return 1.0 - math.exp(-self.gamma * (agreement - self.delta))


class Gate(nn.Module):
    """The gate and its memory, which is part of the network's state and so of every checkpoint.

    Args:
        config: how it opens.
        layers: layers of the encoder.
        channels: C, its width.
    """

    batches: Tensor  # () int64, training batches begun
    measured: Tensor  # () int64, how often the encoder was looked at
    agreement: Tensor  # () float64, the last CKA; 0 before there is one
    weight: Tensor  # () float64, beta of the current epoch
    before: Tensor  # (layers, voxels, C) float32, the last look; rows beyond `rows` are 0
    rows: Tensor  # () int64

    def __init__(self, config: GateConfig, layers: int, channels: int) -> None:
        super().__init__()
        self.config = config
        self.layers = min(config.layers, layers)
        for name in ("batches", "measured", "rows"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))
        for name in ("agreement", "weight"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))
        self.register_buffer("before", torch.zeros(self.layers, config.voxels, channels))

    def count(self, interval: int) -> bool:
        """Counts a training batch about to begin; True if an epoch of `interval` batches has just ended before it."""
        ended = int(self.batches) > 0 and int(self.batches) % interval == 0
        self.batches += 1
        return ended

    @torch.no_grad()
    def look(self, layers: list[Tensor]) -> None:
        """Compares the encoder with an epoch before and sets beta for the next.

        Args:
            layers: `self.layers` tensors (M, C): the first layers' output for the M voxels of the sample, always the same ones.

        Raises:
            TrainingError: if an output is not finite.
        """
        rows = min(len(layers[0]), self.config.voxels)
        chosen = torch.arange(rows, device=layers[0].device) * len(layers[0]) // max(1, rows)
        now = [layer[chosen].float() for layer in layers]
        if not all(bool(layer.isfinite().all()) for layer in now):
            raise TrainingError(
                "the encoder gives numbers that are not finite for the gate's sample: its weights have run away. Lower "
                "training.optim.peak_lr, or set training.optim.grad_clip, and go on from an earlier checkpoint (--resume)"
            )
        if int(self.measured) > 0 and rows == int(self.rows):
            values = [linear_cka(old[:rows], new) for old, new in zip(self.before, now, strict=True)]
            mean = sum(values) / len(values)
            # A layer that says the same of every voxel agrees with nothing.
            self.agreement.fill_(mean if math.isfinite(mean) else 0.0)
            self.weight.fill_(self.config.beta(mean))
        for place, layer in enumerate(now):
            self.before[place, :rows] = layer
        self.rows.fill_(rows)
        self.measured += 1
