"""`score nuscenes-detection`: the official numbers of a submission file that any program wrote."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from picture3d.datasets.nuscenes_samples import sample_token
from picture3d.datasets.prepared import PreparedDataset
from picture3d.errors import DataError
from picture3d.evaluation.nuscenes_detection import NuScenesScores, score_detections
from picture3d.evaluation.nuscenes_frames import labels_of_frame
from picture3d.formats.nuscenes_results import CLASSES, DetectionColumns, read_labels, read_results

_SHORT = ("ATE m", "ASE", "AOE rad", "AVE m/s", "AAE")


def score_nuscenes_detection(results: Path, *, labels: Path, split: str, bike_racks: bool, as_json: bool) -> str:
    """Scores a ``results_nusc.json``; returns a table, or the official metrics summary as JSON.

    Args:
        results: the submission.
        labels: a folder of prepared frames, or a JSON in the submission's layout with points per box.
        split: which split of a prepared folder.
        bike_racks: whether bicycles and motorcycles in bicycle racks are left out.
        as_json: JSON instead of the table.

    Raises:
        DataError: as the reader of the submission and the metric do.
    """
    truth = prepared_labels(labels, split) if labels.is_dir() else read_labels(labels)[0]
    found, meta = read_results(results)
    try:
        scores = score_detections(truth, found, bike_racks=bike_racks)
    except DataError as error:
        hint = (
            " Samples of prepared nuScenes go by their official tokens, of other data by the frames' tokens."
            if labels.is_dir()
            else ""
        )
        raise DataError(f"{results}: {error}{hint}") from None
    return json.dumps(scores.to_json(meta)) if as_json else table(str(results), scores)


def prepared_labels(root: Path, split: str) -> DetectionColumns:
    """The labels of every keyframe of a split of prepared nuScenes frames; see `evaluation.nuscenes_frames`.

    Raises:
        DataError: if a keyframe has no pose or no boxes, or was prepared without attributes and radar counts.
    """
    dataset = PreparedDataset(root)
    return DetectionColumns.join(
        labels_of_frame(dataset.frame(key, {"boxes"}), sample_token(dataset, key)) for key in dataset.keyframes(split)
    )


def table(title: str, scores: NuScenesScores) -> str:
    """Plain text: AP and errors per class, their means, mAP and NDS."""
    rows: list[tuple[str, ...]] = [("class", "AP %", *_SHORT, "labels", "predicted")]
    counts = zip(scores.labels, scores.predictions, strict=True)
    for name, ap, errors, (labels, predicted) in zip(CLASSES, scores.aps.mean(1), scores.errors, counts, strict=True):
        rows.append((name, f"{100 * ap:.2f}", *map(_error, errors), str(labels), str(predicted)))
    totals = str(scores.labels.sum()), str(scores.predictions.sum())
    rows.append(("mean", f"{100 * scores.mean_ap:.2f}", *map(_error, scores.mean_errors), *totals))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    notes = [f"mAP {100 * scores.mean_ap:.2f}  NDS {100 * scores.nds:.2f}  ({scores.samples} samples)"]
    if scores.samples_without_ego:
        notes.append(
            f"In {scores.samples_without_ego} samples no box was left out for its distance: the labels "
            "do not tell where the car was (ego_translation)."
        )
    return "\n".join([title, *lines, *notes])


def _error(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.3f}"
