from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from picture3d.models.dsvt import Dsvt, DsvtConfig, DsvtOutput
from picture3d.models.mae_decoder import LightDecoder, VoxelDecoder, voxel_decoder_config
from picture3d.structures.voxels import SparseVoxels, voxel_keys
from tests.golden_weights import golden_weight_seed, openpcdet_input, openpcdet_state
from tests.sample_data import golden_dir, golden_files

SHAPE = (12, 10, 8)
SMALL = DsvtConfig(
    channels=16, ffn_channels=32, heads=2, blocks=(1, 1), set_sizes=(6, 6), windows=((4, 4, 8), (4, 4, 1)),
    shifts=((0, 0, 0), (2, 2, 0)), strides=((1, 1, 8),),
)  # fmt: skip


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_voxels(count: int, batch_size: int = 2, shape: tuple[int, int, int] = SHAPE, channels: int = 16) -> SparseVoxels:
    g = generator(count)
    cells = batch_size * shape[0] * shape[1] * shape[2]
    key = torch.randperm(cells, generator=g)[:count].sort().values
    z, key = key % shape[2], key // shape[2]
    y, key = key % shape[1], key // shape[1]
    coords = torch.stack([key // shape[0], key % shape[0], y, z], 1).int()
    return SparseVoxels(coords, torch.randn(count, channels, generator=g), shape, batch_size)


def decoded(decoder: VoxelDecoder | LightDecoder, voxels: SparseVoxels, hidden: Tensor, encoder: Dsvt | None = None) -> Tensor:
    encoder = encoder or small_encoder()
    return decoder(encoder(voxels.select(~hidden)), voxels.coords, hidden)


def small_encoder() -> Dsvt:
    torch.manual_seed(0)
    return Dsvt(SMALL, SHAPE).eval()


def small_decoder(kind: str) -> VoxelDecoder | LightDecoder:
    torch.manual_seed(1)
    decoder = VoxelDecoder(SMALL, SHAPE) if kind == "voxel" else light(16, SHAPE)
    torch.nn.init.normal_(decoder.mask_token, std=0.5)
    return decoder.eval()


def light(channels: int, shape: tuple[int, int, int]) -> LightDecoder:
    return LightDecoder(channels, shape, ffn_channels=32, heads=2, set_size=6, window=(4, 4), shift=(2, 2))


def test_voxel_decoder_predictions_differ_along_z_where_the_published_ones_cannot():
    voxels = random_voxels(500)
    hidden = torch.rand(500, generator=generator()) < 0.5
    column = voxel_keys(voxels.coords, SHAPE) // SHAPE[2]
    same_column = (column[:, None] == column[None]) & hidden[:, None] & hidden[None]
    above = same_column.triu(diagonal=1).nonzero()
    assert len(above) > 50
    for kind, differ in (("voxel", True), ("light", False)):
        out = decoded(small_decoder(kind), voxels, hidden)
        apart = (out[above[:, 0]] - out[above[:, 1]]).abs().amax(1)
        assert bool((apart > 1e-4).all()) == differ
        assert bool((apart == 0).all()) != differ


@pytest.mark.parametrize("kind", ["voxel", "light"])
@pytest.mark.parametrize("attention", ["bucketed", "padded"])
def test_features_of_some_voxels_are_those_of_all_voxels_there(kind: str, attention: str):
    voxels, config = random_voxels(300), SMALL.model_copy(update={"attention": attention})
    hidden = torch.rand(300, generator=generator()) < 0.5
    torch.manual_seed(1)
    decoder = (VoxelDecoder(config, SHAPE) if kind == "voxel" else light(16, SHAPE)).train()
    rows = hidden.nonzero().squeeze(1)
    latent = small_encoder()(voxels.select(~hidden))
    every, some = decoder(latent, voxels.coords, hidden)[rows], decoder(latent, voxels.coords, hidden, rows)
    torch.testing.assert_close(some, every)
    gradients = [
        torch.autograd.grad(out.square().sum(), list(decoder.parameters()), retain_graph=True) for out in (every, some)
    ]
    for (name, _), one, other in zip(decoder.named_parameters(), *gradients, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"gradient of {n}: {m}")


def test_hidden_voxels_differ_even_where_everything_is_hidden():
    column = torch.tensor([[0, 3, 3, z] for z in range(SHAPE[2])], dtype=torch.int32)
    voxels = SparseVoxels(column, torch.zeros(SHAPE[2], 16), SHAPE, 1)
    out = decoded(small_decoder("voxel"), voxels, torch.ones(SHAPE[2], dtype=torch.bool))
    assert torch.pdist(out).min() > 1e-3


@pytest.mark.parametrize("kind", ["voxel", "light"])
@pytest.mark.parametrize("hidden_of", ["all", "none", "half", "first sample"])
def test_any_share_can_be_hidden_and_gradients_are_finite(kind: str, hidden_of: str):
    voxels = random_voxels(120)
    hidden = {
        "all": torch.ones(120, dtype=torch.bool),
        "none": torch.zeros(120, dtype=torch.bool),
        "half": torch.arange(120) % 2 == 0,
        "first sample": voxels.coords[:, 0] == 0,
    }[hidden_of]
    decoder = small_decoder(kind).train()
    out = decoded(decoder, voxels, hidden)
    assert out.shape == (120, 16)
    out.square().sum().backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    if hidden_of != "none":
        assert decoder.mask_token.grad is not None


@pytest.mark.parametrize("kind", ["voxel", "light"])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_tiny_sweeps_are_decoded(kind: str, count: int):
    voxels = random_voxels(count, batch_size=3)
    for hidden in (torch.zeros(count, dtype=torch.bool), torch.ones(count, dtype=torch.bool), torch.arange(count) == 0):
        out = decoded(small_decoder(kind).train(), voxels, hidden)
        assert out.shape == (count, 16)
        assert out.isfinite().all()


@pytest.mark.parametrize("kind", ["voxel", "light"])
def test_samples_of_a_batch_do_not_see_each_other(kind: str):
    voxels = random_voxels(200)
    hidden = torch.rand(200, generator=generator(3)) < 0.6
    together = decoded(small_decoder(kind), voxels, hidden)
    for index in range(2):
        mine = voxels.coords[:, 0] == index
        alone = decoded(small_decoder(kind), voxels.select(mine), hidden[mine])
        torch.testing.assert_close(together[mine], alone, rtol=1e-5, atol=1e-5)


def test_the_content_of_hidden_voxels_never_reaches_the_decoder():
    voxels = random_voxels(100)
    hidden = torch.rand(100, generator=generator(3)) < 0.6
    changed = voxels.with_feats(torch.where(hidden[:, None], torch.nan, voxels.feats))
    torch.testing.assert_close(
        decoded(small_decoder("voxel"), voxels, hidden), decoded(small_decoder("voxel"), changed, hidden), rtol=0, atol=0
    )


def test_the_published_decoder_lets_a_mask_token_displace_the_visible_token_of_its_slot():
    coords = torch.tensor([[0, 3, 3, 0], [0, 3, 3, 5]], dtype=torch.int32)
    pillar = SparseVoxels(torch.tensor([[0, 3, 3, 0]], dtype=torch.int32), torch.randn(1, 16), (*SHAPE[:2], 1), 1)
    decoder = small_decoder("light")
    assert isinstance(decoder, LightDecoder)
    out = decoder.decode(pillar, coords, torch.tensor([True, False]))
    assert out.shape == (2, 16)
    assert torch.equal(out[0], out[1])


def test_the_decoder_takes_windows_and_sets_of_the_first_stage():
    config = voxel_decoder_config(DsvtConfig(), blocks=3)
    assert config.blocks == (3,)
    assert config.windows == ((12, 12, 32),)
    assert config.strides == ()
    VoxelDecoder(DsvtConfig(), (468, 468, 32))


def test_voxel_decoder_runs_in_bfloat16_autocast():
    voxels, decoder, encoder = random_voxels(60), small_decoder("voxel").train(), small_encoder().train()
    hidden = torch.arange(60) % 3 > 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = decoded(decoder, voxels, hidden, encoder)
    out.float().square().sum().backward()
    assert decoder.mask_token.grad is not None
    assert decoder.mask_token.grad.isfinite().all()


@pytest.mark.parametrize("path", golden_files("openpcdet", "light_decoder"))
def test_golden_light_decoder(path: Path):
    with np.load(path) as stored:
        golden = dict(stored)
    seed = golden_weight_seed(path.parent)
    decoder = LightDecoder(192, (468, 468, 32)).eval()
    decoder.load_state_dict(openpcdet_state(decoder, "backbone_2d.", seed))
    coords = torch.from_numpy(golden["voxel_coords"][:, [0, 3, 2, 1]])
    visible = torch.from_numpy(golden["visible_coords"][:, [0, 3, 2, 1]])
    feats = openpcdet_input("light_decoder/visible_features", (len(visible), 192), seed)
    pillars = SparseVoxels(visible, feats, (468, 468, 1), int(coords[:, 0].max()) + 1)
    with torch.no_grad():
        out = decoder.decode(pillars, coords, torch.from_numpy(golden["mask"]) > 0)
    rows = torch.from_numpy(golden["rows"]).long()
    np.testing.assert_allclose(out[rows], golden["per_voxel_features_rows"], rtol=1e-4, atol=1e-4)
    _, first = np.unique(voxel_keys(coords, (468, 468, 32)).numpy() // 32, return_index=True)
    tokens = out[torch.from_numpy(first)]
    np.testing.assert_allclose(
        tokens[torch.from_numpy(golden["token_out_rows_index"]).long()], golden["token_out_rows"], rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(tokens.abs().sum(), golden["bev_abs_sum"], rtol=1e-4)


@pytest.mark.parametrize(("name", "channels", "shape"), [("waymo", 192, (468, 468, 32)), ("nuscenes", 256, (512, 512, 40))])
def test_golden_light_decoder_keys_and_shapes(name: str, channels: int, shape: tuple[int, int, int]):
    path = golden_dir() / "openpcdet" / "keys" / f"pretrain_{name}_decoder_repaired.json"
    if not path.exists():
        pytest.skip(f"{path.name} is absent (looked in {path.parent})")
    expected = json.loads(path.read_text())["state_dict"]
    found = {f"backbone_2d.{key}": list(value.shape) for key, value in LightDecoder(channels, shape).state_dict().items()}
    assert found == {key: value for key, value in expected.items() if key.startswith("backbone_2d.")}


def test_a_stub_output_is_enough_for_the_voxel_decoder():
    visible = random_voxels(3, 1)
    latent = DsvtOutput((visible, SparseVoxels(visible.coords[:1], visible.feats[:1], SHAPE, 1)), torch.tensor([0, 0, 0]))
    assert small_decoder("voxel")(latent, visible.coords, torch.zeros(3, dtype=torch.bool)).shape == (3, 16)
