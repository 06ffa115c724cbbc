"""Device and threads of a command, chosen once at its start."""

from __future__ import annotations

import torch

from picture3d.errors import ConfigError
from picture3d.training.threads import set_threads


def choose_device(name: str) -> torch.device:
    """The device called `name`; ``auto`` is the first GPU where there is one.

    Raises:
        ConfigError: if there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device {name}: not a device; use cpu, cuda, cuda:1 or auto") from None
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ConfigError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices; use --device cpu")
    return device


def start(device: str, threads: int) -> torch.device:
    """Sets the CPU threads and returns the device."""
    set_threads(threads)
    return choose_device(device)
