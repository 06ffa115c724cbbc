"""Layers on sparse voxels in MinkowskiEngine's checkpoint layout: convolution, batch norm, residual block."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from picture3d.ops.kernel_map import KernelMap
from picture3d.ops.sparse_conv import sparse_conv


class SparseConv(nn.Module):
    """A sparse convolution; where its rows meet comes in as a map. Parameter ``kernel``, and ``bias`` (1, Cout) if wanted.

    Args:
        in_channels: Cin.
        out_channels: Cout.
        offsets: K, cells of the kernel. One cell at stride 1 has a (Cin, Cout) kernel and needs no map.
        bias: add a bias to every output row.
    """

    def __init__(self, in_channels: int, out_channels: int, offsets: int, *, bias: bool = False) -> None:
        super().__init__()
        shape = (in_channels, out_channels) if offsets == 1 else (offsets, in_channels, out_channels)
        self.kernel = nn.Parameter(torch.empty(shape))
        # About three offsets of 27 find a neighbour in a LiDAR sweep; counting them all would start far too small.
        fan_in = in_channels * max(1.0, offsets ** (2 / 3))
        nn.init.normal_(self.kernel, std=math.sqrt(2.0 / fan_in))
        self.bias = nn.Parameter(torch.zeros(1, out_channels)) if bias else None

    def forward(self, feats: Tensor, kmap: KernelMap | None = None) -> Tensor:
        """(N, Cin) to (M, Cout); without a map every row by itself."""
        if kmap is None:
            out = feats @ self.kernel
            return out if self.bias is None else out + self.bias
        return sparse_conv(feats, self.kernel, kmap, self.bias)


class SparseNorm(nn.Module):
    """Batch norm over rows, eps 1e-5, held in a child named ``bn`` as in MinkowskiEngine.

    In training a batch of a single row has no variance; its running statistics are used instead.
    """

    def __init__(self, channels: int, momentum: float = 0.1) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(channels, momentum=momentum)

    def forward(self, feats: Tensor) -> Tensor:
        """(N, C) to (N, C); N may be 0."""
        if len(feats) == 0:
            return feats
        if self.training and len(feats) == 1:
            bn = self.bn
            return F.batch_norm(feats, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, bn.eps)
        return self.bn(feats)


class ResidualBlock(nn.Module):
    """Conv-norm-relu-conv-norm with a shortcut, then relu. Norms inside have momentum 0.1, as published."""

    def __init__(self, in_channels: int, channels: int, *, momentum: float) -> None:
        super().__init__()
        self.conv1 = SparseConv(in_channels, channels, 27)
        self.norm1 = SparseNorm(channels)
        self.conv2 = SparseConv(channels, channels, 27)
        self.norm2 = SparseNorm(channels)
        self.downsample = (
            nn.ModuleList([SparseConv(in_channels, channels, 1), SparseNorm(channels, momentum)])
            if in_channels != channels
            else None
        )

    def forward(self, feats: Tensor, kmap: KernelMap) -> Tensor:
        """(N, Cin) to (N, C) on the same cells."""
        shortcut = feats
        if self.downsample is not None:
            for layer in self.downsample:
                shortcut = layer(shortcut)
        out = self.norm1(self.conv1(feats, kmap)).relu_()
        out = self.norm2(self.conv2(out, kmap))
        return (out + shortcut).relu_()
