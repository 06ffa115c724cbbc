"""The cylinder grid and its point encoder against reference numbers, hand-computed cells, and a pre-training step."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from picture3d.errors import ConfigError
from picture3d.models.cylinder_encoder import CylinderEncoder, point_encoder
from picture3d.models.dsvt import Dsvt
from picture3d.models.dsvt_config import nuscenes_cylinder_128
from picture3d.models.voxel_encoder import VoxelEncoder
from picture3d.ops.cylinder import cylinder_cells, cylinder_centers_m, polar_of
from picture3d.ops.voxelize import assign_voxels
from picture3d.pretrain.losses import LossConfig
from picture3d.pretrain.mask_lab import voxel_places
from picture3d.pretrain.masking import MaskConfig
from picture3d.pretrain.picture import Picture, pretrain_step
from picture3d.recipes.catalogue import pretraining_recipe
from picture3d.structures.batch import PointBatch
from picture3d.structures.cylinder import CylinderGrid, cylinder_cell_size
from picture3d.structures.voxels import SparseVoxels, VoxelGrid
from tests.golden_weights import openpcdet_input, openpcdet_state
from tests.sample_data import golden_dir, golden_files

LOW, HIGH = (0.0, -math.pi, -4.0), (50.0, math.pi, 2.0)
PUBLISHED = CylinderGrid(LOW, HIGH, cylinder_cell_size(LOW, HIGH, (480, 360, 32)), clamp=True)
SMALL = CylinderGrid(LOW, HIGH, cylinder_cell_size(LOW, HIGH, (26, 37, 7)))


def batch_of(rows: torch.Tensor, batch_size: int = 1) -> PointBatch:
    """One sample per batch from (N, 4) x, y, z, intensity; all in sample 0."""
    sample = torch.zeros(len(rows), dtype=torch.int64)
    return PointBatch(rows[:, :3], rows[:, 3:], sample, batch_size, tuple(f"log/{i}" for i in range(batch_size)))


@pytest.mark.parametrize("path", golden_files("openpcdet", "seg_cylinder_parts"))
def test_golden_cells_inputs_and_features(path: Path):
    with np.load(path) as stored:
        golden = dict(stored)
    batch = batch_of(torch.from_numpy(golden["points"]))
    cells, inside = cylinder_cells(batch.xyz, PUBLISHED)
    assert inside.all()
    np.testing.assert_array_equal(cells.numpy(), golden["cell_index"])
    encoder = CylinderEncoder(1, 128, PUBLISHED).eval()
    encoder.load_state_dict(openpcdet_state(encoder, "vfe."))
    encoded = encoder(batch)
    np.testing.assert_array_equal(encoded.assignment.coords.numpy(), golden["voxel_index"])
    np.testing.assert_array_equal(encoded.assignment.voxel_of_point.numpy(), golden["point_to_voxel"])
    inputs = encoder.point_inputs(batch, encoded.assignment)
    np.testing.assert_allclose(inputs.numpy(), golden["point_features"], rtol=1e-5, atol=2e-5)
    feats = encoded.voxels.feats[torch.from_numpy(golden["rows"]).long()]
    np.testing.assert_allclose(feats.detach().numpy(), golden["voxel_features_rows"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", golden_files("openpcdet", "dsvt_cylinder"))
def test_golden_backbone_of_the_cylinder_grid(path: Path):
    with np.load(path) as stored:
        golden = dict(stored)
    b, z, y, x = torch.from_numpy(golden["voxel_coords_in"].astype(np.int32)).unbind(1)
    coords = torch.stack([b, x, y, z], 1)
    shape = (480, 360, 32)
    backbone = Dsvt(nuscenes_cylinder_128(), shape).eval()
    backbone.load_state_dict(openpcdet_state(backbone, "backbone_3d."))
    feats = openpcdet_input("dsvt_seg/features", (len(coords), 128))
    with torch.no_grad():
        output = backbone(SparseVoxels(coords, feats, shape, int(b.max()) + 1)).output
    np.testing.assert_array_equal(output.coords[:, [0, 3, 2, 1]].numpy(), golden["voxel_coords_out"])
    rows = torch.from_numpy(golden["rows"]).long()
    np.testing.assert_allclose(output.feats[rows].numpy(), golden["voxel_features_out"], rtol=1e-4, atol=1e-4)


def test_the_golden_recipe_has_every_published_tensor_but_the_output_width():
    path = golden_dir() / "openpcdet" / "keys" / "seg_nuscenes.json"
    if not path.exists():
        pytest.skip(f"openpcdet/keys/seg_nuscenes.json is absent under {golden_dir()}")
    listed = json.loads(path.read_text())["state_dict"]
    published = {key: tuple(shape) for key, shape in listed.items() if key.startswith(("vfe.", "backbone_3d."))}
    config = pretraining_recipe("nuscenes-cylinder-picture", Path("prepared"))
    assert config.grid.grid.shape == (480, 360, 32)
    vfe = point_encoder(config.in_features, config.encoder.channels, config.grid.grid)
    ours = {f"vfe.{k}": tuple(v.shape) for k, v in vfe.state_dict().items()}
    backbone = Dsvt(config.encoder, config.grid.grid.shape)
    ours |= {f"backbone_3d.{k}": tuple(v.shape) for k, v in backbone.state_dict().items()}
    assert ours.keys() == published.keys()
    # As published the encoder is 16 wide and the backbone behind it expects 128.
    assert {k for k in ours if ours[k] != published[k]} == {"vfe.compression_layers.0.weight", "vfe.compression_layers.0.bias"}


def test_cells_by_hand():
    grid = CylinderGrid((0.0, -math.pi, -1.0), (10.0, math.pi, 1.0), (1.0, math.pi / 2, 1.0))
    assert grid.shape == (11, 5, 3)
    inner = [[2.5, 0.1, -0.5], [0.0, 3.0, 0.5], [-4.0, -0.1, -1.0], [10.0, 0.0, 1.0]]
    xyz = torch.tensor([*inner, [11.0, 0.0, 0.0], [math.nan, 0.0, 0.0]])
    cells, inside = cylinder_cells(xyz, grid)
    assert cells[:4].tolist() == [[2, 2, 0], [3, 3, 1], [4, 0, 0], [10, 2, 2]]
    assert inside.tolist() == [True, True, True, True, False, False]
    kept = CylinderGrid(grid.range_min, grid.range_max, grid.voxel_size, clamp=True)
    cells, inside = cylinder_cells(xyz, kept)
    assert cells[4].tolist() == [10, 2, 1]
    assert inside.tolist() == [True, True, True, True, True, False]


def test_every_centre_lies_in_its_own_cell():
    shape = SMALL.shape
    axes = torch.meshgrid(*(torch.arange(n - 1) for n in shape), indexing="ij")
    cells = torch.stack([a.flatten() for a in axes], 1)
    centres = cylinder_centers_m(cells, SMALL)
    assert torch.equal(cylinder_cells(centres, SMALL)[0].long(), cells)
    coords = torch.cat([torch.zeros(len(cells), 1, dtype=torch.int64), cells], 1)
    places = voxel_places(coords, SMALL)
    torch.testing.assert_close(
        torch.stack([places.range_m, places.azimuth_rad], 1), polar_of(centres)[:, :2], atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("count", [0, 1])
def test_no_point_and_one_point_are_encoded(count: int):
    rows = torch.tensor([[3.0, 4.0, 0.5, 7.0]])[:count]
    encoded = CylinderEncoder(1, 16, SMALL).eval()(batch_of(rows, batch_size=2))
    assert encoded.voxels.feats.shape == (count, 16)
    assert encoded.point_features.shape == (count, 16)
    assert encoded.voxels.batch_size == 2


def test_the_features_before_the_maximum_give_the_features_after_it():
    torch.manual_seed(1)
    rows = torch.cat([torch.randn(400, 3) * torch.tensor([15.0, 15.0, 1.0]), torch.rand(400, 1)], 1)
    encoder = CylinderEncoder(1, 16, SMALL).eval()
    encoded = encoder(batch_of(rows))
    alone = encoded.assignment.voxel_of_point.bincount() == 1
    point_of_voxel = torch.zeros(encoded.assignment.num_voxels, dtype=torch.int64)
    point_of_voxel[encoded.assignment.voxel_of_point] = torch.arange(len(encoded.assignment.voxel_of_point))
    torch.testing.assert_close(encoded.voxels.feats[alone], encoded.point_features[point_of_voxel[alone]])


@pytest.mark.parametrize("kind", ["random", "block", "range_aware", "radial"])
def test_a_pre_training_step_on_cylinder_cells_has_finite_losses_and_gradients(kind: str):
    torch.manual_seed(0)
    config = nuscenes_cylinder_128().model_copy(
        update={
            "channels": 16, "ffn_channels": 16, "heads": 2, "blocks": (1, 1), "set_sizes": (12, 12),
            "windows": ((6, 6, 7), (6, 6, 1)), "shifts": ((0, 0, 0), (3, 3, 0)), "strides": ((1, 1, 7),),
        }
    )  # fmt: skip
    model = Picture(SMALL, 1, config, teacher_channels=None)
    rows = torch.cat([torch.randn(600, 3) * torch.tensor([15.0, 15.0, 1.0]), torch.rand(600, 1)], 1)
    loss = LossConfig(features_weight=0.0)
    mask = MaskConfig.from_tree({"kind": kind, "target_ratio": 0.6})
    step = pretrain_step(model, batch_of(rows), mask, loss, torch.Generator().manual_seed(0))
    assert int(step.hidden.sum()) == math.floor(0.6 * len(step.hidden) + 1e-6)
    step.losses["total"].backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
    assert step.target_points_m is not None
    # A cell is at most 2 m deep, 1 m high, and 2 * pi * 50 / 36 m wide: half its diagonal bounds the offset.
    assert step.target_points_m.norm(dim=-1).max() <= 0.5 * math.hypot(2.0, 1.0, 2 * math.pi * 52 / 36)


def test_grids_that_cannot_be_are_refused_in_words():
    with pytest.raises(ConfigError, match="not a whole number"):
        CylinderGrid(LOW, HIGH, (0.7, 0.1, 0.2))
    with pytest.raises(ConfigError, match="cannot be negative"):
        CylinderGrid((-1.0, -math.pi, -4.0), (49.0, math.pi, 2.0), SMALL.voxel_size)
    with pytest.raises(ConfigError, match="no pillars"):
        point_encoder(1, 16, SMALL, True)
    with pytest.raises(ConfigError, match="made for 2"):
        CylinderEncoder(2, 16, SMALL)(batch_of(torch.zeros(1, 4)))
    assert isinstance(point_encoder(1, 16, VoxelGrid((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.5, 0.5, 0.5))), VoxelEncoder)
    assert assign_voxels(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), 1, SMALL).num_voxels == 0
