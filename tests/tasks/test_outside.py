"""Points outside the grid, by hand and against the search over all pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from picture3d.ops.voxelize import assign_voxels
from picture3d.tasks import outside
from picture3d.tasks.outside import classes_of_points
from tests.tasks.small_scene import GRID, batch_of, no_points


def assigned(batch):
    return assign_voxels(batch.xyz, batch.sample, batch.batch_size, GRID)


def test_a_point_outside_takes_the_class_of_the_nearest_voxel_of_its_own_frame():
    first = torch.tensor([[7.5, 0.5, 0.5], [-7.5, 0.5, 0.5], [30.0, 0.0, 0.0], [-9.0, 0.0, 0.0]])
    second = torch.tensor([[0.5, 0.5, 0.5], [30.0, 0.0, 0.0]])
    batch = batch_of(first, second)
    assignment = assigned(batch)  # voxels in order: x = -7.5 and 7.5 of the first frame, then the second frame's
    answer = classes_of_points(batch, assignment, GRID, torch.tensor([2, 1, 3]), torch.tensor([5, 6, 7]))
    assert answer.tolist() == [2, 1, 6, 5, 3, 7]


def test_without_a_voxel_in_the_frame_or_a_finite_coordinate_there_is_no_answer():
    batch = batch_of(torch.tensor([[50.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 0.0], [float("nan"), 0.0, 0.0]]))
    answer = classes_of_points(batch, assigned(batch), GRID, torch.tensor([4]), torch.tensor([4]))
    assert answer.tolist() == [0, 4, 0]


def test_points_nobody_asks_about_are_not_answered():
    batch = batch_of(torch.tensor([[0.0, 0.0, 0.0], [50.0, 0.0, 0.0], [60.0, 0.0, 0.0]]))
    wanted = torch.tensor([False, True, False])
    answer = classes_of_points(batch, assigned(batch), GRID, torch.tensor([4]), torch.tensor([5]), wanted)
    assert answer.tolist() == [4, 5, 0]


def test_no_points_have_no_classes():
    batch = batch_of(no_points())
    empty = torch.zeros(0, dtype=torch.int64)
    assert len(classes_of_points(batch, assigned(batch), GRID, empty, empty)) == 0


@pytest.mark.parametrize("pairs", [1, 97, 4_000_000])
def test_the_search_in_chunks_equals_the_search_over_all_pairs(pairs: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(outside, "_PAIRS_PER_CHUNK", pairs)
    rng = np.random.default_rng(1)
    xyz = rng.uniform(-12, 12, (150, 3)).astype(np.float32)
    batch = batch_of(torch.from_numpy(xyz))
    assignment = assigned(batch)
    voxel_class = torch.arange(assignment.num_voxels) + 1
    answer = classes_of_points(batch, assignment, GRID, voxel_class[assignment.voxel_of_point], voxel_class).numpy()
    centres = assignment.coords[:, 1:].numpy() + 0.5 + np.array(GRID.range_min)
    inside = set(assignment.point_index.tolist())
    for row in range(len(xyz)):
        if row not in inside:
            assert answer[row] == 1 + np.argmin(((centres - xyz[row]) ** 2).sum(1))
