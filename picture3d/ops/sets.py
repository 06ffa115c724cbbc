"""Windows over sparse voxels, and their partition into sets of bounded size ("rotated sets").

A window of n voxels is cut into ``ceil(n / set_size)`` sets of nearly equal length. A set is a run of neighbours in a
sorted order, so a permutation and the boundaries of its runs describe the whole partition; everything else is derived:
:func:`padded_sets` is the published form, :func:`set_runs` the layout without a spare slot and :func:`full_sets` the one
that needs no length on the host.

Source: "DSVT: Dynamic Sparse Voxel Transformer with Rotated Sets", CVPR 2023, section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Triple = tuple[int, int, int]

Y_FIRST, X_FIRST = 0, 1  # the two orders inside a window: (y, x, z) and (x, y, z)


@dataclass(frozen=True, slots=True, eq=False)
class Windows:
    """The window of every voxel, and its place in it. Windows never span two samples."""

    window: Tensor  # (N,) int64: ((batch * nx + ix) * ny + iy) * nz + iz
    position: Tensor  # (N, 3) float32, whole numbers: x, y, z inside the window, in cells
    size: Triple  # cells of a window along x, y, z


@dataclass(frozen=True, slots=True, eq=False)
class WindowPlaces:
    """The different positions that voxels have in their windows: never more than a window has cells."""

    position: Tensor  # (U, 3) float32: x, y, z, ascending
    count: Tensor  # (U,) int64 voxels there, at least 1
    place_of_voxel: Tensor  # (N,) int64


@dataclass(frozen=True, slots=True, eq=False)
class SetPartition:
    """Voxels in sets: set s holds the voxels ``order[axis, set_start[s] : set_start[s + 1]]``."""

    order: Tensor  # (2, N) int64: voxel rows, window by window; row 0 y-first, row 1 x-first inside a window
    set_start: Tensor  # (S + 1,) int64: where each set begins, and N; the same for both orders; no set is empty
    set_size: int  # most voxels a set may hold

    @property
    def num_sets(self) -> int:
        """Number of sets, S."""
        return self.set_start.shape[0] - 1

    @property
    def num_voxels(self) -> int:
        """Number of voxels, N."""
        return self.order.shape[1]


@dataclass(frozen=True, slots=True, eq=False)
class PaddedSets:
    """The published form: every set has `set_size` slots, and its voxels are repeated evenly to fill them."""

    voxel: Tensor  # (2, S, set_size) int64: voxel row in each slot; index 0 y-first, 1 x-first
    repeated: Tensor  # (2, S, set_size) bool: the slot holds the same voxel as the one before it in its set


@dataclass(frozen=True, slots=True, eq=False)
class FullSets:
    """The same sets with `set_size` slots each; every voxel has exactly one slot that counts.

    The slots left over at the end of a short set hold its last voxel again and are called spare. No length has to be known on
    the host.
    """

    voxel_of_slot: Tensor  # (2, S * set_size) int64: index 0 y-first, 1 x-first
    slot_of_voxel: Tensor  # (2, N) int64: the slot that counts
    spare: Tensor  # (S, set_size) bool, the same for both orders


@dataclass(frozen=True, slots=True, eq=False)
class PlacedRuns:
    """Sets of rows that already lie set by set, sets of equal length in one block."""

    blocks: tuple[tuple[int, int], ...]  # (sets, rows in each), one block after the other


@dataclass(frozen=True, slots=True, eq=False)
class SetRuns:
    """The same sets, sorted by their length: every voxel has one place, and sets of equal length form a block of the places.

    Nothing is repeated or spare, so both directions are permutations. The lengths have to be known on the host.
    """

    voxel_of_place: Tensor  # (2, N) int64: index 0 y-first, 1 x-first
    place_of_voxel: Tensor  # (2, N) int64: its inverse
    placed: PlacedRuns  # of the places, the same for both orders


SetLayout = PaddedSets | FullSets | SetRuns


def window_partition(coords: Tensor, grid_shape: Triple, window: Triple, offset: Triple) -> Windows:
    """Finds the window of every voxel. The offset is added to the cell index; it is dropped along z if a window spans the grid.

    Args:
        coords: (N, 4) int: batch, x, y, z.
        grid_shape: cells of the grid along x, y, z.
        window: cells of a window along x, y, z.
        offset: cells by which the voxels are moved before windows are cut.
    """
    return window_partitions(coords, grid_shape, [(window, offset)])[0]


def window_partitions(coords: Tensor, grid_shape: Triple, cuts: Sequence[tuple[Triple, Triple]]) -> tuple[Windows, ...]:
    """:func:`window_partition` for several pairs of window and offset at once."""
    device = coords.device
    cuts = [(window, (*offset[:2], 0 if window[2] == grid_shape[2] else offset[2])) for window, offset in cuts]
    # Cell numbers are far below 2**23, where a float32 quotient rounds down to the right integer; integer division is ten
    # times slower. Window ids are put together in float64, exact to 2**53. The batch index goes through as it is. All of it
    # column by column: operations on rows of four are several times slower.
    columns = torch.stack([column.float() for column in coords.unbind(1)])
    size = torch.tensor([(1, *window) for window, _ in cuts], dtype=torch.float32, device=device)[:, :, None]
    cells = columns + torch.tensor([(0, *offset) for _, offset in cuts], dtype=torch.float32, device=device)[:, :, None]
    index = (cells / size).floor_()
    counts = [[-(-cells // along) + 1 for cells, along in zip(grid_shape, window, strict=True)] for window, _ in cuts]
    id_of_index = torch.tensor([[x * y * z, y * z, z, 1] for x, y, z in counts], dtype=torch.float64, device=device)
    ids = torch.bmm(id_of_index[:, None], index.double()).squeeze(1).to(torch.int64)
    positions = cells.addcmul_(index, size, value=-1)[:, 1:].mT
    return tuple(Windows(*of) for of in zip(ids, positions, [window for window, _ in cuts], strict=True))


def window_places(windows: Windows) -> WindowPlaces:
    """Finds the positions that occur."""
    wx, wy, wz = windows.size
    device = windows.window.device
    places = torch.tensor([wy * wz, wz, 1], dtype=torch.float64, device=device)
    key = (places @ windows.position.T.double()).to(torch.int64)
    if wx * wy * wz <= 4 * len(key):  # a window larger than the sweep is not written out
        in_cell = torch.bincount(key, minlength=wx * wy * wz)
        cell = in_cell.nonzero().squeeze(1)
        count = in_cell.index_select(0, cell)
        place = torch.empty_like(in_cell).index_copy_(0, cell, torch.arange(len(cell), device=device)).index_select(0, key)
    else:
        cell, place, count = torch.unique(key, return_inverse=True, return_counts=True)
    column, z = cell // wz, cell % wz
    return WindowPlaces(torch.stack([column // wy, column % wy, z], 1).float(), count, place)


def set_partition(windows: Windows, set_size: int) -> SetPartition:
    """Cuts every window into sets of at most `set_size` voxels, listed window by window in ascending window id.

    A window of n voxels gives S = ceil(n / set_size) sets; set s takes the ranks ``floor(s n / S) .. floor((s + 1) n / S) - 1``
    of the window's order. No window is empty, so neither is any set.
    """
    num_voxels, device = len(windows.window), windows.window.device
    wx, wy, wz = windows.size
    bits = (wx * wy * wz - 1).bit_length()
    # Where a voxel comes in its window: y-first in the upper row, x-first in the lower one.
    places = torch.tensor([[wz, wx * wz, 1], [wy * wz, wz, 1]], dtype=torch.float64, device=device)
    keys = (places @ windows.position.T.double()).to(torch.int64).add_(windows.window << bits)
    order = _ascending(keys)
    _, voxels_in = torch.unique_consecutive(windows.window.index_select(0, order[X_FIRST]), return_counts=True)
    sets_in = (voxels_in + set_size - 1) // set_size
    window_of_set = torch.repeat_interleave(sets_in)
    before = sets_in.cumsum(0) - sets_in
    rank = torch.arange(window_of_set.shape[0], device=device) - before.index_select(0, window_of_set)
    first_voxel = (voxels_in.cumsum(0) - voxels_in).index_select(0, window_of_set)
    start = first_voxel + rank * voxels_in.index_select(0, window_of_set) // sets_in.index_select(0, window_of_set)
    return SetPartition(order, torch.cat([start, start.new_tensor([num_voxels])]), set_size)


def _ascending(keys: Tensor) -> Tensor:
    """Places of (..., N) integer keys in ascending order along the last axis; equal keys keep their order.

    On a CPU by numpy's stable sort, which merges the runs that are there already. Voxels come sorted by x, y, z, and in both
    orders keys grow along each row of cells: it takes a fifth of the time of a sort from nothing.
    """
    if keys.is_cuda:
        return torch.argsort(keys, dim=-1, stable=True)
    return torch.from_numpy(np.argsort(keys.numpy(), axis=-1, kind="stable"))


def padded_sets(windows: Windows, set_size: int) -> PaddedSets:
    """The partition as published, straight from its definition: slot j of a window takes the voxel of rank floor(j n / (S t)).

    It is the readable twin of :func:`set_partition`; both describe the same sets.
    """
    x, y, z = windows.position.to(torch.int64).unbind(1)
    wx, wy, wz = windows.size
    _, dense, voxels_in = torch.unique(windows.window, return_inverse=True, return_counts=True)
    sets_in = (voxels_in + set_size - 1) // set_size
    slots_in = sets_in * set_size
    window_of_slot = torch.repeat_interleave(slots_in)
    slot = torch.arange(window_of_slot.shape[0], device=x.device) - (slots_in.cumsum(0) - slots_in)[window_of_slot]
    # In integers: exact, and equal to the float64 quotient as long as n * slots stays below 2**53.
    rank = (voxels_in.cumsum(0) - voxels_in)[window_of_slot] + slot * voxels_in[window_of_slot] // slots_in[window_of_slot]
    orders = [((dense * wy + y) * wx + x) * wz + z, ((dense * wx + x) * wy + y) * wz + z]
    voxel = torch.stack([torch.argsort(key)[rank] for key in orders]).view(2, -1, set_size)
    repeated = torch.zeros_like(voxel, dtype=torch.bool)
    repeated[:, :, 1:] = voxel[:, :, 1:] == voxel[:, :, :-1]
    return PaddedSets(voxel, repeated)


def set_runs(partition: SetPartition) -> SetRuns:
    """Sorts the sets by their length; sets of equal length stay in their order."""
    start, num_voxels = partition.set_start, partition.num_voxels
    length = start[1:] - start[:-1]
    by_length = _ascending(length)
    ordered = length.index_select(0, by_length)
    moved = start[:-1].index_select(0, by_length) - (ordered.cumsum(0) - ordered)
    rank_of_place = torch.repeat_interleave(moved, ordered, output_size=num_voxels)
    rank_of_place += torch.arange(num_voxels, device=start.device)
    voxel_of_place = partition.order.gather(1, rank_of_place.expand(2, -1))
    places = torch.arange(num_voxels, device=start.device).expand(2, -1)
    return SetRuns(
        voxel_of_place=voxel_of_place,
        place_of_voxel=torch.empty_like(voxel_of_place).scatter_(1, voxel_of_place, places),
        placed=PlacedRuns(tuple((sets, voxels) for voxels, sets in enumerate(torch.bincount(ordered).tolist()) if sets)),
    )


def full_sets(partition: SetPartition) -> FullSets:
    """Gives every set `set_size` slots."""
    start, size, device = partition.set_start, partition.set_size, partition.order.device
    length = start[1:] - start[:-1]
    column = torch.arange(size, device=device)
    rank_of_slot = start[:-1, None] + torch.minimum(column, length[:, None] - 1)
    set_of_rank = torch.repeat_interleave(length, output_size=partition.num_voxels)
    rank = torch.arange(partition.num_voxels, device=device)
    slot_of_rank = (rank - start[set_of_rank] + set_of_rank * size).expand(2, -1)
    return FullSets(
        voxel_of_slot=partition.order[:, rank_of_slot.flatten()],
        slot_of_voxel=torch.empty_like(partition.order).scatter_(1, partition.order, slot_of_rank),
        spare=column >= length[:, None],
    )
