from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from picture3d.datasets.object_geometry import inside_any, meet_from_above, rows_inside


def inside_by_definition(xyz: np.ndarray, box: np.ndarray) -> np.ndarray:
    """In float64, by the box's own axes."""
    offset = xyz.astype(np.float64) - box[:3]
    cos, sin = np.cos(box[6]), np.sin(box[6])
    local = np.column_stack([offset[:, :2] @ [cos, sin], offset[:, :2] @ [-sin, cos], offset[:, 2]])
    return np.all(np.abs(local) <= box[3:6] / 2, axis=1)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 30), st.sampled_from([1.0, 30.0, 3000.0]))
def test_points_inside_of_boxes_are_those_of_the_definition(seed, count, spread):
    """Boxes up to 3 km apart, most points drawn near a box; points within 1 mm of a face may fall on either side."""
    rng = np.random.default_rng(seed)
    boxes = np.column_stack(
        [
            rng.uniform(-spread, spread, (count, 3)),
            rng.uniform(0, 6, (count, 3)),
            rng.uniform(-9, 9, count),
            rng.normal(size=count),
        ]
    )
    anywhere = rng.uniform(-spread, spread, (200, 3))
    near = boxes[:, :3].repeat(20, axis=0) + rng.normal(0, 2, (20 * count, 3))
    xyz = np.concatenate([anywhere, near]).astype(np.float32)
    inside = [inside_by_definition(xyz, box) for box in boxes]
    margin = np.array([0, 0, 0, 2e-3, 2e-3, 2e-3, 0, 0])
    clear = [inside_by_definition(xyz, b + margin) == inside_by_definition(xyz, b - margin) for b in boxes]
    for box, rows in enumerate(rows_inside(xyz, boxes)):
        found = np.zeros(len(xyz), np.bool_)
        found[rows] = True
        assert (np.diff(rows) > 0).all()
        assert (found == inside[box])[clear[box]].all()
    known = np.all(clear, axis=0) if count else np.ones(len(xyz), np.bool_)
    expected = np.any(inside, axis=0) if count else np.zeros(len(xyz), np.bool_)
    assert (inside_any(xyz, boxes) == expected)[known].all()


def test_faces_belong_to_a_box():
    box = np.array([[0.0, 0, 0, 4, 2, 2, 0]])
    on_and_off = np.array([[2, 1, 1], [-2, -1, -1], [2.01, 0, 0], [0, 1.01, 0], [0, 0, 1.01]], np.float32)
    assert inside_any(on_and_off, box).tolist() == [True, True, False, False, False]


def test_nothing_in_nothing():
    no_points, no_boxes = np.zeros((0, 3), np.float32), np.zeros((0, 9))
    assert inside_any(no_points, np.ones((2, 9))).shape == (0,)
    assert not inside_any(np.zeros((3, 3), np.float32), no_boxes).any()
    assert rows_inside(no_points, no_boxes) == []
    assert [rows.tolist() for rows in rows_inside(no_points, np.ones((2, 9)))] == [[], []]
    assert meet_from_above(no_boxes, np.ones((2, 9))).shape == (0, 2)


def test_a_box_that_is_not_finite_is_refused():
    box = np.array([[0.0, np.nan, 0, 4, 2, 2, 0]])
    with pytest.raises(ValueError, match="NaN"):
        inside_any(np.zeros((3, 3), np.float32), box)
    with pytest.raises(ValueError, match="NaN"):
        meet_from_above(box, box)


def test_boxes_that_touch_do_not_meet():
    """By hand: side by side at 2 m, one over the other seen from above, a turned one whose corner reaches 0.1 m across."""
    box = [0.0, 0, 0, 4, 2, 2, 0]
    others = [
        [0.0, 2, 0, 4, 2, 2, 0],
        [4.0, 0, 0, 4, 2, 2, 0],
        [0.0, 0, 50, 1, 1, 1, 0],
        [0.0, 0.9 + np.sqrt(2), 0, 2, 2, 2, np.pi / 4],
    ]
    assert meet_from_above(np.array([box]), np.array(others)).tolist() == [[False, False, True, True]]
