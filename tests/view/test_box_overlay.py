from __future__ import annotations

import numpy as np
from PIL import Image

from picture3d.view.box_overlay import draw_boxes, footprints


def test_corners_are_front_left_first_and_turn_with_the_heading():
    found = footprints([[10.0, 5.0, 0.0], [0.0, 0.0, 1.0]], [[4.0, 2.0, 1.5], [4.0, 2.0, 1.5]], [0.0, np.pi / 2])
    np.testing.assert_allclose(found[0], [[12, 6], [12, 4], [8, 4], [8, 6]])
    np.testing.assert_allclose(found[1], [[-1, 2], [1, 2], [1, -2], [-1, -2]], atol=1e-12)


def test_a_box_is_drawn_where_it_is_and_the_picture_handed_in_stays_as_it_was():
    blank = Image.new("RGB", (100, 100))
    drawn = draw_boxes(blank, [[20.0, 10.0, 0.0]], [[10.0, 6.0, 2.0]], [0.0], colors=[(255, 0, 0)], extent_m=50.0, width_px=1)
    lit = np.argwhere(np.asarray(drawn)[:, :, 0] > 0)
    # One pixel is one metre: x 15..25 are columns 65..75, y 7..13 the rows 37..43 from the top.
    assert lit.min(0).tolist() == [37, 65]
    assert lit.max(0).tolist() == [43, 75]
    assert np.asarray(drawn)[40, 72, 0] == 255  # the stroke towards the front
    assert np.asarray(drawn)[40, 67, 0] == 0
    assert not np.asarray(blank).any()


def test_no_boxes_leave_the_picture_as_it_is():
    blank = Image.new("RGB", (8, 8), (1, 2, 3))
    assert np.array_equal(np.asarray(draw_boxes(blank, np.zeros((0, 3)), np.zeros((0, 3)), [], colors=[])), np.asarray(blank))
