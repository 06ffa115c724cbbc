"""Device, threads and memory of a command, chosen once at its start."""

from __future__ import annotations

import torch

from picture3d.errors import ConfigError
from picture3d.training.distributed import Place, launched_place
from picture3d.training.host_memory import keep_few_operations, keep_freed_memory
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


def start(device: str, threads: int, place: Place | None = None) -> torch.device:
    """Sets the CPU threads and returns the device; each process of a machine has a GPU of its own unless one is named.

    Memory that the process frees stays with it from here on, where the C library can be told so, and compiled operations of new
    shapes do not pile up (`training.host_memory`).

    Args:
        device: as the user names it.
        threads: 0: as the process was started.
        place: which process of a job this is; None for a command that does not share its work out.

    Raises:
        ConfigError: if there is no such device, or fewer GPUs than processes, or several processes were started for work
            that is not shared out.
    """
    if place is None and (launched := launched_place()).world > 1:
        raise ConfigError(
            f"this command works in one process, and {launched.world} were started: each would do the whole of it and write "
            "the same files. Start it without torchrun, and without RANK and WORLD_SIZE in the environment."
        )
    keep_freed_memory()
    keep_few_operations()
    set_threads(threads)
    chosen = choose_device(device)
    if place is None or place.world == 1 or chosen.type != "cuda" or chosen.index is not None:
        return chosen
    if place.local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"process {place.local_rank} of this machine has no GPU of its own, there are {torch.cuda.device_count()}: start "
            "fewer (torchrun --nproc-per-node), or use --device cpu"
        )
    return torch.device("cuda", place.local_rank)
