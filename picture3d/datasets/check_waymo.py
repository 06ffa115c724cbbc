"""Is raw Waymo data whole? Every range image is turned into points, of v1 after every byte met its checksum."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from picture3d.datasets.check import CheckReport, Finding, ProgressCallback, Tally
from picture3d.datasets.check_frames import ReadFrame, look_through
from picture3d.datasets.label_sets import WAYMO
from picture3d.datasets.waymo import SPLIT_FOLDERS, frame_of_waymo, segment_name, waymo_segments
from picture3d.datasets.waymo_v2 import segments_of
from picture3d.formats.tfrecord import read_records
from picture3d.formats.waymo_frame import read_frame
from picture3d.formats.waymo_v2 import BOX, REQUIRED, component_file, read_segment
from picture3d.structures.frame import Frame


def check_raw_waymo(raw: Path, *, progress: ProgressCallback | None = None) -> CheckReport:
    """Reads every segment of v1 whole, one frame in memory at a time; the kinds of trouble are those of ``check.py``.

    Damage inside of a frame is noted and the next frame is looked at; behind a damaged record nothing of a file can be read.
    A segment that is in two splits is an error too, as are segments that a list names and that are not there.

    Args:
        raw: the folder that :func:`picture3d.datasets.waymo.waymo_segments` takes.
        progress: called with (segments read, segments in all).

    Raises:
        DataError: if the lists of the splits contradict each other.
    """
    segments, missing = waymo_segments(raw)
    tally = Tally()
    findings: list[Finding] = []
    if missing:
        findings.append(Finding("error", "missing", str(raw), f"listed and not on disk: {missing[0]}", len(missing)))
    home: dict[str, Path] = {}
    for done, (path, split) in enumerate(segments, start=1):
        log = segment_name(path)
        findings += _twice(log, path, home)
        findings += look_through(log, _records(path, log, annotated=split != "test"), tally, WAYMO)
        if progress is not None:
            progress(done, len(segments))
    return tally.report(raw, findings)


def check_raw_waymo_v2(raw: Path, *, progress: ProgressCallback | None = None) -> CheckReport:
    """Reads every segment of v2 whole, one frame in memory at a time, and names the components that a segment lacks.

    Args:
        raw: the folder that holds ``training/``, ``validation/`` or ``testing/`` with their components.
        progress: called with (segments read, segments in all).

    Raises:
        ConfigError: if pyarrow is not installed.
    """
    segments = [(segment, folder) for folder in SPLIT_FOLDERS for segment in segments_of(raw / folder)]
    tally = Tally()
    findings: list[Finding] = []
    home: dict[str, Path] = {}
    for done, (log, folder) in enumerate(segments, start=1):
        findings += _twice(log, raw / folder, home)
        needed = (*REQUIRED, BOX) if (raw / folder / BOX).is_dir() else REQUIRED
        absent = [name for name in needed if not component_file(raw / folder, name, log).is_file()]
        if absent:
            findings.append(Finding("error", "missing", log, f"{raw / folder}: lacks {', '.join(absent)}", len(absent)))
            tally.counts["logs"] += 1
        else:
            annotated = BOX in needed and SPLIT_FOLDERS[folder] != "test"
            findings += look_through(log, _rows(raw / folder, log, annotated=annotated), tally, WAYMO)
        if progress is not None:
            progress(done, len(segments))
    return tally.report(raw, findings)


def _twice(log: str, place: Path, home: dict[str, Path]) -> list[Finding]:
    before = home.setdefault(log, place)
    return [] if before is place else [Finding("error", "split-overlap", log, f"is in {before} and in {place}")]


def _records(path: Path, log: str, *, annotated: bool) -> Iterator[tuple[str, ReadFrame]]:
    def read(payload: memoryview | bytes, index: int, where: str) -> tuple[Frame, int]:
        return frame_of_waymo(read_frame(payload, where), log, index, where, annotated=annotated)

    for index, (offset, payload) in enumerate(read_records(path)):
        where = f"{path}, record {index} at byte {offset}"
        yield where, partial(read, payload, index, where)


def _rows(folder: Path, log: str, *, annotated: bool) -> Iterator[tuple[str, ReadFrame]]:
    for index, frame in enumerate(read_segment(folder, log)):
        where = f"{folder}, segment {log}, time {frame.timestamp_us} us"
        yield where, partial(frame_of_waymo, frame, log, index, where, annotated=annotated)
