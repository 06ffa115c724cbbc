"""The self-teacher: a slowly following copy of the encoder, which sees whole sweeps and says what hidden voxels should be.

No labels, no other network. Its features are the encoder's own, so nothing but habit keeps them from becoming the same
everywhere; `SelfTeacher.watch` measures that in every step. After "Bootstrap your own latent" (BYOL, 2020) and "data2vec"
(2022).
"""

from __future__ import annotations

import copy
import math
from typing import Self, cast

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from picture3d.config import FrozenConfig
from picture3d.errors import TrainingError
from picture3d.models.dsvt import Dsvt
from picture3d.models.voxel_encoder import EncodedVoxels
from picture3d.ops.scatter import gather_rows
from picture3d.ops.similarity import effective_rank
from picture3d.structures.batch import PointBatch


class EmaConfig(FrozenConfig):
    """How the self-teacher follows the encoder, and when its features count as collapsed."""

    momentum_start: float = Field(
        default=0.99, ge=0, lt=1, description="share of itself that the teacher keeps in a step, first"
    )
    momentum_end: float = Field(default=0.999, ge=0, le=1, description="share of itself it keeps from `ramp_steps` on")
    ramp_steps: int = Field(default=10_000, ge=1, description="steps over which the momentum rises, along half a cosine")
    collapse_spread: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="alarm below this spread of the targets: root of their variance summed over the columns, where 1 is "
        "voxels that have nothing in common and 0 voxels that are all the same; an untrained encoder has some 0.8",
    )
    collapse_rank: float = Field(
        default=2.0,
        ge=0,
        description="alarm below this effective rank of the targets' covariance; 1 is features that differ along "
        "one line only, an untrained encoder has some 6",
    )
    collapse_patience: int = Field(
        default=20, ge=0, description="steps in a row below either threshold that stop the run; 0: never stop, only log"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.momentum_start > self.momentum_end:
            raise ValueError(f"momentum_start {self.momentum_start} is above momentum_end {self.momentum_end}: swap them")
        return self

    def momentum(self, updates: int) -> float:
        """Share of itself that the teacher keeps in the update after so many."""
        share = min(1.0, updates / self.ramp_steps)
        return self.momentum_end - (self.momentum_end - self.momentum_start) * (1 + math.cos(math.pi * share)) / 2


class SelfTeacher(nn.Module):
    """A copy of point encoder and encoder that no gradient reaches. Its state is in the network's, hence in checkpoints.

    It stays in evaluation mode: what it says of a sweep does not depend on the others of the batch.

    Args:
        vfe: the student's point encoder.
        backbone_3d: the student's encoder.
        config: how it follows.
    """

    updates: Tensor  # () int64, how often it has followed
    low_steps: Tensor  # () int64, steps in a row below a threshold of the alarm

    def __init__(self, vfe: nn.Module, backbone_3d: Dsvt, config: EmaConfig) -> None:
        super().__init__()
        self.config = config
        self.vfe = copy.deepcopy(vfe)
        self.backbone_3d = copy.deepcopy(backbone_3d)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("low_steps", torch.zeros((), dtype=torch.int64))
        self.requires_grad_(False)
        self.eval()

    @property
    def dimension(self) -> int:
        """D: length of a feature, twice the encoder's width."""
        return 2 * self.backbone_3d.config.channels

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode whatever is asked."""
        return super().train(False)

    @torch.no_grad()
    def follow(self, vfe: nn.Module, backbone_3d: nn.Module) -> None:
        """One step towards the student. Running statistics are averages already and are taken over as they are."""
        keep = self.config.momentum(int(self.updates))
        for own, students in ((self.vfe, vfe), (self.backbone_3d, backbone_3d)):
            for mine, theirs in zip(own.parameters(), students.parameters(), strict=True):
                mine.lerp_(theirs, 1 - keep)
            for mine, theirs in zip(own.buffers(), students.buffers(), strict=True):
                mine.copy_(theirs)
        self.updates += 1

    @torch.no_grad()
    def forward(self, batch: PointBatch) -> Tensor:
        """(M, D) float32 features of all voxels of a batch, nothing hidden, in the order of its voxels; rows of length 1.

        The voxel's pillar token and its own feature after the first stage, each normalised over its channels to mean 0 (a layer
        norm without parameters), so that neither a common offset nor the scale of the features is part of what is learnt.
        """
        voxels = cast(EncodedVoxels, self.vfe(batch)).voxels
        latent = self.backbone_3d(voxels)
        halves = (gather_rows(latent.output.feats, latent.token_of_voxel), latent.stages[0].feats)
        with torch.autocast(voxels.feats.device.type, enabled=False):
            normal = [F.layer_norm(half.float(), half.shape[1:]) for half in halves]
            return torch.cat(normal, dim=1) / math.sqrt(self.dimension)

    @torch.no_grad()
    def watch(self, features: Tensor) -> dict[str, Tensor]:
        """Measures the targets of a step and counts the steps in a row that lie below a threshold.

        Args:
            features: (M, D) targets of all voxels.

        Returns:
            Scalars to be logged: ``target_spread``, ``target_rank``, ``target_momentum``. Fewer than two voxels count as
            nothing new: the numbers are 0 and the count stays.

        Raises:
            TrainingError: if it were `collapse_patience` steps in a row.
        """
        config = self.config
        spread, rank = feature_spread(features), effective_rank(features)
        if len(features) >= 2:
            low = bool((spread < config.collapse_spread) | (rank < config.collapse_rank))
            self.low_steps.copy_(self.low_steps + 1 if low else torch.zeros_like(self.low_steps))
        if config.collapse_patience and int(self.low_steps) >= config.collapse_patience:
            raise TrainingError(
                f"the self-teacher has collapsed: over {int(self.low_steps)} steps in a row its features had a spread below "
                f"{config.collapse_spread:g} or an effective rank below {config.collapse_rank:g} (now {float(spread):.3g} and "
                f"{float(rank):.3g}): it says the same of every voxel, and there is nothing left to learn from. Raise "
                "targets.ema.momentum_start and momentum_end, lower training.optim.peak_lr or loss.features_weight, keep "
                "loss.coordinates_weight above 0, or use another teacher (targets.mode=stored)."
            )
        momentum = config.momentum(max(0, int(self.updates) - 1))
        return {
            "target_spread": spread,
            "target_rank": rank,
            "target_momentum": torch.tensor(momentum, dtype=torch.float32, device=features.device),
        }


def feature_spread(features: Tensor) -> Tensor:
    """() float32: root of the variance summed over the columns; for rows of length 1 it is 0 (all the same) to 1.

    Args:
        features: (M, D) float; 0 for fewer than two rows.
    """
    if len(features) < 2:
        return features.new_zeros((), dtype=torch.float32)
    return features.double().var(0, correction=0).sum().sqrt().float()
