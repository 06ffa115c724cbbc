"""TransFusion head: proposals from a heat map look around themselves once and become boxes (the nuScenes detector).

State-dict keys are those below ``dense_head.`` of OpenPCDet checkpoints. Source: TransFusion (Bai et al., CVPR 2022) as DSVT
trains it on LiDAR alone. The map comes as (y, x) and is used as (x, y): x is the slow axis of every flat index here.

What published numbers depend on is kept, each behind a switch of :class:`TransFusionConfig`: neighbours wrap around the
map's border, no suppressed class proposes on the border, matching takes centres for bottoms, and the predicted IoU is
trained on boxes that are moved up by half their height.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from picture3d.config import FrozenConfig
from picture3d.models.center_head import focal_heatmap_loss
from picture3d.models.row_norm import MapBatchNorm, SequenceBatchNorm
from picture3d.models.transfusion_decoder import LocalDecoder, positions_of
from picture3d.models.transfusion_targets import MapFrame, MatchingCosts, TransFusionTargets, assign, decode_boxes
from picture3d.ops.box_iou import PUBLISHED_TOLERANCE_3D, PUBLISHED_TOLERANCE_BEV, classwise_nms, iou_3d_paired
from picture3d.ops.processes import mean_count
from picture3d.structures.detections import DetectedBoxes

_BRANCHES = {"center": 2, "height": 1, "dim": 3, "rot": 2, "vel": 2, "iou": 1}  # name -> channels; "heatmap": one per class
_NUSCENES = (
    "car",
    "truck",
    "construction_vehicle",
    "bus",
    "trailer",
    "barrier",
    "motorcycle",
    "bicycle",
    "pedestrian",
    "traffic_cone",
)


class TransFusionConfig(FrozenConfig):
    """Head, losses and decoding; the defaults are the published nuScenes detector's."""

    kind: Literal["transfusion"] = "transfusion"
    classes: tuple[str, ...] = Field(default=_NUSCENES, min_length=1, description="training classes, in order")
    channels: int = Field(default=256, ge=1, description="width of the head")
    branch_channels: int = Field(default=64, ge=1, description="width of a prediction branch")
    heads: int = Field(default=8, ge=1, description="heads of attention")
    ffn_channels: int = Field(default=256, ge=1, description="hidden width of the decoder's feed-forward part")
    proposals: int = Field(default=200, ge=1, description="proposals per frame; fewer if the map has fewer places")
    radius: int = Field(default=20, ge=0, description="cells in each direction that a proposal attends to")
    small_classes: tuple[str, ...] = Field(
        default=("pedestrian", "traffic_cone"), description="classes that propose at every cell, not at local maxima only"
    )
    wrap_neighbours: bool = Field(
        default=True, description="as published: beyond the border along y a proposal attends to cells of the adjacent row"
    )
    silent_border: bool = Field(default=True, description="as published: no local maximum on the outermost ring of cells")
    centres_as_bottoms: bool = Field(default=True, description="as published: matching takes the centre z for the bottom")
    tops_as_centres: bool = Field(default=True, description="as published: the IoU loss takes the top z for the centre")
    gaussian_overlap: float = Field(default=0.1, gt=0, lt=1, description="IoU that sets the radius of a peak")
    min_radius: int = Field(default=2, ge=0, description="smallest radius of a peak, in cells")
    match_classification: float = Field(default=0.15, ge=0, description="weight of the class in matching")
    match_regression: float = Field(default=0.25, ge=0, description="weight of the distance in matching")
    match_iou: float = Field(default=0.25, ge=0, description="weight of the overlap in matching")
    heatmap_weight: float = Field(default=1.0, ge=0, description="weight of the dense heat map's loss")
    classification_weight: float = Field(default=1.0, ge=0, description="weight of the proposals' class loss")
    box_weight: float = Field(default=0.25, ge=0, description="weight of the L1 loss of the encoded boxes")
    velocity_weight: float = Field(default=0.2, ge=0, description="weight of velocity inside of the box loss")
    iou_weight: float = Field(default=0.5, ge=0, description="weight of the loss of the predicted IoU")
    score_threshold: float = Field(default=0.0, ge=0, description="proposals at or below are dropped, before rectification")
    rectify: float = Field(default=0.5, ge=0, le=1, description="a in score^(1-a) * IoU^a; 0 leaves the score as it is")
    nms_thresholds: tuple[float, ...] = Field(
        default=(0.0,) * 8 + (0.175, 0.175), description="IoU of suppression per class; 0 = none"
    )
    nms_pre_max: int = Field(default=1000, ge=1, description="boxes of a class that suppression looks at")
    nms_post_max: int = Field(default=100, ge=1, description="boxes of a class that it keeps")
    limits: tuple[float, float, float] = Field(default=(61.2, 61.2, 10.0), description="centres further out are dropped, m")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.nms_thresholds) != len(self.classes):
            raise ValueError(f"nms_thresholds needs one number for each of {len(self.classes)} classes")
        if unknown := set(self.small_classes) - set(self.classes):
            raise ValueError(f"small_classes names {sorted(unknown)}, which classes does not")
        if self.channels % self.heads:
            raise ValueError(f"channels {self.channels} do not divide into {self.heads} heads")
        return self


@dataclass(frozen=True, slots=True, eq=False)
class TransFusionOutput:
    """Raw outputs for B samples of P proposals."""

    center: Tensor  # (B, 2, P) x and y, in cells of the map
    height: Tensor  # (B, 1, P) z of the top, metres
    dim: Tensor  # (B, 3, P) logarithm of length, width, height
    rot: Tensor  # (B, 2, P) sine and cosine of the yaw
    vel: Tensor  # (B, 2, P) m/s
    iou: Tensor  # (B, 1, P) 2 IoU - 1
    heatmap: Tensor  # (B, classes, P) before the sigmoid
    query_heatmap_score: Tensor  # (B, classes, P) dense heat, local maxima only, at the proposals' cells
    query_labels: Tensor  # (B, P) int64 0-based class that each was proposed as
    dense_heatmap: Tensor  # (B, classes, X, Y) before the sigmoid

    @property
    def code(self) -> Tensor:
        """(B, P, 10) float32: the encoded boxes, in the order of the targets."""
        return torch.cat([self.center, self.height, self.dim, self.rot, self.vel], 1).transpose(1, 2).float()


class TransFusionHead(nn.Module):
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
        config: TransFusionConfig | None = None,
    ) -> None:
        super().__init__()
        self.config = config = config or TransFusionConfig()
        self.cell_size, self.range_min = cell_size, range_min
        width, classes = config.channels, len(config.classes)
        self.shared_conv = nn.Conv2d(in_channels, width, 3, padding=1)
        self.heatmap_head = nn.Sequential(_ConvBlock(width), nn.Conv2d(width, classes, 3, padding=1))
        self.class_encoding = nn.Conv1d(classes, width, 1)
        self.decoder = LocalDecoder(width, config.heads, config.ffn_channels, config.radius, config.wrap_neighbours)
        outputs = {**_BRANCHES, "heatmap": classes}
        self.prediction_head = nn.ModuleDict(
            {name: _branch(width, config.branch_channels, channels) for name, channels in outputs.items()}
        )
        last = self.prediction_head.get_submodule("heatmap.1")
        assert isinstance(last, nn.Conv1d)
        assert last.bias is not None
        nn.init.constant_(last.bias, -2.19)  # as published; the dense map keeps the default

    def forward(self, bev: Tensor) -> TransFusionOutput:
        """(B, in_channels, H, W) to raw outputs; H runs along y, W along x."""
        cells, dense = self.convolutions(bev)
        return self.proposals(cells, dense)

    def convolutions(self, bev: Tensor) -> tuple[Tensor, Tensor]:
        """The dense part: cells (B, D, X, Y) and heat map (B, classes, X, Y) before the sigmoid."""
        block, last = self.heatmap_head
        assert isinstance(block, _ConvBlock)
        assert isinstance(last, nn.Conv2d)
        cells = _turned_conv(self.shared_conv, bev)
        dense = _turned_conv(last, F.relu(block.bn(_turned_conv(block.conv, cells)), inplace=True))
        return cells.transpose(2, 3), dense.transpose(2, 3)

    def proposals(self, cells: Tensor, dense: Tensor) -> TransFusionOutput:
        """The rest: from the dense part to raw outputs."""
        heat = self._peaks(dense.detach().float().sigmoid()).flatten(2)  # (B, classes, X Y)
        places = heat.shape[2]
        best = heat.flatten(1).topk(min(self.config.proposals, heat.shape[1] * places), dim=1).indices
        label, place = torch.div(best, places, rounding_mode="floor"), best % places
        sample = torch.arange(len(place), device=place.device)[:, None]
        size_y = cells.shape[3]
        query = cells.permute(0, 2, 3, 1)[sample, torch.div(place, size_y, rounding_mode="floor"), place % size_y]
        one_hot = F.one_hot(label, heat.shape[1]).to(query.dtype).transpose(1, 2)
        query = query + self.class_encoding(one_hot).transpose(1, 2)
        found = self.decoder(cells, query, place).transpose(1, 2)
        outputs = {name: branch(found) for name, branch in self.prediction_head.items()}
        position = positions_of(place.flatten(), size_y, outputs["center"]).view(*place.shape, 2)
        outputs["center"] = outputs["center"] + position.transpose(1, 2)
        score = heat.gather(2, place[:, None].expand(-1, heat.shape[1], -1))
        return TransFusionOutput(**outputs, query_heatmap_score=score, query_labels=label, dense_heatmap=dense)

    def targets(self, output: TransFusionOutput, boxes: Tensor, classes: Tensor, sample: Tensor) -> TransFusionTargets:
        """Targets of a batch; arguments and errors as :meth:`loss`."""
        config = self.config
        costs = MatchingCosts(config.match_classification, config.match_regression, config.match_iou, config.centres_as_bottoms)
        return assign(
            output.code,
            output.heatmap.transpose(1, 2),
            (boxes, classes, sample),
            self._frame(output),
            costs,
            (config.gaussian_overlap, config.min_radius),
        )

    def loss(self, output: TransFusionOutput, boxes: Tensor, classes: Tensor, sample: Tensor) -> dict[str, Tensor]:
        """Losses by name, unweighted but for "total": heatmap, classification, box, iou.

        Args:
            output: of the network.
            boxes: (G, 9) true boxes.
            classes: (G,) int64, 1-based; 0 and boxes without length or width are left out.
            sample: (G,) int64.

        Raises:
            TrainingError: if a proposal is NaN or infinite.
        """
        config = self.config
        targets = self.targets(output, boxes, classes, sample)
        matched = targets.matched
        count = mean_count(matched.sum(), output.center)
        code = output.code
        weight = code.new_tensor([1.0] * 8 + [config.velocity_weight] * 2)
        named = F.one_hot(targets.labels, len(config.classes) + 1)[..., :-1].to(code.dtype)
        losses = {
            "heatmap": focal_heatmap_loss(output.dense_heatmap.float(), targets.heatmap),
            "classification": _sigmoid_focal(output.heatmap.transpose(1, 2).float(), named) / count,
            "box": ((code[matched] - targets.code[matched]).abs() * weight).sum() / count,
            "iou": self._iou_loss(output, code.detach(), targets),
        }
        total = config.heatmap_weight * losses["heatmap"] + config.classification_weight * losses["classification"]
        return {"total": total + config.box_weight * losses["box"] + config.iou_weight * losses["iou"], **losses}

    @torch.no_grad()
    def decode(self, output: TransFusionOutput) -> list[DetectedBoxes]:
        """(K, 9) boxes of each sample, in the order of the proposals."""
        config = self.config
        label = output.query_labels
        boxes = decode_boxes(output.code, self._frame(output))
        chosen = label[:, None]
        score = (output.heatmap.float().sigmoid() * output.query_heatmap_score).gather(1, chosen)[:, 0]
        kept = (score > config.score_threshold) & (boxes[..., :3].abs() <= boxes.new_tensor(config.limits)).all(2)
        iou = ((output.iou[:, 0].float() + 1) / 2).clamp(0, 1)
        score = score ** (1 - config.rectify) * iou**config.rectify
        found = []
        for index in range(len(boxes)):
            rows = self._suppressed(boxes[index], score[index], label[index], kept[index].nonzero()[:, 0])
            found.append(DetectedBoxes(boxes[index, rows], score[index, rows], label[index, rows] + 1))
        return found

    def _peaks(self, heat: Tensor) -> Tensor:
        """`heat` where it is a local maximum over 3 x 3 cells, else 0; small classes everywhere."""
        if self.config.silent_border:
            largest = torch.zeros_like(heat)  # the border is compared with 0
            if min(heat.shape[2:]) >= 3:
                largest[:, :, 1:-1, 1:-1] = F.max_pool2d(heat, 3, stride=1)
        else:
            largest = F.max_pool2d(heat, 3, stride=1, padding=1)
        small = [index for index, name in enumerate(self.config.classes) if name in self.config.small_classes]
        largest[:, small] = heat[:, small]
        return heat * (heat == largest)

    def _iou_loss(self, output: TransFusionOutput, code: Tensor, targets: TransFusionTargets) -> Tensor:
        """L1 over matched proposals that overlap their box at all."""
        frame = self._frame(output)
        said, true = code[targets.matched], targets.code[targets.matched]
        pair = [decode_boxes(side, frame) for side in (said, true)]
        if self.config.tops_as_centres:
            pair = [torch.cat([b[:, :2], side[:, 2:3], b[:, 3:]], 1) for b, side in zip(pair, (said, true), strict=True)]
        overlap = iou_3d_paired(pair[0], pair[1], corner_tolerance=PUBLISHED_TOLERANCE_3D).clamp(0, 1)
        met = overlap > 0
        error = (output.iou[:, 0].float()[targets.matched] - (2 * overlap - 1)).abs()
        return (error * met).sum() / mean_count(met.sum(), error)

    def _suppressed(self, boxes: Tensor, score: Tensor, label: Tensor, rows: Tensor) -> Tensor:
        """The ones of `rows` that stay, ascending."""
        kept = classwise_nms(
            boxes[rows],
            score[rows],
            label[rows],
            self.config.nms_thresholds,
            pre_max=self.config.nms_pre_max,
            post_max=self.config.nms_post_max,
            corner_tolerance=PUBLISHED_TOLERANCE_BEV,
        )
        return rows[kept].sort().values

    def _frame(self, output: TransFusionOutput) -> MapFrame:
        size_x, size_y = output.dense_heatmap.shape[2:]
        return MapFrame(self.cell_size, self.range_min, (size_x, size_y))


class _ConvBlock(nn.Module):
    """Convolution and norm before a ReLU; a module of its own for the names of its parameters."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn = MapBatchNorm(channels)


def _turned_conv(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """What `conv` says of the (x, y) map, for a map that is kept as (y, x): the kernel is turned, not the map."""
    return F.conv2d(x, conv.weight.transpose(2, 3), conv.bias, padding=1)


def _branch(channels: int, hidden: int, out_channels: int) -> nn.Sequential:
    first = nn.Sequential(nn.Conv1d(channels, hidden, 1), SequenceBatchNorm(hidden), nn.ReLU())
    return nn.Sequential(first, nn.Conv1d(hidden, out_channels, 1))


def _sigmoid_focal(logits: Tensor, target: Tensor) -> Tensor:
    """Summed focal loss, alpha 0.25, gamma 2 (Lin et al., Focal Loss, ICCV 2017, eq. 5)."""
    share = logits.sigmoid()
    wrong = target * (1 - share) + (1 - target) * share
    alpha = 0.25 * target + 0.75 * (1 - target)
    return (alpha * wrong.square() * F.binary_cross_entropy_with_logits(logits, target, reduction="none")).sum()
