"""Sparse convolution and its maps against dense convolution, finite differences and a plain twin."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from picture3d.ops.kernel_map import build_kernel_map, unique_coords
from picture3d.ops.quantize import Quantisation, quantise_points
from picture3d.ops.sparse_conv import convolve_inference, sparse_conv, sparse_conv_reference


def _rows(coords: Tensor) -> list[tuple[int, ...]]:
    return [tuple(row) for row in coords.tolist()]


def _random_cells(seed: int, density: float = 0.3, shape=(5, 7, 9), samples: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand((samples, *shape), generator=generator) < density).nonzero().to(torch.int32)


@pytest.mark.parametrize("size", [(3, 3, 3), (1, 3, 5), (5, 1, 3)])
def test_submanifold_convolution_equals_dense_convolution_on_occupied_cells(size):
    coords = _random_cells(0)
    generator = torch.Generator().manual_seed(1)
    feats = torch.randn(len(coords), 4, generator=generator, dtype=torch.float64)
    kernel = torch.randn(size[0] * size[1] * size[2], 4, 3, generator=generator, dtype=torch.float64)
    dense_in = torch.zeros(2, 4, 5, 7, 9, dtype=torch.float64)
    b, x, y, z = coords.long().unbind(1)
    dense_in[b, :, x, y, z] = feats
    # Kernel rows run x fastest: (z, y, x) after a reshape, turned to conv3d's (x, y, z).
    dense_kernel = kernel.reshape(size[2], size[1], size[0], 4, 3).permute(4, 3, 2, 1, 0)
    padding = [s // 2 for s in size]
    expected = F.conv3d(dense_in, dense_kernel, padding=padding)[b, :, x, y, z]
    found = sparse_conv(feats, kernel, build_kernel_map(coords, size))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


def test_strided_and_transposed_convolution_equal_dense_ones():
    coords = _random_cells(3, shape=(6, 8, 4), samples=1)
    feats = torch.randn(len(coords), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kernel = torch.randn(8, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    kmap = build_kernel_map(coords, 2, stride=2)
    coarse = kmap.out_coords
    b, x, y, z = coords.long().unbind(1)
    dense = torch.zeros(1, 3, 6, 8, 4, dtype=torch.float64)
    dense[b, :, x, y, z] = feats
    dense_kernel = kernel.reshape(2, 2, 2, 3, 5).permute(4, 3, 2, 1, 0)
    cb, cx, cy, cz = coarse.long().unbind(1)
    expected = F.conv3d(dense, dense_kernel, stride=2)[cb, :, cx // 2, cy // 2, cz // 2]
    found = sparse_conv(feats, kernel, kmap)
    torch.testing.assert_close(found, expected)
    back = torch.randn(8, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    dense_coarse = torch.zeros(1, 5, 3, 4, 2, dtype=torch.float64)
    dense_coarse[cb, :, cx // 2, cy // 2, cz // 2] = found
    expected = F.conv_transpose3d(dense_coarse, back.reshape(2, 2, 2, 5, 3).permute(3, 4, 2, 1, 0), stride=2)[b, :, x, y, z]
    torch.testing.assert_close(sparse_conv(found, back, kmap.transposed()), expected)


# Up to 128 columns the layer is one wide product, above it one product per offset: both sides are checked.
@pytest.mark.parametrize("channels", [2, 5])
@pytest.mark.parametrize("layer", ["submanifold", "strided", "transposed", "overlapping strided"])
def test_gradients_pass_the_finite_difference_check(layer: str, channels: int):
    coords = _random_cells(5, density=0.5, shape=(2, 3, 2), samples=1)
    size, stride = {"submanifold": (3, 1), "overlapping strided": (3, 2)}.get(layer, (2, 2))
    kmap = build_kernel_map(coords, size, stride=stride)
    if layer == "transposed":
        kmap = kmap.transposed()
    generator = torch.Generator().manual_seed(0)
    feats = torch.randn(kmap.num_in, channels, dtype=torch.float64, generator=generator).requires_grad_()
    kernel = torch.randn(size**3, channels, 2, dtype=torch.float64, generator=generator).requires_grad_()
    bias = torch.randn(1, 2, dtype=torch.float64, generator=generator).requires_grad_()
    assert torch.autograd.gradcheck(lambda f, k, b: sparse_conv(f, k, kmap, b), (feats, kernel, bias))


def test_fast_form_equals_its_readable_twin_with_gradients():
    coords = _random_cells(7)
    kmap = build_kernel_map(coords, 3)
    leaves = []
    for conv in (sparse_conv, sparse_conv_reference):
        generator = torch.Generator().manual_seed(0)
        feats = torch.randn(len(coords), 6, generator=generator).requires_grad_()
        kernel = torch.randn(27, 6, 4, generator=generator).requires_grad_()
        out = conv(feats, kernel, kmap)
        out.square().sum().backward()
        leaves.append((out, feats.grad, kernel.grad))
    for fast, plain in zip(*leaves, strict=True):
        torch.testing.assert_close(fast, plain, atol=1e-4, rtol=1e-5)


def test_order_of_rows_changes_nothing_but_the_order_of_rows():
    coords = _random_cells(11)
    feats = torch.randn(len(coords), 3, generator=torch.Generator().manual_seed(0))
    kernel = torch.randn(27, 3, 2, generator=torch.Generator().manual_seed(1))
    order = torch.randperm(len(coords), generator=torch.Generator().manual_seed(2))
    plain = sparse_conv(feats, kernel, build_kernel_map(coords, 3))
    shuffled, first, _ = unique_coords(coords[order])
    again = sparse_conv(feats[order][first], kernel, build_kernel_map(shuffled, 3))
    torch.testing.assert_close(again, plain)


def test_negative_coordinates_floor_towards_minus_infinity():
    coords = torch.tensor([[0, -1, -2, -3], [0, 0, 1, 2], [1, -5, 4, 0]], dtype=torch.int32)
    kmap = build_kernel_map(coords, 2, stride=2)
    coarse = kmap.out_coords
    assert _rows(coarse) == [(0, -2, -2, -4), (0, 0, 0, 2), (1, -6, 4, 0)]
    # Place below the parent: (1, 0, 1) -> 1 + 4, (0, 1, 0) -> 2, (1, 0, 0) -> 1.
    assert list(kmap.counts) == [0, 1, 1, 0, 0, 1, 0, 0]


def test_samples_never_meet_and_rows_never_wrap_into_the_next_row():
    coords = torch.tensor([[0, 0, 0, 9], [0, 0, 1, 0], [1, 0, 0, 9]], dtype=torch.int32)
    assert build_kernel_map(coords, 3).num_pairs == 3  # each only with itself


def test_a_kernel_wider_than_the_cloud_finds_every_neighbour_once():
    coords = torch.tensor([[0, 0, 0, 0], [0, 2, 0, 0]])
    kmap = build_kernel_map(coords, 9)
    assert kmap.num_pairs == 4


def test_empty_and_single_voxels():
    kernel = torch.randn(27, 2, 3)
    empty = torch.zeros((0, 4), dtype=torch.int32)
    assert sparse_conv(torch.zeros(0, 2), kernel, build_kernel_map(empty, 3)).shape == (0, 3)
    assert build_kernel_map(empty, 2, stride=2).out_coords.shape == (0, 4)
    one = torch.tensor([[3, 5, -7, 11]], dtype=torch.int32)
    feats = torch.randn(1, 2)
    torch.testing.assert_close(sparse_conv(feats, kernel, build_kernel_map(one, 3)), feats @ kernel[13])


def test_errors_name_the_argument():
    coords = torch.zeros((1, 4), dtype=torch.int32)
    kmap = build_kernel_map(coords, 3)
    with pytest.raises(ValueError, match=r"coords must be \(M, 4\)"):
        build_kernel_map(torch.zeros((1, 3), dtype=torch.int32), 3)
    with pytest.raises(ValueError, match="coords must be"):
        build_kernel_map(torch.zeros((1, 4)), 3)
    with pytest.raises(ValueError, match="kernel must be"):
        sparse_conv(torch.zeros(1, 2), torch.zeros(8, 2, 2), kmap)
    with pytest.raises(ValueError, match="feats must be"):
        sparse_conv(torch.zeros(2, 2), torch.zeros(27, 2, 2), kmap)
    far = torch.tensor([[0, -(2**30), -(2**30), -(2**30)], [0, 2**30, 2**30, 2**30]])
    with pytest.raises(ValueError, match="64-bit key"):
        build_kernel_map(far, 3)


def test_coordinates_far_from_zero_are_numbered_exactly():
    # Three axes of 2**20 cells fill 60 of the key's 63 bits, offsets by int32's own limit included.
    edge = 2**31 - 2
    coords = torch.tensor(
        [[0, -edge, -edge, -edge], [0, -edge, -edge, 1 - edge], [0, 2**20 - edge, 2**20 - edge, 2**20 - edge]],
        dtype=torch.int64,
    )
    kmap = build_kernel_map(coords, 3)
    assert kmap.num_pairs == 5
    assert _rows(build_kernel_map(coords, 2, stride=2).out_coords) == [
        (0, -edge, -edge, -edge),
        (0, 2**20 - edge, 2**20 - edge, 2**20 - edge),
    ]


def test_rows_that_repeat_or_are_not_sorted_are_refused_and_can_be_mended():
    coords = torch.tensor([[0, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]])
    with pytest.raises(ValueError, match="coords must be unique and sorted"):
        build_kernel_map(coords, 3)
    with pytest.raises(ValueError, match="coords must be unique and sorted"):
        build_kernel_map(coords, 2, stride=2)
    unique, first, inverse = unique_coords(coords)
    assert _rows(unique) == [(0, 0, 0, 0), (0, 1, 0, 0)]
    assert first.tolist() == [1, 0]  # of equal rows the first one stays
    assert inverse.tolist() == [1, 0, 1]
    assert build_kernel_map(unique, 3).num_pairs == 4


def test_the_same_call_gives_the_same_bits():
    coords = _random_cells(17, density=0.5)
    kmap = build_kernel_map(coords, 3)
    generator = torch.Generator().manual_seed(0)
    feats, kernel = torch.randn(len(coords), 32, generator=generator), torch.randn(27, 32, 16, generator=generator)
    results = []
    for _ in range(2):
        f, k = feats.clone().requires_grad_(), kernel.clone().requires_grad_()
        out = sparse_conv(f, k, kmap)
        out.square().sum().backward()
        results.append((out, f.grad, k.grad))
    for first, second in zip(*results, strict=True):
        assert first is not None
        assert torch.equal(first, second)


@pytest.mark.parametrize("channels", [2, 8])
@pytest.mark.parametrize(("size", "stride"), [(3, 1), (2, 2)])
def test_inference_form_adds_in_place_and_cuts_off(size: int, stride: int, channels: int):
    kmap = build_kernel_map(_random_cells(19), size, stride=stride)
    for used in (kmap, kmap.transposed()):
        generator = torch.Generator().manual_seed(0)
        feats = torch.randn(used.num_in, channels, generator=generator)
        kernel, bias = torch.randn(size**3, channels, 6, generator=generator), torch.randn(1, 6, generator=generator)
        shortcut = torch.randn(used.num_out, 6, generator=generator)
        expected = torch.relu(sparse_conv_reference(feats, kernel, used, bias) + shortcut)
        found = convolve_inference(feats, kernel, used, bias, onto=shortcut.clone(), relu=True)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        half = convolve_inference(
            feats.bfloat16(), kernel.bfloat16(), used, bias.bfloat16(), onto=shortcut.bfloat16(), relu=True
        ).float()
        assert F.cosine_similarity(half.flatten(), expected.flatten(), dim=0) > 0.999


@pytest.mark.long
def test_five_million_voxels_are_numbered_without_overflow():
    x, y = torch.meshgrid(torch.arange(2500), torch.arange(2000), indexing="ij")
    coords = torch.stack([torch.zeros_like(x), x, y, (x + y) % 2], -1).reshape(-1, 4)  # a sheet of two heights
    kmap = build_kernel_map(coords, 3)
    # Every voxel sees the whole 3x3 of its neighbours, at most one of them per column.
    assert kmap.num_pairs == (3 * 2500 - 2) * (3 * 2000 - 2)
    out = sparse_conv(torch.ones(len(coords), 1), torch.ones(27, 1, 1), kmap)
    assert int(out.double().sum()) == kmap.num_pairs


def test_half_precision_and_non_contiguous_features():
    coords = _random_cells(13)
    kmap = build_kernel_map(coords, 3)
    feats = torch.randn(len(coords), 8)[:, ::2]
    kernel = torch.randn(27, 4, 3)
    exact = sparse_conv(feats, kernel, kmap)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = sparse_conv(feats, kernel, kmap)
    assert half.dtype == torch.bfloat16
    assert F.cosine_similarity(half.float().flatten(), exact.flatten(), dim=0) > 0.999


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_and_kernels_in_other_strides_without_autocast(dtype: torch.dtype):
    coords = _random_cells(14)
    kmap = build_kernel_map(coords, 3)
    feats = torch.randn(4, len(coords), generator=torch.Generator().manual_seed(0)).to(dtype).T
    kernel = torch.randn(27, 3, 4, generator=torch.Generator().manual_seed(1)).to(dtype).transpose(1, 2)
    exact = sparse_conv_reference(feats.double(), kernel.double(), kmap)
    for out in (sparse_conv(feats, kernel, kmap), convolve_inference(feats, kernel, kmap)):
        assert out.dtype == dtype
        assert F.cosine_similarity(out.double().flatten(), exact.flatten(), dim=0) > 0.9999


def test_an_empty_sample_in_a_batch_leaves_the_others_as_they_are():
    coords = _random_cells(15, samples=1)
    batch = torch.cat([coords, coords + torch.tensor([2, 0, 0, 0], dtype=torch.int32)])  # sample 1 has no voxel
    feats = torch.randn(len(coords), 3, generator=torch.Generator().manual_seed(0))
    for size, stride in ((3, 1), (2, 2), (3, 2)):
        kernel = torch.randn(size**3, 3, 2, generator=torch.Generator().manual_seed(1))
        alone = sparse_conv(feats, kernel, build_kernel_map(coords, size, stride=stride))
        kmap = build_kernel_map(batch, size, stride=stride)
        assert sorted(set(kmap.out_coords[:, 0].tolist())) == [0, 2]
        torch.testing.assert_close(sparse_conv(feats.repeat(2, 1), kernel, kmap), alone.repeat(2, 1))


def test_a_kernel_wider_than_the_grid_reaches_every_voxel_of_its_sample():
    coords = _random_cells(16, shape=(2, 3, 2))
    feats = torch.randn(len(coords), 2, generator=torch.Generator().manual_seed(0))
    kmap = build_kernel_map(coords, 7)
    sums = torch.zeros(2, 2).index_add_(0, coords[:, 0].long(), feats)
    out = sparse_conv(feats, torch.eye(2).expand(343, 2, 2), kmap)
    torch.testing.assert_close(out, sums[coords[:, 0].long()])


def test_quantisation_does_not_depend_on_the_order_of_points():
    points = torch.randn(500, 3, generator=torch.Generator().manual_seed(0)) * 20
    order = torch.randperm(500, generator=torch.Generator().manual_seed(1))
    a, b = quantise_points(points, Quantisation()), quantise_points(points[order], Quantisation())
    assert torch.equal(a.cells, b.cells)
    assert torch.equal(a.point_cell[order], b.point_cell)


def test_points_that_are_not_finite_lie_in_no_cell():
    points = torch.tensor([[0.0, 0.0, 0.0], [float("nan"), 0.0, 0.0], [float("inf"), 1.0, 1.0]])
    found = quantise_points(points, Quantisation("cartesian", (1.0, 1.0, 1.0)))
    assert found.point_cell.tolist() == [0, -1, -1]
    assert quantise_points(points[1:], Quantisation()).cells.shape == (0, 3)


def test_quantisation_survives_json():
    from dataclasses import asdict

    quantisation = Quantisation("cartesian", (0.2, 0.2, 0.2))
    assert Quantisation(**json.loads(json.dumps(asdict(quantisation)))) == quantisation
