from __future__ import annotations

import numpy as np
import pytest

from picture3d.datasets.augment import Augmentation, AugmentConfig, draw_augmentation
from picture3d.structures.boxes import Boxes
from tests.datasets.made_frames import made_boxes


def points_inside(xyz: np.ndarray, boxes: Boxes) -> np.ndarray:
    """(boxes, points) bool, straight from the definition of a box."""
    local = xyz[None].astype(np.float64) - boxes.center[:, None]
    c, s = np.cos(boxes.yaw)[:, None], np.sin(boxes.yaw)[:, None]
    along, across = c * local[..., 0] + s * local[..., 1], -s * local[..., 0] + c * local[..., 1]
    half = boxes.size[:, None] / 2
    return (abs(along) < half[..., 0]) & (abs(across) < half[..., 1]) & (abs(local[..., 2]) < half[..., 2])


@pytest.mark.parametrize("seed", range(20))
def test_points_stay_in_their_boxes(seed):
    rng = np.random.default_rng(seed)
    boxes = made_boxes(rng, 8)
    inside = boxes.center[:, None] + rng.uniform(-0.5, 0.5, (8, 200, 3)) * boxes.size.min()
    xyz = np.concatenate([inside.reshape(-1, 3), rng.uniform(-20, 20, (2000, 3))]).astype(np.float32)
    drawn = draw_augmentation(AugmentConfig(), rng)
    before, after = points_inside(xyz, boxes), points_inside(drawn.points(xyz), drawn.boxes(boxes))
    assert before.sum() > 500
    assert (before != after).sum() <= 2  # a point within float32 rounding of a face may change sides


def test_velocity_is_the_movement_of_a_moving_point():
    rng = np.random.default_rng(3)
    boxes = made_boxes(rng, 5)
    drawn = Augmentation(flip_x=True, flip_y=False, yaw=0.4, scale=1.05, translation=(1, 2, 3))
    later = Boxes(
        boxes.center + np.c_[boxes.velocity, np.zeros(5)], boxes.size, boxes.yaw, boxes.velocity, boxes.category,
        boxes.track_id, boxes.num_points,
    )  # fmt: skip
    moved = drawn.boxes(later).center - drawn.boxes(boxes).center
    np.testing.assert_allclose(moved[:, :2], drawn.boxes(boxes).velocity, atol=1e-9)


def test_flips_by_hand():
    boxes = Boxes(
        np.array([[3.0, 4, 1]]), np.array([[4.0, 2, 1.5]]), np.array([np.pi / 6]), np.array([[1.0, 2]]), ("car",), ("a",),
        np.array([1], np.int32),
    )  # fmt: skip
    x = Augmentation(flip_x=True).boxes(boxes)
    assert x.center.tolist() == [[3, -4, 1]]
    np.testing.assert_allclose(x.yaw, [-np.pi / 6])
    assert x.velocity.tolist() == [[1, -2]]
    y = Augmentation(flip_y=True).boxes(boxes)
    assert y.center.tolist() == [[-3, 4, 1]]
    np.testing.assert_allclose(y.yaw, [np.pi * 5 / 6])  # -(heading + pi), wrapped
    assert y.velocity.tolist() == [[-1, 2]]


def test_the_inverse_gives_the_points_back():
    rng = np.random.default_rng(0)
    xyz = rng.uniform(-50, 50, (100, 3)).astype(np.float32)
    drawn = draw_augmentation(AugmentConfig(), rng)
    back = (drawn.points(xyz) - np.array(drawn.translation)) @ np.linalg.inv(drawn.linear).T
    np.testing.assert_allclose(back, xyz, atol=2e-5)


def test_headings_are_wrapped():
    rng = np.random.default_rng(1)
    boxes = made_boxes(rng, 200)
    for flip_x, flip_y in [(False, False), (True, False), (False, True), (True, True)]:
        yaw = Augmentation(flip_x, flip_y, yaw=2.0).boxes(boxes).yaw
        assert ((yaw >= -np.pi) & (yaw < np.pi)).all()


def test_what_is_drawn_depends_on_the_generator_alone():
    one, two = (draw_augmentation(AugmentConfig(), np.random.default_rng(5)) for _ in range(2))
    assert (one.flip_x, one.flip_y, one.yaw, one.scale, one.translation) == (
        two.flip_x,
        two.flip_y,
        two.yaw,
        two.scale,
        two.translation,
    )


def test_switching_one_thing_off_leaves_the_others_as_they_were():
    config = AugmentConfig(flip_x=False, rotation=0, scale=(1, 1))
    full, part = (
        draw_augmentation(AugmentConfig(), np.random.default_rng(7)),
        draw_augmentation(config, np.random.default_rng(7)),
    )
    assert part.translation == full.translation
    assert part.flip_y == full.flip_y
    assert (part.flip_x, part.yaw, part.scale) == (False, 0.0, 1.0)


def test_draws_stay_in_their_ranges_and_use_them():
    config = AugmentConfig(rotation=0.5, scale=(0.9, 1.1), translation=0.5)
    drawn = [draw_augmentation(config, np.random.default_rng(seed)) for seed in range(400)]
    yaw, scale = np.array([d.yaw for d in drawn]), np.array([d.scale for d in drawn])
    assert abs(yaw).max() <= 0.5 < abs(yaw).max() + 0.05
    assert 0.9 <= scale.min() < 0.91
    assert 1.09 < scale.max() <= 1.1
    assert 150 < sum(d.flip_x for d in drawn) < 250
    assert np.std([d.translation for d in drawn]) == pytest.approx(0.5, rel=0.1)


def test_no_points_and_no_boxes_stay_none():
    drawn = draw_augmentation(AugmentConfig(), np.random.default_rng(0))
    assert drawn.points(np.zeros((0, 3), np.float32)).shape == (0, 3)
    assert len(drawn.boxes(Boxes.empty())) == 0
