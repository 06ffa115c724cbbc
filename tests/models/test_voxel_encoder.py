from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from picture3d.errors import ConfigError
from picture3d.models.voxel_encoder import VoxelEncoder
from picture3d.structures.batch import PointBatch
from picture3d.structures.voxels import VoxelGrid
from tests.golden_weights import golden_weight_seed, openpcdet_state
from tests.sample_data import golden_files

WAYMO = VoxelGrid((-74.88, -74.88, -2.0), (74.88, 74.88, 4.0), (0.32, 0.32, 0.1875))
NUSCENES = VoxelGrid((-51.2, -51.2, -5.0), (51.2, 51.2, 3.0), (0.2, 0.2, 0.2))
NUSCENES_PILLARS = VoxelGrid((-54.0, -54.0, -5.0), (54.0, 54.0, 3.0), (0.3, 0.3, 8.0))
TINY = VoxelGrid((0.0, 0.0, 0.0), (4.0, 4.0, 2.0), (0.5, 0.5, 0.5))
ENCODERS = {
    "vfe_pillar_nuscenes": (256, NUSCENES_PILLARS, True),
    "vfe_voxel_waymo": (192, WAYMO, False),
    "vfe_voxel_nuscenes": (256, NUSCENES, False),
}


def point_batch(rows: torch.Tensor, batch_size: int | None = None) -> PointBatch:
    """From rows (batch, x, y, z, features...)."""
    sample = rows[:, 0].to(torch.int64)
    size = int(sample.max()) + 1 if batch_size is None else batch_size
    return PointBatch(rows[:, 1:4], rows[:, 4:], sample, size, tuple(f"log/{i}" for i in range(size)))


def random_batch(count: int, batch_size: int = 2, seed: int = 0) -> PointBatch:
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randint(0, batch_size, (count, 1), generator=generator).sort(0).values.float()
    rows = torch.cat(
        [sample, torch.rand(count, 3, generator=generator) * 4.4 - 0.2, torch.rand(count, 2, generator=generator)], 1
    )
    return point_batch(rows, batch_size)


@pytest.mark.parametrize("path", [case for kind in ENCODERS for case in golden_files("openpcdet", kind)])
def test_golden_point_encoders(path: Path):
    golden = np.load(path)
    channels, grid, pillars = next(setting for kind, setting in ENCODERS.items() if path.stem.startswith(kind))
    encoder = VoxelEncoder(2, channels, grid, pillars)
    encoder.load_state_dict(openpcdet_state(encoder, "vfe.", golden_weight_seed(path.parent)))
    batch = point_batch(torch.from_numpy(golden["points"]))
    rows = torch.from_numpy(golden["rows"]).long()
    for array, training in (("voxel_features", False), ("voxel_features_train_mode", True)):
        encoded = encoder.train(training)(batch)
        coords = encoded.voxels.coords[:, [0, 3, 2, 1]]
        assert np.array_equal(coords.numpy(), golden["voxel_coords"]), f"{path.stem}: coordinates"
        expected = torch.from_numpy(golden[array])
        torch.testing.assert_close(
            encoded.voxels.feats[rows], expected, rtol=1e-4, atol=1e-4, msg=lambda m, name=array: f"{name}: {m}"
        )
        if "points_kept" in golden:
            kept = encoded.assignment
            assert np.array_equal(kept.voxel_of_point.numpy(), golden["point_inverse_indices"])
            assert np.array_equal(golden["points"][kept.point_index.numpy()], golden["points_kept"])


def test_point_inputs_are_what_a_person_computes():
    # One voxel, cell (2, 0, 1): centre 1.25, 0.25, 0.75; mean of the two points 1.2, 0.2, 0.6.
    batch = point_batch(torch.tensor([[0, 1.1, 0.1, 0.5, 7.0, 8.0], [0, 1.3, 0.3, 0.7, 9.0, 10.0]]))
    encoder = VoxelEncoder(2, 4, TINY)
    inputs = encoder.point_inputs(batch, encoder(batch).assignment)
    expected = torch.tensor(
        [[1.1, 0.1, 0.5, 7, 8, -0.1, -0.1, -0.1, -0.15, -0.15, -0.25], [1.3, 0.3, 0.7, 9, 10, 0.1, 0.1, 0.1, 0.05, 0.05, -0.05]]
    )
    torch.testing.assert_close(inputs, expected)


def test_unit_inputs_are_the_same_network_with_another_first_layer():
    batch = point_batch(
        torch.tensor([[0, 1.1, 0.1, 0.5, 7.0, 8.0], [0, 1.3, 0.3, 0.7, 9.0, 10.0], [0, 0.2, 0.9, 0.1, 1.0, 2.0]])
    )
    torch.manual_seed(0)
    metres, unit = VoxelEncoder(2, 16, TINY).eval(), VoxelEncoder(2, 16, TINY, unit_inputs=True).eval()
    assert list(metres.state_dict()) == list(unit.state_dict())
    unit.load_state_dict(metres.state_dict())
    x, y, z = TINY.voxel_size
    # Weights of a column in other units are those in metres times the unit.
    units = torch.tensor([10, 10, 1, 1, 1, x / 2, y / 2, z / 2, x / 2, y / 2, z / 2])
    with torch.no_grad():
        assert not torch.allclose(unit(batch).voxels.feats, metres(batch).voxels.feats)
        next(unit.parameters()).mul_(units)
    torch.testing.assert_close(unit(batch).voxels.feats, metres(batch).voxels.feats)


@pytest.mark.parametrize("pillars", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_no_points_give_no_voxels_and_leave_the_statistics_alone(pillars: bool, training: bool):
    encoder = VoxelEncoder(2, 8, TINY, pillars).train(training)
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    encoded = encoder(point_batch(torch.zeros(0, 6), batch_size=2))
    assert encoded.voxels.feats.shape == (0, 8)
    assert encoded.voxels.batch_size == 2
    encoded.voxels.feats.sum().backward()
    assert all(torch.equal(before[key], value) for key, value in encoder.state_dict().items())


def test_one_point_can_be_trained_on():
    encoder = VoxelEncoder(2, 8, TINY).train()
    encoded = encoder(point_batch(torch.tensor([[0, 1.1, 0.1, 0.5, 7.0, 8.0]])))
    assert torch.isfinite(encoded.voxels.feats).all()
    assert len(encoded.voxels) == 1


def test_the_order_of_points_does_not_matter():
    encoder = VoxelEncoder(2, 8, TINY).eval()
    batch = random_batch(200)
    shuffle = torch.randperm(200, generator=torch.Generator().manual_seed(3))
    mixed = PointBatch(batch.xyz[shuffle], batch.features[shuffle], batch.sample[shuffle], 2, batch.frame_names)
    one, other = encoder(batch).voxels, encoder(mixed).voxels
    assert torch.equal(one.coords, other.coords)
    torch.testing.assert_close(one.feats, other.feats, rtol=1e-5, atol=1e-5)


def test_voxel_features_are_the_maximum_of_the_point_features():
    encoded = VoxelEncoder(2, 8, TINY).eval()(random_batch(100))
    for voxel in range(len(encoded.voxels)):
        mine = encoded.assignment.voxel_of_point == voxel
        assert torch.equal(encoded.voxels.feats[voxel], encoded.point_features[mine].amax(0))


def test_too_few_point_features_are_refused_in_words():
    with pytest.raises(ConfigError, match="made for 2 point features, this batch has 1"):
        VoxelEncoder(2, 8, TINY)(point_batch(torch.zeros(3, 5)))
