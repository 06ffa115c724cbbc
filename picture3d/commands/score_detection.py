"""Scoring a detector on prepared frames: by the nuScenes or by the Waymo metric, whichever its classes belong to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from picture3d.commands.build import build_detection, scoring_batches
from picture3d.commands.score_nuscenes import table as nuscenes_table
from picture3d.commands.score_waymo import table as waymo_table
from picture3d.datasets.loading import FrameBatches
from picture3d.datasets.nuscenes_samples import sample_token
from picture3d.datasets.prepared import FrameKey
from picture3d.errors import ConfigError
from picture3d.evaluation import nuscenes_frames, waymo_frames
from picture3d.evaluation.nuscenes_detection import NuScenesScores, score_detections
from picture3d.evaluation.waymo_detection import WaymoScorer, WaymoScores
from picture3d.formats import nuscenes_results
from picture3d.formats.nuscenes_results import DetectionColumns
from picture3d.recipes.configs import DetectionConfig
from picture3d.structures.detections import DetectedBoxes
from picture3d.tasks.detection import DetectionTask
from picture3d.training.checkpoint import load_into, load_weights
from picture3d.training.runlog import Progress, RunFolder


def evaluate_detection(
    run: Path, config: DetectionConfig, *, data: Path | None, split: str, as_json: bool, device: torch.device
) -> str:
    """Scores a detector on every keyframe of a split; keeps the scores in its folder and returns them as a table or as JSON.

    Raises:
        ConfigError: if no official metric knows the detector's classes.
        DataError: if a frame was not annotated or has no pose.
    """
    task = load_detector(run, config, device)
    batches = scoring_batches(config.data, root=data, split=split, labels=False)
    folder, title = RunFolder(run), f"{run}, split {split}"
    if set(task.classes) <= set(nuscenes_results.CLASSES):
        scores = score_nuscenes(task, batches)
        tree, text = scores.to_json(), nuscenes_table(title, scores)
        numbers = {f"map_{split}": scores.mean_ap, f"nds_{split}": scores.nds}
    elif {name.lower() for name in task.classes} <= set(waymo_frames.KIND_OF_CLASS):
        found = score_waymo(task, batches)
        tree, text = found.to_json(), waymo_table(title, found)
        numbers = dict(zip((f"map_{split}", f"maph_{split}"), found.mean(), strict=True))
    else:
        raise ConfigError(
            f"{run}: no official metric knows all of {', '.join(task.classes)}. Write the boxes with `picture3d predict`."
        )
    folder.write_json(f"evaluation_{split}.json", tree)
    folder.update_summary(numbers)
    return json.dumps(tree) if as_json else text


def score_waymo(task: DetectionTask, batches: FrameBatches) -> WaymoScores:
    """The Waymo metric of a detector on every frame of `batches`."""
    scorer = WaymoScorer()
    for key, boxes in detections(task, batches):
        frame = batches.dataset.frame(key, {"boxes"})
        scorer.add(waymo_frames.labels_of_frame(frame), waymo_frames.detections_of_frame(frame, boxes, task.classes))
    return scorer.scores()


def score_nuscenes(task: DetectionTask, batches: FrameBatches) -> NuScenesScores:
    """The nuScenes metric of a detector on every frame of `batches`."""
    labels: list[DetectionColumns] = []
    found: list[DetectionColumns] = []
    for key, boxes in detections(task, batches):
        frame, token = batches.dataset.frame(key, {"boxes"}), sample_token(batches.dataset, key)
        labels.append(nuscenes_frames.labels_of_frame(frame, token))
        found.append(nuscenes_frames.detections_of_frame(frame, token, boxes, task.classes))
    return score_detections(DetectionColumns.join(labels), DetectionColumns.join(found))


def detections(task: DetectionTask, batches: FrameBatches, label: str = "evaluate") -> Iterator[tuple[FrameKey, DetectedBoxes]]:
    """What a detector finds in each frame of un-augmented batches of one."""
    device = next(task.module.parameters()).device
    with Progress(label) as progress:
        for done, (key, batch) in enumerate(zip(batches.keys, batches.epoch(0), strict=True), start=1):
            yield key, task.predict(batch.to(device))[0]
            progress(done, len(batches.keys))


def load_detector(run: Path, config: DetectionConfig, device: torch.device) -> DetectionTask:
    """The trained detector of a run folder."""
    task = build_detection(config, device)
    load_into(task.module, load_weights(run).tensors)
    return task
