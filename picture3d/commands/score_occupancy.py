"""IoU and mIoU of occupancy: of a fine-tuned network (`evaluate`), and of predictions that any program wrote in the layout of
the label files (`score occupancy`).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from picture3d.commands.build import build_occupancy, scoring_batches
from picture3d.commands.by_log import Arrays, Frames, log_by_log
from picture3d.commands.score import Evaluation
from picture3d.datasets.label_sets import NUSCENES_16
from picture3d.datasets.occupancy_store import OccupancyStore
from picture3d.datasets.openoccupancy import NUSCENES_OCCUPANCY, label_files, label_folder
from picture3d.datasets.prepared import PreparedDataset
from picture3d.errors import DataError
from picture3d.evaluation.occupancy import OccupancyMatrix, OccupancyScores
from picture3d.formats.openoccupancy import read_openoccupancy
from picture3d.recipes.configs import OccupancyConfig
from picture3d.structures.batch import PointBatch
from picture3d.structures.occupancy import IGNORED, Occupancy
from picture3d.tasks.occupancy import labels_of
from picture3d.training.checkpoint import load_into, load_weights
from picture3d.training.distributed import Team
from picture3d.training.runlog import Progress

CLASS_NAMES = ("free", *NUSCENES_16.train_names[1:])


def evaluate_occupancy(
    run: Path, config: OccupancyConfig, *, data: Path | None, split: str, device: torch.device, team: Team
) -> Evaluation | None:
    """Scores an occupancy network on every labelled keyframe of a split.

    Of several processes the first has the scores, the others None.

    Raises:
        DataError: if no keyframe of the split is labelled, or labels lie on other cells than the network's.
    """
    task = build_occupancy(config, device)
    load_into(task.module, load_weights(run).tensors)
    batches = scoring_batches(config.data, root=data, split=split, labels=False)
    names = class_names(config.task.num_classes)

    def part(frames: Frames) -> Arrays:
        matrix = OccupancyMatrix(names)
        for key, batch in frames:
            labels_of(batch, config.task)  # refuses what cannot be scored, by the frame's name
            matrix.add(truth_of(batch), task.predict(batch.to(device))[0], where=f"{key.log}/{key.index}")
        return matrix.counts

    parts = log_by_log(batches, team, "evaluate", part)
    if not team.writes:
        return None
    matrix = OccupancyMatrix(names)
    for counts in parts:
        matrix.add_counts(counts)
    scores = matrix.scores()
    tree = scores.to_json()
    return Evaluation(
        measure="mIoU",
        score=scores.miou,
        by_class=tree["iou"],
        tree=tree,
        table=table(f"{run}, split {split}", scores),
        summary={"miou": scores.miou, "geometric_iou": scores.geometric_iou},
    )


def truth_of(batch: PointBatch) -> Occupancy:
    """The labels of a batch of one frame."""
    assert batch.occupancy_cell is not None
    assert batch.occupancy_class is not None
    assert batch.occupancy_grid is not None
    index = batch.occupancy_cell[:, 1:].cpu().numpy().astype(np.int16)
    return Occupancy(index, batch.occupancy_class.cpu().numpy(), batch.occupancy_grid)


def class_names(num_classes: int) -> tuple[str, ...]:
    """Names of the classes a network answers with, free space first."""
    if num_classes == len(CLASS_NAMES):
        return CLASS_NAMES
    return ("free", *(f"class_{index}" for index in range(1, num_classes)))


def score_occupancy(predictions: Path, labels: Path, *, split: str, as_json: bool) -> str:
    """Scores a folder ``scene_<token>/occupancy/<lidar token>.npy`` of predictions; returns a table, or JSON.

    Args:
        predictions: rows z, y, x, class of the occupied voxels; a voxel of class 0 or 255 is taken as free.
        labels: prepared frames with occupancy labels attached.
        split: which split of them; every labelled keyframe of it needs a prediction.
        as_json: JSON instead of the table.

    Raises:
        DataError: if a prediction is missing or cannot be read, or no keyframe of the split is labelled.
    """
    scores = run_scoring(predictions, PreparedDataset(labels), split)
    return json.dumps(scores.to_json()) if as_json else table(f"{predictions}, split {split}", scores)


def run_scoring(predictions: Path, dataset: PreparedDataset, split: str) -> OccupancyScores:
    """The scores, one frame in memory at a time. Errors as :func:`score_occupancy`."""
    store = OccupancyStore(dataset.root)
    root, scenes = label_folder(predictions)
    logs = dataset.logs(split)
    wanted = {log: store.labelled(log) for log in logs}
    total, done = sum(map(len, wanted.values())), 0
    if total == 0:
        raise DataError(
            f"{dataset.root}: no keyframe of split '{split}' has occupancy labels. Name another --split, or attach labels with "
            "`picture3d prepare occupancy`."
        )
    matrix = OccupancyMatrix(CLASS_NAMES)
    with Progress("score", unit="keyframes") as progress:
        for log, frames in wanted.items():
            files = {file.frame: file for file in label_files(root, scenes, dataset, log)[0]} if frames else {}
            missing = [dataset.reader(log).token(frame) for frame in frames if frame not in files]
            if missing:
                raise DataError(
                    f"{root}: {len(missing)} of the {len(frames)} labelled keyframes of log '{log}' have no prediction, the "
                    f"first is {missing[0]}.npy. Every labelled keyframe of the split is scored. Add the missing files: an "
                    "empty array where nothing was found."
                )
            for frame in frames:
                file = files[frame]
                truth = store.read(log, frame, file.token)
                found = read_openoccupancy(file.path)
                named = found.label != IGNORED
                prediction = Occupancy(found.index[named], found.label[named], NUSCENES_OCCUPANCY)
                assert truth is not None
                matrix.add(truth, prediction, where=str(file.path))
                done += 1
                progress(done, total)
    return matrix.scores()


def table(title: str, scores: OccupancyScores) -> str:
    """Plain text: IoU per class, the mean, the geometry."""
    rows = [("class", "IoU %", "voxels", "predicted"), *scores.table_rows()]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join([title, *lines, f"{scores.frames} keyframes, {scores.ignored:,} voxels of noise left out"])
