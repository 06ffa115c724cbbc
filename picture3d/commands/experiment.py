"""`experiment label-efficiency`: the same fine-tuning from several encoders, at several shares of the labels, over seeds.

A cell is one fine-tuning: a method, a share, a seed. What is finished is not done again, what was interrupted goes on, and
methods, shares and seeds may be added later: the table grows. Everything that must be equal for cells to be comparable stands
in ``experiment.json``, and another value of it is refused.

    experiment.json   data, fine-tuning recipe and the settings changed in it and in pre-training
    cells/*.json      one row per finished cell; these are the result, the folders below only how it came about
    runs/             run folders: pretrain-<recipe>-seed<n>, then <method>-<share>-seed<n>
    results.json, table.md, curves.svg, report.html
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from picture3d.commands.build import training_batches
from picture3d.commands.experiment_page import KIND, MAX_BYTES, PROBED, SCRATCH, curves_svg, experiment_page, read_cells
from picture3d.commands.probe import probe
from picture3d.commands.score import run_evaluation
from picture3d.commands.train import run_finetuning, run_pretraining
from picture3d.datasets.prepared import PreparedDataset
from picture3d.errors import ConfigError, DataError
from picture3d.evaluation.label_efficiency import label_efficiency, markdown_table
from picture3d.files import read_json_object, sole_writer, write_json, write_text
from picture3d.recipes.catalogue import TaskConfig, finetuning_recipe, pretraining_recipe
from picture3d.recipes.configs import GridConfig, PretrainConfig
from picture3d.training.runlog import RunFolder, duration
from picture3d.view.report import render_report


@dataclass(frozen=True, slots=True)
class Plan:
    """What is compared, and what all cells have in common."""

    data: Path
    methods: tuple[str, ...]  # "scratch", or the name of a pre-training recipe
    shares: tuple[float, ...]
    seeds: tuple[int, ...]
    finetuning: str = "town-segmentation"
    pretrain_set: tuple[str, ...] = ()
    finetune_set: tuple[str, ...] = ()
    split: str = "val"
    probe_share: float | None = None  # also probe each frozen encoder, learning from this share of the labelled scenes
    encoders: int | None = None  # pre-train so many of a method, for cells of several seeds; None: one for each seed

    def common(self) -> dict[str, Any]:
        """What every cell of a folder must agree in. The data is known by what it holds, so that another machine may go on."""
        data = PreparedDataset(self.data)
        return {
            "kind": KIND,
            "data": {
                "name": data.name,
                "keyframes": {split: len(data.keyframes(split)) for split in data.splits},
                "points": sum(data.summary(log).points for log in data.logs()),
            },
            "finetuning": self.finetuning,
            "pretrain_set": list(self.pretrain_set),
            "finetune_set": list(self.finetune_set),
            "split": self.split,
        }

    def encoder_seed(self, seed: int) -> int:
        """The seed of the pre-training that a cell begins from: with 3 encoders, cells 0, 3 and 6 share the first one."""
        return seed if self.encoders is None else seed % self.encoders

    def pretraining(self, method: str, seed: int) -> PretrainConfig:
        """The pre-training of a method, its first weights and masks drawn from `seed`."""
        return pretraining_recipe(method, self.data).with_overrides([*self.pretrain_set, f"training.seed={seed}"])

    def tuning(self, share: float, seed: int, encoder: Path | None) -> TaskConfig:
        """The fine-tuning of a cell; the labelled scenes are drawn from `seed`, smaller shares within larger ones."""
        changed = [f"data.label_share={share}", f"data.label_seed={seed}", f"training.seed={seed}"]
        config = finetuning_recipe(self.finetuning, self.data).with_overrides([*self.finetune_set, *changed])
        return config.model_copy(update={"pretrained": encoder})


def label_efficiency_experiment(plan: Plan, out: Path, *, device: str, threads: int, as_json: bool) -> str:
    """Does the cells that are missing; returns the table of all that are there, or JSON.

    Raises:
        ConfigError: if a method has another backbone than the fine-tuning, the folder holds another experiment, or a share,
            seed or method is named twice or cannot be.
        DataError: if the scored split has no labels, or a finished row cannot be read.
    """
    _check(plan)
    with sole_writer(out):
        path = out / "experiment.json"
        if path.is_file():
            _check_same(path, plan)
        else:
            write_json(path, plan.common())
        for seed in plan.seeds:
            for method in plan.methods:
                missing = [share for share in plan.shares if not _row_path(out, method, share, seed).is_file()]
                if missing:
                    _do_cells(plan, out, method, seed, missing, device, threads)
        methods, cells = read_cells(out, plan.methods)
        rows = label_efficiency([cell for cell, _ in cells], methods)
        tree = {**plan.common(), "rows": [row.to_json() for row in rows], "cells": [row for _, row in cells]}
        write_json(out / "results.json", tree)
        page = experiment_page(out, methods)
        assert page.experiment is not None
        table = markdown_table(rows, measure=page.experiment.measure)
        write_text(out / "table.md", table + "\n")
        write_text(out / "curves.svg", curves_svg(page.experiment) + "\n")
        render_report(page, out / "report.html")
    if as_json:
        return json.dumps(tree)
    # One pre-training for all shares and for all cells that share an encoder.
    pretraining = {
        (cell.method, row.get("encoder_seed", cell.seed)): row["seconds"].get("pretrain", 0.0) for cell, row in cells
    }
    seconds = sum(pretraining.values()) + sum(row["seconds"]["finetune"] for _, row in cells)
    return f"{table}\n\n{len(cells)} cells, {duration(seconds)} of training; report: {out / 'report.html'}"


def _do_cells(plan: Plan, out: Path, method: str, seed: int, shares: Sequence[float], device: str, threads: int) -> None:
    encoder, seconds, extra = None, {}, {}
    if method != SCRATCH:
        first = plan.encoder_seed(seed)
        encoder = out / "runs" / f"pretrain-{method}-seed{first}"
        done = run_pretraining(plan.pretraining(method, first), encoder, True, device, threads)
        seconds["pretrain"], extra["encoder_seed"] = round(done.seconds, 1), first
        if plan.probe_share is not None:
            extra |= _probed(plan, encoder, plan.probe_share, first, device, threads)
    for share in shares:
        config = plan.tuning(share, seed, encoder)
        folder = out / "runs" / f"{method}-{share:g}-seed{seed}"
        done = run_finetuning(config, folder, True, device, threads)
        scores = run_evaluation(folder, data=None, split=plan.split, device=device, threads=threads)
        if scores.score is None:
            raise DataError(
                f"{plan.data}: split '{plan.split}' has no label to score on. Name another with --split, or prepare it with "
                "its labels."
            )
        row = {
            "method": method,
            "share": share,
            "seed": seed,
            "measure": scores.measure,
            "score": scores.score,
            "by_class": dict(scores.by_class),
            "labelled_frames": len(training_batches(config, None).keys),
            "steps": done.steps,
            "seconds": {**seconds, "finetune": round(done.seconds, 1)},
            "environment": read_json_object(RunFolder(folder).environment_path, max_bytes=MAX_BYTES),
            **extra,
        }
        write_json(_row_path(out, method, share, seed), row)


def _probed(plan: Plan, run: Path, share: float, seed: int, device: str, threads: int) -> dict[str, Any]:
    """What a row says of its frozen encoder, looked at now if it was not yet."""
    path = run / "probe.json"
    found = read_json_object(path, max_bytes=MAX_BYTES) if path.is_file() else {}
    if (found.get("label_share"), found.get("seed")) != (share, seed):
        settings: dict[str, Any] = {
            "label_share": share,
            "seed": seed,
            "split": plan.split,
            "device": device,
            "threads": threads,
        }
        probe(run, data=plan.data, as_json=True, **settings)
    summary = RunFolder(run).summary()
    return {"probe_share": share, **{name: summary[name] for name in PROBED}}


def _row_path(out: Path, method: str, share: float, seed: int) -> Path:
    return out / "cells" / f"{method}_{share:g}_{seed}.json"


def _check(plan: Plan) -> None:
    if plan.encoders is not None and plan.encoders < 1:
        raise ConfigError(f"--encoders {plan.encoders}: pre-train at least one, or leave the option out for one per seed")
    for name, values in (("methods", plan.methods), ("shares", plan.shares), ("seeds", plan.seeds)):
        if not values or len(set(values)) != len(values):
            raise ConfigError(f"--{name}: name at least one, and none twice; got {', '.join(map(str, values)) or 'none'}")
    tuning = plan.tuning(plan.shares[0], plan.seeds[0], None)
    for share in plan.shares[1:]:
        plan.tuning(share, plan.seeds[0], None)
    for method in plan.methods:
        if method == SCRATCH:
            continue
        config = plan.pretraining(method, plan.seeds[0])
        pairs = {
            "encoder": (config.encoder, tuning.encoder),
            "grid": (_cells(config.grid), _cells(tuning.grid)),
            "data.features": (config.data.features, tuning.data.features),
            "data.intensity_scale": (config.data.intensity_scale, tuning.data.intensity_scale),
        }
        different = [name for name, (there, here) in pairs.items() if there != here]
        if different:
            raise ConfigError(
                f"{method} and {plan.finetuning} differ in {', '.join(different)}: their backbones cannot be compared. Choose "
                f"recipes for one encoder, or set the same values with --pretrain-set and --finetune-set."
            )


def _cells(grid: GridConfig) -> object:
    """What an encoder knows of a grid: the size of its cells, unless they lie around the sensor; not how far it reaches."""
    return grid if grid.cylinder else (grid.voxel_size, grid.pillars)


def _check_same(path: Path, plan: Plan) -> None:
    found, wanted = read_json_object(path, max_bytes=MAX_BYTES), plan.common()
    different = [key for key in wanted if found.get(key) != wanted[key]]
    if different:
        said = "; ".join(f"{key} is {found.get(key)!r} there, {wanted[key]!r} now" for key in different)
        raise ConfigError(f"{path}: holds another experiment: {said}. Use the same settings, or another --out.")
