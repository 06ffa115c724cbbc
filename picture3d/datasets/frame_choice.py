"""Which keyframes of a dataset a config asks for: a split, those that are labelled, a share of the labels, every n-th."""

from __future__ import annotations

from typing import TypeVar

import numpy as np

from picture3d.datasets.prepared import FrameKey, LogSummary, PreparedDataset
from picture3d.datasets.samples import DataConfig
from picture3d.errors import DataError

_Item = TypeVar("_Item")


def select_keyframes(dataset: PreparedDataset, config: DataConfig) -> list[FrameKey]:
    """The keyframes a config asks for, by log name and time.

    A label share takes whole logs (of those that hold labels of the wanted kind, if any does): the first
    ``max(1, round(share * logs))`` of an order drawn from `label_seed`, so that shares are nested. If the split has a single
    log, its keyframes are taken in that way instead.

    Raises:
        DataError: if the split does not exist or holds no keyframe.
    """
    keys = labelled_share(dataset, config)[:: config.every]
    if config.max_frames is not None and len(keys) > config.max_frames:
        keys = [keys[i] for i in np.linspace(0, len(keys) - 1, config.max_frames).round().astype(int)]
    if not keys:
        what = "labelled keyframe" if config.labelled_only else "keyframe"
        what += " with occupancy labels" if config.occupancy else ""
        raise DataError(
            f"{dataset.root}: split '{config.split}' holds no {what}. Choose another of its splits "
            f"({', '.join(dataset.splits)}), or prepare the data with what is missing."
        )
    return keys


def labelled_share(dataset: PreparedDataset, config: DataConfig) -> list[FrameKey]:
    """The keyframes whose labels a config may use, by log name and time: those of `select_keyframes` and what it leaves out
    between them (`every`, `max_frames`)."""
    keys = list(dataset.keyframes(config.split))
    if config.labelled_only:
        keys = [key for key in keys if _labelled(dataset, key)]
    if config.occupancy:
        labelled = {log: frozenset(dataset.occupancy().labelled(log)) for log in dict.fromkeys(key.log for key in keys)}
        keys = [key for key in keys if key.index in labelled[key.log]]
    if config.label_share < 1.0:
        logs = sorted({key.log for key in keys})
        logs = [log for log in logs if _annotated(dataset.summary(log), config)] or logs
        keys = [key for key in keys if key.log in logs]
        if len(logs) > 1:
            chosen = set(_nested_share(logs, config))
            keys = [key for key in keys if key.log in chosen]
        elif keys:
            keys = sorted(_nested_share(keys, config))
    return keys


def _annotated(summary: LogSummary, config: DataConfig) -> bool:
    """Whether a log holds labels of the kind that is trained on."""
    if config.occupancy:  # frames without are gone
        return True
    return (summary.boxes if config.box_classes else summary.labelled) > 0


def _labelled(dataset: PreparedDataset, key: FrameKey) -> bool:
    """Whether the frame has labels; the log is opened (a remote one fetched) only where some frames have none."""
    summary = dataset.summary(key.log)
    if summary.labelled in (0, summary.frames):
        return summary.labelled > 0
    return dataset.reader(key.log).labelled(key.index)


def _nested_share(items: list[_Item], config: DataConfig) -> list[_Item]:
    order = np.random.default_rng(config.label_seed).permutation(len(items))
    return [items[i] for i in order[: max(1, round(config.label_share * len(items)))]]
