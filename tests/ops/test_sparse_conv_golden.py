"""Every sparse layer against MinkowskiEngine, compared by coordinate; another file of the same form is checked alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from picture3d.models.row_norm import RowBatchNorm
from picture3d.models.sparse_layers import ResidualBlock
from picture3d.ops.kernel_map import KernelMap, Triple, build_kernel_map, unique_coords
from picture3d.ops.quantize import Quantisation, continuous_cells, quantise_points
from picture3d.ops.sparse_conv import convolve_inference, sparse_conv, sparse_conv_reference
from tests.sample_data import golden_files

TOLERANCE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}  # float32 sums in another order
GRADIENT_TOLERANCE: dict[str, Any] = {"atol": 1e-4, "rtol": 1e-4}  # kernel gradients sum 428 rows and reach 50

Case = dict[str, np.ndarray]


def _cases(path: Path) -> dict[str, Case]:
    with np.load(path) as file:
        names = json.loads(str(file["manifest"]))["cases"]
        return {case: {n.split("__", 1)[1]: file[n] for n in file.files if n.split("__", 1)[0] == case} for case in names}


def _all_cases() -> list[Any]:
    params: list[Any] = []
    for param in golden_files("minkowski", "single_layers"):
        path = param.values[0]
        if path is None:
            params.append(pytest.param(None, {}, id=str(param.id), marks=param.marks))
            continue
        params += [pytest.param(name, case, id=f"{param.id}:{name}") for name, case in _cases(path).items()]
    return params


def _size(value: np.ndarray) -> int | Triple:
    return int(value) if value.ndim == 0 else tuple(int(v) for v in value)  # type: ignore[return-value]


def _tensor(case: Case, name: str) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(case[name]))


def _sorted_set(coords: np.ndarray) -> tuple[Tensor, Tensor]:
    """The set in our row order, and the permutation that brings the file's rows there."""
    unique, first, _ = unique_coords(torch.from_numpy(coords.astype(np.int32)))
    assert len(unique) == len(coords)
    return unique, first


def _layer_map(case: Case) -> tuple[KernelMap, Tensor, Tensor]:
    """The case's map, and the permutations of its input and output rows."""
    coords_in, order_in = _sorted_set(case["coords_in"])
    coords_out, order_out = _sorted_set(case["coords_out"])
    stride, unit = _size(case["stride"]), _size(case.get("tensor_stride_in", np.array(1)))
    if len(coords_out) > len(coords_in):  # transposed: the map of the strided layer that leads here, turned round
        assert isinstance(unit, int)
        assert isinstance(stride, int)
        down = build_kernel_map(coords_out, _size(case["kernel_size"]), stride=stride, tensor_stride=unit // stride)
        kmap = down.transposed()
    else:
        kmap = build_kernel_map(
            coords_in,
            _size(case["kernel_size"]),
            stride=stride,
            dilation=_size(case.get("dilation", np.array(1))),
            tensor_stride=unit,
        )
    assert torch.equal(kmap.in_coords, coords_in)
    assert torch.equal(kmap.out_coords, coords_out)
    return kmap, order_in, order_out


@pytest.mark.parametrize(("name", "case"), _all_cases())
def test_golden_layer(name: str, case: Case):
    match name:
        case _ if name.startswith("conv"):
            _check_convolution(case)
        case _ if name.startswith("grad_conv"):
            _check_gradients(case)
        case _ if name.startswith("batch_norm"):
            _check_batch_norm(case)
        case _ if name.startswith("cat"):
            joined = torch.cat([_tensor(case, "feats_a"), _tensor(case, "feats_b")], 1)
            assert_close(joined, _tensor(case, "feats_out"), rtol=0, atol=0)
        case _ if name.startswith("duplicates"):
            _check_duplicates(case)
        case _ if name.startswith("sparse_quantize"):
            _check_cells(case, Quantisation("cartesian", (1.0, 1.0, 1.0)))
        case _ if name.startswith("cylinder_quantize"):
            _check_cylinder(case)
        case _ if name.startswith("residual_block"):
            _check_residual_block(case)
        case _:
            pytest.fail(f"no check knows the case {name}")


def _check_convolution(case: Case) -> None:
    kmap, order_in, order_out = _layer_map(case)
    feats, kernel = _tensor(case, "feats_in")[order_in], _tensor(case, "kernel")
    bias = _tensor(case, "bias") if "bias" in case else None
    expected = _tensor(case, "feats_out")[order_out]
    for convolve in (sparse_conv, sparse_conv_reference, convolve_inference):
        assert_close(convolve(feats, kernel, kmap, bias), expected, **TOLERANCE, msg=lambda m, c=convolve: f"{c.__name__}: {m}")


def _check_gradients(case: Case) -> None:
    kmap, order_in, order_out = _layer_map(case)
    for convolve in (sparse_conv, sparse_conv_reference):
        feats = _tensor(case, "feats_in")[order_in].requires_grad_()
        kernel = _tensor(case, "kernel").requires_grad_()
        convolve(feats, kernel, kmap).backward(_tensor(case, "grad_out")[order_out])
        assert feats.grad is not None
        assert kernel.grad is not None
        assert_close(feats.grad, _tensor(case, "grad_feats_in")[order_in], **GRADIENT_TOLERANCE)
        assert_close(kernel.grad, _tensor(case, "grad_kernel"), **GRADIENT_TOLERANCE)


def _check_batch_norm(case: Case) -> None:
    norm = RowBatchNorm(case["weight"].shape[0], eps=float(case["eps"])).eval()
    keys = ("weight", "bias", "running_mean", "running_var")
    norm.load_state_dict({key: _tensor(case, key) for key in keys} | {"num_batches_tracked": torch.tensor(0)})
    # One channel has variance 1e-6 and values around 1,000: float32 itself rounds by 1e-4 there.
    assert_close(norm(_tensor(case, "feats_in")), _tensor(case, "feats_out"), atol=1e-5, rtol=1e-5)


def _check_duplicates(case: Case) -> None:
    coords, first, inverse = unique_coords(_tensor(case, "coords_in").int())
    # Ours are sorted, the file's are in order of first appearance: the kept rows say which is which.
    appearance = torch.argsort(first)
    assert torch.equal(first[appearance], _tensor(case, "unique_index"))
    assert torch.equal(coords[appearance], _tensor(case, "coords_out"))
    assert torch.equal(first[inverse], _tensor(case, "unique_index")[_tensor(case, "inverse")])
    assert_close(_tensor(case, "feats_in")[first[appearance]], _tensor(case, "feats_out"), rtol=0, atol=0)


def _check_cells(case: Case, value: Quantisation) -> None:
    cells = quantise_points(_tensor(case, "points"), value)
    # Ours are sorted, the file's are in order of first appearance: the representatives say which is which.
    appearance = torch.argsort(cells.representative)
    assert torch.equal(cells.cells[appearance], _tensor(case, "coords_out"))
    assert torch.equal(cells.representative[appearance], _tensor(case, "index"))
    assert torch.equal(cells.representative[cells.point_cell], _tensor(case, "index")[_tensor(case, "inverse")])


def _check_cylinder(case: Case) -> None:
    size = round(float(case["voxel_size"]), 6)
    value = Quantisation("cylindrical", (size, 1.0, size))
    assert_close(continuous_cells(_tensor(case, "points"), value), _tensor(case, "cyl"), atol=1e-4, rtol=1e-6)
    _check_cells(case, value)


def _check_residual_block(case: Case) -> None:
    coords, order = _sorted_set(case["coords_in"])
    state = {name.removeprefix("w."): _tensor(case, name) for name in case if name.startswith("w.")}
    kernel = state["conv1.kernel"]
    block = ResidualBlock(kernel.shape[1], kernel.shape[2]).eval()
    block.load_state_dict(state)
    out = block(_tensor(case, "feats_in")[order], build_kernel_map(coords, 3))
    assert_close(out, _tensor(case, "feats_out")[order], **TOLERANCE)
