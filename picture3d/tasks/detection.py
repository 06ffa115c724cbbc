"""3-D object detection: boxes with classes and scores, from scratch or from a pre-trained encoder.

    tokens = encoder(points)               # one per occupied pillar, or per voxel of the last stage
    map    = bev_backbone(dense(tokens))   # seen from above: rows along y, columns along x
    boxes  = head(map)                     # CenterHead (Waymo) or TransFusion (nuScenes)

State-dict keys are OpenPCDet's: ``vfe``, ``backbone_3d``, ``backbone_2d``, ``dense_head``. Source: the detectors of DSVT
(Wang et al., CVPR 2023), which PICTURE fine-tunes.
"""

from __future__ import annotations

import math
from typing import Any, Protocol, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from picture3d.config import FrozenConfig
from picture3d.errors import ConfigError, DataError
from picture3d.models.bev_backbone import BevBackbone, BevBackboneConfig, scatter_to_bev
from picture3d.models.center_head import CenterHead, CenterHeadConfig, CenterMaps
from picture3d.models.dsvt import DsvtConfig
from picture3d.models.transfusion_head import TransFusionConfig, TransFusionHead, TransFusionOutput
from picture3d.structures.batch import PointBatch
from picture3d.structures.detections import DetectedBoxes
from picture3d.structures.voxels import VoxelGrid
from picture3d.tasks.encoder import TaskEncoder, frozen

RawDetections = CenterMaps | TransFusionOutput


class DetectionTaskConfig(FrozenConfig):
    """The network above the encoder. The defaults are the published Waymo detector's."""

    bev: BevBackboneConfig = BevBackboneConfig()
    head: CenterHeadConfig | TransFusionConfig = Field(
        default=CenterHeadConfig(), discriminator="kind", description="kind: center or transfusion, and its settings"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.head.classes)) < len(self.head.classes):
            raise ValueError("head.classes names a class twice")
        return self


class DetectionNet(TaskEncoder):
    """Encoder, map network and head.

    Args:
        grid: range and voxel size.
        in_features: point features used beside x, y, z.
        backbone: the DSVT encoder.
        pillars: encode pillars instead of voxels.
        config: everything above the encoder.

    Raises:
        ConfigError: if grid, windows, strides and levels do not fit each other.
    """

    def __init__(
        self,
        grid: VoxelGrid,
        in_features: int,
        backbone: DsvtConfig,
        *,
        pillars: bool = False,
        config: DetectionTaskConfig | None = None,
    ) -> None:
        super().__init__(grid, in_features, backbone, pillars=pillars)
        config = config or DetectionTaskConfig()
        columns, rows, layers = self.backbone_3d.stage_shapes[-1]
        divisor = math.prod(config.bev.strides)
        if columns % divisor or rows % divisor:
            raise ConfigError(
                f"the encoder ends with {columns} x {rows} cells seen from above; the levels of task.bev need multiples of "
                f"{divisor}. Change grid.range_min and grid.range_max, or grid.voxel_size."
            )
        self.backbone_2d = BevBackbone(backbone.channels * layers, config.bev)
        cell = config.bev.out_stride
        side_x = (grid.range_max[0] - grid.range_min[0]) / columns * cell
        side_y = (grid.range_max[1] - grid.range_min[1]) / rows * cell
        make: Any = CenterHead if isinstance(config.head, CenterHeadConfig) else TransFusionHead
        self.dense_head: CenterHead | TransFusionHead = make(
            config.bev.out_channels, (side_x, side_y), grid.range_min[:2], config.head
        )

    def forward(self, batch: PointBatch) -> RawDetections:
        """What the head says before decoding; a batch without points gives the map's bias everywhere."""
        tokens = self.backbone_3d(self.vfe(batch).voxels).output
        return self.dense_head(self.backbone_2d(scatter_to_bev(tokens)))


class _Head(Protocol):
    """What both heads can do."""

    def loss(self, output: Any, boxes: Tensor, classes: Tensor, sample: Tensor, /) -> dict[str, Tensor]: ...

    def decode(self, output: Any, /) -> list[DetectedBoxes]: ...


class DetectionTask:
    """Detection as the training loop sees it.

    Args:
        module: the network.
        config: its settings.
    """

    def __init__(self, module: DetectionNet, config: DetectionTaskConfig) -> None:
        self._module, self.config = module, config

    @property
    def module(self) -> DetectionNet:
        """The network."""
        return self._module

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes 1, 2, ..."""
        return self.config.head.classes

    def loss(self, batch: PointBatch, generator: torch.Generator) -> dict[str, Tensor]:
        """Scalars by name; "total" is minimised, the head names the others. A frame without boxes is all background.

        Raises:
            DataError: if the batch was not annotated, or has a class that the head does not know.
            TrainingError: if the TransFusion head's proposals are not finite.
        """
        boxes, classes, sample = boxes_of(batch, len(self.classes))
        output = self.module(batch)
        head: _Head = self.module.dense_head
        return head.loss(output, boxes, classes, sample)

    def predict(self, batch: PointBatch) -> list[DetectedBoxes]:
        """The boxes of each frame of a batch on the network's device, in its LiDAR frame.

        No gradients, running statistics in the norms; the network's mode is restored.
        """
        with frozen(self.module):
            output = self.module(batch)
            head: _Head = self.module.dense_head
            return head.decode(output)


def boxes_of(batch: PointBatch, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (G, 9), classes (G,) and frames (G,) of a batch.

    Raises:
        DataError: naming the frames, if there are no annotations, or a class is not among 1..`num_classes`.
    """
    frames = ", ".join(batch.frame_names)
    if batch.boxes is None or batch.box_class is None or batch.box_sample is None:
        raise DataError(
            f"{frames}: no boxes. Detection needs annotated keyframes: prepare the data with its boxes, and name the classes "
            "in data.box_classes."
        )
    if batch.box_class.numel():
        low, high = (int(value) for value in batch.box_class.aminmax())
        if low < 1 or high > num_classes:
            raise DataError(
                f"{frames}: class {low if low < 1 else high} is not among the {num_classes} classes 1..{num_classes} of the "
                "head. Give data.box_classes and task.head.classes the same names in the same order."
            )
    return batch.boxes, batch.box_class, batch.box_sample
