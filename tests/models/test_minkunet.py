"""MinkUNet: its published tensors, and what it does at the edges. Its numbers: test_minkunet_golden.py."""

from __future__ import annotations

import torch

from picture3d.models.minkunet import MinkUNet, build_unet_maps


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


def _small() -> MinkUNet:
    return MinkUNet(out_channels=8, stem_width=4, widths=(4,) * 8, blocks=(1,) * 8)


def test_a_cloud_without_points_and_one_with_a_single_voxel():
    network = _small()
    assert network(torch.zeros(0, 1), build_unet_maps(torch.zeros((0, 4), dtype=torch.int32))).shape == (0, 8)
    out = network(torch.ones(1, 1), build_unet_maps(torch.tensor([[0, 1, 2, 3]])))
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
    alone = network(feats, build_unet_maps(coords))
    together = network(torch.cat([feats, feats]), build_unet_maps(torch.cat([coords, other])))
    torch.testing.assert_close(together[: len(coords)], alone, atol=1e-6, rtol=1e-5)


def test_output_rows_have_length_one_and_a_zero_row_stays_zero():
    network = _small().eval()
    coords = torch.unique(torch.randint(0, 9, (50, 4), generator=torch.Generator().manual_seed(0)), dim=0)
    with torch.no_grad():
        network.final.bias.fill_(0.1)  # type: ignore[union-attr]
    out = network(torch.rand(len(coords), 1), build_unet_maps(coords))
    torch.testing.assert_close(out.norm(dim=1), torch.ones(len(coords)))
    with torch.no_grad():
        for parameter in network.final.parameters():
            parameter.zero_()
    assert torch.equal(network(torch.rand(len(coords), 1), build_unet_maps(coords)), torch.zeros(len(coords), 8))
