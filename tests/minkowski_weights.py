"""Weights of the reference MinkUNet by closed form, from the key, the shape and a seed."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor, nn


def minkowski_state(module: nn.Module, seed: int) -> dict[str, Tensor]:
    """The state dict that the reference network had for `seed`."""
    return {key: _value(key, tuple(t.shape), seed) for key, t in module.state_dict().items()}


def _value(key: str, shape: tuple[int, ...], seed: int) -> Tensor:
    if key.endswith("num_batches_tracked"):
        return torch.tensor(1000)
    count = int(np.prod(shape))
    raw = np.random.PCG64(zlib.crc32(f"{seed}/{key}".encode())).random_raw(count)
    u = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
    if key.endswith(".kernel"):
        cells, channels = (1, shape[0]) if len(shape) == 2 else shape[:2]
        value = (2 * u - 1) * np.sqrt(3 / (channels * cells ** (2 / 3)))
        if key == "conv0p1s1.kernel":
            value *= 0.05
    elif key == "final.bias":
        value = (2 * u - 1) * 0.02
    elif key.endswith("norm2.bn.weight"):
        value = 0.2 + 0.4 * u
    elif key.endswith("bn.weight"):
        value = 0.6 + 0.8 * u
    elif key.endswith("bn.running_var"):
        value = 0.5 + u
    else:
        value = (2 * u - 1) * 0.1
    return torch.from_numpy(value.reshape(shape).astype(np.float32))
