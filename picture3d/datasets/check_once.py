"""Is raw ONCE data whole? Every file of a sequence is read, every sweep that it lists is looked for and read."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from picture3d.datasets.check import CheckReport, Finding, ProgressCallback, Tally
from picture3d.datasets.check_frames import ReadFrame, look_through
from picture3d.datasets.once import OnceFrame, frame_of_once, once_sequences, read_once_sequence, sweep_file
from picture3d.errors import DataError


def is_raw_once(folder: Path) -> bool:
    """True if a folder holds ``data/<sequence>/<sequence>.json`` or ``data/<sequence>/lidar_roof/``."""
    data = folder / "data"
    return data.is_dir() and any(
        (path / f"{path.name}.json").is_file() or (path / "lidar_roof").is_dir() for path in data.iterdir()
    )  # fmt: skip


def check_raw_once(raw: Path, *, progress: ProgressCallback | None = None) -> CheckReport:
    """Reads every sequence, one sweep in memory at a time; the kinds of trouble are those of ``check.py``, and ``missing``.

    Lists of ImageSets that contradict each other, or leave a sequence out, are one error each time they are met; the sequences
    are read all the same.

    Args:
        raw: the folder that holds ``data/`` and ``ImageSets/``.
        progress: called with (sequences read, sequences in all).
    """
    tally = Tally()
    findings: list[Finding] = []
    try:
        sequences = list(once_sequences(raw))
    except DataError as error:
        findings.append(Finding("error", "split-overlap", str(raw / "ImageSets"), str(error)))
        sequences = sorted(path.name for path in (raw / "data").iterdir() if path.is_dir())
    for done, log in enumerate(sequences, start=1):
        findings += _sequence(raw / "data" / log, tally)
        if progress is not None:
            progress(done, len(sequences))
    return tally.report(raw, findings)


def _sequence(folder: Path, tally: Tally) -> list[Finding]:
    info = folder / f"{folder.name}.json"
    if not info.is_file():
        tally.counts["logs"] += 1
        return [Finding("error", "missing", folder.name, f"{info} is not on disk: the sweeps have neither poses nor boxes")]
    try:
        frames = read_once_sequence(info)
    except DataError as error:
        tally.counts["logs"] += 1
        return [Finding("error", "damaged", folder.name, str(error))]
    present = [frame for frame in frames if sweep_file(folder, frame).is_file()]
    found = look_through(folder.name, _sweeps(folder, present), tally, None)
    absent = [sweep_file(folder, frame) for frame in frames if not sweep_file(folder, frame).is_file()]
    if absent:
        found.append(Finding("error", "missing", folder.name, f"listed and not on disk: {absent[0]}", len(absent)))
    return found


def _sweeps(folder: Path, frames: list[OnceFrame]) -> Iterator[tuple[str, ReadFrame]]:
    for index, frame in enumerate(frames):
        path = sweep_file(folder, frame)
        yield str(path), partial(frame_of_once, frame, path, folder.name, index)
