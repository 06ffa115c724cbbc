"""Files made from the key lists of the published networks, read, loaded, refused and written back."""

from __future__ import annotations

import json
import subprocess
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from picture3d.commands.weights import export_weights, import_weights, show
from picture3d.errors import CheckpointError
from picture3d.models.dsvt import Dsvt, DsvtConfig
from picture3d.models.dsvt_config import nuscenes_cylinder_128, nuscenes_pillar_256, nuscenes_voxel_256, waymo_voxel_192
from picture3d.models.mae_decoder import LightDecoder
from picture3d.recipes.catalogue import segmentation_recipe
from picture3d.structures.batch import PointBatch
from picture3d.structures.voxels import VoxelGrid
from picture3d.tasks.encoder import JoinedEncoder, load_encoder
from picture3d.training.checkpoint import compare, load_checkpoint, load_into
from picture3d.training.weights_import import export_openpcdet, load_any_weights, read_openpcdet
from tests.golden_weights import openpcdet_value
from tests.sample_data import golden_dir

WAYMO = VoxelGrid((-74.88, -74.88, -2.0), (74.88, 74.88, 4.0), (0.32, 0.32, 0.1875))
NUSCENES = VoxelGrid((-51.2, -51.2, -5.0), (51.2, 51.2, 3.0), (0.2, 0.2, 0.2))
PILLARS = VoxelGrid((-54.0, -54.0, -5.0), (54.0, 54.0, 3.0), (0.3, 0.3, 8.0))
KEY_LISTS = (
    "detect_nuscenes",
    "detect_nuscenes_dsvt_width128",
    "detect_waymo",
    "occ_nuscenes",
    "pretrain_nuscenes",
    "pretrain_nuscenes_decoder_repaired",
    "pretrain_waymo",
    "pretrain_waymo_decoder_repaired",
    "seg_nuscenes",
)


def key_list(name: str) -> dict[str, tuple[int, ...]]:
    path = golden_dir() / "openpcdet" / "keys" / f"{name}.json"
    if not path.exists():
        pytest.skip(f"openpcdet/keys/{name}.json is absent under {golden_dir()}")
    return {key: tuple(shape) for key, shape in json.loads(path.read_text())["state_dict"].items()}


def published(name: str) -> dict[str, Tensor]:
    return {key: openpcdet_value(key, shape) for key, shape in key_list(name).items()}


def openpcdet_file(path: Path, state: dict[str, Tensor]) -> Path:
    """As OpenPCDet's trainer saves: beside an optimiser's state whose rate a numpy schedule computed."""
    groups = [{"lr": np.float64(0.0012), "betas": (np.float64(0.9), 0.99), "params": [0]}]
    optimizer = {"state": {0: {"step": 12, "exp_avg": torch.zeros(2)}}, "param_groups": groups}
    content = {"epoch": 30, "it": 1200, "model_state": OrderedDict(state), "optimizer_state": optimizer}
    torch.save({**content, "version": "pcdet+0.6.0+abc"}, path)
    return path


def small_state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    layer = {"weight": torch.randn(3, 2, generator=generator), "bias": torch.randn(3, generator=generator)}
    return {"global_step": torch.tensor([7]), **{f"vfe.{name}": value for name, value in layer.items()}}


@pytest.mark.parametrize("name", KEY_LISTS)
def test_every_golden_key_list_survives_reading_writing_and_reading(name: str, tmp_path: Path):
    state = published(name)
    read = read_openpcdet(openpcdet_file(tmp_path / "checkpoint_epoch_30.pth", state))
    assert (read.epoch, read.global_step, read.version) == (30, 0, "pcdet+0.6.0+abc")
    assert set(read.ignored) == {"it", "optimizer_state"}
    assert set(read.tensors) == set(state) - {"global_step"}
    export_openpcdet(read.tensors, tmp_path / "back.safetensors", global_step=0)
    again = load_file(tmp_path / "back.safetensors")
    assert set(again) == set(state)
    assert all(torch.equal(again[key], value) and again[key].dtype == value.dtype for key, value in state.items())
    assert set(load_any_weights(tmp_path / "back.safetensors").tensors) == set(read.tensors)


@pytest.mark.parametrize(
    ("name", "grid", "config", "pillars", "loaded"),
    [
        ("pretrain_waymo", WAYMO, waymo_voxel_192(), False, 225),
        ("detect_waymo", WAYMO, waymo_voxel_192(), False, 225),
        ("detect_nuscenes", PILLARS, nuscenes_pillar_256(), True, 204),
        (
            "detect_nuscenes_dsvt_width128",
            PILLARS,
            nuscenes_pillar_256().model_copy(update={"channels": 128, "ffn_channels": 256}),
            True,
            204,
        ),
    ],
)
def test_the_golden_encoders_load_whole_and_bit_by_bit(
    name: str, grid: VoxelGrid, config: DsvtConfig, pillars: bool, loaded: int, tmp_path: Path
):
    state = published(name)
    network = JoinedEncoder(grid, 2, config, pillars=pillars)
    report = load_encoder(network, openpcdet_file(tmp_path / "file.pth", state))
    assert report.encoder.complete
    assert len(report.encoder.matched) == loaded
    assert len(report.skipped) == len(state) - 1 - loaded
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


def test_the_golden_nuscenes_encoder_misses_only_what_its_repair_changes(tmp_path: Path):
    path = openpcdet_file(tmp_path / "file.pth", published("pretrain_nuscenes"))
    network = JoinedEncoder(NUSCENES, 2, nuscenes_voxel_256())
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(CheckpointError, match="only in part"):
        load_encoder(network, path)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    report = load_encoder(network, path, allow_partial=True)
    assert not report.encoder.missing
    assert not report.encoder.unexpected
    # Two shifts of the last stage share the one change of width.
    assert set(report.encoder.wrong_shape) == {
        "backbone_3d.stage_1_reduction.pos_embedding",
        "backbone_3d.input_layer.posembed_layers.3.0.0.position_embedding_head.0.weight",
        "backbone_3d.input_layer.posembed_layers.3.0.1.position_embedding_head.0.weight",
    }


@pytest.mark.parametrize(("name", "channels", "shape"), [("waymo", 192, (468, 468, 32)), ("nuscenes", 256, (512, 512, 40))])
def test_the_golden_repaired_decoder_loads(name: str, channels: int, shape: tuple[int, int, int]):
    state = published(f"pretrain_{name}_decoder_repaired")
    decoder = LightDecoder(channels, shape)
    report = compare(decoder, state, prefix="backbone_2d.")
    assert len(report.matched) + len(report.wrong_shape) == 104
    assert not report.missing
    assert not report.unexpected
    if name == "waymo":
        assert report.complete


def test_the_golden_segmentation_backbone_loads_into_the_cylinder_encoder():
    backbone = Dsvt(nuscenes_cylinder_128(), (480, 360, 32))
    assert load_into(backbone, published("seg_nuscenes"), prefix="backbone_3d.").complete


def test_a_golden_void_transfer_is_refused_even_when_a_partial_one_is_asked_for():
    state = {key: value for key, value in published("seg_nuscenes").items() if key.startswith("dense_head.")}
    with pytest.raises(CheckpointError, match="nothing in this checkpoint fits"):
        load_into(nn.Linear(2, 2), state, allow_partial=True)


def test_wrappers_come_off_when_every_name_has_them(tmp_path: Path):
    state = small_state()
    wrapped = {f"module.model.{name}" if name != "global_step" else name: value for name, value in state.items()}
    torch.save({"state_dict": wrapped}, tmp_path / "wrapped.ckpt")
    read = read_openpcdet(tmp_path / "wrapped.ckpt")
    assert set(read.tensors) == {"vfe.weight", "vfe.bias"}
    assert read.global_step == 7
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "mixed.pth")
    assert set(read_openpcdet(tmp_path / "mixed.pth").tensors) == {"module.a", "b"}


def test_bare_files_and_the_container_before_1_6_are_read(tmp_path: Path):
    state = small_state()
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    read = read_openpcdet(tmp_path / "old.pth")
    assert read.global_step == 7
    assert read.epoch is None
    assert torch.equal(read.tensors["vfe.bias"], state["vfe.bias"])


def test_a_file_that_wants_objects_made_stays_closed(tmp_path: Path):
    torch.save({"model_state": small_state(), "model": nn.Linear(2, 2)}, tmp_path / "objects.pth")
    with pytest.raises(
        CheckpointError, match=r"objects\.pth: holds more than plain tensors.*torch\.nn\.modules\.linear\.Linear"
    ):
        read_openpcdet(tmp_path / "objects.pth")
    marker = tmp_path / "ran"

    class Command:
        def __reduce__(self) -> tuple[object, tuple[list[str]]]:
            return subprocess.check_call, (["touch", str(marker)],)

    torch.save({"model_state": small_state(), "config": Command()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="stays closed"):
        read_openpcdet(tmp_path / "evil.pth")
    assert not marker.exists()


def test_damaged_absent_and_empty_files_are_refused_in_words(tmp_path: Path):
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        read_openpcdet(tmp_path / "absent.pth")
    path = openpcdet_file(tmp_path / "cut.pth", small_state())
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match="damaged or cut off"):
        read_openpcdet(path)
    (tmp_path / "text.pth").write_text("weights, honestly")
    with pytest.raises(CheckpointError, match="neither a PyTorch nor a safetensors file"):
        read_openpcdet(tmp_path / "text.pth")
    torch.save({"epoch": 3, "model_state": {}}, tmp_path / "empty.pth")
    with pytest.raises(CheckpointError, match="no named tensors"):
        read_openpcdet(tmp_path / "empty.pth")
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="holds a list"):
        read_openpcdet(tmp_path / "list.pth")


def test_an_export_is_never_a_pickle_and_never_empty(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"Name it\s+out\.safetensors"):
        export_openpcdet(nn.Linear(2, 2), tmp_path / "out.pth")
    with pytest.raises(CheckpointError, match="nothing to export"):
        export_openpcdet({}, tmp_path / "out.safetensors")
    layer = nn.Linear(2, 2)
    names = export_openpcdet({"a": layer.weight, "b": layer.weight}, tmp_path / "out.safetensors", global_step=5)
    stored = load_file(tmp_path / "out.safetensors")
    assert names == ("a", "b", "global_step")
    assert torch.equal(stored["a"], layer.weight)
    assert int(stored["global_step"]) == 5
    assert not zipfile.is_zipfile(tmp_path / "out.safetensors")


def test_a_golden_checkpoint_goes_in_and_out_by_command(tmp_path: Path):
    state = published("pretrain_waymo")
    path = openpcdet_file(tmp_path / "picture.pth", state)
    text = show(path, recipe="waymo-picture", tensors=False)
    assert "against its encoder alone: 225 of 225 tensors loaded" in text
    ours, back = tmp_path / "picture.safetensors", tmp_path / "back.safetensors"
    told = import_weights(path, ours, recipe="waymo-picture", encoder_only=True, allow_partial=False)
    assert "225 of 225" in told
    assert load_checkpoint(ours).meta["config"]["encoder"]["channels"] == 192
    export_weights(ours, back)
    encoder = {key for key in state if key.split(".")[0] in {"vfe", "backbone_3d"}}
    assert {key for key, value in load_file(back).items() if torch.equal(value, state[key])} == encoder | {"global_step"}
    with pytest.raises(CheckpointError, match="waymo-picture: this checkpoint fits the network only in part"):
        import_weights(path, tmp_path / "no.safetensors", recipe="waymo-picture", encoder_only=False, allow_partial=False)
    assert not (tmp_path / "no.safetensors").exists()


def test_an_imported_encoder_remembers_its_settings(tmp_path: Path):
    path = openpcdet_file(tmp_path / "picture.pth", published("pretrain_waymo"))
    import_weights(path, tmp_path / "ours.safetensors", recipe="waymo-picture", encoder_only=True, allow_partial=False)
    smaller = waymo_voxel_192().model_copy(update={"set_sizes": (24, 24, 24, 24)})
    with pytest.raises(CheckpointError, match=r"encoder\.set_sizes"):
        load_encoder(JoinedEncoder(WAYMO, 2, smaller), tmp_path / "ours.safetensors")


def test_an_encoder_for_inputs_of_one_size_goes_in_and_out_with_its_first_layer_for_metres(tmp_path: Path):
    config = segmentation_recipe("town-segmentation", tmp_path)
    assert config.encoder.point_inputs == "unit"
    metres = config.encoder.model_copy(update={"point_inputs": "metres"})
    torch.manual_seed(0)
    theirs, ours = (JoinedEncoder(config.grid.grid, 1, encoder).eval() for encoder in (metres, config.encoder))
    path = openpcdet_file(tmp_path / "theirs.pth", theirs.state_dict())
    told = {"recipe": "town-segmentation", "encoder_only": True, "allow_partial": False}
    import_weights(path, tmp_path / "ours.safetensors", **told)
    load_encoder(ours, tmp_path / "ours.safetensors")
    xyz = torch.rand(200, 3) * torch.tensor([40.0, 40.0, 3.0]) - torch.tensor([20.0, 20.0, 2.0])
    batch = PointBatch(xyz, torch.rand(200, 1), torch.zeros(200, dtype=torch.int64), 1, ("a/0",))
    with torch.no_grad():
        torch.testing.assert_close(ours.vfe(batch).voxels.feats, theirs.vfe(batch).voxels.feats)
    export_weights(tmp_path / "ours.safetensors", tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(back[name], value)
    # One of our own files says that its first layer is already for unit inputs.
    import_weights(tmp_path / "ours.safetensors", tmp_path / "again.safetensors", **told)
    again = load_checkpoint(tmp_path / "again.safetensors").tensors
    assert all(torch.equal(again[name], value) for name, value in ours.state_dict().items())
