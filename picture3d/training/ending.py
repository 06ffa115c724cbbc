"""Processes that share work without talking to each other, started by torchrun: they end together."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from picture3d.errors import Picture3dError

_LOOK_S = 0.1
_CONNECT_S, _LATE_S = 30.0, 30 * 86400.0  # to a store that is there, and to one that a slow process will make


@contextmanager
def ending_together(share: tuple[int, int]) -> Iterator[None]:
    """Leaves the block, also with an error that the user is told, when every process is at its end, however long that takes.

    torchrun ends all processes as soon as one ends with an error, and one machine waits for the next five minutes only. It also
    ends those that wait here if one dies without a word. Without torchrun nothing is awaited.

    Args:
        share: (rank, world).
    """
    rank, world = share
    if world == 1 or "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    try:
        yield
    except (Picture3dError, OSError):
        _await_all(rank, world)
        raise
    _await_all(rank, world)


def _await_all(rank: int, world: int) -> None:
    from picture3d.training.watch import job_store

    launchers = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # otherwise the first process has it, once it is here
    with suppress(RuntimeError):  # gone with the launcher or the first process: there is nobody left to wait for
        store, job = job_store(_CONNECT_S if launchers else _LATE_S, hosts=rank == 0 and not launchers)
        store.set(f"{job}/ended/{rank}", "here")
        while not store.check([f"{job}/ended/{other}" for other in range(world)]):
            time.sleep(_LOOK_S)
