"""What the proposals of a TransFusion head should have said: Hungarian matching, encoded boxes, heat maps.

Source: TransFusion (Bai et al., CVPR 2022), section 3.4, and DSVT's settings of it. The map is (x, y): x is the slow axis.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from picture3d.errors import TrainingError
from picture3d.ops.box_iou import PUBLISHED_TOLERANCE_3D, iou_3d
from picture3d.ops.gaussian import draw_gaussians, gaussian_radius


@dataclass(frozen=True, slots=True, eq=False)
class MapFrame:
    """Where the map lies: metres of a cell and of the corner, both x and y, and cells along x and y."""

    cell_size: tuple[float, float]
    corner: tuple[float, float]
    shape: tuple[int, int]


@dataclass(frozen=True, slots=True, eq=False)
class MatchingCosts:
    """Weights of the three costs, and whether heights are taken from z upwards although z is the centre (as published)."""

    classification: float
    regression: float
    iou: float
    centres_as_bottoms: bool


@dataclass(frozen=True, slots=True, eq=False)
class TransFusionTargets:
    """What the outputs should be, for B samples of P proposals."""

    labels: Tensor  # (B, P) int64: 0-based class of the matched box; the number of classes for background
    matched: Tensor  # (B, P) bool
    code: Tensor  # (B, P, 10) float32: x y (cells), z of the top, log sizes, sine, cosine, velocity; 0 if unmatched
    iou: Tensor  # (B, P) float32 overlap with the matched box as matching sees it; 0 if unmatched
    heatmap: Tensor  # (B, classes, X, Y) float32


def encode_boxes(boxes: Tensor, frame: MapFrame) -> Tensor:
    """(G, 10) codes of (G, 9) boxes."""
    center = (boxes[:, :2] - boxes.new_tensor(frame.corner)) / boxes.new_tensor(frame.cell_size)
    top, yaw = boxes[:, 2:3] + boxes[:, 5:6] / 2, boxes[:, 6:7]
    return torch.cat([center, top, boxes[:, 3:6].log(), yaw.sin(), yaw.cos(), boxes[:, 7:9]], 1)


def decode_boxes(code: Tensor, frame: MapFrame) -> Tensor:
    """(..., 9) boxes of (..., 10) codes."""
    center = code[..., :2] * code.new_tensor(frame.cell_size) + code.new_tensor(frame.corner)
    size = code[..., 3:6].exp()
    yaw = torch.atan2(code[..., 6:7], code[..., 7:8])
    return torch.cat([center, code[..., 2:3] - size[..., 2:3] / 2, size, yaw, code[..., 8:10]], -1)


def match(
    boxes: Tensor, logits: Tensor, true_boxes: Tensor, true_class: Tensor, frame: MapFrame, costs: MatchingCosts
) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of proposals and true boxes with the least total cost: proposal rows (ascending), box rows, their overlaps.

    Args:
        boxes: (P, 9) decoded proposals.
        logits: (P, classes).
        true_boxes: (G, 9), G may be 0.
        true_class: (G,) int64, 0-based.
        frame: of the map.
        costs: see there.

    Raises:
        TrainingError: if a proposal is not finite: the network has diverged.
    """
    from scipy.optimize import linear_sum_assignment  # late: only training needs it

    if not (torch.isfinite(boxes).all() and torch.isfinite(logits).all()):
        raise TrainingError("a proposal is NaN or infinite: the network has diverged; lower the rate or clip gradients")
    if not len(true_boxes) or not len(boxes):
        nothing = torch.zeros(0, dtype=torch.int64, device=boxes.device)
        return nothing, nothing, boxes.new_zeros(0)
    extent = boxes.new_tensor([cells * side for cells, side in zip(frame.shape, frame.cell_size, strict=True)])
    regression = (boxes[:, None, :2] - true_boxes[None, :, :2]).abs().div(extent).sum(2)
    overlap = iou_3d(
        _for_overlap(boxes, costs.centres_as_bottoms),
        _for_overlap(true_boxes, costs.centres_as_bottoms),
        corner_tolerance=PUBLISHED_TOLERANCE_3D,
    )
    cost = costs.classification * _focal_cost(logits)[:, true_class] + costs.regression * regression - costs.iou * overlap
    proposal, true = linear_sum_assignment(cost.double().cpu().numpy())
    proposal, true = (torch.from_numpy(np.asarray(rows, np.int64)).to(boxes.device) for rows in (proposal, true))
    return proposal, true, overlap[proposal, true].clamp(0, 1)


def assign(
    code: Tensor,
    logits: Tensor,
    true: tuple[Tensor, Tensor, Tensor],
    frame: MapFrame,
    costs: MatchingCosts,
    radius: tuple[float, int],
) -> TransFusionTargets:
    """Targets of a batch. Boxes of class 0, or without length or width, are left out; without any, all is background.

    Args:
        code: (B, P, 10) what the proposals say; no gradient goes through.
        logits: (B, P, classes).
        true: boxes (G, 9), classes (G,) int64 1-based, samples (G,) int64.
        frame: of the map.
        costs: of matching.
        radius: overlap that sets the radius of a peak, and the least radius in cells.

    Raises:
        TrainingError: as :func:`match`.
    """
    batch, proposals, classes = logits.shape
    boxes, box_class, sample = true
    used = (box_class > 0) & (boxes[:, 3] > 0) & (boxes[:, 4] > 0)
    boxes, box_class, sample = boxes[used].float(), box_class[used] - 1, sample[used]
    code, logits = code.detach().float(), logits.detach().float()
    decoded = decode_boxes(code, frame)
    labels = torch.full((batch, proposals), classes, dtype=torch.int64, device=code.device)
    targets, iou = torch.zeros_like(code), code.new_zeros(batch, proposals)
    encoded = encode_boxes(boxes, frame)
    for index in range(batch):
        rows = (sample == index).nonzero()[:, 0]
        proposal, pick, overlap = match(decoded[index], logits[index], boxes[rows], box_class[rows], frame, costs)
        labels[index, proposal] = box_class[rows[pick]]
        targets[index, proposal] = encoded[rows[pick]]
        iou[index, proposal] = overlap
    heatmap = _heatmap(boxes, box_class + sample * classes, batch * classes, frame, radius)
    return TransFusionTargets(labels, labels < classes, targets, iou, heatmap.view(batch, classes, *frame.shape))


def _heatmap(boxes: Tensor, plane: Tensor, planes: int, frame: MapFrame, radius: tuple[float, int]) -> Tensor:
    cell_size = boxes.new_tensor(frame.cell_size)
    x, y = ((boxes[:, :2] - boxes.new_tensor(frame.corner)) / cell_size).long().unbind(1)
    sides = boxes[:, 3:5] / cell_size
    overlap, least = radius
    reach = gaussian_radius(sides[:, 1], sides[:, 0], overlap).long().clamp(min=least)
    return draw_gaussians(x, y, reach, plane, (planes, *frame.shape))


def _focal_cost(logits: Tensor) -> Tensor:
    """(P, classes): what naming a class costs over not naming it (alpha 0.25, gamma 2)."""
    share = logits.sigmoid()
    named = -(share + 1e-12).log() * 0.25 * (1 - share).square()
    unnamed = -(1 - share + 1e-12).log() * 0.75 * share.square()
    return named - unnamed


def _for_overlap(boxes: Tensor, centres_as_bottoms: bool) -> Tensor:
    if not centres_as_bottoms:
        return boxes
    return torch.cat([boxes[:, :2], boxes[:, 2:3] + boxes[:, 5:6] / 2, boxes[:, 3:]], 1)
