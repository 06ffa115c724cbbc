"""Waymo v1 tfrecords -> prepared frames: the town and real sweeps come back, damage stays where it is."""

from __future__ import annotations

import json
import re
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from picture3d.cli import main
from picture3d.datasets.check_waymo import check_raw_waymo
from picture3d.datasets.frame_columns import columns_of
from picture3d.datasets.label_sets import WAYMO
from picture3d.datasets.prepared import FrameKey, PreparedDataset
from picture3d.datasets.samples import DataConfig, load_sample
from picture3d.datasets.waymo import frame_of_waymo, prepare_waymo, segment_files, segment_name
from picture3d.datasets.waymo_v2 import waymo_version
from picture3d.errors import DataError
from picture3d.formats.columns import PLANES, Codec, CodecKind, encode
from picture3d.formats.protobuf_wire import write_data, write_double, write_integer
from picture3d.formats.tfrecord import RecordWriter, read_records, record_lengths
from picture3d.formats.waymo_frame import read_frame
from picture3d.structures.frame import Frame
from picture3d.structures.points import IntensityUnit
from picture3d.structures.poses import Pose
from picture3d.synthetic import waymo_truth
from picture3d.synthetic.nuscenes_rows import town_seed
from picture3d.synthetic.waymo_drive import WaymoConfig, WaymoFrame, waymo_frame
from picture3d.synthetic.waymo_writer import write_waymo
from picture3d.synthetic.world import build_town
from tests.made_waymo import Made, calibration, echo, floats, image_of, integers, label, laser, small_frame
from tests.sample_data import sample_path
from tests.waymo_reference import rotation_of

SEED = 31
FRAMES = 2


@pytest.fixture(scope="module")
def town(tmp_path_factory) -> Path:
    raw = tmp_path_factory.mktemp("town") / "raw"
    write_waymo(raw, scenes=2, frames_per_scene=FRAMES, seed=SEED, val_scenes=1)
    return raw


@pytest.fixture(scope="module")
def prepared(town) -> PreparedDataset:
    out = town.parent / "prepared"
    prepare_waymo(town, out)
    return PreparedDataset(out)


@pytest.fixture(scope="module")
def pairs(town, prepared) -> list[tuple[Frame, WaymoFrame]]:
    """Prepared frames of the first scene, and what the town says about them."""
    (log,) = prepared.logs("train")
    town_itself = build_town(town_seed(SEED, 1))
    return [(prepared.frame(FrameKey(log, i)), waymo_frame(town_itself, WaymoConfig(frames=FRAMES), i)) for i in range(FRAMES)]


def test_points_of_the_town_come_back(pairs):
    for frame, truth in pairs:
        points = frame.points
        assert points.intensity_unit is IntensityUnit.RAW_UNBOUNDED
        assert points.sensor is not None
        assert points.return_index is not None
        assert points.elongation is not None
        assert points.no_label_zone is not None
        at = 0
        for images in truth.lasers:
            for which, echoes in enumerate(images.returns):
                rows = slice(at, at + len(echoes))
                order = np.argsort(echoes.pixel)
                expected = truth.points(images.laser.name, which)[order]
                np.testing.assert_allclose(points.xyz[rows], expected, rtol=0, atol=2e-5)
                assert np.array_equal(points.intensity[rows], echoes.intensity[order])
                assert np.array_equal(points.elongation[rows], echoes.elongation[order])
                assert np.array_equal(points.no_label_zone[rows], images.in_zone[which][order])
                assert set(points.sensor[rows]) <= {images.laser.name}
                assert set(points.return_index[rows]) <= {which + 1}
                if images.classes is not None:
                    assert frame.labels is not None
                    assert frame.instances is not None
                    assert np.array_equal(frame.labels[rows], images.classes[which][order])
                    assert np.array_equal(frame.instances[rows], echoes.instance[order])
                elif frame.labels is not None:
                    assert not frame.labels[rows].any()
                at += len(echoes)
        assert at == len(points)
        assert at > 100_000
    assert pairs[0][0].labels is not None
    assert pairs[1][0].labels is None  # classes come at 2 Hz
    assert any(truth.lasers[0].in_zone[0].any() for _, truth in pairs)


def test_boxes_of_the_town_come_back_in_the_frame_of_the_vehicle(pairs):
    for frame, truth in pairs:
        boxes, expected = frame.boxes, truth.boxes
        assert boxes is not None
        assert len(boxes) > 20
        np.testing.assert_allclose(boxes.center, expected.center, rtol=0, atol=1e-9)
        np.testing.assert_allclose(boxes.size, expected.size, rtol=0, atol=1e-9)
        np.testing.assert_allclose(np.cos(boxes.yaw - expected.yaw), 1, atol=1e-9)
        # The town's own boxes are turned by yaw alone, the road is nearly flat.
        np.testing.assert_allclose(boxes.velocity, expected.velocity, rtol=0, atol=0.05)
        turned = np.hypot(*boxes.velocity.T), np.hypot(*truth.global_velocity.T)
        assert turned[0] == pytest.approx(turned[1], abs=0.05)
        assert boxes.acceleration is not None
        assert boxes.difficulty is not None
        assert np.array_equal(boxes.difficulty, np.where(expected.num_points <= 5, 2, 0))
        assert (boxes.category, boxes.track_id) == (expected.category, expected.track_id)
        assert np.array_equal(boxes.num_points, expected.num_points)


def test_logs_poses_times_and_links(town, prepared, pairs):
    splits = json.loads((town / "picture3d_splits.json").read_text())["splits"]
    assert {split: list(prepared.logs(split)) for split in prepared.splits} == splits
    assert prepared.label_set is not None
    assert prepared.label_set.name == "waymo"
    assert prepared.label_set.num_classes == 23
    for index, (frame, truth) in enumerate(pairs):
        assert frame.is_keyframe
        assert frame.timestamp_us == truth.timestamp_us
        assert frame.global_from_ego is not None
        assert np.array_equal(frame.global_from_ego.matrix, truth.global_from_vehicle.matrix)
        assert np.array_equal(frame.ego_from_lidar.matrix, np.eye(4))
        assert frame.previous == tuple(range(index - 1, -1, -1))
        assert frame.token == f"{frame.log}_{index:03d}"


def test_one_frame_or_several_is_chosen_when_they_are_loaded(prepared, pairs):
    (before, truth_before), (now, truth_now) = pairs
    key = FrameKey(now.log, 1)
    tree = {"root": str(prepared.root), "features": ["intensity", "elongation", "time_lag"]}
    single, several = (
        load_sample(prepared, key, DataConfig.from_tree({**tree, "sweeps": sweeps}), None) for sweeps in (1, 5)
    )  # fmt: skip
    assert np.array_equal(single.xyz, now.points.xyz)
    own = len(now.points)
    assert np.array_equal(several.xyz[:own], now.points.xyz)
    away = ~(np.abs(before.points.xyz[:, :2]) < 1).all(1)
    assert len(several.xyz) == own + np.count_nonzero(away)
    everywhere = [echoes.xyz_global[np.argsort(echoes.pixel)] for images in truth_before.lasers for echoes in images.returns]
    expected = truth_now.global_from_vehicle.inverse().apply(np.concatenate(everywhere)[away])
    np.testing.assert_allclose(several.xyz[own:], expected, rtol=0, atol=5e-5)
    np.testing.assert_allclose(several.features[own:, 2], 0.1, rtol=1e-6)
    assert not several.features[:own, 2].any()
    np.testing.assert_allclose(single.features[:, 0], np.tanh(now.points.intensity), rtol=1e-6)


def published(root: Path, **lists: str) -> Path:
    """Three segments as OpenPCDet wants them: all in raw_data/, lists of the splits beside it."""
    for number, name in enumerate("abc"):
        write_segment(root, name, small_segment(name, seed=number), "raw_data")
    (root / "ImageSets").mkdir()
    for split, text in lists.items():
        (root / "ImageSets" / f"{split}.txt").write_text(text)
    return root


def test_segments_of_one_folder_are_split_by_their_lists(tmp_path):
    published(
        tmp_path / "raw",
        train="segment-a_with_camera_labels.tfrecord\nsegment-c.tfrecord\n",
        val="segment-b_with_camera_labels.tfrecord\n",
    )
    summary = prepare_waymo(tmp_path / "raw", tmp_path / "out")
    assert (summary.logs, summary.frames, summary.missing_files) == (3, 9, 0)
    dataset = PreparedDataset(tmp_path / "out")
    assert (dataset.logs("train"), dataset.logs("val")) == (("a", "c"), ("b",))
    assert waymo_version(tmp_path / "raw") == 1


def test_segments_of_a_list_that_are_not_there_are_counted_and_left_out_only_if_asked(tmp_path):
    raw = published(
        tmp_path / "raw", train="segment-a.tfrecord segment-b.tfrecord segment-d.tfrecord", val="segment-c.tfrecord"
    )
    with pytest.raises(DataError, match=r"1 files .*1 in .*raw_data\), the first is .*segment-d\.tfrecord.*--skip-missing"):
        prepare_waymo(raw, tmp_path / "out")
    summary = prepare_waymo(raw, tmp_path / "out", skip_missing=True)
    assert (summary.logs, summary.missing_files) == (3, 1)
    (finding,) = check_raw_waymo(raw).findings
    assert (finding.kind, finding.count) == ("missing", 1)


@pytest.mark.parametrize(
    ("lists", "why"),
    [
        ({"train": "segment-a.tfrecord segment-b.tfrecord segment-c.tfrecord", "val": "segment-b.tfrecord"}, "train too"),
        ({"train": "segment-a.tfrecord"}, r"no list names segment-b_with_camera_labels\.tfrecord \(2 such\)"),
    ],
)
def test_lists_that_contradict_the_segments_are_refused(tmp_path, lists, why):
    with pytest.raises(DataError, match=why):
        prepare_waymo(published(tmp_path / "raw", **lists), tmp_path / "out")


def test_without_lists_everything_in_the_one_folder_is_for_training(tmp_path):
    raw = published(tmp_path / "raw")
    (raw / "ImageSets").rmdir()
    prepare_waymo(raw, tmp_path / "out")
    assert PreparedDataset(tmp_path / "out").logs("train") == ("a", "b", "c")


def test_a_second_run_makes_nothing_and_coordinates_can_be_rounded(town, prepared, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in (prepared.root / "logs").iterdir()}
    summary = prepare_waymo(town, prepared.root)
    assert (summary.logs, summary.logs_made, summary.frames, summary.set_aside) == (2, 0, 2 * FRAMES, ())
    assert {path: path.stat().st_mtime_ns for path in (prepared.root / "logs").iterdir()} == before
    prepare_waymo(town, tmp_path / "rounded", xyz_codec=Codec(CodecKind.GRID, 0.001), sweeps=0)
    rounded = PreparedDataset(tmp_path / "rounded")
    for key in prepared.keyframes():
        exact, near = prepared.frame(key), rounded.frame(key)
        assert near.previous == ()
        assert 0 < np.abs(exact.points.xyz - near.points.xyz).max() < 0.00051


# -- damage -------------------------------------------------------------------------------------------------------------


def write_segment(root: Path, name: str, frames: list[bytes], folder: str = "training") -> Path:
    path = root / folder / f"segment-{name}_with_camera_labels.tfrecord"
    path.parent.mkdir(parents=True, exist_ok=True)
    with RecordWriter(path) as writer:
        for frame in frames:
            writer.write(frame)
    return path


def small_segment(name: str, frames: int = 3, seed: int = 0) -> list[bytes]:
    rng = np.random.default_rng(seed)
    return [small_frame(rng, name=name, timestamp_us=1 + 100_000 * i).bytes() for i in range(frames)]


@pytest.fixture
def three(tmp_path) -> Path:
    for number, name in enumerate("abc"):
        write_segment(tmp_path / "raw", name, small_segment(name, seed=number))
    return tmp_path / "raw"


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["picture3d", *map(str, words)])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def test_a_flipped_byte_sets_its_log_aside_and_the_others_go_on(three, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    damaged = segment_files(three / "training")[1]
    second = [offset for offset, _ in read_records(damaged)][1]
    whole = damaged.read_bytes()
    flip(damaged, second + 100)
    assert call(monkeypatch, "prepare", "waymo", three, out) == 1
    told = capsys.readouterr().out
    assert f"log b is set aside: {damaged}: " in told
    assert f"record at byte {second} do not match their checksum" in told
    assert "1 logs are set aside" in told
    assert PreparedDataset(out).logs("train") == ("a", "c")
    assert sorted(path.name for path in (out / "logs").iterdir()) == ["a.p3d", "b.p3d.damaged", "c.p3d"]
    damaged.write_bytes(whole)
    assert call(monkeypatch, "prepare", "waymo", three, out) == 0
    assert "3 logs (1 made now)" in capsys.readouterr().out
    assert PreparedDataset(out).logs("train") == ("a", "b", "c")


def test_two_processes_make_the_same_bytes_and_set_the_same_log_aside(three, tmp_path):
    damaged = segment_files(three / "training")[0]
    damaged.write_bytes(damaged.read_bytes()[:-3])
    alone = prepare_waymo(three, tmp_path / "alone")
    together = prepare_waymo(three, tmp_path / "together", processes=2)
    assert alone.set_aside == together.set_aside
    assert len(together.set_aside) == 1
    assert (together.logs, together.logs_made, together.points) == (2, 2, alone.points)
    for log in ("b", "c"):
        assert (tmp_path / "alone/logs" / f"{log}.p3d").read_bytes() == (tmp_path / "together/logs" / f"{log}.p3d").read_bytes()


@pytest.mark.parametrize("lost", [1, 5, 1000])
def test_a_truncated_record_sets_its_log_aside(three, tmp_path, lost):
    damaged = segment_files(three / "training")[2]
    last = [offset for offset, _ in read_records(damaged)][-1]
    damaged.write_bytes(damaged.read_bytes()[:-lost])
    summary = prepare_waymo(three, tmp_path / "out")
    (why,) = summary.set_aside
    assert f"cut off: the record at byte {last}" in why
    assert (summary.logs, summary.frames) == (2, 6)


def test_damage_inside_a_frame_names_file_record_and_lidar(three, tmp_path):
    rng = np.random.default_rng(9)
    bad = small_frame(rng, name="b", timestamp_us=2)
    bad.lasers[1] = laser(2, echo(floats(image_of(rng, 3, 5), (1 << 30, 1 << 30, 4))))
    path = write_segment(three, "b", [*small_segment("b", 1), bad.bytes()])
    offset = [offset for offset, _ in read_records(path)][1]
    (why,) = prepare_waymo(three, tmp_path / "out").set_aside
    assert f"{path}, record 1 at byte {offset}, LiDAR FRONT, return 1, range image: has shape" in why


# What a version adds to a frame: z of speed and acceleration and points of the TOP LiDAR (1.3), the box as the cameras saw it
# (labels, 11 and 12, 1.3), classes of the TOP LiDAR's points (1.4.0), the map and its offset (frame, 10 and 11, 1.4.2).
_VERSIONS = {"1.2": 0, "1.3": 1, "1.4.0": 2, "1.4.3": 3}


def frame_of_version(version: str) -> Frame:
    added = _VERSIONS[version]
    rng = np.random.default_rng(12)
    made = small_frame(rng)
    box = b"".join(write_double(i, 1.0) for i in range(1, 8))
    bare = [
        write_data(1, b"".join(write_double(i, v) for i, v in enumerate((10, 2, 1, 2, 4, 1.5, 0.3), 1)))
        + write_data(2, b"".join(write_double(i, v) for i, v in enumerate((3, 4, 0, 0, 5, 6)[: 6 if added else 4], 1)))
        + write_integer(3, kind) + write_data(4, name.encode()) + write_integer(7, 7)
        for kind, name in ((1, "a"), (2, "b"))
    ]  # fmt: skip
    new = write_integer(13, 6) + write_data(11, b"FRONT") + write_data(12, box)
    made.labels = [part + new for part in bare] if added else bare
    top, poses = image_of(rng, 4, 6, 0.7), np.zeros((4, 6, 6), np.float32)
    classes = integers(rng.integers(1, 23, (4, 6, 2))) if added >= 2 else b""
    made.lasers = [laser(1, echo(floats(top), floats(poses), classes, camera=b"not read"), echo(floats(top)))]
    made.extra = write_data(10, b"\x08\x07" * 99) + write_data(11, write_double(1, 5.0)) if added >= 3 else b""
    frame, lost = frame_of_waymo(read_frame(made.bytes()), "segment", 0, version)
    assert lost == 0
    return frame


@pytest.mark.parametrize("version", ["1.2", "1.3", "1.4.0"])
def test_a_frame_means_the_same_in_every_version_of_v1_that_has_it(version):
    older = frame_of_version(version)
    stored, newest = (columns_of(frame, version) for frame in (older, frame_of_version("1.4.3")))
    assert newest.keys() - stored.keys() == (set() if version == "1.4.0" else {"labels", "instances"})
    for name, column in stored.items():
        assert np.array_equal(column, newest[name]), name
    assert older.boxes is not None
    assert older.boxes.num_points.tolist() == [7, 7]
    np.testing.assert_allclose(older.boxes.velocity, [[3, 4], [3, 4]])


def test_if_no_log_can_be_read_there_is_no_dataset(three, tmp_path, monkeypatch, capsys):
    for path in segment_files(three / "training"):
        path.write_bytes(b"not a tfrecord file")
    assert call(monkeypatch, "prepare", "waymo", three, tmp_path / "out") == 2
    assert "no log could be read" in capsys.readouterr().err
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_a_full_disk_is_not_taken_for_a_damaged_log(three, tmp_path, monkeypatch):
    def full(self: object, frame: Frame) -> None:
        raise DataError("the disk is full")

    monkeypatch.setattr("picture3d.datasets.preparing.LogWriter.add", full)
    with pytest.raises(DataError, match="the disk is full"):
        prepare_waymo(three, tmp_path / "out")


@pytest.mark.parametrize(
    ("frames", "why"),
    [
        ([], "holds no record"),
        (small_segment("other"), "belongs to segment other"),
        (small_segment("b")[::-1], "record 1 at byte .* lies before that of the sweep before it"),
        ([small_segment("b")[0]] * 2, "is the time of the sweep before it too"),
    ],
)
def test_segments_that_contradict_themselves_are_set_aside(three, tmp_path, frames, why):
    write_segment(three, "b", frames)
    (found,) = prepare_waymo(three, tmp_path / "out").set_aside
    assert found.startswith("log b is set aside: ")
    assert re.search(why, found)


def test_folders_without_segments_and_segments_twice_are_refused(three, tmp_path):
    with pytest.raises(DataError, match="no tfrecord in training/, validation/, testing/"):
        prepare_waymo(three / "training", tmp_path / "out")
    write_segment(three, "b", small_segment("b"), "validation")
    with pytest.raises(DataError, match=r"holds segment b, as .* does"):
        prepare_waymo(three, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_segments_may_lie_one_folder_deeper_and_links_in_circles_do_no_harm(tmp_path):
    write_segment(tmp_path, "a", small_segment("a"), "training/training_0000")
    (tmp_path / "training" / "circle").symlink_to(tmp_path / "training")
    assert prepare_waymo(tmp_path, tmp_path / "out").logs == 1


def test_the_23_classes_are_in_the_order_of_the_format():
    order = ["car", "truck", "bus", "other_vehicle", "motorcyclist", "bicyclist", "pedestrian", "sign", "traffic_light", "pole"]
    assert WAYMO.class_names[1:11] == tuple(order)
    numbers = {
        "construction_cone": waymo_truth.CONE, "bicycle": waymo_truth.BICYCLE, "motorcycle": waymo_truth.MOTORCYCLE,
        "building": waymo_truth.BUILDING, "vegetation": waymo_truth.VEGETATION, "tree_trunk": waymo_truth.TREE_TRUNK,
        "curb": waymo_truth.CURB, "road": waymo_truth.ROAD_CLASS, "lane_marker": waymo_truth.LANE_MARKER,
        "other_ground": waymo_truth.OTHER_GROUND, "walkable": waymo_truth.WALKABLE, "sidewalk": waymo_truth.SIDEWALK_CLASS,
    }  # fmt: skip
    for name, number in numbers.items():
        assert WAYMO.class_names[number] == name
    assert WAYMO.to_train(np.array([0, 1, 22, 23, 255], np.uint8)).tolist() == [0, 1, 22, 0, 0]


def test_names_of_segments():
    assert segment_name(Path("segment-10_0_1_0_with_camera_labels.tfrecord")) == "10_0_1_0"
    assert segment_name(Path("segment-10_0_1_0.tfrecord")) == "10_0_1_0"
    assert segment_name(Path("frames.tfrecord")) == "frames"


def test_lengths_of_records_are_told_without_reading_them(three):
    path = segment_files(three / "training")[0]
    assert [length for length, _ in record_lengths(path)] == [len(payload) for _, payload in read_records(path)]
    path.write_bytes(path.read_bytes()[:-1])
    found = record_lengths(path)
    assert [next(found)[0] > 0 for _ in range(2)] == [True, True]
    with pytest.raises(DataError, match="cut off"):
        next(found)


# -- frames -------------------------------------------------------------------------------------------------------------


def one(made: Made, *, annotated: bool = True) -> tuple[Frame, int]:
    return frame_of_waymo(read_frame(made.bytes(), "f"), "log", 0, "f", annotated=annotated)


def test_a_frame_without_labels_was_looked_at_except_in_the_test_split(tmp_path):
    made = small_frame(np.random.default_rng(0), labels=[])
    frame, _ = one(made)
    assert frame.boxes is not None
    assert len(frame.boxes) == 0
    assert one(made, annotated=False)[0].boxes is None
    write_segment(tmp_path, "segment", [made.bytes()], "testing")
    prepare_waymo(tmp_path, tmp_path / "out")
    dataset = PreparedDataset(tmp_path / "out")
    assert dataset.frame(dataset.keyframes("test")[0]).boxes is None


def test_unknown_labels_are_dropped_and_speeds_are_turned_into_the_vehicle_frame():
    pose = Pose.from_yaw(np.pi / 2, (1000.0, 0.0, 0.0))
    labels = [label(id="a", motion=(0, 5, 2, 0)), label(kind=0, id="b"), label(kind=4, id="c", motion=(1, 0, 0, 0))]
    boxes = one(Made(pose=pose.matrix, labels=labels))[0].boxes
    assert boxes is not None
    assert (boxes.category, boxes.track_id) == (("vehicle", "cyclist"), ("a", "c"))
    np.testing.assert_allclose(boxes.velocity, [[5, 0], [0, -1]], atol=1e-12)
    assert boxes.acceleration is not None
    np.testing.assert_allclose(boxes.acceleration, [[0, -2], [0, 0]], atol=1e-12)
    with pytest.raises(DataError, match="type 5"):
        one(Made(labels=[label(kind=5)]))


def test_empty_lidars_give_no_points(tmp_path):
    blank = np.full((3, 5, 4), -1, np.float32)
    made = Made(calibrations=[calibration(2), calibration(3)], lasers=[laser(2), laser(3, echo(floats(blank)))], name="a")
    frame, lost = one(made)
    assert (len(frame.points), lost) == (0, 0)
    assert frame.labels is None
    write_segment(tmp_path, "a", [made.bytes()])
    prepare_waymo(tmp_path, tmp_path / "out")
    dataset = PreparedDataset(tmp_path / "out")
    assert len(dataset.frame(dataset.keyframes()[0]).points) == 0


def test_golden_frame_without_range_images_is_prepared_with_its_75_boxes(tmp_path):
    (tmp_path / "training").mkdir()
    source = sample_path("waymo/frame_without_lasers/pvps_data_one_frame.tfrecord")
    (tmp_path / "training" / source.name).symlink_to(source)
    summary = prepare_waymo(tmp_path, tmp_path / "out")
    assert (summary.frames, summary.points, summary.boxes) == (1, 0, 75)
    dataset = PreparedDataset(tmp_path / "out")
    boxes = dataset.frame(dataset.keyframes()[0]).boxes
    assert boxes is not None
    cars = np.array(boxes.category) == "vehicle"
    fast = cars & (np.hypot(*boxes.velocity.T) > 2)
    # What drives, drives along its heading: the speeds are turned into the vehicle frame as they should.
    ahead = np.stack([np.cos(boxes.yaw), np.sin(boxes.yaw)], 1)
    assert fast.sum() >= 1
    along = (boxes.velocity * ahead).sum(1)[fast] / np.hypot(*boxes.velocity[fast].T)
    assert (along > 0.97).all()


def test_points_that_are_not_finite_are_left_out_and_counted():
    image = np.ones((3, 5, 4), np.float32)
    image[0, 0, 0], image[1, 1, 1], image[2, 2, 2] = np.inf, np.nan, np.nan
    made = Made(calibrations=[calibration(2)], lasers=[laser(2, echo(floats(image), b"", integers(np.ones((3, 5, 2), int))))])
    frame, lost = one(made)
    assert (len(frame.points), lost) == (12, 3)
    assert frame.labels is not None
    assert len(frame.labels) == 12


GRID = np.ones((3, 5, 4), np.float32)


@pytest.mark.parametrize(
    ("lasers", "why"),
    [
        ([laser(1, echo(floats(GRID)))], "LiDAR TOP, return 1: the frame lacks the poses of its pixels"),
        ([laser(1, b"", echo(floats(GRID)))], "LiDAR TOP, return 2: the frame lacks the poses"),
        ([laser(1, echo(floats(GRID), floats(np.zeros((3, 4, 6)))))], r"poses of its pixels have shape \(3, 4, 6\)"),
        ([laser(3, echo(floats(GRID)))], "LiDAR SIDE_LEFT, return 1: the frame holds no calibration of it"),
        ([laser(2, echo(floats(GRID), b"", integers(np.zeros((3, 4, 2), int))))], r"segmentation: has \(3, 4\) pixels"),
        ([laser(2, echo(floats(GRID), b"", integers(np.full((3, 5, 2), 70_000))))], "a point has instance 70000"),
        ([laser(2, echo(floats(GRID), b"", integers(np.full((3, 5, 2), -1))))], "a point has instance -1"),
        ([laser(2, echo(floats(GRID), b"", integers(np.stack([GRID[..., 0], GRID[..., 0] * 256], 2))))], "has class 256"),
    ],
)
def test_frames_that_contradict_themselves_are_refused(lasers, why):
    with pytest.raises(DataError, match=f"^f, .*{why}"):
        one(Made(calibrations=[calibration(1), calibration(2)], lasers=lasers))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4), st.integers(0, 2**32 - 1))
def test_any_damage_gives_our_error_or_a_frame_that_can_be_stored(changes, seed):
    rng = np.random.default_rng(seed)
    parts = [floats(image_of(rng, 3, 5)), floats(rng.normal(size=(3, 5, 6))), integers(rng.integers(0, 23, (3, 5, 2)))]
    inside = [bytearray(zlib.decompress(part)) for part in parts]
    for at, value in changes[::2]:
        # Inside a matrix, where no checksum of zlib sees it.
        part = inside[at % 3]
        part[at // 3 % len(part)] = value
    streams = [zlib.compress(bytes(part)) for part in inside]
    made = small_frame(rng, lasers=[laser(1, echo(*streams), echo(streams[0]))], calibrations=[calibration(1)])
    data = bytearray(made.bytes())
    for at, value in changes[1::2]:
        data[at % len(data)] = value
    try:
        frame, _ = frame_of_waymo(read_frame(bytes(data), "f"), "log", 0, "f")
    except DataError:
        return
    columns_of(frame, "f")
    for codec in (PLANES, Codec(CodecKind.GRID, 0.001)):
        encode(frame.points.xyz, codec)


def test_points_far_beyond_any_lidar_are_refused():
    far = GRID.copy()
    far[0, 0, 0] = 1e6
    with pytest.raises(DataError, match=r"a point lies .* m from the car"):
        one(Made(calibrations=[calibration(2)], lasers=[laser(2, echo(floats(far)))]))


def test_inclinations_of_another_number_of_beams_are_refused():
    made = Made(calibrations=[calibration(2, beams=[0.0, 0.1])], lasers=[laser(2, echo(floats(GRID)))])
    with pytest.raises(DataError, match="has 3 rows, but the calibration gives the inclinations of 2 beams"):
        one(made)


# -- real sweeps through a real calibration -----------------------------------------------------------------------------


def test_golden_sweep_seen_through_the_real_top_calibration_comes_back_within_a_pixel(tmp_path):
    """Every point goes to its nearest pixel; what is read back lies within half a pixel of it, and at its range."""
    (payload,) = (p for _, p in read_records(sample_path("waymo/frame_without_lasers/pvps_data_one_frame.tfrecord")))
    real = read_frame(payload)
    top, height, width = real.calibrations[1], 64, 2650
    sweep = np.fromfile(sample_path("waymo/lidar_frames/seq_0_frame_100.bin"), "<f4").reshape(-1, 5).astype(np.float64)
    # The car stands: the pose of every pixel is that of the frame.
    rng = np.random.default_rng(6)
    stored = np.concatenate([rng.uniform(-0.4, 0.4, 3), rng.uniform(-100, 100, 3)]).astype(np.float32)
    poses = np.broadcast_to(stored, (height, width, 6))
    angles, place = np.split(stored.astype(np.float64), 2)
    frame_pose = Pose(rotation_of(*angles[:, None])[0], place)
    local = top.vehicle_from_laser.inverse().apply(sweep[:, :3])
    away = np.linalg.norm(local, axis=1)
    up = np.arcsin(local[:, 2] / away)
    azimuth = np.arctan2(local[:, 1], local[:, 0]) + top.vehicle_from_laser.yaw
    column = np.floor((np.pi - azimuth) / (2 * np.pi) * width).astype(int) % width
    beams = top.beam_inclinations
    ring = np.searchsorted((beams[1:] + beams[:-1]) / 2, up)
    gap = np.maximum(np.diff(beams, prepend=2 * beams[0] - beams[1]), np.diff(beams, append=2 * beams[-1] - beams[-2])) / 2
    seen = np.flatnonzero((np.abs(up - beams[ring]) <= gap[ring]) & (away < 75))
    pixel = (height - 1 - ring) * width + column
    _, chosen = np.unique(pixel[seen], return_index=True)
    rows = seen[chosen]  # in order of their pixels
    image = np.full((height * width, 4), -1, np.float32)
    # tanh of what is above 9 is 1 in float32.
    raw = np.arctanh(np.minimum(sweep[:, 3], np.tanh(9)))
    image[pixel[rows]] = np.stack([away[rows], raw[rows], sweep[rows, 4], -np.ones(len(rows))], 1)
    made = Made(
        name="real",
        pose=frame_pose.matrix,
        calibrations=[calibration(1, top.vehicle_from_laser.matrix, beams=beams)],
        lasers=[laser(1, echo(floats(image.reshape(height, width, 4)), floats(poses)))],
    )
    write_segment(tmp_path, "real", [made.bytes()])
    prepare_waymo(tmp_path, tmp_path / "out")
    dataset = PreparedDataset(tmp_path / "out")
    points = dataset.frame(dataset.keyframes()[0]).points
    assert len(points) == len(rows) > 100_000
    resolution = away[rows] * np.hypot(gap[ring[rows]], np.pi / width)
    apart = np.linalg.norm(points.xyz - sweep[rows, :3], axis=1)
    assert (apart <= resolution * 1.001 + 1e-4).all()
    found = np.linalg.norm(points.xyz - top.vehicle_from_laser.translation, axis=1)
    np.testing.assert_allclose(found, away[rows], rtol=0, atol=1e-4)
    np.testing.assert_allclose(np.tanh(points.intensity), sweep[rows, 3], rtol=0, atol=1e-5)
    assert points.elongation is not None
    assert np.array_equal(points.elongation, sweep[rows, 4].astype(np.float32))
