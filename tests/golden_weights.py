"""Closed-form weights and inputs of the reference numbers under `golden/openpcdet`: nothing is stored, all is drawn by name."""

from __future__ import annotations

import json
import math
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn


@cache
def golden_weight_seed(folder: Path) -> int:
    """`weight_seed` of a golden folder's `meta.json`; 0 where there is none."""
    meta = folder / "meta.json"
    return int(json.loads(meta.read_text())["weight_seed"]) if meta.exists() else 0


def _generator(name: str, seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()) + seed * 2**32))


def openpcdet_value(key: str, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """The value of one state-dict entry, float32 (int64 for counters). `key` is the full key of the reference."""
    last = key.rsplit(".", 1)[-1]
    rng = _generator(key, seed)
    if last in {"num_batches_tracked", "global_step"}:
        return torch.zeros(shape, dtype=torch.int64)
    if last == "running_mean":
        value = 0.1 * rng.standard_normal(shape)
    elif last == "running_var":
        value = 0.5 + rng.random(shape)
    elif len(shape) >= 2:
        value = rng.standard_normal(shape) / math.sqrt(math.prod(shape[1:]))
    elif len(shape) == 1 and last == "weight":
        value = 1 + 0.1 * rng.standard_normal(shape)
    else:
        value = 0.1 * rng.standard_normal(shape)
    return torch.from_numpy(np.asarray(value, dtype=np.float32))


def openpcdet_state(module: nn.Module, prefix: str, seed: int = 0) -> dict[str, Tensor]:
    """A state dict for `module`: every entry by its formula; `prefix` ("vfe.", "backbone_3d.", ...) completes the keys.

    Use: ``module.load_state_dict(openpcdet_state(module, "backbone_3d.", seed))``.
    """
    return {key: openpcdet_value(prefix + key, tuple(value.shape), seed) for key, value in module.state_dict().items()}


def openpcdet_input(name: str, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """The formula input called `name`, float32."""
    return torch.from_numpy(_generator("input:" + name, seed).standard_normal(shape).astype(np.float32))
