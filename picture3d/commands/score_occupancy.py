"""`score occupancy`: IoU and mIoU of occupancy predictions that any program wrote in the layout of the label files."""

from __future__ import annotations

import json
from pathlib import Path

from picture3d.datasets.label_sets import NUSCENES_16
from picture3d.datasets.occupancy_store import OccupancyStore
from picture3d.datasets.openoccupancy import NUSCENES_OCCUPANCY, label_files, label_folder
from picture3d.datasets.prepared import PreparedDataset
from picture3d.errors import DataError
from picture3d.evaluation.occupancy import OccupancyMatrix, OccupancyScores
from picture3d.formats.openoccupancy import read_openoccupancy
from picture3d.structures.occupancy import IGNORED, Occupancy
from picture3d.training.runlog import Progress

CLASS_NAMES = ("free", *NUSCENES_16.train_names[1:])


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
