from __future__ import annotations

import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.spatial import KDTree

from picture3d.datasets.argoverse2 import prepare_argoverse2, read_calibration, read_city_poses, read_sweep
from picture3d.datasets.prepared import FrameKey, PreparedDataset
from picture3d.errors import ConfigError, DataError
from picture3d.formats.feather import read_feather
from tests.sample_data import sample_path

pa = pytest.importorskip("pyarrow")
from pyarrow import feather  # noqa: E402

LOG = "argoverse2/7fab2350-7eaf-3b7e-a39d-6937a4c1bede"
TIMES = (315966265259836000, 315966265360032000)


def save(path: Path, columns: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    feather.write_feather(pa.table(columns), str(path), compression="zstd")


def sweep_columns(points: int = 4) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    columns: dict[str, Any] = {axis: rng.uniform(-9, 9, points).astype(np.float16) for axis in "xyz"}
    columns["intensity"] = np.arange(points, dtype=np.uint8)
    columns["laser_number"] = np.array([0, 31, 32, 63], np.uint8)[:points]
    columns["offset_ns"] = np.arange(points, dtype=np.int32) * 1000
    return columns


def pose_columns(count: int) -> dict[str, Any]:
    """The ego looks along the city's y and drives 1 m per sweep along it."""
    half = np.sqrt(0.5)
    out: dict[str, Any] = {"timestamp_ns": np.arange(count) * 100_000_000 + 10**15}
    for name, value in zip(("qw", "qx", "qy", "qz", "tx_m", "ty_m", "tz_m"), (half, 0, 0, half, 5, 0, 0), strict=True):
        out[name] = np.full(count, float(value))
    out["ty_m"] = np.arange(count, dtype=float)
    return out


def box_columns(count: int) -> dict[str, Any]:
    """One car that keeps 10 m before the ego: it drives as fast, 10 m/s along the ego's x."""
    out: dict[str, Any] = pose_columns(count)
    out |= {"qw": np.ones(count), "qz": np.zeros(count), "tx_m": np.full(count, 10.0), "ty_m": np.zeros(count)}
    out |= {"length_m": np.full(count, 4.0), "width_m": np.full(count, 2.0), "height_m": np.full(count, 1.5)}
    out |= {"track_uuid": ["a"] * count, "category": ["REGULAR_VEHICLE"] * count, "num_interior_pts": np.arange(count)}
    return out


def write_log(folder: Path, count: int = 3, annotated: bool = True) -> Path:
    for time in pose_columns(count)["timestamp_ns"]:
        save(folder / "sensors" / "lidar" / f"{time}.feather", sweep_columns())
    save(folder / "city_SE3_egovehicle.feather", pose_columns(count))
    if annotated:
        save(folder / "annotations.feather", box_columns(count))
    return folder


def test_sweeps_poses_boxes_and_velocities_arrive_in_the_frame(tmp_path):
    write_log(tmp_path / "raw" / "train" / "a")
    write_log(tmp_path / "raw" / "test" / "b", annotated=False)
    assert prepare_argoverse2(tmp_path / "raw", tmp_path / "out").frames == 6
    dataset = PreparedDataset(tmp_path / "out")
    assert [dataset.logs(split) for split in ("train", "test")] == [("a",), ("b",)]
    frame = dataset.frame(FrameKey("a", 2))
    columns = sweep_columns()
    assert np.array_equal(frame.points.xyz, np.stack([columns[axis] for axis in "xyz"], axis=1).astype(np.float32))
    assert frame.points.ring is not None
    assert frame.points.ring.tolist() == [0, 31, 32, 63]
    assert frame.points.sensor is not None
    assert frame.points.sensor.tolist() == [1, 1, 2, 2]
    assert frame.timestamp_us == (10**15 + 200_000_000) // 1000
    assert frame.previous == (1, 0)
    assert frame.global_from_ego is not None
    np.testing.assert_allclose(frame.global_from_ego.matrix @ [1, 0, 0, 1], [5, 3, 0, 1], atol=1e-9)
    assert frame.boxes is not None
    assert (frame.boxes.category, frame.boxes.track_id) == (("REGULAR_VEHICLE",), ("a",))
    assert frame.boxes.num_points.tolist() == [2]
    np.testing.assert_allclose(frame.boxes.velocity, [[10, 0]], atol=1e-6)
    np.testing.assert_allclose(frame.boxes.center, [[10, 0, 0]])
    assert dataset.frame(FrameKey("b", 0)).boxes is None


def test_a_rerun_makes_only_what_changed(tmp_path):
    log = write_log(tmp_path / "raw" / "train" / "a")
    write_log(tmp_path / "raw" / "val" / "b")
    assert prepare_argoverse2(tmp_path / "raw", tmp_path / "out").logs_made == 2
    assert prepare_argoverse2(tmp_path / "raw", tmp_path / "out").logs_made == 0
    save(log / "annotations.feather", box_columns(3) | {"height_m": np.full(3, 1.6)})
    assert prepare_argoverse2(tmp_path / "raw", tmp_path / "out").logs_made == 1


def test_points_that_are_not_finite_are_dropped_and_counted(tmp_path):
    log = write_log(tmp_path / "a", count=1)
    columns = sweep_columns()
    columns["y"][1] = np.nan
    save(log / "sensors" / "lidar" / f"{10**15}.feather", columns)
    assert prepare_argoverse2(log, tmp_path / "out").dropped_points == 1


def test_an_annotated_sweep_that_is_not_on_disk_is_refused_or_counted(tmp_path):
    log = write_log(tmp_path / "a")
    (log / "sensors" / "lidar" / f"{10**15}.feather").unlink()
    with pytest.raises(DataError, match="1 files"):
        prepare_argoverse2(log, tmp_path / "out")
    assert prepare_argoverse2(log, tmp_path / "out", skip_missing=True).missing_files == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"qx": np.full(3, 0.7)}, "upright"),
        ({"length_m": np.array([4.0, np.nan, 4.0])}, "upright"),
        ({"width_m": np.zeros(3)}, "upright"),
        ({"category": ["SPACESHIP"] * 3}, "SPACESHIP"),
        ({"timestamp_ns": np.full(3, 10**15)}, "two boxes"),
        ({"num_interior_pts": np.array([0.5, 1, 2])}, "whole numbers"),
        ({"category": pa.array(["BUS", None, "BUS"])}, "absent"),
    ],
)
def test_impossible_boxes_are_refused_with_file_and_reason(tmp_path, change, said):
    log = write_log(tmp_path / "a")
    save(log / "annotations.feather", box_columns(3) | change)
    with pytest.raises(DataError, match=said):
        prepare_argoverse2(log, tmp_path / "out")


def test_poses_that_are_absent_twice_or_no_rotation_are_refused(tmp_path):
    log = write_log(tmp_path / "a")
    for change, said in (
        ({"qw": np.zeros(3)}, "unit quaternion"),
        ({"timestamp_ns": np.full(3, 10**15)}, "occurs twice"),
        ({"timestamp_ns": np.arange(3)}, "no pose at the time"),
    ):
        save(log / "city_SE3_egovehicle.feather", pose_columns(3) | change)
        with pytest.raises(DataError, match=said):
            prepare_argoverse2(log, tmp_path / "out")


def test_damaged_and_foreign_tables_give_our_error(tmp_path):
    path = tmp_path / "t.feather"
    with pytest.raises(DataError, match="no such file"):
        read_sweep(path)
    save(path, sweep_columns() | {"laser_number": np.array([0, 1, 2, 64], np.uint8)})
    with pytest.raises(DataError, match="laser numbers"):
        read_sweep(path)
    save(path, {"x": [1.0]})
    with pytest.raises(DataError, match="has no column y"):
        read_sweep(path)
    save(path, sweep_columns())
    whole = path.read_bytes()
    rng = np.random.default_rng(1)
    for length in rng.integers(0, len(whole), 40):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match="not a whole Feather file"):
            read_sweep(path)


def test_a_folder_without_logs_is_refused(tmp_path):
    with pytest.raises(DataError, match="no log"):
        prepare_argoverse2(tmp_path, tmp_path / "out")


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"picture3d\[arrow\]"):
        read_feather(tmp_path / "a.feather", {})


def test_golden_points_inside_the_boxes_of_a_real_sweep_are_those_it_counts(tmp_path):
    sample = sample_path(LOG)
    summary = prepare_argoverse2(sample, tmp_path / "out", skip_missing=True)
    assert summary.frames == 2
    frame = PreparedDataset(tmp_path / "out").frame(FrameKey(sample.name, 0))
    boxes = frame.boxes
    assert boxes is not None
    assert len(boxes) == 81
    xyz = frame.points.xyz.astype(np.float64)
    inside = []
    for center, size, yaw in zip(boxes.center, boxes.size, boxes.yaw, strict=True):
        near = xyz - center
        x = near[:, 0] * np.cos(yaw) + near[:, 1] * np.sin(yaw)
        y = near[:, 1] * np.cos(yaw) - near[:, 0] * np.sin(yaw)
        inside.append(np.count_nonzero((np.abs(np.stack([x, y, near[:, 2]], axis=1)) <= size / 2).all(axis=1)))
    assert inside == boxes.num_points.tolist()
    assert sum(inside) == 9399


def test_golden_poses_bring_two_real_sweeps_together():
    sample = sample_path(LOG)
    first, second = (read_sweep(sample / "sensors" / "lidar" / f"{time}.feather").xyz.astype(np.float64) for time in TIMES)
    ground = np.asarray(feather.read_table(str(sample / "flow_labels.feather"))["is_ground_0"])
    poses = read_city_poses(sample / "city_SE3_egovehicle.feather")
    move = poses[TIMES[1]].inverse() @ poses[TIMES[0]]
    tree = KDTree(second)
    raw, posed = first[~ground], first[~ground] @ move.rotation.T + move.translation
    assert np.median(tree.query(raw)[0]) == pytest.approx(0.069, abs=1e-3)
    assert np.median(tree.query(posed)[0]) == pytest.approx(0.036, abs=1e-3)


def test_golden_lasers_keep_one_elevation_only_seen_from_their_own_lidar():
    sample = sample_path(LOG)
    points = read_sweep(sample / "sensors" / "lidar" / f"{TIMES[0]}.feather")
    mounts = read_calibration(sample / "calibration" / "egovehicle_SE3_sensor.feather")
    assert points.ring is not None

    def spread(name: str, lasers: range) -> float:
        local = (points.xyz - mounts[name].translation) @ mounts[name].rotation
        elevation = np.arctan2(local[:, 2], np.linalg.norm(local[:, :2], axis=1))
        far = np.linalg.norm(local, axis=1) > 8
        of = [elevation[far & (points.ring == laser)] for laser in lasers]
        return float(np.median([np.std(angles) for angles in of if len(angles) > 20]))

    # Measured: 1.0 against 2.7 mrad below 32, 0.9 against 2.9 mrad from 32 on.
    assert spread("up_lidar", range(32)) < spread("down_lidar", range(32)) / 2
    assert spread("down_lidar", range(32, 64)) < spread("up_lidar", range(32, 64)) / 2


def test_golden_a_log_copied_without_annotations_has_no_boxes(tmp_path):
    copy = tmp_path / "log"
    shutil.copytree(sample_path(LOG), copy)
    copy.chmod(0o755)
    (copy / "annotations.feather").unlink()
    assert prepare_argoverse2(copy, tmp_path / "out").frames == 2
    assert PreparedDataset(tmp_path / "out").frame(FrameKey("log", 0)).boxes is None


@pytest.mark.parametrize("seed", range(60))
def test_any_damage_to_a_table_gives_our_error_or_frames(tmp_path, seed):
    rng = np.random.default_rng(seed)
    log = write_log(tmp_path / "train" / "a")
    files = [log / "city_SE3_egovehicle.feather", log / "annotations.feather", *(log / "sensors" / "lidar").iterdir()]
    path = files[seed % 3]
    data = bytearray(path.read_bytes())
    for at in rng.integers(0, len(data), 4):
        data[at] = rng.integers(256)
    path.write_bytes(data)
    with suppress(DataError):
        assert prepare_argoverse2(tmp_path, tmp_path / "out").frames == 3


def test_a_column_name_that_is_no_text_is_our_error(tmp_path):
    path = write_log(tmp_path / "train" / "a") / "city_SE3_egovehicle.feather"
    path.write_bytes(path.read_bytes().replace(b"tx_m", b"tx_\x91"))
    with pytest.raises(DataError, match="not a whole Feather file"):
        read_city_poses(path)
