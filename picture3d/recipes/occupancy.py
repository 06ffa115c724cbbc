"""Occupancy fine-tuning recipes."""

from __future__ import annotations

from pathlib import Path

from picture3d.datasets.augment import AugmentConfig
from picture3d.datasets.samples import DataConfig
from picture3d.models.dsvt_config import nuscenes_voxel_256
from picture3d.recipes.configs import GridConfig, OccupancyConfig
from picture3d.recipes.pretraining import NUSCENES_GRID
from picture3d.recipes.town import TOWN_GRID, town_encoder
from picture3d.tasks.occupancy import OccupancyTaskConfig
from picture3d.training.optim import OptimConfig
from picture3d.training.plan import TrainingConfig

# The space that nuScenes-Occupancy labels, in the town's voxels: an encoder of the town's recipes fits.
TOWN_OCCUPANCY_GRID = GridConfig(
    range_min=NUSCENES_GRID.range_min, range_max=NUSCENES_GRID.range_max, voxel_size=TOWN_GRID.voxel_size
)
# Cells of occupancy labels fall on cells only by flips and quarter turns.
_EXACT = AugmentConfig(rotation=0.0, scale=(1.0, 1.0), translation=0.0, quarter_turns=True)


def town_occupancy(data: Path) -> OccupancyConfig:
    """Occupancy on the synthetic town (or any 32-beam data with such labels), small enough for two CPU cores."""
    grid = TOWN_OCCUPANCY_GRID
    return OccupancyConfig(
        recipe="town-occupancy",
        data=DataConfig(
            root=data,
            range_min=grid.range_min,
            range_max=grid.range_max,
            labels=False,
            occupancy=True,
            augment=_EXACT,
            cache_bytes=2**30,
        ),
        grid=grid,
        encoder=town_encoder(),
        task=OccupancyTaskConfig(
            blocks=(1, 1), stem=(), strides=(2, 2), channels=(64, 64), volume_channels=16, head_channels=16
        ),
        training=TrainingConfig(
            epochs=None,
            max_steps=400,
            batch_size=1,
            checkpoint_every=50,
            optim=OptimConfig(peak_lr=4e-3, weight_decay=0.01, warmup_share=0.15, start_divisor=10.0),
        ),
    )


def nuscenes_occupancy(data: Path) -> OccupancyConfig:
    """nuScenes-Occupancy at full size, on the voxel encoder of `nuscenes-picture` (24 epochs as published)."""
    return OccupancyConfig(
        recipe="nuscenes-occupancy",
        data=DataConfig(
            root=data,
            sweeps=10,
            features=("intensity", "time_lag"),
            intensity_scale="raw",
            range_min=NUSCENES_GRID.range_min,
            range_max=NUSCENES_GRID.range_max,
            labels=False,
            occupancy=True,
            augment=_EXACT,
        ),
        grid=NUSCENES_GRID,
        encoder=nuscenes_voxel_256(),
        task=OccupancyTaskConfig(),
        training=TrainingConfig(
            epochs=24,
            batch_size=1,
            precision="bf16",
            optim=OptimConfig(peak_lr=3e-4, weight_decay=0.01, warmup_share=0.4, start_divisor=10.0, grad_clip=35.0),
        ),
        workers=4,
    )
