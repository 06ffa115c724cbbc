"""What the processes of a job compute together before the first log: the frames that a basis is fitted on, each of them once.

The processes meet in the store's folder and need no connection: each begins at a place of its own, goes round, and computes
what is not there yet. One that runs alone computes everything.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import numpy as np

from picture3d.errors import DataError
from picture3d.files import replacing
from picture3d.teachers.feature_basis import FrameMoments

_PREFIX = ".fit-"


def moments_of_job(
    folder: Path,
    mark: str,
    count: int,
    make: Callable[[int], FrameMoments],
    settled: Callable[[], bool],
    share: tuple[int, int],
) -> list[FrameMoments] | None:
    """The moments of frames 0 to `count` - 1, in order.

    Args:
        folder: of the store; files in it begin with a dot and hold plain arrays.
        mark: tells what other settings have left there from this.
        count: frames.
        make: computes those of one frame.
        settled: whether another process has got to the end by now; its files may be gone then.
        share: (rank, world).

    Returns:
        None if they are no longer wanted.

    Raises:
        DataError: if the folder cannot be written.
    """
    rank, world = share
    if world == 1:
        return [make(number) for number in range(count)]
    paths = [folder / f"{_PREFIX}{mark}-{number}.npz" for number in range(count)]
    first = rank * count // world
    for number in (*range(first, count), *range(first)):
        if settled():
            return None
        if not paths[number].exists():
            made = make(number)
            try:
                _write(paths[number], made, rank)
            except DataError:  # the one that got to the end may have swept away what is half-written here, too
                if not settled():
                    raise
                return None
    try:
        return [_read(path) for path in paths]
    except FileNotFoundError:
        if not settled():
            raise
        return None


def forget_moments(folder: Path) -> None:
    """Removes what `moments_of_job` left in a folder."""
    for path in folder.glob(f"{_PREFIX}*"):
        with suppress(FileNotFoundError):  # by another process at the same moment
            path.unlink()


def _write(path: Path, moments: FrameMoments, rank: int) -> None:
    with replacing(path, f".{rank}") as partial, partial.open("wb") as file:
        np.savez(file, allow_pickle=False, **{field.name: getattr(moments, field.name) for field in fields(moments)})


def _read(path: Path) -> FrameMoments:
    with np.load(path, allow_pickle=False) as arrays:
        return FrameMoments(**{field.name: arrays[field.name] for field in fields(FrameMoments)})
