"""I2Mask: which voxels of a sweep to hide from the encoder, chosen by what the teacher says about them.

Superclasses that stand far apart from each other are hidden most (inter-class); loose superclasses are hidden less than
tight ones (intra-class). The geometric masks it is compared with: `pretrain/mask_lab.py`. Pure functions on tensors;
randomness comes in as a generator.

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
from picture3d.ops.processes import rand_rows
from picture3d.ops.scatter import segment_count, segment_mean, segment_sum
from picture3d.pretrain.mask_lab import VoxelPlaces, block_order, radial_order, range_ring

# Added before rounding down: 200 voxels at 0.9 are 180 in every precision.
_ROUNDING = 1e-6
# Outweighs every distance (0 to 2), so that superclasses without members fill the last groups.
_ABSENT_PENALTY = 1e3


class MaskConfig(FrozenConfig):
    """Which voxels are hidden from the encoder."""

    kind: Literal["i2mask", "random", "block", "range_aware", "radial"] = Field(
        default="i2mask",
        description="i2mask: the paper's, guided by teacher features. The others need no teacher. random: all voxels alike; "
        "block: whole columns of block_cells x block_cells cells; range_aware: near rings, where voxels are dense, lose most; "
        "radial: whole sectors of the turn",
    )
    random_ratio: float = Field(
        default=0.7, ge=0, le=1, description="random, block, radial: share of voxels hidden where target_ratio is not set"
    )
    block_cells: int = Field(default=16, ge=1, description="block: edge of a block, cells along x and y")
    range_edges_m: tuple[float, ...] = Field(default=(30.0, 50.0), description="range_aware: where one ring ends, metres")
    range_ratios: tuple[float, ...] = Field(
        default=(0.9, 0.7, 0.5), description="range_aware: share hidden in each ring, the nearest first"
    )
    sectors: int = Field(default=36, ge=1, description="radial: sectors of the full turn")
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
        default=None, ge=0, le=1, description="every kind: hide this share of the voxels that may be hidden, to one voxel"
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
        if len(self.range_ratios) != len(self.range_edges_m) + 1:
            raise ValueError(
                f"{len(self.range_edges_m)} range_edges_m make one ring more; got range_ratios {self.range_ratios}"
            )
        if list(self.range_edges_m) != sorted(self.range_edges_m) or any(not 0 <= ratio <= 1 for ratio in self.range_ratios):
            raise ValueError("range_edges_m must ascend and range_ratios lie between 0 and 1")
        return self


@dataclass(frozen=True, slots=True, eq=False)
class ClassStatistics:
    """What I2Mask knows of the superclasses of every sample."""

    centres: Tensor  # (B, K, D) float32: mean feature; zeros for a superclass without members
    size: Tensor  # (B, K) int64 voxels
    dispersion: Tensor  # (B, K) float32, D of the paper


def choose_hidden(
    features: Tensor | None,
    superclass: Tensor,
    sample: Tensor,
    batch_size: int,
    config: MaskConfig,
    generator: torch.Generator,
    places: VoxelPlaces | None = None,
) -> Tensor:
    """Which voxels to hide: the one place where a kind of mask is chosen.

    Args:
        features: (M, D) mean teacher feature of each voxel, or None without a teacher.
        superclass: (M,) int64, 0..K-1, or -1 for a voxel that must stay visible.
        sample: (M,) int64, sample of each voxel.
        batch_size: B, samples without voxels included.
        config: the mask.
        generator: source of the draw, on any device.
        places: where the voxels are; block, range_aware and radial need it.

    Returns:
        (M,) bool, True = hidden.

    Raises:
        ConfigError: if the mask needs teacher features and there are none.
    """
    may_hide = superclass >= 0
    ratio = config.random_ratio if config.target_ratio is None else config.target_ratio
    match config.kind:
        case "i2mask":
            if features is None:
                raise ConfigError(
                    "mask.kind=i2mask needs teacher features and the batch has none. Run `picture3d targets` first and "
                    "name the store in the data settings, or use mask.kind=random."
                )
            statistics = class_statistics(features, superclass, sample, batch_size, config)
            counts = _counts(statistics.size, class_ratios(statistics, config), config.target_ratio)
            return draw(counts, superclass, sample, generator)
        case "random":
            counts = hidden_counts(_sizes(may_hide, sample, batch_size), torch.tensor(ratio, dtype=torch.float64))
            return draw(counts[:, None], superclass.clamp(max=0), sample, generator)
        case "range_aware":
            rings = torch.where(may_hide, range_ring(_known(places), config.range_edges_m), -1)
            kinds = len(config.range_ratios)
            cell = torch.where(may_hide, sample * kinds + rings, batch_size * kinds)
            size = segment_count(cell, batch_size * kinds + 1)[:-1].view(batch_size, kinds)
            shares = torch.tensor(config.range_ratios, dtype=torch.float64, device=size.device).expand(batch_size, -1)
            if config.target_ratio is not None:
                shares = scaled_to(shares, size, config.target_ratio)
            return draw(_counts(size, shares, config.target_ratio), rings, sample, generator)
        case "block":
            order = block_order(_known(places), batch_size, config.block_cells, generator)
        case "radial":
            order = radial_order(_known(places), batch_size, config.sectors, generator)
    counts = hidden_counts(_sizes(may_hide, sample, batch_size), torch.tensor(ratio, dtype=torch.float64))
    return hide_first(order, torch.where(may_hide, sample, batch_size), counts)


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
    return ClassStatistics(centres.view(*shape, features.shape[1]), size.view(shape), dispersion.view(shape))


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
    none = counts.numel()
    cell = torch.where(superclass >= 0, sample * counts.shape[1] + superclass, none)
    shuffled = rand_rows(len(cell), generator).to(superclass.device)
    return hide_first(shuffled, cell, counts.flatten())


def hide_first(order: Tensor, cell: Tensor, counts: Tensor) -> Tensor:
    """Hides in every cell the members with the smallest keys.

    Args:
        order: (M,) keys; among equal keys the earlier voxel comes first.
        cell: (M,) int64, 0..len(counts); voxels of cell ``len(counts)`` are never hidden.
        counts: (cells,) int64, how many members to hide.

    Returns:
        (M,) bool, True = hidden.
    """
    by_key = order.argsort(stable=True)
    rows = by_key[cell[by_key].argsort(stable=True)]
    size = segment_count(cell, len(counts) + 1)
    rank = torch.arange(len(cell), device=cell.device) - (size.cumsum(0) - size)[cell[rows]]
    hidden = torch.zeros(len(cell), dtype=torch.bool, device=cell.device)
    hidden[rows] = rank < F.pad(counts, (0, 1))[cell[rows]]
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


def matched_counts(size: Tensor, ratio: Tensor, target: float) -> Tensor:
    """(B, K) int64 numbers to hide that add up to ``floor(target * voxels + 1e-6)`` of every sample.

    What rounding down leaves over goes to the classes that lost most by it, one voxel each.

    Args:
        size: (B, K) int64 voxels.
        ratio: (B, K) float64, from `scaled_to` with the same `target`.
        target: wanted share of hidden voxels.
    """
    exact = size * ratio
    counts = torch.minimum(exact.floor().to(torch.int64), size)
    missing = hidden_counts(size.sum(1, keepdim=True), torch.tensor(target, dtype=torch.float64)) - counts.sum(1, keepdim=True)
    # Classes already hidden whole have nothing to give.
    lost = torch.where(counts < size, exact - counts, -1.0)
    turn = lost.argsort(dim=1, descending=True, stable=True).argsort(1)
    return counts + ((turn < missing) & (counts < size))


def _counts(size: Tensor, ratio: Tensor, target: float | None) -> Tensor:
    return hidden_counts(size, ratio) if target is None else matched_counts(size, ratio, target)


def _sizes(may_hide: Tensor, sample: Tensor, batch_size: int) -> Tensor:
    """(B,) int64 voxels of each sample that may be hidden."""
    return segment_count(torch.where(may_hide, sample, batch_size), batch_size + 1)[:-1]


def _known(places: VoxelPlaces | None) -> VoxelPlaces:
    if places is None:
        raise ConfigError("mask.kind=block, range_aware and radial need to know where the voxels are: give their places")
    return places


@cache
def _subsets(of: int, size: int) -> tuple[Tensor, Tensor]:
    """(S, size) all subsets of `of` positions in lexicographic order, and (S, of - size) what each leaves over."""
    subsets = list(itertools.combinations(range(of), size))
    rest = [[i for i in range(of) if i not in subset] for subset in subsets]
    return torch.tensor(subsets), torch.tensor(rest, dtype=torch.int64).view(len(subsets), of - size)
