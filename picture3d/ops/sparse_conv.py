"""Sparse convolution over a kernel map: ``out[o] = sum_k feats[i] @ kernel[k]`` over the pairs (i, o) of each offset k.

`sparse_conv` is the fast path: per offset, in blocks that stay in cache, gather, multiply, add in place; the centre of a
submanifold kernel is one plain product without a gather. `sparse_conv_reference` is its readable twin, differentiated by
autograd. Both add the offsets in a fixed order, and no offset reaches an output row twice, so results repeat bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from picture3d.ops.kernel_map import KernelMap

# Gathered rows and their products together: small enough for a core's own cache.
_BLOCK_BYTES = 1 << 20
# Up to this many columns, one product with all offsets side by side beats many thin ones (the one-channel stem).
_SIDE_BY_SIDE_COLUMNS = 128


def sparse_conv(feats: Tensor, kernel: Tensor, kmap: KernelMap, bias: Tensor | None = None) -> Tensor:
    """Convolves features over the pairs of a kernel map.

    Half-precision inputs, and autocast, multiply in half precision and add up in float32.

    Args:
        feats: (M_in, C_in) float, rows in the order of ``kmap.in_coords``.
        kernel: (K, C_in, C_out), or (C_in, C_out) where K is 1.
        kmap: from :func:`picture3d.ops.kernel_map.build_kernel_map`.
        bias: (1, C_out) or (C_out,), added to every output row.

    Returns:
        (M_out, C_out) in the dtype of `feats` (of autocast where that is on). Once differentiable.

    Raises:
        ValueError: naming the argument whose shape, dtype or device does not fit.
    """
    kernel = _checked_kernel(feats, kernel, kmap, bias)
    device = feats.device.type
    if torch.is_autocast_enabled(device) and feats.dtype != torch.float64:
        half = torch.get_autocast_dtype(device)
        feats, kernel = feats.to(half), kernel.to(half)
        bias = None if bias is None else bias.to(half)
    with torch.autocast(device, enabled=False):
        out = _SparseConv.apply(feats, kernel, kmap)
        return out if bias is None else out + bias


def sparse_conv_reference(feats: Tensor, kernel: Tensor, kmap: KernelMap, bias: Tensor | None = None) -> Tensor:
    """The same, said plainly; arguments, result and errors as :func:`sparse_conv`, without autocast."""
    kernel = _checked_kernel(feats, kernel, kmap, bias)
    out = feats.new_zeros(kmap.num_out, kernel.shape[2])
    for k in range(kmap.volume):
        in_rows, out_rows = kmap.pairs(k)
        out = out.index_add(0, out_rows, feats[in_rows] @ kernel[k])
    return out if bias is None else out + bias


def convolve_inference(
    feats: Tensor,
    kernel: Tensor,
    kmap: KernelMap,
    bias: Tensor | None = None,
    *,
    onto: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """A convolution with what usually follows it, in as few passes over memory as possible. Nothing is differentiated.

    Args:
        feats: as :func:`sparse_conv`.
        kernel: as :func:`sparse_conv`.
        kmap: as :func:`sparse_conv`.
        bias: as :func:`sparse_conv`.
        onto: (M_out, C_out) sum to which the result is added, where possible in place: do not use it afterwards.
        relu: cut negative values off.

    Returns:
        (M_out, C_out) in the dtype of `feats`. Autocast does not act here: convert features and kernel instead.
    """
    kernel = _checked_kernel(feats, kernel, kmap, bias)
    start = None if bias is None else bias.reshape(1, -1).to(feats.dtype)
    if onto is not None:
        start = onto if start is None else onto.add_(start)
    with torch.autocast(feats.device.type, enabled=False):
        out = _convolve(feats, kernel, kmap, start, in_place=onto is not None)
    return out.relu_() if relu else out


class _SparseConv(Function):
    @staticmethod
    def forward(ctx: Any, feats: Tensor, kernel: Tensor, kmap: KernelMap) -> Tensor:
        ctx.save_for_backward(feats, kernel)
        ctx.kmap = kmap
        return _convolve(feats, kernel, kmap)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        feats, kernel = ctx.saved_tensors
        kmap: KernelMap = ctx.kmap
        grad_out = grads[0].contiguous()
        grad_feats = grad_kernel = None
        with torch.autocast(grad_out.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grad_feats = _convolve(grad_out, kernel.transpose(1, 2), kmap.transposed())
            if ctx.needs_input_grad[1]:
                grad_kernel = _kernel_gradient(feats, grad_out, kmap)
        return grad_feats, grad_kernel, None


def _convolve(feats: Tensor, kernel: Tensor, kmap: KernelMap, start: Tensor | None = None, *, in_place: bool = False) -> Tensor:
    """The sum over all pairs, on top of `start` ((1 or M_out, C_out)); kernel (K, C_in, C_out) of any strides."""
    columns = kernel.shape[0] * kernel.shape[1]
    if kmap.volume > 1 and columns <= _SIDE_BY_SIDE_COLUMNS:
        products = _side_by_side(feats, kmap) @ kernel.reshape(columns, -1)
        if start is None:
            return products
        return start.add_(products) if in_place else products.add_(start)
    if kmap.out_once and start is None:
        return _convolve_once(feats, kernel, kmap)
    wide = torch.float32 if feats.dtype in (torch.float16, torch.bfloat16) else feats.dtype
    in_place = in_place and wide == feats.dtype
    out = _begin(feats, kernel, kmap, start, wide, in_place=in_place)
    feats = feats.contiguous()
    block = _block_rows(feats.element_size() * (kernel.shape[1] + kernel.shape[2]))
    gathered = feats.new_empty(min(block, max(kmap.counts)), kernel.shape[1])
    products = feats.new_empty(len(gathered), kernel.shape[2])
    slices = kernel.unbind(0)
    for k, in_rows, out_rows in _blocks(kmap, block):
        rows, product = gathered[: len(in_rows)], products[: len(in_rows)]
        torch.index_select(feats, 0, in_rows, out=rows)
        torch.mm(rows, slices[k], out=product)
        out.index_add_(0, out_rows, product if product.dtype == wide else product.to(wide))
    return out.to(feats.dtype)


def _begin(
    feats: Tensor, kernel: Tensor, kmap: KernelMap, start: Tensor | None, wide: torch.dtype, *, in_place: bool
) -> Tensor:
    """(M_out, C_out) of dtype `wide`: `start` plus the identity's product."""
    if kmap.identity is None:
        if start is None:
            return feats.new_zeros(kmap.num_out, kernel.shape[2], dtype=wide)
        return start if in_place else start.to(wide).expand(kmap.num_out, -1).clone(memory_format=torch.contiguous_format)
    centre = kernel[kmap.identity]
    if start is None:
        return torch.mm(feats, centre).to(wide)
    if in_place:
        return start.addmm_(feats, centre)
    if wide == feats.dtype:
        return torch.addmm(start, feats, centre)
    return torch.mm(feats, centre).to(wide).add_(start)


def _convolve_once(feats: Tensor, kernel: Tensor, kmap: KernelMap) -> Tensor:
    """Every output row is one product: nothing is added, so nothing need be cleared or read back."""
    out = feats.new_empty(kmap.num_out, kernel.shape[2])
    feats = feats.contiguous()
    for k, in_rows, out_rows in _blocks(kmap, _block_rows(feats.element_size() * (kernel.shape[1] + kernel.shape[2]))):
        out.index_copy_(0, out_rows, torch.mm(feats.index_select(0, in_rows), kernel[k]))
    return out


def _side_by_side(feats: Tensor, kmap: KernelMap) -> Tensor:
    """(M_out, K * C_in): the input row under every tap, zeros where there is none."""
    table = feats.new_zeros(kmap.num_out, kmap.volume, feats.shape[1])
    flat = table.view(-1, feats.shape[1])
    counts = torch.tensor(kmap.counts, device=feats.device)
    taps = torch.repeat_interleave(torch.arange(kmap.volume, device=feats.device), counts, output_size=len(kmap.in_rows))
    flat.index_copy_(0, kmap.out_rows * kmap.volume + taps, feats.index_select(0, kmap.in_rows))
    if kmap.identity is not None:
        table[:, kmap.identity] = feats
    return table.view(kmap.num_out, kmap.volume * feats.shape[1])


def _kernel_gradient(feats: Tensor, grad_out: Tensor, kmap: KernelMap) -> Tensor:
    """(K, C_in, C_out): ``feats[in_k].T @ grad_out[out_k]``."""
    grad = feats.new_zeros(kmap.volume, feats.shape[1], grad_out.shape[1])
    if kmap.identity is not None:
        torch.mm(feats.T, grad_out, out=grad[kmap.identity])
    for k in range(kmap.volume):
        if kmap.counts[k]:
            in_rows, out_rows = kmap.pairs(k)
            torch.mm(feats.index_select(0, in_rows).T, grad_out.index_select(0, out_rows), out=grad[k])
    return grad


def _block_rows(bytes_per_row: int) -> int:
    return max(_BLOCK_BYTES // max(bytes_per_row, 1), 64)


def _blocks(kmap: KernelMap, rows: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The listed pairs, offset by offset, at most `rows` at a time."""
    taps, sizes = [], []
    for k, count in enumerate(kmap.counts):
        for low in range(0, count, rows):
            taps.append(k)
            sizes.append(min(rows, count - low))
    # Cut once: a slice of its own for each block costs as much as a small product.
    yield from zip(taps, kmap.in_rows.split(sizes), kmap.out_rows.split(sizes), strict=True)


def _checked_kernel(feats: Tensor, kernel: Tensor, kmap: KernelMap, bias: Tensor | None) -> Tensor:
    """The kernel as (K, C_in, C_out), everything else checked against it."""
    if kernel.ndim == 2:
        kernel = kernel[None]
    if feats.ndim != 2 or feats.shape[0] != kmap.num_in:
        raise ValueError(f"feats must be ({kmap.num_in}, C_in), one row per input voxel of the map, got {tuple(feats.shape)}")
    if kernel.ndim != 3 or kernel.shape[0] != kmap.volume or kernel.shape[1] != feats.shape[1]:
        raise ValueError(f"kernel must be ({kmap.volume}, {feats.shape[1]}, C_out), got {tuple(kernel.shape)}")
    if bias is not None and bias.numel() != kernel.shape[2]:
        raise ValueError(f"bias must hold {kernel.shape[2]} values, got {tuple(bias.shape)}")
    for name, tensor in (("kernel", kernel), ("kmap", kmap.in_rows), ("bias", bias)):
        if tensor is not None and tensor.device != feats.device:
            raise ValueError(f"{name} is on {tensor.device}, feats on {feats.device}: move one of them")
    return kernel
