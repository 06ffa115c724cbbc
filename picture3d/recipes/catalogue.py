"""All recipes by the name they have on the command line, and the way to shrink any of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from picture3d.config import nearest
from picture3d.errors import ConfigError
from picture3d.recipes import detection, occupancy, pretraining, segmentation
from picture3d.recipes.configs import DetectionConfig, OccupancyConfig, PretrainConfig, SegmentationConfig
from picture3d.recipes.town import town_encoder
from picture3d.structures.cylinder import cylinder_cell_size
from picture3d.tasks.detection import DetectionTaskConfig

TaskConfig = SegmentationConfig | DetectionConfig | OccupancyConfig
RunConfig = PretrainConfig | TaskConfig
_Config = TypeVar("_Config", PretrainConfig, SegmentationConfig, DetectionConfig, OccupancyConfig)
_Recipe = TypeVar("_Recipe")

PRETRAINING: dict[str, Callable[[Path], PretrainConfig]] = {
    "town-picture": pretraining.town_picture,
    "town-picture-visible": pretraining.town_picture_visible,
    "town-distillation": pretraining.town_distillation,
    "town-sweeps-picture": pretraining.town_sweeps_picture,
    "town-coordinates": pretraining.town_coordinates,
    "town-features": pretraining.town_features,
    "town-handcrafted": pretraining.town_handcrafted,
    "town-ema": pretraining.town_ema,
    "town-gpicture": pretraining.town_gpicture,
    "waymo-picture": pretraining.waymo_picture,
    "waymo-gpicture": pretraining.waymo_gpicture,
    "waymo-picture-20": pretraining.waymo_picture_20,
    "nuscenes-picture": pretraining.nuscenes_picture,
    "nuscenes-gpicture": pretraining.nuscenes_gpicture,
    "nuscenes-pillar-picture": pretraining.nuscenes_pillar_picture,
    "nuscenes-cylinder-picture": pretraining.nuscenes_cylinder_picture,
}
SEGMENTATION: dict[str, Callable[[Path], SegmentationConfig]] = {
    "town-segmentation": segmentation.town_segmentation,
    "nuscenes-segmentation": segmentation.nuscenes_segmentation,
    "nuscenes-cylinder-segmentation": segmentation.nuscenes_cylinder_segmentation,
}
DETECTION: dict[str, Callable[[Path], DetectionConfig]] = {
    "town-detection": detection.town_detection,
    "waymo-detection": detection.waymo_detection,
    "nuscenes-detection": detection.nuscenes_detection,
}
OCCUPANCY: dict[str, Callable[[Path], OccupancyConfig]] = {
    "town-occupancy": occupancy.town_occupancy,
    "nuscenes-occupancy": occupancy.nuscenes_occupancy,
}


def pretraining_recipe(name: str, data: Path) -> PretrainConfig:
    """The pre-training recipe called `name`, on the prepared frames in `data`.

    Raises:
        ConfigError: for an unknown name; the nearest one is given.
    """
    return _find(PRETRAINING, name, "pre-training")(data)


def segmentation_recipe(name: str, data: Path) -> SegmentationConfig:
    """The segmentation recipe called `name`, on the prepared frames in `data`.

    Raises:
        ConfigError: for an unknown name; the nearest one is given.
    """
    return _find(SEGMENTATION, name, "segmentation")(data)


def detection_recipe(name: str, data: Path) -> DetectionConfig:
    """The detection recipe called `name`, on the prepared frames in `data`.

    Raises:
        ConfigError: for an unknown name; the nearest one is given.
    """
    return _find(DETECTION, name, "detection")(data)


def occupancy_recipe(name: str, data: Path) -> OccupancyConfig:
    """The occupancy recipe called `name`, on the prepared frames in `data`.

    Raises:
        ConfigError: for an unknown name; the nearest one is given.
    """
    return _find(OCCUPANCY, name, "occupancy")(data)


def finetuning_recipe(name: str, data: Path) -> TaskConfig:
    """The segmentation, detection or occupancy recipe called `name`, on the prepared frames in `data`.

    Raises:
        ConfigError: for an unknown name; the nearest one is given.
    """
    return _find({**SEGMENTATION, **DETECTION, **OCCUPANCY}, name, "fine-tuning")(data)


def any_recipe(name: str, data: Path) -> RunConfig:
    """The recipe called `name`, of any kind, on the prepared frames in `data`.

    Raises:
        ConfigError: for an unknown name; the nearest one is given.
    """
    return _find({**PRETRAINING, **SEGMENTATION, **DETECTION, **OCCUPANCY}, name, "")(data)


def tiny(config: _Config) -> _Config:
    """Shrinks any recipe to a coarse grid, a narrow encoder and two steps: for tests, and to try a command out."""
    low, high = config.grid.range_min, config.grid.range_max
    across = 128 if isinstance(config, OccupancyConfig) else 120  # columns; those of labelled cells are powers of two
    if config.grid.pillars:
        voxel, windows, strides = ((high[0] - low[0]) / 120, (high[1] - low[1]) / 120, high[2] - low[2]), ((12, 12, 1),), ()
    else:
        if config.grid.cylinder:
            voxel = cylinder_cell_size(low, high, (120, 120, 8))
        else:
            voxel = ((high[0] - low[0]) / across, (high[1] - low[1]) / across, (high[2] - low[2]) / 8)
        windows, strides = ((12, 12, 8), (12, 12, 1)), ((1, 1, 8),)
    stages = len(windows)
    encoder = town_encoder().model_copy(
        update={
            "channels": 32,
            "ffn_channels": 64,
            "blocks": (1,) * stages,
            "set_sizes": (24,) * stages,
            "windows": windows,
            "strides": strides,
        }
    )
    training = config.training.model_copy(
        update={"epochs": None, "max_steps": 2, "batch_size": 1, "accumulate": 1, "precision": "float32"}
    )
    grid = config.grid.model_copy(update={"voxel_size": voxel})
    updates: dict[str, object] = {"grid": grid, "encoder": encoder, "training": training, "workers": 0}
    if isinstance(config, DetectionConfig):
        updates["task"] = _narrow(config.task)
        updates["data"] = config.data.model_copy(update={"objects": None})  # a database would have to be made first
    if isinstance(config, OccupancyConfig):
        levels = {"blocks": (0, 0), "stem": (), "strides": (2, 2), "channels": (16, 16)}
        narrow = {"cell_ratio": 8, "volume_channels": 8, "head_channels": 8}
        updates["task"] = config.task.model_copy(update={**levels, **narrow})
    return config.model_copy(update=updates)


def _narrow(task: DetectionTaskConfig) -> DetectionTaskConfig:
    levels = len(task.bev.blocks)
    bev = task.bev.model_copy(update={"blocks": (0,) * levels, "channels": (16,) * levels, "upsample_channels": (16,) * levels})
    return task.model_copy(update={"bev": bev, "head": task.head.model_copy(update={"channels": 32})})


def _find(recipes: Mapping[str, Callable[[Path], _Recipe]], name: str, kind: str) -> Callable[[Path], _Recipe]:
    if name in recipes:
        return recipes[name]
    guess = nearest(name, recipes)
    hint = f" Did you mean '{guess}'?" if guess else ""
    raise ConfigError(f"no {kind + ' ' if kind else ''}recipe is called '{name}'.{hint} Choose one of {', '.join(recipes)}.")
