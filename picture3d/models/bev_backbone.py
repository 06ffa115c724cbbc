"""From pillars to a dense map seen from above, and the 2-D residual network of both published detectors.

State-dict keys are those below ``backbone_2d.`` of OpenPCDet checkpoints: ``blocks.{level}.{block}.{conv1,bn1,conv2,bn2}``,
``downsample_layer.{0,1}`` on the first block of each level, ``deblocks.{level}.{0,1}``.
"""

from __future__ import annotations

import math
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from picture3d.config import FrozenConfig
from picture3d.models.row_norm import MapBatchNorm
from picture3d.structures.voxels import SparseVoxels


class BevBackboneConfig(FrozenConfig):
    """Levels of the network; lists have one entry per level. The defaults are the published Waymo detector's."""

    blocks: tuple[int, ...] = Field(default=(1, 2, 2), description="residual blocks per level, besides the strided first one")
    strides: tuple[int, ...] = Field(default=(1, 2, 2), description="of the first block of each level")
    channels: tuple[int, ...] = Field(default=(128, 128, 256), description="width of each level")
    upsample_strides: tuple[float, ...] = Field(
        default=(1, 2, 4), description="from each level to the common resolution; below 1 it is one over a whole number"
    )
    upsample_channels: tuple[int, ...] = Field(default=(128, 128, 128), description="width each level adds to the result")

    @model_validator(mode="after")
    def _check(self) -> Self:
        levels = len(self.blocks)
        if levels == 0:
            raise ValueError("blocks is empty; the network needs at least one level")
        for name in ("strides", "channels", "upsample_strides", "upsample_channels"):
            if len(getattr(self, name)) != levels:
                raise ValueError(
                    f"blocks has {levels} levels, so {name} needs {levels} entries; it has {len(getattr(self, name))}"
                )
        if min(self.blocks) < 0 or min((*self.strides, *self.channels, *self.upsample_channels)) < 1:
            raise ValueError("blocks must be 0 or more; strides and channels 1 or more")
        scale, scales = 1.0, []
        for stride, up in zip(self.strides, self.upsample_strides, strict=True):
            ratio = up if up >= 1 else 1 / up if up > 0 else 0.0
            if ratio < 1 or abs(ratio - round(ratio)) > 1e-6:
                raise ValueError(f"upsample_strides: {up:g} is neither a whole number nor one over a whole number")
            scale *= stride
            scales.append(scale / up)
        if max(scales) - min(scales) > 1e-6:
            raise ValueError(
                f"levels would end at different resolutions: one cell of the result would be "
                f"{', '.join(f'{s:g}' for s in scales)} cells of the input; upsample_strides must follow strides"
            )
        return self

    @property
    def out_channels(self) -> int:
        """Width of the result."""
        return sum(self.upsample_channels)

    @property
    def out_stride(self) -> int:
        """Side of a cell of the result, in cells of the input."""
        return round(self.strides[0] / self.upsample_strides[0])


def nuscenes_bev() -> BevBackboneConfig:
    """The published nuScenes detector's: the same levels, at half the resolution of the pillars."""
    return BevBackboneConfig(upsample_strides=(0.5, 1, 2))


def scatter_to_bev(voxels: SparseVoxels) -> Tensor:
    """(B, C * Z, Y, X) dense map of pillars or of voxels Z cells high; channel ``c * Z + z``, zeros where nothing is.

    Rows of the map run along y and columns along x, as in the reference. The channels of a cell lie together in memory
    (`torch.channels_last`): pillars need no copy, and convolutions are quicker so, on CPUs and GPUs.
    """
    x_cells, y_cells, z_cells = voxels.shape
    channels = voxels.feats.shape[1]
    b, x, y, z = voxels.coords.long().unbind(1)
    place = ((b * y_cells + y) * x_cells + x) * z_cells + z
    dense = voxels.feats.new_zeros(voxels.batch_size * y_cells * x_cells * z_cells, channels)
    dense = dense.index_copy(0, place, voxels.feats)
    dense = dense.view(voxels.batch_size, y_cells, x_cells, z_cells, channels).transpose(3, 4)
    return dense.reshape(voxels.batch_size, y_cells, x_cells, channels * z_cells).permute(0, 3, 1, 2)


class BevBackbone(nn.Module):
    """Residual levels of falling resolution, brought to a common one and joined.

    Args:
        in_channels: of the dense map.
        config: the levels.
    """

    def __init__(self, in_channels: int, config: BevBackboneConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or BevBackboneConfig()
        self.blocks, self.deblocks = nn.ModuleList(), nn.ModuleList()
        width = in_channels
        for level, channels in enumerate(config.channels):
            first = ResidualBlock2d(width, channels, config.strides[level], projected=True)
            rest = [ResidualBlock2d(channels, channels) for _ in range(config.blocks[level])]
            self.blocks.append(nn.Sequential(first, *rest))
            self.deblocks.append(_to_common(channels, config.upsample_channels[level], config.upsample_strides[level]))
            width = channels

    def forward(self, bev: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, sum of upsample_channels, H', W').

        Raises:
            ValueError: if H or W is not a multiple of what the levels divide by; the levels could not be joined.
        """
        divisor = math.prod(self.config.strides)
        if bev.shape[2] % divisor or bev.shape[3] % divisor:
            raise ValueError(
                f"a map of {bev.shape[2]} x {bev.shape[3]} cells cannot be halved by strides {self.config.strides} and joined "
                f"again: both sides must be multiples of {divisor}"
            )
        joined = []
        for level, up in zip(self.blocks, self.deblocks, strict=True):
            bev = level(bev)
            joined.append(up(bev))
        return torch.cat(joined, 1)


class BevLevels(nn.Module):
    """Residual levels of falling resolution, each of them an answer; keys ``blocks.{level}.{block}`` as above.

    Args:
        in_channels: of the dense map.
        blocks: residual blocks per level, besides the strided first one.
        strides: of the first block of each level.
        channels: width of each level.
        stem: strides of blocks before the first level, of its width (``stem.{block}``): a block skips cells by more than 2.
    """

    def __init__(
        self,
        in_channels: int,
        blocks: tuple[int, ...],
        strides: tuple[int, ...],
        channels: tuple[int, ...],
        stem: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential()
        for stride in stem:
            self.stem.append(ResidualBlock2d(in_channels, channels[0], stride, projected=True))
            in_channels = channels[0]
        self.blocks = nn.ModuleList()
        for width, count, stride in zip(channels, blocks, strides, strict=True):
            first = ResidualBlock2d(in_channels, width, stride, projected=True)
            self.blocks.append(nn.Sequential(first, *(ResidualBlock2d(width, width) for _ in range(count))))
            in_channels = width

    def forward(self, bev: Tensor) -> list[Tensor]:
        """(B, in_channels, H, W) to the maps of all levels, the finest first; sides round up where they are divided."""
        bev, levels = self.stem(bev), []
        for level in self.blocks:
            bev = level(bev)
            levels.append(bev)
        return levels


class ResidualBlock2d(nn.Module):
    """Two 3 x 3 convolutions with norms, and a shortcut: the input itself, or (`projected`) a 1 x 1 convolution of it."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1, *, projected: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = _norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = _norm(channels)
        self.downsample_layer: nn.Sequential | None = None
        if projected:
            shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.downsample_layer = nn.Sequential(shortcut, _norm(channels))

    def forward(self, bev: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, channels, H / stride, W / stride)."""
        hidden = conv_norm(self.conv2, self.bn2, conv_norm(self.conv1, self.bn1, bev).relu_())
        if self.downsample_layer is None:
            return hidden.add_(bev).relu_()
        conv, norm = self.downsample_layer
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        return hidden.add_(conv_norm(conv, norm, bev)).relu_()


class _ToCommon(nn.Sequential):
    """From a level to the common resolution: convolution or its transpose with kernel = stride, norm, ReLU."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, channels, H', W')."""
        resample, norm, _ = self
        assert isinstance(norm, nn.BatchNorm2d)
        assert isinstance(resample, nn.Conv2d | nn.ConvTranspose2d)
        return conv_norm(resample, norm, input).relu_()


def conv_norm(conv: nn.Conv2d | nn.ConvTranspose2d, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """``norm(conv(x))``; with running statistics the norm is part of the convolution's weights: one pass over the map less.

    `conv` has no bias; a transposed one has its kernel as stride: each input cell becomes a block of cells by one matrix, which
    is computed as a 1 x 1 convolution whose channels are laid out in space.
    """
    dim = 1 if isinstance(conv, nn.ConvTranspose2d) else 0  # where a weight keeps its output channels
    if norm.training or norm.running_mean is None or norm.running_var is None:
        return norm(_convolve(conv, conv.weight, None, x))
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    weight = conv.weight * scale.view([-1 if axis == dim else 1 for axis in range(4)])
    return _convolve(conv, weight, norm.bias - norm.running_mean * scale, x)


def _convolve(conv: nn.Conv2d | nn.ConvTranspose2d, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    if isinstance(conv, nn.Conv2d):
        return F.conv2d(x, weight, bias, conv.stride, conv.padding)
    factor = conv.stride[0]
    matrix = weight.permute(1, 2, 3, 0).reshape(-1, weight.shape[0], 1, 1)
    spread = None if bias is None else bias.repeat_interleave(factor * factor)
    blocks = F.conv2d(x, matrix, spread)
    if not len(blocks):  # the backward pass of pixel_shuffle refuses maps of no frame
        return blocks.view(0, blocks.shape[1] // factor**2, x.shape[2] * factor, x.shape[3] * factor)
    return F.pixel_shuffle(blocks, factor)


def _to_common(in_channels: int, channels: int, stride: float) -> nn.Sequential:
    if stride >= 1:
        factor = round(stride)
        resample: nn.Module = nn.ConvTranspose2d(in_channels, channels, factor, factor, bias=False)
    else:
        factor = round(1 / stride)
        resample = nn.Conv2d(in_channels, channels, factor, factor, bias=False)
    return _ToCommon(resample, _norm(channels), nn.ReLU())


def _norm(channels: int) -> MapBatchNorm:
    return MapBatchNorm(channels, eps=1e-3, momentum=0.01)  # as published
