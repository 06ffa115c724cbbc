"""Sparse convolution over a kernel map, forward and backward: gather, matrix product, add, one kernel offset at a time.

A LiDAR sweep fills about 3 of 27 neighbours, so nothing is ever gathered for empty ones, and the offset under which a voxel
meets itself needs no gather at all. Within an offset every output row occurs at most once and offsets are added in ascending
order: the sum does not depend on the number of threads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from picture3d.ops.kernel_map import KernelMap


def sparse_conv(feats: Tensor, kernel: Tensor, kmap: KernelMap, bias: Tensor | None = None) -> Tensor:
    """``out[o] = sum over pairs (i, o, k) of feats[i] @ kernel[k]``, plus bias.

    Args:
        feats: (N, Cin) float.
        kernel: (K, Cin, Cout), or (Cin, Cout) for a kernel of one cell and stride 1.
        kmap: which rows meet; K offsets, N inputs.
        bias: (Cout,) or (1, Cout).

    Returns:
        (M, Cout) in the dtype of the products (autocast applies).

    Raises:
        ValueError: naming the argument whose shape does not fit.
    """
    kernel = kernel.unsqueeze(0) if kernel.ndim == 2 else kernel
    if kernel.ndim != 3 or len(kernel) != kmap.num_offsets:
        raise ValueError(f"kernel must be ({kmap.num_offsets}, Cin, Cout) for this map, got {tuple(kernel.shape)}")
    if feats.ndim != 2 or feats.shape[1] != kernel.shape[1]:
        raise ValueError(f"feats must be (N, {kernel.shape[1]}) for this kernel, got {tuple(feats.shape)}")
    if len(feats) != kmap.num_in:
        raise ValueError(f"feats has {len(feats)} rows, the map was built for {kmap.num_in}")
    device = feats.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        feats, kernel = feats.to(dtype), kernel.to(dtype)
    out = _SparseConv.apply(feats, kernel, kmap)
    assert isinstance(out, Tensor)
    return out if bias is None else out + bias.reshape(1, -1)


def sparse_conv_reference(feats: Tensor, kernel: Tensor, kmap: KernelMap, bias: Tensor | None = None) -> Tensor:
    """The same in plain PyTorch, differentiated by autograd: the readable twin and the oracle of the tests."""
    kernel = kernel.unsqueeze(0) if kernel.ndim == 2 else kernel
    out = feats.new_zeros((kmap.num_out, kernel.shape[2]))
    for k in range(kmap.num_offsets):
        in_rows, out_rows = kmap.pairs(k)
        out = out.index_add(0, out_rows, feats[in_rows] @ kernel[k])
    return out if bias is None else out + bias.reshape(1, -1)


class _SparseConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, feats: Tensor, kernel: Tensor, kmap: KernelMap) -> Tensor:
        ctx.save_for_backward(feats, kernel)
        ctx.kmap = kmap
        return _apply(feats, kernel, kmap)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        feats, kernel = ctx.saved_tensors
        kmap: KernelMap = ctx.kmap
        grad = grads[0].contiguous()
        grad_feats = grad_kernel = None
        if ctx.needs_input_grad[0]:
            grad_feats = _apply(grad, kernel.transpose(1, 2), kmap.transposed)
        if ctx.needs_input_grad[1]:
            grad_kernel = torch.empty_like(kernel)
            for k in range(kmap.num_offsets):
                if k == kmap.identity:
                    torch.mm(feats.t(), grad, out=grad_kernel[k])
                else:
                    in_rows, out_rows = kmap.pairs(k)
                    torch.mm(feats[in_rows].t(), grad[out_rows], out=grad_kernel[k])
        return grad_feats, grad_kernel, None


def _apply(feats: Tensor, kernel: Tensor, kmap: KernelMap) -> Tensor:
    # The identity offset first, so that its product is the buffer the others are added to.
    out = feats @ kernel[kmap.identity] if kmap.identity is not None else feats.new_zeros((kmap.num_out, kernel.shape[2]))
    for k in range(kmap.num_offsets):
        if k == kmap.identity or kmap.starts[k] == kmap.starts[k + 1]:
            continue
        in_rows, out_rows = kmap.pairs(k)
        out.index_add_(0, out_rows, feats.index_select(0, in_rows) @ kernel[k])
    return out
