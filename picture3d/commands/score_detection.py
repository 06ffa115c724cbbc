"""Scoring a detector on prepared frames: by the nuScenes or by the Waymo metric, whichever its classes belong to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch

from picture3d.commands.build import build_detection, scoring_batches
from picture3d.commands.by_log import Arrays, Frames, log_by_log
from picture3d.commands.score import Evaluation
from picture3d.commands.score_nuscenes import table as nuscenes_table
from picture3d.commands.score_waymo import table as waymo_table
from picture3d.datasets.loading import FrameBatches
from picture3d.datasets.nuscenes_samples import sample_token
from picture3d.datasets.prepared import FrameKey
from picture3d.errors import ConfigError
from picture3d.evaluation import nuscenes_frames, waymo_frames
from picture3d.evaluation.nuscenes_detection import NuScenesScores, score_detections
from picture3d.evaluation.waymo_detection import CHALLENGE, KINDS, WaymoScorer, WaymoScores, breakdown
from picture3d.formats import nuscenes_results
from picture3d.formats.nuscenes_results import DetectionColumns
from picture3d.recipes.configs import DetectionConfig
from picture3d.structures.detections import DetectedBoxes
from picture3d.tasks.detection import DetectionTask
from picture3d.training.checkpoint import load_into, load_weights
from picture3d.training.distributed import Team


def evaluate_detection(
    run: Path, config: DetectionConfig, *, data: Path | None, split: str, device: torch.device, team: Team
) -> Evaluation | None:
    """Scores a detector on every keyframe of a split: nuScenes' mAP, or Waymo's mAPH of level 2, by what its classes are.

    Of several processes the first has the scores, the others None.

    Raises:
        ConfigError: if no official metric knows the detector's classes.
        DataError: if a frame was not annotated or has no pose.
    """
    task = load_detector(run, config, device)
    batches = scoring_batches(config.data, root=data, split=split, labels=False)
    title = f"{run}, split {split}"
    if set(task.classes) <= set(nuscenes_results.CLASSES):
        scores = score_nuscenes(task, batches, team)
        if scores is None:
            return None
        tree = scores.to_json()
        return Evaluation(
            measure="mAP",
            score=scores.mean_ap,
            by_class=tree["mean_dist_aps"],
            tree=tree,
            table=nuscenes_table(title, scores),
            summary={"map": scores.mean_ap, "nds": scores.nds},
        )
    if {name.lower() for name in task.classes} <= set(waymo_frames.KIND_OF_CLASS):
        found = score_waymo(task, batches, team)
        if found is None:
            return None
        mean_ap, mean_aph = found.mean()
        return Evaluation(
            measure="mAPH",
            score=mean_aph,
            by_class={KINDS[kind].lower(): found.aph[breakdown(kind, 2)] for kind in CHALLENGE},
            tree=found.to_json(),
            table=waymo_table(title, found),
            summary={"map": mean_ap, "maph": mean_aph},
        )
    raise ConfigError(
        f"{run}: no official metric knows all of {', '.join(task.classes)}. Write the boxes with `picture3d predict`."
    )


def score_waymo(task: DetectionTask, batches: FrameBatches, team: Team) -> WaymoScores | None:
    """The Waymo metric of a detector on every frame of `batches`, in the first process of the team."""

    def part(frames: Frames) -> Arrays:
        scorer = WaymoScorer()
        for key, boxes in detections(task, frames):
            frame = batches.dataset.frame(key, {"boxes"})
            scorer.add(waymo_frames.labels_of_frame(frame), waymo_frames.detections_of_frame(frame, boxes, task.classes))
        return scorer.counts()

    parts = log_by_log(batches, team, "evaluate", part)
    if not team.writes:
        return None
    scorer = WaymoScorer()
    for counts in parts:
        scorer.add_counts(counts)
    return scorer.scores()


def score_nuscenes(task: DetectionTask, batches: FrameBatches, team: Team) -> NuScenesScores | None:
    """The nuScenes metric of a detector on every frame of `batches`, in the first process of the team."""

    def part(frames: Frames) -> Arrays:
        labels: list[DetectionColumns] = []
        found: list[DetectionColumns] = []
        for key, boxes in detections(task, frames):
            frame, token = batches.dataset.frame(key, {"boxes"}), sample_token(batches.dataset, key)
            labels.append(nuscenes_frames.labels_of_frame(frame, token))
            found.append(nuscenes_frames.detections_of_frame(frame, token, boxes, task.classes))
        return {**_columns("labels", labels), **_columns("found", found)}

    parts = log_by_log(batches, team, "evaluate", part)
    if not team.writes:
        return None
    labels, found = (DetectionColumns.join(_of_columns(side, columns) for columns in parts) for side in ("labels", "found"))
    return score_detections(labels, found)


def _columns(side: str, boxes: list[DetectionColumns]) -> Arrays:
    joined = DetectionColumns.join(boxes)
    return {f"{side}.{field.name}": np.asarray(getattr(joined, field.name)) for field in fields(joined)}


def _of_columns(side: str, arrays: Arrays) -> DetectionColumns:
    columns = {field.name: arrays[f"{side}.{field.name}"] for field in fields(DetectionColumns)}
    return DetectionColumns(**{**columns, "samples": tuple(columns["samples"].tolist())})  # pyright: ignore[reportArgumentType]


def detections(task: DetectionTask, frames: Frames) -> Iterator[tuple[FrameKey, DetectedBoxes]]:
    """What a detector finds in each frame."""
    device = next(task.module.parameters()).device
    for key, batch in frames:
        yield key, task.predict(batch.to(device))[0]


def load_detector(run: Path, config: DetectionConfig, device: torch.device) -> DetectionTask:
    """The trained detector of a run folder."""
    task = build_detection(config, device)
    load_into(task.module, load_weights(run).tensors)
    return task
