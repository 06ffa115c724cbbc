"""Occupancy labels in batches: they stay with the points through flips and quarter turns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from picture3d.datasets.augment import Augmentation, AugmentConfig
from picture3d.datasets.loading import DataConfig, FrameBatches, collate
from picture3d.datasets.nuscenes import prepare_nuscenes
from picture3d.datasets.object_sampling_config import ObjectSamplingConfig
from picture3d.datasets.openoccupancy import NUSCENES_OCCUPANCY, attach_occupancy
from picture3d.datasets.prepared import PreparedDataset
from picture3d.datasets.samples import read_sample
from picture3d.errors import ConfigError, DataError
from picture3d.structures.batch import PointBatch
from picture3d.structures.boxes import Boxes
from picture3d.structures.occupancy import Occupancy, OccupancyGrid
from tests.datasets.occupancy_labels import label_path
from tests.datasets.raw_nuscenes import RawWorld

EXACT = AugmentConfig(rotation=0, scale=(1, 1), translation=0, quarter_turns=True)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """Two scenes in which every point's voxel is labelled with a class that tells its place; one keyframe has no labels."""
    folder = tmp_path_factory.mktemp("occupancy")
    world = RawWorld(folder / "raw", keyframes=3, between=0, points=200)
    world.write()
    for scene in range(2):
        for number in range(3):
            if (scene, number) == (1, 2):
                continue
            cells, _ = NUSCENES_OCCUPANCY.locate(world.sweep_points(scene, number)[:, :3])
            cells = np.unique(cells, axis=0)
            rows = np.column_stack([cells[:, ::-1], np.arange(len(cells)) % 17])
            path = label_path(folder, scene, number)
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, rows)
    prepare_nuscenes(world.root, folder / "prepared")
    attach_occupancy(folder, PreparedDataset(folder / "prepared"))
    return folder / "prepared"


def config(root: Path, **changes) -> DataConfig:
    return DataConfig(root=root, split=None, occupancy=True, box_classes=("car",), **changes)


def sparse(batch: PointBatch, sample: int) -> Occupancy:
    assert batch.occupancy_cell is not None
    assert batch.occupancy_class is not None
    assert batch.occupancy_grid is not None
    rows = batch.occupancy_cell[:, 0] == sample
    index = batch.occupancy_cell[rows, 1:].numpy().astype(np.int16)
    return Occupancy(index, batch.occupancy_class[rows].numpy(), batch.occupancy_grid)


def test_only_labelled_keyframes_are_taken_and_a_batch_holds_their_cells(prepared):
    batches = FrameBatches(config(prepared), batch_size=2, seed=0, train=False)
    assert [str(key) for key in batches.keys] == [
        "scene-0001/0",
        "scene-0001/1",
        "scene-0001/2",
        "scene-0002/0",
        "scene-0002/1",
    ]
    store = PreparedDataset(prepared).occupancy()
    for step in range(3):
        batch = batches.batch(0, step)
        for i in range(batch.batch_size):
            key = batches.keys[2 * step + i]
            expected, found = store.read(key.log, key.index, f"s{int(key.log[-1]) - 1}-d{key.index}"), sparse(batch, i)
            assert expected is not None
            assert np.array_equal(found.index, expected.index)
            assert np.array_equal(found.label, expected.label)
    assert (
        FrameBatches(config(prepared).model_copy(update={"occupancy": False}), batch_size=1, seed=0).batch(0, 0).occupancy_cell
        is None
    )


def test_every_point_keeps_its_label_through_every_flip_and_turn(prepared):
    plain = FrameBatches(config(prepared), batch_size=1, seed=0, train=False)
    before = {}
    for step in range(5):
        batch = plain.batch(0, step)
        before[batch.frame_names[0]] = sparse(batch, 0).at(batch.xyz.numpy())
        assert (before[batch.frame_names[0]] > 0).sum() > 20  # the rest is above or below the grid
    moved = FrameBatches(config(prepared, augment=EXACT), batch_size=2, seed=0, workers=0)
    seen = set()
    for epoch in range(8):
        for batch in moved.epoch(epoch):
            for i in range(2):
                xyz = batch.xyz[batch.sample == i].numpy()
                assert np.array_equal(sparse(batch, i).at(xyz), before[batch.frame_names[i]])
                assert batch.boxes is not None
                seen.add(tuple(np.sign(xyz[0, :2])))
    assert len(seen) > 1


@pytest.mark.parametrize("flip_x", [False, True])
@pytest.mark.parametrize("flip_y", [False, True])
@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_quarter_turns_move_points_boxes_and_cells_alike(flip_x: bool, flip_y: bool, turns: int):
    drawn = Augmentation(flip_x=flip_x, flip_y=flip_y, quarter_turns=turns)
    same = Augmentation(flip_x=flip_x, flip_y=flip_y, yaw=turns * np.pi / 2)
    np.testing.assert_allclose(drawn.linear, same.linear, atol=1e-15)
    assert set(np.abs(drawn.linear).ravel().tolist()) == {0.0, 1.0}
    rng = np.random.default_rng(0)
    boxes = Boxes(
        rng.normal(size=(3, 3)), np.ones((3, 3)), rng.uniform(-3, 3, 3), rng.normal(size=(3, 2)), ("car",) * 3, ("a",) * 3,
        np.zeros(3, np.int32),
    )  # fmt: skip
    one, other = drawn.boxes(boxes), same.boxes(boxes)
    for name in ("center", "size", "yaw", "velocity"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=1e-12)
    grid = OccupancyGrid((8, 8, 2), (-4.0, -4.0, -1.0), 1.0)
    points = rng.uniform(-4, 4, (40, 3)).astype(np.float32)
    cells = np.unique(grid.locate(points)[0], axis=0)
    labels = Occupancy.of_cells(cells, (np.arange(len(cells)) % 250 + 1).astype(np.uint8), grid)
    assert np.array_equal(drawn.occupancy(labels).at(drawn.points(points)), labels.at(points))


def test_old_draws_stay_the_same_when_quarter_turns_exist():
    from picture3d.datasets.augment import draw_augmentation

    plain, turned = (draw_augmentation(AugmentConfig(quarter_turns=on), np.random.default_rng(5)) for on in (False, True))
    assert (plain.yaw, plain.scale, plain.translation) == (turned.yaw, turned.scale, turned.translation)
    assert plain.quarter_turns == 0
    turns = {draw_augmentation(AugmentConfig(quarter_turns=True), np.random.default_rng(k)).quarter_turns for k in range(40)}
    assert turns == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"augment": AugmentConfig()}, "only flips and quarter turns"),
        ({"augment": EXACT.model_copy(update={"scale": (0.9, 1.0)})}, "only flips and quarter turns"),
        ({"objects": ObjectSamplingConfig(database="x", fill_to={"car": 1})}, "pasted objects"),
    ],
)
def test_settings_that_labels_do_not_survive_are_refused(prepared, changes, words):
    tree = config(prepared).model_dump() | {name: value.model_dump() for name, value in changes.items()}
    with pytest.raises(ConfigError, match=words):
        DataConfig.from_tree(tree, source="test")


@pytest.mark.parametrize("drawn", [Augmentation(yaw=0.1), Augmentation(scale=1.1), Augmentation(translation=(0.2, 0, 0))])
def test_a_motion_that_would_lose_cells_is_never_made(drawn):
    with pytest.raises(ValueError, match="only flips and quarter turns"):
        drawn.occupancy(Occupancy.empty(NUSCENES_OCCUPANCY))


def test_a_dense_batch_holds_the_class_of_every_cell():
    grid = OccupancyGrid((3, 3, 2), (0.0, 0.0, 0.0), 1.0)
    points = torch.zeros((2, 3))
    batch = PointBatch(points, points[:, :1], torch.tensor([0, 1]), 2, ("a/0", "b/0"))
    with pytest.raises(ValueError, match="no occupancy labels"):
        batch.dense_occupancy()
    cells = torch.tensor([[0, 1, 2, 0], [1, 0, 0, 1]], dtype=torch.int32)
    batch = PointBatch(
        points, points[:, :1], torch.tensor([0, 1]), 2, ("a/0", "b/0"), occupancy_cell=cells,
        occupancy_class=torch.tensor([4, 255], dtype=torch.uint8), occupancy_grid=grid,
    ).to("cpu")  # fmt: skip
    dense = batch.dense_occupancy()
    assert dense.shape == (2, 3, 3, 2)
    assert (dense[0, 1, 2, 0], dense[1, 0, 0, 1], int(dense.sum())) == (4, 255, 259)


def test_frames_with_and_without_labels_do_not_share_a_batch(prepared):
    dataset = PreparedDataset(prepared)
    key = dataset.keyframes()[0]
    with_labels = read_sample(dataset, key, config(prepared))
    without = read_sample(dataset, key, config(prepared).model_copy(update={"occupancy": False}))
    assert with_labels.nbytes > without.nbytes
    with pytest.raises(DataError, match="others have none"):
        collate([with_labels, without])


def test_workers_and_a_new_process_read_the_same_labels(prepared):
    alone = list(FrameBatches(config(prepared, augment=EXACT), batch_size=2, seed=3).epoch(1))
    helped = list(FrameBatches(config(prepared, augment=EXACT), batch_size=2, seed=3, workers=1).epoch(1))
    for one, other in zip(alone, helped, strict=True):
        assert one.occupancy_cell is not None
        assert other.occupancy_cell is not None
        assert torch.equal(one.occupancy_cell, other.occupancy_cell)
        assert other.occupancy_grid == NUSCENES_OCCUPANCY


def test_a_run_is_tied_to_its_labels(prepared, tmp_path):
    def identity(**changes) -> dict[str, object]:
        return FrameBatches(config(prepared).model_copy(update=changes), batch_size=1, seed=0).identity[0]

    assert "occupancy_crc32c" not in identity(occupancy=False)
    assert identity()["occupancy_crc32c"] == PreparedDataset(prepared).occupancy().fingerprint_of(["scene-0002", "scene-0001"])


def test_frames_without_attached_labels_are_refused_in_words(tmp_path):
    world = RawWorld(tmp_path / "raw", scenes=1)
    world.write()
    prepare_nuscenes(world.root, tmp_path / "prepared")
    with pytest.raises(DataError, match="no occupancy labels are attached"):
        FrameBatches(config(tmp_path / "prepared"), batch_size=1, seed=0)
