"""MinkUNet: a residual U-Net on sparse voxels. The defaults are Res16UNet34C, the teacher of Seal and SLidR (374 tensors).

Source: "4D Spatio-Temporal ConvNets: Minkowski Convolutional Neural Networks", CVPR 2019; checkpoint layout of MinkowskiEngine.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from picture3d.models.sparse_layers import ResidualBlock, SparseConv, SparseNorm
from picture3d.ops.kernel_map import KernelMap, Triple, strided_map, submanifold_map


@dataclass(frozen=True, slots=True, eq=False)
class Pyramid:
    """Coordinates and maps of all five levels: nine maps serve the whole network."""

    coords: tuple[Tensor, ...]  # (N_l, 4) int32 batch, x, y, z at tensor strides 1, 2, 4, 8, 16
    same: tuple[KernelMap, ...]  # 3x3x3 at every level
    down: tuple[KernelMap, ...]  # 2x2x2 with stride 2, level l to level l + 1; transposed for the way up


def build_pyramid(coords: Tensor, levels: int = 5) -> Pyramid:
    """The levels below (N, 4) integer `coords`; rows must be unique."""
    all_coords, same, down = [coords], [], []
    for level in range(levels):
        spacing: Triple = (2**level, 2**level, 2**level)
        same.append(submanifold_map(all_coords[-1], tensor_stride=spacing))
        if level + 1 < levels:
            coarse, kmap = strided_map(all_coords[-1], tensor_stride=spacing)
            all_coords.append(coarse)
            down.append(kmap)
    return Pyramid(tuple(all_coords), tuple(same), tuple(down))


class MinkUNet(nn.Module):
    """Four strided stages down, four transposed stages up, skips in between.

    Args:
        in_channels: input features (1: intensity).
        out_channels: output features.
        stem: width of the first convolution.
        widths: of blocks 1 to 8.
        blocks: residual blocks in each of them.
        normalised: divide every output row by its length; a row of zeros stays zero.
        momentum: of the norms outside residual blocks.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 64,
        *,
        stem: int = 32,
        widths: tuple[int, ...] = (32, 64, 128, 256, 256, 128, 96, 96),
        blocks: tuple[int, ...] = (2, 3, 4, 6, 2, 2, 2, 2),
        normalised: bool = True,
        momentum: float = 0.05,
    ) -> None:
        super().__init__()
        if len(widths) != 8 or len(blocks) != 8:
            raise ValueError(f"widths and blocks need 8 entries each, got {len(widths)} and {len(blocks)}")
        self.normalised = normalised
        self.out_channels = out_channels
        self.conv0p1s1 = SparseConv(in_channels, stem, 27)
        self.bn0 = SparseNorm(stem, momentum)
        # The names carry the tensor stride (p) and the stride (s), as in the published checkpoints.
        self._down = [f"conv{i}p{2 ** (i - 1)}s2" for i in range(1, 5)]
        self._up = [f"convtr{i}p{2 ** (8 - i)}s2" for i in range(4, 8)]
        skips = [stem, *widths[:3]]
        channels = stem
        for i, name in enumerate(self._down, start=1):
            self.add_module(name, SparseConv(channels, channels, 8))
            self.add_module(f"bn{i}", SparseNorm(channels, momentum))
            self.add_module(f"block{i}", _stage(channels, widths[i - 1], blocks[i - 1], momentum))
            channels = widths[i - 1]
        for i, name in enumerate(self._up, start=4):
            width = widths[i]
            self.add_module(name, SparseConv(channels, width, 8))
            self.add_module(f"bntr{i}", SparseNorm(width, momentum))
            self.add_module(f"block{i + 1}", _stage(width + skips[7 - i], width, blocks[i], momentum))
            channels = width
        self.final = SparseConv(channels, out_channels, 1, bias=True)

    def forward(self, coords: Tensor, feats: Tensor) -> Tensor:
        """Features of every cell.

        Args:
            coords: (N, 4) int32 batch, x, y, z; unique rows in any order; N may be 0.
            feats: (N, in_channels) float.

        Returns:
            (N, out_channels), in the order of `coords`.
        """
        if len(coords) == 0:
            return feats.new_zeros((0, self.out_channels))
        return self.on_pyramid(build_pyramid(coords), feats)

    def on_pyramid(self, pyramid: Pyramid, feats: Tensor, taps: dict[str, Tensor] | None = None) -> Tensor:
        """The same on maps that are already there; `taps` collects the output of each stage by name, if given."""
        taps = {} if taps is None else taps
        level = self.bn0(self.conv0p1s1(feats, pyramid.same[0])).relu_()
        taps["out_p1"] = level
        skips = [level]
        for i, name in enumerate(self._down, start=1):
            level = self._module(f"bn{i}")(self._module(name)(level, pyramid.down[i - 1])).relu_()
            for block in self._module(f"block{i}").children():
                level = block(level, pyramid.same[i])
            taps[f"block{i}"] = level
            skips.append(level)
        for i, name in enumerate(self._up, start=4):
            to = 7 - i  # the level this stage climbs to
            level = self._module(f"bntr{i}")(self._module(name)(level, pyramid.down[to].transposed)).relu_()
            level = torch.cat([level, skips[to]], dim=1)
            for block in self._module(f"block{i + 1}").children():
                level = block(level, pyramid.same[to])
            taps[f"block{i + 1}"] = level
        out = self.final(level)
        taps["final"] = out
        if not self.normalised:
            return out
        length = torch.linalg.vector_norm(out.float(), dim=1, keepdim=True)
        return (out / torch.where(length > 0, length, 1.0)).to(out.dtype)

    def _module(self, name: str) -> nn.Module:
        return self.get_submodule(name)


def _stage(in_channels: int, channels: int, count: int, momentum: float) -> nn.ModuleList:
    return nn.ModuleList(
        [ResidualBlock(in_channels if i == 0 else channels, channels, momentum=momentum) for i in range(count)]
    )
