"""The town, written as raw nuScenes and prepared: two rooms that check each other."""

from __future__ import annotations

import numpy as np
import pytest

from picture3d.datasets.nuscenes import prepare_nuscenes
from picture3d.datasets.prepared import PreparedDataset
from picture3d.datasets.samples import DataConfig, load_sample, move_sweep
from picture3d.synthetic.nuscenes_writer import write_nuscenes
from tests.datasets.test_augment import points_inside
from tests.datasets.test_real_sweeps import median_distance


@pytest.fixture(scope="module")
def town(tmp_path_factory) -> PreparedDataset:
    folder = tmp_path_factory.mktemp("town")
    write_nuscenes(folder / "raw", scenes=2, keyframes_per_scene=3, sweeps_per_keyframe=1, val_scenes=1, seed=5)
    summary = prepare_nuscenes(folder / "raw", folder / "out")
    assert (summary.logs, summary.keyframes, summary.labelled) == (2, 6, 6)
    return PreparedDataset(folder / "out")


def test_the_towns_own_splits_are_kept(town):
    assert town.logs("train") == ("scene-0001",)
    assert town.logs("val") == ("scene-0002",)


def test_boxes_hold_as_many_points_as_the_table_says(town):
    boxes_seen = 0
    for key in town.keyframes()[::3]:
        frame = town.frame(key)
        assert frame.boxes is not None
        counted = points_inside(frame.points.xyz, frame.boxes).sum(axis=1)
        difference = abs(counted - frame.boxes.num_points)
        # The town counts what hit the object; range noise moves hits through faces, and the ground touches the box.
        assert (difference <= 10 + 0.15 * counted).all()
        boxes_seen += len(frame.boxes)
    assert boxes_seen > 2


def test_points_in_boxes_carry_the_boxs_class(town):
    label_set = town.label_set
    assert label_set is not None
    agree = total = 0
    for key in town.keyframes()[::3]:
        frame = town.frame(key)
        assert frame.boxes is not None
        assert frame.labels is not None
        for inside, category in zip(points_inside(frame.points.xyz, frame.boxes), frame.boxes.category, strict=True):
            names = np.array(label_set.class_names)[frame.labels[inside]]
            agree += int((names == category).sum())
            total += int(inside.sum())
    assert total > 200
    assert agree / total > 0.75  # the rest is ground under and around the wheels


def test_sweeps_of_the_town_merge_into_the_keyframe(town):
    """Buildings seen half a second before lie on those of the keyframe once they are moved by the poses."""
    key = town.keyframes("train")[2]
    frame, earlier = town.frame(key), town.reader(key.log).frame(town.frame(key).previous[1])
    assert (frame.timestamp_us - earlier.timestamp_us) == pytest.approx(500_000, abs=60_000)
    static = [np.isin(f.labels, (28, 26)) for f in (frame, earlier)]
    there = move_sweep(earlier.points.xyz, earlier, frame)
    raw = median_distance(earlier.points.xyz[static[1]], frame.points.xyz[static[0]])
    placed = median_distance(there[static[1]], frame.points.xyz[static[0]])
    assert placed < 0.7 * raw
    merged = load_sample(town, key, DataConfig(root=town.root, sweeps=10), None)
    assert len(merged.xyz) > 2 * len(frame.points)
