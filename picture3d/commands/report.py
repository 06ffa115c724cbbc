"""`report`: gathers what run folders hold, looks at a few sweeps with their networks, and writes one page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from picture3d.commands.build import build_picture, build_segmentation, build_targets, read_run_config
from picture3d.commands.compare import read_comparison
from picture3d.commands.experiment_page import experiment_page, is_experiment
from picture3d.commands.machine import start
from picture3d.datasets.loading import collate
from picture3d.datasets.prepared import FrameKey, PreparedDataset
from picture3d.datasets.samples import load_sample
from picture3d.errors import DataError
from picture3d.files import read_json_object
from picture3d.ops.voxelize import assign_voxels
from picture3d.pretrain.losses import LossConfig
from picture3d.pretrain.picture import PretrainTask
from picture3d.recipes.catalogue import RunConfig
from picture3d.recipes.configs import DetectionConfig, OccupancyConfig, PretrainConfig, SegmentationConfig
from picture3d.structures.batch import PointBatch
from picture3d.tasks.segmentation import SegmentationTask
from picture3d.training.checkpoint import load_into, load_weights
from picture3d.training.runlog import RunFolder
from picture3d.view.colors import Colors, pca_colors
from picture3d.view.heat_map import HeatMap
from picture3d.view.report import render_report
from picture3d.view.report_data import CurveGroup, ReportData, RunScores, SceneView, Step, curves_from_records

# Points beyond this distance are dust on the pictures.
_VIEW_RADIUS_M = 50.0
_SCENES = 2
_MAX_JSON_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class Run:
    """A run folder with its config."""

    name: str
    folder: RunFolder
    config: RunConfig


def report(folder: Path, *, data: Path | None, out: Path | None, device: str, threads: int) -> str:
    """Writes the page of a folder of runs, or of an experiment; returns where it is."""
    if is_experiment(folder):
        return f"report: {render_report(experiment_page(folder), out or folder / 'report.html')}"
    page = write_report(folder, data=data, out=out, device=device, threads=threads)
    return f"report: {page}"


def write_report(
    folder: Path,
    *,
    data: Path | None = None,
    out: Path | None = None,
    device: str = "auto",
    threads: int = 0,
    title: str = "PICTURE, from raw sweeps to scores",
    summary: str = "",
    steps: tuple[Step, ...] = (),
    notes: tuple[str, ...] = (),
) -> Path:
    """Gathers, looks and writes; see `report`."""
    machine = start(device, threads)
    runs = find_runs(folder)
    root = data or runs[0].config.data.root
    page = ReportData(
        title=title,
        summary=summary or _default_summary(runs),
        scores=_scores(runs),
        scenes=scenes(runs, root, machine),
        curves=_curves(runs),
        comparisons=comparisons(folder),
        steps=steps or _steps(runs),
        notes=notes,
        environment=_environment(runs),
        configs={run.name: run.folder.config_tree() for run in runs},
        class_names=class_names(root),
    )
    return render_report(page, out or folder / "report.html")


def find_runs(folder: Path) -> list[Run]:
    """Run folders in `folder` or in ``folder/runs``: pre-trainings first, of each kind those from scratch first, then by
    name: an order that no clock and no copying changes.

    Raises:
        DataError: if there is none.
    """
    places = [folder, *sorted(folder.glob("*")), *sorted((folder / "runs").glob("*"))]
    found = [place for place in places if (place / "config.json").is_file() and (place / "metrics.jsonl").is_file()]
    if not found:
        raise DataError(
            f"{folder}: holds no run folder (config.json and metrics.jsonl), neither in itself nor in runs/. Name the folder "
            "of a run, or one whose runs/ holds runs."
        )
    runs = [Run(place.name, RunFolder(place), read_run_config(place)) for place in found]
    return sorted(runs, key=lambda run: (run.config.kind != "pretrain", _start(run.config) is not None, run.name))


def _start(config: RunConfig) -> Path | None:
    """The run that a fine-tuning begins with."""
    return None if isinstance(config, PretrainConfig) else config.pretrained


def comparisons(folder: Path) -> list[HeatMap]:
    """Heat maps of what `compare --out` left in `folder` or in ``folder/runs``.

    Raises:
        DataError: if such a file is damaged.
    """
    return [
        read_comparison(path).heat_map() for place in (folder, folder / "runs") for path in sorted(place.glob("compare_*.json"))
    ]


def _default_summary(runs: list[Run]) -> str:
    pretrained = [run.name for run in runs if isinstance(run.config, PretrainConfig)]
    tuned = [run.name for run in runs if not isinstance(run.config, PretrainConfig)]
    return (
        f"{len(pretrained)} pre-training runs ({', '.join(pretrained)}) and {len(tuned)} fine-tuning runs ({', '.join(tuned)})."
    )


def _scores(runs: list[Run]) -> dict[str, RunScores]:
    scores = {}
    for run in runs:
        path = run.folder.path / "evaluation_val.json"
        if isinstance(run.config, SegmentationConfig) and path.is_file():
            start_from = run.config.pretrained
            detail = "from scratch" if start_from is None else _pretrained_on(runs, start_from)
            try:
                scores[_short(run.name)] = RunScores.from_tree(read_json_object(path, max_bytes=_MAX_JSON_BYTES), detail=detail)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise DataError(
                    f"{path}: not the scores of an evaluation ({error!r}). Run `picture3d evaluate {run.folder.path}` again."
                ) from None
    return scores


def _pretrained_on(runs: list[Run], source: Path) -> str:
    for run in runs:
        if run.folder.path.resolve() == source.resolve() and isinstance(run.config, PretrainConfig):
            return f"pre-trained on {taught(run.config.loss)}"
    return f"encoder of {source.name}"


def taught(loss: LossConfig) -> str:
    """What a pre-training asks of its encoder, in words."""
    hidden, visible = loss.features_weight > 0, loss.visible_features_weight > 0
    features = {
        (True, True): "teacher features, of visible voxels too",
        (True, False): "teacher features",
        (False, True): "teacher features of visible voxels",
    }
    parts = ["points"] if loss.coordinates_weight > 0 else []
    return " and ".join([*parts, *([features[hidden, visible]] if hidden or visible else [])])


def _short(name: str) -> str:
    return name.removeprefix("segment-")


def _curves(runs: list[Run]) -> list[CurveGroup]:
    groups = []
    for title, kind in _CURVES:
        chosen = [run for run in runs if isinstance(run.config, kind)]
        curves = {_short(run.name): curves_from_records([_flat(record) for record in run.folder.metrics()]) for run in chosen}
        if curves:
            groups.append(CurveGroup(title, curves))
    return groups


_CURVES = (
    ("Pre-training", PretrainConfig),
    ("Fine-tuning", SegmentationConfig),
    ("Fine-tuning of detectors", DetectionConfig),
    ("Fine-tuning of occupancy", OccupancyConfig),
)
_TERMS = (
    "total",
    "coordinates",
    "features",
    "visible_features",
    "hidden_share",
    "cross_entropy",
    "semantic",
    "geometric",
    "lovasz",
    "accuracy",
)
_DETECTION_TERMS = ("heatmap", "regression", "iou", "iou_regression", "classification", "box")


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    losses = record.get("losses", {})
    return {"step": record["step"], **{name: losses[name] for name in (*_TERMS, *_DETECTION_TERMS) if name in losses}}


def _steps(runs: list[Run]) -> tuple[Step, ...]:
    return tuple(Step(run.name, "", run.folder.summary().get("seconds")) for run in runs)


def _environment(runs: list[Run]) -> dict[str, Any]:
    path = runs[0].folder.environment_path
    return read_json_object(path, max_bytes=_MAX_JSON_BYTES) if path.is_file() else {}


def class_names(root: Path) -> tuple[str, ...]:
    """Names of the training classes of a prepared dataset; only the ignored one where it has no labels."""
    labels = PreparedDataset(root).label_set
    return labels.train_names if labels is not None else ("ignored",)


# Looking at sweeps --------------------------------------------------------------------------------------------------------


def scenes(runs: list[Run], root: Path, device: torch.device) -> list[SceneView]:
    """A few keyframes, of the validation split if there is one, as the networks see them."""
    dataset = PreparedDataset(root)
    split = "val" if "val" in dataset.splits and dataset.keyframes("val") else None
    keys = dataset.keyframes(split)
    logs = list(dict.fromkeys(key.log for key in keys))[:_SCENES]
    chosen = [[key for key in keys if key.log == log] for log in logs]
    return [_scene(runs, dataset, frames[len(frames) // 2], device) for frames in chosen]


def _scene(runs: list[Run], dataset: PreparedDataset, key: FrameKey, device: torch.device) -> SceneView:
    frame = dataset.reader(key.log).frame(key.index)
    xyz = frame.points.xyz
    near = np.abs(xyz[:, :2]).max(1) < _VIEW_RADIUS_M
    values: dict[str, Any] = {"predictions": {}, "encoder_colors": {}}
    if frame.labels is not None and dataset.label_set is not None:
        values["labels"] = dataset.label_set.to_train(frame.labels)[near]
    for run in runs:
        if not run.folder.finished:
            continue
        if isinstance(run.config, PretrainConfig):
            _look_at_pretraining(run, run.config, dataset, key, near, device, values)
        elif isinstance(run.config, SegmentationConfig):
            task = build_segmentation(run.config, device)
            load_into(task.module, load_weights(run.folder.path).tensors)
            values["predictions"][_short(run.name)] = _predicted(task, run.config, dataset, key)[near]
    values["heading_deg"] = math.degrees(frame.ego_from_lidar.inverse().yaw)
    return SceneView(name=f"{key.log}, sweep {key.index}", xyz=xyz[near], intensity=frame.points.intensity[near], **values)


def _predicted(
    task: SegmentationTask, config: SegmentationConfig, dataset: PreparedDataset, key: FrameKey
) -> NDArray[np.int64]:
    whole = config.data.model_copy(update={"range_min": None, "range_max": None, "augment": None})
    batch = collate([load_sample(dataset, key, whole, None)])
    device = next(task.module.parameters()).device
    # The keyframe's own points come first, whatever sweeps are merged behind them.
    return task.predict(batch.to(device)).cpu().numpy()[: len(dataset.reader(key.log).frame(key.index).points)]


def _look_at_pretraining(
    run: Run,
    config: PretrainConfig,
    dataset: PreparedDataset,
    key: FrameKey,
    near: NDArray[np.bool_],
    device: torch.device,
    values: dict[str, Any],
) -> None:
    task = build_picture(config, device)
    load_into(task.module, load_weights(run.folder.path).tensors)
    source = build_targets(config.targets, dataset.root, device)
    whole = config.data.model_copy(update={"range_min": None, "range_max": None, "augment": None, "sweeps": 1})
    batch = collate([load_sample(dataset, key, whole, None, targets=source)]).to(device)
    values["encoder_colors"][run.name] = _encoder_colors(task, batch)[near]
    if batch.cell_features is not None and batch.point_cell is not None and "teacher_colors" not in values:
        cell = batch.point_cell.clamp(min=0)
        values["teacher_colors"] = _colors(batch.cell_features[cell])[near]
        if batch.cell_superclass is not None:
            values["superclass"] = torch.where(batch.point_cell >= 0, batch.cell_superclass[cell], -1).cpu().numpy()[near]
    if config.loss.coordinates_weight > 0:
        values.update(_reconstruction(task, batch, near))


def _reconstruction(task: PretrainTask, batch: PointBatch, near: NDArray[np.bool_]) -> dict[str, Any]:
    generator = torch.Generator(batch.xyz.device).manual_seed(0)
    seen = task.reconstruct(batch, generator)
    module = task.module
    assignment = assign_voxels(batch.xyz, batch.sample, 1, module.grid, per_pillar=module.vfe.pillars)
    hidden = torch.zeros(len(batch.xyz), dtype=torch.bool, device=batch.xyz.device)
    hidden[assignment.point_index] = seen.hidden[assignment.voxel_of_point]
    found: dict[str, Any] = {"hidden": hidden.cpu().numpy()[near]}
    if seen.predicted_points_m is not None:
        points = seen.predicted_points_m.reshape(-1, 3).cpu().numpy()
        # As many as were hidden, so that both pictures are equally dense.
        wanted = min(len(points), max(1, int(hidden.sum())))
        rows = np.linspace(0, max(len(points) - 1, 0), wanted).round().astype(int) if len(points) else []
        found["rebuilt_m"] = points[rows][np.abs(points[rows][:, :2]).max(1) < _VIEW_RADIUS_M] if len(points) else points
    return found


def _encoder_colors(task: PretrainTask, batch: PointBatch) -> Colors:
    module = task.module.eval()
    with torch.no_grad():
        voxels = module.features(batch)
    assignment = assign_voxels(batch.xyz, batch.sample, 1, module.grid, per_pillar=module.vfe.pillars)
    colors = np.full((len(batch.xyz), 3), 90, np.uint8)
    by_voxel = _colors(voxels.feats)
    colors[assignment.point_index.cpu().numpy()] = by_voxel[assignment.voxel_of_point.cpu().numpy()]
    return colors


def _colors(features: torch.Tensor) -> Colors:
    return pca_colors(features.float().cpu().numpy())
