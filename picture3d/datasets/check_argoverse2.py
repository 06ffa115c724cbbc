"""Are raw Argoverse 2 sensor logs whole? Every table and every sweep is read."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from picture3d.datasets.argoverse2 import ArgoverseLog, argoverse2_logs, open_argoverse2
from picture3d.datasets.check import CheckReport, Finding, ProgressCallback, Tally
from picture3d.datasets.check_frames import ReadFrame, look_through
from picture3d.errors import DataError


def is_raw_argoverse2(folder: Path) -> bool:
    """True if a folder holds logs of Argoverse 2, or is one; see :func:`prepare_argoverse2`."""
    try:
        return bool(argoverse2_logs(folder))
    except DataError:
        return False


def check_raw_argoverse2(raw: Path, *, progress: ProgressCallback | None = None) -> CheckReport:
    """Reads every log, one sweep in memory at a time; the kinds of trouble are those of ``check.py``, and ``missing``.

    A damaged table ends its log, a damaged sweep is noted and the next is read.

    Args:
        raw: a folder that :func:`prepare_argoverse2` takes.
        progress: called with (logs read, logs in all).

    Raises:
        ConfigError: if pyarrow is not installed.
        DataError: if there is no log.
    """
    logs = [(split, folder) for split, folders in argoverse2_logs(raw).items() for folder in folders]
    tally = Tally()
    findings: list[Finding] = []
    home: dict[str, str] = {}
    for done, (split, folder) in enumerate(logs, start=1):
        name = folder.resolve().name
        if home.setdefault(name, split) != split:
            findings.append(Finding("error", "split-overlap", name, f"is in split '{home[name]}' and in split '{split}'"))
        findings += _log(folder, tally)
        if progress is not None:
            progress(done, len(logs))
    return tally.report(raw, findings)


def _log(folder: Path, tally: Tally) -> list[Finding]:
    try:
        log = open_argoverse2(folder)
    except DataError as error:
        tally.counts["logs"] += 1
        return [Finding("error", "damaged", folder.resolve().name, str(error))]
    found = look_through(log.name, _sweeps(log), tally, None)
    if log.missing:
        what = f"annotated and not on disk: {log.missing[0]}"
        found.append(Finding("error", "missing", log.name, what, len(log.missing)))
    return found


def _sweeps(log: ArgoverseLog) -> Iterator[tuple[str, ReadFrame]]:
    for index, path in enumerate(log.files):
        yield str(path), partial(log.frame, index)
