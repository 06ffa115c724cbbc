"""Class-balanced resampling: frames are repeated or left out until every class has as many frames as the others.

Zhu et al., Class-balanced Grouping and Sampling for Point Cloud 3D Object Detection (2019), as nuScenes detectors are trained:
each class has a list of the frames that hold it, and every list is resampled to the same length, the sum of all lengths over
the number of classes. The published code draws with replacement; here a list is gone through as often as it fits whole and only
the rest is drawn, so that no frame of a class is chosen twice more often than another.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from picture3d.datasets.detection_classes import DetectionClasses
from picture3d.datasets.prepared import FrameKey, PreparedDataset
from picture3d.errors import DataError
from picture3d.files import read_json_object, write_text

_FORMAT = "picture3d-box-counts"
_VERSION = 1
_MAX_BYTES = 1 << 30


def balanced_rows(counts: NDArray[np.integer], seed: int) -> NDArray[np.int64]:
    """Which frames to train on, class by class: each class that occurs gets an equal share of the rows.

    The share is the sum over the classes of the frames that hold them, divided by the number of classes that occur, rounded
    down. A frame that holds no class is never chosen; without any object in any frame nothing is.

    Args:
        counts: (F, C) objects of each class in each frame.
        seed: of the draw; the same counts and seed give the same rows.

    Returns:
        (K,) int64 rows of `counts`.
    """
    lists = [np.flatnonzero(column > 0) for column in np.asarray(counts).T]
    lists = [rows for rows in lists if len(rows)]
    if not lists:
        return np.zeros(0, np.int64)
    share = sum(len(rows) for rows in lists) // len(lists)
    rng = np.random.default_rng(seed)
    chosen = []
    for rows in lists:
        times, rest = divmod(share, len(rows))
        chosen += [np.tile(rows, times), rng.choice(rows, rest, replace=False)]
    return np.concatenate(chosen).astype(np.int64)


def balanced_keys(
    dataset: PreparedDataset, keys: Sequence[FrameKey], classes: DetectionClasses, *, seed: int, min_box_points: int = 1
) -> list[FrameKey]:
    """The keyframes of `keys`, resampled by :func:`balanced_rows`, in the order of `keys`.

    Args:
        dataset: that the keys belong to.
        keys: keyframes to choose from.
        classes: that are balanced.
        seed: of the draw.
        min_box_points: boxes with fewer LiDAR points do not count; those of an unknown number do.

    Raises:
        DataError: if a log is damaged, or no frame holds an object of the classes.
    """
    rows = balanced_rows(class_counts(dataset, keys, classes, min_box_points=min_box_points), seed)
    if not len(rows):
        raise DataError(
            f"{dataset.root}: none of the {len(keys)} frames holds an object of {', '.join(classes.names)}, so there is "
            "nothing to balance. Check the names of the classes, or switch balancing off."
        )
    return [keys[row] for row in np.sort(rows)]


def class_counts(
    dataset: PreparedDataset, keys: Sequence[FrameKey], classes: DetectionClasses, *, min_box_points: int = 1
) -> NDArray[np.int64]:
    """(F, C) int64: boxes of each class in each keyframe; 0 in a frame that was not annotated.

    Only the columns of the boxes are read, and counts per category are kept in ``box_counts/min<N>.json`` beside the logs: a
    log that did not change is not read again. Where that file cannot be written, every start counts anew.

    Raises:
        DataError: if a log is damaged.
    """
    path = dataset.notes_folder / "box_counts" / f"min{min_box_points}.json"
    kept = _kept(path)
    logs = sorted({key.log for key in keys})
    counted = {log: kept[log] for log in logs if kept.get(log, {}).get("crc32c") == dataset.summary(log).crc32c}
    if missing := [log for log in logs if log not in counted]:
        counted |= {log: _count(dataset, log, min_box_points) for log in missing}
        tree = {"format": _FORMAT, "version": _VERSION, "logs": kept | counted}
        with suppress(DataError):
            write_text(path, json.dumps(tree, separators=(",", ":")))
    out = np.zeros((len(keys), len(classes.names)), np.int64)
    classes_of = {log: classes.of(entry["categories"]) for log, entry in counted.items()}
    for row, key in enumerate(keys):
        for category, number in counted[key.log]["frames"].get(str(key.index), ()):
            if class_index := int(classes_of[key.log][category]):
                out[row, class_index - 1] += number
    return out


def _count(dataset: PreparedDataset, log: str, min_box_points: int) -> dict[str, Any]:
    """Per keyframe pairs (category, boxes), categories as rows of a table of the log."""
    reader = dataset.reader(log)
    table: dict[str, int] = {}
    frames: dict[str, list[list[int]]] = {}
    for index in reader.keyframes:
        boxes = reader.boxes(index)
        if boxes is None:
            continue
        counts: dict[int, int] = {}
        for category, points in zip(boxes.category, boxes.num_points, strict=True):
            if points < 0 or points >= min_box_points:
                number = table.setdefault(category, len(table))
                counts[number] = counts.get(number, 0) + 1
        if counts:
            frames[str(index)] = [[number, count] for number, count in counts.items()]
    return {"crc32c": dataset.summary(log).crc32c, "categories": list(table), "frames": frames}


def _kept(path: Path) -> dict[str, Any]:
    """What an earlier run counted; nothing if there is no such file, or it is not whole."""
    try:
        tree = read_json_object(path, max_bytes=_MAX_BYTES)
        if tree["format"] != _FORMAT or tree["version"] != _VERSION:
            return {}
        return {str(log): _checked(entry) for log, entry in tree["logs"].items()}
    except (DataError, KeyError, TypeError, ValueError, AttributeError):
        return {}


def _checked(entry: dict[str, Any]) -> dict[str, Any]:
    categories = [str(name) for name in entry["categories"]]
    for pairs in entry["frames"].values():
        for category, number in pairs:
            if not 0 <= category < len(categories) or number < 1:
                raise ValueError(f"category {category}, {number} boxes")
    return {"crc32c": int(entry["crc32c"]), "categories": categories, "frames": entry["frames"]}
