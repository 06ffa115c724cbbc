"""Is prepared data sound? Reads every byte once and reports what a training run would stumble over, in words.

What is looked for:

=====================  =======  =============================================================================================
kind                   level    meaning
=====================  =======  =============================================================================================
``damaged``            error    a log is missing, cut off, does not match a checksum, or is not the one dataset.json lists
``split-overlap``      error    a log is in two splits: scores on one would be flattered by training on the other
``not-finite``         error    points, boxes or poses hold NaN or infinity
``label-unknown``      error    a label is beyond the dataset's label set
``time-backwards``     error    a sweep is not later than the one before it
``time-repeated``      warning  two sweeps of a log have the same timestamp
``box-impossible``     warning  a box has a side of 0 or below, above 60 m, or is further away than 500 m
``pose-jump``          warning  the car would have moved faster than 70 m/s between two sweeps
``frame-empty``        warning  a frame without points
``labels-partly``      warning  some keyframes of a log have labels and others have none
``set-aside``          warning  a log was left out when the data were prepared: its raw files could not be read
``stray-file``         warning  a file in the folder that belongs to nothing
=====================  =======  =============================================================================================

Memory does not grow with the number of frames: what is kept is one line per kind and log, with a count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from picture3d.datasets.label_sets import LabelSet
from picture3d.datasets.prepared import SET_ASIDE_SUFFIX, PreparedDataset, log_path
from picture3d.errors import DataError
from picture3d.files import read_json_object
from picture3d.formats.remote import remote_url
from picture3d.structures.boxes import Boxes
from picture3d.structures.frame import Frame

MAX_SPEED_M_S = 70.0
MAX_BOX_SIDE_M = 60.0
MAX_BOX_DISTANCE_M = 500.0
_MAX_NOTE_BYTES = 1 << 20
_NAMED = 3  # frames that a finding names; the others are counted

Level = Literal["error", "warning"]
ProgressCallback = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Finding:
    """One kind of trouble in one place."""

    level: Level
    kind: str
    where: str  # file or log
    what: str  # in words; the first case, with its frame
    count: int = 1  # how many frames, boxes or files


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What was found. Sound means: no error; warnings are for a person to look at."""

    root: Path
    findings: tuple[Finding, ...]
    counts: dict[str, int]  # logs, frames, keyframes, points, boxes, labelled
    classes: dict[str, int]  # points per class name of the label set, where there are labels
    categories: dict[str, int] = field(default_factory=dict)  # boxes per category name

    @property
    def sound(self) -> bool:
        """True if nothing is wrong; there may be warnings."""
        return all(finding.level != "error" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """As a tree for `json.dumps`."""
        return {
            "root": str(self.root),
            "sound": self.sound,
            "counts": self.counts,
            "classes": self.classes,
            "categories": self.categories,
            "findings": [
                {"level": f.level, "kind": f.kind, "where": f.where, "what": f.what, "count": f.count} for f in self.findings
            ],
        }


def check_prepared(root: Path, *, progress: ProgressCallback | None = None) -> CheckReport:
    """Reads a prepared dataset whole.

    Args:
        root: folder of prepared frames.
        progress: called with (frames read, frames in all).

    Raises:
        DataError: if the folder is not a prepared dataset at all.
    """
    if remote_url(root) is not None:
        raise DataError(f"{root}: frames elsewhere are checked as they are fetched, not before. Name a folder of this machine")
    dataset = PreparedDataset(root)
    findings = [*_splits(dataset), *_set_aside(dataset), *_strays(dataset)]
    tally = Tally()
    logs = dataset.logs()
    total = sum(dataset.summary(log).frames for log in logs)
    done = 0
    for log in logs:
        found = LogFindings(log)
        tally.counts["logs"] += 1
        tally.counts["keyframes"] += len(dataset.summary(log).keyframes)
        for frame in _frames(dataset, log, found):
            found.look_at(frame, dataset.label_set)
            tally.add(frame, dataset.label_set)
            done += 1
            if progress is not None:
                progress(done, total)
        findings += found.finish()
    return tally.report(dataset.root, findings)


class Tally:
    """Frames, points, boxes and classes, added up as frames pass by; logs and keyframes are for the caller to count."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = dict.fromkeys(("logs", "frames", "keyframes", "points", "boxes", "labelled"), 0)
        self._classes, self._categories = Counter[str](), Counter[str]()

    def add(self, frame: Frame, labels: LabelSet | None) -> None:
        """Counts one frame."""
        self.counts["frames"] += 1
        self.counts["points"] += len(frame.points)
        if frame.labels is not None:
            self.counts["labelled"] += 1
            if labels is not None:
                _count_classes(self._classes, frame, labels)
        if frame.boxes is not None:
            self.counts["boxes"] += len(frame.boxes)
            self._categories.update(frame.boxes.category)

    def report(self, root: Path, findings: Iterable[Finding]) -> CheckReport:
        """What was counted, and what was found."""
        classes, categories = (dict(sorted(counter.items())) for counter in (self._classes, self._categories))
        return CheckReport(root, tuple(findings), self.counts, classes, categories)


class LogFindings:
    """Findings of one log, counted by kind as its frames pass by."""

    def __init__(self, log: str) -> None:
        self._log = log
        self._found: dict[str, tuple[Level, list[str], int]] = {}
        self._before: Frame | None = None
        self._keyframes = self._labelled = 0  # that could be read

    def add(self, level: Level, kind: str, what: str, count: int = 1) -> None:
        """Notes one case of a kind of trouble, or several."""
        _, named, counted = self._found.setdefault(kind, (level, [], 0))
        self._found[kind] = (level, named if len(named) >= _NAMED else [*named, what], counted + count)

    def look_at(self, frame: Frame, labels: LabelSet | None) -> None:
        """Notes what is wrong with a frame, and with its step from the one before."""
        place = f"frame {frame.index}"
        self._keyframes += int(frame.is_keyframe)
        if len(frame.points) == 0:
            self.add("warning", "frame-empty", f"{place} has no points")
        if not (np.isfinite(frame.points.xyz).all() and np.isfinite(frame.points.intensity).all()):
            self.add("error", "not-finite", f"{place}: points hold NaN or infinity")
        if frame.labels is not None:
            self._labelled += int(frame.is_keyframe)
            known = 0 if labels is None else len(labels.class_names)
            if len(frame.labels) and int(frame.labels.max()) >= known:
                reason = "the dataset names no label set" if labels is None else f"label set {labels.name} ends at {known - 1}"
                self.add("error", "label-unknown", f"{place}: label {int(frame.labels.max())}, {reason}")
        if frame.boxes is not None:
            self._boxes(frame, frame.boxes, place)
        if self._before is not None:
            self._motion(self._before, frame, place)
        # Its points are not needed again, but a frame is small: one is held, whatever the length of the log.
        self._before = frame

    def _boxes(self, frame: Frame, boxes: Boxes, place: str) -> None:
        geometry = np.concatenate([boxes.center, boxes.size, boxes.yaw[:, None]], axis=1)
        finite = np.isfinite(geometry).all(1)
        if not finite.all():
            self.add(
                "error", "not-finite", f"{place}: box {int(np.argmin(finite))} holds NaN or infinity", int((~finite).sum())
            )
        far = np.linalg.norm(boxes.center, axis=1) > MAX_BOX_DISTANCE_M
        bad = finite & (far | (boxes.size <= 0).any(1) | (boxes.size > MAX_BOX_SIDE_M).any(1))
        if bad.any():
            row = int(np.argmax(bad))
            sides = " x ".join(f"{side:g}" for side in boxes.size[row])
            distance = float(np.linalg.norm(boxes.center[row]))
            self.add(
                "warning",
                "box-impossible",
                f"{place}: box {row} ({boxes.category[row]}) is {sides} m at {distance:.0f} m",
                int(bad.sum()),
            )

    def _motion(self, before: Frame, frame: Frame, place: str) -> None:
        elapsed = (frame.timestamp_us - before.timestamp_us) * 1e-6
        if elapsed < 0:
            self.add("error", "time-backwards", f"{place} is {-elapsed:.3f} s earlier than frame {before.index}")
        elif elapsed == 0:
            self.add("warning", "time-repeated", f"{place} has the timestamp of frame {before.index}")
        elif frame.global_from_ego is not None and before.global_from_ego is not None:
            moved = float(np.linalg.norm(frame.global_from_ego.translation - before.global_from_ego.translation))
            if moved > MAX_SPEED_M_S * elapsed + 0.5:
                self.add("warning", "pose-jump", f"{place} is {moved:.1f} m from frame {before.index}, {elapsed:.3f} s later")

    def finish(self) -> list[Finding]:
        """One finding for each kind of trouble."""
        bare = self._keyframes - self._labelled
        if self._labelled > 0 and bare > 0:
            self.add("warning", "labels-partly", f"{self._labelled} of {self._keyframes} keyframes have labels", bare)
        return [
            Finding(level, kind, self._log, "; ".join(named) + ("; ..." if count > len(named) else ""), count)
            for kind, (level, named, count) in self._found.items()
        ]


def _frames(dataset: PreparedDataset, log: str, found: LogFindings) -> Iterator[Frame]:
    """The readable frames of a log; what cannot be read is a finding, and the frames after it are still looked at."""
    try:
        reader = dataset.reader(log)
    except DataError as error:
        found.add("error", "damaged", str(error))
        return
    for index in range(len(reader)):
        try:
            yield reader.frame(index)
        except DataError as error:
            found.add("error", "damaged", str(error))


def _splits(dataset: PreparedDataset) -> Iterator[Finding]:
    home: dict[str, str] = {}
    for split in dataset.splits:
        for log in dataset.logs(split):
            if log in home:
                yield Finding("error", "split-overlap", log, f"is in split '{home[log]}' and in split '{split}'")
            home[log] = split


def _set_aside(dataset: PreparedDataset) -> Iterator[Finding]:
    for path in sorted((dataset.root / "logs").glob(f"*{SET_ASIDE_SUFFIX}")):
        try:
            why = str(read_json_object(path, max_bytes=_MAX_NOTE_BYTES).get("why"))
        except DataError as error:
            why = str(error)
        yield Finding("warning", "set-aside", path.name.removesuffix(SET_ASIDE_SUFFIX), why)


def _strays(dataset: PreparedDataset) -> Iterator[Finding]:
    folder = dataset.root / "logs"
    known = {log_path(dataset.root, log) for log in dataset.logs()}
    others = sorted(path.name for path in folder.iterdir() if path not in known) if folder.is_dir() else []
    strays = [name for name in others if not name.endswith(SET_ASIDE_SUFFIX)]
    if strays:
        named = ", ".join(strays[:_NAMED]) + (", ..." if len(strays) > _NAMED else "")
        yield Finding("warning", "stray-file", str(folder), f"{named}: not listed in dataset.json", len(strays))


def _count_classes(classes: Counter[str], frame: Frame, labels: LabelSet) -> None:
    if frame.labels is None:
        return
    counts = np.bincount(labels.train_ids[frame.labels], minlength=labels.num_classes)
    for name, count in zip(labels.train_names, counts.tolist(), strict=True):
        if count:
            classes[name] += count
