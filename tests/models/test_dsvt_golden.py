"""The encoder against the numbers of the reference, both forms of attention, values and gradients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from picture3d.models import dsvt_config
from picture3d.models.dsvt import Dsvt, DsvtConfig, _AttentionAndFeedForward, make_set_layout
from picture3d.models.voxel_encoder import VoxelEncoder
from picture3d.ops.attention import set_attention
from picture3d.ops.sets import window_places
from picture3d.structures.voxels import SparseVoxels
from tests.golden_weights import golden_weight_seed, openpcdet_input, openpcdet_state
from tests.models.test_voxel_encoder import NUSCENES, NUSCENES_PILLARS, WAYMO, point_batch
from tests.sample_data import golden_dir, golden_files

FORMS = ["bucketed", "padded"]


def with_form(config: DsvtConfig, attention: str) -> DsvtConfig:
    return config.with_overrides([f"attention={attention}"])


def golden_encoder(config: DsvtConfig, grid: tuple[int, int, int], seed: int) -> Dsvt:
    encoder = Dsvt(config, grid)
    encoder.load_state_dict(openpcdet_state(encoder, "backbone_3d.", seed))
    return encoder.eval()


def assert_close(name: str, actual: Tensor, expected: np.ndarray) -> None:
    difference = (actual.detach() - torch.from_numpy(expected)).abs() - 1e-4 * torch.from_numpy(expected).abs()
    assert difference.max() <= 1e-4, f"{name} differs by {difference.max():.2e}"


def our_coords(golden: np.ndarray) -> Tensor:
    return torch.from_numpy(golden.astype(np.int32)[:, [0, 3, 2, 1]])


@pytest.mark.parametrize("attention", FORMS)
@pytest.mark.parametrize("path", golden_files("openpcdet", "dsvt_block_waymo"))
def test_golden_block_and_its_parts(path: Path, attention: str):
    golden, seed = np.load(path), golden_weight_seed(path.parent)
    rows = torch.from_numpy(golden["rows"]).long()
    config = with_form(dsvt_config.waymo_voxel_192(), attention)
    encoder = golden_encoder(config, WAYMO.shape, seed)
    coords = our_coords(golden["voxel_coords"])
    feats = openpcdet_input("dsvt_block/features", (len(coords), config.channels), seed)
    windows = encoder.stage_windows(0, coords)
    places = [window_places(windows[shift]) if attention == "bucketed" else None for shift in (0, 1)]
    positions = [encoder.input_layer(0, 0, shift, windows[shift], places[shift]) for shift in (0, 1)]
    for shift in (0, 1):
        assert_close(f"position embedding {shift}", positions[shift].of_voxels()[rows], golden[f"pos_embed_shift{shift}"])
    block = encoder.get_submodule("stage_0.0")
    layer = encoder.get_submodule("stage_0.0.encoder_list.0")
    sets = [make_set_layout(windows[shift], config.set_sizes[0], attention) for shift in (0, 1)]
    part = cast(_AttentionAndFeedForward, layer.win_attn)
    hidden = part.norm1(feats + set_attention(feats, positions[0], sets[0], 0, part.self_attn.weights()))
    hidden = part.norm2(hidden + part.linear2(nn.functional.gelu(part.linear1(hidden))))
    assert_close("attention and feed-forward", hidden[rows], golden["set_attention_layer0"])
    assert_close("encoder layer", layer(feats, positions[0], sets[0], 0)[rows], golden["encoder_layer0"])
    for block_id in (0, 1):
        assert_close(f"block {block_id}", block(feats, positions, sets[block_id])[rows], golden[f"block_out_blockid{block_id}"])


def tapped(encoder: Dsvt) -> dict[str, Tensor]:
    """Fills with the rows after every block and pooling as the encoder runs."""
    taps: dict[str, Tensor] = {}

    def tap(module: str, name: str) -> None:
        def keep(_module: nn.Module, _inputs: object, out: Any) -> None:
            taps[name] = out if isinstance(out, Tensor) else out[0].feats

        encoder.get_submodule(module).register_forward_hook(keep)

    for stage, blocks in enumerate(encoder.config.blocks):
        for block in range(blocks):
            tap(f"residual_norm_stage_{stage}.{block}", f"stage{stage}_block{block}")
        if stage:
            tap(f"stage_{stage - 1}_reduction", f"pooled_stage{stage}")
    return taps


DETECTORS = {
    "dsvt_voxel_waymo": (dsvt_config.waymo_voxel_192, WAYMO, False),
    "dsvt_pillar_nuscenes": (dsvt_config.nuscenes_pillar_256, NUSCENES_PILLARS, True),
}


@pytest.mark.parametrize("attention", FORMS)
@pytest.mark.parametrize("path", [case for kind in DETECTORS for case in golden_files("openpcdet", kind)])
def test_golden_encoders_from_points_to_output_and_their_gradients(path: Path, attention: str):
    golden, seed = np.load(path), golden_weight_seed(path.parent)
    kind = next(kind for kind in DETECTORS if path.stem.startswith(kind))
    published, grid, pillars = DETECTORS[kind]
    config = with_form(published(), attention)
    points = VoxelEncoder(2, config.channels, grid, pillars)
    points.load_state_dict(openpcdet_state(points, "vfe.", seed))
    encoder = golden_encoder(config, points.grid_shape, seed)
    taps = tapped(encoder)

    with torch.no_grad():
        voxels = points.eval()(point_batch(torch.from_numpy(golden["points"]))).voxels
        result = encoder(voxels).output
    assert torch.equal(voxels.coords, our_coords(golden["voxel_coords_in"]))
    vfe_rows = torch.from_numpy(golden["vfe_rows"]).long()
    assert_close("point encoder", voxels.feats[vfe_rows], golden["vfe_features_rows"])
    for name, value in taps.items():
        assert_close(name, value[torch.from_numpy(golden[f"rows_{name}"]).long()], golden[name])
    assert torch.equal(result.coords, our_coords(golden["voxel_coords_out"]))
    assert_close("output", result.feats[torch.from_numpy(golden["out_rows"]).long()], golden["voxel_features_out"])

    # Gradients in float64: where two voxels of a pooled cell lie within float32 rounding (one such pair is in the Waymo
    # file, 6e-7 apart), either may be the maximum and take the gradient; and a bias sums thousands of rows that cancel.
    encoder.double()
    feats = voxels.feats.double().requires_grad_()
    result = encoder(voxels.with_feats(feats)).output
    weight = openpcdet_input(f"{path.stem}/grad_weight", tuple(result.feats.shape), seed)
    (result.feats * weight).sum().backward()
    assert feats.grad is not None
    assert_close("gradient of the input", feats.grad[vfe_rows], golden["grad_vfe_rows"])
    for name in (name for name in golden.files if name.startswith("grad/")):
        gradient = encoder.get_parameter(name.removeprefix("grad/")).grad
        assert gradient is not None
        assert_close(name, gradient, golden[name])


@pytest.mark.parametrize("attention", FORMS)
@pytest.mark.parametrize("path", golden_files("openpcdet", "dsvt_cylinder_nuscenes_seg"))
def test_golden_segmentation_encoder(path: Path, attention: str):
    golden, seed = np.load(path), golden_weight_seed(path.parent)
    config = with_form(dsvt_config.nuscenes_cylinder_128(), attention)
    encoder = golden_encoder(config, (480, 360, 32), seed)
    coords = our_coords(golden["voxel_coords_in"])
    feats = openpcdet_input("dsvt_seg/features", (len(coords), config.channels), seed)
    with torch.no_grad():
        result = encoder(SparseVoxels(coords, feats, (480, 360, 32), int(coords[:, 0].max()) + 1)).output
    assert torch.equal(result.coords, our_coords(golden["voxel_coords_out"]))
    assert_close("output", result.feats[torch.from_numpy(golden["rows"]).long()], golden["voxel_features_out"])


def parts_of(config: DsvtConfig, grid: tuple[int, int, int], points: nn.Module | None) -> dict[str, nn.Module]:
    parts: dict[str, nn.Module] = {"backbone_3d.": Dsvt(config, grid)}
    return parts if points is None else {**parts, "vfe.": points}


KEY_LISTS = {
    "pretrain_waymo": lambda: parts_of(dsvt_config.waymo_voxel_192(), WAYMO.shape, VoxelEncoder(2, 192, WAYMO)),
    "detect_waymo": lambda: parts_of(dsvt_config.waymo_voxel_192(), WAYMO.shape, VoxelEncoder(2, 192, WAYMO)),
    "detect_nuscenes": lambda: parts_of(
        dsvt_config.nuscenes_pillar_256(), (360, 360, 1), VoxelEncoder(2, 256, NUSCENES_PILLARS, pillars=True)
    ),
    "pretrain_nuscenes": lambda: parts_of(dsvt_config.nuscenes_voxel_256(), NUSCENES.shape, VoxelEncoder(2, 256, NUSCENES)),
    "occ_nuscenes": lambda: parts_of(dsvt_config.nuscenes_voxel_256(), (512, 512, 40), None),
    "seg_nuscenes": lambda: parts_of(dsvt_config.nuscenes_cylinder_128(), (480, 360, 32), None),
}
# The published 40-cell configurations cannot run (stage heights 40, 10, 3, 2): the repair changes these shapes and no key.
REPAIRED = {
    "backbone_3d.stage_1_reduction.pos_embedding": ([4, 256], [5, 256]),
    **{
        f"backbone_3d.input_layer.posembed_layers.3.0.{shift}.position_embedding_head.0.weight": ([256, 3], [256, 2])
        for shift in (0, 1)
    },
}


@pytest.mark.parametrize("name", KEY_LISTS)
def test_golden_keys_and_shapes_are_those_of_the_reference(name: str):
    path = golden_dir() / "openpcdet" / "keys" / f"{name}.json"
    if not path.exists():
        pytest.skip(f"{path.name} is absent")
    published = json.loads(path.read_text())["state_dict"]
    repaired = name in {"pretrain_nuscenes", "occ_nuscenes"}
    for prefix, module in KEY_LISTS[name]().items():
        ours = {prefix + key: list(value.shape) for key, value in module.state_dict().items()}
        theirs = {key: shape for key, shape in published.items() if key.startswith(prefix)}
        assert set(ours) == set(theirs)
        different = {key: (theirs[key], ours[key]) for key in ours if ours[key] != theirs[key]}
        assert different == (REPAIRED if repaired and prefix == "backbone_3d." else {})
