from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from picture3d.datasets.nuscenes import prepare_nuscenes
from picture3d.datasets.nuscenes_splits import official_split
from picture3d.datasets.prepared import FrameKey, PreparedDataset, log_path
from picture3d.errors import DataError
from picture3d.structures.points import IntensityUnit
from tests.datasets.raw_nuscenes import PERIOD_US, RawWorld


@pytest.fixture
def world(tmp_path) -> RawWorld:
    world = RawWorld(tmp_path / "raw")
    world.write()
    return world


def test_a_scene_becomes_a_log_of_its_sweeps_in_order(world, tmp_path):
    summary = prepare_nuscenes(world.root, tmp_path / "out")
    assert (summary.logs, summary.frames, summary.keyframes, summary.labelled, summary.boxes) == (2, 14, 6, 6, 6)
    reader = PreparedDataset(tmp_path / "out").reader("scene-0002")
    assert reader.keyframes == (0, 3, 6)
    for index in range(len(reader)):
        frame, raw = reader.frame(index), world.sweep_points(1, index)
        assert frame.token == f"s1-d{index}"
        assert np.array_equal(frame.points.xyz, raw[:, :3])
        assert np.array_equal(frame.points.intensity, raw[:, 3])
        assert frame.points.ring is not None
        assert np.array_equal(frame.points.ring, raw[:, 4].astype(np.int16))
        assert frame.points.intensity_unit is IntensityUnit.RAW_255
        assert frame.previous == tuple(range(index - 1, -1, -1))
        if frame.is_keyframe:
            assert frame.labels is not None
            assert np.array_equal(frame.labels, world.labels(1, index))
        else:
            assert frame.labels is None
            assert frame.boxes is None


def test_poses_take_points_where_the_tables_say(world, tmp_path):
    prepare_nuscenes(world.root, tmp_path / "out")
    frame = PreparedDataset(tmp_path / "out").frame(FrameKey("scene-0001", 2))
    assert frame.global_from_lidar is not None
    # 0.1 s at 10 m/s is x = 1; the LiDAR is 1 m ahead of that and 2 m up; its x axis is global y, its y axis is global -x.
    moved = frame.global_from_lidar.apply(np.array([[0.0, 0, 0], [3, 0, 0], [0, 3, 0]]))
    np.testing.assert_allclose(moved, [[2, 5, 2], [2, 8, 2], [-1, 5, 2]], atol=1e-9)


def test_boxes_are_in_the_lidar_frame_with_their_velocity(world, tmp_path):
    prepare_nuscenes(world.root, tmp_path / "out")
    boxes = PreparedDataset(tmp_path / "out").frame(FrameKey("scene-0001", 3)).boxes
    assert boxes is not None
    # Keyframe 1 at 0.15 s: ego x 1.5, LiDAR at (2.5, 5, 2). The car's centre is at global (30.6, 5, 1): 28.1 m along global x,
    # which is LiDAR -y. It drives along global x at 4 m/s, measured between keyframes 0 and 2.
    np.testing.assert_allclose(boxes.center, [[0, -28.1, -1]], atol=1e-9)
    np.testing.assert_allclose(boxes.size, [[4.5, 2.0, 1.5]])
    np.testing.assert_allclose(boxes.yaw, [-np.pi / 2], atol=1e-9)
    np.testing.assert_allclose(boxes.velocity, [[0, -4]], atol=1e-6)
    assert boxes.category == ("vehicle.car",)
    assert boxes.track_id == ("i0",)
    assert boxes.num_points.tolist() == [12]
    assert boxes.num_radar_points is not None
    assert (boxes.num_radar_points.tolist(), boxes.attribute) == ([1], ("vehicle.moving",))


def velocities(world: RawWorld, out: Path) -> list[np.ndarray]:
    prepare_nuscenes(world.root, out)
    reader = PreparedDataset(out).reader("scene-0001")
    found = [reader.frame(index).boxes for index in reader.keyframes]
    return [boxes.velocity[0] for boxes in found if boxes is not None]


def test_velocity_at_the_ends_of_a_track_is_one_sided(world, tmp_path):
    for velocity in velocities(world, tmp_path / "out"):
        np.testing.assert_allclose(velocity, [0, -4], atol=1e-6)


@pytest.mark.parametrize(
    ("keyframe_s", "known"), [(1.4, [True, True, True]), (1.5, [True, True, True]), (1.6, [False, False, False])]
)
def test_velocity_over_a_gap_is_unknown(tmp_path, keyframe_s, known):
    """Central differences may span twice the 1.5 s that one-sided ones may."""
    between = round(keyframe_s * 1e6 / PERIOD_US) - 1
    world = RawWorld(tmp_path / "raw", scenes=1, between=between, points=2)
    world.write()
    assert [bool(np.isfinite(v).all()) for v in velocities(world, tmp_path / "out")] == known


def test_velocity_of_an_object_seen_once_is_unknown(tmp_path):
    world = RawWorld(tmp_path / "raw", scenes=1, keyframes=1)
    world.write()
    assert np.isnan(velocities(world, tmp_path / "out")[0]).all()


@pytest.mark.parametrize(("sweeps", "kept"), [(0, [0, 3, 6]), (1, [0, 2, 3, 5, 6]), (2, list(range(7)))])
def test_only_the_sweeps_asked_for_are_kept(world, tmp_path, sweeps, kept):
    prepare_nuscenes(world.root, tmp_path / "out", sweeps=sweeps)
    reader = PreparedDataset(tmp_path / "out").reader("scene-0001")
    assert [reader.frame(index).token for index in range(len(reader))] == [f"s0-d{number}" for number in kept]
    for index in reader.keyframes[1:]:
        assert reader.frame(index).previous == tuple(range(index - 1, index - 1 - sweeps, -1))


def test_links_never_reach_over_a_gap(world, tmp_path):
    prepare_nuscenes(world.root, tmp_path / "out", sweeps=1)
    reader = PreparedDataset(tmp_path / "out").reader("scene-0001")
    assert reader.frame(1).previous == ()  # sweep 2; sweep 1 before it is not kept


def test_a_rerun_makes_only_what_is_missing_and_gives_the_same_bytes(world, tmp_path):
    out = tmp_path / "out"
    prepare_nuscenes(world.root, out)
    before = {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    log_path(out, "scene-0002").write_bytes(b"cut off")
    (out / "dataset.json").unlink()
    kept = log_path(out, "scene-0001").stat().st_mtime_ns
    calls: list[tuple[int, int]] = []
    summary = prepare_nuscenes(world.root, out, progress=lambda done, total: calls.append((done, total)))
    assert summary.logs_made == 1
    assert calls[-1] == (14, 14)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert log_path(out, "scene-0001").stat().st_mtime_ns == kept
    assert {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_frame_a_rerun_ends_with_the_bytes_of_an_unbroken_run(world, tmp_path):
    prepare_nuscenes(world.root, tmp_path / "whole")
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").rglob("*") if path.is_file()}
    for kill_at in (1, 6, 8, 13):
        out = tmp_path / f"killed-{kill_at}"
        child = os.fork()
        if child == 0:

            def kill(done: int, total: int, at: int = kill_at) -> None:
                if done == at:
                    os.kill(os.getpid(), signal.SIGKILL)

            prepare_nuscenes(world.root, out, progress=kill)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert not (out / "dataset.json").exists()
        assert prepare_nuscenes(world.root, out).logs_made == (2 if kill_at < 7 else 1)
        assert {path.name: path.read_bytes() for path in out.rglob("*") if path.is_file()} == whole


def test_other_raw_data_of_the_same_name_is_prepared_anew(world, tmp_path):
    prepare_nuscenes(world.root, tmp_path / "out")
    other = RawWorld(tmp_path / "other", points=31)
    other.write()
    assert prepare_nuscenes(other.root, tmp_path / "out").logs_made == 2


def test_missing_files_are_counted_and_left_out_only_if_asked(world, tmp_path):
    (world.root / "sweeps/LIDAR_TOP/s0-d2.pcd.bin").unlink()
    (world.root / "lidarseg/v1.0-mini/s0-d3_lidarseg.bin").unlink()
    expected = r"2 files .* not on disk \(1 in sweeps/LIDAR_TOP, 1 in lidarseg/v1.0-mini\), the first is .*--skip-missing"
    with pytest.raises(DataError, match=expected):
        prepare_nuscenes(world.root, tmp_path / "out")
    summary = prepare_nuscenes(world.root, tmp_path / "out", skip_missing=True)
    assert summary.missing_files == 2
    reader = PreparedDataset(tmp_path / "out").reader("scene-0001")
    assert [reader.frame(i).token for i in range(len(reader))] == [f"s0-d{n}" for n in (0, 1, 3, 4, 5, 6)]
    assert reader.frame(2).labels is None
    assert reader.frame(2).previous == (1, 0)


def test_a_scene_without_a_single_file_is_left_out(world, tmp_path):
    for path in world.root.glob("s*/LIDAR_TOP/s1-*"):
        path.unlink()
    prepare_nuscenes(world.root, tmp_path / "out", skip_missing=True)
    assert PreparedDataset(tmp_path / "out").logs() == ("scene-0001",)


def test_points_that_are_not_finite_are_dropped_with_their_labels(world, tmp_path):
    points = world.sweep_points(0, 3)
    points[[4, 9], [0, 3]] = [np.nan, np.inf]
    points.tofile(world.root / "samples/LIDAR_TOP/s0-d3.pcd.bin")
    assert prepare_nuscenes(world.root, tmp_path / "out").dropped_points == 2
    frame = PreparedDataset(tmp_path / "out").frame(FrameKey("scene-0001", 3))
    rows = np.setdiff1d(np.arange(world.points), [4, 9])
    assert frame.labels is not None
    assert np.array_equal(frame.points.xyz, points[rows, :3])
    assert np.array_equal(frame.labels, world.labels(0, 3)[rows])


def test_an_empty_sweep_is_a_frame(world, tmp_path):
    (world.root / "samples/LIDAR_TOP/s0-d3.pcd.bin").write_bytes(b"")
    (world.root / "lidarseg/v1.0-mini/s0-d3_lidarseg.bin").write_bytes(b"")
    prepare_nuscenes(world.root, tmp_path / "out")
    assert len(PreparedDataset(tmp_path / "out").frame(FrameKey("scene-0001", 3)).points) == 0


def test_labels_that_do_not_fit_their_sweep_set_their_scene_aside(world, tmp_path):
    (world.root / "lidarseg/v1.0-mini/s0-d3_lidarseg.bin").write_bytes(bytes(7))
    (why,) = prepare_nuscenes(world.root, tmp_path / "out").set_aside
    assert "s0-d3_lidarseg.bin: 7 labels for the 30 points" in why
    assert PreparedDataset(tmp_path / "out").logs() == ("scene-0002",)


def test_labels_may_lie_beside_the_folder_of_the_tables(world, tmp_path):
    prepare_nuscenes(world.root, tmp_path / "inside")
    (world.root / "lidarseg").rename(world.root.parent / "lidarseg")
    assert prepare_nuscenes(world.root, tmp_path / "beside").labelled == 6
    for log in ("scene-0001", "scene-0002"):
        assert log_path(tmp_path / "beside", log).read_bytes() == log_path(tmp_path / "inside", log).read_bytes()
    # Other folders beside the dataset are none of its business.
    (world.root / "sweeps").rename(world.root.parent / "sweeps")
    with pytest.raises(DataError, match="8 in sweeps/LIDAR_TOP"):
        prepare_nuscenes(world.root, tmp_path / "beside")


def test_panoptic_ids_become_the_instances_of_their_points(world, tmp_path):
    ids = np.random.default_rng(7).integers(0, 32_000, world.points).astype(np.uint16)
    file = world.root / "panoptic/v1.0-mini/s0-d3_panoptic.npz"
    file.parent.mkdir(parents=True)
    np.savez_compressed(file, data=ids)
    row = {"token": "p", "sample_data_token": "s0-d3", "filename": str(file.relative_to(world.root))}
    (world.root / "v1.0-mini/panoptic.json").write_text(json.dumps([row]))
    prepare_nuscenes(world.root, tmp_path / "out")
    reader = PreparedDataset(tmp_path / "out").reader("scene-0001")
    instances = reader.frame(3).instances
    assert instances is not None
    assert np.array_equal(instances, ids)
    assert reader.frame(0).instances is None


def test_a_category_with_another_id_is_refused(world, tmp_path):
    world.tables["category"][0]["index"] = 3
    path = world.root / "v1.0-mini" / "category.json"
    path.write_text(path.read_text().replace("17", "3"))
    with pytest.raises(DataError, match="has index 3"):
        prepare_nuscenes(world.root, tmp_path / "out")


def test_the_datasets_own_splits_go_before_the_official_ones(world, tmp_path):
    splits = '{"splits": {"train": ["scene-0002"], "val": ["scene-0001", "scene-9999"]}}'
    (world.root / "picture3d_splits.json").write_text(splits)
    prepare_nuscenes(world.root, tmp_path / "out")
    dataset = PreparedDataset(tmp_path / "out")
    assert dataset.logs("train") == ("scene-0002",)
    assert dataset.logs("val") == ("scene-0001",)


def test_a_version_without_annotations_needs_no_table_of_objects(world, tmp_path):
    for table in ("sample_annotation", "instance", "attribute"):
        (world.root / f"v1.0-mini/{table}.json").unlink()
    summary = prepare_nuscenes(world.root, tmp_path / "out")
    assert (summary.frames, summary.labelled, summary.boxes) == (14, 6, 0)
    assert PreparedDataset(tmp_path / "out").frame(FrameKey("scene-0001", 0)).boxes is None


def test_official_splits():
    assert official_split("v1.0-mini", "scene-0103") == official_split("v1.0-mini", "scene-0916") == "val"
    assert official_split("v1.0-mini", "scene-0061") == "train"
    assert official_split("v1.0-test", "scene-0077") == "test"
    assert sum(official_split("v1.0-trainval", f"scene-{i:04d}") == "val" for i in range(1200)) == 150
    assert official_split("v1.0-trainval", "scene-0103") == "val"
    assert official_split("v1.0-trainval", "scene-0001") == "train"


@pytest.mark.parametrize("place", ["samples", "v1.0-mini/sample.json", "samples/LIDAR_TOP"])
def test_links_that_lead_to_themselves_are_refused_in_our_own_words(world, tmp_path, place):
    path = world.root / place
    assert path.exists(), "the fixture has moved"
    path.rename(tmp_path / "aside")
    path.symlink_to(path)
    with pytest.raises(DataError) as caught:
        prepare_nuscenes(world.root, tmp_path / "out")
    assert str(world.root) in str(caught.value)
    assert not (tmp_path / "out" / "dataset.json").exists()
