"""The joined feature against a literal lookup, and what is said about a checkpoint that an encoder is taken from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from picture3d.errors import CheckpointError
from picture3d.models.dsvt import DsvtConfig
from picture3d.pretrain.picture import Picture
from picture3d.tasks.encoder import JoinedEncoder, load_encoder
from picture3d.training.checkpoint import save_checkpoint
from tests.tasks.small_scene import ENCODER, GRID, batch_of, layered_batch, no_points, small_task


def settings_of(encoder: DsvtConfig = ENCODER, **grid: object) -> dict[str, object]:
    """The part of a saved run config that speaks of the encoder."""
    shape = {"range_min": GRID.range_min, "range_max": GRID.range_max, "voxel_size": GRID.voxel_size, "pillars": False}
    tree = {name: list(value) if isinstance(value, tuple) else value for name, value in {**shape, **grid}.items()}
    return {"encoder": encoder.model_dump(mode="json"), "grid": tree}


def pretraining(path: Path, config: dict[str, object] | None = None, encoder: DsvtConfig = ENCODER) -> Picture:
    """A pre-training checkpoint at `path`, as the training loop writes it."""
    torch.manual_seed(7)
    network = Picture(GRID, 1, encoder, teacher_channels=8)
    meta = {} if config is None else {"config": config}
    save_checkpoint(path, {f"model.{name}": value for name, value in network.state_dict().items()}, meta)
    return network


def test_a_voxel_s_feature_is_its_pillar_s_token_and_its_own():
    torch.manual_seed(0)
    encoder = JoinedEncoder(GRID, 1, ENCODER).eval()
    batch = layered_batch(90, samples=2)
    joined = encoder.joined_features(batch)
    output = encoder.backbone_3d(encoder.vfe(batch).voxels)
    pillars = {tuple(row): feats for row, feats in zip(output.output.coords.tolist(), output.output.feats, strict=True)}
    assert joined.feats.shape == (joined.assignment.num_voxels, encoder.joined_channels)
    for row, (b, x, y, _) in enumerate(joined.assignment.coords.tolist()):
        assert torch.equal(joined.feats[row, :16], pillars[b, x, y, 0])
        assert torch.equal(joined.feats[row, 16:], output.stages[0].feats[row])


def test_voxels_above_each_other_share_the_first_half_only():
    encoder = JoinedEncoder(GRID, 1, ENCODER).eval()
    joined = encoder.joined_features(batch_of(torch.tensor([[0.5, 0.5, -1.5], [0.5, 0.5, 1.5]])))
    assert torch.equal(joined.feats[0, :16], joined.feats[1, :16])
    assert not torch.allclose(joined.feats[0, 16:], joined.feats[1, 16:])


def test_without_points_there_are_no_features():
    joined = JoinedEncoder(GRID, 1, ENCODER).joined_features(batch_of(no_points(), no_points()))
    assert joined.feats.shape == (0, 32)
    assert joined.point_features.shape == (0, 16)


def test_pre_training_hands_over_its_encoder_and_nothing_else(tmp_path: Path):
    pretrained = pretraining(tmp_path / "model.safetensors", settings_of())
    network = small_task().module
    head = {name: value.clone() for name, value in network.seg_head.state_dict().items()}
    report = load_encoder(network, tmp_path)
    for name, value in pretrained.state_dict().items():
        if name.startswith(("vfe.", "backbone_3d.")):
            assert torch.equal(network.state_dict()[name], value), name
    assert all(torch.equal(value, head[name]) for name, value in network.seg_head.state_dict().items())
    assert report.encoder.complete
    assert report.differences == ()
    assert {name.split(".")[0] for name in report.skipped} == {"backbone_2d", "dense_head"}
    assert {name.split(".")[0] for name in report.fresh} == {"seg_head"}
    matched = len(report.encoder.matched)
    assert report.summary().startswith(f"encoder: {matched} of {matched} tensors loaded. skipped from the checkpoint: ")
    assert f"new in this network: {len(head)} of seg_head" in report.summary()


def test_the_encoder_answers_as_it_did_in_pre_training(tmp_path: Path):
    pretrained = pretraining(tmp_path / "model.safetensors").eval()
    encoder = JoinedEncoder(GRID, 1, ENCODER).eval()
    load_encoder(encoder, tmp_path / "model.safetensors")
    batch = layered_batch(80)
    assert torch.equal(encoder.joined_features(batch).feats, pretrained.features(batch).feats)


def test_another_width_is_refused_and_leaves_the_network_alone(tmp_path: Path):
    wide = ENCODER.with_overrides(["channels=32"])
    pretraining(tmp_path / "wide.safetensors", encoder=wide)
    network = small_task().module
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(CheckpointError, match="wrong shape") as refused:
        load_encoder(network, tmp_path / "wide.safetensors")
    assert "wide.safetensors" in str(refused.value)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        pytest.param(settings_of(ENCODER.with_overrides(["set_sizes=[12,24]"])), r"set_sizes is \[12, 24\] there", id="sets"),
        pytest.param(
            settings_of(ENCODER.with_overrides(["posembed_quirk=false"])), "posembed_quirk is False there", id="quirk"
        ),
        pytest.param(settings_of(ENCODER.with_overrides(["point_inputs=unit"])), "point_inputs is unit there", id="inputs"),
        pytest.param(settings_of(voxel_size=(0.5, 0.5, 1.0)), "voxel_size is", id="voxel size"),
        pytest.param(settings_of(range_min=(-8.0, -8.0, -3.0)), r"grid.z is \[-3.0, 2.0\] there", id="height"),
        pytest.param(settings_of(pillars=True), "pillars is True there, False here", id="pillars"),
    ],
)
def test_settings_that_no_tensor_shows_are_compared(tmp_path: Path, config: dict[str, object], words: str):
    pretraining(tmp_path / "model.safetensors", config)
    network = small_task().module
    with pytest.raises(CheckpointError, match=words):
        load_encoder(network, tmp_path)
    report = load_encoder(network, tmp_path, allow_partial=True)
    assert len(report.differences) == 1
    assert report.differences[0] in report.summary()


def test_an_encoder_from_before_inputs_could_be_scaled_had_them_in_metres(tmp_path: Path):
    config = settings_of()
    assert isinstance(config["encoder"], dict)
    del config["encoder"]["point_inputs"]
    pretraining(tmp_path / "model.safetensors", config)
    assert load_encoder(small_task().module, tmp_path).differences == ()
    scaled = JoinedEncoder(GRID, 1, ENCODER.with_overrides(["point_inputs=unit"]))
    with pytest.raises(CheckpointError, match="point_inputs is metres there, unit here"):
        load_encoder(scaled, tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        settings_of(ENCODER.with_overrides(["attention=padded", "point_norm_momentum=0.01"])),
        settings_of(range_min=(-80.0, -8.0, -2.0)),
        {},
        {"encoder": None},
    ],
    ids=["how it is computed and trained", "wider range", "no settings", "settings of another kind"],
)
def test_settings_that_do_not_change_the_function_are_accepted(tmp_path: Path, config: dict[str, object]):
    pretraining(tmp_path / "model.safetensors", config)
    assert load_encoder(small_task().module, tmp_path).differences == ()


def test_a_checkpoint_without_an_encoder_is_refused_even_if_partial_is_allowed(tmp_path: Path):
    save_checkpoint(tmp_path / "head.safetensors", {"seg_head.classifier.bias": torch.zeros(17)}, {})
    with pytest.raises(CheckpointError, match="nothing in this checkpoint fits"):
        load_encoder(small_task().module, tmp_path / "head.safetensors", allow_partial=True)


def test_a_fine_tuned_network_hands_its_encoder_on(tmp_path: Path):
    tuned = small_task(seed=5).module
    save_checkpoint(tmp_path / "model.safetensors", {f"model.{n}": v for n, v in tuned.state_dict().items()}, {})
    encoder = JoinedEncoder(GRID, 1, ENCODER)
    report = load_encoder(encoder, tmp_path)
    assert report.fresh == ()
    assert {name.split(".")[0] for name in report.skipped} == {"seg_head"}
    assert all(torch.equal(value, tuned.state_dict()[name]) for name, value in encoder.state_dict().items())
