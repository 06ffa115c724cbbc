"""Is raw data whole, before hours are spent on preparing it? Files that tables list, their sizes, their checksums."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from picture3d.datasets.check import CheckReport, Finding
from picture3d.errors import DataError
from picture3d.formats.nuscenes_tables import RawTables, path_inside, read_tables

_POINT_BYTES = 20  # five float32 per point of a .pcd.bin file
_NAMED = 3

ProgressCallback = Callable[[int, int], None]


def is_raw_nuscenes(folder: Path) -> bool:
    """True if a folder holds tables of nuScenes."""
    return any(folder.glob("v1.0-*/scene.json"))


def check_raw_nuscenes(raw: Path, *, progress: ProgressCallback | None = None) -> CheckReport:
    """Follows every row of the tables to its file and compares sizes; no sweep is read.

    Args:
        raw: the folder that holds ``samples/``, ``sweeps/`` and ``v1.0-*/``; every version in it is looked at.
        progress: called with (files looked at, files in all).
    """
    findings: list[Finding] = []
    counts: dict[str, int] = dict.fromkeys(("logs", "frames", "keyframes", "points", "boxes", "labelled"), 0)
    categories: Counter[str] = Counter()
    for folder in sorted(path.parent for path in raw.glob("v1.0-*/scene.json")):
        try:
            tables = read_tables(raw, folder.name)
        except DataError as error:
            findings.append(Finding("error", "damaged", str(folder), str(error)))
            continue
        counts["logs"] += len(tables.scenes)
        counts["boxes"] += len(tables.annotations)
        categories.update(annotation.category for annotation in tables.annotations.values())
        findings += _files(raw, folder.name, tables, counts, progress)
    return CheckReport(raw, tuple(findings), counts, {}, dict(sorted(categories.items())))


def _files(
    raw: Path, version: str, tables: RawTables, counts: dict[str, int], progress: ProgressCallback | None
) -> Iterator[Finding]:
    missing: dict[str, list[str]] = {}
    cut: list[str] = []
    total = sum(len(sweeps) for sweeps in tables.sweeps.values())
    done = 0
    for sweeps in tables.sweeps.values():
        for sweep in sweeps:
            done += 1
            if progress is not None:
                progress(done, total)
            path = path_inside(raw, sweep.filename)
            if not path.is_file():
                missing.setdefault(Path(sweep.filename).parts[0], []).append(sweep.filename)
                continue
            size = path.stat().st_size
            if size == 0 or size % _POINT_BYTES:
                cut.append(f"{sweep.filename} has {size} bytes, not a whole number of points of {_POINT_BYTES}")
            counts["frames"] += 1
            counts["keyframes"] += int(sweep.is_keyframe)
            counts["points"] += size // _POINT_BYTES
            labels = sweep.lidarseg
            if labels is None:
                continue
            label_path = path_inside(raw, labels)
            if not label_path.is_file():
                missing.setdefault(Path(labels).parts[0], []).append(labels)
            elif label_path.stat().st_size != size // _POINT_BYTES:
                cut.append(f"{labels} has {label_path.stat().st_size} labels for {size // _POINT_BYTES} points")
            else:
                counts["labelled"] += 1
    for part, files in sorted(missing.items()):
        yield Finding("error", "missing", f"{raw}/{part}", f"listed in {version} and not on disk: {_some(files)}", len(files))
    if cut:
        yield Finding("error", "damaged", str(raw), _some(cut), len(cut))


def _some(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f", and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
