"""Are the user's own sweeps whole? Every file is read as `prepare points` would read it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from picture3d.datasets.check import CheckReport, Finding, ProgressCallback, Tally
from picture3d.datasets.check_frames import ReadFrame, look_through
from picture3d.datasets.point_files import SweepFile, frame_of_file, point_logs
from picture3d.errors import DataError
from picture3d.formats.point_tables import parse_layout
from picture3d.structures.points import IntensityUnit


def is_raw_points(folder: Path) -> bool:
    """True if a folder, or one inside of it, holds sweeps (``.bin .pcd .npy .ply``)."""
    try:
        return bool(point_logs(folder))
    except DataError:
        return False


def check_raw_points(folder: Path, *, layout: str = "x,y,z,intensity", progress: ProgressCallback | None = None) -> CheckReport:
    """Reads every sweep, one in memory at a time; the kinds of trouble are those of ``check.py``.

    Args:
        folder: a folder that :func:`picture3d.datasets.point_files.prepare_points` takes.
        layout: columns of ``.bin`` and ``.npy`` files.
        progress: called with (sweeps read, sweeps in all).

    Raises:
        DataError: if there are no sweeps, or the layout is none.
    """
    columns = parse_layout(layout)
    logs = point_logs(folder)
    total, done = sum(map(len, logs.values())), 0
    tally = Tally()
    findings: list[Finding] = []

    def frames(log: str, files: list[SweepFile]) -> Iterator[tuple[str, ReadFrame]]:
        nonlocal done
        for index, file in enumerate(files):
            yield str(file.path), partial(frame_of_file, log, index, file, columns, IntensityUnit.UNKNOWN)
            done += 1
            if progress is not None:
                progress(done, total)

    for log, files in logs.items():
        findings += look_through(log, frames(log, files), tally, None)
    return tally.report(folder, findings)
