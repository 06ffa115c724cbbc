from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from picture3d.datasets.augment import AugmentConfig
from picture3d.datasets.frame_choice import select_keyframes
from picture3d.datasets.mixing import open_sources
from picture3d.datasets.prepared import FrameKey, PreparedDataset
from picture3d.datasets.samples import DataConfig, load_sample
from picture3d.errors import ConfigError, DataError
from picture3d.structures.frame import Frame
from picture3d.structures.points import IntensityUnit, PointCloud
from picture3d.structures.poses import Pose
from picture3d.structures.targets import FrameTargets
from tests.datasets.made_frames import made_frame, write_made_dataset


def cloud(xyz: list[list[float]], unit: IntensityUnit = IntensityUnit.RAW_255, **columns: Any) -> PointCloud:
    points = np.array(xyz, np.float32).reshape(-1, 3)
    return PointCloud(points, np.full(len(points), 51, np.float32), unit, **columns)


def sweep(index: int, xyz: list[list[float]], **changes: Any) -> Frame:
    values: dict[str, Any] = {"points": cloud(xyz), "labels": None, "instances": None, "boxes": None}
    return replace(made_frame("log-a", index), **(values | changes))


def config(root: Any, **settings: Any) -> DataConfig:
    return DataConfig.from_tree({"root": str(root), **settings})


def sample(root: Any, index: int = 0, rng: int | None = None, targets: Any = None, **settings: Any):
    generator = None if rng is None else np.random.default_rng(rng)
    return load_sample(PreparedDataset(root), FrameKey("log-a", index), config(root, **settings), generator, targets=targets)


def test_two_sweeps_are_merged_by_their_poses(tmp_path):
    """By hand: the LiDAR sits 1 m ahead of the ego frame. The car drives 2 m along global y between the sweeps and turns by
    90 degrees, so what was 10 m ahead of the LiDAR (global x 11, y 0) is 9 + 2 m away in the new frame's own axes."""
    lidar = Pose(np.eye(3), np.array([1.0, 0, 0]))
    earlier = sweep(
        0, [[10, 0, 0], [0.9, -0.9, 0], [0.9, 1.0, 5]], global_from_ego=Pose.identity(), ego_from_lidar=lidar, previous=()
    )
    now = sweep(
        1, [[0.5, 0.5, 0], [7, 8, 9]], global_from_ego=Pose.from_yaw(np.pi / 2, [0, 2, 0]), ego_from_lidar=lidar, previous=(0,)
    )
    write_made_dataset(tmp_path, {"log-a": [earlier, now]})
    merged = sample(tmp_path, 1, sweeps=2, features=["intensity", "time_lag"])
    # Global (11, 0, 0): ego axes (-2, -11, 0), LiDAR (-3, -11, 0). Global (1.9, 1, 5): ego (-1, -1.9, 5), LiDAR (-2, -1.9, 5).
    # The earlier sweep's point at (0.9, -0.9) is the car itself; the keyframe keeps its own at (0.5, 0.5).
    expected = [[0.5, 0.5, 0], [7, 8, 9], [-3, -11, 0], [-2, -1.9, 5]]
    np.testing.assert_allclose(merged.xyz, expected, atol=1e-5)
    np.testing.assert_allclose(merged.features, [[0.2, 0], [0.2, 0], [0.2, 0.05], [0.2, 0.05]], atol=1e-7)
    assert merged.point_id.tolist() == [0, 1, -1, -1]


def test_merging_uses_the_newest_sweeps_and_takes_what_there_is(tmp_path):
    pose = Pose.identity()
    frames = [sweep(i, [[10 + i, 0, 0]], global_from_ego=pose, previous=tuple(range(i - 1, -1, -1))) for i in range(4)]
    write_made_dataset(tmp_path, {"log-a": frames})
    assert sample(tmp_path, 3, sweeps=3).xyz[:, 0].tolist() == [13, 12, 11]
    assert sample(tmp_path, 1, sweeps=10).xyz[:, 0].tolist() == [11, 10]
    assert sample(tmp_path, 0, sweeps=10).xyz[:, 0].tolist() == [10]


def test_several_sweeps_without_poses_are_refused(tmp_path):
    frames = [sweep(i, [[10, 0, 0]], global_from_ego=None, previous=(0,) if i else ()) for i in range(2)]
    write_made_dataset(tmp_path, {"log-a": frames})
    assert len(sample(tmp_path, 1).xyz) == 1
    with pytest.raises(DataError, match=r"log-a/1: several sweeps were asked for, but this log has no poses"):
        sample(tmp_path, 1, sweeps=2)


@pytest.mark.parametrize(
    ("unit", "scale", "expected"),
    [
        (IntensityUnit.RAW_255, "unit", 0.2),
        (IntensityUnit.RAW_255, "raw", 51),
        (IntensityUnit.RAW_255, "tanh", np.tanh(0.2)),
        (IntensityUnit.UNIT, "unit", 51),
        (IntensityUnit.UNIT, "tanh", 1.0),
        (IntensityUnit.TANH, "tanh", 51),
        (IntensityUnit.TANH, "unit", 51),
        (IntensityUnit.UNKNOWN, "raw", 51),
    ],
)
def test_intensity_is_scaled_by_its_unit(tmp_path, unit, scale, expected):
    write_made_dataset(tmp_path, {"log-a": [sweep(0, [], points=cloud([[1, 2, 3]], unit))]})
    assert sample(tmp_path, intensity_scale=scale).features[0, 0] == pytest.approx(expected, rel=1e-6)


def test_intensity_of_unknown_unit_is_not_guessed(tmp_path):
    write_made_dataset(tmp_path, {"log-a": [sweep(0, [], points=cloud([[1, 2, 3]], IntensityUnit.UNKNOWN))]})
    with pytest.raises(DataError, match=r"log-a/0: the unit of this data's intensity is unknown"):
        sample(tmp_path)


def test_features_come_in_the_order_asked_for(tmp_path):
    points = cloud([[1, 2, 3]], elongation=np.array([0.5], np.float32))
    write_made_dataset(tmp_path, {"log-a": [sweep(0, [], points=points), sweep(1, [[1, 2, 3]])]})
    found = sample(tmp_path, features=["elongation", "time_lag", "intensity"]).features
    np.testing.assert_allclose(found, [[np.tanh(0.5), 0, 0.2]], rtol=1e-6)
    assert sample(tmp_path, features=[]).features.shape == (1, 0)
    with pytest.raises(DataError, match="log-a/1: has no elongation"):
        sample(tmp_path, 1, features=["elongation"])


def test_the_crop_keeps_points_on_its_border(tmp_path):
    xyz = [[-50, 0, 0], [50, 50, 3], [50.001, 0, 0], [0, 0, -5], [0, 0, 3.001], [0, -50.001, 0]]
    write_made_dataset(tmp_path, {"log-a": [sweep(0, xyz)]})
    box: dict[str, Any] = {"range_min": [-50, -50, -5], "range_max": [50, 50, 3]}
    assert sample(tmp_path, **box).point_id.tolist() == [0, 1, 3]
    assert sample(tmp_path, **box, crop_z=False).point_id.tolist() == [0, 1, 3, 4]


def test_points_are_cropped_and_shuffled_in_one_move_and_keep_their_columns(tmp_path):
    write_made_dataset(tmp_path, {"log-a": [made_frame(points=500)]})
    box: dict[str, Any] = {"range_min": [-5, -10, -5], "range_max": [15, 10, 20]}
    whole, cropped = sample(tmp_path), sample(tmp_path, **box)
    shuffled = sample(tmp_path, rng=3, shuffle_points=True, **box)
    assert 20 < len(cropped.xyz) < 200
    assert sorted(shuffled.point_id.tolist()) == cropped.point_id.tolist() != shuffled.point_id.tolist()
    for name in ("xyz", "features", "labels"):
        np.testing.assert_array_equal(getattr(shuffled, name), getattr(whole, name)[shuffled.point_id])


@pytest.mark.parametrize("settings", [{}, {"range_min": [100, 100, 100], "range_max": [101, 101, 101]}])
def test_an_empty_frame_is_kept(tmp_path, settings):
    write_made_dataset(tmp_path, {"log-a": [made_frame(points=0)]})
    empty = sample(tmp_path, rng=0, augment={}, shuffle_points=True, **settings)
    assert empty.xyz.shape == (0, 3)
    assert empty.features.shape == (0, 1)
    assert empty.labels is not None
    assert empty.labels.shape == (0,)


class EveryThirdCell:
    """Targets whose first feature is the row of the un-augmented point, so that a mix-up shows."""

    def targets(self, frame: Frame) -> FrameTargets | None:
        count = len(frame.points)
        cell = np.where(np.arange(count) % 3 == 0, np.arange(count) // 3, -1)
        features = np.stack([np.arange(0, count, 3), np.full(-(-count // 3), 7)], 1).astype(np.float16)
        return FrameTargets(features, np.zeros(len(features), np.uint8), cell)


def test_targets_follow_their_points_through_augmentation_crop_and_shuffle(tmp_path):
    frames = [made_frame(index=i, points=300) for i in range(2)]
    write_made_dataset(tmp_path, {"log-a": frames})
    settings: dict[str, Any] = {
        "range_min": [-15, -15, -5],
        "range_max": [15, 15, 15],
        "shuffle_points": True,
        "augment": {},
        "sweeps": 2,
    }
    found = sample(tmp_path, 1, rng=1, targets=EveryThirdCell(), **settings)
    assert found.point_cell is not None
    assert found.targets is not None
    assert 0 < (found.point_id >= 0).sum() < 300
    own = found.point_id >= 0
    assert (found.point_cell[~own] == -1).all()
    has = found.point_cell >= 0
    assert np.array_equal(has, own & (found.point_id % 3 == 0))
    assert np.array_equal(found.targets.features[found.point_cell[has], 0].astype(int), found.point_id[has])
    # the same rows, un-augmented: intensity and label are those of the keyframe's file
    assert frames[1].labels is not None
    label_set = PreparedDataset(tmp_path).label_set
    assert label_set is not None
    assert found.labels is not None
    np.testing.assert_allclose(found.features[own, 0], frames[1].points.intensity[found.point_id[own]] / 255, rtol=1e-6)
    assert np.array_equal(found.labels[own], label_set.to_train(frames[1].labels)[found.point_id[own]])
    assert (found.labels[~own] == 0).all()


def test_targets_of_other_points_are_refused(tmp_path):
    class Wrong(EveryThirdCell):
        def targets(self, frame: Frame) -> FrameTargets | None:
            return super().targets(replace(frame, points=frame.points.select(np.arange(10)), labels=None, instances=None))

    write_made_dataset(tmp_path, {"log-a": [made_frame()]})
    with pytest.raises(DataError, match="computed for 10 points, the frame has 40"):
        sample(tmp_path, targets=Wrong())


def test_boxes_go_through_the_same_transform_as_points(tmp_path):
    frame = made_frame()
    assert frame.boxes is not None
    boxes = replace(frame.boxes, category=("vehicle.car",) * 3, num_points=np.array([5, -1, 1], np.int32))
    centres = frame.boxes.center.astype(np.float32)
    points = PointCloud(centres, np.zeros(3, np.float32), IntensityUnit.UNIT)
    write_made_dataset(tmp_path, {"log-a": [replace(frame, points=points, labels=None, instances=None, boxes=boxes)]})
    found = sample(tmp_path, rng=3, box_classes=("car",), augment=AugmentConfig().model_dump())
    assert found.boxes is not None
    assert abs(found.xyz - centres).max() > 0.1
    np.testing.assert_allclose(found.boxes.center, found.xyz, atol=1e-4)


def box_frame(count: int, category: list[str], num_points: list[int], centres: list[list[float]]) -> Frame:
    frame = made_frame()
    assert frame.boxes is not None
    rows = np.zeros(count, np.int64)
    return replace(
        frame,
        boxes=replace(
            frame.boxes.select(rows),
            category=tuple(category),
            num_points=np.array(num_points, np.int32),
            center=np.array(centres, np.float64).reshape(count, 3),
        ),
    )


def test_only_boxes_of_the_classes_with_points_inside_the_range_are_learned_from(tmp_path):
    categories = [
        "vehicle.bus.bendy",
        "vehicle.car",
        "vehicle.car",
        "animal",
        "human.pedestrian.adult",
        "vehicle.bus.rigid",
        "BUS",
    ]
    counts = [9, 9, 2, 9, 9, -1, 9]
    centres = [[0, 0, 0], [10, 10, 2], [0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 10.001, 0], [-10, -10, -2]]
    write_made_dataset(tmp_path, {"log-a": [box_frame(7, categories, counts, centres)]})
    settings = {"box_classes": ("car", "bus"), "min_box_points": 3}
    found = sample(tmp_path, **settings)
    assert found.boxes is not None
    assert found.box_class is not None
    assert found.boxes.category == ("vehicle.bus.bendy", "vehicle.car", "vehicle.bus.rigid", "BUS")
    assert found.box_class.tolist() == [2, 1, 2, 2]
    near = sample(tmp_path, range_min=(-10, -10, -2), range_max=(10, 10, 2), crop_z=False, **settings)
    assert near.boxes is not None
    assert near.box_class is not None
    assert near.boxes.category == ("vehicle.bus.bendy", "vehicle.car", "BUS")  # a centre on the border is inside
    assert near.box_class.tolist() == [2, 1, 2]
    assert sample(tmp_path).boxes is None


def test_a_frame_whose_boxes_are_all_left_out_was_annotated_still(tmp_path):
    write_made_dataset(tmp_path, {"log-a": [box_frame(1, ["animal"], [9], [[0, 0, 0]])]})
    found = sample(tmp_path, box_classes=("car",))
    assert found.boxes is not None
    assert len(found.boxes) == 0


def test_labels_without_a_label_set_are_refused(tmp_path):
    write_made_dataset(tmp_path, {"log-a": [made_frame()]}, label_set=None)
    with pytest.raises(DataError, match="names no label set"):
        sample(tmp_path)
    assert sample(tmp_path, labels=False).labels is None


def keys(root: Any, **settings: Any) -> list[str]:
    return [str(key) for key in select_keyframes(PreparedDataset(root), config(root, **settings))]


def write_many(root: Any, logs: int, frames: int = 2, labelled: int | None = None) -> None:
    made = {}
    for i in range(logs):
        labels: dict[str, Any] = {} if labelled is None or i < labelled else {"labels": None}
        made[f"l{i:02d}"] = [made_frame(f"l{i:02d}", j, points=2, **labels) for j in range(frames)]
    write_made_dataset(root, made)


def test_label_shares_are_whole_logs_and_nested(tmp_path):
    write_many(tmp_path, 10)
    for seed in range(5):
        smaller: set[str] = set()
        for share, logs in [(0.01, 1), (0.1, 1), (0.25, 2), (0.5, 5), (0.9, 9), (1.0, 10)]:
            found = set(keys(tmp_path, label_share=share, label_seed=seed))
            assert len({key.split("/")[0] for key in found}) == logs
            assert len(found) == 2 * logs
            assert smaller <= found
            smaller = found


def test_another_label_seed_draws_other_logs(tmp_path):
    write_many(tmp_path, 10)
    assert len({tuple(keys(tmp_path, label_share=0.2, label_seed=seed)) for seed in range(6)}) > 1


def test_a_label_share_counts_labelled_logs_only(tmp_path):
    write_many(tmp_path, 10, labelled=4)
    for seed in range(5):
        assert {key.split("/")[0] for key in keys(tmp_path, label_share=0.5, label_seed=seed)} < {f"l{i:02d}" for i in range(4)}


def test_a_label_share_for_boxes_counts_logs_with_boxes_not_those_with_point_labels(tmp_path):
    made = {f"l{i:02d}": [made_frame(f"l{i:02d}", 0, points=2, labels=None, boxes=None)] for i in range(6)}
    for i in (1, 4):
        made[f"l{i:02d}"] = [replace(box_frame(1, ["vehicle.car"], [9], [[0, 0, 0]]), log=f"l{i:02d}", index=0, labels=None)]
    made["l05"] = [made_frame("l05", 0, points=2, boxes=None)]
    write_made_dataset(tmp_path, made)
    assert {key for seed in range(6) for key in keys(tmp_path, label_share=0.2, label_seed=seed)} == {"l05/0"}
    boxes = {key for seed in range(6) for key in keys(tmp_path, label_share=0.2, label_seed=seed, box_classes=("car",))}
    assert boxes == {"l01/0", "l04/0"}


def test_the_keyframes_of_a_single_log_are_shared_out_instead(tmp_path):
    write_many(tmp_path, 1, frames=10)
    half, fifth = keys(tmp_path, label_share=0.5), keys(tmp_path, label_share=0.2)
    assert (len(half), len(fifth)) == (5, 2)
    assert set(fifth) < set(half)
    assert half == sorted(half)


def test_every_nth_and_at_most_so_many_keyframes(tmp_path):
    write_many(tmp_path, 1, frames=10)
    assert keys(tmp_path, every=3) == ["l00/0", "l00/3", "l00/6", "l00/9"]
    assert keys(tmp_path, max_frames=3) in (["l00/0", "l00/4", "l00/9"], ["l00/0", "l00/5", "l00/9"])
    assert len(keys(tmp_path, max_frames=100)) == 10


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "10 of 10 keyframes (every keyframe, 100 % of the labels)"),
        ({"every": 5}, "2 of 10 keyframes (one keyframe in 5, 100 % of the labels)"),
        ({"label_share": 0.5, "max_frames": 3}, "3 of 10 keyframes (every keyframe, 50 % of the labels, at most 3)"),
    ],
)
def test_a_run_says_which_keyframes_it_takes(tmp_path, settings, expected):
    write_many(tmp_path, 1, frames=10)
    (source,) = open_sources(DataConfig(root=tmp_path, **settings), seed=0, train=True)
    assert source.selection == f"{tmp_path.name}, split train: {expected}"


def test_a_split_without_keyframes_is_refused(tmp_path):
    write_made_dataset(tmp_path, {"log-a": [made_frame(is_keyframe=False)]}, splits={"train": ["log-a"], "val": []})
    for split in ("train", "val"):
        with pytest.raises(DataError, match=f"split '{split}' holds no keyframe"):
            keys(tmp_path, split=split)
    with pytest.raises(DataError, match=r"no split 'test'\. Choose one of train, val"):
        keys(tmp_path, split="test")


@pytest.mark.parametrize(
    "settings",
    [
        {"range_min": [0, 0, 0]},
        {"range_min": [0, 0, 0], "range_max": [1, 0, 1]},
        {"features": ["intensity", "intensity"]},
        {"features": ["colour"]},
        {"label_share": 0},
        {"sweeps": 0},
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, settings):
    with pytest.raises(ConfigError):
        config(tmp_path, **settings)


def test_keyframes_without_labels_can_be_left_out(tmp_path):
    frames = [made_frame("log-a", i) if i % 3 == 1 else made_frame("log-a", i, labels=None) for i in range(6)]
    write_made_dataset(tmp_path, {"log-a": frames, "log-b": [made_frame("log-b", 0, labels=None)]})
    assert keys(tmp_path, labelled_only=True, split=None) == ["log-a/1", "log-a/4"]
    assert len(keys(tmp_path, split=None)) == 7
    write_made_dataset(tmp_path / "none", {"log-b": [made_frame("log-b", 0, labels=None)]})
    with pytest.raises(DataError, match="holds no labelled keyframe"):
        keys(tmp_path / "none", labelled_only=True, split=None)
