from __future__ import annotations

import pickle
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from picture3d.datasets.loading import FrameBatches, Sample, collate, iterate_batches
from picture3d.datasets.object_building import build_object_database
from picture3d.datasets.samples import DataConfig
from picture3d.errors import ConfigError, DataError
from picture3d.structures.batch import PointBatch
from picture3d.structures.boxes import Boxes
from picture3d.structures.frame import Frame
from picture3d.structures.targets import FrameTargets
from tests.datasets.made_frames import made_frame, write_made_dataset
from tests.datasets.object_scenes import box_points, boxes_of, cloud_of, frame_of, write_scenes


class RowNumbers:
    """One cell per point, whose feature is the point's row; every fourth frame has no targets."""

    def targets(self, frame: Frame) -> FrameTargets | None:
        if frame.index % 4 == 3:
            return None
        rows = np.arange(len(frame.points))
        return FrameTargets(rows[:, None].astype(np.float16), (rows % 8).astype(np.uint8), rows)


@pytest.fixture
def root(tmp_path):
    logs = {log: [made_frame(log, i, points=20 + i, seed=ord(log)) for i in range(5)] for log in "ab"}
    return write_made_dataset(tmp_path, logs)


def config(root: Any, **settings: Any) -> DataConfig:
    return DataConfig.from_tree({"root": str(root), "augment": {}, "sweeps": 2, **settings})


def assert_same(one: PointBatch, two: PointBatch) -> None:
    for field in fields(PointBatch):
        a, b = getattr(one, field.name), getattr(two, field.name)
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b), field.name
        else:
            assert a == b, field.name


def test_every_frame_comes_once_an_epoch_in_an_order_of_its_own(root):
    batches = FrameBatches(config(root), batch_size=2, seed=3)
    assert batches.steps_per_epoch == 5
    orders = [[name for batch in batches.epoch(epoch) for name in batch.frame_names] for epoch in range(3)]
    for order in orders:
        assert sorted(order) == [f"{log}/{i}" for log in "ab" for i in range(5)]
    assert orders[0] != orders[1] != orders[2]


def test_a_batch_is_a_function_of_seed_epoch_and_step(root):
    whole = list(FrameBatches(config(root), batch_size=3, seed=3, targets=RowNumbers()).epoch(7))
    entered = list(FrameBatches(config(root), batch_size=3, seed=3, targets=RowNumbers()).epoch(7, start_step=1))
    assert len(whole) == 3
    for one, two in zip(whole[1:], entered, strict=True):
        assert_same(one, two)
    other = list(iterate_batches(config(root), epoch=7, seed=4, batch_size=3))
    assert other[0].frame_names != whole[0].frame_names or not torch.equal(other[0].xyz, whole[0].xyz)


@pytest.mark.parametrize("workers", [1, 2, 1000])
def test_workers_change_no_number(root, workers):
    here = list(FrameBatches(config(root), batch_size=3, seed=3, targets=RowNumbers()).epoch(2, start_step=1))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    there = list(FrameBatches(config(root), batch_size=3, seed=3, targets=RowNumbers(), workers=workers).epoch(2, start_step=1))
    assert torch.equal(before, torch.get_rng_state()), "loading must not draw from the global generator"
    for one, two in zip(here, there, strict=True):
        assert_same(one, two)


def test_the_cache_changes_no_number_and_keeps_its_bound(root):
    plain = FrameBatches(config(root), batch_size=2, seed=1, targets=RowNumbers())
    for limit in (1, 3000, 1 << 30):
        cached = FrameBatches(config(root, cache_bytes=limit), batch_size=2, seed=1, targets=RowNumbers())
        for epoch in range(3):
            for one, two in zip(plain.epoch(epoch), cached.epoch(epoch), strict=True):
                assert_same(one, two)
                two.xyz.zero_()  # what a caller does to a batch must not reach the cache
        assert cached._cached_bytes <= limit
    assert len(cached._cache) == 10


def test_batches_survive_being_sent_to_another_process(root):
    batches = FrameBatches(config(root), batch_size=2, seed=1, targets=RowNumbers())
    first = batches.batch(0, 0)
    assert_same(pickle.loads(pickle.dumps(batches)).batch(0, 0), first)


@pytest.mark.parametrize(("drop_last", "steps", "last"), [(True, 3, 3), (False, 4, 1)])
def test_the_last_batch_is_dropped_or_kept(root, drop_last, steps, last):
    batches = FrameBatches(config(root, drop_last=drop_last), batch_size=3, seed=0)
    found = list(batches.epoch(0))
    assert len(found) == batches.steps_per_epoch == steps
    assert found[-1].batch_size == last


def test_evaluation_sees_every_frame_in_order_and_as_it_is(root):
    batches = FrameBatches(config(root, sweeps=1), batch_size=3, seed=0, train=False)
    found = list(batches.epoch(5))
    assert [name for batch in found for name in batch.frame_names] == [f"{log}/{i}" for log in "ab" for i in range(5)]
    assert np.array_equal(found[0].xyz[:20].numpy(), made_frame("a", 0, points=20, seed=ord("a")).points.xyz)


def test_fewer_frames_than_a_batch_are_an_error_in_words(root):
    with pytest.raises(ConfigError, match="10 frames are selected, fewer than batch_size 11"):
        FrameBatches(config(root), batch_size=11, seed=0)
    assert FrameBatches(config(root, drop_last=False), batch_size=11, seed=0).steps_per_epoch == 1


def made_sample(name: str, points: int, cells: int | None, *, labels: bool = True, dimension: int = 4) -> Sample:
    rng = np.random.default_rng(points)
    targets = None
    if cells is not None:
        features = rng.normal(size=(cells, dimension)).astype(np.float16)
        cell = rng.integers(-1, cells, points) if cells else np.full(points, -1)
        targets = FrameTargets(features, rng.integers(0, 8, cells).astype(np.uint8), cell)
    return Sample(
        name=name,
        xyz=rng.normal(size=(points, 3)).astype(np.float32),
        features=rng.normal(size=(points, 2)).astype(np.float32),
        point_id=np.where(rng.random(points) < 0.8, np.arange(points), -1),
        labels=rng.integers(0, 17, points) if labels else None,
        targets=targets,
    )


def test_collate_shifts_the_cells_of_each_sample():
    samples = [
        made_sample("a/0", 9, 4),
        made_sample("a/1", 0, 0),
        made_sample("a/2", 7, None, labels=False),
        made_sample("a/3", 5, 3),
        made_sample("a/4", 6, 5),
    ]
    batch = collate(samples)
    assert batch.batch_size == 5
    assert batch.frame_names == ("a/0", "a/1", "a/2", "a/3", "a/4")
    assert batch.sample.tolist() == [0] * 9 + [2] * 7 + [3] * 5 + [4] * 6
    assert batch.cell_features is not None
    assert batch.cell_superclass is not None
    assert batch.point_cell is not None
    assert batch.labels is not None
    assert batch.cell_features.shape == (12, 4)
    assert batch.cell_features.dtype == torch.float16
    assert batch.cell_superclass.dtype == torch.int64
    start = 0
    for sample in samples:
        rows = slice(start, start := start + len(sample.xyz))
        labels = np.zeros(len(sample.xyz)) if sample.labels is None else sample.labels
        assert np.array_equal(batch.labels[rows], labels)
        cells = batch.point_cell[rows].numpy()
        if sample.targets is None or sample.point_cell is None:
            assert (cells == -1).all()
            continue
        has = sample.point_cell >= 0
        assert np.array_equal(cells >= 0, has)
        assert np.array_equal(batch.cell_features.numpy()[cells[has]], sample.targets.features[sample.point_cell[has]])
        assert np.array_equal(batch.cell_superclass.numpy()[cells[has]], sample.targets.superclass[sample.point_cell[has]])


def test_boxes_of_a_batch_say_which_frame_they_belong_to_and_unknown_velocities_are_0():
    boxes = Boxes(
        center=np.array([[1.0, 2, 3], [4, 5, 6]]),
        size=np.array([[4.0, 2, 1.5], [1, 1, 2]]),
        yaw=np.array([0.5, -3.0]),
        velocity=np.array([[np.nan, np.nan], [1.0, -2.0]]),
        category=("car", "pedestrian"),
        track_id=("a", "b"),
        num_points=np.array([3, 4], np.int32),
    )
    plain, none = made_sample("x/0", 2, None), made_sample("x/1", 2, None)
    annotated = replace(made_sample("x/2", 2, None), boxes=boxes, box_class=np.array([1, 9]))
    empty = replace(made_sample("x/3", 2, None), boxes=Boxes.empty(), box_class=np.zeros(0, np.int64))
    batch = collate([plain, annotated, empty, annotated])
    assert batch.boxes is not None
    assert batch.box_class is not None
    assert batch.box_sample is not None
    assert batch.boxes.dtype == torch.float32
    one = [[1, 2, 3, 4, 2, 1.5, 0.5, 0, 0], [4, 5, 6, 1, 1, 2, -3, 1, -2]]
    assert batch.boxes.tolist() == one + one
    assert batch.box_class.tolist() == [1, 9, 1, 9]
    assert batch.box_sample.tolist() == [1, 1, 3, 3]
    assert collate([plain, none]).boxes is None
    alone = collate([empty]).boxes
    assert alone is not None
    assert alone.shape == (0, 9)


def test_a_batch_of_empty_frames_is_a_batch():
    batch = collate([made_sample("a/0", 0, None, labels=False), made_sample("a/1", 0, None, labels=False)])
    assert batch.xyz.shape == (0, 3)
    assert batch.sample.dtype == torch.int64
    assert batch.batch_size == 2
    assert batch.labels is None
    assert batch.point_cell is None


def test_targets_of_two_teachers_do_not_mix():
    with pytest.raises(DataError, match="different dimensions"):
        collate([made_sample("a/0", 5, 2, dimension=4), made_sample("a/1", 5, 2, dimension=3)])


def test_a_damaged_frame_is_named_from_a_worker_too(root):
    path = root / "logs" / "a.p3d"
    content = bytearray(path.read_bytes())
    content[200] ^= 255
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.p3d: frame 0") as caught:
        list(FrameBatches(config(root, sweeps=1), batch_size=1, seed=0, workers=1).epoch(0))
    assert "Traceback" not in str(caught.value)


def write_street(root: Path) -> Path:
    """Four frames: a car in each, a pedestrian in one."""
    rng = np.random.default_rng(5)
    frames = []
    for index in range(4):
        car, person = [8.0 + 2 * index, -12.0 + 8 * index, 0, 4, 2, 2, 0.3 * index], [-9.0, 3, 0, 1, 1, 2, 0]
        rows = [("vehicle.car", car)] + ([("pedestrian", person)] if index == 2 else [])
        points = np.concatenate([box_points(row, 30, rng) for _, row in rows])
        frames.append(frame_of(cloud_of(points), boxes_of(rows), index=index))
    return write_scenes(root, {"log-a": frames})


def test_classes_are_balanced_once_from_the_seed_and_only_in_training(tmp_path):
    root = write_street(tmp_path)
    settings: dict[str, Any] = {"box_classes": ("car", "pedestrian"), "sweeps": 1, "labels": False, "split": None}
    batches = FrameBatches(config(root, balance_classes=True, **settings), batch_size=1, seed=3)
    indices = [key.index for key in batches.keys]
    assert indices.count(2) >= 2, "the only pedestrian stands in frame 2"
    assert len(indices) == 4
    again = FrameBatches(config(root, balance_classes=True, **settings), batch_size=1, seed=3)
    assert again.keys == batches.keys
    whole = FrameBatches(config(root, balance_classes=True, **settings), batch_size=1, seed=3, train=False)
    assert [key.index for key in whole.keys] == [0, 1, 2, 3]


def test_objects_are_pasted_by_seed_epoch_and_position_until_the_last_epochs(tmp_path):
    root = write_street(tmp_path)
    build_object_database(root, name="all", split=None)
    settings: dict[str, Any] = {
        "box_classes": ("car", "pedestrian"),
        "sweeps": 1,
        "labels": False,
        "split": None,
        "augment": None,
        "objects": {"database": "all", "fill_to": {"car": 3, "pedestrian": 1}},
        "objects_off_last": 1,
    }

    def batches(workers: int = 0, **more: Any) -> FrameBatches:
        found = FrameBatches(config(root, **settings, **more), batch_size=2, seed=1, workers=workers)
        found.total_epochs = 3
        return found

    first = batches()
    counts = [[len(batch.boxes) for batch in first.epoch(epoch) if batch.boxes is not None] for epoch in range(3)]
    assert min(counts[0]) > 3
    assert sum(counts[2]) == 5, "none is pasted in the last epoch"
    for epoch in (1, 2):
        for one, two in zip(first.epoch(epoch), batches(workers=1).epoch(epoch), strict=True):
            assert_same(one, two)
    different = [first.batch(0, 0), first.batch(1, 0)]
    assert not torch.equal(different[0].xyz[:10], different[1].xyz[:10]) or len(different[0].xyz) != len(different[1].xyz)
    pasted = first.batch(0, 0)
    assert pasted.box_class is not None
    assert set(pasted.box_class.tolist()) == {1, 2}


def test_augmentation_stops_in_the_last_epochs_too(tmp_path):
    root = write_street(tmp_path)
    settings: dict[str, Any] = {"box_classes": ("car",), "sweeps": 1, "labels": False, "split": None, "shuffle": False}
    batches = FrameBatches(config(root, augment_off_last=2, **settings), batch_size=4, seed=1)
    with pytest.raises(ConfigError, match="nobody said how many epochs"):
        batches.batch(0, 0)
    batches.total_epochs = 5
    plain = FrameBatches(config(root, **settings), batch_size=4, seed=1, train=False).batch(0, 0)
    assert not torch.equal(batches.batch(2, 0).xyz, plain.xyz)
    for epoch in (3, 4):
        assert_same(batches.batch(epoch, 0), plain)
    loaded = FrameBatches(config(root, augment_off_last=2, **settings), batch_size=4, seed=1, workers=1)
    loaded.total_epochs = 5
    for epoch in (2, 3):  # a worker knows the epoch, too
        assert_same(next(loaded.epoch(epoch)), batches.batch(epoch, 0))
