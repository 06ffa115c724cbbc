"""The nuScenes detection metric: mAP, five true positive errors and NDS, with the settings of ``detection_cvpr_2019``.

Specification (Caesar et al. 2020, section 3.1, and the behaviour of the devkit's ``eval/detection``):

1. Labels and predictions whose centre is as far from the car as the range of their class, or farther, are dropped (in the
   xy plane: 50 m; 40 m for pedestrians, motorcycles, bicycles; 30 m for cones and barriers). Labels with no LiDAR and radar
   points are dropped. Bicycles and motorcycles whose centre lies in a bicycle rack are dropped on both sides (if asked for).
2. For each class and each distance of 0.5, 1, 2, 4 m: predictions of all samples by descending score (of equal scores the
   later in the file first) each take the nearest label of their class and sample that is not taken yet, if its centre in xy
   is nearer than the distance; else they are false positives.
3. Precision over recall is interpolated at 101 recalls (0 beyond the recall reached). AP is the mean over recalls above 0.1
   of max(0, precision - 0.1) / 0.9. A class without labels, or without a match, has AP 0.
4. Errors come from the matches at 2 m: distance of the centres in xy (m), 1 - IoU of the sizes with centres and headings
   laid on each other, difference of headings (rad; modulo pi for barriers), length of the velocity difference (m/s), 1 for a
   wrong attribute. Each is averaged from the highest score down (unknown velocities and attributes of labels left out; 1 if
   all are unknown), read off at the scores of the 101 recalls, and averaged over the recalls above 0.1 that were reached; 1
   if none was. Cones have no heading; cones and barriers have no velocity and no attribute (NaN).
5. mAP is the mean AP over classes and distances, an error the mean over the classes that have it, and
   NDS = (5 mAP + sum of max(0, 1 - error)) / 10.

One thing is decided otherwise: where a matched box has no volume the devkit stops; here its size error is 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from picture3d.errors import DataError
from picture3d.formats.nuscenes_results import CLASSES, MAX_BOXES, RACK, DetectionColumns, finite_rows

CLASS_RANGE = {
    name: 30 if name in {"traffic_cone", "barrier"} else 40 if name in {"pedestrian", "motorcycle", "bicycle"} else 50
    for name in CLASSES
}
DISTANCES = (0.5, 1.0, 2.0, 4.0)
ERROR_DISTANCE = 2.0
ERRORS = ("trans_err", "scale_err", "orient_err", "vel_err", "attr_err")
MIN_RECALL = 0.1
MIN_PRECISION = 0.1
MAP_WEIGHT = 5
WITHOUT = {"traffic_cone": ("orient_err", "vel_err", "attr_err"), "barrier": ("vel_err", "attr_err")}

_RECALLS = np.linspace(0, 1, 101)
_FIRST = round(100 * MIN_RECALL) + 1
_PAIRS = 1 << 21  # pairs of prediction and label compared at a time
_NAMED = 5  # tokens an error message lists

Float64Array = NDArray[np.float64]
Int64Array = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class NuScenesScores:
    """What the metric says; arrays are in the order of CLASSES, DISTANCES and ERRORS."""

    aps: Float64Array  # (10, 4)
    errors: Float64Array  # (10, 5); NaN where a class has no such error
    labels: Int64Array  # (10,) labels that counted
    predictions: Int64Array  # (10,) predictions that counted
    samples: int
    samples_without_ego: int  # in these no box was dropped for its distance: the car's position is unknown

    @property
    def mean_ap(self) -> float:
        """Mean over classes and distances."""
        return float(self.aps.mean(1).mean())

    @property
    def mean_errors(self) -> Float64Array:
        """(5,) means over the classes that have the error."""
        return np.nanmean(self.errors, axis=0)

    @property
    def nds(self) -> float:
        """The nuScenes detection score."""
        kept = np.maximum(0, 1 - self.mean_errors).sum()
        return float((MAP_WEIGHT * self.mean_ap + kept) / (MAP_WEIGHT + len(ERRORS)))

    def to_json(self, meta: dict[str, Any] | None = None) -> dict[str, Any]:
        """The official ``metrics_summary.json`` (there as here undefined errors are NaN), with one key more: ``counts``."""
        errors = self.mean_errors.tolist()
        return {
            "label_aps": {
                name: {str(d): float(v) for d, v in zip(DISTANCES, row, strict=True)}
                for name, row in zip(CLASSES, self.aps, strict=True)
            },
            "mean_dist_aps": dict(zip(CLASSES, self.aps.mean(1).tolist(), strict=True)),
            "mean_ap": self.mean_ap,
            "label_tp_errors": {
                name: dict(zip(ERRORS, row.tolist(), strict=True)) for name, row in zip(CLASSES, self.errors, strict=True)
            },
            "tp_errors": dict(zip(ERRORS, errors, strict=True)),
            "tp_scores": {name: max(0.0, 1 - error) for name, error in zip(ERRORS, errors, strict=True)},
            "nd_score": self.nds,
            "cfg": {
                "class_range": CLASS_RANGE,
                "dist_fcn": "center_distance",
                "dist_ths": list(DISTANCES),
                "dist_th_tp": ERROR_DISTANCE,
                "min_recall": MIN_RECALL,
                "min_precision": MIN_PRECISION,
                "max_boxes_per_sample": MAX_BOXES,
                "mean_ap_weight": MAP_WEIGHT,
            },
            "meta": meta or {},
            "counts": {
                "samples": self.samples,
                "samples_without_ego": self.samples_without_ego,
                "labels": dict(zip(CLASSES, self.labels.tolist(), strict=True)),
                "predictions": dict(zip(CLASSES, self.predictions.tolist(), strict=True)),
            },
        }


def score_detections(labels: DetectionColumns, predictions: DetectionColumns, *, bike_racks: bool = True) -> NuScenesScores:
    """Scores `predictions` against `labels`, both in the global frame; the module says how.

    Args:
        labels: with points per box; boxes of class RACK only hide others. The car's position of a sample is taken from here,
            else from the predictions; where neither tells it, no box of the sample is dropped for its distance.
        predictions: of the same samples, in any order.
        bike_racks: whether the racks among the labels hide the bicycles and motorcycles in them.

    Raises:
        DataError: for a score or centre that is not finite (naming the sample), a negative size, more than 500 predictions
            in a sample, predictions for unknown samples, samples without predictions (an empty list is one).
    """
    predictions = _aligned(labels, predictions)
    ego = np.where(np.isfinite(labels.ego[:, :2]), labels.ego[:, :2], predictions.ego[:, :2])
    racks = _rows(labels, labels.label == RACK)
    kept = []
    for boxes, usable in (
        (labels, (labels.num_points != 0) & (labels.label != RACK)),
        (predictions, predictions.label != RACK),
    ):
        usable &= ~_out_of_range(boxes, ego)
        if bike_racks:
            usable &= ~_in_rack(boxes, racks)
        kept.append(_rows(boxes, usable))
    truth, found = kept
    order = np.lexsort((np.arange(len(found)), found.score))[::-1]
    found = _rows(found, order)
    aps, errors = np.zeros((len(CLASSES), len(DISTANCES))), np.ones((len(CLASSES), len(ERRORS)))
    pairs = _candidates(found, truth)
    for column, distance in enumerate(DISTANCES):
        match = _match(pairs, len(found), len(truth), distance)
        for index, name in enumerate(CLASSES):
            chosen = np.flatnonzero(found.label == index)
            hit = match[chosen] >= 0
            count = int((truth.label == index).sum())
            if not hit.any():
                continue
            confidence, aps[index, column] = _average_precision(hit, found.score[chosen], count)
            if distance == ERROR_DISTANCE:
                hits = chosen[hit]
                errors[index] = _mean_errors(_rows(truth, match[hits]), _rows(found, hits), name, confidence)
    for name, undefined in WITHOUT.items():
        errors[CLASSES.index(name), [ERRORS.index(error) for error in undefined]] = np.nan
    return NuScenesScores(
        aps=aps,
        errors=errors,
        labels=np.bincount(truth.label, minlength=len(CLASSES)),
        predictions=np.bincount(found.label, minlength=len(CLASSES)),
        samples=len(labels.samples),
        samples_without_ego=int(np.isnan(ego).any(1).sum()),
    )


def _rows(boxes: DetectionColumns, index: NDArray[Any]) -> DetectionColumns:
    names = ("sample", "translation", "size", "rotation", "velocity", "label", "score", "attribute", "num_points")
    return DetectionColumns(boxes.samples, **{name: getattr(boxes, name)[index] for name in names}, ego=boxes.ego)


def _aligned(labels: DetectionColumns, predictions: DetectionColumns) -> DetectionColumns:
    """The predictions, with samples numbered as the labels do; their order stays."""
    number = {token: index for index, token in enumerate(labels.samples)}
    unknown = [token for token in predictions.samples if token not in number]
    missing = sorted(set(labels.samples).difference(predictions.samples))
    if unknown:
        raise DataError(
            f"predictions for {len(unknown)} samples without labels: {', '.join(unknown)}. Score the split they are for."
        )
    if missing:
        raise DataError(
            f"no predictions for {len(missing)} of {len(labels.samples)} samples: {_list(missing)}. "
            "Give every sample a list, an empty one where nothing was found."
        )
    for name in ("score", "translation", "size"):
        bad = ~finite_rows(getattr(predictions, name))
        if bad.any():
            raise DataError(
                f"sample {predictions.samples[predictions.sample[bad.argmax()]]}: a prediction's {name} is not finite. Correct "
                "or remove the box."
            )
    for boxes, whose in ((predictions, "prediction"), (labels, "label")):
        bad = ~(boxes.size >= 0).all(1)
        if bad.any():
            raise DataError(
                f"sample {boxes.samples[boxes.sample[bad.argmax()]]}: a {whose}'s size is negative or not a number. Correct or "
                "remove the box."
            )
    counts = np.bincount(predictions.sample, minlength=len(predictions.samples))
    if counts.max(initial=0) > MAX_BOXES:
        many = int(counts.argmax())
        raise DataError(
            f"sample {predictions.samples[many]}: {counts[many]} predictions, {MAX_BOXES} are allowed. Keep the best scores."
        )
    places = np.array([number[token] for token in predictions.samples], dtype=np.int64)
    ego = np.full((len(labels.samples), 3), np.nan)
    ego[places] = predictions.ego
    names = ("translation", "size", "rotation", "velocity", "label", "score", "attribute", "num_points")
    columns = {name: getattr(predictions, name) for name in names}
    return DetectionColumns(labels.samples, places[predictions.sample], **columns, ego=ego)


def _list(tokens: Iterable[str]) -> str:
    tokens = list(tokens)
    return ", ".join(tokens[:_NAMED]) + (", ..." if len(tokens) > _NAMED else "")


def _out_of_range(boxes: DetectionColumns, ego: Float64Array) -> NDArray[np.bool_]:
    limit = np.array([*CLASS_RANGE.values(), np.inf])[boxes.label]
    offset = boxes.translation[:, :2] - ego[boxes.sample]
    return np.sqrt((offset**2).sum(1)) >= limit  # False where the position is unknown


def _in_rack(boxes: DetectionColumns, racks: DetectionColumns) -> NDArray[np.bool_]:
    """Whether the centre of a bicycle or motorcycle lies in a rack of its sample, the surface included."""
    inside = np.zeros(len(boxes), dtype=bool)
    rows = np.flatnonzero(np.isin(boxes.label, [CLASSES.index("bicycle"), CLASSES.index("motorcycle")]))
    for left, right in _same_group(boxes.sample[rows], racks.sample):
        row = rows[left]
        offset = boxes.translation[row] - racks.translation[right]
        w, xyz = racks.rotation[right, :1], racks.rotation[right, 1:]
        norm = np.linalg.norm(racks.rotation[right], axis=1, keepdims=True)
        w, xyz = w / norm, -xyz / norm  # the inverse: global to rack
        turned = offset + 2 * np.cross(xyz, np.cross(xyz, offset) + w * offset)
        inside[row[(np.abs(turned) <= racks.size[right] / 2).all(1)]] = True
    return inside


def _same_group(left: Int64Array, right: Int64Array) -> Iterable[tuple[Int64Array, Int64Array]]:
    """All pairs (index into left, index into right) of equal keys, by left then right, in blocks of bounded size."""
    order = np.argsort(right, kind="stable")
    ordered = right[order]
    start, stop = np.searchsorted(ordered, left, "left"), np.searchsorted(ordered, left, "right")
    counts = stop - start
    ends = np.cumsum(counts)
    first = 0
    while first < len(left):
        before = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + _PAIRS, "right")))
        count = counts[first:last]
        rows = np.repeat(np.arange(first, last), count)
        within = np.arange(len(rows)) - np.repeat(np.cumsum(count) - count, count)
        yield rows, order[start[rows] + within]
        first = last


def _candidates(found: DetectionColumns, truth: DetectionColumns) -> tuple[Int64Array, Int64Array, Float64Array]:
    """Pairs of the same sample and class nearer than the largest distance: prediction, label, metres; nearest label first."""
    groups = len(CLASSES)
    blocks: list[tuple[Int64Array, Int64Array, Float64Array]] = []
    for left, right in _same_group(found.sample * groups + found.label, truth.sample * groups + truth.label):
        offset = found.translation[left, :2] - truth.translation[right, :2]
        distance = np.sqrt(offset[:, 0] ** 2 + offset[:, 1] ** 2)
        near = distance < DISTANCES[-1]
        left, right, distance = left[near], right[near], distance[near]
        order = np.lexsort((right, distance, left))
        blocks.append((left[order], right[order], distance[order]))
    if not blocks:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
    left, right, distance = (np.concatenate(column) for column in zip(*blocks, strict=True))
    return left, right, distance


def _match(pairs: tuple[Int64Array, Int64Array, Float64Array], predictions: int, labels: int, distance: float) -> Int64Array:
    """(predictions,) the label each prediction takes, -1 = none; predictions are numbered by descending score.

    All labels rank the predictions alike (by score), so taking turns by score is the one stable matching, and it is found
    by offers: every free prediction asks the nearest label left on its list, a label keeps the best prediction that ever asked.
    """
    left, right, metres = pairs
    near = metres < distance
    left, right = left[near], right[near]
    ask, end = np.searchsorted(left, np.arange(predictions), "left"), np.searchsorted(left, np.arange(predictions), "right")
    holder = np.full(labels + 1, predictions)
    free = np.flatnonzero(ask < end)
    while len(free):
        asked = right[ask[free]]
        before = holder[asked]
        np.minimum.at(holder, asked, free)
        turned_away = free[holder[asked] != free]
        displaced = np.unique(before[(before < predictions) & (holder[asked] != before)])
        free = np.concatenate([turned_away, displaced])
        ask[free] += 1
        free = free[ask[free] < end[free]]
    match = np.full(predictions, -1)
    taken = np.flatnonzero(holder[:labels] < predictions)
    match[holder[taken]] = taken
    return match


def _average_precision(hit: NDArray[np.bool_], score: Float64Array, labels: int) -> tuple[Float64Array, float]:
    """The score at each of the 101 recalls (0 = not reached) and the average precision; inputs by descending score."""
    hits = np.cumsum(hit).astype(np.float64)
    recall = hits / labels
    precision = np.interp(_RECALLS, recall, hits / np.arange(1, len(hit) + 1), right=0)
    confidence = np.interp(_RECALLS, recall, score, right=0)
    above = np.maximum(precision[_FIRST:] - MIN_PRECISION, 0)
    return confidence, float(above.mean()) / (1 - MIN_PRECISION)


def _mean_errors(truth: DetectionColumns, found: DetectionColumns, name: str, confidence: Float64Array) -> Float64Array:
    """(5,) errors of matched boxes, in rows that belong together, by descending score."""
    reached = np.flatnonzero(confidence)
    last = int(reached[-1]) if len(reached) else 0
    if last < _FIRST:
        return np.ones(len(ERRORS))
    means = []
    for error in _match_errors(truth, found, name):
        curve = np.interp(confidence[::-1], found.score[::-1], _running_mean(error)[::-1])[::-1]
        means.append(curve[_FIRST : last + 1].mean())
    return np.array(means)


def _match_errors(truth: DetectionColumns, found: DetectionColumns, name: str) -> list[Float64Array]:
    offset = found.translation[:, :2] - truth.translation[:, :2]
    common = np.minimum(truth.size, found.size).prod(1)
    union = truth.size.prod(1) + found.size.prod(1) - common
    iou = np.divide(common, union, out=np.zeros_like(common), where=union > 0)
    period = np.pi if name == "barrier" else 2 * np.pi
    turn = np.abs((truth.yaw - found.yaw + period / 2) % period - period / 2)
    speed = np.linalg.norm(found.velocity - truth.velocity, axis=1)
    wrong = np.where(truth.attribute < 0, np.nan, (truth.attribute != found.attribute).astype(np.float64))
    return [np.sqrt((offset**2).sum(1)), 1 - iou, turn, speed, wrong]


def _running_mean(values: Float64Array) -> Float64Array:
    """Mean of all values so far, NaN left out (0 before the first); ones if all are NaN."""
    known = ~np.isnan(values)
    if not known.any():
        return np.ones(len(values))
    return np.nancumsum(values) / np.maximum(np.cumsum(known), 1)
