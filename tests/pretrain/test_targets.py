from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from picture3d.errors import ConfigError
from picture3d.ops.voxelize import assign_voxels
from picture3d.pretrain.masking import MaskConfig
from picture3d.pretrain.targets import majority_superclass, voxel_targets
from picture3d.structures.batch import PointBatch
from picture3d.structures.voxels import VoxelGrid

GRID = VoxelGrid((0.0, 0.0, 0.0), (3.0, 3.0, 3.0), (1.0, 1.0, 1.0))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_batch(points: int = 400, cells: int = 60, seed: int = 0, classes: int = 8) -> PointBatch:
    g = generator(seed)
    return PointBatch(
        xyz=3.6 * torch.rand(points, 3, generator=g) - 0.3,
        features=torch.rand(points, 1, generator=g),
        sample=torch.randint(0, 3, (points,), generator=g).sort().values,
        batch_size=4,
        frame_names=("a/0", "a/1", "a/2", "a/3"),
        cell_features=torch.randn(cells, 16, generator=g).half(),
        cell_superclass=torch.randint(0, classes, (cells,), generator=g),
        point_cell=torch.randint(-1, cells, (points,), generator=g) * (torch.rand(points, generator=g) < 0.2) - 0,
    )


def with_many_missing(batch: PointBatch, seed: int = 3) -> PointBatch:
    missing = torch.rand(len(batch.xyz), generator=generator(seed)) < 0.9
    assert batch.point_cell is not None
    return PointBatch(
        batch.xyz, batch.features, batch.sample, batch.batch_size, batch.frame_names, None,
        batch.cell_features, batch.cell_superclass, torch.where(missing, -1, batch.point_cell),
    )  # fmt: skip


def test_features_and_superclasses_equal_plain_loops():
    batch = with_many_missing(random_batch())
    assert batch.cell_features is not None
    assert batch.cell_superclass is not None
    assert batch.point_cell is not None
    assignment = assign_voxels(batch.xyz, batch.sample, batch.batch_size, GRID)
    found = voxel_targets(batch, assignment, MaskConfig(), generator())
    assert found.features is not None
    for voxel in range(assignment.num_voxels):
        points = assignment.point_index[assignment.voxel_of_point == voxel]
        cells = [c for c in batch.point_cell[points].tolist() if c >= 0]
        assert bool(found.has_features[voxel]) == bool(cells)
        if not cells:
            assert found.superclass[voxel] == -1
            assert found.features[voxel].abs().max() == 0
            continue
        mean = np.mean([batch.cell_features[c].double().numpy() for c in cells], axis=0)
        np.testing.assert_allclose(found.features[voxel], mean, atol=1e-5)
        votes = Counter(int(batch.cell_superclass[c]) for c in cells)
        assert found.superclass[voxel] == min(votes, key=lambda k: (-votes[k], k))


def test_the_smallest_superclass_wins_a_tie():
    found = majority_superclass(torch.tensor([5, 2, 2, 5, 7]), torch.tensor([0, 0, 0, 0, 1]), 3, 8)
    assert found.tolist() == [2, 7, 0]


def test_without_a_teacher_every_voxel_may_be_hidden():
    batch = random_batch()
    bare = PointBatch(batch.xyz, batch.features, batch.sample, batch.batch_size, batch.frame_names)
    assignment = assign_voxels(batch.xyz, batch.sample, batch.batch_size, GRID)
    found = voxel_targets(bare, assignment, MaskConfig(kind="random"), generator())
    assert found.features is None
    assert not found.has_features.any()
    assert (found.superclass == 0).all()


def test_clustering_in_the_step_ignores_the_stored_superclasses():
    batch = with_many_missing(random_batch())
    assert batch.cell_superclass is not None
    batch.cell_superclass.fill_(99)
    assignment = assign_voxels(batch.xyz, batch.sample, batch.batch_size, GRID)
    found = voxel_targets(batch, assignment, MaskConfig(superclasses="kmeans"), generator())
    assert torch.equal(found.superclass >= 0, found.has_features)
    assert found.superclass.max() < 8
    again = voxel_targets(batch, assignment, MaskConfig(superclasses="kmeans"), generator())
    assert torch.equal(found.superclass, again.superclass)


def test_superclasses_that_the_mask_does_not_know_are_refused():
    batch = random_batch(classes=8)
    assignment = assign_voxels(batch.xyz, batch.sample, batch.batch_size, GRID)
    with pytest.raises(ConfigError, match="num_clusters=5"):
        voxel_targets(batch, assignment, MaskConfig(num_clusters=5, group_sizes=(2, 2, 1)), generator())


def test_a_teacher_without_superclasses_needs_clustering():
    batch = random_batch()
    bare = PointBatch(
        batch.xyz, batch.features, batch.sample, 4, batch.frame_names, None, batch.cell_features, None, batch.point_cell
    )
    assignment = assign_voxels(batch.xyz, batch.sample, 4, GRID)
    with pytest.raises(ConfigError, match="kmeans"):
        voxel_targets(bare, assignment, MaskConfig(), generator())


def test_an_empty_cloud_has_no_targets():
    empty = PointBatch(
        torch.zeros(0, 3), torch.zeros(0, 1), torch.zeros(0, dtype=torch.int64), 2, ("a/0", "a/1"), None,
        torch.zeros(0, 16), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64),
    )  # fmt: skip
    assignment = assign_voxels(empty.xyz, empty.sample, 2, GRID)
    for superclasses in ("stored", "kmeans"):
        found = voxel_targets(empty, assignment, MaskConfig.from_tree({"superclasses": superclasses}), generator())
        assert found.features is not None
        assert found.features.shape == (0, 16)
