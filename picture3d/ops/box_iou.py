"""Overlap of oriented boxes, suppression of overlapping ones, and points inside of boxes.

A box is a row x, y, z (centre), length, width, height (m), yaw (rad, counter-clockwise from x); further columns are ignored.
Seen from above two boxes meet in a convex polygon of at most eight corners: crossings of their sides, and corners of one
inside of the other. Pairs whose circumscribed circles are apart are never looked at, so cost and memory follow the pairs that
can meet, not the product of the two counts.

`corner_tolerance` is part of the public CUDA kernels: a corner counts as inside up to so far outside of a side. They use
1e-2 m for 3-D overlaps (`PUBLISHED_TOLERANCE_3D`; boxes with a gap below a centimetre still overlap slightly) and 1e-5 m for
suppression (`PUBLISHED_TOLERANCE_BEV`). 0, the default, is the true geometry: the area is then an integral over the sides of
one box inside of the other, which needs no corners, no sorting and a fifth of the time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

PUBLISHED_TOLERANCE_3D = 1e-2
PUBLISHED_TOLERANCE_BEV = 1e-5
_PAIRS_AT_ONCE = 1 << 12  # intermediate values stay in cache
_CELLS_AT_ONCE = 1 << 22


def bev_overlap(a: Tensor, b: Tensor, *, corner_tolerance: float = 0.0) -> Tensor:
    """(N, M) m²: area shared by each of N and each of M boxes seen from above. Computed in float64, returned as `a`'s dtype.

    Raises:
        ValueError: if an argument has fewer than 7 columns, or holds NaN or infinity.
    """
    a64, b64 = _checked("a", a), _checked("b", b)
    out = a64.new_zeros(len(a64), len(b64))
    rows, columns = _near_pairs(a64, b64, corner_tolerance)
    for start in range(0, len(rows), _PAIRS_AT_ONCE):
        i, j = rows[start : start + _PAIRS_AT_ONCE], columns[start : start + _PAIRS_AT_ONCE]
        out[i, j] = _overlap_of_pairs(a64[i], b64[j], corner_tolerance)
    return out.to(a.dtype)


def bev_iou(a: Tensor, b: Tensor, *, corner_tolerance: float = 0.0) -> Tensor:
    """(N, M) intersection over union seen from above, 0 where a union is empty. Arguments as :func:`bev_overlap`."""
    shared = bev_overlap(a, b, corner_tolerance=corner_tolerance)
    area_a, area_b = _area(a)[:, None], _area(b)[None, :]
    return _ratio(shared, area_a + area_b - shared)


def iou_3d(a: Tensor, b: Tensor, *, corner_tolerance: float = 0.0) -> Tensor:
    """(N, M) intersection over union of volumes. Arguments as :func:`bev_overlap`."""
    height = _shared_height(a[:, None], b[None, :])
    shared = bev_overlap(a, b, corner_tolerance=corner_tolerance) * height
    return _ratio(shared, _volume(a)[:, None] + _volume(b)[None, :] - shared)


def iou_3d_paired(a: Tensor, b: Tensor, *, corner_tolerance: float = 0.0) -> Tensor:
    """(N,) intersection over union of volumes of row i of `a` with row i of `b`.

    Raises:
        ValueError: if they differ in length, have fewer than 7 columns, or hold NaN or infinity.
    """
    if len(a) != len(b):
        raise ValueError(f"a has {len(a)} boxes, b has {len(b)}: pairs need as many")
    area = _overlap_of_pairs(_checked("a", a), _checked("b", b), corner_tolerance).to(a.dtype)
    shared = area * _shared_height(a, b)
    return _ratio(shared, _volume(a) + _volume(b) - shared)


def diou_axis_aligned(a: Tensor, b: Tensor) -> Tensor:
    """(N,) distance-IoU of row i of `a` with row i of `b`, yaw ignored; differentiable, in [-1, 1].

    IoU of the axis-aligned volumes minus the squared distance of the centres over the squared diagonal of the smallest
    axis-aligned box around both (Zheng et al., Distance-IoU Loss, AAAI 2020, carried to three dimensions).
    """
    low = torch.maximum(a[:, :3] - a[:, 3:6] / 2, b[:, :3] - b[:, 3:6] / 2)
    high = torch.minimum(a[:, :3] + a[:, 3:6] / 2, b[:, :3] + b[:, 3:6] / 2)
    shared = (high - low).clamp(min=0).prod(1)
    outer_low = torch.minimum(a[:, :3] - a[:, 3:6] / 2, b[:, :3] - b[:, 3:6] / 2)
    outer_high = torch.maximum(a[:, :3] + a[:, 3:6] / 2, b[:, :3] + b[:, 3:6] / 2)
    diagonal = (outer_high - outer_low).clamp(min=0).square().sum(1)
    distance = (a[:, :3] - b[:, :3]).square().sum(1)
    iou = _ratio(shared, _volume(a) + _volume(b) - shared)
    return (iou - _ratio(distance, diagonal)).clamp(-1.0, 1.0)


def rotated_nms(
    boxes: Tensor,
    scores: Tensor,
    threshold: float,
    *,
    pre_max: int | None = None,
    post_max: int | None = None,
    corner_tolerance: float = 0.0,
) -> Tensor:
    """(K,) int64 rows that stay, best first: a box goes if a better one that stays covers it by more than `threshold` IoU.

    Seen from above. Equal scores keep the order of their rows. Boxes without area suppress nothing and are not suppressed.

    Args:
        boxes: (N, 7+).
        scores: (N,).
        threshold: IoU above which the worse of two boxes goes.
        pre_max: look at so many of the best only.
        post_max: keep at most so many.
        corner_tolerance: see the module.

    Raises:
        ValueError: if a score or a box is not finite, or the lengths differ.
    """
    if len(boxes) != len(scores):
        raise ValueError(f"scores must be as many as boxes, got {len(scores)} for {len(boxes)}")
    if not torch.isfinite(scores).all():
        raise ValueError("scores must be finite, one is NaN or infinite")
    order = torch.argsort(scores, descending=True, stable=True)[:pre_max]
    ranked = _checked("boxes", boxes)[order]
    better, worse = _near_pairs(ranked, ranked, corner_tolerance, later_only=True)
    overlapping = torch.zeros(len(better), dtype=torch.bool, device=boxes.device)
    area = _area(ranked)
    for start in range(0, len(better), _PAIRS_AT_ONCE):
        i, j = better[start : start + _PAIRS_AT_ONCE], worse[start : start + _PAIRS_AT_ONCE]
        shared = _overlap_of_pairs(ranked[i], ranked[j], corner_tolerance)
        overlapping[start : start + len(i)] = _ratio(shared, area[i] + area[j] - shared) > threshold
    keep = _suppress(better[overlapping], worse[overlapping], len(ranked))
    return order[keep][:post_max]


def classwise_nms(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    thresholds: Sequence[float],
    *,
    pre_max: int | None = None,
    post_max: int | None = None,
    corner_tolerance: float = 0.0,
    quarter_turn: bool = False,
) -> Tensor:
    """(K,) int64 rows that stay when boxes suppress those of their own class only: class by class, best first in each.

    Args:
        boxes: (N, 7+).
        scores: (N,).
        labels: (N,) int64 class, 0-based.
        thresholds: IoU per class, see `rotated_nms`; a class with 0 is not suppressed.
        pre_max: look at so many of the best of a class only, if it is suppressed.
        post_max: keep at most so many of a class, if it is suppressed.
        corner_tolerance: see the module.
        quarter_turn: as published for CenterHead: every box is turned by 90 degrees about its centre before overlaps are taken.

    Raises:
        ValueError: as `rotated_nms`.
    """
    if quarter_turn:
        boxes = torch.cat([boxes[:, :6], boxes[:, 6:7] + math.pi / 2], 1)
    rows = []
    for label, threshold in enumerate(thresholds):
        members = (labels == label).nonzero()[:, 0]
        if threshold <= 0:
            rows.append(members[torch.argsort(scores[members], descending=True, stable=True)])
            continue
        kept = rotated_nms(
            boxes[members],
            scores[members],
            threshold,
            pre_max=pre_max,
            post_max=post_max,
            corner_tolerance=corner_tolerance,
        )
        rows.append(members[kept])
    return torch.cat(rows) if rows else labels.new_zeros(0)


def points_in_boxes(points: Tensor, boxes: Tensor) -> Tensor:
    """(N,) int64: the first box that holds each of (N, 3+) points, faces included; -1 where none does.

    Memory is bounded whatever the product of the counts.

    Raises:
        ValueError: if a box is not finite or has fewer than 7 columns.
    """
    checked = _checked("boxes", boxes).to(points.dtype)
    found = torch.full((len(points),), -1, dtype=torch.int64, device=points.device)
    if not len(checked):
        return found
    cos, sin = torch.cos(checked[:, 6]), torch.sin(checked[:, 6])
    half = checked[:, 3:6] / 2
    step = max(1, _CELLS_AT_ONCE // len(checked))
    for start in range(0, len(points), step):
        offset = points[start : start + step, None, :3] - checked[None, :, :3]
        along = offset[..., 0] * cos + offset[..., 1] * sin
        across = offset[..., 1] * cos - offset[..., 0] * sin
        inside = (along.abs() <= half[:, 0]) & (across.abs() <= half[:, 1]) & (offset[..., 2].abs() <= half[:, 2])
        first = inside.to(torch.uint8).argmax(1)
        found[start : start + step] = torch.where(inside.any(1), first, -1)
    return found


def bev_corners(boxes: Tensor) -> Tensor:
    """(N, 4, 2) metres: corners seen from above, counter-clockwise from front left."""
    signs = boxes.new_tensor([[1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]])
    local = signs * boxes[:, None, 3:5] / 2
    cos, sin = torch.cos(boxes[:, 6, None]), torch.sin(boxes[:, 6, None])
    x = local[..., 0] * cos - local[..., 1] * sin
    y = local[..., 0] * sin + local[..., 1] * cos
    return torch.stack([x, y], -1) + boxes[:, None, :2]


def _checked(name: str, boxes: Tensor) -> Tensor:
    if boxes.ndim != 2 or boxes.shape[1] < 7:
        raise ValueError(f"{name} must be (N, 7) or wider: x y z length width height yaw; it is {tuple(boxes.shape)}")
    exact = boxes[:, :7].detach().double()
    if not torch.isfinite(exact).all():
        raise ValueError(
            f"{name} must be finite: box {int((~torch.isfinite(exact)).any(1).nonzero()[0])} holds NaN or infinity"
        )
    return exact


def _area(boxes: Tensor) -> Tensor:
    return boxes[..., 3] * boxes[..., 4]


def _volume(boxes: Tensor) -> Tensor:
    return boxes[..., 3] * boxes[..., 4] * boxes[..., 5]


def _shared_height(a: Tensor, b: Tensor) -> Tensor:
    low = torch.maximum(a[..., 2] - a[..., 5] / 2, b[..., 2] - b[..., 5] / 2)
    high = torch.minimum(a[..., 2] + a[..., 5] / 2, b[..., 2] + b[..., 5] / 2)
    return (high - low).clamp(min=0)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """`part` over `whole`, 0 where `whole` is; the gradient stays finite there."""
    positive = whole > 0
    return torch.where(positive, part / torch.where(positive, whole, torch.ones_like(whole)), torch.zeros_like(part))


def _near_pairs(a: Tensor, b: Tensor, tolerance: float, *, later_only: bool = False) -> tuple[Tensor, Tensor]:
    """Rows (i, j) whose circumscribed circles touch, in row order, found slab by slab along x: never an (N, M) table.

    With `later_only` (for one set against itself) only pairs i < j.
    """
    radius_a, radius_b = (torch.hypot(s[:, 3], s[:, 4]) / 2 + 2 * tolerance for s in (a, b))
    nothing = torch.zeros(0, dtype=torch.int64, device=a.device)
    if not len(a) or not len(b):
        return nothing, nothing
    order = torch.argsort(b[:, 0])
    x = b[order, 0].contiguous()
    reach = radius_a + radius_b.max()
    first = torch.searchsorted(x, (a[:, 0] - reach).contiguous())
    last = torch.searchsorted(x, (a[:, 0] + reach).contiguous(), right=True)
    counts = last - first
    ends = counts.cumsum(0)
    found_i, found_j = [], []
    start = 0
    while start < len(a):  # as many rows at once as their slabs allow
        base = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(torch.searchsorted(ends, base + _CELLS_AT_ONCE, right=True)))
        i = torch.repeat_interleave(torch.arange(start, stop, device=a.device), counts[start:stop])
        place = torch.arange(len(i), device=a.device) - (ends - counts)[i] + base + first[i]
        j = order[place]
        distance = torch.hypot(a[i, 0] - b[j, 0], a[i, 1] - b[j, 1])
        near = distance <= radius_a[i] + radius_b[j]
        if later_only:
            near &= i < j
        found_i.append(i[near])
        found_j.append(j[near])
        start = stop
    return torch.cat(found_i), torch.cat(found_j)


def _overlap_of_pairs(a: Tensor, b: Tensor, tolerance: float) -> Tensor:
    """(P,) m² shared by row i of `a` and row i of `b`, both (P, 7) float64."""
    if not len(a):
        return a.new_zeros(0)
    # Near the origin, so that no digits are lost to a coordinate of hundreds of metres.
    origin = a[:, :2]
    a = torch.cat([a[:, :2] - origin, a[:, 2:]], 1)
    b = torch.cat([b[:, :2] - origin, b[:, 2:]], 1)
    if tolerance == 0.0:
        return _shared_area(a, b)
    corners_a, corners_b = bev_corners(a), bev_corners(b)
    crossings, crossed = _crossings(corners_a, corners_b)
    points = torch.cat([crossings, corners_a, corners_b], 1)  # (P, 24, 2)
    valid = torch.cat([crossed, _inside(corners_a, b, tolerance), _inside(corners_b, a, tolerance)], 1)
    return _polygon_area(points, valid)


def _shared_area(a: Tensor, b: Tensor) -> Tensor:
    """(P,) m² of boxes b inside of boxes a: in a's own axes, the integral of y dx along the sides of b, cut to a's range.

    Above and below a's range a side counts with a's border, to its left and right not at all; what b's upper and lower sides
    have in common cancels, and the area of the part inside is left.
    """
    cos, sin = torch.cos(a[:, 6, None]), torch.sin(a[:, 6, None])
    corners = bev_corners(b) - a[:, None, :2]
    x = corners[..., 0] * cos + corners[..., 1] * sin
    y = corners[..., 1] * cos - corners[..., 0] * sin
    w, h = a[:, 3, None] / 2, a[:, 4, None] / 2
    dx, dy = x.roll(-1, 1) - x, y.roll(-1, 1) - y
    start, end = torch.maximum(torch.minimum(x, w), -w), torch.maximum(torch.minimum(x.roll(-1, 1), w), -w)
    slope = dy / torch.where(dx == 0, torch.ones_like(dx), dx)  # a side without dx has start == end and counts nothing
    low, high = y + (start - x) * slope, y + (end - x) * slope
    rise = high - low
    level = rise.abs() < 1e-7
    middle = torch.maximum(torch.minimum((low + high) / 2, h), -h)
    height = (_clamped_integral(high, h) - _clamped_integral(low, h)) / torch.where(level, torch.ones_like(rise), rise)
    # Corners run counter-clockwise, so the integral has the other sign.
    return -((end - start) * torch.where(level, middle, height)).sum(1).clamp(max=0)


def _clamped_integral(y: Tensor, h: Tensor) -> Tensor:
    """The integral from 0 to y of a value clamped to [-h, h]."""
    beyond = (y.abs() - h).clamp(min=0)
    return (y.square() - beyond.square()) / 2


def _crossings(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Where the sides of two quadrilaterals (P, 4, 2) cross: points (P, 16, 2) and which of them are crossings (P, 16)."""
    p, r = a[:, :, None], (a.roll(-1, 1) - a)[:, :, None]
    q, s = b[:, None], (b.roll(-1, 1) - b)[:, None]
    turn = _cross(r, s)
    parallel = turn.abs() <= 1e-12 * (r.norm(dim=-1) * s.norm(dim=-1)).clamp(min=1e-300)
    safe = torch.where(parallel, torch.ones_like(turn), turn)
    t, u = _cross(q - p, s) / safe, _cross(q - p, r) / safe
    crossed = ~parallel & (t >= 0) & (t <= 1) & (u >= 0) & (u <= 1)
    return (p + t[..., None] * r).flatten(1, 2), crossed.flatten(1, 2)


def _inside(points: Tensor, boxes: Tensor, tolerance: float) -> Tensor:
    """(P, 4) bool: which corners (P, 4, 2) lie in box i, up to `tolerance` outside (and the last digits of float64)."""
    offset = points - boxes[:, None, :2]
    cos, sin = torch.cos(boxes[:, 6, None]), torch.sin(boxes[:, 6, None])
    along = offset[..., 0] * cos + offset[..., 1] * sin
    across = offset[..., 1] * cos - offset[..., 0] * sin
    margin = tolerance + 1e-9
    return (along.abs() <= boxes[:, None, 3] / 2 + margin) & (across.abs() <= boxes[:, None, 4] / 2 + margin)


def _polygon_area(points: Tensor, valid: Tensor) -> Tensor:
    """(P,) area of the polygon through the valid ones of (P, V, 2) points, taken in order of angle about their mean."""
    count = valid.sum(1)
    middle = (points * valid[..., None]).sum(1) / count.clamp(min=1)[:, None]
    spokes = points - middle[:, None]
    angle = torch.where(valid, torch.atan2(spokes[..., 1], spokes[..., 0]), torch.inf)
    order = angle.argsort(1)
    spokes = torch.gather(spokes, 1, order[..., None].expand_as(spokes))
    # Rows behind the last valid point repeat the first one: they close the polygon and add nothing.
    behind = torch.arange(points.shape[1], device=points.device) >= count[:, None]
    spokes = torch.where(behind[..., None], spokes[:, :1], spokes)
    area = _cross(spokes, spokes.roll(-1, 1)).sum(1).abs() / 2
    return torch.where(count > 2, area, torch.zeros_like(area))


def _cross(a: Tensor, b: Tensor) -> Tensor:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def _suppress(better: Tensor, worse: Tensor, count: int) -> Tensor:
    """Ranks that stay, of `count`, given the overlapping pairs (better rank, worse rank) in order of the better one.

    Rounds instead of a walk: a box without a better undecided neighbour stays, and its worse neighbours go. Each round settles
    at least the best undecided box; on scenes of objects a handful of rounds settles all.
    """
    undecided = torch.ones(count, dtype=torch.bool, device=better.device)
    stays = torch.zeros_like(undecided)
    while bool(undecided.any()):
        open_pair = undecided[better] & undecided[worse]
        better, worse = better[open_pair], worse[open_pair]
        blocked = torch.zeros_like(undecided)
        blocked[worse] = True
        chosen = undecided & ~blocked
        stays |= chosen
        undecided &= ~chosen
        undecided[worse[chosen[better]]] = False
    return stays.nonzero()[:, 0]
