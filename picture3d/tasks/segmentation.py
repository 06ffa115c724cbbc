"""LiDAR semantic segmentation: one class per point, from scratch or from a pre-trained encoder.

    voxels = encoder(points)                # each voxel: final token of its pillar, joined with its own stage-0 feature
    voxels = relu(norm(linear(voxels)))
    points = voxel of the point + the point's own feature, a small network, one logit per class

The joint restores the height that the encoder's last stage has pooled away; the point's own feature tells apart points that
share a voxel. Source: the segmentation experiments of PICTURE, whose published head expects a height axis that its encoder no
longer has; what differs is in `docs/paper_to_code.md`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from picture3d.config import FrozenConfig
from picture3d.errors import DataError
from picture3d.evaluation.segmentation import ConfusionMatrix, SegmentationScores
from picture3d.models.dsvt import DsvtConfig
from picture3d.models.row_norm import RowBatchNorm
from picture3d.ops.lovasz import lovasz_softmax
from picture3d.ops.processes import mean_count
from picture3d.ops.scatter import gather_rows, segment_mean
from picture3d.ops.voxelize import VoxelAssignment
from picture3d.structures.batch import PointBatch
from picture3d.structures.voxels import VoxelGrid
from picture3d.tasks.encoder import JoinedEncoder, frozen
from picture3d.tasks.outside import classes_of_points

IGNORED = 0  # training class 0: no part of losses and scores, never predicted


class SegmentationTaskConfig(FrozenConfig):
    """Head and losses of segmentation."""

    num_classes: int = Field(default=17, ge=2, description="training classes, the ignored class 0 included")
    head_channels: int = Field(default=128, ge=1, description="width of the head")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="share of the head's last features dropped in training")
    cross_entropy_weight: float = Field(default=1.0, ge=0, description="weight of the cross-entropy")
    lovasz_weight: float = Field(default=1.0, ge=0, description="weight of the Lovasz-softmax loss")
    class_weights: tuple[float, ...] | None = Field(
        default=None, description="weight of each class in the cross-entropy, class 0 first; null: all alike"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.cross_entropy_weight == 0 and self.lovasz_weight == 0:
            raise ValueError("cross_entropy_weight and lovasz_weight are both 0: there is nothing to learn")
        if self.class_weights is not None:
            if len(self.class_weights) != self.num_classes:
                raise ValueError(
                    f"class_weights needs one entry for each of {self.num_classes} classes, it has {len(self.class_weights)}"
                )
            if min(self.class_weights) < 0 or not any(self.class_weights[1:]):
                raise ValueError("class_weights must be 0 or more, and above 0 for at least one class besides class 0")
        return self


@dataclass(frozen=True, slots=True, eq=False)
class PointLogits:
    """What the network answers. K of the N points of the batch are inside the grid."""

    logits: Tensor  # (K, classes) float
    assignment: VoxelAssignment  # `point_index` says which points those are


class SegmentationNet(JoinedEncoder):
    """Encoder and head. The encoder's state-dict keys are those of pre-training; the head is below ``seg_head.``.

    Args:
        grid: range and voxel size.
        in_features: point features used beside x, y, z.
        backbone: the DSVT encoder.
        pillars: encode pillars instead of voxels.
        config: the head.

    Raises:
        ConfigError: if grid, windows and strides do not fit each other.
    """

    def __init__(
        self,
        grid: VoxelGrid,
        in_features: int,
        backbone: DsvtConfig,
        *,
        pillars: bool = False,
        config: SegmentationTaskConfig | None = None,
    ) -> None:
        super().__init__(grid, in_features, backbone, pillars=pillars)
        config = config or SegmentationTaskConfig()
        self.seg_head = PointHead(
            self.joined_channels, backbone.channels, config.head_channels, config.num_classes, dropout=config.dropout
        )

    def forward(self, batch: PointBatch) -> PointLogits:
        """Logits of the points inside the grid; there may be none."""
        joined = self.joined_features(batch)
        logits = self.seg_head(joined.feats, joined.point_features, joined.assignment.voxel_of_point)
        return PointLogits(logits, joined.assignment)


class PointHead(nn.Module):
    """From M voxel features and K point features to K rows of logits."""

    def __init__(
        self, voxel_channels: int, point_channels: int, channels: int, num_classes: int, *, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.voxel = nn.Sequential(nn.Linear(voxel_channels, channels, bias=False), RowBatchNorm(channels, eps=1e-3), nn.ReLU())
        # One linear layer on [voxel feature, point feature], in two parts: the first is computed once per voxel.
        self.from_voxel = nn.Linear(channels, channels, bias=False)
        self.from_point = nn.Linear(point_channels, channels, bias=False)
        self.norm = RowBatchNorm(channels, eps=1e-3)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, voxel_feats: Tensor, point_feats: Tensor, voxel_of_point: Tensor) -> Tensor:
        """(M, V), (K, P) and (K,) int64 to (K, classes)."""
        hidden = gather_rows(self.from_voxel(self.voxel(voxel_feats)), voxel_of_point) + self.from_point(point_feats)
        return self.classifier(self.dropout(torch.relu(self.norm(hidden))))


class SegmentationTask:
    """Segmentation as the training loop sees it.

    Args:
        module: the network.
        config: the losses.
    """

    def __init__(self, module: SegmentationNet, config: SegmentationTaskConfig) -> None:
        self._module, self.config = module, config

    @property
    def module(self) -> SegmentationNet:
        """The network."""
        return self._module

    def loss(self, batch: PointBatch, generator: torch.Generator) -> dict[str, Tensor]:
        """Scalars by name; "total" is minimised.

        Points of class 0 and points outside the grid take no part. "cross_entropy" and "lovasz" are not weighted and are there
        if their weight is above 0; "accuracy" is the share of those points that are right. Without any such point all are 0.

        Raises:
            DataError: if the batch has no labels, or labels that no logit stands for.
        """
        labels = labels_of(batch, self.config.num_classes)
        answer = self.module(batch)
        logits, labels = answer.logits.float(), labels[answer.assignment.point_index]
        config, losses = self.config, {}
        if config.cross_entropy_weight > 0:
            losses["cross_entropy"] = cross_entropy(logits, labels, config.class_weights)
        if config.lovasz_weight > 0:
            losses["lovasz"] = lovasz_softmax(logits, labels, ignored=IGNORED)
        weights = {"cross_entropy": config.cross_entropy_weight, "lovasz": config.lovasz_weight}
        total = torch.stack([weights[name] * value for name, value in losses.items()]).sum()
        labelled = labels != IGNORED
        right = (predicted_class(logits.detach()) == labels) & labelled
        return {"total": total, **losses, "accuracy": right.sum() / labelled.sum().clamp(min=1)}

    def predict(self, batch: PointBatch, *, wanted: Tensor | None = None) -> Tensor:
        """(N,) int64 classes of all points of a batch on the network's device; never 0 where there is an answer.

        Points outside the grid take the class of the nearest occupied voxel: see `tasks.outside`. No gradients, running
        statistics in the norms; the network's mode is restored.

        Args:
            batch: the points.
            wanted: (N,) bool, points outside the grid that are to be answered at all; None: every one.
        """
        with frozen(self.module):
            answer = self.module(batch)
        logits, assignment = answer.logits.float(), answer.assignment
        voxel_logits = segment_mean(logits, assignment.voxel_of_point, assignment.num_voxels)
        return classes_of_points(
            batch, assignment, self.module.grid, predicted_class(logits), predicted_class(voxel_logits), wanted
        )


def evaluate_segmentation(
    task: SegmentationTask, batches: Iterable[PointBatch], class_names: tuple[str, ...]
) -> SegmentationScores:
    """Scores a network on labelled frames, each of their labelled points counting once. Memory does not grow with the frames.

    Args:
        task: the network.
        batches: un-augmented and uncropped; moved to the network's device here.
        class_names: of the training classes, class 0 included.

    Raises:
        DataError: if a batch has no labels, or labels outside the classes.
    """
    device = next(task.module.parameters()).device
    matrix = ConfusionMatrix(class_names, ignored=IGNORED)
    for batch in batches:
        labels = labels_of(batch, len(class_names))
        prediction = task.predict(batch.to(device), wanted=(labels != IGNORED).to(device))
        matrix.add(labels.cpu().numpy(), prediction.cpu().numpy(), where=", ".join(batch.frame_names))
    return matrix.scores()


def predicted_class(logits: Tensor) -> Tensor:
    """(R,) int64: the largest of (R, classes) logits, class 0 left out."""
    return logits[:, 1:].argmax(1) + 1


def cross_entropy(logits: Tensor, labels: Tensor, class_weights: tuple[float, ...] | None = None) -> Tensor:
    """Mean cross-entropy over the rows whose label is not 0; 0, still joined to `logits`, if there is none."""
    weight = None if class_weights is None else logits.new_tensor(class_weights)
    summed = F.cross_entropy(logits, labels, weight=weight, ignore_index=IGNORED, reduction="sum")
    counted = (labels != IGNORED).to(logits.dtype)
    mass = counted.sum() if weight is None else (counted * weight[labels]).sum()
    return summed / mean_count(mass, logits)


def labels_of(batch: PointBatch, num_classes: int) -> Tensor:
    """The batch's (N,) labels.

    Raises:
        DataError: naming the frames, if there are none or one is not among the classes.
    """
    frames = ", ".join(batch.frame_names)
    if batch.labels is None:
        raise DataError(
            f"{frames}: no labels. Segmentation needs labelled keyframes: prepare the data with its labels (for nuScenes the "
            f"lidarseg download), and leave data.labels=true. Where only some keyframes have labels, set "
            f"data.labelled_only=true."
        )
    if batch.labels.numel():
        low, high = (int(value) for value in batch.labels.aminmax())
        if low < 0 or high >= num_classes:
            raise DataError(
                f"{frames}: label {low if low < 0 else high} is not among the {num_classes} training classes 0.."
                f"{num_classes - 1}. Prepare the data with the label set it was labelled in, or set task.num_classes."
            )
    return batch.labels
