"""`score nuscenes-detection`: the official numbers of a submission file that any program wrote."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from picture3d.datasets.detection_classes import CLASS_OF_CATEGORY
from picture3d.datasets.prepared import FrameKey, PreparedDataset
from picture3d.errors import DataError
from picture3d.evaluation.nuscenes_detection import NuScenesScores, score_detections
from picture3d.formats.nuscenes_results import (
    ATTRIBUTES,
    BICYCLE_RACK,
    CLASSES,
    RACK,
    DetectionColumns,
    read_labels,
    read_results,
    rotation_of_yaw,
)

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
        hint = " Samples of prepared frames go by the frames' tokens." if labels.is_dir() else ""
        raise DataError(f"{results}: {error}{hint}") from None
    return json.dumps(scores.to_json(meta)) if as_json else _table(str(results), scores)


def prepared_labels(root: Path, split: str) -> DetectionColumns:
    """The labels of every keyframe of a split of prepared nuScenes frames, in the global frame; samples are frame tokens.

    Centres and sizes are exact. Headings and velocities were stored in the LiDAR's xy plane and are taken back as those of
    things on level ground: at a tilt of 2 degrees a heading is right to 1e-3 rad, a velocity to the tilt times the speed
    upwards.

    Raises:
        DataError: if a keyframe has no pose or no boxes, or was prepared without attributes and radar counts.
    """
    dataset = PreparedDataset(root)
    return DetectionColumns.join(_frame_labels(dataset, key) for key in dataset.keyframes(split))


def _frame_labels(dataset: PreparedDataset, key: FrameKey) -> DetectionColumns:
    frame = dataset.frame(key, {"boxes"})
    boxes, ego, pose = frame.boxes, frame.global_from_ego, frame.global_from_lidar
    if boxes is None or ego is None or pose is None:
        raise DataError(
            f"{dataset.root}: frame {key} has no {'boxes' if boxes is None else 'pose'}, so nothing can be scored on it."
        )
    if len(boxes) and (boxes.attribute is None or boxes.num_radar_points is None):
        raise DataError(
            f"{dataset.root}: frame {key} has no attributes and radar counts. Run `picture3d prepare nuscenes` again."
        )
    index = {name: CLASSES.index(target) for name, target in CLASS_OF_CATEGORY.items()} | {BICYCLE_RACK: RACK}
    boxes = boxes.select(np.array([name in index for name in boxes.category], dtype=bool))
    upward = -boxes.velocity @ pose.rotation[2, :2] / pose.rotation[2, 2]
    velocity = np.column_stack([boxes.velocity, upward]) @ pose.rotation.T
    forward = np.column_stack([np.cos(boxes.yaw), np.sin(boxes.yaw), np.zeros(len(boxes))]) @ pose.rotation.T
    attributes = boxes.attribute or ()
    unknown = set(attributes).difference(ATTRIBUTES, [""])
    if unknown:
        raise DataError(f"{dataset.root}: frame {key} has the attribute {min(unknown)!r}; known: {', '.join(ATTRIBUTES)}.")
    radar = np.zeros(len(boxes), np.int32) if boxes.num_radar_points is None else boxes.num_radar_points
    return DetectionColumns(
        samples=(frame.token,),
        sample=np.zeros(len(boxes), np.int64),
        translation=boxes.center @ pose.rotation.T + pose.translation,
        size=boxes.size,
        rotation=rotation_of_yaw(np.arctan2(forward[:, 1], forward[:, 0])),
        velocity=velocity[:, :2],
        label=np.array([index[name] for name in boxes.category], dtype=np.int64),
        score=np.full(len(boxes), -1.0),
        attribute=np.array([ATTRIBUTES.index(name) if name else -1 for name in attributes], dtype=np.int64),
        num_points=np.where(boxes.num_points < 0, -1, boxes.num_points + radar).astype(np.int64),
        ego=ego.translation[None],
    )


def _table(title: str, scores: NuScenesScores) -> str:
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
