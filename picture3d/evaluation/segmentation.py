"""Semantic segmentation scores: labels of points (or voxels) in, table out. No model, no GPU.

Labels are training classes: 0 is never scored (noise for lidarseg, free space for occupancy), 1..C-1 are.

- Confusion matrix: row = truth, column = prediction, counted over every point of every frame whose truth is not the
  *ignored* label (0 for lidarseg). Frames are not averaged: one matrix holds the whole split.
- IoU of a class: TP / (TP + FP + FN), where TP is its diagonal entry, FP the rest of its column and FN the rest of its
  row. What is predicted where the truth is ignored does not count.
- A point predicted as 0, that is "no answer", is a miss of its true class and a false alarm of none.
- mIoU: mean IoU over the classes 1..C-1 that occur in truth or prediction. A class that occurs in neither has no IoU (its
  IoU would be 0 / 0); it is left out of the mean and named in `SegmentationScores.absent`.

Source: the nuScenes lidarseg challenge, which averages over its 16 classes, all of which occur in its validation split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from picture3d.errors import DataError


@dataclass(frozen=True, slots=True, eq=False)
class SegmentationScores:
    """Scores of one split. Sequences have one entry per training class, the never scored class 0 included."""

    class_names: tuple[str, ...]
    confusion: NDArray[np.int64]  # (C, C): row = truth, column = prediction
    iou: tuple[float | None, ...]  # 0..1; None for class 0 and for classes that occur in neither truth nor prediction
    miou: float | None  # 0..1; None if no scored class occurs at all
    num_points: int  # points that were scored
    num_ignored: int  # points left out because their truth is the ignored label

    @property
    def absent(self) -> tuple[str, ...]:
        """Classes left out of the mean because they occur in neither truth nor prediction."""
        return tuple(name for name, iou in zip(self.class_names[1:], self.iou[1:], strict=True) if iou is None)

    @property
    def accuracy(self) -> float | None:
        """Share of the scored points whose class is right; None if there are none."""
        return float(np.trace(self.confusion) / self.num_points) if self.num_points else None

    def table_rows(self) -> list[tuple[str, str, str, str]]:
        """Rows (class, IoU in per cent, points in truth, points in prediction); the last one is the mean."""
        truth, predicted = self.confusion.sum(1), self.confusion.sum(0)
        rows = [
            (name, "absent" if self.iou[c] is None else _percent(self.iou[c]), f"{truth[c]:,}", f"{predicted[c]:,}")
            for c, name in enumerate(self.class_names)
            if c > 0
        ]
        counted = len(self.class_names) - 1 - len(self.absent)
        return [*rows, (f"mIoU ({counted} classes)", _percent(self.miou), f"{self.num_points:,}", "")]

    def to_json(self) -> dict[str, Any]:
        """A plain tree for JSON; what does not exist is null, never NaN."""
        return {
            "miou": self.miou,
            "accuracy": self.accuracy,
            "iou": {name: self.iou[c] for c, name in enumerate(self.class_names) if c > 0},
            "absent": list(self.absent),
            "num_points": self.num_points,
            "num_ignored": self.num_ignored,
            "confusion": self.confusion.tolist(),
        }


class ConfusionMatrix:
    """Counts truth against prediction, frame after frame; its size does not depend on how many frames were added.

    Args:
        class_names: name of every training class, class 0 included.
        ignored: truth label that is left out; 0 for lidarseg, 255 for occupancy.

    Raises:
        ValueError: if there is no class besides 0.
    """

    def __init__(self, class_names: Sequence[str], *, ignored: int = 0) -> None:
        if len(class_names) < 2:
            raise ValueError(f"needs the never scored class 0 and at least one more, got {tuple(class_names)}")
        self.class_names = tuple(class_names)
        self.ignored = ignored
        self.counts: NDArray[np.int64] = np.zeros((len(self.class_names), len(self.class_names)), np.int64)
        self.num_ignored = 0

    def add(self, truth: NDArray[np.integer], prediction: NDArray[np.integer], *, where: str = "") -> None:
        """Counts one frame (or one batch).

        Args:
            truth: integers of any shape, 0..C-1 or the ignored label.
            prediction: the same shape, 0..C-1; 0 means "no answer".
            where: the frame's name, for errors.

        Raises:
            DataError: naming the label that no class has, or the shapes that differ.
        """
        if truth.shape != prediction.shape:
            raise DataError(
                f"{where or 'scores'}: truth has shape {truth.shape}, prediction {prediction.shape}. Give one class for each "
                "labelled point."
            )
        truth, prediction = np.asarray(truth).ravel(), np.asarray(prediction).ravel()
        scored = truth != self.ignored
        truth, prediction = truth[scored], prediction[scored]
        self._check("truth", truth, where)
        self._check("prediction", prediction, where)
        self.num_ignored += scored.size - truth.size
        size = len(self.class_names)
        pairs = truth.astype(np.int64) * size + prediction.astype(np.int64)
        self.counts += np.bincount(pairs, minlength=size * size).reshape(size, size)

    def add_counts(self, confusion: NDArray[np.int64], num_ignored: int) -> None:
        """Adds what another matrix of these classes has counted, (C, C), and how many points it left out."""
        self.counts += confusion
        self.num_ignored += num_ignored

    def scores(self) -> SegmentationScores:
        """The scores of everything added so far."""
        hits = np.diagonal(self.counts)
        union = self.counts.sum(0) + self.counts.sum(1) - hits
        iou = [float(hits[c] / union[c]) if c > 0 and union[c] > 0 else None for c in range(len(self.class_names))]
        present = [value for value in iou if value is not None]
        return SegmentationScores(
            class_names=self.class_names,
            confusion=self.counts.copy(),
            iou=tuple(iou),
            miou=sum(present) / len(present) if present else None,
            num_points=int(self.counts.sum()),
            num_ignored=self.num_ignored,
        )

    def _check(self, what: str, labels: NDArray[np.integer], where: str) -> None:
        if not np.issubdtype(labels.dtype, np.integer):
            raise DataError(f"{where or 'scores'}: {what} must be integers, got {labels.dtype}. Convert them.")
        if labels.size == 0:
            return
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= len(self.class_names):
            wrong = low if low < 0 else high
            raise DataError(
                f"{where or 'scores'}: {what} holds label {wrong}, but there are only the {len(self.class_names)} classes "
                f"0..{len(self.class_names) - 1}. Map raw labels to training classes first (datasets/label_sets.py)."
            )


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"
