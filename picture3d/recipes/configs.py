"""What a run is made of. One frozen tree per kind of run; recipes fill it in, the command line changes leaves of it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from picture3d.config import FrozenConfig
from picture3d.datasets.samples import DataConfig
from picture3d.models.dsvt_config import DsvtConfig
from picture3d.models.layer_trace import num_layers
from picture3d.pretrain.ema import EmaConfig
from picture3d.pretrain.gate import GateConfig
from picture3d.pretrain.hierarchy import HierarchyConfig
from picture3d.pretrain.losses import LossConfig
from picture3d.pretrain.masking import MaskConfig
from picture3d.structures.cylinder import CylinderGrid
from picture3d.structures.voxels import VoxelGrid
from picture3d.tasks.detection import DetectionTaskConfig
from picture3d.tasks.occupancy import OccupancyTaskConfig
from picture3d.tasks.segmentation import SegmentationTaskConfig
from picture3d.training.plan import TrainingConfig

Metres = tuple[float, float, float]


class GridConfig(FrozenConfig):
    """The voxel grid of the encoder, in the LiDAR frame."""

    range_min: Metres = Field(description="lower corner, metres x y z")
    range_max: Metres = Field(description="upper corner, metres x y z")
    voxel_size: Metres = Field(description="cell size, metres x y z")
    pillars: bool = Field(default=False, description="one cell per column, whatever the height of a point")
    cylinder: bool = Field(
        default=False, description="cells of radius, angle, height: all three triples are metres, radians, metres"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.pillars and self.cylinder:
            raise ValueError("a cylinder grid has no pillars: set one of grid.pillars and grid.cylinder to false")
        if self.pillars and self.grid.shape[2] != 1:
            raise ValueError(
                f"pillars need one cell along z: set voxel_size z to {self.range_max[2] - self.range_min[2]:g}, "
                f"it is {self.voxel_size[2]:g}"
            )
        return self

    @property
    def grid(self) -> VoxelGrid:
        """The same as a value of the networks' language."""
        if self.cylinder:
            return CylinderGrid(self.range_min, self.range_max, self.voxel_size)
        return VoxelGrid(self.range_min, self.range_max, self.voxel_size)


class TargetsConfig(FrozenConfig):
    """Where the high-level targets come from."""

    mode: Literal["stored", "online", "ema", "none"] = Field(
        default="stored",
        description="stored: as `picture3d targets` left them; online: the teacher looks at each sweep when it is loaded; "
        "ema: a slowly following copy of the encoder is the teacher, of twice its width; "
        "none: no teacher (coordinates only, random mask)",
    )
    teacher: str = Field(
        default="town", description="town, handcrafted, minkunet, encoder, or the name of a store that another teacher filled"
    )
    weights: Path | None = Field(default=None, description="online minkunet and encoder: the checkpoint")
    channels: int = Field(default=64, ge=1, description="length of the teacher's features; ema has twice the encoder's width")
    superclasses: int = Field(default=8, ge=1, description="online: superclasses per sweep")
    ema: EmaConfig = EmaConfig()


class DecoderConfig(FrozenConfig):
    """The light network that rebuilds hidden voxels and is thrown away afterwards."""

    kind: Literal["voxel", "light"] = Field(
        default="voxel", description="voxel: one token per voxel; light: the published one, one token per pillar"
    )
    blocks: int = Field(default=2, ge=1, description="DSVT blocks of the voxel decoder")


class PretrainConfig(FrozenConfig):
    """A pre-training run."""

    kind: Literal["pretrain"] = "pretrain"
    recipe: str = Field(description="name of the recipe this began as")
    data: DataConfig
    grid: GridConfig
    encoder: DsvtConfig
    decoder: DecoderConfig = DecoderConfig()
    targets: TargetsConfig = TargetsConfig()
    mask: MaskConfig = MaskConfig()
    loss: LossConfig = LossConfig()
    hierarchy: HierarchyConfig = HierarchyConfig()
    gate: GateConfig = GateConfig()
    training: TrainingConfig
    workers: int = Field(
        default=0, ge=0, description="processes that load ahead, at most one per core; 0: none, the training loads"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("features_weight", "visible_features_weight"):
            if self.targets.mode == "none" and getattr(self.loss, name) > 0:
                raise ValueError(f"targets.mode=none leaves nothing for loss.{name} > 0; set it to 0")
        if self.targets.mode == "none" and self.mask.kind == "i2mask":
            raise ValueError("i2mask needs a teacher; with targets.mode=none set mask.kind=random")
        if self.targets.mode == "ema" and self.mask.kind == "i2mask" and self.mask.superclasses != "kmeans":
            raise ValueError("targets.mode=ema has no stored superclasses; set mask.superclasses=kmeans")
        if self.targets.mode == "ema" and self.loss.features_scale == "whitened":
            raise ValueError(
                "loss.features_scale=whitened adds up what the teacher says over all steps, and a self-teacher changes "
                "while it learns; set loss.features_scale=teacher"
            )
        if not self.loss.teaches_features and self.loss.coordinates_weight == 0:
            raise ValueError("all loss weights are 0: there is nothing to learn")
        if self.gate.enabled and (not self.loss.teaches_features or self.loss.coordinates_weight == 0):
            raise ValueError(
                "gate.enabled holds the features back until points are learnt: the weights of both must be above 0"
            )
        if self.hierarchy.enabled and self.hierarchy.alpha and len(self.hierarchy.alpha) != num_layers(self.encoder):
            raise ValueError(
                f"hierarchy.alpha has {len(self.hierarchy.alpha)} values, the encoder {num_layers(self.encoder)} layers "
                "(two per block): give one for each, or none for the published ones"
            )
        self.encoder.stage_shapes(self.grid.grid.shape)
        return self

    @property
    def teacher_channels(self) -> int | None:
        """Length of the teacher features that are predicted of hidden voxels; None where none are."""
        return self.feature_channels if self.loss.features_weight > 0 else None

    @property
    def visible_channels(self) -> int | None:
        """The same of visible voxels."""
        return self.feature_channels if self.loss.visible_features_weight > 0 else None

    @property
    def feature_channels(self) -> int:
        """D, length of the teacher's features."""
        return 2 * self.encoder.channels if self.targets.mode == "ema" else self.targets.channels

    @property
    def in_features(self) -> int:
        """Point features besides x, y, z."""
        return len(self.data.features)


class FinetuneConfig(FrozenConfig):
    """What every fine-tuning run has."""

    recipe: str = Field(description="name of the recipe this began as")
    data: DataConfig
    grid: GridConfig
    encoder: DsvtConfig
    training: TrainingConfig
    pretrained: Path | None = Field(default=None, description="run folder or checkpoint of a pre-training; null: from scratch")
    allow_partial: bool = Field(default=False, description="accept an encoder that fits only in part")
    workers: int = Field(
        default=0, ge=0, description="processes that load ahead, at most one per core; 0: none, the training loads"
    )

    @model_validator(mode="after")
    def _encoder_fits(self) -> Self:
        self.encoder.stage_shapes(self.grid.grid.shape)
        return self

    @property
    def in_features(self) -> int:
        """Point features besides x, y, z."""
        return len(self.data.features)


class SegmentationConfig(FinetuneConfig):
    """A segmentation fine-tuning run."""

    kind: Literal["segmentation"] = "segmentation"
    task: SegmentationTaskConfig = SegmentationTaskConfig()


class DetectionConfig(FinetuneConfig):
    """A detection fine-tuning run."""

    kind: Literal["detection"] = "detection"
    task: DetectionTaskConfig = DetectionTaskConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.grid.cylinder:
            raise ValueError("grid.cylinder=true has no map of x and y to find boxes on; set it false")
        if self.data.box_classes != self.task.head.classes:
            raise ValueError(
                f"data.box_classes {self.data.box_classes} and task.head.classes {self.task.head.classes} must be the same "
                "names in the same order"
            )
        return self


class OccupancyConfig(FinetuneConfig):
    """An occupancy fine-tuning run."""

    kind: Literal["occupancy"] = "occupancy"
    task: OccupancyTaskConfig = OccupancyTaskConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.data.occupancy:
            raise ValueError("data.occupancy=false leaves nothing to learn from; set it true")
        return self
