from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from picture3d.datasets.detection_classes import NUSCENES_DETECTION, WAYMO_DETECTION, DetectionClasses
from picture3d.datasets.frame_choice import labelled_share
from picture3d.datasets.mixing import open_sources
from picture3d.datasets.object_building import build_object_database
from picture3d.datasets.object_database import ObjectDatabase
from picture3d.datasets.object_sampling import ObjectSampler, open_sampler
from picture3d.datasets.object_sampling_config import ObjectSamplingConfig
from picture3d.datasets.prepared import FrameKey, PreparedDataset
from picture3d.datasets.samples import DataConfig, Sample, read_sample
from picture3d.errors import ConfigError, DataError
from picture3d.ops.box_iou import bev_overlap, points_in_boxes
from picture3d.structures.boxes import Boxes
from picture3d.structures.frame import Frame
from picture3d.structures.points import IntensityUnit
from picture3d.structures.targets import FrameTargets
from tests.datasets.object_scenes import box_points, boxes_of, cloud_of, frame_of, random_frame, write_scenes

CAR, ADULT, TRUCK = "vehicle.car", "human.pedestrian.adult", "vehicle.truck"
KINDS = (CAR, ADULT, TRUCK)
CLASSES = DetectionClasses(("car", "pedestrian", "truck"))


def sampler_of(root: Path, *, classes: DetectionClasses = CLASSES, data: dict[str, Any] | None = None, **config: Any):
    values = {"database": "train-1sweeps", "fill_to": {"car": 2}, "default_min_points": 1, **config}
    given_data = {"root": str(root), "box_classes": classes.names, **(data or {})}
    chosen = DataConfig.from_tree(given_data)
    return open_sampler(ObjectSamplingConfig.from_tree(values), classes, chosen, PreparedDataset(root))


def sample_of(root: Path, key: FrameKey, **data: Any) -> Sample:
    config = DataConfig.from_tree({"root": str(root), "box_classes": CLASSES.names, "min_box_points": 0} | data)
    return read_sample(PreparedDataset(root), key, config)


def write_library(root: Path, objects: list[tuple[str, list[float]]], scene: Frame, points: int = 6, **cloud: Any) -> Path:
    """A training log with each object alone in a frame, and the scene in another split."""
    rng = np.random.default_rng(0)
    frames = [
        frame_of(cloud_of(box_points(row, points, rng), **cloud), boxes_of([(category, row)]), log="library", index=i)
        for i, (category, row) in enumerate(objects)
    ]
    write_scenes(root, {"library": frames, "scene": [scene]}, splits={"train": ["library"], "val": ["scene"]})
    build_object_database(root)
    return root


def box_rows(boxes: Boxes) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([boxes.center, boxes.size, boxes.yaw[:, None]], axis=1))


SCENE_POINTS = [[0, 0, 0], [10, 0, 0.5], [10.5, 0.2, -0.5], [10, 0, 3], [20, 0, 0]]


def test_a_car_is_pasted_as_computed_by_hand(tmp_path):
    """One car stands at x = 0, two are wanted: the one of the database at x = 10 takes the place of two scene points. The
    point 3 m above stays, and the object stays at the height of 1 m at which it was annotated."""
    scene = frame_of(cloud_of(SCENE_POINTS), boxes_of([(CAR, [0, 0, 0, 4, 2, 2, 0])]), log="scene")
    write_library(tmp_path, [(CAR, [10, 0, 1, 4, 2, 3.5, 0.1, 7, -1])], scene)
    sample = sample_of(tmp_path, FrameKey("scene", 0))
    found = sampler_of(tmp_path).paste(sample, CLASSES, np.random.default_rng(0))
    library = PreparedDataset(tmp_path).frame(FrameKey("library", 0)).points
    assert found.point_id.tolist() == [0, 3, 4] + [-1] * 6
    np.testing.assert_array_equal(found.xyz[:3], np.array(SCENE_POINTS, np.float32)[[0, 3, 4]])
    np.testing.assert_allclose(found.xyz[3:], library.xyz, atol=1e-6)
    np.testing.assert_allclose(found.features[:, 0] * 255, [0, 3, 4, 0, 1, 2, 3, 4, 5], atol=1e-5)
    assert found.boxes is not None
    assert found.box_class is not None
    assert found.box_class.tolist() == [1, 1]
    np.testing.assert_array_equal(found.boxes.center, [[0, 0, 0], [10, 0, 1]])
    np.testing.assert_array_equal(found.boxes.velocity, [[0, 0], [7, -1]])
    np.testing.assert_array_equal(found.boxes.yaw, [0, 0.1])
    assert found.boxes.category == (CAR, CAR)
    assert found.boxes.num_points.tolist() == [-1, 6]
    assert len(sample.xyz) == 5  # the sample itself is untouched


def test_as_many_are_pasted_as_are_wanted_and_not_present(tmp_path):
    objects = [(CAR, [10.0 * i, 0, 0, 4, 2, 2, 0]) for i in range(1, 9)] + [(ADULT, [0, 10.0, 0, 1, 1, 2, 0])]
    scene = frame_of(cloud_of([[0, 0, 0]]), boxes_of([(CAR, [0, 0, 0, 4, 2, 2, 0])]), log="scene")
    write_library(tmp_path, objects, scene)
    sample = sample_of(tmp_path, FrameKey("scene", 0))

    def pasted(**fill_to: int) -> list[int]:
        found = sampler_of(tmp_path, fill_to=fill_to).paste(sample, CLASSES, np.random.default_rng(1))
        assert found.box_class is not None
        return np.bincount(found.box_class, minlength=4)[1:].tolist()

    assert pasted(car=0) == [1, 0, 0]
    assert pasted(car=1, pedestrian=0) == [1, 0, 0]
    assert pasted(car=4) == [4, 0, 0]
    assert pasted(car=9) == [9, 0, 0]
    assert pasted(car=100) == [9, 0, 0]  # more wanted than exist: each once
    assert pasted(pedestrian=5, truck=5) == [1, 1, 0]  # a class that never occurs


def test_an_object_that_would_meet_another_is_left_out(tmp_path):
    """The second library car lies across the scene's, seen from above, though 50 m higher; the two others meet each other."""
    objects = [(CAR, [1.0, 0, 50, 4, 2, 2, 1.5]), (CAR, [20.0, 0, 0, 4, 2, 2, 0]), (CAR, [21.0, 1, 9, 4, 2, 2, 0.3])]
    scene = frame_of(cloud_of([[0, 0, 0]]), boxes_of([(CAR, [0, 0, 0, 4, 2, 2, 0])]), log="scene")
    write_library(tmp_path, objects, scene)
    sample = sample_of(tmp_path, FrameKey("scene", 0))
    seen = set()
    for seed in range(20):
        found = sampler_of(tmp_path, fill_to={"car": 4}).paste(sample, CLASSES, np.random.default_rng(seed))
        assert found.boxes is not None
        assert len(found.boxes) == 2
        seen.add(float(found.boxes.center[1, 0]))
    assert seen == {20.0, 21.0}


def test_boxes_pasted_for_one_class_are_in_the_way_of_the_next(tmp_path):
    objects = [(CAR, [10.0, 0, 0, 4, 2, 2, 0]), (ADULT, [10.0, 0, 0, 1, 1, 2, 0])]
    write_library(tmp_path, objects, frame_of(cloud_of([[0, 0, 0]]), Boxes.empty(), log="scene"))
    sampler = sampler_of(tmp_path, fill_to={"pedestrian": 1, "car": 1})
    found = sampler.paste(sample_of(tmp_path, FrameKey("scene", 0)), CLASSES, np.random.default_rng(0))
    assert found.box_class is not None
    assert found.box_class.tolist() == [1]  # classes come in the head's order


def test_a_frame_that_was_not_annotated_stays_as_it_is_and_an_empty_one_is_filled(tmp_path):
    scene = frame_of(cloud_of([[0, 0, 0]]), None, log="scene")
    write_library(tmp_path, [(CAR, [10.0, 0, 0, 4, 2, 2, 0])], scene)
    sampler = sampler_of(tmp_path)
    bare = sample_of(tmp_path, FrameKey("scene", 0), box_classes=())
    assert sampler.paste(bare, CLASSES, np.random.default_rng(0)) is bare
    write_library(tmp_path, [(CAR, [10.0, 0, 0, 4, 2, 2, 0])], frame_of(cloud_of([]), Boxes.empty(), log="scene"))
    filled = sampler_of(tmp_path).paste(sample_of(tmp_path, FrameKey("scene", 0)), CLASSES, np.random.default_rng(0))
    assert filled.boxes is not None
    assert len(filled.boxes) == 1
    assert filled.point_id.tolist() == [-1] * 6


def test_an_empty_database_pastes_nothing(tmp_path):
    frames = {"log-a": [frame_of(cloud_of([[0, 0, 0]]), Boxes.empty())]}
    write_scenes(tmp_path, frames)
    build_object_database(tmp_path)
    sample = sample_of(tmp_path, FrameKey("log-a", 0))
    sampler = sampler_of(tmp_path, without_difficulties=[-1])
    assert sampler.paste(sample, CLASSES, np.random.default_rng(0)) is sample


def test_objects_with_few_points_or_an_unwanted_difficulty_are_not_drawn(tmp_path):
    rng = np.random.default_rng(0)
    frames = []
    for i, (points, difficulty) in enumerate([(4, 1), (5, 1), (9, 2), (20, -1), (20, 0)]):
        row = [10.0 * i + 10, 0, 0, 4, 2, 2, 0]
        boxes = boxes_of([("Vehicle", row)], difficulty=np.array([difficulty], np.int8))
        frames.append(frame_of(cloud_of(box_points(row, points, rng)), boxes, log="library", index=i))
    scene = frame_of(cloud_of([[0, 0, 0]]), Boxes.empty(), log="scene")
    write_scenes(tmp_path, {"library": frames, "scene": [scene]}, splits={"train": ["library"], "val": ["scene"]})
    build_object_database(tmp_path)
    data = DataConfig(root=tmp_path, box_classes=WAYMO_DETECTION.names)
    sampler = open_sampler(ObjectSamplingConfig.waymo("train-1sweeps"), WAYMO_DETECTION, data, PreparedDataset(tmp_path))
    assert {number: rows.tolist() for number, rows in sampler.candidates.items()} == {1: [1, 2, 4], 2: [], 3: []}


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_with_a_share_of_the_labels_no_object_of_an_unlabelled_log_is_pasted(tmp_path, share):
    logs = {
        f"log-{i}": [random_frame(j, np.random.default_rng([i, j]), log=f"log-{i}", categories=KINDS) for j in range(2)]
        for i in range(4)
    }
    write_scenes(tmp_path, logs)
    build_object_database(tmp_path)
    objects = {"database": "train-1sweeps", "fill_to": {"car": 4, "pedestrian": 4}, "default_min_points": 1}
    for seed in range(3):
        config = {
            "root": str(tmp_path),
            "box_classes": CLASSES.names,
            "label_share": share,
            "label_seed": seed,
            "labels": False,
        }
        # Frames between the chosen ones are labelled, too.
        chosen = DataConfig.from_tree({**config, "objects": objects, "max_frames": 1})
        (source,) = open_sources(chosen, seed=0, train=True)
        assert source.sampler is not None
        database = source.sampler.database
        drawn = {database.object(int(row)).log for rows in source.sampler.candidates.values() for row in rows}
        labelled = {key.log for key in labelled_share(source.dataset, chosen)}
        assert drawn == labelled
        assert len(labelled) == 4 * share


def test_the_keyframes_of_a_single_log_give_their_objects_alone(tmp_path):
    write_scenes(tmp_path, {"log-a": [random_frame(j, np.random.default_rng(j), categories=KINDS) for j in range(6)]})
    build_object_database(tmp_path)
    sampler = sampler_of(tmp_path, fill_to={"car": 9, "pedestrian": 9, "truck": 9}, data={"label_share": 0.5})
    keys = labelled_share(PreparedDataset(tmp_path), DataConfig(root=tmp_path, box_classes=CLASSES.names, label_share=0.5))
    drawn = {sampler.database.object(int(row)).frame for rows in sampler.candidates.values() for row in rows}
    assert drawn == {key.index for key in keys}
    assert len(drawn) == 3


def test_a_database_of_another_dataset_is_labelled_by_itself(tmp_path):
    for name in ("here", "there"):
        frames = {f"log-{i}": [random_frame(0, np.random.default_rng(i), log=f"log-{i}", categories=KINDS)] for i in range(3)}
        write_scenes(tmp_path / name, frames)
    path = build_object_database(tmp_path / "there").path
    for share in (0.34, 1.0):
        sampler = sampler_of(tmp_path / "here", database=str(path), data={"label_share": share})
        assert sum(map(len, sampler.candidates.values())) == int((sampler.database.classes(CLASSES) == 1).sum()) > 0


def test_old_points_of_an_object_can_be_left_out(tmp_path):
    row = [10.0, 0, 0, 4, 2, 2, 0]
    rng = np.random.default_rng(0)
    frames = [
        frame_of(cloud_of(box_points(row, count, rng)), boxes_of([(CAR, row)]) if i == 3 else None, index=i, is_keyframe=i == 3,
                 previous=tuple(range(i - 1, -1, -1)))
        for i, count in enumerate((8, 4, 2, 1))
    ]  # fmt: skip
    scene = frame_of(cloud_of([[0, 0, 0]]), Boxes.empty(), log="scene")
    write_scenes(tmp_path, {"log-a": frames, "scene": [scene]}, splits={"train": ["log-a"], "val": ["scene"]})
    build_object_database(tmp_path, sweeps=4)
    sample = sample_of(tmp_path, FrameKey("scene", 0), features=["time_lag", "intensity"])

    def pasted(**config: Any) -> Sample:
        data = {"features": ["time_lag", "intensity"], "sweeps": config.pop("sweeps", 1)}
        sampler = sampler_of(tmp_path, database="train-4sweeps", data=data, **config)
        return sampler.paste(sample, CLASSES, np.random.default_rng(0))

    np.testing.assert_allclose(pasted(sweeps=4).features[1:, 0], [0] + [0.05] * 2 + [0.1] * 4 + [0.15] * 8, atol=1e-6)
    np.testing.assert_allclose(pasted(max_time_lag_s=0.1).features[1:, 0], [0] + [0.05] * 2 + [0.1] * 4, atol=1e-6)
    assert len(pasted(max_time_lag_s=0.0).xyz) == 2
    assert pasted(max_time_lag_s=0.0, default_min_points=2) is sample  # too few points are left
    with pytest.raises(ConfigError, match=r"hold the points of 4 sweeps, the samples those of 1\."):
        pasted()


@pytest.mark.parametrize(("scale", "expected"), [("unit", 0.2), ("raw", 51.0), ("tanh", np.tanh(0.2))])
def test_an_object_gets_the_features_of_the_sample(tmp_path, scale, expected):
    row = [10.0, 0, 0, 4, 2, 2, 0]
    cloud = cloud_of(np.repeat([[10.0, 0, 0]], 52, axis=0), elongation=True)
    frames = [frame_of(cloud, boxes_of([(CAR, row)]))]
    scene = frame_of(cloud_of([[0, 0, 0]], elongation=True), Boxes.empty(), log="scene")
    write_scenes(tmp_path, {"log-a": frames, "scene": [scene]}, splits={"train": ["log-a"], "val": ["scene"]})
    build_object_database(tmp_path)
    data = {"features": ["elongation", "intensity", "time_lag"], "intensity_scale": scale}
    found = sampler_of(tmp_path, data=data).paste(
        sample_of(tmp_path, FrameKey("scene", 0), **data), CLASSES, np.random.default_rng(0)
    )
    own = sample_of(tmp_path, FrameKey("log-a", 0), **data)
    np.testing.assert_array_equal(found.features[1:], own.features)
    np.testing.assert_allclose(found.features[52], [np.tanh(51 / 8), expected, 0], rtol=1e-6)


def test_settings_that_the_database_cannot_meet_are_refused(tmp_path):
    scene = frame_of(cloud_of([[0, 0, 0]]), Boxes.empty(), log="scene")
    write_library(tmp_path, [(CAR, [10.0, 0, 0, 4, 2, 2, 0])], scene, unit=IntensityUnit.UNKNOWN)
    with pytest.raises(ConfigError, match=r"'cart', which the head does not have. Did you mean 'car'\?"):
        sampler_of(tmp_path, fill_to={"cart": 2})
    with pytest.raises(ConfigError, match="no elongation"):
        sampler_of(tmp_path, data={"features": ["elongation"]})
    with pytest.raises(ConfigError, match="no difficulty"):
        sampler_of(tmp_path, without_difficulties=[-1])
    with pytest.raises(DataError, match="no such database"):
        sampler_of(tmp_path, database="other")
    sample = sample_of(tmp_path, FrameKey("scene", 0), intensity_scale="raw")
    with pytest.raises(DataError, match="unit of this data's intensity is unknown"):
        sampler_of(tmp_path).paste(sample, CLASSES, np.random.default_rng(0))
    with pytest.raises(ValueError, match="not for"):
        sampler_of(tmp_path).paste(sample, NUSCENES_DETECTION, np.random.default_rng(0))
    wrongs: list[dict[str, Any]] = [
        {"fill_to": {"car": -1}},
        {"min_points": {"car": 0}},
        {"min_points": {"bus": 5}},
        {"database": ""},
    ]
    for wrong in wrongs:
        with pytest.raises(ConfigError):
            sampler_of(tmp_path, **wrong)


def test_a_scene_box_that_is_not_finite_is_refused_by_name(tmp_path):
    scene = frame_of(cloud_of([[0, 0, 0]]), boxes_of([(CAR, [np.nan, 0, 0, 4, 2, 2, 0])]), log="scene")
    write_library(tmp_path, [(CAR, [10.0, 0, 0, 4, 2, 2, 0])], scene)
    with pytest.raises(DataError, match="scene/0: a box holds NaN"):
        sampler_of(tmp_path).paste(sample_of(tmp_path, FrameKey("scene", 0)), CLASSES, np.random.default_rng(0))


def test_columns_that_only_some_boxes_have_are_unknown_for_pasted_ones(tmp_path):
    optional: dict[str, Any] = {
        "num_radar_points": np.array([3], np.int32),
        "attribute": ("vehicle.parked",),
        "difficulty": np.array([2], np.int8),
        "acceleration": np.array([[1.0, 2.0]]),
    }
    scene = frame_of(cloud_of([[0, 0, 0]]), boxes_of([(CAR, [0, 0, 0, 4, 2, 2, 0])], **optional), log="scene")
    write_library(tmp_path, [(CAR, [10.0, 0, 0, 4, 2, 2, 0])], scene)
    found = sampler_of(tmp_path).paste(sample_of(tmp_path, FrameKey("scene", 0)), CLASSES, np.random.default_rng(0)).boxes
    assert found is not None
    assert found.num_radar_points is not None
    assert found.difficulty is not None
    assert found.num_radar_points.tolist() == [3, -1]
    assert found.attribute == ("vehicle.parked", "")
    assert found.difficulty.tolist() == [2, -1]
    np.testing.assert_array_equal(found.acceleration, [[1, 2], [np.nan, np.nan]])


class OneCellPerPoint:
    """Targets of one cell for each point, the last tenth without."""

    def targets(self, frame: Frame) -> FrameTargets:
        n = len(frame.points)
        cell = np.arange(n)
        cell[n - n // 10 :] = -1
        return FrameTargets(np.arange(2.0 * n, dtype=np.float16).reshape(n, 2), np.zeros(n, np.uint8), cell)


@pytest.fixture(scope="module")
def town(tmp_path_factory) -> Path:
    """A dataset of random scenes with labels."""
    root = tmp_path_factory.mktemp("random-scenes")
    rng = np.random.default_rng(5)
    frames = [random_frame(i, rng, categories=(CAR, ADULT, TRUCK, "animal")) for i in range(6)]
    write_scenes(root, {"log-a": frames})
    build_object_database(root)
    return root


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), index=st.integers(0, 5), wanted=st.tuples(*[st.integers(0, 12)] * 3))
def test_whatever_is_drawn_the_scene_stays_whole(town, seed, index, wanted):
    config = DataConfig(root=town, box_classes=CLASSES.names, min_box_points=0)
    sample = read_sample(PreparedDataset(town), FrameKey("log-a", index), config, targets=OneCellPerPoint())
    sampler = sampler_of(town, fill_to=dict(zip(CLASSES.names, wanted, strict=True)))
    found = sampler.paste(sample, CLASSES, np.random.default_rng(seed))
    again = sampler.paste(sample, CLASSES, np.random.default_rng(seed))
    assert sample.boxes is not None
    assert found.boxes is not None
    assert found.box_class is not None
    assert sample.box_class is not None
    np.testing.assert_array_equal(found.xyz, again.xyz)
    # No pasted box meets any other; the scene's own come first, unchanged.
    old, rows = len(sample.boxes), box_rows(found.boxes)
    assert found.boxes.track_id[:old] == sample.boxes.track_id
    assert (bev_overlap(rows[old:], rows) > 1e-9).sum() == len(rows) - old
    # Never more of a class than wanted, or than there were.
    present = np.bincount(sample.box_class, minlength=4)[1:]
    assert (np.bincount(found.box_class, minlength=4)[1:] <= np.maximum(present, wanted)).all()
    assert (found.box_class == CLASSES.of(found.boxes.category)).all()
    # Rows that stay are the sample's, in order, with their features and targets; inside of pasted boxes none is left.
    own = found.point_id >= 0
    kept = found.point_id[own]
    assert (np.diff(kept) > 0).all()
    np.testing.assert_array_equal(found.xyz[own], sample.xyz[kept])
    np.testing.assert_array_equal(found.features[own], sample.features[kept])
    assert found.point_cell is not None
    assert sample.point_cell is not None
    np.testing.assert_array_equal(found.point_cell[own], sample.point_cell[kept])
    assert (found.point_cell[~own] == -1).all()
    pasted = rows[old:]
    held = points_in_boxes(torch.from_numpy(sample.xyz), pasted).numpy()
    np.testing.assert_array_equal(np.flatnonzero(held < 0), kept)
    # The points that came are those of the objects, in the order of their boxes, inside of them up to rounding.
    counts = found.boxes.num_points[old:]
    assert counts.sum() == (~own).sum()
    grown = pasted.clone()
    grown[:, 3:6] += 1e-4
    owner = points_in_boxes(torch.from_numpy(found.xyz[~own]), grown).numpy()
    np.testing.assert_array_equal(owner, np.repeat(np.arange(len(pasted)), counts))


def test_every_object_is_drawn_in_the_long_run(tmp_path):
    objects = [(CAR, [10.0 * i, 0, 0, 4, 2, 2, 0]) for i in range(1, 31)]
    write_library(tmp_path, objects, frame_of(cloud_of([[0, 0, 0]]), Boxes.empty(), log="scene"))
    sample = sample_of(tmp_path, FrameKey("scene", 0))
    sampler = sampler_of(tmp_path, fill_to={"car": 3})
    counts = np.zeros(31)
    for step in range(300):
        found = sampler.paste(sample, CLASSES, np.random.default_rng([0, step]))
        assert found.boxes is not None
        assert len(found.boxes) == 3
        counts[(found.boxes.center[:, 0] / 10).astype(int)] += 1
    # 900 draws of 30 objects: 30 each, with a standard deviation of 5.3.
    assert counts[1:].min() > 8
    assert counts[1:].max() < 60


def test_a_sampler_can_be_sent_to_another_process(town):
    sampler = sampler_of(town, fill_to={"car": 8})
    sent: ObjectSampler = pickle.loads(pickle.dumps(sampler))
    sample = sample_of(town, FrameKey("log-a", 2))
    expected = sampler.paste(sample, CLASSES, np.random.default_rng(3))
    assert len(expected.xyz) != len(sample.xyz)
    np.testing.assert_array_equal(sent.paste(sample, CLASSES, np.random.default_rng(3)).xyz, expected.xyz)
    assert isinstance(sent.database, ObjectDatabase)


def test_the_published_numbers():
    nuscenes, waymo = ObjectSamplingConfig.nuscenes(), ObjectSamplingConfig.waymo()
    assert tuple(nuscenes.fill_to) == NUSCENES_DETECTION.names
    assert tuple(nuscenes.fill_to.values()) == (2, 3, 7, 4, 6, 2, 6, 6, 2, 2)
    assert tuple(waymo.fill_to) == WAYMO_DETECTION.names
    assert tuple(waymo.min_points.values()) == (5, 10, 10)
