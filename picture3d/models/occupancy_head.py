"""From volumes of falling resolution to one class for every cell of the finest: the head of OpenOccupancy.

    each level   3 x 3 x 3 convolution, norm, ReLU
    joined       levels brought to the finest by trilinear interpolation, weighed cell by cell
    logits       two 1 x 1 x 1 convolutions

State-dict keys are those below ``dense_head.`` of the published configuration: ``occ_convs.{level}.{0,1}``,
``voxel_soft_weights.{0,1,3}``, ``occ_pred_conv.{0,1,3}``. Source: "OpenOccupancy", ICCV 2023.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from picture3d.errors import ConfigError

_GROUPS = 32  # of channels that share a norm, as published; narrower heads have fewer


class OccupancyHead(nn.Module):
    """The head.

    Args:
        in_channels: width of each level, the finest first.
        channels: C, width in which levels are joined; an even number.
        num_classes: free space included.

    Raises:
        ConfigError: if there is no level, or the width is odd.
    """

    def __init__(self, in_channels: Sequence[int], channels: int, num_classes: int) -> None:
        super().__init__()
        if not in_channels:
            raise ConfigError("occupancy: the head has no level to look at; give it the channels of one at least")
        if channels < 2 or channels % 2:
            raise ConfigError(f"occupancy: {channels} head channels cannot be halved. Set an even number.")
        self.occ_convs = nn.ModuleList(
            nn.Sequential(nn.Conv3d(width, channels, 3, padding=1, bias=False), _norm(channels), nn.ReLU())
            for width in in_channels
        )
        self.voxel_soft_weights = _pointwise(channels, len(in_channels))
        self.occ_pred_conv = _pointwise(channels, num_classes)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Logits (B, num_classes, X, Y, Z) from volumes (B, in_channels[l], X_l, Y_l, Z_l), the finest first."""
        volumes = [conv(level) for conv, level in zip(self.occ_convs, levels, strict=True)]
        shares = self.level_shares(volumes[0])
        joined = volumes[0] * shares[:, :1]
        for index, volume in enumerate(volumes[1:], start=1):
            finest = F.interpolate(volume, size=joined.shape[2:], mode="trilinear", align_corners=False)
            joined = joined + finest * shares[:, index : index + 1]
        return self.occ_pred_conv(joined)

    def level_shares(self, finest: Tensor) -> Tensor:
        """(B, levels, X, Y, Z) how much each level counts in each cell, adding up to 1; `finest` is (B, C, X, Y, Z)."""
        return self.voxel_soft_weights(finest).softmax(1)


def _pointwise(channels: int, out_channels: int) -> nn.Sequential:
    """Two linear layers for each cell by itself."""
    half = channels // 2
    return nn.Sequential(
        nn.Conv3d(channels, half, 1, bias=False),
        _norm(half),
        nn.ReLU(),
        nn.Conv3d(half, out_channels, 1, bias=False),
    )


def _norm(channels: int) -> nn.GroupNorm:
    """32 groups as published, or the most that divide the channels."""
    groups = max(count for count in range(1, min(_GROUPS, channels) + 1) if channels % count == 0)
    return nn.GroupNorm(groups, channels)
