"""`data objects`: the annotated objects of a prepared dataset, for pasting into other frames."""

from __future__ import annotations

from pathlib import Path

from picture3d.datasets.detection_classes import NUSCENES_DETECTION, ONCE_DETECTION, WAYMO_DETECTION
from picture3d.datasets.object_building import build_object_database
from picture3d.errors import ConfigError
from picture3d.files import sole_writer
from picture3d.training.runlog import Progress

_CLASSES = {"all": None, "nuscenes": NUSCENES_DETECTION, "waymo": WAYMO_DETECTION, "once": ONCE_DETECTION}


def objects(
    prepared: Path,
    *,
    name: str | None,
    split: str,
    sweeps: int,
    classes: str,
    every: list[str],
    min_points: int,
    processes: int,
) -> str:
    """Builds the database; returns what to tell the user.

    Raises:
        ConfigError: for unknown classes or a malformed ``--every``.
        DataError: if the frames cannot be read or the file cannot be written.
    """
    if classes not in _CLASSES:
        raise ConfigError(f"--classes {classes}: choose one of {', '.join(_CLASSES)}")
    with sole_writer(prepared / "objects"), Progress("objects", unit="keyframes") as progress:
        made = build_object_database(
            prepared,
            name=name,
            split=split,
            sweeps=sweeps,
            classes=_CLASSES[classes],
            every=dict(_interval(text) for text in every),
            min_points=min_points,
            processes=processes,
            progress=progress,
        )
    kinds = ", ".join(f"{category} {count:,}" for category, count in made.by_category.items())
    skipped = f"; {made.skipped_boxes} boxes were not finite and are left out" if made.skipped_boxes else ""
    return (
        f"{made.path}: {made.objects:,} objects of {made.logs} logs ({made.logs_made} done now), {made.points:,} points, "
        f"{made.bytes / 1e6:.1f} MB{skipped}\n{kinds or 'no objects'}"
    )


def _interval(text: str) -> tuple[str, int]:
    name, equals, number = text.partition("=")
    if not equals or not number.isdecimal():
        raise ConfigError(f"--every {text}: not of the form CLASS=N. Write for example --every Vehicle=4")
    return name, int(number)
