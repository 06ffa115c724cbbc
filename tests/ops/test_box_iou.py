from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from picture3d.ops.box_iou import (
    PUBLISHED_TOLERANCE_3D,
    PUBLISHED_TOLERANCE_BEV,
    bev_iou,
    bev_overlap,
    classwise_nms,
    diou_axis_aligned,
    iou_3d,
    iou_3d_paired,
    points_in_boxes,
    rotated_nms,
)
from tests.sample_data import golden_files


def box(x=0.0, y=0.0, z=0.0, length=4.0, width=2.0, height=1.5, yaw=0.0) -> list[float]:
    return [x, y, z, length, width, height, yaw]


def some_boxes(count: int, seed: int, spread: float = 6.0) -> Tensor:
    rng = np.random.default_rng(seed)
    center = rng.uniform(-spread, spread, (count, 3)) * [1, 1, 0.1]
    size = rng.uniform(0.3, 5.0, (count, 3))
    return torch.from_numpy(np.concatenate([center, size, rng.uniform(-4, 4, (count, 1))], 1))


def clipped_area(a: np.ndarray, b: np.ndarray) -> float:
    """Shared area by clipping one rectangle along the four sides of the other, corner by corner (Sutherland and Hodgman)."""

    def corners(row):
        x, y, _, length, width, _, yaw = row
        turn = np.array([[math.cos(yaw), -math.sin(yaw)], [math.sin(yaw), math.cos(yaw)]])
        return [turn @ (np.array(s) * [length / 2, width / 2]) + [x, y] for s in ((1, 1), (-1, 1), (-1, -1), (1, -1))]

    def cross(u, v):
        return u[0] * v[1] - u[1] * v[0]

    polygon, window = corners(a), corners(b)
    for start, end in zip(window, window[1:] + window[:1], strict=True):
        kept = []
        for now, after in zip(polygon, polygon[1:] + polygon[:1], strict=True):
            side_now, side_after = cross(end - start, now - start), cross(end - start, after - start)
            if side_now >= 0:
                kept.append(now)
            if side_now * side_after < 0:
                kept.append(now + (after - now) * side_now / (side_now - side_after))
        polygon = kept
        if not polygon:
            return 0.0
    return abs(sum(cross(p, q) for p, q in zip(polygon, polygon[1:] + polygon[:1], strict=True))) / 2


@pytest.mark.parametrize("path", golden_files("openpcdet", "box_ops"))
def test_golden_overlaps_and_suppression(path):
    golden = np.load(path)
    a, b = torch.from_numpy(golden["boxes_a"]), torch.from_numpy(golden["boxes_b"])

    def agree(found: Tensor, name: str) -> None:
        torch.testing.assert_close(found, torch.from_numpy(golden[name]), rtol=1e-5, atol=1e-5)

    agree(bev_overlap(a, b, corner_tolerance=PUBLISHED_TOLERANCE_3D), "overlap_bev")
    agree(bev_overlap(a, b), "overlap_bev_exact")
    agree(iou_3d(a, b, corner_tolerance=PUBLISHED_TOLERANCE_3D), "iou3d")
    agree(iou_3d_paired(a[: len(b)], b, corner_tolerance=PUBLISHED_TOLERANCE_3D), "paired_iou3d")
    agree(diou_axis_aligned(a[: len(b)], b), "diou_axis_aligned")
    scores = torch.from_numpy(golden["scores"])
    kept = rotated_nms(a, scores, 0.2, corner_tolerance=PUBLISHED_TOLERANCE_BEV)
    assert kept.tolist() == golden["nms_0p2"].tolist() == rotated_nms(a, scores, 0.2).tolist()
    # The file does not tell its threshold: 0.1 for every class is the one round number that gives both lists.
    labels, lists = torch.from_numpy(golden["labels"]).long(), ("nms_multiclass_true_heading", "nms_multiclass_reference")
    for quarter_turn, name in enumerate(lists):
        found = classwise_nms(a, scores, labels, (0.1,) * 3, quarter_turn=bool(quarter_turn))
        assert found.tolist() == golden[name].tolist(), name


def test_overlap_by_hand():
    a = torch.tensor([box()], dtype=torch.float64)
    b = torch.tensor(
        [
            box(),  # itself
            box(x=2.0),  # shifted by half its length
            box(yaw=math.pi / 2),  # a cross: 2 x 2 shared
            box(x=4.0),  # sides touch
            box(x=100.0),
            box(yaw=math.pi),  # the other way round
            box(length=1.0, width=1.0, yaw=0.7),  # inside
            box(length=0.0),
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(
        bev_overlap(a, b)[0], torch.tensor([8.0, 4.0, 4.0, 0.0, 0.0, 8.0, 1.0, 0.0], dtype=torch.float64)
    )
    torch.testing.assert_close(bev_iou(a, b)[0, :3], torch.tensor([1.0, 4 / 12, 4 / 12], dtype=torch.float64))


def test_heights_that_do_not_meet_share_no_volume():
    a = torch.tensor([box(), box()], dtype=torch.float64)
    b = torch.tensor([box(z=1.0), box(z=1.6)], dtype=torch.float64)
    torch.testing.assert_close(iou_3d_paired(a, b), torch.tensor([0.5 / 2.5, 0.0], dtype=torch.float64))


@pytest.mark.parametrize("seed", range(3))
def test_the_published_procedure_tends_to_the_true_area_as_its_tolerance_does_to_0(seed):
    a, b = some_boxes(17, seed), some_boxes(13, 100 + seed)
    torch.testing.assert_close(bev_overlap(a, b, corner_tolerance=1e-12), bev_overlap(a, b), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("yaw", [0.0, 1e-9, 1e-8, 1e-7, 1e-5, math.pi / 2 - 1e-8, math.pi / 2, math.pi])
def test_sides_that_are_almost_level_or_upright_keep_their_digits(yaw):
    a, b = torch.tensor([box()], dtype=torch.float64), torch.tensor([box(x=1.0, y=0.25, yaw=yaw)], dtype=torch.float64)
    torch.testing.assert_close(bev_overlap(a, b)[0, 0].item(), clipped_area(a[0].numpy(), b[0].numpy()), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("seed", range(6))
def test_every_pair_agrees_with_clipping_and_with_its_mirror(seed):
    a, b = some_boxes(17, seed), some_boxes(13, 100 + seed)
    found = bev_overlap(a, b)
    expected = torch.tensor([[clipped_area(p, q) for q in b.numpy()] for p in a.numpy()], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(bev_overlap(b, a), found.T, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.stack([iou_3d_paired(a, b[j : j + 1].expand(17, 7)) for j in range(13)], 1), iou_3d(a, b))


@given(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3), st.floats(-7, 7))
@settings(max_examples=50, deadline=None)
def test_overlap_does_not_change_where_the_scene_is_or_how_it_is_turned(x, y, yaw):
    a, b = some_boxes(5, 3), some_boxes(5, 4)
    turn = torch.tensor([[math.cos(yaw), -math.sin(yaw)], [math.sin(yaw), math.cos(yaw)]], dtype=torch.float64)

    def moved(boxes: Tensor) -> Tensor:
        out = boxes.clone()
        out[:, :2] = boxes[:, :2] @ turn.T + torch.tensor([x, y], dtype=torch.float64)
        out[:, 6] += yaw
        return out

    torch.testing.assert_close(bev_overlap(moved(a), moved(b)), bev_overlap(a, b), rtol=1e-6, atol=1e-8)


def test_many_boxes_are_handled_slab_by_slab(monkeypatch):
    a, b = some_boxes(60, 1), some_boxes(50, 2)
    whole = bev_overlap(a, b)
    monkeypatch.setattr("picture3d.ops.box_iou._CELLS_AT_ONCE", 7)
    monkeypatch.setattr("picture3d.ops.box_iou._PAIRS_AT_ONCE", 5)
    assert torch.equal(bev_overlap(a, b), whole)


def walked_nms(boxes: Tensor, scores: Tensor, threshold: float) -> list[int]:
    """The definition: from the best to the worst, each box that stays throws out what it covers."""
    iou = bev_iou(boxes, boxes)
    left = torch.argsort(scores, descending=True, stable=True).tolist()
    kept: list[int] = []
    while left:
        best = left.pop(0)
        kept.append(best)
        left = [other for other in left if iou[best, other] <= threshold]
    return kept


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_suppression_in_rounds_equals_the_walk(seed, threshold):
    boxes = some_boxes(120, seed, spread=8.0)
    scores = torch.from_numpy(np.random.default_rng(seed).integers(0, 40, 120) / 40)  # with equal ones
    expected = walked_nms(boxes, scores, threshold)
    assert rotated_nms(boxes, scores, threshold).tolist() == expected
    assert rotated_nms(boxes, scores, threshold, post_max=5).tolist() == expected[:5]


def test_pre_max_leaves_the_worst_out():
    boxes = torch.tensor([box(x=10.0 * i) for i in range(5)])
    assert rotated_nms(boxes, torch.arange(5.0), 0.5, pre_max=2).tolist() == [4, 3]


def test_a_chain_is_decided_from_the_best_down():
    # Each covers its neighbour by 3/5 and the one after by 1/3: the second goes, so the third stays.
    boxes = torch.tensor([box(x=float(i)) for i in range(3)])
    assert rotated_nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5).tolist() == [0, 2]


def test_nothing_in_nothing_out():
    none = torch.zeros(0, 7)
    one = torch.tensor([box()])
    assert bev_overlap(none, one).shape == (0, 1)
    assert iou_3d(one, none).shape == (1, 0)
    assert rotated_nms(none, torch.zeros(0), 0.5).shape == (0,)
    assert points_in_boxes(torch.zeros(0, 3), one).shape == (0,)
    assert points_in_boxes(torch.zeros(2, 3), none).tolist() == [-1, -1]


def test_boxes_without_size_overlap_nothing_and_stay():
    flat = torch.tensor([box(length=0.0), box(length=0.0), box()])
    assert bev_iou(flat, flat)[0].tolist() == [0.0, 0.0, 0.0]
    assert rotated_nms(flat, torch.tensor([0.3, 0.2, 0.1]), 0.1).tolist() == [0, 1, 2]


def test_classes_suppress_their_own_boxes_only_and_a_threshold_of_0_none():
    pair = torch.tensor([box(x=0.0), box(x=0.5)])
    boxes, scores = pair.repeat(3, 1), torch.tensor([0.3, 0.9, 0.8, 0.2, 0.1, 0.4])
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    assert classwise_nms(boxes, scores, labels, (0.2, 0.9, 0.0), post_max=1).tolist() == [1, 2, 5, 4]
    assert classwise_nms(boxes, scores, labels, ()).tolist() == []


def test_values_that_are_not_numbers_are_refused():
    good, bad = torch.tensor([box()]), torch.tensor([box(x=math.nan)])
    with pytest.raises(ValueError, match="b must be finite: box 0 holds NaN"):
        bev_overlap(good, bad)
    with pytest.raises(ValueError, match="scores must be finite"):
        rotated_nms(good, torch.tensor([math.nan]), 0.5)
    with pytest.raises(ValueError, match="7"):
        iou_3d_paired(good[:, :6], good[:, :6])
    with pytest.raises(ValueError, match="2 boxes"):
        iou_3d_paired(good.repeat(2, 1), good)


def test_points_are_found_in_the_first_box_that_holds_them(monkeypatch):
    boxes = some_boxes(9, 5)
    points = torch.from_numpy(np.random.default_rng(6).uniform(-7, 7, (500, 3)) * [1, 1, 0.2])
    expected = []
    for point in points.numpy():
        hits = []
        for number, (x, y, z, length, width, height, yaw) in enumerate(boxes.numpy()):
            turn = np.array([[math.cos(yaw), math.sin(yaw)], [-math.sin(yaw), math.cos(yaw)]])
            local = np.abs(turn @ (point[:2] - [x, y]))
            hits += [number] if local[0] <= length / 2 and local[1] <= width / 2 and abs(point[2] - z) <= height / 2 else []
        expected.append(hits[0] if hits else -1)
    assert max(expected) > 0
    assert points_in_boxes(points, boxes).tolist() == expected
    monkeypatch.setattr("picture3d.ops.box_iou._CELLS_AT_ONCE", 11)
    assert points_in_boxes(points, boxes).tolist() == expected


def test_distance_iou_is_differentiable_even_where_boxes_are_apart_or_equal():
    a = torch.tensor([box(), box(x=50.0), box(length=0.0, width=0.0, height=0.0)], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([box(), box(), box(length=0.0, width=0.0, height=0.0)], dtype=torch.float64)
    found = diou_axis_aligned(a, b)
    assert found[0].item() == pytest.approx(1.0)
    assert -1 <= found[1].item() < 0
    found.sum().backward()
    assert a.grad is not None
    assert torch.isfinite(a.grad).all()
    assert a.grad[1, 0] < 0  # nearer is better
