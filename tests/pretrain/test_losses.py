from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from picture3d.ops.voxelize import assign_voxels
from picture3d.pretrain.losses import coordinates_loss, features_loss, target_points_m, voxel_centers_m
from picture3d.pretrain.masking import MaskConfig
from picture3d.pretrain.targets import voxel_targets
from picture3d.structures.batch import PointBatch
from picture3d.structures.voxels import VoxelGrid
from tests.golden_weights import golden_weight_seed, openpcdet_input, openpcdet_value
from tests.sample_data import golden_files

UNIT_GRID = VoxelGrid((0.0, 0.0, 0.0), (4.0, 4.0, 4.0), (1.0, 1.0, 1.0))
WAYMO_GRID = VoxelGrid((-74.88, -74.88, -2.0), (74.88, 74.88, 4.0), (0.32, 0.32, 0.1875))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def target_points_in_loops(xyz: np.ndarray, sample: np.ndarray, coords: np.ndarray, grid: VoxelGrid, count: int) -> np.ndarray:
    low, size = np.asarray(grid.range_min, np.float32), np.asarray(grid.voxel_size, np.float32)
    cell = np.floor((xyz - low) / size).astype(int)
    out = []
    for b, *xyz_index in coords.tolist():
        mine = [p for p, s, c in zip(xyz, sample, cell.tolist(), strict=True) if s == b and c == xyz_index][:count]
        centre = (np.asarray(xyz_index, np.float32) + np.float32(0.5)) * size + low
        out.append([mine[i % len(mine)] - centre for i in range(count)])
    return np.array(out, dtype=np.float32).reshape(-1, count, 3)


@pytest.mark.parametrize("count", [1, 3, 8])
def test_target_points_are_the_first_in_point_order_repeated_cyclically(count: int):
    xyz = 5 * torch.rand(300, 3, generator=generator()) - 0.5
    sample = torch.randint(0, 3, (300,), generator=generator(1)).sort().values
    assignment = assign_voxels(xyz, sample, 4, UNIT_GRID)
    rows = torch.tensor([0, 5, 9, assignment.num_voxels - 1])
    found = target_points_m(xyz, assignment, UNIT_GRID, rows, count)
    inside = assignment.point_index
    expected = target_points_in_loops(
        xyz[inside].numpy(), sample[inside].numpy(), assignment.coords[rows].numpy(), UNIT_GRID, count
    )
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


def test_target_points_lie_within_half_a_voxel_of_the_centre():
    xyz = 4 * torch.rand(200, 3, generator=generator())
    assignment = assign_voxels(xyz, torch.zeros(200, dtype=torch.int64), 1, UNIT_GRID)
    points = target_points_m(xyz, assignment, UNIT_GRID, torch.arange(assignment.num_voxels), 64)
    assert points.abs().max() <= 0.5 + 1e-5


def test_the_centre_of_the_first_cell_is_half_a_cell_from_the_corner():
    assert voxel_centers_m(torch.tensor([[0, 0, 0, 0]]), WAYMO_GRID)[0].tolist() == pytest.approx([-74.72, -74.72, -1.90625])


def test_no_hidden_voxels_give_zero_losses_that_keep_the_graph():
    points, features = torch.zeros(0, 16, 3, requires_grad=True), torch.zeros(0, 64, requires_grad=True)
    total = coordinates_loss(points, torch.zeros(0, 64, 3)) + features_loss(
        features, torch.zeros(0, 64), torch.zeros(0, dtype=torch.bool)
    )
    assert total.item() == 0
    total.backward()
    assert points.grad is not None
    assert features.grad is not None


def test_features_without_a_target_count_nothing_even_where_they_are_nan():
    predicted = torch.randn(5, 8, generator=generator(), requires_grad=True)
    target = torch.full((5, 8), torch.nan)
    target[2] = 0.3
    has_target = torch.arange(5) == 2
    loss = features_loss(predicted, target, has_target)
    difference = (predicted[2] - 0.3).abs()
    expected = torch.where(difference < 1, 0.5 * difference**2, difference - 0.5).mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert predicted.grad is not None
    assert predicted.grad.isfinite().all()
    assert predicted.grad[[0, 1, 3, 4]].abs().max() == 0


def test_features_that_all_lack_a_target_give_zero():
    loss = features_loss(torch.ones(3, 4, requires_grad=True), torch.zeros(3, 4), torch.zeros(3, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0


def load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as stored:
        return dict(stored)


def batch_of(points: np.ndarray) -> PointBatch:
    rows = torch.from_numpy(points)
    return PointBatch(rows[:, 1:4], rows[:, 4:], rows[:, 0].long(), int(points[:, 0].max()) + 1, ())


def reordered(coords_bzyx: np.ndarray) -> Tensor:
    return torch.from_numpy(coords_bzyx[:, [0, 3, 2, 1]])


@pytest.mark.parametrize("path", golden_files("openpcdet", "pretrain_waymo"))
def test_golden_target_points_predictions_and_losses(path: Path):
    golden, seed = load(path), golden_weight_seed(path.parent)
    batch = batch_of(golden["points"])
    assignment = assign_voxels(batch.xyz, batch.sample, batch.batch_size, WAYMO_GRID)
    assert torch.equal(assignment.coords, reordered(golden["voxel_coords"]))
    voxels, rows = assignment.num_voxels, torch.from_numpy(golden["rows"]).long()
    hidden = torch.from_numpy(golden["mask"]) > 0

    target = target_points_m(batch.xyz, assignment, WAYMO_GRID, torch.arange(voxels), 64)
    np.testing.assert_allclose(target[rows], golden["gt_points_normalised_rows"], rtol=1e-5, atol=1e-5)

    def linear(name: str, width: int) -> Tensor:
        weight = openpcdet_value(f"dense_head.{name}.weight", (width, 192), seed)
        return decoded @ weight.T + openpcdet_value(f"dense_head.{name}.bias", (width,), seed)

    decoded = openpcdet_input("pretrain/decoder_features", (voxels, 192), seed)
    predicted_points = linear("decoder_pred", 48).view(-1, 16, 3)
    np.testing.assert_allclose(predicted_points[rows], golden["pred_points_rows"], rtol=1e-4, atol=1e-4)
    points = coordinates_loss(predicted_points[hidden], target[hidden])
    np.testing.assert_allclose(points, golden["loss_points"], rtol=1e-5)

    features = voxel_features_of(golden, seed, assignment.coords)
    np.testing.assert_allclose(features[0][rows], golden["seal_target"], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(features[1], golden["has_seal_target"])
    seal = features_loss(linear("decoder_seal", 64)[hidden], features[0][hidden], features[1][hidden])
    np.testing.assert_allclose(seal, golden["loss_seal"], rtol=1e-5)
    alpha = torch.from_numpy(golden["alpha"])
    np.testing.assert_allclose(alpha * points + (1 - alpha) * seal, golden["total_per_alpha_beta1"], rtol=1e-5)


def voxel_features_of(golden: dict[str, np.ndarray], seed: int, coords: Tensor) -> tuple[Tensor, Tensor]:
    """Targets at `coords` from the golden file's own points, which carry one feature each."""
    xyz = torch.from_numpy(golden["seal_points"])
    count = len(xyz)
    cells = openpcdet_input("pretrain/seal_features", (count, 64), seed)
    cells = cells / cells.norm(dim=1, keepdim=True)
    zeros = torch.zeros(count, dtype=torch.int64)
    batch = PointBatch(xyz, torch.zeros(count, 0), zeros, 1, ("",), None, cells, zeros, torch.arange(count))
    assignment = assign_voxels(xyz, zeros, 1, WAYMO_GRID)
    targets = voxel_targets(batch, assignment, MaskConfig(), generator())
    assert targets.features is not None
    row_of = {tuple(c): i for i, c in enumerate(assignment.coords.tolist())}
    rows = torch.tensor([row_of.get(tuple(c), -1) for c in coords.tolist()])
    has = (rows >= 0) & targets.has_features[rows]
    return torch.where(has[:, None], targets.features[rows], 0.0), has
