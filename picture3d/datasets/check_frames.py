"""What the checks of raw data share: frame after frame is read, damage to one is noted and the next is looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from picture3d.datasets.check import Finding, LogFindings, Tally
from picture3d.datasets.label_sets import LabelSet
from picture3d.errors import DataError
from picture3d.structures.frame import Frame

ReadFrame = Callable[[], tuple[Frame, int]]  # a frame, and the points it lost because they were not finite


def look_through(log: str, frames: Iterable[tuple[str, ReadFrame]], tally: Tally, labels: LabelSet | None) -> list[Finding]:
    """Reads the frames of a log, one in memory at a time.

    Args:
        log: its name.
        frames: of each frame what to call it and how to read it. What reading raises is noted and the next frame is read;
            behind an error of the iteration itself nothing of the log is read.
        tally: frames, points, boxes and classes are added to it, and the log itself.
        labels: what labels mean.

    Returns:
        What was found; the kinds are those of ``check.py``.
    """
    found = LogFindings(log)
    tally.counts["logs"] += 1
    try:
        for where, read in frames:
            try:
                frame, lost = read()
            except DataError as error:
                found.add("error", "damaged", str(error))
                continue
            if lost:
                found.add("warning", "not-finite", f"{where}: {lost} points are not finite and will be left out", lost)
            tally.counts["keyframes"] += int(frame.is_keyframe)
            found.look_at(frame, labels)
            tally.add(frame, labels)
    except DataError as error:
        found.add("error", "damaged", str(error))
    return found.finish()
