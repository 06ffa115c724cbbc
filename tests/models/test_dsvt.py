from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from picture3d.errors import ConfigError
from picture3d.models import dsvt_config
from picture3d.models.dsvt import Dsvt, DsvtConfig, pool_coords
from picture3d.structures.voxels import SparseVoxels, voxel_keys
from tests.ops.test_sets import random_coords

GRID = (26, 19, 8)
SMALL = DsvtConfig(
    channels=16,
    ffn_channels=24,
    heads=4,
    blocks=(1, 2),
    set_sizes=(10, 7),
    windows=((6, 6, 8), (6, 6, 1)),
    shifts=((0, 0, 0), (3, 3, 0)),
    strides=((1, 1, 8),),
)
VARIANTS = {
    "published quirks": [],
    "corrected": ["posembed_quirk=false", "pooling_quirk=false"],
    "pooling along all axes": ["strides=[[2,3,8]]"],
    "checkpointed": ["activation_checkpointing=true"],
}


def random_voxels(count: int, batch_size: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32) -> SparseVoxels:
    coords = random_coords(count, GRID, batch_size, seed)
    feats = torch.randn(len(coords), 16, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return SparseVoxels(coords, feats, GRID, batch_size)


def seeded(config: DsvtConfig) -> Dsvt:
    torch.manual_seed(0)
    return Dsvt(config, GRID)


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("count", [1, 2, 300])
def test_bucketed_encoder_equals_padded_encoder_values_and_gradients(overrides: list[str], count: int):
    config = SMALL.with_overrides(overrides)
    encoders = {form: seeded(config.with_overrides([f"attention={form}"])).double() for form in ("padded", "bucketed")}
    voxels = random_voxels(count, dtype=torch.float64)
    results, gradients = {}, {}
    for form, encoder in encoders.items():
        feats = voxels.feats.clone().requires_grad_()
        results[form] = encoder.train()(voxels.with_feats(feats))
        results[form].output.feats.square().sum().backward()
        gradients[form] = {"input": feats.grad} | {name: p.grad for name, p in encoder.named_parameters()}
    for one, other in zip(results["padded"].stages, results["bucketed"].stages, strict=True):
        torch.testing.assert_close(one.feats, other.feats)
    for name, gradient in gradients["padded"].items():
        torch.testing.assert_close(gradients["bucketed"][name], gradient, msg=lambda m, n=name: f"gradient of {n}: {m}")


def test_every_parameter_takes_part_in_every_variant():
    for overrides in VARIANTS.values():
        encoder = seeded(SMALL.with_overrides(overrides))
        encoder(random_voxels(200)).output.feats.square().sum().backward()
        unused = [name for name, p in encoder.named_parameters() if p.grad is None]
        assert unused == []


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("attention", ["bucketed", "padded"])
def test_no_voxels_give_no_tokens(training: bool, attention: str):
    encoder = seeded(SMALL.with_overrides([f"attention={attention}"])).train(training)
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    result = encoder(random_voxels(0))
    assert [stage.feats.shape for stage in result.stages] == [(0, 16), (0, 16)]
    assert result.output.coords.shape == (0, 4)
    assert len(result.token_of_voxel) == 0
    result.output.feats.sum().backward()
    assert all(torch.equal(before[key], value) for key, value in encoder.state_dict().items())


def test_one_voxel_in_the_last_cell_can_be_trained_on():
    last = torch.tensor([[1, *(cells - 1 for cells in GRID)]], dtype=torch.int32)
    result = seeded(SMALL).train()(SparseVoxels(last, torch.randn(1, 16), GRID, 2))
    assert torch.isfinite(result.output.feats).all()
    assert result.output.coords.tolist() == [[1, 25, 18, 0]]
    assert result.token_of_voxel.tolist() == [0]


@pytest.mark.parametrize("empty", [0, 1, 2])
def test_an_empty_sample_changes_nothing_for_the_others(empty: int):
    """Batches of very different size, one sample without any voxel: first, in the middle or last."""
    encoder = seeded(SMALL).eval()
    samples = [random_voxels(count, 1, seed) for count, seed in ((3, 1), (250, 2))]
    slots = [batch for batch in range(3) if batch != empty]
    coords = torch.cat(
        [s.coords + torch.tensor([batch, 0, 0, 0], dtype=torch.int32) for batch, s in zip(slots, samples, strict=True)]
    )
    together = encoder(SparseVoxels(coords, torch.cat([s.feats for s in samples]), GRID, 3)).output
    assert together.batch_size == 3
    for batch, sample in zip(slots, samples, strict=True):
        alone = encoder(sample).output
        mine = together.coords[:, 0] == batch
        assert torch.equal(together.coords[mine, 1:], alone.coords[:, 1:])
        torch.testing.assert_close(together.feats[mine], alone.feats, rtol=1e-5, atol=1e-5)


def test_the_order_of_rows_does_not_change_the_tokens():
    encoder, voxels = seeded(SMALL).eval(), random_voxels(200)
    shuffle = torch.randperm(len(voxels), generator=torch.Generator().manual_seed(1))
    mixed = SparseVoxels(voxels.coords[shuffle], voxels.feats[shuffle], GRID, 2)
    one, other = encoder(voxels), encoder(mixed)
    assert torch.equal(one.output.coords, other.output.coords)
    assert torch.equal(one.token_of_voxel[shuffle], other.token_of_voxel)
    torch.testing.assert_close(one.output.feats, other.output.feats, rtol=1e-5, atol=1e-5)


def test_a_voxel_finds_the_token_of_its_pooled_cell():
    config = SMALL.with_overrides(["strides=[[2,3,8]]"])
    voxels = random_voxels(300)
    result = seeded(config)(voxels)
    expected = voxels.coords.clone()
    expected[:, 1:] //= torch.tensor([2, 3, 8], dtype=torch.int32)
    assert torch.equal(result.output.coords[result.token_of_voxel], expected)
    assert result.output.shape == (13, 7, 1)
    assert torch.equal(result.stages[0].coords, voxels.coords)


@settings(max_examples=25, deadline=None)
@given(count=st.integers(0, 120), stride=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 8)))
def test_pooled_cells_are_sorted_and_no_slot_is_taken_twice(count: int, stride: tuple[int, int, int]):
    voxels = random_voxels(count)
    coords, shape, row, slot = pool_coords(voxels, stride)
    keys = voxel_keys(coords, shape)
    assert (keys[1:] > keys[:-1]).all()
    assert len(set(zip(row.tolist(), slot.tolist(), strict=True))) == len(voxels)
    assert len(coords) == len(set(row.tolist()))
    assert ((coords[:, 1:] >= 0) & (coords[:, 1:] < torch.tensor(shape))).all()


def test_bfloat16_autocast_trains_and_stays_near_float32():
    encoder, voxels = seeded(SMALL).eval(), random_voxels(300)
    exact = encoder(voxels).output.feats
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = encoder(voxels).output.feats
    rough.float().square().sum().backward()
    assert (rough.float() - exact).abs().mean() < 0.05 * exact.abs().mean()


def test_published_configurations_fit_their_grids():
    heights = {
        "waymo_voxel_192": ((468, 468, 32), [32, 8, 2, 1]),
        "nuscenes_pillar_256": ((360, 360, 1), [1]),
        "nuscenes_voxel_256": ((512, 512, 40), [40, 10, 2, 1]),
        "nuscenes_cylinder_128": ((480, 360, 32), [32, 8, 2, 1]),
    }
    for name, (grid, expected) in heights.items():
        config: DsvtConfig = getattr(dsvt_config, name)()
        assert [shape[2] for shape in config.stage_shapes(grid)] == expected


def test_the_published_forty_cell_strides_are_refused_with_strides_that_fit():
    with pytest.raises(ConfigError) as error:
        Dsvt(dsvt_config.waymo_voxel_192(), (512, 512, 40))
    message = str(error.value)
    assert "stage 3 is 2 cells high, its window 1" in message
    assert "40, 10, 3, 2" in message
    assert "windows[3] = (12, 12, 2)" in message
    strides = message.split("strides along z of ")[1].split(", which")[0].split(", ")
    fitting = dsvt_config.waymo_voxel_192().with_overrides([f"strides={[[1, 1, int(s)] for s in strides]}"])
    fitting.stage_shapes((512, 512, 40))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["heads=5"], "16 channels cannot be shared by 5 heads. Set heads=4, which would fit"),
        (["blocks=[1]"], "blocks has 1 stages, so set_sizes needs 1 entries (it has 2"),
        (["blocks=[0,1]"], "Set each to at least 1"),
        (["shifts=[[0,0,0],[-3,0,0]]"], "Set each to 0 or more"),
        (["channel=3"], "Did you mean 'channels'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_in_words(overrides: list[str], words: str):
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        SMALL.with_overrides(overrides)


def test_a_window_higher_than_the_grid_is_refused_with_one_that_fits():
    with pytest.raises(ConfigError, match=r"Set windows\[0\] = \(6, 6, 4\)"):
        Dsvt(SMALL, (26, 19, 4))


def test_voxels_of_another_grid_are_refused():
    voxels = random_voxels(5)
    other = SparseVoxels(voxels.coords, voxels.feats, (26, 19, 16), 2)
    with pytest.raises(ConfigError, match=r"made for a grid of \(26, 19, 8\) cells, these voxels are on \(26, 19, 16\)"):
        seeded(SMALL)(other)
