from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from picture3d.errors import ConfigError, DataError
from picture3d.models.dsvt import DsvtConfig
from picture3d.ops.coarse_labels import coarse_labels
from picture3d.ops.lovasz import lovasz_softmax
from picture3d.ops.scene_affinity import geometric_affinity, semantic_affinity
from picture3d.structures.batch import PointBatch
from picture3d.structures.cylinder import CylinderGrid
from picture3d.structures.occupancy import IGNORED, Occupancy
from picture3d.structures.voxels import VoxelGrid
from picture3d.tasks.occupancy import OccupancyNet, OccupancyTask, OccupancyTaskConfig

# 32 x 32 x 8 labelled cells of 0.5 m, 16 x 16 x 4 classified ones, 32 x 32 columns of the encoder.
GRID = VoxelGrid((-8.0, -8.0, -1.0), (8.0, 8.0, 3.0), (0.5, 0.5, 0.5))
BACKBONE = DsvtConfig(
    channels=16, ffn_channels=32, heads=2, blocks=(1, 1), set_sizes=(8, 8), windows=((4, 4, 8), (4, 4, 1)),
    shifts=((0, 0, 0), (2, 2, 0)), strides=((1, 1, 8),),
)  # fmt: skip
CONFIG = OccupancyTaskConfig(
    num_classes=4, cells=(32, 32, 8), origin=(-8.0, -8.0, -1.0), cell_m=0.5, cell_ratio=2, blocks=(0, 1), stem=(),
    strides=(2, 2), channels=(12, 20), volume_channels=6, head_channels=8,
)  # fmt: skip


def task_of(config: OccupancyTaskConfig = CONFIG, seed: int = 0) -> OccupancyTask:
    torch.manual_seed(seed)
    return OccupancyTask(OccupancyNet(GRID, 1, BACKBONE, config=config), config)


def batch_of(points: int = 600, batch_size: int = 2, seed: int = 0, config: OccupancyTaskConfig = CONFIG) -> PointBatch:
    """Every point's cell is occupied, by a class that its height tells; some are noise."""
    g = torch.Generator().manual_seed(seed)
    xyz = torch.rand(points, 3, generator=g) * torch.tensor([15.9, 15.9, 3.9]) - torch.tensor([7.95, 7.95, 0.95])
    sample = torch.randint(0, max(1, batch_size), (points,), generator=g).sort().values
    place = ((xyz - torch.tensor(config.origin)) / config.cell_m).floor().int()
    cells = torch.unique(torch.cat([sample[:, None].int(), place], 1), dim=0)
    label = (1 + cells[:, 3] // 3).clamp(max=3).to(torch.uint8)
    label[::17] = IGNORED
    names = tuple(f"a/{i}" for i in range(batch_size))
    bare = PointBatch(xyz, torch.rand(points, 1, generator=g), sample, batch_size, names)
    return replace(bare, occupancy_cell=cells, occupancy_class=label, occupancy_grid=config.grid)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_the_losses_are_those_of_the_coarse_cells_that_are_not_ignored():
    task, batch = task_of(), batch_of()
    found = task.loss(batch, generator())
    assert batch.occupancy_cell is not None
    assert batch.occupancy_class is not None
    wanted = coarse_labels(batch.occupancy_cell, batch.occupancy_class, 2, (16, 16, 4), 2)
    logits = task.module(batch)
    assert logits.shape == (2, 4, 16, 16, 4)
    rows, labels = [], []
    for index in (wanted != IGNORED).nonzero().tolist():
        b, x, y, z = index
        rows.append(logits[b, :, x, y, z])
        labels.append(int(wanted[b, x, y, z]))
    rows, labels = torch.stack(rows), torch.tensor(labels)
    expected = {
        "cross_entropy": F.cross_entropy(rows, labels),
        "semantic": semantic_affinity(rows, labels),
        "geometric": geometric_affinity(rows, labels),
        "lovasz": lovasz_softmax(rows, labels, ignored=None),
    }
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["total"], torch.stack(list(expected.values())).sum(), rtol=1e-4, atol=1e-5)
    found["total"].backward()
    assert [name for name, parameter in task.module.named_parameters() if parameter.grad is None] == []


def test_a_weight_of_zero_leaves_a_loss_out_and_class_weights_count():
    weights = {"semantic_weight": 0.0, "geometric_weight": 0.0, "lovasz_weight": 0.0, "class_weights": (0.0, 1.0, 0.0, 0.0)}
    config = CONFIG.model_copy(update=weights)
    found = task_of(config).loss(batch_of(), generator())
    assert set(found) == {"total", "cross_entropy", "accuracy"}
    assert found["cross_entropy"] != task_of().loss(batch_of(), generator())["cross_entropy"]


def test_it_learns_a_scene_by_heart():
    config = CONFIG.model_copy(update={"cell_ratio": 1, "strides": (1, 2), "volume_channels": 16})
    task, batch = task_of(config), batch_of(300, 1, config=config)
    optimizer = torch.optim.AdamW(task.module.parameters(), lr=1e-2)
    first = last = 0.0
    for step in range(60):
        terms = task.loss(batch, generator())
        optimizer.zero_grad()
        terms["total"].backward()
        optimizer.step()
        last = terms["total"].item()
        first = last if step == 0 else first
    assert last < 0.4 * first
    assert batch.occupancy_cell is not None
    assert batch.occupancy_class is not None
    index = batch.occupancy_cell[:, 1:].numpy().astype(np.int16)
    truth = Occupancy(index, batch.occupancy_class.numpy(), config.grid)
    found = task.predict(batch)[0]
    both = np.intersect1d(truth.keys, found.keys)
    assert len(both) / len(np.union1d(truth.keys, found.keys)) > 0.7


def test_moving_every_point_by_a_classified_cell_moves_the_height_detail_by_one():
    net, batch = task_of().module, batch_of(50, 1)
    voxels = net.vfe(batch).voxels
    before = net._by_height(voxels)
    moved = replace(voxels, coords=voxels.coords + torch.tensor([0, 2, 0, 2], dtype=torch.int32))
    inside = (moved.coords[:, 1] < 32) & (moved.coords[:, 3] < 8)
    after = net._by_height(replace(moved, coords=moved.coords[inside], feats=moved.feats[inside]))
    torch.testing.assert_close(after[:, :, 1:, :, 1:], before[:, :, :-1, :, :-1])
    assert before.abs().sum() > 0


def test_what_stands_at_a_place_is_told_of_that_place_by_the_map():
    """A second point far off, at large x and small y, changes the volumes there."""
    net = task_of().module.eval()
    torch.nn.init.zeros_(net.from_voxels.weight)  # the map alone
    seen: list[list[Tensor]] = []
    net.dense_head.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    xyz = torch.tensor([[-7.8, 7.8, 0.1], [7.8, -7.8, 0.1]])
    with torch.no_grad():
        for count in (1, 2):
            net(PointBatch(xyz[:count], torch.full((count, 1), 0.5), torch.zeros(count, dtype=torch.int64), 1, ("a",)))
    for (before, after), side in zip(zip(*seen, strict=True), (16, 8), strict=True):
        _, x, y, _ = ((after - before).abs().amax(1) > 1e-6).nonzero().unbind(1)
        assert len(x) > 0
        assert x.double().mean() > side / 2 > y.double().mean()
        assert side < 16 or int(x.min()) >= 8 > int(y.max())  # coarser levels look further


def test_a_cell_gets_the_mean_of_its_voxels():
    net, batch = task_of().module, batch_of(200, 2)
    voxels = net.vfe(batch).voxels
    found = net._by_height(voxels)
    row = voxels.coords[7].tolist()
    mates = [
        i
        for i, c in enumerate(voxels.coords.tolist())
        if c[0] == row[0] and [v // 2 for v in c[1:]] == [v // 2 for v in row[1:]]
    ]
    expected = net.from_voxels(voxels.feats[mates].mean(0))
    torch.testing.assert_close(found[row[0], :, row[1] // 2, row[2] // 2, row[3] // 2], expected)


@pytest.mark.parametrize("points", [0, 1])
def test_few_or_no_points_give_an_answer_and_a_finite_loss(points: int):
    task, batch = task_of(), batch_of(points, 1)
    found = task.loss(batch, generator())
    found["total"].backward()
    assert all(bool(value.isfinite()) for value in found.values())
    gradients = [p.grad for p in task.module.parameters() if p.grad is not None]
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    assert len(task.predict(batch)) == 1


def test_no_frame_has_no_answer():
    batch = batch_of(40, 1).without_frames()
    task = task_of()
    assert task.predict(batch) == []
    assert float(task.loss(batch, generator())["total"].detach()) == 0


def test_everything_ignored_costs_nothing():
    batch = batch_of(100, 1)
    cells = torch.cartesian_prod(torch.arange(1), torch.arange(32), torch.arange(32), torch.arange(8)).int()
    batch = replace(batch, occupancy_cell=cells, occupancy_class=torch.full((len(cells),), IGNORED, dtype=torch.uint8))
    found = task_of().loss(batch, generator())
    assert float(found["total"].detach()) == 0


def test_predictions_are_the_interpolated_logits_largest_class_and_the_mode_is_kept():
    task, batch = task_of(), batch_of()
    task.module.train()
    found = task.predict(batch)
    assert task.module.training
    task.module.eval()
    with torch.no_grad():
        logits: Tensor = F.interpolate(task.module(batch), scale_factor=2.0, mode="trilinear", align_corners=False)
    assert len(found) == 2
    for index, occupancy in enumerate(found):
        assert occupancy.grid == CONFIG.grid
        np.testing.assert_array_equal(occupancy.dense(), logits[index].argmax(0).numpy())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"occupancy_cell": None}, "a/0, a/1: no occupancy labels"),
        ({"occupancy_grid": OccupancyTaskConfig().grid}, r"set task\.cells|Set task\.cells"),
        ({"occupancy_class": 9}, "label 9 is not among the 4 classes"),
    ],
)
def test_labels_that_do_not_fit_are_refused_by_name(changes: dict[str, Any], words: str):
    batch = batch_of()
    assert batch.occupancy_class is not None
    if "occupancy_class" in changes:
        changes = {"occupancy_class": torch.full_like(batch.occupancy_class, 9)}
    with pytest.raises(DataError, match=words):
        task_of().loss(replace(batch, **changes), generator())


@pytest.mark.parametrize(
    ("grid", "changes", "words"),
    [
        (VoxelGrid((-8.0, -4.0, -1.0), (8.0, 4.0, 3.0), (0.5, 0.5, 0.5)), {}, r"from -4 to 4 m along y"),
        (GRID, {"strides": (1, 2)}, r"ends with 32 columns along x, and 16 cells are classified"),
        (CylinderGrid((0.0, -3.0, -1.0), (8.0, 3.0, 2.5), (0.5, 0.5, 0.5)), {}, r"grid\.cylinder"),
    ],
)
def test_grids_that_do_not_fit_are_refused_in_words(grid: VoxelGrid, changes: dict[str, Any], words: str):
    with pytest.raises(ConfigError, match=words):
        OccupancyNet(grid, 1, BACKBONE, config=CONFIG.model_copy(update=changes))


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"cell_ratio": 3}, "cannot be grouped by cell_ratio 3"),
        ({"blocks": [1]}, "one entry for each level"),
        ({"strides": [0, 2, 2, 2]}, "1 or more"),
        ({"class_weights": [1.0]}, "needs 17 entries"),
        ({f"{name}_weight": 0 for name in ("cross_entropy", "semantic", "geometric", "lovasz")}, "all loss weights are 0"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_words(tree: dict[str, Any], words: str):
    with pytest.raises(ConfigError, match=words):
        OccupancyTaskConfig.from_tree(tree)
