"""Is raw SemanticKITTI whole? Every scan, label file, pose and time is read."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from picture3d.datasets.check import CheckReport, Finding, ProgressCallback, Tally
from picture3d.datasets.check_frames import ReadFrame, look_through
from picture3d.datasets.label_sets import SEMANTICKITTI
from picture3d.datasets.semantickitti import Scan, frame_of_scan, list_scans, semantickitti_sequences
from picture3d.errors import DataError


def is_raw_semantickitti(folder: Path) -> bool:
    """True if a folder holds ``sequences/NN/velodyne/``, or has ``dataset/`` above that."""
    return any(path.is_dir() for root in (folder, folder / "dataset") for path in root.glob("sequences/*/velodyne"))


def check_raw_semantickitti(raw: Path, *, progress: ProgressCallback | None = None) -> CheckReport:
    """Reads every sequence, one scan in memory at a time; the kinds of trouble are those of ``check.py``, and ``missing``.

    Damaged poses, times or calibration end their sequence; a damaged scan is noted and the next is read.

    Args:
        raw: a folder that :func:`picture3d.datasets.semantickitti.prepare_semantickitti` takes.
        progress: called with (sequences read, sequences in all).

    Raises:
        DataError: if there is no sequence.
    """
    folders = semantickitti_sequences(raw)
    tally = Tally()
    findings: list[Finding] = []
    for done, folder in enumerate(folders, start=1):
        findings += _sequence(folder, tally)
        if progress is not None:
            progress(done, len(folders))
    return tally.report(raw, findings)


def _sequence(folder: Path, tally: Tally) -> list[Finding]:
    try:
        scans, missing = list_scans(folder)
    except DataError as error:
        tally.counts["logs"] += 1
        return [Finding("error", "damaged", folder.name, str(error))]
    found = look_through(folder.name, _frames(folder.name, scans), tally, SEMANTICKITTI)
    if missing:
        found.append(Finding("error", "missing", folder.name, f"not on disk: {missing[0]}", len(missing)))
    return found


def _frames(log: str, scans: list[Scan]) -> Iterator[tuple[str, ReadFrame]]:
    for index, scan in enumerate(scans):
        yield str(scan.path), partial(frame_of_scan, scan, log, index)
