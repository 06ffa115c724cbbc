"""What can be read out of frozen voxel features: one linear layer, the nearest labelled neighbours, and their effective rank.

All three look at the same bounded sample of labelled voxels, weighted back to how often classes occur. Sources: k nearest
neighbours by cosine, weighted by exp(cosine / 0.07), as in Wu et al., "Unsupervised Feature Learning via Non-Parametric
Instance Discrimination" (2018); effective rank after Roy and Vetterli (2007).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from picture3d.config import FrozenConfig
from picture3d.ops.similarity import effective_rank

_ROWS = 4096  # queries compared with the whole bank at a time


class ProbeConfig(FrozenConfig):
    """How features are read out."""

    voxels_per_class: int = Field(default=2000, ge=1, description="most voxels of one class that are kept, over all frames")
    balance: float = Field(
        default=0.5, ge=0, le=1, description="0: a class weighs as it occurs; 1: every class weighs the same"
    )
    weight_penalty: float = Field(default=1e-4, ge=0, description="times half the squared weights, of standardised features")
    max_iterations: int = Field(default=100, ge=1, description="iterations of L-BFGS")
    neighbours: int = Field(default=20, ge=0, description="nearest voxels that vote; 0: no such classifier")
    neighbours_per_class: int = Field(default=500, ge=1, description="most voxels of one class among which they are looked for")
    temperature: float = Field(default=0.07, gt=0, description="a neighbour's vote is exp(cosine / temperature)")
    seed: int = Field(default=0, ge=0, description="which voxels are kept")


@dataclass(frozen=True, slots=True, eq=False)
class VoxelSample:
    """Labelled voxels with frozen features, on the CPU. Any first so many rows of a class are an even draw from it."""

    feats: Tensor  # (n, D) float32
    labels: Tensor  # (n,) int64, ascending; never the ignored class
    seen: dict[int, int]  # class -> labelled voxels of it in all frames, of which at most `voxels_per_class` were kept

    def first(self, per_class: int) -> VoxelSample:
        """At most so many voxels of each class."""
        _, count = torch.unique_consecutive(self.labels, return_counts=True)
        place = torch.arange(len(self.labels)) - torch.repeat_interleave(count.cumsum(0) - count, count)
        kept = place < per_class
        return VoxelSample(self.feats[kept], self.labels[kept], self.seen)

    def row_weights(self, balance: float) -> Tensor:
        """(n,) float32, summing to 1: a class weighs as it occurs (balance 0), as every other (1), or between."""
        classes, target, kept = torch.unique(self.labels, return_inverse=True, return_counts=True)
        share = torch.tensor([self.seen[c] for c in classes.tolist()], dtype=torch.float64) ** (1 - balance)
        return (share / share.sum() / kept)[target].float()


@dataclass(frozen=True, slots=True, eq=False)
class LinearClassifier:
    """P linear functions of a feature; the largest one wins."""

    classes: Tensor  # (P,) int64: the classes that occurred in training
    weight: Tensor  # (P, D) float32, of features as the encoder gives them
    bias: Tensor  # (P,) float32
    loss: float  # that the fit ended with
    iterations: int  # that the fit took

    def classify(self, feats: Tensor) -> Tensor:
        """(M,) int64 classes of (M, D) features."""
        weight, bias = self.weight.to(feats.device), self.bias.to(feats.device)
        return self.classes.to(feats.device)[F.linear(feats.float(), weight, bias).argmax(1)]


@dataclass(frozen=True, slots=True, eq=False)
class NeighbourClassifier:
    """Labelled voxels; the nearest ones by cosine vote for the class of a feature."""

    classes: Tensor  # (P,) int64: the classes of the bank
    bank: Tensor  # (B, D) float32, standardised, of length 1
    vote: Tensor  # (B, P) float32: what a row counts for its class, 0 for the others
    mean: Tensor  # (D,) float32 and
    scale: Tensor  # (D,) float32: a feature is compared as (feature - mean) * scale
    neighbours: int
    temperature: float

    def classify(self, feats: Tensor) -> Tensor:
        """(M,) int64 classes of (M, D) features."""
        device = feats.device
        bank, vote, classes = (tensor.to(device) for tensor in (self.bank, self.vote, self.classes))
        mean, scale = self.mean.to(device), self.scale.to(device)
        found = [torch.zeros(0, dtype=torch.int64, device=device)]
        for rows in feats.split(_ROWS):
            cosine = F.normalize((rows.float() - mean) * scale, dim=1) @ bank.mT
            near = cosine.topk(min(self.neighbours, len(bank)), dim=1)
            # Of the exponentials only their quotients count: those of the nearest one are taken, which cannot overflow.
            weight = ((near.values - near.values[:, :1]) / self.temperature).exp()
            found.append((weight[:, :, None] * vote[near.indices]).sum(1).argmax(1))
        return classes[torch.cat(found)]


@dataclass(frozen=True, slots=True)
class FeatureRank:
    """Effective rank of the covariance of features, 1..D: how many directions they really use; 0 where they do not vary."""

    columns: int  # D
    overall: float  # of all labelled voxels, each class as frequent as it is
    by_class: dict[int, float]  # of the sampled voxels of one class


def fit_linear(sample: VoxelSample, config: ProbeConfig) -> LinearClassifier:
    """The linear classifier of least weighted cross-entropy plus weight penalty, on standardised features."""
    classes, target = torch.unique(sample.labels, return_inverse=True)
    row_weight = sample.row_weights(config.balance)
    mean, scale = _standard(sample.feats, row_weight)
    standard = (sample.feats - mean) * scale

    weight = torch.zeros(len(classes), standard.shape[1], requires_grad=True)
    bias = torch.zeros(len(classes), requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=config.max_iterations, history_size=10, line_search_fn="strong_wolfe", tolerance_change=1e-7
    )

    def loss() -> Tensor:
        solver.zero_grad()
        cost = F.cross_entropy(F.linear(standard, weight, bias), target, reduction="none")
        value = (row_weight * cost).sum() + config.weight_penalty / 2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(loss)
        final = loss().item()
    iterations = int(solver.state[weight]["n_iter"])
    weight, bias = weight.detach() * scale, bias.detach()
    return LinearClassifier(classes, weight, bias - weight @ mean, final, iterations)


def fit_neighbours(sample: VoxelSample, config: ProbeConfig) -> NeighbourClassifier:
    """The bank of labelled voxels: at most `neighbours_per_class` of each class, whose votes make up for what was left out."""
    mean, scale = _standard(sample.feats, sample.row_weights(config.balance))
    bank = sample.first(config.neighbours_per_class)
    classes, target = torch.unique(bank.labels, return_inverse=True)
    vote = F.one_hot(target, len(classes)) * bank.row_weights(config.balance)[:, None]
    normal = F.normalize((bank.feats - mean) * scale, dim=1)
    return NeighbourClassifier(classes, normal, vote, mean, scale, config.neighbours, config.temperature)


def feature_rank(sample: VoxelSample) -> FeatureRank:
    """How many directions the sampled features use, as the encoder gives them, over all classes and within each."""
    overall = float(effective_rank(sample.feats, sample.row_weights(0.0)))
    by_class = {c: float(effective_rank(sample.feats[sample.labels == c])) for c in sample.labels.unique().tolist()}
    return FeatureRank(sample.feats.shape[1], overall, by_class)


def _standard(feats: Tensor, row_weight: Tensor) -> tuple[Tensor, Tensor]:
    """(D,) weighted mean and (D,) one over the deviation of each column; 0 for a constant column, which says nothing."""
    mean = (row_weight[:, None] * feats).sum(0)
    deviation = (row_weight[:, None] * (feats - mean).square()).sum(0).sqrt()
    return mean, torch.where(deviation > 1e-6, 1 / deviation.clamp(min=1e-6), 0.0)
