from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from picture3d.datasets.class_balance import balanced_keys, balanced_rows, class_counts
from picture3d.datasets.detection_classes import NUSCENES_DETECTION, DetectionClasses
from picture3d.datasets.log_file import LogReader
from picture3d.datasets.prepared import FrameKey, PreparedDataset
from picture3d.errors import DataError
from tests.datasets.made_frames import made_frame
from tests.datasets.object_scenes import boxes_of, cloud_of, frame_of, write_scenes

CAR, ADULT, BUS = "vehicle.car", "human.pedestrian.adult", "vehicle.bus.rigid"
CLASSES = DetectionClasses(("car", "pedestrian", "truck", "bus"))


def test_the_shares_are_equal_as_computed_by_hand():
    """Cars in 6 frames, pedestrians in 2, trucks nowhere, buses in 1: 9 over 3 classes are 3 frames each."""
    counts = np.array([[9, 0, 0, 0], [1, 0, 0, 0], [1, 2, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 0, 1], [0, 0, 0, 0]])
    rows = balanced_rows(counts, seed=0)
    assert len(rows) == 9
    cars, pedestrians, buses = rows[:3], rows[3:6], rows[6:]
    assert len(set(cars)) == 3  # a subset of the six, none twice
    assert set(cars) <= set(range(6))
    assert sorted(Counter(pedestrians.tolist()).values()) == [1, 2]  # both once, one of them again
    assert set(pedestrians) == {2, 4}
    assert buses.tolist() == [5, 5, 5]


@given(st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=0, max_size=30), st.integers(0, 2**32))
def test_every_class_that_occurs_has_the_same_share(table, seed):
    counts = np.array(table, np.int64).reshape(-1, 3)
    rows = balanced_rows(counts, seed)
    np.testing.assert_array_equal(rows, balanced_rows(counts, seed))
    lists = [np.flatnonzero(column) for column in counts.T if column.any()]
    share = sum(len(one) for one in lists) // max(1, len(lists))
    assert len(rows) == share * len(lists)
    for part, one in zip(np.split(rows, len(lists)) if lists else [], lists, strict=True):
        times = np.bincount(part, minlength=len(counts))
        assert set(part) <= set(one)
        assert times[one].max() - times[one].min() <= 1


def test_another_seed_draws_other_frames():
    counts = np.zeros((100, 2), np.int64)
    counts[:, 0] = 1
    counts[:10, 1] = 1
    drawn = {tuple(balanced_rows(counts, seed)[:55]) for seed in range(5)}
    assert len(drawn) == 5


def scenes(root: Path) -> PreparedDataset:
    """Frame i of log-a holds i cars; frame 2 of log-b two adults and a bus with 3 points, frame 1 is not annotated."""
    places = [[10.0 * i, 0, 0, 4, 2, 2, 0] for i in range(3)]
    a = [frame_of(cloud_of([[0, 0, 0]]), boxes_of([(CAR, places[k]) for k in range(i)]), index=i) for i in range(3)]
    mixed = boxes_of([(ADULT, places[0]), (BUS, places[1]), (ADULT, places[2])])
    mixed.num_points[:] = [0, 3, 9]
    b = [
        frame_of(cloud_of([[0, 0, 0]]), boxes_of([("animal", places[0])]), log="log-b"),
        frame_of(cloud_of([[0, 0, 0]]), None, log="log-b", index=1),
        frame_of(cloud_of([[0, 0, 0]]), mixed, log="log-b", index=2),
    ]
    return PreparedDataset(write_scenes(root, {"log-a": a, "log-b": b}))


def test_boxes_are_counted_per_frame_and_class(tmp_path):
    dataset = scenes(tmp_path)
    keys = dataset.keyframes("train")
    assert class_counts(dataset, keys, CLASSES).tolist() == [
        *([0, 0, 0, 0], [1, 0, 0, 0], [2, 0, 0, 0]),
        *([0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 1]),
    ]
    assert class_counts(dataset, keys[::-1][:1], CLASSES, min_box_points=0).tolist() == [[0, 2, 0, 1]]
    assert class_counts(dataset, keys[-1:], CLASSES, min_box_points=4).tolist() == [[0, 1, 0, 0]]
    assert class_counts(dataset, [], CLASSES).shape == (0, 4)


def test_counts_are_kept_and_made_anew_only_for_a_log_that_changed(tmp_path, monkeypatch):
    dataset = scenes(tmp_path)
    keys = dataset.keyframes("train")
    first = class_counts(dataset, keys, NUSCENES_DETECTION)
    read: list[str] = []
    boxes = LogReader.boxes
    monkeypatch.setattr(LogReader, "boxes", lambda self, index: (read.append(self.header.log), boxes(self, index))[1])
    np.testing.assert_array_equal(class_counts(PreparedDataset(tmp_path), keys, NUSCENES_DETECTION), first)
    class_counts(PreparedDataset(tmp_path), keys, CLASSES)  # other classes, the same counts
    assert read == []
    changed = frame_of(cloud_of([[5, 5, 5]]), boxes_of([(BUS, [0, 0, 0, 9, 3, 3, 0])]))
    old = [PreparedDataset(tmp_path).frame(FrameKey("log-b", i)) for i in range(3)]
    write_scenes(tmp_path, {"log-a": [changed], "log-b": old})
    counts = class_counts(PreparedDataset(tmp_path), [FrameKey("log-a", 0)], CLASSES)
    assert counts.tolist() == [[0, 0, 0, 1]]
    assert read == ["log-a"]


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b'{"format": "picture3d-box-counts", "version": 1, "logs": 3}'])
def test_a_damaged_file_of_counts_is_made_anew(tmp_path, damage):
    dataset = scenes(tmp_path)
    keys = dataset.keyframes("train")
    first = class_counts(dataset, keys, CLASSES)
    path = tmp_path / "box_counts" / "min1.json"
    good = path.read_bytes()
    path.write_bytes(damage)
    np.testing.assert_array_equal(class_counts(dataset, keys, CLASSES), first)
    assert path.read_bytes() == good
    tree = json.loads(good)
    tree["logs"]["log-a"]["frames"]["2"] = [[7, 1]]  # there is no category 7
    path.write_text(json.dumps(tree))
    np.testing.assert_array_equal(class_counts(dataset, keys, CLASSES), first)


def test_counts_that_cannot_be_kept_are_counted_all_the_same(tmp_path):
    dataset = scenes(tmp_path)
    (tmp_path / "box_counts").write_text("a file where the folder would be")
    assert class_counts(dataset, dataset.keyframes("train"), CLASSES).sum() == 5


def test_keys_are_resampled_in_their_order(tmp_path):
    dataset = scenes(tmp_path)
    keys = dataset.keyframes("train")
    balanced = balanced_keys(dataset, keys, CLASSES, seed=0)
    # Cars in 2 frames, pedestrians and buses in the same one: 4 // 3 = 1 frame per class.
    assert [str(key) for key in balanced][1:] == ["log-b/2", "log-b/2"]
    assert str(balanced[0]) in {"log-a/1", "log-a/2"}
    assert balanced == balanced_keys(dataset, keys, CLASSES, seed=0)
    with pytest.raises(DataError, match="none of the 6 frames holds an object of truck"):
        balanced_keys(dataset, keys, DetectionClasses(("truck",)), seed=0)


def test_boxes_are_read_without_points_as_with_them(tmp_path):
    write_scenes(tmp_path, {"log-a": [made_frame(index=0, labels=None), made_frame(index=1, labels=None, boxes=None)]})
    reader = PreparedDataset(tmp_path).reader("log-a")
    boxes, whole = reader.boxes(0), reader.frame(0).boxes
    assert boxes is not None
    assert whole is not None
    assert boxes.category == whole.category
    assert boxes.attribute == whole.attribute
    np.testing.assert_array_equal(boxes.center, whole.center)
    np.testing.assert_array_equal(boxes.velocity, whole.velocity)
    np.testing.assert_array_equal(boxes.difficulty, whole.difficulty)
    assert reader.boxes(1) is None
    with pytest.raises(DataError, match="there is no frame 2"):
        reader.boxes(2)
