"""Processes that share work without talking to each other, started by torchrun: they end together."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from picture3d.errors import Picture3dError

_LOOK_S, _CONNECT_S = 0.1, 30.0


@contextmanager
def ending_together(share: tuple[int, int]) -> Iterator[None]:
    """Leaves the block, also with an error that is told the user, when every process has come to its end, however long it takes.

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

    with suppress(RuntimeError):  # the store went with the first machine's launcher: there is nobody left to wait for
        store, job = job_store(_CONNECT_S)
        store.set(f"{job}/ended/{rank}", "here")
        while not store.check([f"{job}/ended/{other}" for other in range(world)]):
            time.sleep(_LOOK_S)
