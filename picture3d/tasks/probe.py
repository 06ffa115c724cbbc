"""Linear probe: what a frozen encoder already knows, read out by one linear layer on its joined voxel features.

1. `sample_voxels` keeps at most so many labelled voxels of each class, drawn evenly from all frames in one pass.
2. `fit_linear` finds the one linear classifier of least loss on them: a convex problem, solved by L-BFGS from zero, so its
   answer depends on the features and hardly on the seed.
3. `evaluate_probe` gives each point the class of its voxel and scores points as `tasks.segmentation` does.

The encoder runs with the running statistics of its norms and is never changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from picture3d.config import FrozenConfig
from picture3d.errors import DataError
from picture3d.evaluation.segmentation import ConfusionMatrix, SegmentationScores
from picture3d.ops.scatter import segment_count
from picture3d.ops.voxelize import VoxelAssignment
from picture3d.structures.batch import PointBatch
from picture3d.structures.voxels import VoxelGrid
from picture3d.tasks.encoder import JoinedFeatures
from picture3d.tasks.outside import classes_of_points
from picture3d.tasks.segmentation import IGNORED, labels_of

_MOST_CLASSES = 256  # labels are bytes


class ProbeConfig(FrozenConfig):
    """How the linear classifier is found."""

    voxels_per_class: int = Field(default=2000, ge=1, description="most voxels of one class that are kept, over all frames")
    balance: float = Field(
        default=0.5, ge=0, le=1, description="0: a class weighs as it occurs; 1: every class weighs the same"
    )
    weight_penalty: float = Field(default=1e-4, ge=0, description="times half the squared weights, of standardised features")
    max_iterations: int = Field(default=100, ge=1, description="iterations of L-BFGS")
    seed: int = Field(default=0, ge=0, description="which voxels are kept")


class FeatureEncoder(Protocol):
    """Whatever gives voxels a feature; `JoinedEncoder` and its task networks do."""

    grid: VoxelGrid

    def joined_features(self, batch: PointBatch) -> JoinedFeatures:
        """Features of the occupied voxels of a batch."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class VoxelSample:
    """Labelled voxels with frozen features, on the CPU."""

    feats: Tensor  # (n, D) float32
    labels: Tensor  # (n,) int64, ascending; never the ignored class
    seen: dict[int, int]  # class -> labelled voxels of it in all frames, of which at most `voxels_per_class` were kept


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
class Probe:
    """A frozen encoder and the classifier fitted to it."""

    encoder: FeatureEncoder
    classifier: LinearClassifier
    sample_size: int  # voxels the classifier was fitted on

    def predict(self, batch: PointBatch, *, wanted: Tensor | None = None) -> Tensor:
        """(N,) int64 classes of all points of a batch; points outside the grid as in `tasks.outside`."""
        with _frozen(self.encoder):
            joined = self.encoder.joined_features(batch)
        voxel_class = self.classifier.classify(joined.feats)
        point_class = voxel_class[joined.assignment.voxel_of_point]
        return classes_of_points(batch, joined.assignment, self.encoder.grid, point_class, voxel_class, wanted)


def fit_probe(encoder: FeatureEncoder, batches: Iterable[PointBatch], config: ProbeConfig | None = None) -> Probe:
    """Fits a linear classifier to the frozen features of labelled frames.

    Args:
        encoder: gives the features; not changed.
        batches: labelled, un-augmented, gone over once; moved to the encoder's device here.
        config: how.

    Raises:
        DataError: if a batch has no labels, or no voxel has one.
    """
    config = config or ProbeConfig()
    sample = sample_voxels(encoder, batches, config)
    return Probe(encoder, fit_linear(sample, config), len(sample.labels))


def evaluate_probe(probe: Probe, batches: Iterable[PointBatch], class_names: tuple[str, ...]) -> SegmentationScores:
    """Scores a probe on labelled frames, as `evaluate_segmentation` scores a network.

    Raises:
        DataError: if a batch has no labels, or labels outside the classes.
    """
    device = _device(probe.encoder)
    matrix = ConfusionMatrix(class_names, ignored=IGNORED)
    for batch in batches:
        labels = labels_of(batch, len(class_names))
        prediction = probe.predict(batch.to(device), wanted=(labels != IGNORED).to(device))
        matrix.add(labels.cpu().numpy(), prediction.cpu().numpy(), where=", ".join(batch.frame_names))
    return matrix.scores()


def sample_voxels(encoder: FeatureEncoder, batches: Iterable[PointBatch], config: ProbeConfig) -> VoxelSample:
    """Labelled voxels of all frames, at most `voxels_per_class` of each class, every one as likely as the others to be kept.

    Each voxel draws a number; the smallest ones of its class stay. Memory is bounded whatever the number of frames.

    Raises:
        DataError: if a batch has no labels, or no voxel has one.
    """
    kept: dict[int, tuple[Tensor, Tensor]] = {}  # class -> numbers drawn (k,) float64, features (k, D)
    seen: dict[int, int] = {}
    device, frames = _device(encoder), 0
    for position, batch in enumerate(batches):
        frames += batch.batch_size
        labels = labels_of(batch, _MOST_CLASSES)
        with _frozen(encoder):
            joined = encoder.joined_features(batch.to(device))
        label = voxel_labels(labels.to(device), joined.assignment)
        drawn = torch.from_numpy(np.random.default_rng([config.seed, position]).random(len(label))).to(label.device)
        for found in torch.unique(label[label != IGNORED]).tolist():
            rows = (label == found).nonzero().squeeze(1)
            seen[found] = seen.get(found, 0) + len(rows)
            rows = rows[drawn[rows].argsort(stable=True)[: config.voxels_per_class]]
            numbers, feats = drawn[rows].cpu(), joined.feats[rows].float().cpu()
            if found in kept:
                numbers, feats = torch.cat([kept[found][0], numbers]), torch.cat([kept[found][1], feats])
                best = numbers.argsort(stable=True)[: config.voxels_per_class]
                numbers, feats = numbers[best], feats[best]
            kept[found] = (numbers, feats)
    if not kept:
        raise DataError(
            f"none of the {frames} frames has a labelled point inside the grid: there is nothing to fit a probe on. "
            f"Use a split with labels, or a larger share of them."
        )
    classes = sorted(kept)
    feats = torch.cat([kept[c][1] for c in classes])
    labels = torch.repeat_interleave(torch.tensor(classes), torch.tensor([len(kept[c][1]) for c in classes]))
    return VoxelSample(feats, labels, {c: seen[c] for c in classes})


def voxel_labels(labels: Tensor, assignment: VoxelAssignment) -> Tensor:
    """(M,) int64 majority label of each voxel's labelled points, the smallest of equals; 0 where it has none.

    Args:
        labels: (N,) int64 of all points, below 256.
        assignment: which of them are inside which of M voxels.
    """
    label = labels[assignment.point_index]
    labelled = (label != IGNORED).nonzero().squeeze(1)
    classes = int(label.max()) + 1 if len(labelled) else 1
    pair = assignment.voxel_of_point[labelled] * classes + label[labelled]
    count = segment_count(pair, assignment.num_voxels * classes).view(-1, classes)
    # The smallest class comes first among equals by its place in the key, not by the order in which argmax looks.
    best = (count * classes + torch.arange(classes - 1, -1, -1, device=count.device)).argmax(1)
    return torch.where(count.sum(1) > 0, best, IGNORED)


def fit_linear(sample: VoxelSample, config: ProbeConfig) -> LinearClassifier:
    """The linear classifier of least weighted cross-entropy plus weight penalty, on standardised features."""
    classes, target, kept = torch.unique(sample.labels, return_inverse=True, return_counts=True)
    seen = torch.tensor([sample.seen[c] for c in classes.tolist()], dtype=torch.float64)
    share = seen ** (1 - config.balance)
    row_weight = (share / share.sum() / kept)[target].float()  # sums to 1
    mean = (row_weight[:, None] * sample.feats).sum(0)
    deviation = (row_weight[:, None] * (sample.feats - mean).square()).sum(0).sqrt()
    scale = torch.where(deviation > 1e-6, 1 / deviation.clamp(min=1e-6), 0.0)  # a constant column says nothing
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


@contextmanager
def _frozen(encoder: FeatureEncoder) -> Iterator[None]:
    """No gradients, running statistics in the norms; the mode is restored."""
    module = encoder if isinstance(encoder, nn.Module) else None
    training = module is not None and module.training
    if module is not None:
        module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        if module is not None:
            module.train(training)


def _device(encoder: FeatureEncoder) -> torch.device:
    parameter = next(encoder.parameters(), None) if isinstance(encoder, nn.Module) else None
    return torch.device("cpu") if parameter is None else parameter.device
