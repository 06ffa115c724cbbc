from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from picture3d.ops.sets import Windows, full_sets, padded_sets, set_partition, set_runs, window_partition, window_places
from tests.sample_data import golden_files

# (grid, window, hybrid factor, offsets of the two shifts, set size) of each stage
WAYMO = [((468, 468, high), (12, 12, high), (2, 2, 1), ((0, 0, 0), (6, 6, 0)), 48) for high in (32, 8, 2, 1)]
NUSCENES = [((360, 360, 1), (30, 30, 1), (1, 1, 1), ((0, 0, 0), (15, 15, 0)), 90)]
SETTINGS = {"set_partition_pillar_nuscenes": NUSCENES, "set_partition_voxel_waymo": WAYMO}


def random_coords(count: int, shape: tuple[int, int, int], batch_size: int = 2, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    cells = batch_size * math.prod(shape)
    keys = np.sort(rng.choice(cells, size=min(count, cells), replace=False))
    return torch.from_numpy(np.stack(np.unravel_index(keys, (batch_size, *shape)), 1).astype(np.int32))


def sets_by_loop(windows: Windows, set_size: int) -> tuple[list[list[list[int]]], list[list[list[bool]]]]:
    """The definition, one window and one slot after the other."""
    voxel: list[list[list[int]]] = [[], []]
    repeated: list[list[list[bool]]] = [[], []]
    position = windows.position.tolist()
    for axis, key in enumerate([lambda p: (p[1], p[0], p[2]), lambda p: tuple(p)]):
        for window in sorted(set(windows.window.tolist())):
            members = (windows.window == window).nonzero().flatten().tolist()
            members.sort(key=lambda row: key(position[row]))
            sets = math.ceil(len(members) / set_size)
            slots = [members[math.floor(j * len(members) / (sets * set_size))] for j in range(sets * set_size)]
            for s in range(sets):
                mine = slots[s * set_size : (s + 1) * set_size]
                voxel[axis].append(mine)
                repeated[axis].append([j > 0 and mine[j] == mine[j - 1] for j in range(set_size)])
    return voxel, repeated


@pytest.mark.parametrize("path", [case for kind in SETTINGS for case in golden_files("openpcdet", kind)])
def test_golden_set_partitions_are_equal_bit_by_bit(path: Path):
    golden = np.load(path)
    stages = next(setting for kind, setting in SETTINGS.items() if path.stem.startswith(kind))
    for stage, (grid, window, factor, offsets, set_size) in enumerate(stages):
        coords = torch.from_numpy(golden[f"coords_stage{stage}"].astype(np.int32)[:, [0, 3, 2, 1]])
        for shift in (0, 1):
            name = f"stage{stage}_shift{shift}"
            x, y, z = (w * f for w, f in zip(window, factor if shift else (1, 1, 1), strict=True))
            windows = window_partition(coords, grid, (x, y, z), offsets[shift])
            assert np.array_equal(windows.window, golden[f"win_inds_{name}"]), name
            assert np.array_equal(windows.position[:, [2, 1, 0]], golden[f"coors_in_win_{name}"]), name
            padded = padded_sets(windows, set_size)
            assert np.array_equal(padded.voxel, golden[f"set_inds_{name}"]), name
            assert np.array_equal(np.packbits(padded.repeated.numpy(), axis=-1), golden[f"set_mask_{name}"]), name
            check_that_partition_and_padded_form_agree(windows, set_size)


def check_that_partition_and_padded_form_agree(windows: Windows, set_size: int) -> None:
    padded, partition = padded_sets(windows, set_size), set_partition(windows, set_size)
    first = ~padded.repeated
    for axis in (0, 1):
        assert torch.equal(padded.voxel[axis][first[axis]], partition.order[axis])
        assert torch.equal(first[axis].sum(1), partition.set_start[1:] - partition.set_start[:-1])


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(0, 150),
    window=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4)),
    offset=st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 2)),
    set_size=st.integers(1, 20),
    seed=st.integers(0, 99),
)
def test_padded_sets_equal_a_loop_over_windows_and_slots(count, window, offset, set_size, seed):
    shape = (11, 7, 4)
    windows = window_partition(random_coords(count, shape, seed=seed), shape, window, offset)
    voxel, repeated = sets_by_loop(windows, set_size)
    padded = padded_sets(windows, set_size)
    assert padded.voxel.tolist() == voxel
    assert padded.repeated.tolist() == repeated
    check_that_partition_and_padded_form_agree(windows, set_size)


@settings(max_examples=40, deadline=None)
@given(count=st.integers(0, 150), set_size=st.integers(1, 20), seed=st.integers(0, 99))
def test_full_sets_hold_every_set_once_and_whole(count, set_size, seed):
    windows = window_partition(random_coords(count, (11, 7, 4), seed=seed), (11, 7, 4), (4, 4, 4), (2, 2, 0))
    partition = set_partition(windows, set_size)
    full = full_sets(partition)
    assert full.spare.shape == (partition.num_sets, set_size)
    for axis in (0, 1):
        slots_of_all = full.voxel_of_slot[axis]
        assert torch.equal(slots_of_all[full.slot_of_voxel[axis]], torch.arange(partition.num_voxels))
        assert not full.spare.flatten()[full.slot_of_voxel[axis]].any()
        rows = zip(slots_of_all.view(-1, set_size), full.spare, strict=True)
        pieces = torch.tensor_split(partition.order[axis], partition.set_start[1:-1]) if count else ()
        assert [row[~spare].tolist() for row, spare in rows] == [piece.tolist() for piece in pieces]


def test_every_voxel_is_in_exactly_one_set_of_each_order_and_sets_are_not_too_long():
    partition = set_partition(window_partition(random_coords(900, (40, 40, 4)), (40, 40, 4), (12, 12, 4), (6, 6, 0)), 24)
    assert torch.equal(partition.order.sort(1).values, torch.arange(900).expand(2, -1))
    lengths = partition.set_start[1:] - partition.set_start[:-1]
    assert lengths.min() >= 1
    assert lengths.max() <= 24


def test_the_order_of_rows_does_not_change_the_sets():
    coords = random_coords(300, (20, 20, 4))
    shuffle = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    settings = ((20, 20, 4), (8, 8, 4), (4, 4, 0))
    one = padded_sets(window_partition(coords, *settings), 9)
    other = padded_sets(window_partition(coords[shuffle], *settings), 9)
    assert torch.equal(one.voxel, shuffle[other.voxel])


def test_a_window_with_one_voxel_is_a_set_that_repeats_it():
    windows = window_partition(torch.tensor([[0, 3, 4, 0]]), (8, 8, 1), (4, 4, 1), (0, 0, 0))
    assert windows.window.item() == (0 * 3 + 1) * 2 + 0  # (3 windows along x and y, 2 along z: one more than fit)
    padded = padded_sets(windows, 5)
    assert padded.voxel.tolist() == [[[0] * 5]] * 2
    assert padded.repeated.tolist() == [[[False, True, True, True, True]]] * 2
    assert set_partition(windows, 5).set_start.tolist() == [0, 1]


def test_seven_voxels_in_sets_of_four_are_four_and_three():
    # ranks floor(j * 7 / 8) = 0 0 1 2 | 3 4 5 6
    coords = torch.tensor([[0, 0, y, 0] for y in range(7)])
    windows = window_partition(coords, (8, 8, 1), (8, 8, 1), (0, 0, 0))
    assert padded_sets(windows, 4).voxel[1].tolist() == [[0, 0, 1, 2], [3, 4, 5, 6]]
    assert set_partition(windows, 4).set_start.tolist() == [0, 3, 7]


def test_the_offset_is_added_and_the_last_cell_has_a_window():
    windows = window_partition(torch.tensor([[1, 467, 467, 31]]), (468, 468, 32), (24, 24, 32), (6, 6, 5))
    assert windows.position.tolist() == [[473 % 24, 473 % 24, 31]]  # the z offset is dropped: one window spans the height
    across = math.ceil(468 / 24) + 1
    assert windows.window.item() == ((1 * across + 473 // 24) * across + 473 // 24) * 2


def test_samples_never_share_a_window():
    coords = torch.tensor([[0, 5, 5, 0], [1, 5, 5, 0]])
    assert set_partition(window_partition(coords, (8, 8, 1), (8, 8, 1), (4, 4, 0)), 10).num_sets == 2


def test_no_voxels_give_no_sets():
    windows = window_partition(torch.zeros(0, 4, dtype=torch.int32), (8, 8, 1), (4, 4, 1), (0, 0, 0))
    partition = set_partition(windows, 5)
    assert partition.num_sets == partition.num_voxels == 0
    assert padded_sets(windows, 5).voxel.shape == (2, 0, 5)
    assert full_sets(partition).slot_of_voxel.shape == (2, 0)


@pytest.mark.parametrize(
    ("count", "window"), [(400, (4, 4, 2)), (400, (9, 9, 4)), (3, (9, 9, 4)), (1, (2, 2, 1)), (0, (4, 4, 2))]
)
def test_places_are_the_different_positions_with_their_counts(count: int, window: tuple[int, int, int]):
    windows = window_partition(random_coords(count, (11, 7, 4)), (11, 7, 4), window, (3, 3, 0))
    places = window_places(windows)
    expected, row, counts = np.unique(windows.position.numpy(), axis=0, return_inverse=True, return_counts=True)
    assert np.array_equal(places.position, expected)
    assert places.place_of_voxel.tolist() == row.ravel().tolist()
    assert places.count.tolist() == counts.tolist()


@settings(max_examples=40, deadline=None)
@given(count=st.integers(0, 150), set_size=st.integers(1, 20), seed=st.integers(0, 99))
def test_runs_hold_every_set_once_and_whole(count, set_size, seed):
    windows = window_partition(random_coords(count, (11, 7, 4), seed=seed), (11, 7, 4), (4, 4, 4), (2, 2, 0))
    partition = set_partition(windows, set_size)
    runs = set_runs(partition)
    assert [length for _, length in runs.placed.blocks] == sorted({length for _, length in runs.placed.blocks})
    lengths = [length for sets, length in runs.placed.blocks for _ in range(sets)]
    for axis in (0, 1):
        assert torch.equal(runs.voxel_of_place[axis][runs.place_of_voxel[axis]], torch.arange(partition.num_voxels))
        found = [tuple(piece.tolist()) for piece in runs.voxel_of_place[axis].split(lengths)]
        pieces = [tuple(p.tolist()) for p in torch.tensor_split(partition.order[axis], partition.set_start[1:-1]) if len(p)]
        assert sorted(found) == sorted(pieces)
