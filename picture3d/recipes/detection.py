"""Detection fine-tuning recipes."""

from __future__ import annotations

from pathlib import Path

from picture3d.datasets.augment import AugmentConfig
from picture3d.datasets.detection_classes import NUSCENES_DETECTION, WAYMO_DETECTION
from picture3d.datasets.object_sampling_config import ObjectSamplingConfig
from picture3d.datasets.samples import DataConfig
from picture3d.models.bev_backbone import BevBackboneConfig, nuscenes_bev
from picture3d.models.center_head import CenterHeadConfig
from picture3d.models.dsvt_config import nuscenes_pillar_256, waymo_voxel_192
from picture3d.models.transfusion_head import TransFusionConfig
from picture3d.recipes.configs import DetectionConfig
from picture3d.recipes.pretraining import NUSCENES_PILLAR_GRID, WAYMO_GRID
from picture3d.recipes.town import TOWN_GRID, TOWN_SWEEPS, town_encoder
from picture3d.tasks.detection import DetectionTaskConfig
from picture3d.training.optim import OptimConfig
from picture3d.training.plan import TrainingConfig

TOWN_FILL_TO = {
    "car": 45,
    "truck": 8,
    "construction_vehicle": 6,
    "bus": 6,
    "trailer": 6,
    "barrier": 12,
    "motorcycle": 12,
    "bicycle": 12,
    "pedestrian": 20,
    "traffic_cone": 12,
}


def town_detection(data: Path) -> DetectionConfig:
    """The ten nuScenes classes on the synthetic town (or any 32-beam data), small enough for two CPU cores.

    Three sweeps, for with one alone half the cars beyond 35 m have fewer than five points; its encoder is that of
    `town_sweeps_picture`. Logs without poses need ``data.sweeps=1``.
    """
    return DetectionConfig(
        recipe="town-detection",
        data=DataConfig(
            root=data,
            sweeps=TOWN_SWEEPS,
            features=("intensity", "time_lag"),
            range_min=TOWN_GRID.range_min,
            range_max=TOWN_GRID.range_max,
            augment=AugmentConfig(rotation=0.0, scale=(0.95, 1.05), translation=0.0),  # too few steps to learn more of
            labels=False,
            box_classes=NUSCENES_DETECTION.names,
            # Twice the cars for a quarter more time.
            objects=ObjectSamplingConfig(database=f"train-{TOWN_SWEEPS}sweeps", fill_to=TOWN_FILL_TO),
            cache_bytes=2**30,
        ),
        grid=TOWN_GRID,
        encoder=town_encoder(),
        task=DetectionTaskConfig(
            # Narrow: this network takes 40 % of the time of one twice as wide, and there is time for more steps.
            bev=BevBackboneConfig(
                blocks=(1, 2), strides=(2, 2), channels=(32, 64), upsample_strides=(1, 2), upsample_channels=(32, 32)
            ),
            head=CenterHeadConfig(
                classes=NUSCENES_DETECTION.names,
                channels=32,
                small_start=True,
                neighbours=1,
                score_threshold=0.02,
                rectify=(0.0,) * 10,  # the predicted IoU is learned last
                nms_thresholds=(0.2,) * 10,
                limits=(61.2, 61.2, 10.0),
                published_nms_angle=False,
                regression_weight=1.5,
                iou_regression_weight=0.5,
            ),
        ),
        training=TrainingConfig(
            epochs=None,
            max_steps=2200,
            batch_size=1,
            checkpoint_every=100,
            optim=OptimConfig(peak_lr=4e-3, weight_decay=0.01, warmup_share=0.1, start_divisor=10.0, grad_clip=10.0),
        ),
    )


def waymo_detection(data: Path) -> DetectionConfig:
    """DSVT and CenterHead on every labelled Waymo frame, as published (12 epochs, batch 3 per GPU)."""
    return DetectionConfig(
        recipe="waymo-detection",
        data=DataConfig(
            root=data,
            features=("intensity", "elongation"),
            intensity_scale="tanh",
            range_min=WAYMO_GRID.range_min,
            range_max=WAYMO_GRID.range_max,
            crop_z=False,
            augment=AugmentConfig(scale=(0.95, 1.05)),
            labels=False,
            box_classes=WAYMO_DETECTION.names,
            objects=ObjectSamplingConfig.waymo(),
            augment_off_last=1,  # published: 15, more than there are epochs
        ),
        grid=WAYMO_GRID,
        encoder=waymo_voxel_192(),
        task=DetectionTaskConfig(),
        training=TrainingConfig(
            epochs=12,
            batch_size=3,
            precision="bf16",
            optim=OptimConfig(peak_lr=1e-3, weight_decay=0.05, warmup_share=0.1, start_divisor=100.0, grad_clip=10.0),
        ),
        workers=4,
    )


def nuscenes_detection(data: Path) -> DetectionConfig:
    """DSVT pillars and TransFusion on nuScenes, 10 sweeps, as published (24 epochs, batch 4 per GPU; +-54 m)."""
    return DetectionConfig(
        recipe="nuscenes-detection",
        data=DataConfig(
            root=data,
            sweeps=10,
            features=("intensity", "time_lag"),
            intensity_scale="raw",
            range_min=NUSCENES_PILLAR_GRID.range_min,
            range_max=NUSCENES_PILLAR_GRID.range_max,
            augment=AugmentConfig(),
            labels=False,
            box_classes=NUSCENES_DETECTION.names,
            balance_classes=True,
            objects=ObjectSamplingConfig.nuscenes(),
            objects_off_last=4,
        ),
        grid=NUSCENES_PILLAR_GRID,
        encoder=nuscenes_pillar_256(),
        task=DetectionTaskConfig(bev=nuscenes_bev(), head=TransFusionConfig()),
        training=TrainingConfig(
            epochs=24,
            batch_size=4,
            precision="bf16",
            optim=OptimConfig(peak_lr=5e-3, weight_decay=0.05, warmup_share=0.4, start_divisor=10.0, grad_clip=35.0),
        ),
        workers=4,
    )
