"""Objects cut out of real keyframes carry the labels of their class and can be pasted. Skipped where the samples are absent."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from picture3d.datasets.class_balance import balanced_keys, class_counts
from picture3d.datasets.detection_classes import NUSCENES_DETECTION
from picture3d.datasets.object_building import build_object_database
from picture3d.datasets.object_database import ObjectDatabase
from picture3d.datasets.object_geometry import rows_inside
from picture3d.datasets.object_sampling import open_sampler
from picture3d.datasets.object_sampling_config import ObjectSamplingConfig
from picture3d.datasets.prepared import FrameKey, PreparedDataset
from picture3d.datasets.samples import DataConfig, read_sample
from picture3d.ops.box_iou import bev_overlap, points_in_boxes
from picture3d.structures.boxes import Boxes
from picture3d.structures.frame import Frame
from picture3d.structures.points import IntensityUnit, PointCloud
from tests.datasets.made_frames import write_made_dataset
from tests.datasets.test_real_sweeps import as_pose
from tests.sample_data import load_numpy_pickle, sample_path

# The classes of the lidarseg benchmark, in whose numbers the samples give points and boxes.
LIDARSEG = ("noise", "barrier", "bicycle", "bus", "car", "construction_vehicle", "motorcycle", "pedestrian", "traffic_cone",
            "trailer", "truck")  # fmt: skip


@pytest.fixture(scope="module")
def keyframes(tmp_path_factory) -> PreparedDataset:
    """The seven real nuScenes keyframes with labels, poses and boxes; the sweeps 0.5 s apart link to each other."""
    sequence = sample_path("nuscenes/keyframe_sequence")
    frames = []
    for i in range(7):
        raw = np.load(sequence / "pc" / f"pc{i}.npy")
        table = np.load(sequence / "bbox" / f"bbox{i}.npy").astype(np.float64)  # x y, z of the bottom, l w h, yaw
        category = tuple(LIDARSEG[k] for k in np.load(sequence / "bbox" / f"object_category{i}.npy"))
        frames.append(
            Frame(
                log="street",
                index=i,
                token=f"street-{i}",
                timestamp_us=500_000 * i,
                points=PointCloud(raw[:, :3].copy(), raw[:, 3].copy(), IntensityUnit.RAW_255),
                global_from_ego=as_pose(load_numpy_pickle(sequence / "pose" / f"lidar_ego_pose{i}.npy")),
                ego_from_lidar=as_pose(load_numpy_pickle(sequence / "calib" / f"lidar_calibrated_sensor{i}.npy")),
                labels=np.load(sequence / "pc_seman" / f"pc_seman_{i}.npy")[:, 3].astype(np.uint8),
                boxes=Boxes(
                    center=table[:, :3] + table[:, 5:6] * [0, 0, 0.5],
                    size=table[:, 3:6],
                    yaw=table[:, 6],
                    velocity=np.full((len(table), 2), np.nan),
                    category=category,
                    track_id=tuple(str(v) for v in np.load(sequence / "bbox" / f"boxes_token{i}.npy")),
                    num_points=np.full(len(table), -1, np.int32),
                ),
                previous=tuple(range(i - 1, max(-1, i - 3), -1)),
            )
        )
    root = write_made_dataset(tmp_path_factory.mktemp("street"), {"street": frames}, label_set="nuscenes-16")
    return PreparedDataset(root)


def test_points_of_real_objects_carry_the_class_of_their_box(keyframes):
    """The fact stated for these files is 89 to 92 % of the points inside of boxes."""
    database = ObjectDatabase(build_object_database(keyframes.root).path)
    same = total = 0
    for row in range(len(database)):
        found = database.object(row)
        frame = keyframes.frame(FrameKey("street", found.frame))
        assert frame.labels is not None
        near = np.flatnonzero(np.abs(frame.points.xyz - found.box[:3]).max(axis=1) < found.box[3:6].max())
        x, y, z = (torch.from_numpy(found.points_lidar_m)[:, None, axis] for axis in range(3))
        offset = torch.from_numpy(frame.points.xyz[near])[None]
        off = (offset[..., 0] - x).abs() + (offset[..., 1] - y).abs() + (offset[..., 2] - z).abs()
        distance, nearest = off.min(1)
        assert distance.max() < 1e-4
        rows = near[nearest.numpy()]
        labels = frame.labels[rows]
        np.testing.assert_array_equal(found.intensity, frame.points.intensity[rows])
        same += int((labels == LIDARSEG.index(found.category)).sum())
        total += len(labels)
    assert len(database) > 300
    assert 0.88 < same / total < 0.93


def test_merged_sweeps_thicken_what_stands_still(keyframes):
    """Barriers do not move, so three sweeps hold about three times the points of one; the car drives, and sees some closer."""
    one = ObjectDatabase(build_object_database(keyframes.root, classes=NUSCENES_DETECTION).path)
    three = ObjectDatabase(build_object_database(keyframes.root, classes=NUSCENES_DETECTION, sweeps=3).path)
    points = []
    for database in (one, three):
        rows = np.flatnonzero(database.classes(NUSCENES_DETECTION) == 6)
        late = [database.object(int(row)) for row in rows]
        points.append(sum(len(found.xyz) for found in late if found.frame >= 2))
    assert 2.0 < points[1] / points[0] < 4.0
    assert {round(float(lag), 2) for lag in np.unique(three.object(len(three) - 1).time_lag)} <= {0.0, 0.5, 1.0}


def test_real_objects_are_pasted_into_real_frames(keyframes):
    build_object_database(keyframes.root, classes=NUSCENES_DETECTION, name="street")
    config = DataConfig(root=keyframes.root, box_classes=NUSCENES_DETECTION.names)
    sampler = open_sampler(ObjectSamplingConfig.nuscenes("street"), NUSCENES_DETECTION, config, keyframes)
    came = 0
    for i in range(7):
        sample = read_sample(keyframes, FrameKey("street", i), config)
        found = sampler.paste(sample, NUSCENES_DETECTION, np.random.default_rng([0, i]))
        assert sample.boxes is not None
        assert found.boxes is not None
        old = len(sample.boxes)
        boxes = found.boxes
        rows = torch.from_numpy(np.concatenate([boxes.center, boxes.size, boxes.yaw[:, None]], axis=1))
        assert int((bev_overlap(rows[old:], rows) > 1e-9).sum()) == len(rows) - old
        gone = points_in_boxes(torch.from_numpy(sample.xyz), rows[old:]) >= 0
        assert len(found.xyz) == len(sample.xyz) - int(gone.sum()) + int(boxes.num_points[old:].sum())
        assert (boxes.num_points[old:] >= 5).all()
        assert found.labels is not None
        assert not found.labels[found.point_id < 0].any()
        came += len(boxes) - old
    assert came > 20


def test_real_frames_are_balanced(keyframes):
    keys = keyframes.keyframes("train")
    counts = class_counts(keyframes, keys, NUSCENES_DETECTION)
    assert counts.sum(1).tolist() == [58, 60, 59, 63, 65, 64, len(keyframes.reader("street").frame(6).boxes or ())]
    occurring = (counts > 0).any(0).sum()
    balanced = balanced_keys(keyframes, keys, NUSCENES_DETECTION, seed=0)
    assert len(balanced) == (counts > 0).sum() // occurring * occurring


def test_real_boxes_hold_as_many_points_as_the_dataset_counts():
    """Argoverse 2 counts the points inside of each box of a sweep; the fact stated for this one is 9,399 in 81 boxes."""
    feather = pytest.importorskip("pyarrow.feather")
    log, sweep = sample_path("argoverse2/7fab2350-7eaf-3b7e-a39d-6937a4c1bede"), 315966265259836000
    points = feather.read_table(log / "sensors" / "lidar" / f"{sweep}.feather").to_pydict()
    table = feather.read_table(log / "annotations.feather").to_pydict()
    rows = np.flatnonzero(np.array(table["timestamp_ns"]) == sweep)
    columns = ("tx_m", "ty_m", "tz_m", "length_m", "width_m", "height_m")
    boxes = np.column_stack([np.array(table[name], np.float64)[rows] for name in columns])
    yaw = 2 * np.arctan2(np.array(table["qz"])[rows], np.array(table["qw"])[rows])
    xyz = np.column_stack([np.array(points[axis], np.float32) for axis in "xyz"])
    found = [len(inside) for inside in rows_inside(xyz, np.column_stack([boxes, yaw]))]
    assert found == np.array(table["num_interior_pts"])[rows].tolist()
    assert sum(found) == 9399
