"""The whole Res16UNet34C against MinkowskiEngine, stage by stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from picture3d.models.minkunet import MinkUNet, UNetMaps, build_unet_maps
from picture3d.ops.kernel_map import unique_coords
from tests.minkowski_weights import minkowski_state, minkowski_value
from tests.sample_data import golden_files

# Sums of up to 27 * 384 float32 products in another order than the reference's; a wrong kernel order shows at 1e-2.
TOLERANCE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
LEVEL = {"out_p1": 0, "final": 0} | {f"block{i}": level for i, level in zip(range(1, 9), (1, 2, 3, 4, 3, 2, 1, 0), strict=True)}


def _scene(path: Path) -> tuple[MinkUNet, Tensor, UNetMaps, Tensor, dict[str, np.ndarray]]:
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    network = MinkUNet().eval()
    network.load_state_dict(minkowski_state(network, int(arrays["weight_seed"])))
    coords, first, inverse = unique_coords(torch.from_numpy(arrays["coords"].astype(np.int32)))
    maps = build_unet_maps(coords)
    return network, torch.from_numpy(arrays["feats"])[first], maps, inverse, arrays


def _rows_of(coords: Tensor, wanted: np.ndarray) -> list[int]:
    place = {tuple(row): i for i, row in enumerate(coords.tolist())}
    return [place[tuple(int(v) for v in row)] for row in wanted]


@pytest.mark.parametrize("path", golden_files("minkowski", "full_scene"))
def test_golden_weights_follow_the_formula(path: Path):
    with np.load(path) as file:
        manifest, seed = json.loads(str(file["manifest"])), int(file["weight_seed"])
    shapes = {key: tuple(value.shape) for key, value in MinkUNet().state_dict().items()}
    for key, (first, second, total) in manifest["weights_check"].items():
        value = minkowski_value(key, shapes[key], seed).double().reshape(-1)
        np.testing.assert_allclose([value[0], value[1], value.abs().sum()], [first, second, total], rtol=1e-6)


@pytest.mark.parametrize("folded", [False, True], ids=["as trained", "norms folded"])
@pytest.mark.parametrize("path", golden_files("minkowski", "full_scene"))
def test_golden_full_scene_at_every_stage(path: Path, folded: bool):
    network, feats, maps, inverse, arrays = _scene(path)
    if folded:
        network = network.folded()
    stages: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(_module: object, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            stages[name] = output

        return hook

    if not folded:
        network.get_submodule("conv1p1s2").register_forward_pre_hook(lambda _m, inputs: stages.__setitem__("out_p1", inputs[0]))
        for i in range(1, 9):
            network.get_submodule(f"block{i}")[-1].register_forward_hook(keep(f"block{i}"))  # type: ignore[index]
    network.final.register_forward_hook(keep("final"))
    with torch.no_grad():
        out = network(feats, maps)
    assert_close(out[inverse], torch.from_numpy(arrays["out"]), **TOLERANCE, msg=lambda m: f"out: {m}")
    assert set(stages) == ({"final"} if folded else set(LEVEL))
    manifest = json.loads(str(arrays["manifest"]))
    for name, value in stages.items():
        level = maps.coords[LEVEL[name]]
        expected = manifest["stages"][name]
        assert list(value.shape) == [expected["rows"], expected["channels"]], name
        assert value.double().abs().sum().item() == pytest.approx(expected["sum_abs"], rel=1e-5), name
        wanted = arrays[f"stage_{name}__coords"]
        rows = _rows_of(level, wanted)
        assert_close(
            value[rows], torch.from_numpy(arrays[f"stage_{name}__feats"]), **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}"
        )
