"""Segmentation fine-tuning recipes."""

from __future__ import annotations

from pathlib import Path

from picture3d.datasets.augment import AugmentConfig
from picture3d.datasets.samples import DataConfig
from picture3d.models.dsvt_config import nuscenes_cylinder_128, nuscenes_voxel_256
from picture3d.recipes.configs import SegmentationConfig
from picture3d.recipes.pretraining import NUSCENES_CYLINDER_GRID, NUSCENES_GRID, cylinder_crop
from picture3d.recipes.town import TOWN_GRID, town_encoder
from picture3d.tasks.segmentation import SegmentationTaskConfig
from picture3d.training.optim import OptimConfig
from picture3d.training.plan import TrainingConfig

# One over the square root of each class's share of the points in training towns; class 0 is ignored.
TOWN_CLASS_WEIGHTS = (0.0, 2.4, 3.2, 2.1, 1.6, 3.0, 2.9, 2.9, 4.5, 2.4, 3.2, 0.5, 1.5, 1.1, 1.4, 0.9, 0.9)


def town_segmentation(data: Path) -> SegmentationConfig:
    """Lidarseg on the synthetic town (or any 32-beam data), small enough for two CPU cores."""
    return SegmentationConfig(
        recipe="town-segmentation",
        data=DataConfig(
            root=data,
            range_min=TOWN_GRID.range_min,
            range_max=TOWN_GRID.range_max,
            # So few steps have no time for strong augmentation.
            augment=AugmentConfig(flip_x=False, rotation=0.1, scale=(0.95, 1.05), translation=0.1),
            cache_bytes=2**30,
        ),
        grid=TOWN_GRID,
        encoder=town_encoder(),
        task=SegmentationTaskConfig(head_channels=64, class_weights=TOWN_CLASS_WEIGHTS),
        training=TrainingConfig(
            epochs=None,
            max_steps=120,
            batch_size=2,
            checkpoint_every=50,
            optim=OptimConfig(peak_lr=4e-3, weight_decay=0.01, warmup_share=0.15, start_divisor=10.0),
        ),
    )


def nuscenes_segmentation(data: Path) -> SegmentationConfig:
    """Lidarseg on real nuScenes at full size, on the voxel encoder of `nuscenes-picture` (24 epochs as published)."""
    return SegmentationConfig(
        recipe="nuscenes-segmentation",
        data=DataConfig(
            root=data,
            sweeps=10,
            features=("intensity", "time_lag"),
            intensity_scale="raw",
            range_min=NUSCENES_GRID.range_min,
            range_max=NUSCENES_GRID.range_max,
            augment=AugmentConfig(),
        ),
        grid=NUSCENES_GRID,
        encoder=nuscenes_voxel_256(),
        training=TrainingConfig(
            epochs=24,
            batch_size=1,
            precision="bf16",
            optim=OptimConfig(peak_lr=5e-3, weight_decay=0.05, warmup_share=0.4, start_divisor=10.0, grad_clip=35.0),
        ),
        workers=4,
    )


def nuscenes_cylinder_segmentation(data: Path) -> SegmentationConfig:
    """Lidarseg on the published cylinder encoder, that of `nuscenes-cylinder-picture`: 480 x 360 x 32 cells, single sweeps."""
    base = nuscenes_segmentation(data)
    low, high = cylinder_crop(NUSCENES_CYLINDER_GRID)
    return base.model_copy(
        update={
            "recipe": "nuscenes-cylinder-segmentation",
            "data": base.data.model_copy(update={"sweeps": 1, "features": ("intensity",), "range_min": low, "range_max": high}),
            "grid": NUSCENES_CYLINDER_GRID,
            "encoder": nuscenes_cylinder_128(),
        }
    )
