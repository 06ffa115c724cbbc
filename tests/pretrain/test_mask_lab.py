"""Every kind of mask hides the same number of voxels when asked to, and hides them where its name says."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from picture3d.errors import ConfigError
from picture3d.ops.voxelize import assign_voxels
from picture3d.pretrain.mask_lab import block_order, radial_order, range_ring, voxel_places
from picture3d.pretrain.masking import MaskConfig, choose_hidden, hide_first, matched_counts, scaled_to
from picture3d.structures.voxels import VoxelGrid
from tests.sample_data import sample_path

GRID = VoxelGrid((-80.0, -80.0, -2.0), (80.0, 80.0, 2.0), (0.5, 0.5, 0.5))
KINDS = ("i2mask", "random", "block", "range_aware", "radial")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def lidar_like(counts: list[int], seed: int = 0) -> Tensor:
    """(M, 4) coords, sorted and unique, denser near the middle like a sweep: range is spread evenly, not area."""
    draws = []
    for sample, count in enumerate(counts):
        g = generator(seed + sample)
        radius, angle = 2 + 76 * torch.rand(count, generator=g), 2 * math.pi * torch.rand(count, generator=g)
        xyz = torch.stack([radius * angle.cos(), radius * angle.sin(), 3.9 * torch.rand(count, generator=g) - 1.95], 1)
        coords = assign_voxels(xyz, torch.zeros(count, dtype=torch.int64), 1, GRID).coords
        coords[:, 0] = sample
        draws.append(coords)
    return torch.cat(draws) if draws else torch.zeros(0, 4, dtype=torch.int32)


def mask_of(
    kind: str, coords: Tensor, batch_size: int, seed: int = 0, known: Tensor | None = None, **settings: object
) -> Tensor:
    config = MaskConfig.from_tree({"kind": kind, **settings})
    superclass = torch.arange(len(coords)) % 8
    if known is not None:
        superclass = torch.where(known, superclass, -1)
    g = generator(99)
    features = torch.randn(8, 16, generator=g)[superclass] + 0.3 * torch.randn(len(coords), 16, generator=g)
    places, sample = voxel_places(coords, GRID), coords[:, 0].long()
    return choose_hidden(features, superclass, sample, batch_size, config, generator(seed), places)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", [0.0, 0.1, 0.333, 0.6, 0.75, 0.9, 1.0])
def test_one_setting_gives_every_kind_the_same_number_of_hidden_voxels(kind: str, target: float):
    coords = lidar_like([3000, 40, 0, 900])
    hidden = mask_of(kind, coords, 5, target_ratio=target)
    for sample in range(5):
        rows = coords[:, 0] == sample
        assert int(hidden[rows].sum()) == math.floor(int(rows.sum()) * target + 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_voxels_without_a_target_stay_visible_and_do_not_count(kind: str):
    coords = lidar_like([2000, 2000])
    known = torch.rand(len(coords), generator=generator(3)) < 0.7
    hidden = mask_of(kind, coords, 2, known=known, target_ratio=0.6)
    assert not (hidden & ~known).any()
    for sample in range(2):
        rows = known & (coords[:, 0] == sample)
        assert int(hidden[rows].sum()) == math.floor(int(rows.sum()) * 0.6 + 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_state_gives_the_same_mask_and_another_state_another(kind: str):
    coords = lidar_like([2000])
    assert torch.equal(mask_of(kind, coords, 1, seed=4, target_ratio=0.5), mask_of(kind, coords, 1, seed=4, target_ratio=0.5))
    assert not torch.equal(
        mask_of(kind, coords, 1, seed=4, target_ratio=0.5), mask_of(kind, coords, 1, seed=5, target_ratio=0.5)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_no_voxel_and_one_voxel_are_masks_too(kind: str):
    assert mask_of(kind, lidar_like([]), 3, target_ratio=0.6).shape == (0,)
    one = torch.tensor([[1, 7, 7, 3]], dtype=torch.int32)
    assert mask_of(kind, one, 3, target_ratio=0.6).tolist() == [False]
    assert mask_of(kind, one, 3, target_ratio=1.0).tolist() == [True]


@pytest.mark.parametrize("block_cells", [1, 8, 16, 1000])
def test_blocks_are_hidden_or_shown_whole_but_for_one_of_each_sample(block_cells: int):
    coords = lidar_like([4000, 700])
    config = {"block_cells": block_cells, "target_ratio": 0.6}
    hidden = mask_of("block", coords, 2, seed=11, **config)
    # The offset is the first draw from the generator, as the function's contract of one offset for the batch has it.
    offset = torch.randint(block_cells, (2,), generator=generator(11))
    block = torch.div(coords[:, 1:3].long() + offset, block_cells, rounding_mode="floor")
    for sample in range(2):
        rows = coords[:, 0] == sample
        _, index = torch.unique(block[rows], dim=0, return_inverse=True)
        share = torch.zeros(int(index.max()) + 1).index_add_(0, index, hidden[rows].float()) / index.bincount()
        assert int(((share > 0) & (share < 1)).sum()) <= 1


def test_the_block_that_is_hidden_in_part_is_cut_along_one_line():
    x, y = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    flat = torch.stack([torch.zeros(256), x.flatten(), y.flatten(), torch.zeros(256)], 1).int()
    hidden = mask_of("block", flat, 1, seed=2, block_cells=1000, target_ratio=0.5).view(16, 16)
    whole_rows = hidden.all(1) | ~hidden.any(1)
    assert int((~whole_rows).sum()) <= 1
    assert int(hidden.sum()) == 128


def test_blocks_begin_anywhere_and_turn_up_in_any_order():
    coords = lidar_like([3000])
    places = voxel_places(coords, GRID)
    shown = torch.stack(
        [hide_first(block_order(places, 1, 16, generator(s)), coords[:, 0].long(), torch.tensor([1500])) for s in range(60)]
    )
    share = shown.float().mean(0)
    assert share.min() > 0.2
    assert share.max() < 0.8


def test_rings_hide_their_own_shares_and_what_is_left_is_spread_more_evenly():
    coords = lidar_like([20000])
    places = voxel_places(coords, GRID)
    ring = range_ring(places, (30.0, 50.0))
    size = ring.bincount(minlength=3)
    hidden = mask_of("range_aware", coords, 1)
    assert [int(hidden[ring == i].sum()) for i in range(3)] == [
        math.floor(int(n) * r + 1e-6) for n, r in zip(size, (0.9, 0.7, 0.5), strict=True)
    ]
    matched = mask_of("range_aware", coords, 1, target_ratio=0.6)
    area = torch.tensor([30.0**2, 50.0**2 - 30.0**2, 78.0**2 - 50.0**2])
    before, after = size / area, torch.stack([(~matched[ring == i]).sum() for i in range(3)]) / area
    assert before[0] > before[1] > before[2]
    assert after[0] / after[2] < 0.5 * before[0] / before[2]
    shares = [float(matched[ring == i].float().mean()) for i in range(3)]
    assert shares[0] > shares[1] > shares[2]


def test_the_ring_of_a_voxel_is_where_its_centre_is():
    coords = torch.tensor([[0, 160, 160, 0], [0, 219, 160, 0], [0, 221, 160, 0], [0, 300, 160, 0]], dtype=torch.int32)
    places = voxel_places(coords, GRID)
    torch.testing.assert_close(places.range_m, torch.tensor([0.3536, 29.7511, 30.7510, 70.2504]), atol=1e-3, rtol=0)
    assert range_ring(places, (30.0, 50.0)).tolist() == [0, 0, 1, 2]


def test_radial_hides_sectors_without_gaps():
    coords = lidar_like([6000])
    places = voxel_places(coords, GRID)
    hidden = mask_of("radial", coords, 1, seed=5, sectors=12, target_ratio=0.5)
    ordered = hidden[places.azimuth_rad.argsort()]
    changes = int((ordered != ordered.roll(1)).sum())
    assert changes <= 2 * 7  # six sectors' worth of voxels: at most seven runs, of two ends each
    assert changes >= 2


def test_sectors_are_equal_angles_wherever_they_begin():
    angle = torch.linspace(-math.pi, math.pi, 721)[:-1]
    xyz = torch.stack([60 * angle.cos(), 60 * angle.sin(), torch.zeros(720)], 1)
    fine = VoxelGrid((-80.0, -80.0, -1.0), (80.0, 80.0, 1.0), (0.01, 0.01, 2.0))
    coords = assign_voxels(xyz, torch.zeros(720, dtype=torch.int64), 1, fine).coords
    order = radial_order(voxel_places(coords, fine), 1, 8, generator(1))
    assert order.floor().long().bincount(minlength=8).sub(90).abs().max() <= 2


def test_what_rounding_leaves_over_goes_to_the_classes_that_lost_most():
    size = torch.tensor([[3, 3, 4], [0, 0, 0], [1, 1, 1]])
    ratio = scaled_to(torch.full((3, 3), 0.5, dtype=torch.float64), size, 0.5)
    counts = matched_counts(size, ratio, 0.5)
    assert counts.sum(1).tolist() == [5, 0, 1]
    assert counts[0].tolist() == [2, 1, 2]
    assert (counts <= size).all()


def test_places_must_be_given_to_a_mask_that_looks_at_them():
    superclass = torch.zeros(4, dtype=torch.int64)
    for kind in ("block", "range_aware", "radial"):
        with pytest.raises(ConfigError, match="where the voxels are"):
            choose_hidden(None, superclass, superclass, 1, MaskConfig.from_tree({"kind": kind}), generator())


def test_rings_and_shares_must_fit():
    with pytest.raises(ConfigError, match="make one ring more"):
        MaskConfig.from_tree({"range_edges_m": [20.0]})
    with pytest.raises(ConfigError, match="ascend"):
        MaskConfig.from_tree({"range_edges_m": [50.0, 30.0]})


@pytest.mark.parametrize("kind", ["random", "block", "range_aware", "radial"])
def test_a_real_sweep_is_hidden_to_the_voxel(kind: str):
    folder = sample_path("nuscenes/mini_val_detection_eval/sweeps/LIDAR_TOP")
    sweep = sorted(folder.glob("*.pcd.bin"))[0]
    xyz = torch.frombuffer(bytearray(sweep.read_bytes()), dtype=torch.float32).view(-1, 5)[:, :3]
    coords = assign_voxels(xyz, torch.zeros(len(xyz), dtype=torch.int64), 1, GRID).coords
    hidden = mask_of(kind, coords, 1, target_ratio=0.6)
    assert int(hidden.sum()) == math.floor(0.6 * len(coords) + 1e-6)
