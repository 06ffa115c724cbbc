"""`probe`: what a frozen encoder, or the teacher it learnt from, already knows; as a table, as JSON and in the run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from picture3d.commands.build import build_targets, read_run_config, scoring_batches
from picture3d.commands.machine import start
from picture3d.commands.score import aligned, class_names, counted
from picture3d.datasets.loading import FrameBatches
from picture3d.errors import ConfigError
from picture3d.evaluation.segmentation import SegmentationScores
from picture3d.recipes.catalogue import RunConfig
from picture3d.recipes.configs import PretrainConfig
from picture3d.structures.targets import FeatureSource
from picture3d.tasks.encoder import JoinedEncoder, load_encoder
from picture3d.tasks.probe import FeatureEncoder, ProbeScores, TeacherVoxels, evaluate_probe, fit_probe
from picture3d.tasks.readouts import FeatureRank, ProbeConfig
from picture3d.training.runlog import Progress, RunFolder


def probe(
    run: Path,
    *,
    data: Path | None,
    label_share: float,
    seed: int,
    as_json: bool,
    device: str,
    threads: int,
    split: str = "val",
    neighbours: int = 20,
    teacher: bool = False,
) -> str:
    """Reads frozen features out and scores what comes of it; returns a table, or JSON.

    It is kept in the run folder (``probe.json`` and summary.json; of a teacher, ``probe_teacher.json``).

    Args:
        run: run folder of a training; its config says what voxels are and how frames become input.
        data: prepared frames to look at; None: those the run was trained on.
        label_share: share of the labelled scenes to learn from.
        seed: of the sampled voxels.
        as_json: JSON instead of a table.
        device: where to compute.
        threads: CPU threads.
        split: what is scored.
        neighbours: how many nearest voxels vote; 0: no such classifier.
        teacher: look at the teacher of a pre-training, on the voxels of its encoder, instead of the encoder.

    Raises:
        ConfigError: if a teacher is asked for that can be seen by itself nowhere.
        DataError: if there are no labels, or the teacher's features were not stored.
    """
    machine = start(device, threads)
    config = read_run_config(run)
    share = config.data.with_overrides([f"label_share={label_share}"])  # checked, as a copy's values are not
    root = data or config.data.root
    encoder, targets = _teacher(run, config, root, machine) if teacher else (_encoder(run, config, machine), None)
    train = FrameBatches(
        share.model_copy(update={"root": root, "also": (), "labels": True, "augment": None}),
        batch_size=1,
        seed=seed,
        train=False,
        targets=targets,
    )
    test = scoring_batches(config.data, root=data, split=split, targets=targets)
    with Progress("probe: features") as progress:
        fitted = fit_probe(encoder, counted(train, progress), ProbeConfig(seed=seed, neighbours=neighbours))
    with Progress("probe: scores") as progress:
        scores = evaluate_probe(fitted, counted(test, progress), class_names(test))
    tree = _tree(scores, fitted.rank, neighbours)
    folder, end = RunFolder(run), "_teacher" if teacher else ""
    folder.write_json(f"probe{end}.json", {"label_share": label_share, "seed": seed, **tree})
    found = {"probe": scores.linear, "knn": scores.neighbours}
    summary = {f"{name}{end}_miou": score.miou for name, score in found.items() if score is not None}
    folder.update_summary({**summary, f"rank{end}": fitted.rank.overall})
    if as_json:
        return json.dumps(tree)
    what = f"the teacher of {run}" if teacher else f"{run}, frozen"
    return _table(f"probe of {what}, split {split}", scores, fitted.rank)


def _encoder(run: Path, config: RunConfig, device: torch.device) -> FeatureEncoder:
    encoder = JoinedEncoder(config.grid.grid, config.in_features, config.encoder, pillars=config.grid.pillars).to(device)
    load_encoder(encoder, run)
    return encoder


def _teacher(run: Path, config: RunConfig, root: Path, device: torch.device) -> tuple[FeatureEncoder, FeatureSource]:
    if not isinstance(config, PretrainConfig):
        raise ConfigError(f"{run}: is no pre-training, so it has no teacher; leave --teacher out to probe its encoder")
    source = build_targets(config.targets, root, device)
    if source is None:
        raise ConfigError(
            f"{run}: had no teacher whose features could be looked at (targets.mode={config.targets.mode}); leave --teacher "
            "out to probe its encoder"
        )
    return TeacherVoxels(config.grid.grid, pillars=config.grid.pillars), source


def _tree(scores: ProbeScores, rank: FeatureRank, neighbours: int) -> dict[str, Any]:
    """The linear probe's scores at the top, as ever; the rest below names of its own."""
    names = scores.linear.class_names
    tree = scores.linear.to_json()
    if scores.neighbours is not None:
        tree["knn"] = {"neighbours": neighbours, **scores.neighbours.to_json()}
    by_class = {names[c]: value for c, value in rank.by_class.items()}
    return {**tree, "effective_rank": {"columns": rank.columns, "overall": rank.overall, "by_class": by_class}}


def _table(title: str, scores: ProbeScores, rank: FeatureRank) -> str:
    linear, near = scores.linear, scores.neighbours
    rows = [("class", "linear IoU %", "kNN IoU %", "rank", "points")]
    for number, name in enumerate(linear.class_names):
        if number > 0:
            within = rank.by_class.get(number)
            counted_points = f"{int(linear.confusion[number].sum()):,}"
            rows.append((name, _iou(linear, number), _iou(near, number), _number(within), counted_points))
    rows.append(("mean IoU, rank of all", _percent(linear), _percent(near), _number(rank.overall), f"{linear.num_points:,}"))
    note = f"rank: effective rank of the features ({rank.columns} columns), within a class and of all labelled voxels"
    return "\n".join([title, *aligned(rows), note])


def _iou(scores: SegmentationScores | None, number: int) -> str:
    if scores is None:
        return "-"
    value = scores.iou[number]
    return "absent" if value is None else f"{100 * value:.2f}"


def _percent(scores: SegmentationScores | None) -> str:
    return "-" if scores is None or scores.miou is None else f"{100 * scores.miou:.2f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
