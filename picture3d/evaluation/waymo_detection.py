"""The Waymo Open Dataset's 3-D detection metric: AP and APH per class and range, at two levels of difficulty.

Rules of the official metric (waymo-open-dataset, its default detection challenge with range breakdown):

1. Labels without a LiDAR point are dropped. Where no difficulty is set it is LEVEL_2 if there are at most 5 points, else
   LEVEL_1.
2. Everything below is done for each class, and again for each class within [0, 30), [30, 50) and [50, inf) m of the vehicle
   (length of the 3-D centre); both labels and predictions are sorted into these shards before they are matched.
3. For each of 101 cut-offs 0, 0.01, ... 1 the predictions whose score reaches it are matched to the labels of their frame so
   that the sum of 3-D IoUs (in millionths) is largest; pairs below the class's threshold (vehicle 0.7, others 0.5) do not
   match.
4. A matched prediction is a true positive at both levels, whatever its label's difficulty. An unmatched label is a false
   negative at the levels from its own on; an unmatched prediction is a false positive unless it overlaps a no-label zone.
5. Heading accuracy of a match is 1 - |difference| / pi. Precision is TP / (TP + FP), for APH the sum of heading accuracies
   over the same; recall is TP / (TP + FN) in both. Where the recall is 0 the precision counts as 1.
6. AP is the area under precision over recall. Of equal recalls the best precision counts; from the highest recall down the
   precision never falls; where two recalls are more than 0.05 apart, points every 0.05 keep the precision of the higher one;
   at recall 0 the precision is that of the lowest recall reached. In between the curve is straight.

The cut-offs do not depend on the scores, and frames are independent of each other: they can be added in parts of any size, and
what is kept between parts is a table of counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from picture3d.errors import DataError
from picture3d.formats.waymo_objects import CYCLIST, PEDESTRIAN, SIGN, VEHICLE, WaymoObjects
from picture3d.ops.box_iou import iou_3d_paired

KINDS = {VEHICLE: "VEHICLE", PEDESTRIAN: "PEDESTRIAN", SIGN: "SIGN", CYCLIST: "CYCLIST"}
CHALLENGE = (VEHICLE, PEDESTRIAN, CYCLIST)  # whose mean ranks
IOU_THRESHOLDS = {VEHICLE: 0.7, PEDESTRIAN: 0.5, SIGN: 0.5, CYCLIST: 0.5}
RANGES = ("[0, 30)", "[30, 50)", "[50, +inf)")
LEVELS = (1, 2)
CUTOFFS = (np.arange(101) * 0.01).astype(np.float32)

_RANGE_EDGES_M = np.array([30.0, 50.0])
_RECALL_STEP = 0.05
_ROUNDING = 1e-6
_SMALLEST_SIDE_M = 0.01  # a box with a shorter side overlaps nothing
_PAIRS_AT_ONCE = 1 << 20
_NAMED = 5  # frames an error message lists
_SHARDS = (1 + len(RANGES)) * len(KINDS)  # of each kind: all ranges, then each range
_COUNTS = ("_predicted", "_matched_predicted", "_hits", "_heading", "_labels", "_found", "_frames")  # of a scorer

Float64Array = NDArray[np.float64]
Int64Array = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class WaymoScores:
    """What the metric says, by the official names of the breakdowns (``OBJECT_TYPE_TYPE_VEHICLE_LEVEL_1``...)."""

    ap: Mapping[str, float]
    aph: Mapping[str, float]
    labels: Mapping[str, int]  # that count at the level
    frames: int

    def to_json(self) -> dict[str, Any]:
        """``{breakdown: {"AP": ..., "APH": ...}}``."""
        return {name: {"AP": self.ap[name], "APH": self.aph[name]} for name in self.ap}

    def mean(self, kinds: tuple[int, ...] = CHALLENGE, *, level: int = 2) -> tuple[float, float]:
        """mAP and mAPH over the classes of the challenge."""
        names = [breakdown(kind, level) for kind in kinds]
        return float(np.mean([self.ap[name] for name in names])), float(np.mean([self.aph[name] for name in names]))


def breakdown(kind: int, level: int) -> str:
    """Name of the numbers of a kind of object over all ranges."""
    return f"OBJECT_TYPE_TYPE_{KINDS[kind]}_LEVEL_{level}"


class WaymoScorer:
    """Adds up frames; memory does not grow with them.

    Args:
        iou_thresholds: of kinds, where they are not the official ones.
    """

    def __init__(self, iou_thresholds: Mapping[int, float] | None = None) -> None:
        self._thresholds = {**IOU_THRESHOLDS, **(iou_thresholds or {})}
        counts = (_SHARDS, len(CUTOFFS))
        self._predicted = np.zeros(counts, np.int64)  # outside no-label zones, by cut-off
        self._matched_predicted = np.zeros(counts, np.int64)  # of these, matched
        self._hits = np.zeros(counts, np.int64)
        self._heading = np.zeros(counts)
        self._labels = np.zeros((_SHARDS, len(LEVELS)), np.int64)
        self._found = np.zeros((_SHARDS, len(LEVELS), len(CUTOFFS)), np.int64)  # labels up to a level, matched
        self._frames = 0

    def add(self, labels: WaymoObjects, predictions: WaymoObjects) -> None:
        """Adds whole frames: all labels and all predictions of each.

        Raises:
            DataError: naming the frame, if a number is not finite.
        """
        for objects, what in ((labels, "a label"), (predictions, "a prediction")):
            _require_finite(objects, what)
        frames = {key: i for i, key in enumerate(dict.fromkeys((*_keys(labels), *_keys(predictions))))}
        self._frames += len(frames)
        truth = _side(labels, frames, labels.num_points > 0)
        found = _side(predictions, frames, np.isin(predictions.kind, list(KINDS)))
        difficulty = np.where(labels.difficulty > 0, labels.difficulty, np.where(labels.num_points <= 5, LEVELS[1], LEVELS[0]))[
            truth.row
        ]
        active = np.searchsorted(CUTOFFS, predictions.score[found.row], side="right")  # reached cut-offs: the first so many
        outside = ~predictions.overlaps_no_label_zone[found.row]
        for shard in (_all_ranges(found), _range(found)):
            np.add.at(self._predicted, (shard[outside], np.maximum(active[outside] - 1, 0)), active[outside] > 0)
        for shard in (_all_ranges(truth), _range(truth)):
            for index, level in enumerate(LEVELS):
                np.add.at(self._labels[:, index], shard[difficulty <= level], 1)
        pairs = _pairs(truth, found, self._thresholds)
        heading = _heading_accuracy(truth.box[pairs.label, 6], found.box[pairs.prediction, 6])
        for shards in ((_all_ranges(truth), _all_ranges(found)), (_range(truth), _range(found))):
            same = shards[0][pairs.label] == shards[1][pairs.prediction]
            for row, begin, end in _matches(pairs, np.flatnonzero(same), active):
                prediction, label = pairs.prediction[row], pairs.label[row]
                shard = shards[1][prediction]
                _add_spans(self._hits, shard, begin, end, np.ones(len(row), np.int64))
                _add_spans(self._heading, shard, begin, end, heading[row])
                _add_spans(self._matched_predicted, shard, begin, end, outside[prediction].astype(np.int64))
                for index, level in enumerate(LEVELS):
                    counted = (difficulty[label] <= level).astype(np.int64)
                    _add_spans(self._found[:, index], shard, begin, end, counted)

    def counts(self) -> dict[str, NDArray[Any]]:
        """Everything that was added, as arrays by name."""
        return {name: np.asarray(getattr(self, name)) for name in _COUNTS}

    def add_counts(self, counts: Mapping[str, NDArray[Any]]) -> None:
        """Adds the `counts` of another scorer with the same thresholds."""
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + counts[name])

    def scores(self) -> WaymoScores:
        """The metric over everything that was added."""
        predicted = self._predicted[:, ::-1].cumsum(1)[:, ::-1]  # a prediction reaches all cut-offs up to its last
        hits, heading = self._hits.cumsum(1), self._heading.cumsum(1)
        wrong = predicted - self._matched_predicted.cumsum(1)
        missed = self._labels[:, :, None] - self._found.cumsum(2)
        ap: dict[str, float] = {}
        aph: dict[str, float] = {}
        labels: dict[str, int] = {}
        for shard, breakdown in _breakdowns():
            for index, level in enumerate(LEVELS):
                name = f"{breakdown}_LEVEL_{level}"
                recall = _ratio(hits[shard], hits[shard] + missed[shard, index])
                guesses = hits[shard] + wrong[shard]
                ap[name] = _area(_ratio(hits[shard], guesses), recall)
                aph[name] = _area(_ratio(heading[shard], guesses), recall)
                labels[name] = int(self._labels[shard, index])
        return WaymoScores(ap, aph, labels, int(self._frames))


class SegmentedObjects(Protocol):
    """Objects that are handed out segment by segment: `waymo_objects_reading.ObjectsFile`, or `ObjectsInMemory`."""

    @property
    def segments(self) -> tuple[str, ...]:
        """Names of the segments that have an object."""
        ...

    def read(self, segment: str) -> WaymoObjects:
        """All objects of a segment; none if it has none."""
        ...


class ObjectsInMemory:
    """Columns of many segments, handed out segment by segment.

    Args:
        objects: in any order.
    """

    def __init__(self, objects: WaymoObjects) -> None:
        self._objects = objects
        number = {name: i for i, name in enumerate(dict.fromkeys(objects.context))}
        segment = np.fromiter((number[name] for name in objects.context), np.int32, len(objects))
        order = np.argsort(segment, kind="stable")
        parts = np.split(order, np.searchsorted(segment[order], np.arange(1, len(number))))
        self._rows = dict(zip(number, parts, strict=False))

    @property
    def segments(self) -> tuple[str, ...]:
        """Names of the segments that have an object."""
        return tuple(self._rows)

    def read(self, segment: str) -> WaymoObjects:
        """All objects of a segment; none if it has none."""
        return select(self._objects, self._rows.get(segment, np.zeros(0, np.int64)))


def score_segments(
    labels: SegmentedObjects, predictions: SegmentedObjects, *, iou_thresholds: Mapping[int, float] | None = None
) -> WaymoScores:
    """The metric of whole files; no more than one segment of each is in memory.

    A file of labels does not list frames without labels. A prediction in such a frame is a false positive; one in a segment
    that has no label at all is refused.

    Raises:
        DataError: if a number is not finite, or predictions belong to unknown segments.
    """
    unknown = sorted(set(predictions.segments) - set(labels.segments))
    if unknown:
        listed = ", ".join(unknown[:_NAMED]) + (f" and {len(unknown) - _NAMED} more" if len(unknown) > _NAMED else "")
        raise DataError(f"predictions for segments that have no labels: {listed}. Score them against labels of the same split.")
    scorer = WaymoScorer(iou_thresholds)
    for name in labels.segments:
        scorer.add(labels.read(name), predictions.read(name))
    return scorer.scores()


def select(objects: WaymoObjects, rows: Int64Array) -> WaymoObjects:
    """The chosen rows."""
    columns = {name: getattr(objects, name) for name in objects.__dataclass_fields__}
    chosen = {
        name: tuple(column[row] for row in rows.tolist()) if isinstance(column, tuple) else column[rows]
        for name, column in columns.items()
    }
    return replace(objects, **chosen)


@dataclass(frozen=True, slots=True, eq=False)
class _Side:
    """Labels or predictions that take part, with what matching needs."""

    row: Int64Array  # (N,) in the objects they are from
    frame: Int64Array  # (N,)
    kind: Int64Array  # (N,) position in KINDS
    ring: Int64Array  # (N,) position in RANGES
    box: Float64Array  # (N, 7)


@dataclass(frozen=True, slots=True, eq=False)
class _Pairs:
    """Pairs of the same frame and kind whose IoU reaches the threshold."""

    label: Int64Array
    prediction: Int64Array
    weight: Int64Array  # IoU in millionths


def _side(objects: WaymoObjects, frames: Mapping[tuple[str, int], int], used: NDArray[np.bool_]) -> _Side:
    rows = np.flatnonzero(used & np.isin(objects.kind, list(KINDS)))
    frame = np.array([frames[key] for key in _keys(objects)], np.int64)[rows]
    position = np.zeros(max(KINDS) + 1, np.int64)
    position[list(KINDS)] = np.arange(len(KINDS))
    box = objects.box[rows]
    ring = np.searchsorted(_RANGE_EDGES_M, np.linalg.norm(box[:, :3], axis=1), side="right")
    return _Side(rows, frame, position[objects.kind[rows]], ring, box)


def _all_ranges(side: _Side) -> Int64Array:
    return side.kind * (1 + len(RANGES))


def _range(side: _Side) -> Int64Array:
    return side.kind * (1 + len(RANGES)) + 1 + side.ring


def _breakdowns() -> Iterator[tuple[int, str]]:
    """Shards with their official names, in the official order."""
    width = 1 + len(RANGES)
    for position, name in enumerate(KINDS.values()):
        yield position * width, f"OBJECT_TYPE_TYPE_{name}"
    for position, name in enumerate(KINDS.values()):
        for ring, metres in enumerate(RANGES):
            yield position * width + 1 + ring, f"RANGE_TYPE_{name}_{metres}"


def _pairs(truth: _Side, found: _Side, thresholds: Mapping[int, float]) -> _Pairs:
    threshold = np.array([thresholds[kind] for kind in KINDS], np.float32)
    group_truth, group_found = (side.frame * len(KINDS) + side.kind for side in (truth, found))
    order = np.argsort(group_truth, kind="stable")
    first = np.searchsorted(group_truth[order], group_found, side="left")
    count = np.searchsorted(group_truth[order], group_found, side="right") - first
    found_parts: list[tuple[Int64Array, Int64Array, Int64Array]] = []
    for rows in _chunks(count):
        prediction = np.repeat(rows, count[rows])
        offset = np.arange(len(prediction)) - np.repeat(np.cumsum(count[rows]) - count[rows], count[rows])
        label = order[first[prediction] + offset]
        a, b = found.box[prediction], truth.box[label]
        reach = (np.hypot(a[:, 3], a[:, 4]) + np.hypot(b[:, 3], b[:, 4])) / 2
        near = np.hypot(a[:, 0] - b[:, 0], a[:, 1] - b[:, 1]) <= reach
        near &= (a[:, 3:6].min(1) > _SMALLEST_SIDE_M) & (b[:, 3:6].min(1) > _SMALLEST_SIDE_M)
        prediction, label = prediction[near], label[near]
        iou = iou_3d_paired(torch.from_numpy(found.box[prediction]), torch.from_numpy(truth.box[label])).numpy()
        iou = np.clip(iou, 0, 1).astype(np.float32)
        reached = iou >= threshold[found.kind[prediction]]
        weight = (iou[reached] * np.float32(1e6)).astype(np.int64)
        found_parts.append((label[reached], prediction[reached], weight))
    if not found_parts:
        none = np.zeros(0, np.int64)
        return _Pairs(none, none, none)
    label, prediction, weight = (np.concatenate(column) for column in zip(*found_parts, strict=True))
    return _Pairs(label, prediction, weight)


def _chunks(count: Int64Array) -> Iterator[Int64Array]:
    """Rows in parts whose counts sum to about `_PAIRS_AT_ONCE`."""
    part = np.cumsum(count) // _PAIRS_AT_ONCE
    rows = np.flatnonzero(count > 0)
    for index in np.unique(part[rows]):
        yield rows[part[rows] == index]


def _matches(pairs: _Pairs, rows: Int64Array, active: Int64Array) -> Iterator[tuple[Int64Array, Int64Array, Int64Array]]:
    """Which of `rows` of the pairs are matched, and from which cut-off (inclusive) to which (exclusive).

    A pair whose label and prediction are in no other pair is matched as long as the prediction takes part. The others fall
    into small groups that are solved one by one, anew whenever a prediction drops out.
    """
    if not len(rows):
        return
    labels, label = np.unique(pairs.label[rows], return_inverse=True)
    predictions, prediction = np.unique(pairs.prediction[rows], return_inverse=True)
    alone = (np.bincount(label)[label] == 1) & (np.bincount(prediction)[prediction] == 1)
    if alone.any():
        single = rows[alone]
        yield single, np.zeros(len(single), np.int64), active[pairs.prediction[single]]
    rows, label, prediction = rows[~alone], label[~alone], prediction[~alone]
    if not len(rows):
        return
    nodes = len(labels) + len(predictions)
    links = coo_array((np.ones(len(rows)), (label, len(labels) + prediction)), shape=(nodes, nodes))
    group = connected_components(links, directed=False)[1][label]
    order = np.argsort(group, kind="stable")
    spans: list[tuple[int, int, int]] = []
    for members in np.split(rows[order], np.flatnonzero(np.diff(group[order])) + 1):
        spans += _solve(pairs, members, active)
    row, begin, end = np.array(spans, np.int64).reshape(-1, 3).T
    yield row, begin, end


def _solve(pairs: _Pairs, members: Int64Array, active: Int64Array) -> Iterator[tuple[int, int, int]]:
    """Spans of one group: the best sum of IoUs among the predictions that take part, for each set of these that occurs."""
    lines: dict[int, int] = {}  # groups are small: this is quicker than arrays
    columns: dict[int, int] = {}
    prediction, label = pairs.prediction[members], pairs.label[members]
    line = [lines.setdefault(value, len(lines)) for value in prediction.tolist()]
    column = [columns.setdefault(value, len(columns)) for value in label.tolist()]
    weight = np.zeros((len(lines), len(columns)), np.int64)
    row_of = np.full(weight.shape, -1, np.int64)
    weight[line, column], row_of[line, column] = pairs.weight[members], members
    last = active[list(lines)]
    begin = 0
    for end in sorted(set(last[last > 0].tolist())):
        present = np.flatnonzero(last >= end)
        if len(columns) == 1:  # the best of them has the label
            best = present[weight[present, 0].argmax()]
            chosen = row_of[best]
        else:
            found = linear_sum_assignment(weight[present], maximize=True)
            chosen = row_of[present[found[0]], found[1]]
        yield from ((row, begin, end) for row in chosen.tolist() if row >= 0)
        begin = end


def _add_spans(table: NDArray[Any], shard: Int64Array, begin: Int64Array, end: Int64Array, values: NDArray[np.number]) -> None:
    """Adds `values` to the cut-offs from begin to end; `table` holds differences, its running sum is the count."""
    used = end > begin
    np.add.at(table, (shard[used], begin[used]), values[used])
    stops = used & (end < table.shape[1])
    np.subtract.at(table, (shard[stops], end[stops]), values[stops])


def _heading_accuracy(a: Float64Array, b: Float64Array) -> Float64Array:
    difference = np.abs((a - b + np.pi) % (2 * np.pi) - np.pi)
    return np.clip(1 - difference / np.pi, 0, 1)


def _ratio(part: NDArray[Any], whole: NDArray[Any]) -> Float64Array:
    return np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0)


def _area(precision: Float64Array, recall: Float64Array) -> float:
    """Rule 6."""
    best = {0.0: 1.0}
    for p, r in zip(precision.tolist(), recall.tolist(), strict=True):
        best[r] = max(best.get(r, 0.0), p)
    if len(best) == 1:
        return 0.0
    curve: list[tuple[float, float]] = []  # recall falling, precision rising
    top = 0.0
    for r in sorted(best, reverse=True):
        while curve and curve[-1][0] - r > _RECALL_STEP + _ROUNDING:
            curve.append((curve[-1][0] - _RECALL_STEP, top))
        top = max(top, best[r])
        curve.append((r, top))
    curve[-1] = (0.0, curve[-2][1])
    recalls, precisions = (np.array(column) for column in zip(*curve, strict=True))
    return float(((recalls[:-1] - recalls[1:]) * (precisions[:-1] + precisions[1:])).sum() / 2)


def _keys(objects: WaymoObjects) -> list[tuple[str, int]]:
    return list(zip(objects.context, objects.timestamp.tolist(), strict=True))


def _require_finite(objects: WaymoObjects, what: str) -> None:
    bad = ~(np.isfinite(objects.box).all(1) & np.isfinite(objects.score))
    if bad.any():
        row = int(bad.argmax())
        raise DataError(
            f"segment {objects.context[row]}, time {int(objects.timestamp[row])} us: {what} holds a number that is not finite. "
            "Remove the box, or mend the program that wrote it."
        )
