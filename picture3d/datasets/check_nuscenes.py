"""Is raw nuScenes whole? Tables are followed to their files, and every sweep is read with its labels and boxes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from picture3d.datasets.check import CheckReport, Finding, ProgressCallback, Tally
from picture3d.datasets.check_frames import ReadFrame, look_through
from picture3d.datasets.label_sets import NUSCENES_32
from picture3d.datasets.nuscenes import frame_of_sweep, label_path
from picture3d.errors import DataError
from picture3d.formats.nuscenes_tables import RawScene, RawTables, path_inside, read_tables


def is_raw_nuscenes(folder: Path) -> bool:
    """True if a folder holds tables of nuScenes."""
    return any(folder.glob("v1.0-*/scene.json"))


def check_raw_nuscenes(raw: Path, *, progress: ProgressCallback | None = None) -> CheckReport:
    """Reads every sweep that the tables list, one in memory at a time; the kinds of trouble are those of ``check.py``.

    Tables that are damaged, lack a row or hold a token twice are one error, and nothing of their version is read.
    Files that are listed and not there are one error for each folder, with their number.

    Args:
        raw: the folder that holds ``samples/``, ``sweeps/`` and ``v1.0-*/``; every version in it is looked at.
        progress: called with (sweeps looked at, sweeps in all) of a version.
    """
    findings: list[Finding] = []
    tally = Tally()
    for folder in sorted(path.parent for path in raw.glob("v1.0-*/scene.json")):
        try:
            tables = read_tables(raw, folder.name)
        except DataError as error:
            findings.append(Finding("error", "damaged", str(folder), str(error)))
            continue
        findings += _version(raw, folder.name, tables, tally, progress)
    return tally.report(raw, findings)


def _version(raw: Path, version: str, tables: RawTables, tally: Tally, progress: ProgressCallback | None) -> Iterator[Finding]:
    missing: Counter[str] = Counter()
    first: dict[str, str] = {}
    total, done = sum(map(len, tables.sweeps.values())), 0

    def sweeps(scene: RawScene) -> Iterator[tuple[str, ReadFrame]]:
        nonlocal done
        for index, sweep in enumerate(tables.sweeps[scene.token]):
            if path_inside(raw, sweep.filename).is_file():
                yield sweep.filename, partial(frame_of_sweep, raw, tables, sweep, scene.name, index)
            done += 1
            if progress is not None:
                progress(done, total)

    for scene in tables.scenes:
        for file in _absent(raw, tables, scene):
            place = str(Path(file).parent)
            first.setdefault(place, file)
            missing[place] += 1
        yield from look_through(scene.name, sweeps(scene), tally, NUSCENES_32)
    for place, count in sorted(missing.items()):
        yield Finding("error", "missing", f"{raw}/{place}", f"listed in {version} and not on disk: {first[place]}", count)


def _absent(raw: Path, tables: RawTables, scene: RawScene) -> Iterator[str]:
    """The files of a scene that are listed and not there."""
    for sweep in tables.sweeps[scene.token]:
        if not path_inside(raw, sweep.filename).is_file():
            yield sweep.filename
        for labels in (sweep.lidarseg, sweep.panoptic):
            if labels is not None and not label_path(raw, labels).is_file():
                yield labels
