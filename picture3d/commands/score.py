"""`evaluate`: what a fine-tuned network is worth, as a table, as JSON and in its run folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from picture3d.commands.build import build_segmentation, read_run_config, scoring_batches
from picture3d.commands.by_log import Arrays, Frames, log_by_log
from picture3d.commands.machine import start
from picture3d.datasets.loading import FrameBatches
from picture3d.errors import ConfigError, DataError
from picture3d.evaluation.segmentation import ConfusionMatrix, SegmentationScores
from picture3d.recipes.configs import DetectionConfig, OccupancyConfig, SegmentationConfig
from picture3d.structures.batch import PointBatch
from picture3d.tasks.segmentation import IGNORED, evaluate_segmentation
from picture3d.training.checkpoint import load_into, load_weights
from picture3d.training.distributed import Team, joined_team, launched_place
from picture3d.training.runlog import Progress, RunFolder


@dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
    """What a fine-tuned network is worth on a split."""

    measure: str  # name of the score
    score: float | None  # 0..1, larger is better, by which networks are compared; None if nothing could be scored
    by_class: Mapping[str, float | None]  # the same of each class; None of one that does not occur
    tree: Mapping[str, Any]  # everything, for JSON
    table: str  # everything, for people
    summary: Mapping[str, float | None]  # for summary.json


def evaluate(run: Path, *, data: Path | None, split: str, as_json: bool, device: str, threads: int) -> str:
    """Scores a fine-tuned network; returns the table, or JSON.

    Several processes share the logs out. The first one keeps the scores and returns them, the others return nothing.
    """
    place = launched_place()
    machine = start(device, threads, place)
    with joined_team(machine, place=place) as team:
        return evaluate_together(run, data=data, split=split, as_json=as_json, machine=machine, team=team)


def evaluate_together(run: Path, *, data: Path | None, split: str, as_json: bool, machine: torch.device, team: Team) -> str:
    """`evaluate` in one of the processes of a team."""
    found = _evaluated(run, data, split, machine, team)
    if found is None:
        return ""
    return json.dumps(found.tree) if as_json else found.table


def run_evaluation(run: Path, *, data: Path | None, split: str, device: str, threads: int) -> Evaluation:
    """Scores a fine-tuned network in this process and keeps the scores in its folder.

    They are ``evaluation_<split>.json`` and a line or two of summary.json.
    """
    found = _evaluated(run, data, split, start(device, threads), Team())
    assert found is not None
    return found


def _evaluated(run: Path, data: Path | None, split: str, machine: torch.device, team: Team) -> Evaluation | None:
    """Scores a network of any task; None in all processes but the first, which keeps the scores."""
    config = read_run_config(run)
    if isinstance(config, DetectionConfig):
        from picture3d.commands.score_detection import evaluate_detection

        found = evaluate_detection(run, config, data=data, split=split, device=machine, team=team)
    elif isinstance(config, OccupancyConfig):
        from picture3d.commands.score_occupancy import evaluate_occupancy

        found = evaluate_occupancy(run, config, data=data, split=split, device=machine, team=team)
    elif isinstance(config, SegmentationConfig):
        found = _evaluate_segmentation(run, config, data, split, machine, team)
    else:
        raise ConfigError(
            f"{run}: is a pre-training; evaluate scores fine-tuned networks. Use `picture3d probe` for an encoder."
        )
    if found is not None:
        folder = RunFolder(run)
        folder.write_json(f"evaluation_{split}.json", found.tree)
        folder.update_summary({f"{name}_{split}": value for name, value in found.summary.items()})
    return found


def _evaluate_segmentation(
    run: Path, config: SegmentationConfig, data: Path | None, split: str, machine: torch.device, team: Team
) -> Evaluation | None:
    task = build_segmentation(config, machine)
    load_into(task.module, load_weights(run).tensors)
    batches = scoring_batches(config.data, root=data, split=split)
    names = class_names(batches)

    def part(frames: Frames) -> Arrays:
        scores = evaluate_segmentation(task, (batch for _, batch in frames), names)
        return {"confusion": scores.confusion, "ignored": np.asarray(scores.num_ignored)}

    parts = log_by_log(batches, team, "evaluate", part)
    if not team.writes:
        return None
    scores = _joined(names, parts)
    tree = scores.to_json()
    return Evaluation(
        measure="mIoU",
        score=scores.miou,
        by_class=tree["iou"],
        tree=tree,
        table=table(f"{run}, split {split}", scores),
        summary={"miou": scores.miou},
    )


def _joined(names: tuple[str, ...], parts: list[Arrays]) -> SegmentationScores:
    matrix = ConfusionMatrix(names, ignored=IGNORED)
    for part in parts:
        matrix.add_counts(part["confusion"], int(part["ignored"]))
    return matrix.scores()


def class_names(batches: FrameBatches) -> tuple[str, ...]:
    """Names of the training classes of a dataset.

    Raises:
        DataError: if it was prepared without labels.
    """
    labels = batches.dataset.label_set
    if labels is None:
        raise DataError(
            f"{batches.dataset.root}: was prepared without labels, so nothing can be scored on it. Prepare it with its labels."
        )
    return labels.train_names


def counted(batches: FrameBatches, progress: Progress) -> Iterator[PointBatch]:
    """The batches of one pass, counted as they are taken."""
    for done, batch in enumerate(batches.epoch(0), start=1):
        yield batch
        progress(done, batches.steps_per_epoch)


def table(title: str, scores: SegmentationScores) -> str:
    """Plain text: IoU per class and the mean."""
    return "\n".join([title, *aligned([("class", "IoU %", "points", "predicted"), *scores.table_rows()])])


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table: a heading, a rule, and the rows; the first column begins, the others end below each other."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))) for r in rows
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]
