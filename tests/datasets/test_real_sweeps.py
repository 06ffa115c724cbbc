"""Facts that hold for real sweeps, checked after they went through preparation. Skipped where the samples are absent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from picture3d.datasets.point_files import prepare_points
from picture3d.datasets.prepared import FrameKey, PreparedDataset
from picture3d.datasets.samples import DataConfig, load_sample
from picture3d.structures.frame import Frame
from picture3d.structures.poses import Pose
from tests.sample_data import load_numpy_pickle, sample_path


@pytest.fixture(scope="module")
def keyframes(tmp_path_factory) -> PreparedDataset:
    """The seven real nuScenes keyframes, written as a folder of point files with labels and poses, then prepared."""
    sequence = sample_path("nuscenes/keyframe_sequence")
    folder = tmp_path_factory.mktemp("keyframes")
    (folder / "labels").mkdir()
    (folder / "sweeps").mkdir()
    lines = []
    for i in range(7):
        np.save(folder / "sweeps" / f"{i}.npy", np.load(sequence / "pc" / f"pc{i}.npy"))
        np.save(folder / "labels" / f"{i}.npy", np.load(sequence / "pc_seman" / f"pc_seman_{i}.npy")[:, 3].astype(np.int64))
        pose = load_numpy_pickle(sequence / "pose" / f"lidar_ego_pose{i}.npy")
        calibration = load_numpy_pickle(sequence / "calib" / f"lidar_calibrated_sensor{i}.npy")
        lines.append(" ".join(repr(float(v)) for v in (as_pose(pose) @ as_pose(calibration)).matrix[:3].ravel()))
    (folder / "poses.txt").write_text("\n".join(lines))
    prepare_points(
        folder / "sweeps",
        folder / "out",
        intensity_unit="0-255",
        label_dir=folder / "labels",
        label_set="nuscenes-16",
        poses=folder / "poses.txt",
        rate_hz=2.0,
        val=2,
    )
    return PreparedDataset(folder / "out")


def as_pose(row: object) -> Pose:
    while isinstance(row, list | np.ndarray):
        row = row[0] if isinstance(row, list) else row.item()
    assert isinstance(row, dict)
    return Pose.from_quaternion(row["rotation"], row["translation"])


def median_distance(source: np.ndarray, target: np.ndarray) -> float:
    """Median distance to the nearest neighbour, by brute force on every tenth point."""
    found = [torch.cdist(part, torch.from_numpy(target)).amin(1) for part in torch.from_numpy(source[::10]).split(500)]
    return float(torch.cat(found).median())


def moved(frame: Frame) -> np.ndarray:
    assert frame.global_from_lidar is not None
    return frame.global_from_lidar.apply(frame.points.xyz.astype(np.float64))


def test_real_poses_lay_static_points_of_two_keyframes_on_each_other(keyframes):
    """With all points of both frames the published facts are 1.07 m raw and 0.36 m in global coordinates."""
    first, second = (keyframes.frame(FrameKey("sweeps", i)) for i in (0, 1))
    static = [np.isin(frame.labels, (13, 15, 16)) for frame in (first, second)]
    raw = median_distance(second.points.xyz[static[1]], first.points.xyz[static[0]])
    placed = median_distance(moved(second)[static[1]], moved(first)[static[0]])
    assert raw == pytest.approx(1.07, abs=0.05)
    assert placed == pytest.approx(0.36, abs=0.03)


def test_merging_real_sweeps_uses_the_same_poses(keyframes):
    config = DataConfig(root=keyframes.root, sweeps=2)
    sample = load_sample(keyframes, FrameKey("sweeps", 1), config, None)
    second, first = keyframes.frame(FrameKey("sweeps", 1)), keyframes.frame(FrameKey("sweeps", 0))
    assert second.global_from_lidar is not None
    own, count = (sample.point_id >= 0).sum(), len(first.points)
    assert own == len(second.points)
    near = (abs(first.points.xyz[:, :2]) < 1).all(1).sum()
    assert len(sample.xyz) - own == count - near
    expected = second.global_from_lidar.inverse().apply(moved(first))
    outside = ~(abs(first.points.xyz[:, :2]) < 1).all(1)
    np.testing.assert_allclose(sample.xyz[own:], expected[outside], atol=1e-3)


def test_real_points_and_labels_come_back_to_the_last_bit(keyframes):
    sequence = sample_path("nuscenes/keyframe_sequence")
    places = [FrameKey("sweeps", i) for i in range(5)] + [FrameKey("sweeps-val", i) for i in range(2)]
    for i, key in enumerate(places):
        frame, raw = keyframes.frame(key), np.load(sequence / "pc" / f"pc{i}.npy")
        assert np.array_equal(frame.points.xyz, raw[:, :3])
        assert np.array_equal(frame.points.intensity, raw[:, 3])
        assert frame.labels is not None
        assert np.array_equal(frame.labels, np.load(sequence / "pc_seman" / f"pc_seman_{i}.npy")[:, 3])


SAMPLES = [
    ("waymo/lidar_frames", "x,y,z,intensity,elongation", "tanh", None, (177125, 175893)),
    ("semantickitti/sequences/04/velodyne", "x,y,z,intensity", "0-1", "semantickitti/sequences/04/labels", (124231, 124087)),
    ("once/000076/lidar_roof", "x,y,z,intensity", "0-255", None, (62998, 63385)),
]


@pytest.mark.parametrize(
    ("folder", "layout", "unit", "labels", "counts"), SAMPLES, ids=lambda v: v if isinstance(v, str) else ""
)
def test_sweeps_of_other_sensors_are_prepared(tmp_path, folder, layout, unit, labels, counts):
    label_dir: Path | None = None if labels is None else sample_path(labels)
    prepare_points(sample_path(folder), tmp_path / "out", layout=layout, intensity_unit=unit, label_dir=label_dir)
    dataset = PreparedDataset(tmp_path / "out")
    for key, count in zip(dataset.keyframes(), counts, strict=False):
        frame = dataset.frame(key)
        assert len(frame.points) == count
        assert (frame.labels is not None) == (labels is not None)
        assert (frame.points.elongation is not None) == ("elongation" in layout)
