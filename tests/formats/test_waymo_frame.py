"""Frames of the Waymo Open Dataset v1.x: a published one, made ones, and damaged ones."""

from __future__ import annotations

import contextlib
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from picture3d.errors import DataError
from picture3d.formats.protobuf_wire import write_data, write_double, write_float, write_integer
from picture3d.formats.tfrecord import read_records
from picture3d.formats.waymo_frame import read_frame
from picture3d.formats.waymo_matrix import MAX_PIXELS, inflate, read_pixel_poses, read_range_image, read_segmentation
from tests.made_waymo import (
    Made,
    calibration,
    echo,
    floats,
    image_of,
    integers,
    label,
    laser,
    shape_message,
    small_frame,
    streams_of,
    transform,
)  # fmt: skip
from tests.sample_data import sample_path

FRAME = "waymo/frame_without_lasers/pvps_data_one_frame.tfrecord"


def read_all(data: bytes) -> None:
    """Everything that a frame's bytes can be asked for."""
    frame = read_frame(data, "f")
    for name, returns in streams_of(frame).items():
        for streams in returns:
            if len(streams.range_image):
                image = read_range_image(streams.range_image, "f")
                if name in frame.calibrations:
                    frame.calibrations[name].inclinations(len(image), "f")
            if len(streams.pose):
                read_pixel_poses(streams.pose, "f")
            if len(streams.segmentation):
                read_segmentation(streams.segmentation, "f")


def test_golden_frame_has_the_published_calibrations_pose_and_labels():
    (payload,) = (payload for _, payload in read_records(sample_path(FRAME)))
    frame = read_frame(payload)
    assert frame.timestamp_us == 1553735853462203
    assert np.abs(frame.global_from_vehicle.rotation @ frame.global_from_vehicle.rotation.T - np.eye(3)).max() < 1e-6
    assert sorted(frame.calibrations) == [1, 2, 3, 4, 5]
    top = frame.calibrations[1]
    assert len(top.beam_inclinations) == 64
    assert (np.diff(top.inclinations(64, "top")) > 0).all()
    assert top.vehicle_from_laser.translation[2] == pytest.approx(2.184, abs=1e-3)
    for name in (2, 3, 4, 5):
        side = frame.calibrations[name]
        beams = side.inclinations(200, "side")
        assert len(side.beam_inclinations) == 0
        assert side.inclination_min < beams[0] < beams[-1] < side.inclination_max
    assert frame.lasers == {}  # five messages without content
    labels = frame.labels
    assert Counter(labels.kind.tolist()) == {1: 37, 2: 12, 3: 25, 4: 1}
    assert Counter(labels.difficulty.tolist())[2] == 15
    assert len(set(labels.id)) == 75
    vehicles = labels.kind == 1
    assert 3.5 < np.median(labels.size[vehicles, 0]) < 6
    assert (labels.size[vehicles, 0] > labels.size[vehicles, 1]).all()
    assert labels.num_points.min() >= 0
    assert (labels.num_top_points == -1).all()  # older than that field
    assert np.isfinite(labels.velocity).all()
    assert np.abs(labels.center[:, :2]).max() < 100


def test_a_made_frame_is_read_back():
    rng = np.random.default_rng(3)
    made = small_frame(rng)
    image, classes = image_of(rng, 4, 6), rng.integers(-3, 1 << 20, (4, 6, 2))
    poses = rng.normal(size=(4, 6, 6)).astype(np.float32)
    made.lasers[0] = laser(1, echo(floats(image), floats(poses), integers(classes)))
    frame = read_frame(made.bytes())
    assert (frame.context, frame.timestamp_us) == ("segment", 1_000_000)
    first, second = streams_of(frame)[1]
    assert np.array_equal(read_range_image(first.range_image, ""), image)
    assert np.array_equal(read_pixel_poses(first.pose, ""), poses)
    assert np.array_equal(read_segmentation(first.segmentation, ""), classes)
    assert [len(stream) for stream in second] == [0, 0, 0]
    labels = frame.labels
    assert labels.center.tolist() == [[10, 2, 1]] * 2
    assert labels.size.tolist() == [[4, 2, 1.5]] * 2
    assert labels.heading.tolist() == [0.3] * 2
    assert (labels.kind.tolist(), labels.difficulty.tolist(), labels.id) == ([1, 2], [0, 2], ("a", "b"))
    assert (labels.num_points.tolist(), labels.num_top_points.tolist()) == ([7, 7], [6, 6])
    assert labels.velocity.tolist() == [[3, 4, 0]] * 2
    assert labels.acceleration.tolist() == [[0, 0, 0]] * 2


def test_inclinations_between_two_bounds_are_the_middles_of_equal_parts():
    frame = read_frame(Made(calibrations=[calibration(2, low=-1.0, high=1.0)]).bytes())
    np.testing.assert_allclose(frame.calibrations[2].inclinations(4, ""), [-0.75, -0.25, 0.25, 0.75], atol=1e-15)


def test_numbers_may_be_packed_or_not():
    image = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    one_by_one = b"".join(write_float(1, float(v)) for v in image.ravel())
    packed_shape = write_data(2, write_data(1, bytes([2, 3, 4])))
    assert np.array_equal(read_range_image(memoryview(zlib.compress(one_by_one + packed_shape)), ""), image)
    mixed = write_data(1, image.tobytes()[:40]) + shape_message(image.shape) + write_data(1, image.tobytes()[40:])
    assert np.array_equal(read_range_image(memoryview(zlib.compress(mixed)), ""), image)
    beams = np.array([-0.2, -0.1, 0.0])
    packed = write_integer(1, 1) + write_data(2, beams.tobytes()) + write_data(5, write_data(1, np.eye(4).tobytes()))
    frame = read_frame(Made(calibrations=[packed, calibration(2, beams=beams)]).bytes())
    assert np.array_equal(frame.calibrations[1].beam_inclinations, beams)
    assert np.array_equal(frame.calibrations[2].beam_inclinations, beams)


def test_unknown_fields_and_images_are_stepped_over():
    rng = np.random.default_rng(4)
    made = small_frame(rng)
    plain = read_frame(made.bytes())
    strange = write_data(4, b"\xff" * 1000) + write_data(900, b"\x00\xff") + write_integer(901, 5) + write_double(902, 1.0)
    made.extra = strange
    made.lasers = [part + strange for part in made.lasers]
    made.labels = [part + strange[1003:] for part in made.labels]
    made.calibrations = [part + write_data(77, b"abc") for part in made.calibrations]
    frame = read_frame(made.bytes())
    assert [bytes(s) for s in streams_of(frame)[1][0]] == [bytes(s) for s in streams_of(plain)[1][0]]
    assert np.array_equal(frame.labels.center, plain.labels.center)
    assert frame.labels.id == plain.labels.id


def test_a_frame_without_labels_or_lasers_is_a_frame():
    frame = read_frame(Made().bytes())
    assert len(frame.labels) == 0
    assert frame.labels.center.shape == (0, 3)
    assert frame.labels.velocity.shape == (0, 3)
    assert (frame.lasers, frame.calibrations, frame.zones) == ({}, {}, ())


def test_what_a_label_does_not_say_is_marked_as_unknown():
    bare = write_data(1, b"".join(write_double(i, 1.0) for i in range(1, 8))) + write_integer(3, 1)
    labels = read_frame(Made(labels=[bare]).bytes()).labels
    assert np.isnan(labels.velocity[0, :2]).all()
    assert (labels.num_points[0], labels.num_top_points[0], labels.difficulty[0], labels.id[0]) == (-1, -1, 0, "")
    fast = read_frame(Made(labels=[label(motion=(1, 2, 3, 4, 5, 6))]).bytes()).labels
    assert fast.velocity.tolist() == [[1, 2, 5]]
    assert fast.acceleration.tolist() == [[3, 4, 6]]


def test_no_label_zones_keep_their_corners():
    zone = write_data(1, np.array([1.0, 2.0]).tobytes()) + write_double(2, 5.0) + write_double(2, 6.0) + write_data(3, b"z")
    (found,) = read_frame(Made(extra=write_data(7, zone)).bytes()).zones
    assert found.id == "z"
    assert found.outline.tolist() == [[1, 5], [2, 6]]
    with pytest.raises(DataError, match="has 2 x but 3 y"):
        read_frame(Made(extra=write_data(7, zone + write_double(2, 7.0))).bytes())


SINGULAR = np.diag([1.0, 1.0, 0.0, 1.0])
MIRROR = np.diag([1.0, -1.0, 1.0, 1.0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": None}, r"f: holds no context name \(1.1\)"),
        ({"timestamp_us": None}, r"holds no timestamp \(2\)"),
        ({"pose": None}, r"holds no pose \(3\)"),
        ({"pose": np.full((4, 4), np.nan)}, "f: the pose at byte .* is not a rotation"),
        ({"pose": np.eye(3)}, "9 numbers, expected the 16"),
        ({"calibrations": [calibration(1, SINGULAR)]}, "the extrinsic of LiDAR 1 at byte .* is not a rotation"),
        ({"calibrations": [calibration(3, MIRROR)]}, "the extrinsic of LiDAR 3 at byte .* is not a rotation"),
        ({"calibrations": [calibration(3, np.eye(4) * 2)]}, "is not a rotation"),
        ({"calibrations": [calibration(9)]}, "is of LiDAR 9"),
        ({"calibrations": [write_integer(1, 1)]}, "has no extrinsic"),
        ({"calibrations": [calibration(2), calibration(2)]}, "LiDAR 2 is calibrated twice"),
        ({"calibrations": [calibration(2, beams=[0.0, np.nan])]}, "beam inclination of LiDAR 2 is not finite"),
        ({"lasers": [laser(1), laser(1)]}, "LiDAR 1 occurs twice"),
        ({"lasers": [laser(6)]}, "LiDAR 6 at byte .* is none of 1 to 5"),
        ({"labels": [label(box=(1, 2, 3))]}, r"label 'a' \(bytes .* lacks a number"),
        ({"labels": [label(box=(1, 2, 3, -1, 1, 1, 0))]}, "of a negative size"),
        ({"labels": [label(kind=300)]}, r"type, difficulty or count that cannot be: \[300"),
        ({"labels": [label(points=1 << 40)]}, "type, difficulty or count that cannot be"),
    ],
)
def test_what_cannot_be_is_refused_and_named(change, message):
    with pytest.raises(DataError, match=message):
        read_frame(Made(**change).bytes(), "f")


def test_a_calibration_without_any_inclination_is_refused_when_it_is_needed():
    bare = write_integer(1, 2) + write_data(5, transform(np.eye(4)))
    frame = read_frame(Made(calibrations=[bare, calibration(1, beams=[0.0, 0.1])]).bytes())
    with pytest.raises(DataError, match="neither beam inclinations nor a range"):
        frame.calibrations[2].inclinations(200, "f")
    with pytest.raises(DataError, match="has 64 rows, but the calibration gives the inclinations of 2 beams"):
        frame.calibrations[1].inclinations(64, "f")


IMAGE = np.ones((3, 5, 4), np.float32)


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (floats(IMAGE, (3, 5)), r"m: has shape \(3, 5\), expected \(rows, columns, 4\)"),
        (floats(IMAGE, (3, 4, 5)), r"has shape \(3, 4, 5\)"),
        (floats(IMAGE, (3, 5, 4, 1)), "has shape"),
        (floats(IMAGE, ()), r"has shape \(\)"),
        (floats(IMAGE, (-3, -5, 4)), "has shape"),
        (floats(IMAGE, (0, 5, 4)), "has shape"),
        (floats(IMAGE, (1 << 20, 1 << 20, 4)), "of at most 524288 pixels"),
        (floats(IMAGE, (3, 6, 4)), r"holds 60 numbers, its shape \(3, 6, 4\) needs 72"),
        (floats(IMAGE, (3, 4, 4)), "holds 60 numbers"),
        (zlib.compress(shape_message((3, 5, 4))), "holds 0 numbers"),
        (zlib.compress(write_data(1, b"123") + shape_message((3, 5, 4))), "has 3 bytes, not whole numbers"),
        (zlib.compress(b"\xff\xff\xff"), "m: "),
        (floats(IMAGE)[:-1], "does not end where it should"),
        (floats(IMAGE) + b"more", "does not end where it should"),
        (b"not zlib", "m: is not a zlib stream"),
    ],
)
def test_damaged_range_images_are_refused_and_named(stream, message):
    with pytest.raises(DataError, match=message):
        read_range_image(memoryview(stream), "m")


@pytest.mark.parametrize("read", [read_range_image, read_pixel_poses, read_segmentation])
def test_a_zlib_bomb_is_not_inflated(read: Callable[[memoryview, str], np.ndarray]):
    squeeze = zlib.compressobj(9)
    bomb = b"".join(squeeze.compress(bytes(1 << 20)) for _ in range(300)) + squeeze.flush()
    assert len(bomb) < 400_000
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="m: inflates to more than the"):
            read(memoryview(bomb), "m")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64 << 20


def test_the_largest_image_that_is_believed_is_read_and_the_bound_is_exact():
    values = np.zeros((1024, MAX_PIXELS // 1024, 4), np.float32)
    assert read_range_image(memoryview(floats(values)), "").shape == values.shape
    assert inflate(memoryview(zlib.compress(b"12345")), 5, "") == b"12345"
    with pytest.raises(DataError, match="more than the 4 bytes"):
        inflate(memoryview(zlib.compress(b"12345")), 4, "")


WHOLE = small_frame(np.random.default_rng(5)).bytes()


def test_a_frame_cut_off_anywhere_is_our_error_or_a_shorter_frame():
    for length in range(0, len(WHOLE), 7):
        with contextlib.suppress(DataError):
            read_all(WHOLE[:length])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_frame_with_changed_bytes_gives_nothing_but_our_error(changes):
    data = bytearray(WHOLE)
    for at, value in changes:
        data[at] = value
    with contextlib.suppress(DataError):
        read_all(bytes(data))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_give_nothing_but_our_error(data):
    for read in (read_all, lambda d: read_segmentation(memoryview(zlib.compress(d)), "f")):
        with pytest.raises(DataError):
            read(data)
