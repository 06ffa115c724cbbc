"""How many CPU threads one process computes with."""

from __future__ import annotations

import torch


def set_threads(count: int) -> int:
    """Chooses the CPU threads of tensor operations and returns how many are in use.

    Call it once, before the first operation: raising the number midway can leave a process far slower than either choice.

    Args:
        count: threads; 0 keeps what the process was started with (`OMP_NUM_THREADS`, or every core).

    Raises:
        ValueError: for a negative count.
    """
    if count < 0:
        raise ValueError(f"threads must be 0 or more, got {count}")
    if count and count != torch.get_num_threads():
        torch.set_num_threads(count)
    return torch.get_num_threads()
