"""MinkUNet: a residual U-Net on sparse voxels. With its default widths it is Res16UNet34C, the point network of SLidR and Seal.

Key names and shapes of the state dict are those of the published checkpoints. Input to output: a stem, four times
(halve the grid, residual blocks), four times (double the grid, join the encoder's features, residual blocks), a 1x1x1 layer.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from picture3d.models.sparse_layers import ResidualBlock, SparseBatchNorm, SparseConv, fold_norm
from picture3d.ops.kernel_map import KernelMap, build_kernel_map

RES16UNET34C_WIDTHS = (32, 64, 128, 256, 256, 128, 96, 96)
RES16UNET34C_BLOCKS = (2, 3, 4, 6, 2, 2, 2, 2)
_LEVELS = 4


_Stage = tuple[SparseConv, SparseBatchNorm, list[ResidualBlock]]


@dataclass(frozen=True, slots=True, eq=False)
class UNetMaps:
    """The nine kernel maps that serve every layer of the network."""

    same: tuple[KernelMap, ...]  # submanifold 3x3x3 at tensor stride 1, 2, 4, 8, 16
    down: tuple[KernelMap, ...]  # 2x2x2 with stride 2, from each level to the next; turned round on the way up
    stem: KernelMap  # the stem's own; `same[0]` unless its kernel is wider

    @property
    def coords(self) -> tuple[Tensor, ...]:
        """(M, 4) voxels of every level, finest first."""
        return tuple(kmap.out_coords for kmap in self.same)


def build_unet_maps(coords: Tensor, stem_kernel: int = 3) -> UNetMaps:
    """The maps of a batch of voxels.

    Args:
        coords: (M, 4) int32 or int64 rows (batch, x, y, z), unique and sorted, negative values included.
        stem_kernel: edge of the stem's kernel.

    Raises:
        ValueError: as :func:`picture3d.ops.kernel_map.build_kernel_map`.
    """
    same = [build_kernel_map(coords, 3)]
    down: list[KernelMap] = []
    for level in range(_LEVELS):
        down.append(build_kernel_map(same[-1].out_coords, 2, stride=2, tensor_stride=2**level))
        same.append(build_kernel_map(down[-1].out_coords, 3, tensor_stride=2 ** (level + 1)))
    stem = same[0] if stem_kernel == 3 else build_kernel_map(coords, stem_kernel)
    return UNetMaps(tuple(same), tuple(down), stem)


class MinkUNet(nn.Module):
    """Residual sparse U-Net.

    Args:
        in_channels: features per voxel.
        out_channels: length of an output row.
        stem_width: channels of the finest level.
        widths: channels of the eight stages, four down and four up.
        blocks: residual blocks of the eight stages.
        stem_kernel: edge of the first convolution's kernel.
        momentum: of the norms outside residual blocks (0.05 in SLidR's pre-training, 0.02 in its segmentation).
        normalise: divide every output row by its length. The published network has no guard against a zero row;
            here it stays zero instead of becoming NaN.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 64,
        *,
        stem_width: int = 32,
        widths: tuple[int, ...] = RES16UNET34C_WIDTHS,
        blocks: tuple[int, ...] = RES16UNET34C_BLOCKS,
        stem_kernel: int = 3,
        momentum: float = 0.05,
        normalise: bool = True,
    ) -> None:
        super().__init__()
        if len(widths) != 2 * _LEVELS or len(blocks) != 2 * _LEVELS or min(blocks) < 1:
            raise ValueError(f"widths and blocks need {2 * _LEVELS} entries, blocks from 1 on; got {widths} and {blocks}")
        self.stem_kernel = stem_kernel
        self.normalise = normalise
        self.out_channels = out_channels
        self._folded = False

        def stage(incoming: int, width: int, count: int) -> nn.ModuleList:
            return nn.ModuleList(
                ResidualBlock(incoming if i == 0 else width, width, shortcut_momentum=momentum) for i in range(count)
            )

        self.conv0p1s1 = SparseConv(in_channels, stem_width, stem_kernel)
        self.bn0 = SparseBatchNorm(stem_width, momentum)
        channels = [stem_width]  # of the encoder's output at every level
        for i in range(_LEVELS):
            self.add_module(f"conv{i + 1}p{2**i}s2", SparseConv(channels[-1], channels[-1], 2, stride=2))
            self.add_module(f"bn{i + 1}", SparseBatchNorm(channels[-1], momentum))
            self.add_module(f"block{i + 1}", stage(channels[-1], widths[i], blocks[i]))
            channels.append(widths[i])
        incoming = channels.pop()
        for i in range(_LEVELS, 2 * _LEVELS):
            self.add_module(f"convtr{i}p{2 ** (2 * _LEVELS - i)}s2", SparseConv(incoming, widths[i], 2, stride=2))
            self.add_module(f"bntr{i}", SparseBatchNorm(widths[i], momentum))
            self.add_module(f"block{i + 1}", stage(widths[i] + channels.pop(), widths[i], blocks[i]))
            incoming = widths[i]
        self.final = SparseConv(incoming, out_channels, 1, bias=True)

    def forward(self, feats: Tensor, maps: UNetMaps) -> Tensor:
        """Features of every voxel.

        Args:
            feats: (M, in_channels) float, rows in the order of ``maps.coords[0]``.
            maps: from :func:`build_unet_maps` with this network's `stem_kernel`.

        Returns:
            (M, out_channels); rows of length 1 (or zero) where the network normalises.
        """
        if self._folded:
            return self._infer(feats, maps)
        feats = torch.relu(self.bn0(self.conv0p1s1(feats, maps.stem)))
        skips = []
        for level, (conv, norm, blocks) in enumerate(self._down()):
            skips.append(feats)
            feats = torch.relu(norm(conv(feats, maps.down[level])))
            for block in blocks:
                feats = block(feats, maps.same[level + 1])
        for level, (conv, norm, blocks) in zip(reversed(range(_LEVELS)), self._up(), strict=True):
            feats = torch.relu(norm(conv(feats, maps.down[level].transposed())))
            feats = torch.cat([feats, skips.pop()], 1)
            for block in blocks:
                feats = block(feats, maps.same[level])
        return self._finish(feats)

    def folded(self) -> MinkUNet:
        """A copy for inference: norms are folded into the convolutions, sums and relus happen in place, no gradients.

        The copy's state dict differs from the published one; keep the original for saving.
        """
        network = copy.deepcopy(self).eval().requires_grad_(False)
        fold_norm(network.conv0p1s1, network.bn0)
        for conv, norm, blocks in [*network._down(), *network._up()]:
            fold_norm(conv, norm)
            for block in blocks:
                block.fold_norms()
        for name in [name for name, _ in network.named_children() if name.startswith("bn")]:
            setattr(network, name, nn.Identity())
        network._folded = True
        return network

    @torch.no_grad()
    def _infer(self, feats: Tensor, maps: UNetMaps) -> Tensor:
        feats = self.conv0p1s1.infer(feats, maps.stem, relu=True)
        skips = []
        for level, (conv, _, blocks) in enumerate(self._down()):
            skips.append(feats)
            feats = conv.infer(feats, maps.down[level], relu=True)
            for block in blocks:
                feats = block.infer(feats, maps.same[level + 1])
        for level, (conv, _, blocks) in zip(reversed(range(_LEVELS)), self._up(), strict=True):
            feats = conv.infer(feats, maps.down[level].transposed(), relu=True)
            feats = torch.cat([feats, skips.pop()], 1)
            for block in blocks:
                feats = block.infer(feats, maps.same[level])
        return self._finish(feats)

    def _finish(self, feats: Tensor) -> Tensor:
        feats = self.final(feats)
        if not self.normalise:
            return feats
        length = torch.linalg.vector_norm(feats, dim=1, keepdim=True, dtype=torch.float32 if feats.dtype.itemsize < 4 else None)
        return feats / torch.where(length > 0, length, 1).to(feats.dtype)

    def _down(self) -> list[_Stage]:
        return [self._stage(f"conv{i}p{2 ** (i - 1)}s2", f"bn{i}", f"block{i}") for i in range(1, _LEVELS + 1)]

    def _up(self) -> list[_Stage]:
        span = range(_LEVELS, 2 * _LEVELS)
        return [self._stage(f"convtr{i}p{2 ** (2 * _LEVELS - i)}s2", f"bntr{i}", f"block{i + 1}") for i in span]

    def _stage(self, conv: str, norm: str, blocks: str) -> _Stage:
        found = self.get_submodule(conv), self.get_submodule(norm), list(self.get_submodule(blocks).children())
        return cast(_Stage, found)
