"""The last layers of pre-training: from a hidden voxel's token to its points and to what the teacher says of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from picture3d.errors import ConfigError


class Predictors(nn.Module):
    """Two linear layers on the decoder's features, computed in float32: points must be right to the centimetre."""

    def __init__(self, channels: int, num_points: int, teacher_channels: int | None) -> None:
        super().__init__()
        self.decoder_pred = nn.Linear(channels, 3 * num_points)
        self.decoder_seal = None if teacher_channels is None else nn.Linear(channels, teacher_channels)

    def points_m(self, tokens: Tensor) -> Tensor:
        """(V, C) to (V, P, 3) points in metres, relative to the voxel's centre."""
        with torch.autocast(tokens.device.type, enabled=False):
            return self.decoder_pred(tokens.float()).unflatten(1, (-1, 3))

    def teacher_features(self, tokens: Tensor) -> Tensor:
        """(V, C) to (V, D) teacher features.

        Raises:
            ConfigError: if the network was built without this predictor.
        """
        if self.decoder_seal is None:
            raise ConfigError(
                "loss.features_weight is above 0, but the network predicts no teacher features: set it to 0, or set "
                "teacher_channels to the length of the teacher's features"
            )
        with torch.autocast(tokens.device.type, enabled=False):
            return self.decoder_seal(tokens.float())
