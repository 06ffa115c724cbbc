"""A grid, an encoder and labelled points small enough for a test to train on."""

from __future__ import annotations

import torch
from torch import Tensor

from picture3d.models.dsvt import DsvtConfig
from picture3d.structures.batch import PointBatch
from picture3d.structures.voxels import VoxelGrid
from picture3d.tasks.segmentation import SegmentationNet, SegmentationTask, SegmentationTaskConfig

GRID = VoxelGrid((-8.0, -8.0, -2.0), (8.0, 8.0, 2.0), (1.0, 1.0, 1.0))
ENCODER = DsvtConfig(
    channels=16,
    ffn_channels=32,
    heads=2,
    blocks=(1, 1),
    set_sizes=(12, 12),
    windows=((4, 4, 4), (4, 4, 1)),
    shifts=((0, 0, 0), (2, 2, 0)),
    strides=((1, 1, 4),),
    point_norm_momentum=0.1,  # the tests train for a few dozen steps
)


def small_task(*, encoder: DsvtConfig = ENCODER, seed: int = 0, settings: dict[str, object] | None = None) -> SegmentationTask:
    torch.manual_seed(seed)
    config = SegmentationTaskConfig.from_tree({"head_channels": 32, **(settings or {})})
    return SegmentationTask(SegmentationNet(GRID, 1, encoder, config=config), config)


def batch_of(*clouds: Tensor, labels: Tensor | None = None) -> PointBatch:
    """One sample per (n, 3) cloud; intensity is 0.5 throughout."""
    xyz = torch.cat(clouds)
    sample = torch.repeat_interleave(torch.arange(len(clouds)), torch.tensor([len(cloud) for cloud in clouds]))
    names = tuple(f"log/{i}" for i in range(len(clouds)))
    return PointBatch(xyz, torch.full((len(xyz), 1), 0.5), sample, len(clouds), names, labels)


def layered_batch(points: int = 400, samples: int = 1, seed: int = 0) -> PointBatch:
    """Ground (class 11) below, a car (4) on it on one side, a tree (16) above it on the other; every 9th point is noise."""
    generator = torch.Generator().manual_seed(seed)
    xyz = torch.rand(points * samples, 3, generator=generator) * torch.tensor([15.8, 15.8, 3.8]) - torch.tensor([7.9, 7.9, 1.9])
    labels = torch.where(xyz[:, 2] < -0.5, 11, torch.where(xyz[:, 0] > 0, 4, 16))
    labels[::9] = 0
    return batch_of(*xyz.split(points), labels=labels)


def no_points() -> Tensor:
    return torch.zeros(0, 3)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
