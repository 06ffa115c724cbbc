from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from picture3d.datasets.loading import FrameBatches
from picture3d.datasets.object_building import build_object_database
from picture3d.datasets.samples import DataConfig
from picture3d.errors import ConfigError, DataError, TrainingError
from picture3d.structures.frame import Frame
from picture3d.structures.targets import FrameTargets
from picture3d.training.loop import fit
from picture3d.training.plan import TrainingConfig
from picture3d.training.runlog import RunFolder
from tests.datasets.made_frames import made_frame, write_made_dataset
from tests.datasets.object_scenes import box_points, boxes_of, cloud_of, frame_of, write_scenes
from tests.training.tiny_task import TinyTask


class Constant:
    """One cell for all points, whose feature is `value`."""

    def __init__(self, value: float) -> None:
        self.value = value

    def targets(self, frame: Frame) -> FrameTargets:
        cell = np.zeros(len(frame.points), np.int64)
        return FrameTargets(np.full((1, 1), self.value, np.float16), np.zeros(1, np.uint8), cell)


def write_plain(root: Path, logs: str, frames: int, *, seed: int = 0, **changes: Any) -> Path:
    """Frames whose points lack the elongation if `elongation` is False."""
    elongation = changes.pop("elongation", True)
    made = {}
    for log in logs:
        made[log] = []
        for index in range(frames):
            frame = made_frame(log, index, points=20 + index, seed=ord(log) + seed)
            points = frame.points if elongation else replace(frame.points, elongation=None)
            made[log].append(replace(frame, points=points))
    return write_made_dataset(root, made, **changes)


@pytest.fixture
def roots(tmp_path):
    return write_plain(tmp_path / "one", "ab", 5), write_plain(tmp_path / "two", "abc", 7, seed=9, elongation=False)


def config(
    roots: tuple[Path, ...], *, weight: float | None = None, source: dict[str, Any] | None = None, **settings: Any
) -> DataConfig:
    also = [{"root": str(root), "weight": weight, **(source or {})} for root in roots[1:]]
    return DataConfig.from_tree({"root": str(roots[0]), "augment": {}, "sweeps": 2, "also": also, **settings})


def names(batches: FrameBatches, epoch: int) -> list[str]:
    return [name for batch in batches.epoch(epoch) for name in batch.frame_names]


def assert_same(one: Any, two: Any) -> None:
    for field in fields(one):
        a, b = getattr(one, field.name), getattr(two, field.name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name


def test_without_a_weight_every_frame_of_every_dataset_comes_once_an_epoch(roots):
    batches = FrameBatches(config(roots), batch_size=1, seed=3)
    expected = [f"one:{log}/{i}" for log in "ab" for i in range(5)] + [f"two:{log}/{i}" for log in "abc" for i in range(7)]
    orders = [names(batches, epoch) for epoch in range(2)]
    assert [sorted(order) for order in orders] == [sorted(expected)] * 2
    assert orders[0] != orders[1]


@pytest.mark.parametrize(("weight", "taken"), [(0.5, 5), (1.0, 10), (3.7, 37), (0.01, 1)])
def test_a_weight_says_how_many_frames_come_for_each_of_the_first_dataset(roots, weight, taken):
    batches = FrameBatches(config(roots, weight=weight), batch_size=1, seed=3)
    assert batches.steps_per_epoch == 10 + taken
    order = names(batches, 0)
    assert sum(name.startswith("two:") for name in order) == taken
    assert sorted(name for name in order if name.startswith("one:")) == [f"one:{log}/{i}" for log in "ab" for i in range(5)]


def test_over_the_epochs_a_weighted_dataset_uses_all_its_frames_equally_often(roots):
    batches = FrameBatches(config(roots, weight=0.8), batch_size=1, seed=3)
    seen: Counter[str] = Counter()
    for epoch in range(5):
        seen.update(name for name in names(batches, epoch) if name.startswith("two:"))
        assert max(seen.values()) - (min(seen.values()) if len(seen) == 21 else 0) <= 1
    assert sum(seen.values()) == 40


def test_batches_are_alike_in_what_they_mix(roots):
    batches = FrameBatches(config(roots, weight=1.0), batch_size=4, seed=3)
    for batch in batches.epoch(1):
        assert 1 <= sum(name.startswith("two:") for name in batch.frame_names) <= 3


def test_one_dataset_keeps_the_order_it_had_before_there_were_several(roots):
    batches = FrameBatches(config(roots[:1]), batch_size=2, seed=3)
    assert np.array_equal(batches.order(4), np.random.default_rng([3, 4, 0]).permutation(10))
    assert sorted(names(batches, 0)) == [f"{log}/{i}" for log in "ab" for i in range(5)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_mixed_batch_is_a_function_of_seed_epoch_and_step(roots, workers):
    settings = config(roots, weight=1.3, shuffle_window=2)
    whole = list(FrameBatches(settings, batch_size=3, seed=3).epoch(6))
    entered = list(FrameBatches(settings, batch_size=3, seed=3, workers=workers).epoch(6, start_step=2))
    assert len(whole) == 7
    for one, two in zip(whole[2:], entered, strict=True):
        assert_same(one, two)


def test_the_window_holds_for_each_dataset(roots):
    batches = FrameBatches(config(roots, shuffle_window=1), batch_size=1, seed=3)
    for start in ("one:", "two:"):
        logs = [name.split("/")[0] for name in names(batches, 2) if name.startswith(start)]
        changes = sum(a != b for a, b in itertools.pairwise(logs))
        assert changes == len(set(logs)) - 1, "a log that was left is not entered again"


def test_frames_of_each_dataset_are_read_as_alone(roots):
    settings = config(roots, augment=None, shuffle=False)
    mixed = list(FrameBatches(settings, batch_size=1, seed=0).epoch(0))
    alone = [
        batch
        for root in roots
        for batch in FrameBatches(config((root,), augment=None), batch_size=1, seed=0, train=False).epoch(0)
    ]
    for one, two in zip(mixed, alone, strict=True):
        assert one.frame_names[0].split(":")[1] == two.frame_names[0]
        assert torch.equal(one.xyz, two.xyz)
        assert torch.equal(one.features, two.features)


def test_each_dataset_has_its_own_targets(roots):
    batches = FrameBatches(config(roots), batch_size=1, seed=0, targets=[Constant(1.0), Constant(2.0)])
    for batch in batches.epoch(0):
        assert batch.cell_features is not None
        assert float(batch.cell_features[0]) == (1.0 if batch.frame_names[0].startswith("one:") else 2.0)
    with pytest.raises(ValueError, match="1 sources of targets for 2 datasets"):
        FrameBatches(config(roots), batch_size=1, seed=0, targets=[Constant(1.0)])


def test_a_channel_that_a_dataset_lacks_is_refused_by_name_or_filled_on_request(roots):
    features = ("intensity", "elongation")
    with pytest.raises(DataError, match=r"dataset 'two' \(.*\): a/0: has no elongation.*fill"):
        FrameBatches(config(roots, features=features), batch_size=1, seed=0)
    filled = FrameBatches(config(roots, features=features, source={"fill": ("elongation",)}), batch_size=1, seed=0)
    for batch in filled.epoch(0):
        assert bool((batch.features[:, 1] == 0).all()) == batch.frame_names[0].startswith("two:")


def test_boxes_that_a_dataset_lacks_are_refused_by_name(roots, tmp_path):
    bare = write_made_dataset(tmp_path / "bare", {"x": [replace(made_frame("x", 0), boxes=None)]})
    with pytest.raises(DataError, match=r"dataset 'bare' .*x/0: was not annotated with boxes"):
        FrameBatches(config((roots[0], bare), box_classes=("car",)), batch_size=1, seed=0)


def test_labels_that_mean_other_classes_are_refused_unless_unused(roots, tmp_path):
    other = write_plain(tmp_path / "kitti", "k", 2, label_set="semantickitti")
    with pytest.raises(
        ConfigError, match=r"different classes \('one' nuscenes-32, 'kitti' semantickitti\).*data\.labels=false"
    ):
        FrameBatches(config((roots[0], other)), batch_size=1, seed=0)
    assert FrameBatches(config((roots[0], other), labels=False), batch_size=1, seed=0).steps_per_epoch == 12


def test_two_datasets_of_one_name_need_names(roots, tmp_path):
    twin = write_plain(tmp_path / "deeper" / "one", "z", 3)
    with pytest.raises(ConfigError, match="two datasets are called 'one'"):
        FrameBatches(config((roots[0], twin)), batch_size=1, seed=0)
    named = FrameBatches(config((roots[0], twin), source={"name": "twin"}), batch_size=1, seed=0)
    assert "twin:z/0" in names(named, 0)


def test_mixing_is_for_training(roots):
    with pytest.raises(ConfigError, match="mixed in training only"):
        FrameBatches(config(roots), batch_size=1, seed=0, train=False)


def test_a_source_may_be_written_on_the_command_line(roots):
    base = config(roots[:1])
    changed = base.with_overrides([f'also=[{{"root": "{roots[1]}", "weight": 0.5}}]'])
    assert changed.also[0].root == roots[1]
    with pytest.raises(ConfigError, match="wieght"):
        base.with_overrides([f'also=[{{"root": "{roots[1]}", "wieght": 0.5}}]'])


def train(settings: DataConfig, folder: Path, *, resume: bool = False, stop: int | None = None) -> dict[str, torch.Tensor]:
    batches = FrameBatches(settings, batch_size=3, seed=1)
    task = TinyTask()
    task.module[0] = torch.nn.Linear(3, 8)
    plan = TrainingConfig.from_tree({"epochs": 2, "batch_size": 3, "seed": 1, "checkpoint_every": 1, "log_every": 1})

    def progress(done: int, total: int, note: str) -> None:
        if stop is not None and done >= stop:
            raise KeyboardInterrupt

    fit(task, batches, plan, RunFolder(folder), resume=resume, progress=progress)
    return {name: value.clone() for name, value in task.module.state_dict().items()}


def test_a_mixed_run_cut_in_an_epoch_ends_as_an_unbroken_one(roots, tmp_path):
    settings = config(roots, weight=1.3)
    torch.manual_seed(0)
    unbroken = train(settings, tmp_path / "run-a")
    with pytest.raises(KeyboardInterrupt):
        train(settings, tmp_path / "run-b", stop=9)
    resumed = train(settings, tmp_path / "run-b", resume=True)
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)


def test_a_changed_weight_or_source_is_refused_in_words(roots, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(config(roots, weight=1.3), tmp_path / "run", stop=4)
    # Within rounding the number of steps is the same; only the weight tells.
    with pytest.raises(TrainingError, match=r"other data: 'two' weight \(then 1\.3, now 1\.31\)"):
        train(config(roots, weight=1.31), tmp_path / "run", resume=True)
    with pytest.raises(TrainingError, match="then one, two; now one"):
        train(config(roots[:1]), tmp_path / "run", resume=True)
    write_plain(roots[1], "abc", 7, seed=10, elongation=False)
    with pytest.raises(TrainingError, match=r"'two' logs \(then "):
        train(config(roots, weight=1.3), tmp_path / "run", resume=True)


def write_street(root: Path, *, log: str, seed: int) -> Path:
    """Three frames with a car each, and a database of them."""
    rng = np.random.default_rng(seed)
    frames = []
    for index in range(3):
        row = [8.0 + 2 * index, -12.0 + 8 * index, 0, 4, 2, 2, 0.3 * index]
        frames.append(frame_of(cloud_of(box_points(row, 30, rng)), boxes_of([("vehicle.car", row)]), index=index, log=log))
    write_scenes(root, {log: frames})
    build_object_database(root, name="all", split=None)
    return root


def test_objects_are_pasted_from_each_datasets_own_database(tmp_path):
    one, two = write_street(tmp_path / "one", log="x", seed=1), write_street(tmp_path / "two", log="y", seed=2)
    settings: dict[str, Any] = {
        "box_classes": ("car",),
        "sweeps": 1,
        "labels": False,
        "split": None,
        "augment": None,
        "objects": {"database": "all", "fill_to": {"car": 3}},
    }
    batches = FrameBatches(config((one, two), source={"split": None}, **settings), batch_size=1, seed=1)
    databases = [source.sampler.database.path for source in batches.sources if source.sampler is not None]
    assert databases == [one / "objects" / "all.objects", two / "objects" / "all.objects"]
    counts = [0 if batch.boxes is None else len(batch.boxes) for batch in batches.epoch(0)]
    assert len(counts) == 6
    assert max(counts) > 1


def test_objects_cut_out_of_frames_that_were_prepared_anew_are_refused(tmp_path):
    root = write_street(tmp_path / "one", log="x", seed=1)
    settings: dict[str, Any] = {"box_classes": ("car",), "sweeps": 1, "labels": False, "split": None, "augment": None}
    settings["objects"] = {"database": "all", "fill_to": {"car": 3}}
    database = (root / "objects" / "all.objects").read_bytes()
    write_street(root, log="x", seed=3)
    FrameBatches(config((root,), **settings), batch_size=1, seed=1)
    (root / "objects" / "all.objects").write_bytes(database)
    with pytest.raises(DataError, match="cut out of other frames"):
        FrameBatches(config((root,), **settings), batch_size=1, seed=1)
