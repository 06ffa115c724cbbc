"""`pretrain`, `finetune`, and the list of recipes."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Literal

import torch

from picture3d.commands.build import build_picture, build_task, build_training_targets, training_batches
from picture3d.commands.machine import start
from picture3d.config import read_config_tree
from picture3d.datasets.loading import FrameBatches
from picture3d.errors import ConfigError
from picture3d.files import sole_writer
from picture3d.recipes.catalogue import (
    DETECTION,
    OCCUPANCY,
    PRETRAINING,
    SEGMENTATION,
    RunConfig,
    TaskConfig,
    any_recipe,
    detection_recipe,
    occupancy_recipe,
    pretraining_recipe,
    segmentation_recipe,
)
from picture3d.recipes.configs import DetectionConfig, OccupancyConfig, PretrainConfig, SegmentationConfig
from picture3d.tasks.encoder import load_encoder
from picture3d.training.distributed import Team, joined_team, launched_place
from picture3d.training.loop import FitResult, fit
from picture3d.training.runlog import RunFolder, duration

FinetuneTask = Literal["segmentation", "detection", "occupancy"]


def pretrain(
    out: Path,
    *,
    data: Path | None,
    recipe: str,
    config: Path | None,
    overrides: list[str],
    resume: bool,
    max_steps: int | None,
    device: str,
    threads: int,
) -> str:
    """Pre-trains in the run folder `out`; returns what to tell the user."""
    wanted = list(overrides) + ([f"training.max_steps={max_steps}"] if max_steps is not None else [])
    return _told(out, run_pretraining(_pretrain_config(recipe, config, data, wanted), out, resume, device, threads))


def run_pretraining(config: PretrainConfig, out: Path, resume: bool, device: str, threads: int) -> FitResult:
    """Pre-trains by a resolved config."""
    place = launched_place()
    machine = start(device, threads or config.training.threads, place)
    with joined_team(machine, place=place) as team, _writing(out, team):
        return _pretrain(config, out, resume, machine, team)


def _writing(out: Path, team: Team) -> contextlib.AbstractContextManager[None]:
    """The first process of a job writes for all."""
    return sole_writer(out) if team.writes else contextlib.nullcontext()


def _pretrain(config: PretrainConfig, out: Path, resume: bool, machine: torch.device, team: Team) -> FitResult:
    targets = build_training_targets(config.targets, config.data, machine)
    batches = training_batches(config, targets, team.place)
    task = build_picture(config, machine, epoch_batches=batches.steps_per_epoch)
    run = _claimed(out, config, team)
    _log_selection(run, batches)
    return fit(task, batches, config.training, run, resume=resume, team=team)


def _log_selection(run: RunFolder, batches: FrameBatches) -> None:
    """What the run sees of its datasets, so that nobody has to guess what "20 %" meant."""
    for source in batches.sources:
        run.log(f"data: {source.selection}")


def _claimed(out: Path, config: RunConfig, team: Team) -> RunFolder:
    run = RunFolder(out)
    run.writes = team.writes

    def claim() -> str:
        run.claim(config)
        return ""

    team.first_does("claiming the run folder", claim)
    run.claimed = True
    return run


def finetune(
    out: Path,
    *,
    task: FinetuneTask,
    data: Path | None,
    recipe: str,
    encoder: Path | None,
    label_share: float | None,
    allow_partial: bool,
    config: Path | None,
    overrides: list[str],
    resume: bool,
    device: str,
    threads: int,
) -> str:
    """Fine-tunes in the run folder `out`; returns what to tell the user."""
    wanted = list(overrides) + ([f"data.label_share={label_share}"] if label_share is not None else [])
    settings = _finetune_config(task, recipe, config, data, wanted)
    if encoder is not None or allow_partial:
        updates = {"pretrained": encoder or settings.pretrained, "allow_partial": allow_partial or settings.allow_partial}
        settings = settings.model_copy(update=updates)
    return _told(out, run_finetuning(settings, out, resume, device, threads))


def run_finetuning(config: TaskConfig, out: Path, resume: bool, device: str, threads: int) -> FitResult:
    """Fine-tunes by a resolved config."""
    place = launched_place()
    machine = start(device, threads or config.training.threads, place)
    with joined_team(machine, place=place) as team, _writing(out, team):
        return _finetune(config, out, resume, machine, team)


def _finetune(config: TaskConfig, out: Path, resume: bool, machine: torch.device, team: Team) -> FitResult:
    batches = training_batches(config, None, team.place)
    task = build_task(config, machine)
    report = None
    if config.pretrained is not None:
        inputs = config.data.model_dump(mode="json", include={"features", "intensity_scale"})
        report = load_encoder(task.module, config.pretrained, allow_partial=config.allow_partial, inputs=inputs)
    run = _claimed(out, config, team)
    run.log(f"encoder from {config.pretrained}: {report.summary()}" if report else "encoder from scratch")
    _log_selection(run, batches)
    return fit(task, batches, config.training, run, resume=resume, team=team)


def tensorboard(run: Path, out: Path | None) -> str:
    """Replays the metrics of a run folder into TensorBoard's event files; returns what to tell the user.

    Raises:
        ConfigError: if TensorBoard is not installed, or the folder holds no metrics.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError("TensorBoard is not installed. Install it: pip install 'picture3d[track]'") from None
    records = list(RunFolder(run).metrics())
    if not records:
        raise ConfigError(f"{run}: holds no metrics.jsonl with numbers; name a run folder")
    folder = out or run / "tensorboard"
    with SummaryWriter(str(folder)) as writer:
        for record in records:
            for name, value in {**record.get("losses", {}), "lr": record.get("lr")}.items():
                if value is not None:
                    writer.add_scalar(name, value, record["step"])
    return f"{folder}: {len(records)} steps. Look at them with: tensorboard --logdir {folder}"


def describe_recipes(name: str | None) -> str:
    """The list of recipes, or one of them as JSON."""
    data = Path("prepared")
    if name is None:
        lines = []
        kinds = {
            "pre-training": PRETRAINING,
            "segmentation": SEGMENTATION,
            "detection": DETECTION,
            "occupancy": OCCUPANCY,
        }
        for title, recipes in kinds.items():
            lines.append(f"{title}:")
            lines += [f"  {key:32s}{(make.__doc__ or '').splitlines()[0]}" for key, make in recipes.items()]
        return "\n".join(lines)
    return json.dumps(any_recipe(name, data).model_dump(mode="json"), indent=2)


def _pretrain_config(recipe: str, saved: Path | None, data: Path | None, overrides: list[str]) -> PretrainConfig:
    if saved is not None:
        base = PretrainConfig.from_tree(read_config_tree(saved), source=str(saved))
        if data is not None:
            base = base.model_copy(update={"data": base.data.model_copy(update={"root": data})})
    else:
        base = pretraining_recipe(recipe, _required(data))
    return base.with_overrides(overrides)


def _finetune_config(
    task: FinetuneTask, recipe: str, saved: Path | None, data: Path | None, overrides: list[str]
) -> TaskConfig:
    if saved is not None:
        kinds: dict[str, type[TaskConfig]] = {
            "segmentation": SegmentationConfig,
            "detection": DetectionConfig,
            "occupancy": OccupancyConfig,
        }
        base = kinds[task].from_tree(read_config_tree(saved), source=str(saved))
        if data is not None:
            base = base.model_copy(update={"data": base.data.model_copy(update={"root": data})})
    else:
        found = {"segmentation": segmentation_recipe, "detection": detection_recipe, "occupancy": occupancy_recipe}
        base = found[task](recipe, _required(data))
    return base.with_overrides(overrides)


def _required(data: Path | None) -> Path:
    if data is None:
        raise ConfigError(
            "it is not said which prepared frames to use. Name them with --data FOLDER (`picture3d prepare` makes one)"
        )
    return data


def _told(out: Path, result: FitResult) -> str:
    losses = ", ".join(f"{name} {value:.4g}" for name, value in result.losses.items())
    done = "was already finished" if result.already_finished else "finished"
    return f"{out}: {done} after {result.steps} steps, {duration(result.seconds)}. Last losses: {losses}"
