"""I2Mask: which voxels of a sweep to hide from the encoder, chosen by what the teacher says about them.

Superclasses that stand far apart from each other are hidden most (inter-class); loose superclasses are hidden less than
tight ones (intra-class). Pure functions on tensors; randomness comes in as a generator.

M is the number of voxels of the batch, B of samples, K of superclasses. A voxel without a teacher target has superclass -1:
it takes no part in the statistics and is never hidden.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from picture3d.config import FrozenConfig
from picture3d.errors import ConfigError
from picture3d.ops.scatter import segment_count, segment_mean, segment_sum

# Added before rounding down: 200 voxels at 0.9 are 180 in every precision.
_ROUNDING = 1e-6
# Outweighs every distance (0 to 2), so that superclasses without members fill the last groups.
_ABSENT_PENALTY = 1e3


class MaskConfig(FrozenConfig):
    """Which voxels are hidden from the encoder."""

    kind: Literal["i2mask", "random"] = Field(
        default="i2mask",
        description="i2mask: the paper's, guided by teacher features; random: all voxels alike, needs no teacher",
    )
    random_ratio: float = Field(default=0.7, ge=0, le=1, description="random: share of voxels hidden")
    superclasses: Literal["stored", "kmeans"] = Field(
        default="stored",
        description="stored: the superclasses kept beside the teacher's features, a voxel takes its points' majority; "
        "kmeans: clustered from the voxels' mean features in every step, as published",
    )
    num_clusters: int = Field(default=8, ge=1, description="superclasses per sweep")
    group_sizes: tuple[int, ...] = Field(default=(3, 3, 2), description="superclasses per group, the most distinct group first")
    group_ratios: tuple[float, ...] = Field(
        default=(0.9, 0.45, 0.0), description="share hidden in each group, before the coefficient"
    )
    dispersion_threshold: float = Field(
        default=0.6, ge=0, description="lambda: distances to the centre up to this do not count"
    )
    intra_class: Literal["per_member", "literal", "off"] = Field(
        default="per_member",
        description="coefficient 1 - D / max D. per_member: D is the sum of the distances above lambda over all members; "
        "literal: over the members above lambda only; off: coefficient 1",
    )
    min_ratio: float = Field(default=0.1, ge=0, le=1, description="a sweep that would hide less than this uses coefficient 1")
    target_ratio: float | None = Field(
        default=None, ge=0, le=1, description="scale the shares so that this share of the voxels with a target is hidden"
    )

    @model_validator(mode="after")
    def _groups_fit(self) -> Self:
        if sum(self.group_sizes) != self.num_clusters:
            raise ValueError(
                f"group_sizes {self.group_sizes} add up to {sum(self.group_sizes)} superclasses, num_clusters is "
                f"{self.num_clusters}: make them equal"
            )
        if len(self.group_ratios) != len(self.group_sizes):
            raise ValueError(f"{len(self.group_sizes)} groups need as many group_ratios, got {self.group_ratios}")
        if any(size < 1 for size in self.group_sizes) or any(not 0 <= ratio <= 1 for ratio in self.group_ratios):
            raise ValueError("group_sizes must be at least 1 and group_ratios between 0 and 1")
        return self


@dataclass(frozen=True, slots=True, eq=False)
class ClassStatistics:
    """What I2Mask knows of the superclasses of every sample."""

    centres: Tensor  # (B, K, D) float32: mean feature; zeros for a superclass without members
    size: Tensor  # (B, K) int64 voxels
    dispersion: Tensor  # (B, K) float32, D of the paper


def choose_hidden(
    features: Tensor | None, superclass: Tensor, sample: Tensor, batch_size: int, config: MaskConfig, generator: torch.Generator
) -> Tensor:
    """Which voxels to hide: the one place where a kind of mask is chosen.

    Args:
        features: (M, D) mean teacher feature of each voxel, or None without a teacher.
        superclass: (M,) int64, 0..K-1, or -1 for a voxel that must stay visible.
        sample: (M,) int64, sample of each voxel.
        batch_size: B, samples without voxels included.
        config: the mask.
        generator: source of the draw, on any device.

    Returns:
        (M,) bool, True = hidden.

    Raises:
        ConfigError: if the mask needs teacher features and there are none.
    """
    match config.kind:
        case "i2mask":
            if features is None:
                raise ConfigError(
                    "mask.kind=i2mask needs teacher features and the batch has none. Run `picture3d targets` first and "
                    "name the store in the data settings, or use mask.kind=random."
                )
            statistics = class_statistics(features, superclass, sample, batch_size, config)
            ratio = class_ratios(statistics, config)
            return draw(hidden_counts(statistics.size, ratio), superclass, sample, generator)
        case "random":
            size = segment_count(torch.where(superclass >= 0, sample, batch_size), batch_size + 1)[:-1, None]
            ratio = torch.full_like(size, config.random_ratio, dtype=torch.float64)
            return draw(hidden_counts(size, ratio), superclass.clamp(max=0), sample, generator)


def class_statistics(
    features: Tensor, superclass: Tensor, sample: Tensor, batch_size: int, config: MaskConfig
) -> ClassStatistics:
    """Centre, size and dispersion of every superclass of every sample; voxels with superclass -1 are left out.

    Args:
        features: (M, D) float teacher features.
        superclass: (M,) int64, -1..K-1.
        sample: (M,) int64.
        batch_size: B.
        config: K, lambda, and which dispersion.
    """
    classes = batch_size * config.num_clusters
    rows = (superclass >= 0).nonzero().squeeze(1)
    features = features[rows].float()
    cell = sample[rows] * config.num_clusters + superclass[rows]
    centres = segment_mean(features, cell, classes)
    size = segment_count(cell, classes)
    distance = (features - centres[cell]).norm(dim=1)
    far = distance > config.dispersion_threshold
    # One column each: sum of the distances that count, and how many they are.
    sums = segment_sum(torch.stack([distance * far, far.to(distance.dtype)], dim=1), cell, classes)
    members = sums[:, 1] if config.intra_class == "literal" else size.to(distance.dtype)
    dispersion = sums[:, 0] / members.clamp(min=1)
    shape = (batch_size, config.num_clusters)
    return ClassStatistics(centres.view(*shape, -1), size.view(shape), dispersion.view(shape))


def class_ratios(statistics: ClassStatistics, config: MaskConfig) -> Tensor:
    """(B, K) float64 share of each superclass to hide: base ratio of its group times its coefficient.

    A sample of which fewer than `min_ratio` would be hidden gets coefficient 1 throughout; then `target_ratio`, if set, scales.
    """
    group = inter_class_groups(statistics.centres, statistics.size > 0, config.group_sizes)
    base = torch.tensor(config.group_ratios, dtype=torch.float64, device=group.device)[group]
    ratio = base if config.intra_class == "off" else base * intra_class_coefficient(statistics.dispersion)
    planned = hidden_counts(statistics.size, ratio).sum(1, keepdim=True)
    too_few = planned < config.min_ratio * statistics.size.sum(1, keepdim=True)
    ratio = torch.where(too_few, base, ratio)
    return ratio if config.target_ratio is None else scaled_to(ratio, statistics.size, config.target_ratio)


def inter_class_groups(centres: Tensor, present: Tensor, group_sizes: tuple[int, ...]) -> Tensor:
    """(B, K) int64 group of each superclass, by greedy choice of the most distinct subset for each group in turn.

    The subset with the largest mean pairwise distance ``1 - cosine`` wins, the first in lexicographic order among equals.
    Superclasses without members are taken last.

    Args:
        centres: (B, K, D) class centres.
        present: (B, K) bool, whether a superclass has members.
        group_sizes: superclasses per group; they add up to K.
    """
    batch_size, classes = present.shape
    batch = torch.arange(batch_size, device=centres.device)[:, None]
    unit = F.normalize(centres.double(), dim=-1)
    distance = 1 - unit @ unit.mT
    group = torch.zeros(batch_size, classes, dtype=torch.int64, device=centres.device)
    remaining = torch.arange(classes, device=centres.device).expand(batch_size, classes)
    for index, size in enumerate(group_sizes):
        subsets, rest = (table.to(centres.device) for table in _subsets(remaining.shape[1], size))
        members = remaining[:, subsets]  # (B, S, size)
        pairwise = distance[batch[..., None, None], members[..., :, None], members[..., None, :]]  # (B, S, size, size)
        upper = torch.triu(torch.ones(size, size, dtype=torch.bool, device=centres.device), diagonal=1)
        score = pairwise[..., upper].sum(-1) / max(1, size * (size - 1) // 2)
        score = score - _ABSENT_PENALTY * (~present[batch[..., None], members]).sum(-1)
        best = score.argmax(1)
        group.scatter_(1, members[batch[:, 0], best], index)
        remaining = remaining.gather(1, rest[best])
    return group


def intra_class_coefficient(dispersion: Tensor) -> Tensor:
    """(B, K) float64 ``1 - D / max D`` in every sample; 1 for all where every D is 0."""
    dispersion = dispersion.double()
    largest = dispersion.amax(1, keepdim=True)
    return 1 - dispersion / torch.where(largest > 0, largest, 1.0)


def hidden_counts(size: Tensor, ratio: Tensor) -> Tensor:
    """``floor(size * ratio + 1e-6)`` as int64, element by element; `ratio` is float64."""
    return (size * ratio + _ROUNDING).floor().to(torch.int64)


def draw(counts: Tensor, superclass: Tensor, sample: Tensor, generator: torch.Generator) -> Tensor:
    """Hides `counts` random members of every class.

    Args:
        counts: (B, K) int64, at most the members of each class.
        superclass: (M,) int64, -1..K-1; -1 is never hidden.
        sample: (M,) int64.
        generator: on any device; the same state gives the same draw.

    Returns:
        (M,) bool, True = hidden.
    """
    device = superclass.device
    none = counts.numel()
    cell = torch.where(superclass >= 0, sample * counts.shape[1] + superclass, none)
    shuffled = torch.rand(len(cell), generator=generator, device=generator.device).to(device).argsort()
    order = shuffled[cell[shuffled].argsort(stable=True)]
    size = segment_count(cell, none + 1)
    rank = torch.arange(len(cell), device=device) - (size.cumsum(0) - size)[cell[order]]
    limit = F.pad(counts.flatten(), (0, 1))
    hidden = torch.zeros(len(cell), dtype=torch.bool, device=device)
    hidden[order] = rank < limit[cell[order]]
    return hidden


def scaled_to(ratio: Tensor, size: Tensor, target: float) -> Tensor:
    """(B, K) float64 ratios scaled so that a share `target` of all voxels of a sample is hidden, whatever the formula says.

    All ratios of a sample are multiplied by one factor, none above 1. Where even that hides too few (classes with ratio 0),
    all classes are raised towards 1 alike. The order of the classes is kept.

    Args:
        ratio: (B, K) float64 ratios to scale.
        size: (B, K) int64 voxels.
        target: wanted share of hidden voxels.
    """
    total = size.sum(1, keepdim=True).clamp(min=1)

    def at(position: Tensor) -> Tensor:  # one monotone path: factor 0..infinity over [0, 1], then raising over [1, 2]
        factor = position.clamp(max=1) / (1 - position.clamp(max=1)).clamp(min=1e-12)
        grown = (ratio * factor).clamp(max=1)
        return grown + (position - 1).clamp(min=0) * (1 - grown)

    low = torch.zeros(ratio.shape[0], 1, dtype=torch.float64, device=ratio.device)
    high = torch.full_like(low, 2.0)
    for _ in range(50):
        middle = (low + high) / 2
        enough = (at(middle) * size).sum(1, keepdim=True) / total >= target
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return at(high)


@cache
def _subsets(of: int, size: int) -> tuple[Tensor, Tensor]:
    """(S, size) all subsets of `of` positions in lexicographic order, and (S, of - size) what each leaves over."""
    subsets = list(itertools.combinations(range(of), size))
    rest = [[i for i in range(of) if i not in subset] for subset in subsets]
    return torch.tensor(subsets), torch.tensor(rest, dtype=torch.int64).view(len(subsets), of - size)
