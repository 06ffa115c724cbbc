"""Closed-form weights of the reference numbers under `golden/minkowski`: drawn by key and seed, nothing is stored."""

from __future__ import annotations

import math
import zlib

import numpy as np
import torch
from torch import Tensor, nn


def minkowski_value(key: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """The value of one state-dict entry, float32 (int64 for counters)."""
    if key.endswith("num_batches_tracked"):
        return torch.tensor(1000, dtype=torch.int64)
    raw = np.random.PCG64(zlib.crc32(f"{seed}/{key}".encode())).random_raw(math.prod(shape))
    u = ((raw >> np.uint64(11)) * 2.0**-53).reshape(shape)
    if key.endswith(".kernel"):
        volume = shape[0] if len(shape) == 3 else 1
        value = (2 * u - 1) * math.sqrt(3 / (shape[-2] * volume ** (2 / 3)))
        if key == "conv0p1s1.kernel":
            value = value * 0.05
    elif key == "final.bias":
        value = (2 * u - 1) * 0.02
    elif key.endswith("norm2.bn.weight"):
        value = 0.2 + 0.4 * u
    elif key.endswith("bn.weight"):
        value = 0.6 + 0.8 * u
    elif key.endswith("bn.running_var"):
        value = 0.5 + u
    else:
        assert key.endswith(("bn.bias", "bn.running_mean")), key
        value = (2 * u - 1) * 0.1
    return torch.from_numpy(value.astype(np.float32))


def minkowski_state(network: nn.Module, seed: int) -> dict[str, Tensor]:
    """A state dict for `network`, every entry by its formula."""
    return {key: minkowski_value(key, tuple(value.shape), seed) for key, value in network.state_dict().items()}
