"""The order of frames in an epoch: shuffled whole or within a window of logs, one dataset or several mixed.

Everything here is a pure function of its arguments; random numbers come from generators that are handed in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray


def shuffled_rows(log_of_row: NDArray[np.integer], window: int | None, rng: np.random.Generator) -> NDArray[np.int64]:
    """A permutation of rows that, if wanted, never needs more than `window` logs at a time.

    With a window W the logs are put into a random order; at slot m the logs m to m + W - 1 are open, and each row is drawn into
    one of the slots in which its log is open, with equal chance. So every position lies between the first and the last row of
    at most W logs, and a log is opened once. With W logs or fewer in all this is a plain shuffle.

    Args:
        log_of_row: (N,) any integers, equal for rows of one log.
        window: logs at a time, at least 1; None shuffles over all logs.
        rng: where the order is drawn from.

    Returns:
        (N,) int64, each row once.
    """
    if window is None:
        return rng.permutation(len(log_of_row))
    if window < 1:
        raise ValueError(f"a window holds at least 1 log, not {window}")
    _, log = np.unique(log_of_row, return_inverse=True)
    logs = int(log.max(initial=-1)) + 1
    place = rng.permutation(logs)[log]  # when the log of a row is opened
    first = np.maximum(place - window + 1, 0)
    last = np.minimum(place, max(logs - window, 0))
    slot = rng.integers(first, last + 1)
    return np.lexsort((rng.random(len(log)), slot))


def stream_rows(rows: int, begin: int, count: int, permutation: Callable[[int], NDArray[np.integer]]) -> NDArray[np.int64]:
    """Positions `begin` to `begin + count` of an endless stream: one permutation of all rows after the other.

    Whoever takes the stream in consecutive pieces meets every row once before any row again a second time.

    Args:
        rows: N >= 1, how many there are.
        begin: first position, 0 or more.
        count: how many positions.
        permutation: gives the (N,) order of the pass of a number from 0 on.

    Returns:
        (count,) int64 rows.
    """
    if count == 0:
        return np.zeros(0, np.int64)
    first, last = begin // rows, (begin + count - 1) // rows
    passes = np.concatenate([permutation(number) for number in range(first, last + 1)])
    return passes[begin - first * rows :][:count].astype(np.int64)


def interleaved(counts: Sequence[int], rng: np.random.Generator) -> NDArray[np.int64]:
    """Which of several streams stands at each position, all of them spread evenly.

    Item j of a stream of k is put at a random moment of the j-th of k equal parts of the epoch. So after any share of the
    epoch each stream has given that share of its items, less or more than one item: batches are alike in what they mix.

    Args:
        counts: items of each stream.
        rng: of the moments.

    Returns:
        (sum of counts,) int64, each stream's number as often as it has items.
    """
    moments = np.concatenate([(np.arange(count) + rng.random(count)) / max(count, 1) for count in counts])
    return np.repeat(np.arange(len(counts)), counts)[np.argsort(moments, kind="stable")]
