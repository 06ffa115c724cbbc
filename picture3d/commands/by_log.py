"""Looking at every frame of a split in several processes: each takes every W-th log, and the first gets what came of each.

Results are kept apart by log and joined in the order of the logs, by one process alone as well: so the numbers do not depend on
how many processes there were, to the last bit.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from picture3d.datasets.loading import FrameBatches
from picture3d.datasets.prepared import FrameKey
from picture3d.structures.batch import PointBatch
from picture3d.training.distributed import Team
from picture3d.training.runlog import Progress

Arrays = Mapping[str, NDArray[Any]]
Frames = Iterator[tuple[FrameKey, PointBatch]]


def log_by_log(batches: FrameBatches, team: Team, label: str, part: Callable[[Frames], Arrays]) -> list[Arrays]:
    """What `part` makes of the frames of each log.

    Args:
        batches: every frame once, un-augmented, alone in its batch.
        team: the processes among which the logs are dealt out.
        label: of the bar that shows the progress of the first process.
        part: called for each log of this process; gives arrays of numbers or text.

    Returns:
        In the first process one entry for each log, in order; in the others nothing.

    Raises:
        TrainingError: if another process has died.
    """
    every = batches.keys
    logs: dict[str, list[FrameKey]] = {}
    for key in every:
        logs.setdefault(key.log, []).append(key)
    rank, world = team.place.rank, team.place.world
    own = list(enumerate(logs.values()))[rank::world]
    total, done = sum(len(keys) for _, keys in own), 0
    found: dict[str, NDArray[Any]] = {}

    def frames(keys: list[FrameKey]) -> Frames:
        nonlocal done
        batches.choose(keys)
        try:
            for key, batch in zip(keys, batches.epoch(0), strict=True):
                yield key, batch
                done += 1
                if team.writes:
                    progress(done, total)
        finally:
            batches.choose(every)

    with Progress(label) as progress:
        for number, keys in own:
            with team.at(f"frames of log {keys[0].log}", waits=False):
                found |= {f"{number}/{name}": array for name, array in part(frames(keys)).items()}
    parts = [_unpacked(packed) for packed in team.gather(_packed(found))]
    of_log: list[dict[str, NDArray[Any]]] = [{} for _ in logs] if team.writes else []
    for name, array in (item for arrays in parts for item in arrays.items()):
        number, _, name_in_log = name.partition("/")
        of_log[int(number)][name_in_log] = array
    return list(of_log)


def _packed(arrays: Arrays) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, allow_pickle=False, **arrays)
    return stream.getvalue()


def _unpacked(packed: bytes) -> dict[str, NDArray[Any]]:
    with np.load(io.BytesIO(packed), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}
