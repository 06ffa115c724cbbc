"""CenterHead: boxes as peaks of a heat map, with what is regressed at the peak and a predicted IoU (the Waymo detector).

State-dict keys are those below ``dense_head.`` of OpenPCDet checkpoints: ``shared_conv.{0,1}`` and
``heads_list.0.<branch>.{0.0,0.1,1}``. Source: CenterPoint (Yin et al., CVPR 2021) as DSVT trains it.

Two things are kept because published numbers depend on them: the Gaussian radius (see `ops.gaussian`), and that suppression
turns every box by 90 degrees about its centre before overlaps are taken (`published_nms_angle`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from picture3d.config import FrozenConfig
from picture3d.models.row_norm import MapBatchNorm
from picture3d.ops.box_iou import (
    PUBLISHED_TOLERANCE_3D,
    PUBLISHED_TOLERANCE_BEV,
    classwise_nms,
    diou_axis_aligned,
    iou_3d_paired,
)
from picture3d.ops.gaussian import draw_gaussians, gaussian_radius
from picture3d.ops.processes import mean_count
from picture3d.structures.detections import DetectedBoxes

_BRANCHES = {"center": 2, "center_z": 1, "dim": 3, "rot": 2, "iou": 1}  # name -> channels; "hm" has one per class
_SMALL_STD = 1e-3


class CenterHeadConfig(FrozenConfig):
    """Head, losses and decoding; the defaults are the published Waymo detector's."""

    kind: Literal["center"] = "center"
    classes: tuple[str, ...] = Field(default=("Vehicle", "Pedestrian", "Cyclist"), description="training classes, in order")
    channels: int = Field(default=64, ge=1, description="width of the shared convolution and of each branch")
    small_start: bool = Field(
        default=False,
        description="begin with branches that say the same everywhere: the noise of the published first weights takes a few "
        "hundred steps to unlearn",
    )
    gaussian_overlap: float = Field(default=0.1, gt=0, lt=1, description="IoU that sets the radius of a peak")
    min_radius: int = Field(default=2, ge=0, description="smallest radius of a peak, in cells")
    neighbours: int = Field(
        default=0,
        ge=0,
        description="rings of cells around a box's own that learn to point to it as well; 0: its own cell only, as published",
    )
    max_boxes: int = Field(default=500, ge=1, description="boxes per frame that are learned from, and that are decoded")
    regression_weight: float = Field(default=2.0, ge=0, description="weight of the L1 loss of the eight regressed numbers")
    iou_weight: float = Field(default=1.0, ge=0, description="weight of the loss of the predicted IoU")
    iou_regression_weight: float = Field(default=2.0, ge=0, description="weight of 1 - DIoU of the decoded boxes")
    score_threshold: float = Field(default=0.1, ge=0, description="peaks below are dropped")
    rectify: tuple[float, ...] = Field(
        default=(0.68, 0.71, 0.65), description="per class a in score^(1-a) * IoU^a; 0 leaves the score as it is"
    )
    nms_thresholds: tuple[float, ...] = Field(default=(0.7, 0.6, 0.55), description="IoU of suppression per class")
    nms_pre_max: int = Field(default=4096, ge=1, description="boxes of a class that suppression looks at")
    nms_post_max: int = Field(default=500, ge=1, description="boxes of a class that it keeps")
    limits: tuple[float, float, float] = Field(default=(80.0, 80.0, 10.0), description="centres further out are dropped, m")
    published_nms_angle: bool = Field(default=True, description="as published: boxes are turned by 90 degrees for suppression")

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("rectify", "nms_thresholds"):
            if len(getattr(self, name)) != len(self.classes):
                raise ValueError(f"{name} needs one number for each of {len(self.classes)} classes")
        return self


@dataclass(frozen=True, slots=True, eq=False)
class CenterMaps:
    """Raw maps, (B, channels, H, W) each; H runs along y, W along x."""

    center: Tensor  # 2: where in its cell the centre is, x and y, in cells
    center_z: Tensor  # 1: metres
    dim: Tensor  # 3: logarithm of length, width, height
    rot: Tensor  # 2: cosine and sine of the heading
    iou: Tensor  # 1: 2 IoU - 1
    hm: Tensor  # one per class, before the sigmoid


@dataclass(frozen=True, slots=True, eq=False)
class CenterTargets:
    """What the maps should be. G' cells learn a box: one for each box, and its neighbours if they are asked to."""

    heatmap: Tensor  # (B, classes, H, W) float32
    code: Tensor  # (G', 8) float32: offset x y, z, logarithms of the sizes, cosine, sine
    box: Tensor  # (G', 7)
    sample: Tensor  # (G',) int64
    cell: Tensor  # (G',) int64: row * W + column


class CenterHead(nn.Module):
    """The head.

    Args:
        in_channels: of the map.
        cell_size: metres along x and y of one cell of the map.
        range_min: metres x and y of the map's corner.
        config: see there.
    """

    def __init__(
        self,
        in_channels: int,
        cell_size: tuple[float, float],
        range_min: tuple[float, float],
        config: CenterHeadConfig | None = None,
    ) -> None:
        super().__init__()
        self.config = config = config or CenterHeadConfig()
        self.cell_size, self.range_min = cell_size, range_min
        self.shared_conv = nn.Sequential(
            nn.Conv2d(in_channels, config.channels, 3, padding=1, bias=False),
            _norm(config.channels),
            nn.ReLU(),
        )
        outputs = {**_BRANCHES, "hm": len(config.classes)}
        self.heads_list = nn.ModuleList(
            [nn.ModuleDict({name: _branch(config.channels, channels) for name, channels in outputs.items()})]
        )
        for name, branch in self._branches.items():
            _initialise(branch, name, config.small_start)

    @property
    def _branches(self) -> nn.ModuleDict:
        branches = self.heads_list[0]
        assert isinstance(branches, nn.ModuleDict)
        return branches

    def forward(self, bev: Tensor) -> CenterMaps:
        """(B, in_channels, H, W) to raw maps."""
        shared = self.shared_conv(bev)
        return CenterMaps(**{name: branch(shared) for name, branch in self._branches.items()})

    def targets(self, boxes: Tensor, classes: Tensor, sample: Tensor, shape: tuple[int, int, int]) -> CenterTargets:
        """Targets of a batch; boxes of class 0, without length or width, or beyond the first `max_boxes` are left out.

        Args:
            boxes: (G, 7+) true boxes.
            classes: (G,) int64, 1-based.
            sample: (G,) int64, ascending.
            shape: samples, H, W.
        """
        size, height, width = shape
        first = torch.searchsorted(sample.contiguous(), sample.contiguous())
        rank = torch.arange(len(sample), device=sample.device) - first
        used = (classes > 0) & (boxes[:, 3] > 0) & (boxes[:, 4] > 0) & (rank < self.config.max_boxes)
        boxes, classes, sample = boxes[used, :7].float(), classes[used], sample[used]
        cell_size = boxes.new_tensor(self.cell_size)
        position = (boxes[:, :2] - boxes.new_tensor(self.range_min)) / cell_size
        position = torch.minimum(position.clamp(min=0), boxes.new_tensor([width - 0.5, height - 0.5]))
        column, row = position.long().unbind(1)
        sides = boxes[:, 3:5] / cell_size
        radius = (
            gaussian_radius(sides[:, 0], sides[:, 1], self.config.gaussian_overlap).long().clamp(min=self.config.min_radius)
        )
        count = len(self.config.classes)
        heatmap = draw_gaussians(row, column, radius, sample * count + classes - 1, (size * count, height, width))
        heatmap = heatmap.view(size, count, height, width)
        box, row, column = _with_neighbours(row, column, self.config.neighbours, (height, width))
        boxes, position, sample = boxes[box], position[box], sample[box]
        offset = position - torch.stack([column, row], 1)
        yaw = boxes[:, 6:7]
        code = torch.cat([offset, boxes[:, 2:3], boxes[:, 3:6].log(), yaw.cos(), yaw.sin()], 1)
        return CenterTargets(heatmap, code, boxes, sample, row * width + column)

    def loss(self, maps: CenterMaps, boxes: Tensor, classes: Tensor, sample: Tensor) -> dict[str, Tensor]:
        """Losses by name, unweighted but for "total": heatmap, regression, iou, iou_regression. Arguments as `targets`."""
        batch, _, height, width = maps.hm.shape
        targets = self.targets(boxes, classes, sample, (batch, height, width))
        code = torch.cat([maps.center, maps.center_z, maps.dim, maps.rot], 1).float()
        found = _at(code, targets)
        predicted = self._boxes(found, targets.cell, width)
        count = mean_count(len(targets.box), code)
        with torch.no_grad():
            true_iou = iou_3d_paired(predicted, targets.box, corner_tolerance=PUBLISHED_TOLERANCE_3D)
        losses = {
            "heatmap": focal_heatmap_loss(maps.hm.float(), targets.heatmap),
            "regression": (found - targets.code).abs().sum() / count,
            "iou": (_at(maps.iou.float(), targets)[:, 0] - (2 * true_iou - 1)).abs().sum() / count,
            "iou_regression": (1 - diou_axis_aligned(predicted, targets.box)).sum() / count,
        }
        config = self.config
        weighted = losses["heatmap"] + config.regression_weight * losses["regression"]
        weighted = weighted + config.iou_weight * losses["iou"] + config.iou_regression_weight * losses["iou_regression"]
        return {"total": weighted, **losses}

    @torch.no_grad()
    def decode(self, maps: CenterMaps) -> list[DetectedBoxes]:
        """The boxes of each sample: peaks, rectified scores, class-wise suppression; ordered by class, then by score."""
        code = torch.cat([maps.center, maps.center_z, maps.dim, maps.rot, maps.iou], 1).float()
        heat = maps.hm.float().sigmoid().flatten(2)  # (B, classes, H * W)
        width = maps.hm.shape[3]
        found = []
        for sample in range(len(heat)):
            most = min(self.config.max_boxes, heat.shape[2])
            scores, cells = heat[sample].topk(most, dim=1)
            scores, best = scores.flatten().topk(min(self.config.max_boxes, scores.numel()))
            labels, cells = torch.div(best, most, rounding_mode="floor"), cells.flatten()[best]
            values = code[sample].flatten(1)[:, cells].T
            found.append(self._suppressed(self._boxes(values[:, :8], cells, width), scores, labels, values[:, 8]))
        return found

    def _suppressed(self, boxes: Tensor, scores: Tensor, labels: Tensor, iou: Tensor) -> DetectedBoxes:
        config = self.config
        kept = (scores > config.score_threshold) & (boxes[:, :3].abs() <= boxes.new_tensor(config.limits)).all(1)
        boxes, scores, labels, iou = boxes[kept], scores[kept], labels[kept], iou[kept]
        share = boxes.new_tensor(config.rectify)[labels]
        scores = scores ** (1 - share) * ((iou + 1) / 2).clamp(0, 1) ** share
        order = classwise_nms(
            boxes,
            scores,
            labels,
            config.nms_thresholds,
            pre_max=config.nms_pre_max,
            post_max=config.nms_post_max,
            corner_tolerance=PUBLISHED_TOLERANCE_BEV,
            quarter_turn=config.published_nms_angle,
        )
        return DetectedBoxes(boxes[order], scores[order], labels[order] + 1)

    def _boxes(self, code: Tensor, cell: Tensor, width: int) -> Tensor:
        """(K, 7) boxes of (K, 8) codes at (K,) cells."""
        corner = torch.stack([cell % width, torch.div(cell, width, rounding_mode="floor")], 1)
        center = (corner + code[:, :2]) * code.new_tensor(self.cell_size) + code.new_tensor(self.range_min)
        yaw = torch.atan2(code[:, 7], code[:, 6])[:, None]
        return torch.cat([center, code[:, 2:3], code[:, 3:6].exp(), yaw], 1)


def focal_heatmap_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Penalty-reduced focal loss, exponents 2 and 4, over the number of cells whose target is exactly 1 (CornerNet, eq. 1).

    Without such a cell only the negative part is left, undivided.
    """
    share = logits.sigmoid().clamp(1e-4, 1 - 1e-4)
    peak = target == 1
    positive = (share.log() * (1 - share).square())[peak].sum()
    negative = ((1 - share).log() * share.square() * (1 - target) ** 4)[~peak].sum()
    return -(positive + negative) / mean_count(peak.sum(), logits)


def _with_neighbours(row: Tensor, column: Tensor, rings: int, shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Which of G cells, and row and column, for each cell of the squares around them that lies on a map of `shape`."""
    step = torch.arange(-rings, rings + 1, device=row.device)
    rows = (row[:, None, None] + step[:, None]).expand(-1, -1, len(step))
    columns = (column[:, None, None] + step).expand(-1, len(step), -1)
    inside = (rows >= 0) & (rows < shape[0]) & (columns >= 0) & (columns < shape[1])
    return inside.nonzero()[:, 0], rows[inside], columns[inside]


def _at(maps: Tensor, targets: CenterTargets) -> Tensor:
    """(G', channels) of (B, channels, H, W) at the boxes' cells."""
    return maps.flatten(2)[targets.sample, :, targets.cell]


def _branch(channels: int, out_channels: int) -> nn.Sequential:
    hidden = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), _norm(channels), nn.ReLU())
    return nn.Sequential(hidden, nn.Conv2d(channels, out_channels, 3, padding=1))


def _initialise(branch: nn.Module, name: str, small: bool) -> None:
    """First weights as published: PyTorch's own for the heat map, Kaiming's for the others; or next to nothing at the end."""
    first, last = branch.get_submodule("0.0"), branch.get_submodule("1")
    assert isinstance(first, nn.Conv2d)
    assert isinstance(last, nn.Conv2d)
    assert last.bias is not None
    if name != "hm":
        for conv in (first, last):
            nn.init.kaiming_normal_(conv.weight)
    if small:
        nn.init.normal_(last.weight, std=_SMALL_STD)
    nn.init.constant_(last.bias, -2.19 if name == "hm" else 0.0)  # a tenth of the cells look like peaks, to begin with


def _norm(channels: int) -> MapBatchNorm:
    return MapBatchNorm(channels, eps=1e-3, momentum=0.01)  # as published
