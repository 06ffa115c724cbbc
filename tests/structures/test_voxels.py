from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from picture3d.errors import ConfigError
from picture3d.structures.voxels import SparseVoxels, VoxelGrid, voxel_keys


def test_a_grid_counts_its_cells():
    assert VoxelGrid((-74.88, -74.88, -2.0), (74.88, 74.88, 4.0), (0.32, 0.32, 0.1875)).shape == (468, 468, 32)
    assert VoxelGrid((-54.0, -54.0, -5.0), (54.0, 54.0, 3.0), (0.3, 0.3, 8.0)).shape == (360, 360, 1)


def test_a_grid_that_does_not_divide_says_what_would_fit():
    with pytest.raises(ConfigError, match=r"y from -51\.2 to 51\.2 m is 341\.333 cells of 0\.3 m.*Set range_max y = 51\.1"):
        VoxelGrid((-48.0, -51.2, -5.0), (48.0, 51.2, 3.0), (0.3, 0.3, 8.0))


@pytest.mark.parametrize(
    ("high", "size"), [(1.0, 0.0), (1.0, -0.5), (-1.0, 0.5), (0.0, 0.5), (1.0, 10.0), (float("nan"), 0.5), (1.0, float("nan"))]
)
def test_a_grid_without_a_cell_is_refused(high, size):
    with pytest.raises(ConfigError, match=r"z from 0\.0 to .* holds no cell"):
        VoxelGrid((0.0, 0.0, 0.0), (1.0, 1.0, high), (0.5, 0.5, size))


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_keys_order_cells_as_their_coordinates_do(data):
    shape = data.draw(st.tuples(*[st.integers(1, 500)] * 3))
    x, y, z = shape
    cell = st.tuples(st.integers(0, 5), st.integers(0, x - 1), st.integers(0, y - 1), st.integers(0, z - 1))
    cells = data.draw(st.lists(cell, max_size=20))
    keys = voxel_keys(torch.tensor(cells, dtype=torch.int32).reshape(-1, 4), shape)
    assert keys.dtype == torch.int64
    by_key = [cells[i] for i in torch.argsort(keys, stable=True).tolist()]
    assert by_key == sorted(cells)
    assert len(set(keys.tolist())) == len(set(cells))


def test_keys_do_not_overflow_where_int32_would():
    shape = (1440, 1440, 40)
    key = voxel_keys(torch.tensor([[63, 1439, 1439, 39]], dtype=torch.int32), shape)
    assert key.item() == 64 * 1440 * 1440 * 40 - 1


def test_selected_voxels_keep_their_grid():
    voxels = SparseVoxels(torch.tensor([[0, 0, 0, 0], [1, 1, 1, 0]], dtype=torch.int32), torch.eye(2), (2, 2, 1), 2)
    chosen = voxels.select(torch.tensor([False, True]))
    assert (len(chosen), chosen.shape, chosen.batch_size) == (1, (2, 2, 1), 2)
    assert chosen.with_feats(torch.zeros(1, 5)).coords is chosen.coords
