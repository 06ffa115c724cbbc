"""Layers on sparse voxels: convolution, batch norm and residual block under MinkowskiEngine's parameter names and shapes.

A layer takes feature rows and the kernel map that says which rows meet; coordinates never pass through a layer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from picture3d.models.row_norm import RowBatchNorm
from picture3d.ops.kernel_map import KernelMap
from picture3d.ops.sparse_conv import convolve_inference, sparse_conv


class SparseConv(nn.Module):
    """A convolution whose parameter is `kernel` (K, C_in, C_out), `bias` (1, C_out) where there is one.

    Submanifold, strided or transposed is a property of the map it is given. The kernel of a 1x1x1 convolution that keeps
    the voxels is (C_in, C_out); with a stride it stays (1, C_in, C_out).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1, bias: bool = False) -> None:
        super().__init__()
        volume = kernel_size**3
        self.pointwise = volume == 1 and stride == 1
        shape = (in_channels, out_channels) if self.pointwise else (volume, in_channels, out_channels)
        self.kernel = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.zeros(1, out_channels)) if bias else None
        # About volume ** (2 / 3) taps are filled in a surface; uniform of that variance keeps activations level.
        nn.init.uniform_(self.kernel, -1, 1)
        with torch.no_grad():
            self.kernel.mul_(math.sqrt(6 / (in_channels * volume ** (2 / 3))))

    def forward(self, feats: Tensor, kmap: KernelMap | None = None) -> Tensor:
        """(M_in, C_in) to (M_out, C_out); only a pointwise convolution does without a map."""
        if self.pointwise:
            out = feats @ self.kernel
            return out if self.bias is None else out + self.bias
        if kmap is None:
            raise ValueError("kmap: a convolution wider than one voxel needs a kernel map")
        return sparse_conv(feats, self.kernel, kmap, self.bias)

    def infer(self, feats: Tensor, kmap: KernelMap | None = None, *, onto: Tensor | None = None, relu: bool = False) -> Tensor:
        """As `forward` without gradients, followed by an addition in place to `onto` and a relu where wanted."""
        if not self.pointwise and kmap is not None:
            return convolve_inference(feats, self.kernel, kmap, self.bias, onto=onto, relu=relu)
        out = self.forward(feats) if onto is None else onto.add_(self.forward(feats))
        return out.relu_() if relu else out


class SparseBatchNorm(nn.Module):
    """Batch norm over voxel rows, held in a child named `bn`."""

    def __init__(self, channels: int, momentum: float = 0.1) -> None:
        super().__init__()
        self.bn = RowBatchNorm(channels, eps=1e-5, momentum=momentum)

    def forward(self, feats: Tensor) -> Tensor:
        """(M, C) to (M, C)."""
        return self.bn(feats)


class ResidualBlock(nn.Module):
    """conv, norm, relu, conv, norm; plus the input, through a 1x1x1 convolution and norm where widths differ; relu."""

    def __init__(self, in_channels: int, out_channels: int, *, shortcut_momentum: float = 0.05) -> None:
        super().__init__()
        # The momentum given to the network reaches the shortcut's norm but not the block's own: they keep 0.1.
        self.conv1 = SparseConv(in_channels, out_channels, 3)
        self.norm1 = SparseBatchNorm(out_channels)
        self.conv2 = SparseConv(out_channels, out_channels, 3)
        self.norm2 = SparseBatchNorm(out_channels)
        self.downsample = (
            nn.Sequential(SparseConv(in_channels, out_channels, 1), SparseBatchNorm(out_channels, shortcut_momentum))
            if in_channels != out_channels
            else None
        )

    def forward(self, feats: Tensor, kmap: KernelMap) -> Tensor:
        """(M, C_in) to (M, C_out); `kmap` is the submanifold 3x3x3 map of the voxels."""
        shortcut = feats if self.downsample is None else self.downsample(feats)
        hidden = torch.relu(self.norm1(self.conv1(feats, kmap)))
        return torch.relu(self.norm2(self.conv2(hidden, kmap)) + shortcut)

    def fold_norms(self) -> None:
        """Takes the norms into the convolutions before them; only `infer` may be called afterwards."""
        fold_norm(self.conv1, self.norm1)
        fold_norm(self.conv2, self.norm2)
        if self.downsample is not None:
            conv, norm = self.downsample
            assert isinstance(conv, SparseConv)
            assert isinstance(norm, SparseBatchNorm)
            fold_norm(conv, norm)
            self.downsample = nn.Sequential(conv)
        del self.norm1, self.norm2

    def infer(self, feats: Tensor, kmap: KernelMap) -> Tensor:
        """As `forward`, for a block whose norms are folded into its convolutions. May overwrite `feats`."""
        hidden = self.conv1.infer(feats, kmap, relu=True)
        shortcut = feats if self.downsample is None else self.downsample(feats)
        return self.conv2.infer(hidden, kmap, onto=shortcut, relu=True)


@torch.no_grad()
def fold_norm(conv: SparseConv, norm: SparseBatchNorm) -> None:
    """Moves the norm's running statistics and affine map into the convolution: in evaluation, `conv` alone then equals both."""
    bn = norm.bn
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError("norm: only a batch norm with running statistics can be folded")
    scale = bn.weight.double() / torch.sqrt(bn.running_var.double() + bn.eps)
    shift = bn.bias.double() - bn.running_mean.double() * scale
    if conv.bias is not None:
        shift = shift + conv.bias.double().reshape(-1) * scale
    dtype = conv.kernel.dtype
    conv.kernel.copy_((conv.kernel.double() * scale).to(dtype))
    conv.bias = nn.Parameter(shift.to(dtype).reshape(1, -1), requires_grad=False)
