"""`score waymo-detection`: the official numbers of prediction files that any program wrote."""

from __future__ import annotations

import json
from pathlib import Path

from picture3d.config import nearest
from picture3d.errors import ConfigError, DataError
from picture3d.evaluation.waymo_detection import KINDS, LEVELS, WaymoScores, score_segments
from picture3d.formats.waymo_objects_reading import ObjectsFile

_KIND_OF_NAME = {name.lower(): kind for kind, name in KINDS.items()}


def score_waymo_detection(predictions: Path, labels: Path, *, iou: list[str], as_json: bool) -> str:
    """Scores an ``Objects`` file against another; returns a table, or JSON by the official names of the breakdowns.

    Args:
        predictions: the submission.
        labels: the ground truth.
        iou: "class=threshold" where it is not the official one.
        as_json: JSON instead of the table.

    Raises:
        ConfigError: for an unknown class or a threshold outside of 0..1.
        DataError: as the reader and the metric do.
    """
    thresholds = dict(_threshold(text) for text in iou)
    truth, found = ObjectsFile(labels), ObjectsFile(predictions)
    try:
        scores = score_segments(truth, found, iou_thresholds=thresholds)
    except DataError as error:
        raise DataError(f"{predictions}, {labels}: {error}") from None
    return json.dumps(scores.to_json()) if as_json else table(str(predictions), scores)


def table(title: str, scores: WaymoScores) -> str:
    """Plain text: AP and APH per breakdown at both levels, and the means over the three classes of the challenge."""
    header = ("breakdown", *(f"L{level} {what}" for level in LEVELS for what in ("AP %", "APH %", "labels")))
    rows: list[tuple[str, ...]] = [header]
    for name in scores.ap:
        shard, _, level = name.rpartition("_LEVEL_")
        if int(level) != LEVELS[0]:
            continue
        cells = []
        for each in LEVELS:
            key = f"{shard}_LEVEL_{each}"
            cells += [f"{100 * scores.ap[key]:.2f}", f"{100 * scores.aph[key]:.2f}", str(scores.labels[key])]
        rows.append((shard.removeprefix("OBJECT_TYPE_TYPE_").removeprefix("RANGE_TYPE_").replace("_", " "), *cells))
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    means = [f"L{level} mAP {100 * ap:.2f} mAPH {100 * aph:.2f}" for level in LEVELS for ap, aph in [scores.mean(level=level)]]
    return "\n".join([title, *lines, f"{', '.join(means)}  (vehicle, pedestrian, cyclist; {scores.frames} frames)"])


def _threshold(text: str) -> tuple[int, float]:
    name, _, number = text.partition("=")
    if name.lower() not in _KIND_OF_NAME:
        guess = nearest(name.lower(), _KIND_OF_NAME)
        hint = f"Did you mean {guess}?" if guess else f"Choose one of {', '.join(_KIND_OF_NAME)}."
        raise ConfigError(f"--iou {text}: no class is called '{name}'. {hint}")
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if not 0 < value <= 1:
        raise ConfigError(
            f"--iou {text}: not of the form CLASS=THRESHOLD. Write a number above 0 and up to 1, for example vehicle=0.7"
        )
    return _KIND_OF_NAME[name.lower()], value
