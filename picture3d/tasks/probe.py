"""Probe: what a frozen encoder, or a teacher, already knows, read out of its voxel features without training it any further.

1. `sample_voxels` keeps at most so many labelled voxels of each class, drawn evenly from all frames in one pass.
2. `fit_probe` reads them out in the three ways of `tasks.readouts`: the one linear classifier of least loss (a convex problem,
   solved by L-BFGS from zero, so its answer depends on the features and hardly on the seed), the nearest labelled voxels, and
   the effective rank of the features.
3. `evaluate_probe` gives each point the class of its voxel and scores points as `tasks.segmentation` does.

The encoder runs with the running statistics of its norms and is never changed.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from picture3d.errors import DataError
from picture3d.evaluation.segmentation import ConfusionMatrix, SegmentationScores
from picture3d.ops.scatter import segment_count, segment_mean
from picture3d.ops.voxelize import VoxelAssignment, assign_voxels
from picture3d.structures.batch import PointBatch
from picture3d.structures.voxels import VoxelGrid
from picture3d.tasks.encoder import JoinedFeatures, frozen
from picture3d.tasks.outside import classes_of_points
from picture3d.tasks.readouts import (
    FeatureRank,
    LinearClassifier,
    NeighbourClassifier,
    ProbeConfig,
    VoxelSample,
    feature_rank,
    fit_linear,
    fit_neighbours,
)
from picture3d.tasks.segmentation import IGNORED, labels_of

_MOST_CLASSES = 256  # labels are bytes


class FeatureEncoder(Protocol):
    """Whatever gives voxels a feature; `JoinedEncoder` and its task networks do."""

    grid: VoxelGrid

    def joined_features(self, batch: PointBatch) -> JoinedFeatures:
        """Features of the occupied voxels of a batch."""
        ...


class TeacherVoxels:
    """A teacher in the place of an encoder: the mean of its features over each voxel's points, zeros where it knows none.

    Args:
        grid: the voxels; those of an encoder, for numbers that can be set beside it.
        pillars: pillars instead of voxels.
    """

    def __init__(self, grid: VoxelGrid, *, pillars: bool = False) -> None:
        self.grid, self.pillars = grid, pillars

    def joined_features(self, batch: PointBatch) -> JoinedFeatures:
        """Features of the occupied voxels of a batch and of their points.

        Raises:
            DataError: if the batch has no teacher features.
        """
        if batch.cell_features is None or batch.point_cell is None:
            raise DataError(f"{', '.join(batch.frame_names)}: no features of a teacher; run `picture3d targets` on this data")
        assignment = assign_voxels(batch.xyz, batch.sample, batch.batch_size, self.grid, per_pillar=self.pillars)
        cell = batch.point_cell[assignment.point_index]
        points = torch.zeros(len(cell), batch.cell_features.shape[1], device=cell.device)
        known = (cell >= 0).nonzero().squeeze(1)
        points[known] = batch.cell_features[cell[known]].float()
        voxels = segment_mean(points[known], assignment.voxel_of_point[known], assignment.num_voxels)
        return JoinedFeatures(voxels, assignment, points)


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """A frozen encoder and what was fitted to it."""

    encoder: FeatureEncoder
    linear: LinearClassifier
    neighbours: NeighbourClassifier | None
    rank: FeatureRank
    sample_size: int  # voxels the linear classifier was fitted on

    def predict(self, batch: PointBatch, *, wanted: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(N,) int64 classes of all points of a batch, by the linear classifier and by neighbours (None without them).

        Points outside the grid as in `tasks.outside`.
        """
        with _frozen(self.encoder):
            joined = self.encoder.joined_features(batch)
        found = []
        for classifier in (self.linear, self.neighbours):
            if classifier is None:
                continue
            voxel_class = classifier.classify(joined.feats)
            point_class = voxel_class[joined.assignment.voxel_of_point]
            found.append(classes_of_points(batch, joined.assignment, self.encoder.grid, point_class, voxel_class, wanted))
        return found[0], found[1] if self.neighbours is not None else None


@dataclass(frozen=True, slots=True)
class ProbeScores:
    """Scores of both classifiers on the same points."""

    linear: SegmentationScores
    neighbours: SegmentationScores | None


def fit_probe(encoder: FeatureEncoder, batches: Iterable[PointBatch], config: ProbeConfig | None = None) -> Probe:
    """Fits the classifiers to the frozen features of labelled frames.

    Args:
        encoder: gives the features; not changed.
        batches: labelled, un-augmented, gone over once; moved to the encoder's device here.
        config: how.

    Raises:
        DataError: if a batch has no labels, or no voxel has one.
    """
    config = config or ProbeConfig()
    sample = sample_voxels(encoder, batches, config)
    neighbours = fit_neighbours(sample, config) if config.neighbours else None
    return Probe(encoder, fit_linear(sample, config), neighbours, feature_rank(sample), len(sample.labels))


def evaluate_probe(probe: Probe, batches: Iterable[PointBatch], class_names: tuple[str, ...]) -> ProbeScores:
    """Scores a probe on labelled frames, as `evaluate_segmentation` scores a network.

    Raises:
        DataError: if a batch has no labels, or labels outside the classes.
    """
    device = _device(probe.encoder)
    linear, near = (ConfusionMatrix(class_names, ignored=IGNORED) for _ in range(2))
    for batch in batches:
        labels = labels_of(batch, len(class_names))
        by_linear, by_neighbours = probe.predict(batch.to(device), wanted=(labels != IGNORED).to(device))
        where = ", ".join(batch.frame_names)
        linear.add(labels.cpu().numpy(), by_linear.cpu().numpy(), where=where)
        if by_neighbours is not None:
            near.add(labels.cpu().numpy(), by_neighbours.cpu().numpy(), where=where)
    return ProbeScores(linear.scores(), near.scores() if probe.neighbours is not None else None)


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


def _frozen(encoder: FeatureEncoder) -> AbstractContextManager[None]:
    """An encoder that is a network looks on as it is; a teacher's features need nothing."""
    return frozen(encoder) if isinstance(encoder, nn.Module) else nullcontext()


def _device(encoder: FeatureEncoder) -> torch.device:
    parameter = next(encoder.parameters(), None) if isinstance(encoder, nn.Module) else None
    return torch.device("cpu") if parameter is None else parameter.device
