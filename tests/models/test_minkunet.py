"""The whole Res16UNet34C, its keys and its numbers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from picture3d.models.minkunet import MinkUNet, build_pyramid
from picture3d.models.sparse_layers import ResidualBlock, SparseNorm
from picture3d.ops.kernel_map import submanifold_map
from tests.minkowski_weights import minkowski_state
from tests.sample_data import golden_files


def test_the_default_network_has_the_published_tensors():
    network = MinkUNet()
    state = network.state_dict()
    assert len(state) == 374
    assert sum(p.numel() for p in network.parameters()) == 37_849_184
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    assert shapes["conv0p1s1.kernel"] == (27, 1, 32)
    assert shapes["block5.0.downsample.0.kernel"] == (384, 256)
    assert shapes["convtr7p2s2.kernel"] == (8, 96, 96)
    assert shapes["final.kernel"] == (96, 64)
    assert shapes["final.bias"] == (1, 64)


@pytest.mark.parametrize("path", golden_files("minkowski", "full_scene"))
def test_golden_whole_network_equals_minkowski(path):
    data = np.load(path)
    manifest = json.loads(str(data["manifest"]))
    network = MinkUNet()
    network.load_state_dict(minkowski_state(network, int(data["weight_seed"])))
    network.eval()
    coords = torch.from_numpy(data["coords"].astype(np.int32))
    taps: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        pyramid = build_pyramid(coords)
        out = network.on_pyramid(pyramid, torch.from_numpy(data["feats"]), taps)
    torch.testing.assert_close(out, torch.from_numpy(data["out"]), atol=1e-5, rtol=1e-5)
    level_of = {"out_p1": 0, "final": 0, **{f"block{i}": i for i in range(1, 5)}, **{f"block{i}": 8 - i for i in range(5, 9)}}
    for stage, values in taps.items():
        rows = {tuple(c): i for i, c in enumerate(pyramid.coords[level_of[stage]].tolist())}
        wanted = [rows[tuple(c)] for c in data[f"stage_{stage}__coords"].astype(int).tolist()]
        expected = torch.from_numpy(data[f"stage_{stage}__feats"])
        torch.testing.assert_close(values[wanted], expected, atol=1e-5, rtol=1e-4, msg=lambda m, s=stage: f"{s}: {m}")
    assert manifest  # describes the file


@pytest.mark.parametrize("path", golden_files("minkowski", "single_layers"))
def test_golden_norm_and_residual_block_equal_minkowski(path):
    data = np.load(path)
    norm = SparseNorm(data["batch_norm_eval__weight"].shape[0])
    names = ("weight", "bias", "running_mean", "running_var")
    norm.load_state_dict(
        {
            **{f"bn.{n}": torch.from_numpy(data[f"batch_norm_eval__{n}"]) for n in names},
            "bn.num_batches_tracked": torch.tensor(1),
        }
    )
    norm.eval()
    found = norm(torch.from_numpy(data["batch_norm_eval__feats_in"]))
    torch.testing.assert_close(found, torch.from_numpy(data["batch_norm_eval__feats_out"]), atol=1e-4, rtol=1e-5)
    weights = {n.split("__w.")[1]: torch.from_numpy(data[n]) for n in data.files if n.startswith("residual_block__w.")}
    block = ResidualBlock(12, 8, momentum=0.05)
    block.load_state_dict(weights)
    block.eval()
    kmap = submanifold_map(torch.from_numpy(data["residual_block__coords_in"]))
    found = block(torch.from_numpy(data["residual_block__feats_in"]), kmap)
    torch.testing.assert_close(found, torch.from_numpy(data["residual_block__feats_out"]), atol=1e-5, rtol=1e-5)


def _small() -> MinkUNet:
    return MinkUNet(out_channels=8, stem=4, widths=(4,) * 8, blocks=(1,) * 8)


def test_a_cloud_without_points_and_one_with_a_single_voxel():
    network = _small()
    assert network(torch.zeros((0, 4), dtype=torch.int32), torch.zeros(0, 1)).shape == (0, 8)
    out = network(torch.tensor([[0, 1, 2, 3]]), torch.ones(1, 1))
    assert out.shape == (1, 8)
    assert torch.isfinite(out).all()


def test_samples_of_a_batch_do_not_see_each_other():
    network = _small().eval()
    coords = torch.randint(-20, 20, (200, 4), generator=torch.Generator().manual_seed(0))
    coords[:, 0] = 0
    coords = torch.unique(coords, dim=0)
    feats = torch.rand(len(coords), 1, generator=torch.Generator().manual_seed(1))
    other = coords.clone()
    other[:, 0] = 2  # sample 1 is empty
    alone = network(coords, feats)
    together = network(torch.cat([coords, other]), torch.cat([feats, feats]))
    torch.testing.assert_close(together[: len(coords)], alone, atol=1e-6, rtol=1e-5)


def test_output_rows_have_length_one_and_a_zero_row_stays_zero():
    network = _small().eval()
    coords = torch.unique(torch.randint(0, 9, (50, 4), generator=torch.Generator().manual_seed(0)), dim=0)
    out = network(coords, torch.rand(len(coords), 1))
    torch.testing.assert_close(out.norm(dim=1), torch.ones(len(coords)))
    with torch.no_grad():
        for parameter in network.final.parameters():
            parameter.zero_()
    assert torch.equal(network(coords, torch.rand(len(coords), 1)), torch.zeros(len(coords), 8))
