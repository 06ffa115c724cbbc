from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from picture3d.errors import ConfigError
from picture3d.models.occupancy_head import OccupancyHead
from picture3d.tasks.occupancy import OccupancyTaskConfig
from tests.golden_weights import golden_weight_seed, openpcdet_input, openpcdet_state
from tests.sample_data import golden_dir, golden_files

SHAPES = ((12, 10, 8), (6, 5, 4), (3, 3, 2), (2, 2, 1))


@pytest.mark.parametrize("path", golden_files("openpcdet", "occ_head_parts"))
def test_logits_and_shares_of_the_levels_are_the_references(path: Path):
    reference, seed = np.load(path), golden_weight_seed(path.parent)
    head = OccupancyHead((256,) * 4, 128, 17).eval()
    head.load_state_dict(openpcdet_state(head, "dense_head.", seed))
    levels = [openpcdet_input(f"occ/level{i}", (1, 256, *shape), seed) for i, shape in enumerate(SHAPES)]
    for i, level in enumerate(levels):
        np.testing.assert_allclose(level.flatten()[:8].numpy(), reference[f"level{i}_first8"], rtol=1e-6)
    with torch.no_grad():
        shares = head.level_shares(head.occ_convs[0](levels[0]))
        logits = head(levels)
    np.testing.assert_allclose(shares.numpy(), reference["level_weights"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(logits.numpy(), reference["logits"], rtol=1e-4, atol=1e-4)


def test_keys_and_shapes_are_those_of_the_reference():
    path = golden_dir() / "openpcdet" / "keys" / "occ_nuscenes.json"
    if not path.exists():
        pytest.skip(f"{path.name} is absent")
    published = json.loads(path.read_text())["state_dict"]
    config = OccupancyTaskConfig()
    head = OccupancyHead((config.volume_channels,) * len(config.blocks), config.head_channels, config.num_classes)
    ours = {f"dense_head.{key}": list(value.shape) for key, value in head.state_dict().items()}
    assert ours == {key: shape for key, shape in published.items() if key.startswith("dense_head.")}


def test_one_level_counts_whole():
    head = OccupancyHead((5,), 4, 3)
    volume = torch.randn(2, 5, 4, 3, 2)
    torch.testing.assert_close(head([volume]), head.occ_pred_conv(head.occ_convs[0](volume)))


def test_a_cell_is_the_same_in_float64_by_hand():
    torch.manual_seed(0)
    head = OccupancyHead((3, 3), 4, 3).double()
    levels = [torch.randn(1, 3, 4, 4, 2, dtype=torch.float64), torch.randn(1, 3, 2, 2, 1, dtype=torch.float64)]
    volumes = [conv(level) for conv, level in zip(head.occ_convs, levels, strict=True)]
    shares = head.voxel_soft_weights(volumes[0])
    shares = shares.exp() / shares.exp().sum(1, keepdim=True)

    def nearest_pair(volume: Tensor, cell: int, size: int) -> list[tuple[int, float]]:
        place = min(max((cell + 0.5) / 2 - 0.5, 0.0), size - 1.0)
        low = int(place)
        return [(low, 1 - (place - low)), (min(low + 1, size - 1), place - low)]

    x, y = 1, 2
    coarse = sum(
        wx * wy * volumes[1][0, :, i, j, 0]
        for i, wx in nearest_pair(volumes[1], x, 2)
        for j, wy in nearest_pair(volumes[1], y, 2)
    )
    joined = volumes[0] * shares[:, :1] + F.interpolate(volumes[1], size=(4, 4, 2), mode="trilinear") * shares[:, 1:]
    expected = volumes[0][0, :, x, y, 1] * shares[0, 0, x, y, 1] + coarse * shares[0, 1, x, y, 1]
    torch.testing.assert_close(joined[0, :, x, y, 1], expected)
    torch.testing.assert_close(head(levels), head.occ_pred_conv(joined))


@pytest.mark.parametrize(("levels", "channels", "words"), [((), 4, "no level"), ((3,), 5, "even number"), ((3,), 0, "even")])
def test_a_head_that_cannot_be_is_refused(levels: tuple[int, ...], channels: int, words: str):
    with pytest.raises(ConfigError, match=words):
        OccupancyHead(levels, channels, 3)
