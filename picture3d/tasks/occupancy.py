"""Semantic occupancy: what every cell of the space around the sensor is, seen by a laser or not.

    tokens  = encoder(points)                     # the last stage's, one per pillar
    levels  = bev_levels(dense(tokens))           # maps seen from above, each half as fine as the one before
    volumes = each level's channels laid out over height; the finest gets the first stage's voxels, which know their height
    logits  = head(volumes)                       # on cells `cell_ratio` times as long as those of the labels
    answer  = logits, interpolated to the labels' cells

State-dict keys below ``vfe``, ``backbone_3d`` and ``dense_head`` are the published ones. Source: the occupancy experiments of
PICTURE on nuScenes-Occupancy, whose published network cannot be built; how its parts are joined here, and why:
`docs/paper_to_code.md`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Self, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from picture3d.config import FrozenConfig
from picture3d.errors import ConfigError, DataError
from picture3d.models.bev_backbone import BevLevels, scatter_to_bev
from picture3d.models.dsvt import DsvtConfig, DsvtOutput
from picture3d.models.occupancy_head import OccupancyHead
from picture3d.ops.coarse_labels import Vote, coarse_labels
from picture3d.ops.lovasz import lovasz_softmax
from picture3d.ops.processes import mean_count
from picture3d.ops.scatter import segment_mean
from picture3d.ops.scene_affinity import geometric_affinity, semantic_affinity
from picture3d.structures.batch import PointBatch
from picture3d.structures.cylinder import CylinderGrid
from picture3d.structures.occupancy import IGNORED, Occupancy, OccupancyGrid
from picture3d.structures.voxels import SparseVoxels, VoxelGrid
from picture3d.tasks.encoder import TaskEncoder, frozen

Triple = tuple[int, int, int]
_SLAB = 8  # classified cells along x whose interpolated logits are in memory at a time


class OccupancyTaskConfig(FrozenConfig):
    """The network above the encoder, its losses, and the cells it answers for. Lists have one entry per level."""

    num_classes: int = Field(default=17, ge=2, description="free space (0) and the classes")
    cells: Triple = Field(default=(512, 512, 40), description="cells of the labels along x, y, z; nuScenes-Occupancy's")
    origin: tuple[float, float, float] = Field(default=(-51.2, -51.2, -5.0), description="their lowest corner, metres")
    cell_m: float = Field(default=0.2, gt=0, description="their side, metres")
    cell_ratio: int = Field(default=4, ge=1, description="cells of the labels along each side of a cell that is classified")
    blocks: tuple[int, ...] = Field(default=(1, 2, 2, 2), description="residual blocks, besides the strided first one")
    stem: tuple[int, ...] = Field(default=(2,), description="strides of residual blocks before the first level")
    strides: tuple[int, ...] = Field(default=(2, 2, 2, 2), description="of the first block of each level")
    channels: tuple[int, ...] = Field(default=(128, 256, 256, 256), description="width of each level's map")
    volume_channels: int = Field(default=256, ge=1, description="width of each level's volume")
    head_channels: int = Field(default=128, ge=2, description="width in which the head joins the levels")
    vote: Vote = Field(
        default="majority",
        description="class of a larger cell: majority of its occupied cells; published: a cell without a pair is ignored",
    )
    class_weights: tuple[float, ...] | None = Field(
        default=None, description="weight of each class in the cross-entropy, free space first; null: all alike, as published"
    )
    cross_entropy_weight: float = Field(default=1.0, ge=0, description="weight of the cross-entropy")
    semantic_weight: float = Field(default=1.0, ge=0, description="weight of precision, recall and specificity of classes")
    geometric_weight: float = Field(default=1.0, ge=0, description="the same of being occupied")
    lovasz_weight: float = Field(default=1.0, ge=0, description="weight of the Lovasz-softmax loss")

    @model_validator(mode="after")
    def _check(self) -> Self:
        levels = len(self.blocks)
        if levels == 0 or len(self.strides) != levels or len(self.channels) != levels:
            raise ValueError("blocks, strides and channels need one entry for each level, and at least one")
        if min(self.blocks) < 0 or min((*self.stem, *self.strides, *self.channels)) < 1:
            raise ValueError("blocks must be 0 or more; stem, strides and channels 1 or more")
        if any(side % self.cell_ratio for side in self.cells):
            raise ValueError(f"cells {self.cells} cannot be grouped by cell_ratio {self.cell_ratio} along every axis")
        if self.class_weights is not None and (len(self.class_weights) != self.num_classes or min(self.class_weights) < 0):
            raise ValueError(f"class_weights needs {self.num_classes} entries of 0 or more")
        if not any(self.loss_weights.values()):
            raise ValueError("all loss weights are 0: there is nothing to learn")
        return self

    @property
    def grid(self) -> OccupancyGrid:
        """The cells of the labels."""
        return OccupancyGrid(self.cells, self.origin, self.cell_m)

    @property
    def shape(self) -> Triple:
        """Cells along x, y, z that are classified."""
        x, y, z = (side // self.cell_ratio for side in self.cells)
        return x, y, z

    @property
    def columns_per_cell(self) -> int:
        """Columns of the encoder along each side of a cell that is classified."""
        return math.prod(self.stem) * self.strides[0]

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weight of each loss by its name."""
        return {
            "cross_entropy": self.cross_entropy_weight,
            "semantic": self.semantic_weight,
            "geometric": self.geometric_weight,
            "lovasz": self.lovasz_weight,
        }


class OccupancyNet(TaskEncoder):
    """Encoder, map network and head.

    Args:
        grid: range and voxel size of the encoder; its range along x and y is that of the labels.
        in_features: point features used beside x, y, z.
        backbone: the DSVT encoder.
        pillars: encode pillars instead of voxels.
        config: everything above the encoder.

    Raises:
        ConfigError: if grid, windows, strides and the labels' cells do not fit each other.
    """

    def __init__(
        self,
        grid: VoxelGrid,
        in_features: int,
        backbone: DsvtConfig,
        *,
        pillars: bool = False,
        config: OccupancyTaskConfig | None = None,
    ) -> None:
        super().__init__(grid, in_features, backbone, pillars=pillars)
        self.config = config = config or OccupancyTaskConfig()
        columns, rows, layers = self.backbone_3d.stage_shapes[-1]
        _check_fit(grid, (columns, rows), config)
        self.level_shapes = _level_shapes(config)
        self.backbone_2d = BevLevels(backbone.channels * layers, config.blocks, config.strides, config.channels, config.stem)
        width = config.volume_channels
        self.lift = nn.ModuleList(
            nn.Conv2d(channels, width * shape[2], 1) for channels, shape in zip(config.channels, self.level_shapes, strict=True)
        )
        self.from_voxels = nn.Linear(backbone.channels, width, bias=False)
        self.dense_head = OccupancyHead((width,) * len(config.blocks), config.head_channels, config.num_classes)

    def forward(self, batch: PointBatch) -> Tensor:
        """Logits (B, num_classes, X, Y, Z) of the cells of `config.shape`; a batch without points has some, too."""
        latent: DsvtOutput = self.backbone_3d(self.vfe(batch).voxels)
        maps = self.backbone_2d(scatter_to_bev(latent.output))
        volumes = []
        for lift, seen_from_above, (x, y, z) in zip(self.lift, maps, self.level_shapes, strict=True):
            spread = lift(seen_from_above).view(batch.batch_size, self.config.volume_channels, z, y, x)
            volumes.append(spread.permute(0, 1, 4, 3, 2))
        volumes[0] = volumes[0] + self._by_height(latent.stages[0])
        return self.dense_head(volumes)

    def _by_height(self, voxels: SparseVoxels) -> Tensor:
        """(B, C, X, Y, Z) mean of the first stage's voxels in each cell; zeros where there is none."""
        shape = self.config.shape
        place, inside = self._cells_of(voxels.coords)
        sample = voxels.coords[:, 0].long()[inside]
        key = ((sample * shape[0] + place[:, 0]) * shape[1] + place[:, 1]) * shape[2] + place[:, 2]
        found, group = torch.unique(key, return_inverse=True)
        feats = self.from_voxels(segment_mean(voxels.feats[inside], group, len(found)))
        dense = feats.new_zeros(voxels.batch_size * shape[0] * shape[1] * shape[2], feats.shape[1]).index_copy(0, found, feats)
        return dense.view(voxels.batch_size, *shape, feats.shape[1]).permute(0, 4, 1, 2, 3)

    def _cells_of(self, coords: Tensor) -> tuple[Tensor, Tensor]:
        """The classified cells (U, 3) in which the middles of voxels at (M, 4) lie, and the rows (U,) of those inside."""
        size, low = (coords.new_tensor(values, dtype=torch.float64) for values in (self.grid.voxel_size, self.grid.range_min))
        origin = coords.new_tensor(self.config.origin, dtype=torch.float64)
        side = self.config.cell_m * self.config.cell_ratio
        place = (((coords[:, 1:] + 0.5) * size + low - origin) / side).floor().long()
        limit = place.new_tensor(self.config.shape)
        inside = ((place >= 0) & (place < limit)).all(1).nonzero().squeeze(1)
        return place[inside], inside


def _check_fit(grid: VoxelGrid, columns: tuple[int, int], config: OccupancyTaskConfig) -> None:
    if isinstance(grid, CylinderGrid):
        raise ConfigError("occupancy: grid.cylinder=true has no map of x and y; set it false")
    ends = config.grid.end
    for axis, name in enumerate("xy"):
        low, high = grid.range_min[axis], grid.range_max[axis]
        if abs(low - config.origin[axis]) > 1e-6 or abs(high - ends[axis]) > 1e-6:
            raise ConfigError(
                f"occupancy: the encoder's grid goes from {low:g} to {high:g} m along {name}, the labels' cells from "
                f"{config.origin[axis]:g} to {ends[axis]:g}. Set grid.range_min and grid.range_max to those."
            )
        if columns[axis] != config.shape[axis] * config.columns_per_cell:
            raise ConfigError(
                f"occupancy: the encoder ends with {columns[axis]} columns along {name}, and {config.shape[axis]} cells are "
                f"classified, with task.stem={list(config.stem)} and task.strides[0]={config.strides[0]} between them. Make "
                f"the quotient their product ({config.columns_per_cell}) by grid.voxel_size, task.cell_ratio, task.stem or "
                "task.strides."
            )


def _level_shapes(config: OccupancyTaskConfig) -> list[Triple]:
    """Cells along x, y, z of each level's volume; maps round up when they are halved, and so does height."""
    shapes = [config.shape]
    for stride in config.strides[1:]:
        x, y, z = (-(-side // stride) for side in shapes[-1])
        shapes.append((x, y, z))
    return shapes


class OccupancyTask:
    """Occupancy as the training loop sees it.

    Args:
        module: the network.
        config: its settings.
    """

    def __init__(self, module: OccupancyNet, config: OccupancyTaskConfig) -> None:
        self._module, self.config = module, config

    @property
    def module(self) -> OccupancyNet:
        """The network."""
        return self._module

    def loss(self, batch: PointBatch, generator: torch.Generator) -> dict[str, Tensor]:
        """Scalars by name; "total" is minimised.

        Judged are all cells of `config.shape` but the ignored ones. "cross_entropy", "semantic", "geometric" and "lovasz" are
        not weighted and are there if their weight is above 0; "accuracy" is the share of occupied cells whose class is right.

        Raises:
            DataError: if the batch has no occupancy labels, labels on another grid, or labels that no logit stands for.
        """
        cell, label = labels_of(batch, self.config)
        config = self.config
        wanted = coarse_labels(cell, label, batch.batch_size, config.shape, config.cell_ratio, config.vote).flatten()
        rows = self.module(batch).permute(0, 2, 3, 4, 1).reshape(-1, config.num_classes)
        kept = (wanted != IGNORED).nonzero().squeeze(1)
        logits, labels = rows[kept].float(), wanted[kept].long()
        found: dict[str, Tensor] = {}
        if config.cross_entropy_weight > 0:
            weight = logits.new_tensor(config.class_weights or (1.0,) * config.num_classes)
            summed = F.cross_entropy(logits, labels, weight, reduction="sum")
            found["cross_entropy"] = summed / mean_count(weight[labels].sum(), logits)
        if config.semantic_weight > 0:
            found["semantic"] = semantic_affinity(logits, labels)
        if config.geometric_weight > 0:
            found["geometric"] = geometric_affinity(logits, labels)
        if config.lovasz_weight > 0:
            found["lovasz"] = lovasz_softmax(logits, labels, ignored=None)
        total = torch.stack([config.loss_weights[name] * value for name, value in found.items()]).sum()
        occupied = labels > 0
        right = (logits.detach().argmax(1) == labels) & occupied
        return {"total": total, **found, "accuracy": right.sum() / occupied.sum().clamp(min=1)}

    def predict(self, batch: PointBatch) -> list[Occupancy]:
        """The occupied cells of each frame of a batch on the network's device, on the grid of the labels.

        No gradients, running statistics in the norms; the network's mode is restored. Interpolated logits are never in memory
        whole (0.7 GB for 512 x 512 x 40 cells and 17 classes) but slab by slab.
        """
        with frozen(self.module):
            logits = self.module(batch).float()
            return [occupancy_of_logits(logits[index : index + 1], self.config) for index in range(batch.batch_size)]


def occupancy_of_logits(logits: Tensor, config: OccupancyTaskConfig) -> Occupancy:
    """The occupied cells of one frame, from (1, classes, X, Y, Z) logits of the cells of `config.shape`."""
    slabs = [best.cpu() for best in _best_of_slabs(logits, config.cell_ratio)]
    return Occupancy.of_dense(torch.cat(slabs).numpy(), config.grid)


def _best_of_slabs(logits: Tensor, ratio: int) -> Iterator[Tensor]:
    """The largest class of trilinearly interpolated logits, (x, Y', Z') uint8, slab after slab along x.

    Numbers are those of interpolating the whole; of equal logits the smallest class is taken.
    """
    cells = logits.shape[2]
    for first in range(0, cells, _SLAB):
        last = min(first + _SLAB, cells)
        low, high = max(0, first - 1), min(cells, last + 1)  # a cell is interpolated from its neighbours, too
        fine = F.interpolate(logits[:, :, low:high], scale_factor=float(ratio), mode="trilinear", align_corners=False)
        begin = (first - low) * ratio
        classes = fine[0, :, begin : begin + (last - first) * ratio].unbind(0)
        largest, best = classes[0], torch.zeros(classes[0].shape, dtype=torch.uint8, device=logits.device)
        for index, value in enumerate(classes[1:], start=1):  # on a CPU six times as quick as argmax over the first axis
            best = torch.where(value > largest, index, best)
            largest = torch.maximum(value, largest)
        yield best.to(torch.uint8)


def labels_of(batch: PointBatch, config: OccupancyTaskConfig) -> tuple[Tensor, Tensor]:
    """Occupied cells (K, 4) and their labels (K,) of a batch.

    Raises:
        DataError: naming the frames, if there are none, they lie on another grid, or one is not among the classes.
    """
    frames = ", ".join(batch.frame_names)
    if batch.occupancy_cell is None or batch.occupancy_class is None or batch.occupancy_grid is None:
        raise DataError(
            f"{frames}: no occupancy labels. Run `picture3d prepare occupancy` to attach them, and set data.occupancy=true."
        )
    if batch.occupancy_grid != config.grid:
        raise DataError(
            f"{frames}: the labels lie on {batch.occupancy_grid}, the network answers on {config.grid}. Set task.cells, "
            "task.origin and task.cell_m to those of the labels."
        )
    named = batch.occupancy_class[batch.occupancy_class != IGNORED]
    if named.numel() and int(named.max()) >= config.num_classes:
        raise DataError(
            f"{frames}: label {int(named.max())} is not among the {config.num_classes} classes 0..{config.num_classes - 1}. "
            "Set task.num_classes."
        )
    return cast(Tensor, batch.occupancy_cell), cast(Tensor, batch.occupancy_class)
