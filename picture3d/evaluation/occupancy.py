"""Occupancy scores of nuScenes-Occupancy (OpenOccupancy): occupied cells in, table out. No model, no GPU.

- Every cell of the grid of every frame is counted once, free ones included, unless its truth is IGNORED (noise): whatever is
  predicted there counts nowhere. One confusion matrix holds the whole split: row = truth, column = prediction, 0 = free.
- Geometric IoU ("SC"): occupied against free, classes aside. TP = occupied in both, FP = predicted only, FN = true only.
- IoU of a class: TP / (TP + FP + FN) of its row and column, where free cells take part: a cell predicted as a car where there
  is nothing is a false alarm of the car.
- mIoU ("SSC"): mean IoU over the classes that occur in truth or prediction, of the 16. A class that occurs in neither has
  no IoU (0 / 0): it is left out of the mean and named. `miou_of_all` counts it as 0 instead.

Source: the OpenOccupancy benchmark, which averages over its 16 classes, all of which occur in its validation split.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from picture3d.errors import DataError
from picture3d.evaluation.segmentation import ConfusionMatrix
from picture3d.structures.occupancy import FREE, IGNORED, Occupancy


@dataclass(frozen=True, slots=True, eq=False)
class OccupancyScores:
    """Scores of one split. Sequences have one entry per class, free space (0) included."""

    class_names: tuple[str, ...]
    confusion: NDArray[np.int64]  # (C, C): row = truth, column = prediction, 0 = free
    iou: tuple[float | None, ...]  # 0..1; None for free space and for classes in neither truth nor prediction
    miou: float | None  # 0..1; None if no class occurs at all
    geometric_iou: float | None  # 0..1; None if nothing is occupied in truth or prediction
    precision: float | None  # share of the predicted cells that are occupied
    recall: float | None  # share of the occupied cells that are predicted
    frames: int
    cells: int  # that were scored
    ignored: int  # cells left out because their truth is noise

    @property
    def miou_of_all(self) -> float:
        """Mean IoU over all classes but free space; one that occurs in neither truth nor prediction counts as 0."""
        return sum(value or 0.0 for value in self.iou[1:]) / (len(self.iou) - 1)

    @property
    def absent(self) -> tuple[str, ...]:
        """Classes left out of the mean because they occur in neither truth nor prediction."""
        return tuple(name for name, iou in zip(self.class_names[1:], self.iou[1:], strict=True) if iou is None)

    def table_rows(self) -> list[tuple[str, str, str, str]]:
        """Rows (class, IoU in per cent, cells in truth, cells in prediction), then the means and the geometry."""
        truth, predicted = self.confusion.sum(1), self.confusion.sum(0)
        rows = [
            (name, "absent" if self.iou[c] is None else _percent(self.iou[c]), f"{truth[c]:,}", f"{predicted[c]:,}")
            for c, name in enumerate(self.class_names)
            if c > 0
        ]
        occupied = f"{truth[1:].sum():,}", f"{predicted[1:].sum():,}"
        counted = len(self.class_names) - 1 - len(self.absent)
        return [
            *rows,
            (f"mIoU ({counted} classes)", _percent(self.miou), *occupied),
            ("geometric IoU", _percent(self.geometric_iou), *occupied),
        ]

    def to_json(self) -> dict[str, Any]:
        """A plain tree for JSON; what does not exist is null, never NaN."""
        return {
            "miou": self.miou,
            "miou_of_all": self.miou_of_all,
            "geometric_iou": self.geometric_iou,
            "precision": self.precision,
            "recall": self.recall,
            "iou": {name: self.iou[c] for c, name in enumerate(self.class_names) if c > 0},
            "absent": list(self.absent),
            "frames": self.frames,
            "cells": self.cells,
            "ignored": self.ignored,
            "confusion": self.confusion.tolist(),
        }


class OccupancyMatrix:
    """Counts truth against prediction, frame after frame; its size does not depend on how many frames were added.

    Args:
        class_names: name of every class, free space (0) first.

    Raises:
        ValueError: if there is no class besides free space.
    """

    def __init__(self, class_names: Sequence[str]) -> None:
        self._matrix = ConfusionMatrix(class_names, ignored=IGNORED)
        self._frames = 0

    def add(self, truth: Occupancy, prediction: Occupancy, *, where: str = "") -> None:
        """Counts one frame; time and memory go with the occupied cells and not with the grid.

        Args:
            truth: labels 1..C-1 or IGNORED.
            prediction: on the same grid, labels 1..C-1.
            where: the frame's name, for errors.

        Raises:
            DataError: naming the label that no class has, or the grids that differ.
        """
        if truth.grid != prediction.grid:
            raise DataError(
                f"{where or 'scores'}: the truth lies on {truth.grid}, the prediction on {prediction.grid}. Write predictions "
                "on the grid of the labels."
            )
        keys = _union(truth.keys, prediction.keys)
        self._matrix.add(_labels_at(truth, keys), _labels_at(prediction, keys), where=where)
        self._matrix.counts[FREE, FREE] += truth.grid.cells - len(keys)
        self._frames += 1

    @property
    def counts(self) -> dict[str, NDArray[np.int64]]:
        """What was counted, as arrays for `add_counts` of another matrix."""
        numbers = np.array([self._matrix.num_ignored, self._frames], np.int64)
        return {"confusion": self._matrix.counts, "ignored_and_frames": numbers}

    def add_counts(self, counts: Mapping[str, NDArray[np.int64]]) -> None:
        """Adds what another matrix of these classes has counted."""
        ignored, frames = counts["ignored_and_frames"].tolist()
        self._matrix.add_counts(counts["confusion"], ignored)
        self._frames += frames

    def scores(self) -> OccupancyScores:
        """The scores of everything added so far."""
        found = self._matrix.scores()
        both = int(found.confusion[1:, 1:].sum())
        predicted, true = int(found.confusion[:, 1:].sum()), int(found.confusion[1:].sum())
        return OccupancyScores(
            class_names=found.class_names,
            confusion=found.confusion,
            iou=found.iou,
            miou=found.miou,
            geometric_iou=_share(both, predicted + true - both),
            precision=_share(both, predicted),
            recall=_share(both, true),
            frames=self._frames,
            cells=found.num_points,
            ignored=found.num_ignored,
        )


def _union(one: NDArray[np.int64], two: NDArray[np.int64]) -> NDArray[np.int64]:
    """Every key of two rising arrays once, rising: merging two runs is many times quicker than hashing their members."""
    keys = np.sort(np.concatenate([one, two]), kind="stable")
    return keys[np.concatenate([[True], keys[1:] != keys[:-1]])] if len(keys) else keys


def _labels_at(occupancy: Occupancy, keys: NDArray[np.int64]) -> NDArray[np.uint8]:
    """(K,) labels of cells by their keys, which include all of its own; FREE elsewhere."""
    out = np.full(len(keys), FREE, np.uint8)
    out[np.searchsorted(keys, occupancy.keys)] = occupancy.label
    return out


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"
