"""Drives: order, time, frames, and that a sweep depends on seed and moment only."""

from __future__ import annotations

import numpy as np

from picture3d.synthetic.drive import DriveConfig, count_points, drive

SHORT = DriveConfig(keyframes=2, sweeps_per_keyframe=1)


def test_a_drive_is_a_pure_function_of_its_seed():
    for a, b in zip(drive(4, SHORT), drive(4, SHORT), strict=True):
        assert a.timestamp_us == b.timestamp_us
        assert np.array_equal(a.sweep.points.xyz, b.sweep.points.xyz)
        assert np.array_equal(a.sweep.points.intensity, b.sweep.points.intensity)
        assert np.array_equal(a.sweep.labels, b.sweep.labels)


def test_a_drive_can_be_entered_anywhere():
    whole, tail = list(drive(4, SHORT)), list(drive(4, SHORT, start=2))
    assert [step.index for step in tail] == [2]
    assert np.array_equal(whole[2].sweep.points.xyz, tail[0].sweep.points.xyz)


def test_keyframes_do_not_depend_on_how_many_sweeps_lie_between_them():
    dense = [s for s in drive(4, DriveConfig(keyframes=2, sweeps_per_keyframe=4)) if s.is_keyframe]
    sparse = list(drive(4, DriveConfig(keyframes=2, sweeps_per_keyframe=0)))
    assert len(dense) == len(sparse) == 2
    for a, b in zip(dense, sparse, strict=True):
        assert np.array_equal(a.sweep.points.xyz, b.sweep.points.xyz)


def test_full_density_is_twenty_sweeps_and_two_keyframes_a_second():
    config = DriveConfig(keyframes=3)
    assert config.sweeps == 21
    assert DriveConfig(keyframes=1).sweeps == 1
    steps = list(drive(4, SHORT))
    assert [s.is_keyframe for s in steps] == [True, False, True]
    assert np.diff([s.timestamp_us for s in steps]).tolist() == [250_000, 250_000]
    assert steps[1].boxes_global is None


def test_a_frame_has_its_boxes_around_its_points_in_the_lidar_frame():
    step = next(iter(drive(4, SHORT)))
    frame = step.frame("log")
    assert frame.boxes is not None
    assert frame.global_from_lidar is not None
    counted = count_points(frame.boxes, frame.points.xyz.astype(np.float64))
    # The ground tilts by a few degrees and a box stays upright in its own frame, so a few points change sides.
    busy = frame.boxes.num_points > 20
    assert busy.sum() > 5
    assert np.median(np.abs(counted[busy] - frame.boxes.num_points[busy]) / frame.boxes.num_points[busy]) < 0.1


def test_static_points_of_two_keyframes_coincide_in_the_global_frame():
    a, b = (s for s in drive(4, DriveConfig(keyframes=2, sweeps_per_keyframe=0)))
    walls = []
    for step in (a, b):
        points = step.global_from_lidar.apply(step.sweep.points.xyz.astype(np.float64))
        walls.append(points[step.sweep.labels == 28][:, :2])
    cells = [set(map(tuple, np.floor(w / 0.5).astype(int))) for w in walls]
    assert len(cells[0] & cells[1]) > 0.4 * min(len(c) for c in cells)


def test_counting_points_in_boxes_agrees_with_a_plain_count():
    step = next(iter(drive(4, SHORT)))
    boxes = step.boxes_global
    assert boxes is not None
    points = step.global_from_lidar.apply(step.sweep.points.xyz.astype(np.float64))
    for i in range(0, len(boxes), 7):
        c, s = np.cos(boxes.yaw[i]), np.sin(boxes.yaw[i])
        local = (points - boxes.center[i]) @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
        assert boxes.num_points[i] == (np.abs(local) <= boxes.size[i] / 2).all(1).sum()
