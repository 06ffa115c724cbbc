from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from picture3d.models.bev_backbone import BevBackbone, BevBackboneConfig, nuscenes_bev, scatter_to_bev
from picture3d.structures.voxels import SparseVoxels
from tests.golden_weights import golden_weight_seed, openpcdet_state
from tests.sample_data import golden_dir, golden_files

PUBLISHED = {"waymo": (192, BevBackboneConfig()), "nuscenes": (256, nuscenes_bev())}


@pytest.mark.parametrize("path", golden_files("openpcdet", "bev_res_backbone"))
def test_golden_maps(path):
    golden = np.load(path)
    channels, config = PUBLISHED[path.stem.rsplit("_", 1)[-1]]
    network = BevBackbone(channels, config).eval()
    network.load_state_dict(openpcdet_state(network, "backbone_2d.", golden_weight_seed(path.parent)))
    with torch.inference_mode():
        found = network(torch.from_numpy(golden["spatial_features"]).float())
    assert found.shape[1] == config.out_channels
    assert found.shape[2] * config.out_stride == golden["spatial_features"].shape[2]
    torch.testing.assert_close(found, torch.from_numpy(golden["spatial_features_2d"]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", PUBLISHED)
def test_golden_keys(name):
    path = golden_dir() / "openpcdet" / "keys" / f"detect_{name}.json"
    if not path.exists():
        pytest.skip(f"key list {path.name} is absent")
    listed = json.loads(path.read_text())["state_dict"]
    channels, config = PUBLISHED[name]
    found = {f"backbone_2d.{key}": list(value.shape) for key, value in BevBackbone(channels, config).state_dict().items()}
    assert found == {key: shape for key, shape in listed.items() if key.startswith("backbone_2d.")}


@pytest.mark.parametrize("path", golden_files("openpcdet", "pillar_scatter3d"))
def test_golden_scatter(path):
    golden = np.load(path)
    batch, z, y, x = golden["voxel_coords"].T
    _, channels, y_cells, x_cells = golden["spatial_features"].shape
    feats = torch.from_numpy(golden["pillar_features"])
    coords = torch.from_numpy(np.stack([batch, x, y, z], 1))
    voxels = SparseVoxels(coords, feats, (x_cells, y_cells, channels // feats.shape[1]), len(golden["spatial_features"]))
    assert torch.equal(scatter_to_bev(voxels), torch.from_numpy(golden["spatial_features"]))


def test_what_is_scattered_is_found_again_and_carries_gradients():
    coords = torch.tensor([[0, 2, 1, 0], [1, 0, 3, 0]], dtype=torch.int32)
    feats = torch.randn(2, 5, requires_grad=True)
    dense = scatter_to_bev(SparseVoxels(coords, feats, (3, 4, 1), 2))
    assert dense.shape == (2, 5, 4, 3)
    assert torch.equal(dense[0, :, 1, 2], feats[0])
    assert torch.equal(dense[1, :, 3, 0], feats[1])
    assert int((dense != 0).sum()) == 10
    (dense * 2).sum().backward()
    assert torch.equal(feats.grad, torch.full_like(feats, 2.0))  # type: ignore[arg-type]


def test_an_empty_batch_gives_maps_of_zeros():
    empty = SparseVoxels(torch.zeros(0, 4, dtype=torch.int32), torch.zeros(0, 5), (3, 4, 2), 2)
    assert torch.equal(scatter_to_bev(empty), torch.zeros(2, 10, 4, 3))


def test_levels_that_cannot_be_joined_are_refused_in_words():
    with pytest.raises(ValidationError, match="upsample_strides needs 2 entries"):
        BevBackboneConfig(blocks=(1, 1), strides=(1, 2), channels=(8, 8), upsample_strides=(1,), upsample_channels=(8, 8))
    with pytest.raises(ValidationError, match="different resolutions"):
        BevBackboneConfig(upsample_strides=(1, 2, 2))
    with pytest.raises(ValidationError, match="neither a whole number"):
        BevBackboneConfig(upsample_strides=(0.3, 2, 4))
    with pytest.raises(ValueError, match="multiples of 4"):
        BevBackbone(4, BevBackboneConfig())(torch.zeros(1, 4, 6, 8))
