"""`evaluate`: what a fine-tuned network is worth, as a table, as JSON and in its run folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from picture3d.commands.build import build_segmentation, read_run_config, scoring_batches
from picture3d.commands.machine import start
from picture3d.datasets.loading import FrameBatches
from picture3d.errors import ConfigError, DataError
from picture3d.evaluation.segmentation import SegmentationScores
from picture3d.recipes.configs import DetectionConfig, SegmentationConfig
from picture3d.structures.batch import PointBatch
from picture3d.tasks.segmentation import evaluate_segmentation
from picture3d.training.checkpoint import load_into, load_weights
from picture3d.training.runlog import Progress, RunFolder


def evaluate(run: Path, *, data: Path | None, split: str, as_json: bool, device: str, threads: int) -> str:
    """Scores a fine-tuned network; returns the table, or JSON."""
    config = read_run_config(run)
    if isinstance(config, DetectionConfig):
        from picture3d.commands.score_detection import evaluate_detection

        machine = start(device, threads)
        return evaluate_detection(run, config, data=data, split=split, as_json=as_json, device=machine)
    scores = run_evaluation(run, data=data, split=split, device=device, threads=threads)
    return json.dumps(scores.to_json()) if as_json else table(f"{run}, split {split}", scores)


def run_evaluation(run: Path, *, data: Path | None, split: str, device: str, threads: int) -> SegmentationScores:
    """Scores a fine-tuned network and keeps the scores in its folder (``evaluation_<split>.json`` and summary.json)."""
    machine = start(device, threads)
    config = read_run_config(run)
    if not isinstance(config, SegmentationConfig):
        raise ConfigError(
            f"{run}: is a pre-training; evaluate scores fine-tuned networks. Use `picture3d probe` for an encoder."
        )
    task = build_segmentation(config, machine)
    load_into(task.module, load_weights(run).tensors)
    batches = scoring_batches(config.data, root=data, split=split)
    with Progress("evaluate") as progress:
        scores = evaluate_segmentation(task, counted(batches, progress), class_names(batches))
    folder = RunFolder(run)
    folder.write_json(f"evaluation_{split}.json", scores.to_json())
    folder.update_summary({f"miou_{split}": scores.miou})
    return scores


def class_names(batches: FrameBatches) -> tuple[str, ...]:
    """Names of the training classes of a dataset.

    Raises:
        DataError: if it was prepared without labels.
    """
    labels = batches.dataset.label_set
    if labels is None:
        raise DataError(f"{batches.dataset.root}: was prepared without labels, so nothing can be scored on it")
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
