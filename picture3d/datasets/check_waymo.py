"""Are raw Waymo v1 tfrecords whole? Every byte is read against its checksum, every range image is turned into points."""

from __future__ import annotations

from pathlib import Path

from picture3d.datasets.check import CheckReport, Finding, LogFindings, ProgressCallback, Tally
from picture3d.datasets.label_sets import WAYMO
from picture3d.datasets.waymo import SPLIT_FOLDERS, frame_of_waymo, segment_files, segment_name
from picture3d.errors import DataError
from picture3d.formats.tfrecord import read_records
from picture3d.formats.waymo_frame import read_frame


def is_raw_waymo(folder: Path) -> bool:
    """True if a folder holds tfrecords in ``training/``, ``validation/`` or ``testing/``."""
    return any(segment_files(folder / split) for split in SPLIT_FOLDERS)


def check_raw_waymo(raw: Path, *, progress: ProgressCallback | None = None) -> CheckReport:
    """Reads every segment whole, one frame in memory at a time; the kinds of trouble are those of ``check.py``.

    Damage inside of a frame is noted and the next frame is looked at; behind a damaged record nothing of a file can be read.
    A segment that is in two splits is an error too.

    Args:
        raw: the folder that holds ``training/``, ``validation/`` or ``testing/``.
        progress: called with (segments read, segments in all).
    """
    segments = [(path, folder) for folder in SPLIT_FOLDERS for path in segment_files(raw / folder)]
    tally = Tally()
    findings: list[Finding] = []
    home: dict[str, Path] = {}
    for done, (path, folder) in enumerate(segments, start=1):
        log = segment_name(path)
        if log in home:
            findings.append(Finding("error", "split-overlap", log, f"is in {home[log]} and in {path}"))
        home[log] = path
        findings += _segment(path, log, tally, annotated=SPLIT_FOLDERS[folder] != "test")
        tally.counts["logs"] += 1
        if progress is not None:
            progress(done, len(segments))
    return tally.report(raw, findings)


def _segment(path: Path, log: str, tally: Tally, *, annotated: bool) -> list[Finding]:
    found = LogFindings(log)
    try:
        for index, (offset, payload) in enumerate(read_records(path)):
            where = f"{path}, record {index} at byte {offset}"
            tally.counts["keyframes"] += 1
            try:
                frame, lost = frame_of_waymo(read_frame(payload, where), log, index, where, annotated=annotated)
            except DataError as error:
                found.add("error", "damaged", str(error))
                continue
            if lost:
                found.add("warning", "not-finite", f"{where}: {lost} points are not finite and will be left out", lost)
            found.look_at(frame, WAYMO)
            tally.add(frame, WAYMO)
    except DataError as error:
        found.add("error", "damaged", str(error))
    return found.finish()
