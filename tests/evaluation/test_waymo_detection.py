"""The Waymo metric against the official numbers, a plain twin of its rules, and cases worked out by hand."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from typer.testing import CliRunner

from picture3d.cli import app
from picture3d.errors import ConfigError, DataError
from picture3d.evaluation.waymo_detection import CUTOFFS, ObjectsInMemory, WaymoScorer, WaymoScores, score_segments, select
from picture3d.formats.waymo_objects import WaymoObjects, make_objects, write_objects
from picture3d.formats.waymo_objects_reading import read_objects
from picture3d.ops.box_iou import iou_3d
from tests.sample_data import sample_path

CAR = 1


def score_detections(labels: WaymoObjects, predictions: WaymoObjects, **options: dict[int, float]) -> WaymoScores:
    return score_segments(ObjectsInMemory(labels), ObjectsInMemory(predictions), **options)


def objects(rows: list[list[float]], kinds: list[int] | None = None, *, time: int = 0, **columns: list[float]) -> WaymoObjects:
    """Boxes of one frame, with 10 points each unless told otherwise."""
    given = {name: np.array(values) for name, values in columns.items()}
    given.setdefault("num_points", np.full(len(rows), 10))
    return make_objects(np.array(rows, float), np.array(kinds or [CAR] * len(rows)), "segment", time, **given)


def joined(parts: list[WaymoObjects]) -> WaymoObjects:
    columns = {}
    for name in WaymoObjects.__dataclass_fields__:
        values = [getattr(part, name) for part in parts]
        columns[name] = sum(values, ()) if isinstance(values[0], tuple) else np.concatenate(values)
    return WaymoObjects(**columns)


def random_scene(seed: int, frames: int) -> tuple[WaymoObjects, WaymoObjects]:
    """Crowded frames: several predictions on most labels, some overlapping two, equal scores, zones, missing difficulty."""
    rng = np.random.default_rng(seed)
    labels, found = [], []
    for time in range(frames):
        count = int(rng.integers(0, 14))
        box = np.column_stack(
            [
                rng.uniform(-60, 60, (count, 2)),
                rng.normal(size=count),
                np.tile([4.0, 2.0, 1.6], (count, 1)),
                rng.uniform(-4, 4, count),
            ]
        )
        box[count // 2 :, :2] = box[: count - count // 2, :2] + rng.normal(0, 0.6, (count - count // 2, 2))  # close neighbours
        kind = rng.integers(1, 3, count)
        labels.append(
            make_objects(box, kind, "segment", time, num_points=rng.integers(0, 9, count), difficulty=rng.integers(0, 3, count))
        )
        pick = rng.integers(0, max(count, 1), 3 * count)
        moved = box[pick] + rng.normal(0, [0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.5], (len(pick), 7))
        scores = np.round(rng.uniform(-0.05, 1.05, len(pick)), 2)
        one = make_objects(moved, kind[pick], "segment", time, score=scores)
        found.append(replace(one, overlaps_no_label_zone=rng.random(len(pick)) < 0.2))
    return joined(labels), joined(found)


def plain(labels: WaymoObjects, found: WaymoObjects) -> dict[str, dict[str, float]]:
    """The rules one after the other, without any of the short cuts."""
    out = {}
    names = {1: ("VEHICLE", 0.7), 2: ("PEDESTRIAN", 0.5), 3: ("SIGN", 0.5), 4: ("CYCLIST", 0.5)}
    shards = [(f"OBJECT_TYPE_TYPE_{name}", kind, 0.0, np.inf) for kind, (name, _) in names.items()]
    for kind, (name, _) in names.items():
        for text, low, high in (("[0, 30)", 0, 30), ("[30, 50)", 30, 50), ("[50, +inf)", 50, np.inf)):
            shards.append((f"RANGE_TYPE_{name}_{text}", kind, low, high))
    level_of = np.where(labels.difficulty > 0, labels.difficulty, np.where(labels.num_points <= 5, 2, 1))
    for shard, kind, low, high in shards:
        counts = np.zeros((2, len(CUTOFFS), 4))  # TP, FP, FN, heading
        inside = [
            (side.kind == kind)
            & (np.linalg.norm(side.box[:, :3], axis=1) >= low)
            & (np.linalg.norm(side.box[:, :3], axis=1) < high)
            for side in (labels, found)
        ]
        inside[0] &= labels.num_points > 0
        for time in np.unique(np.concatenate([labels.timestamp, found.timestamp])):
            truth = np.flatnonzero(inside[0] & (labels.timestamp == time))
            for index, cutoff in enumerate(CUTOFFS):
                guess = np.flatnonzero(inside[1] & (found.timestamp == time) & (found.score >= cutoff))
                iou = iou_3d(torch.from_numpy(found.box[guess]), torch.from_numpy(labels.box[truth])).numpy().astype(np.float32)
                weight = np.where(iou >= np.float32(names[kind][1]), (iou * np.float32(1e6)).astype(int), 0)
                pairs = [(i, j) for i, j in zip(*linear_sum_assignment(weight, maximize=True), strict=True) if weight[i, j] > 0]
                turn = [abs(np.angle(np.exp(1j * (found.box[guess[i], 6] - labels.box[truth[j], 6])))) for i, j in pairs]
                free = set(range(len(guess))) - {i for i, _ in pairs}
                lost = set(range(len(truth))) - {j for _, j in pairs}
                for level in (1, 2):
                    counts[level - 1, index] += [
                        len(pairs),
                        sum(not found.overlaps_no_label_zone[guess[i]] for i in free),
                        sum(level_of[truth[j]] <= level for j in lost),
                        sum(1 - angle / np.pi for angle in turn),
                    ]
        for level in (1, 2):
            tp, fp, fn, heading = counts[level - 1].T
            recall = np.divide(tp, tp + fn, out=np.zeros(len(tp)), where=tp + fn > 0)
            area = []
            for part in (tp, heading):
                precision = np.divide(part, tp + fp, out=np.zeros(len(tp)), where=tp + fp > 0)
                area.append(plain_area(precision, recall))
            out[f"{shard}_LEVEL_{level}"] = {"AP": area[0], "APH": area[1]}
    return out


def plain_area(precision: np.ndarray, recall: np.ndarray) -> float:
    """Recalls in small steps: the best precision at or above the next recall that stands within 0.05, straight in between."""
    knots = sorted({0.0, *recall.tolist()})
    best = {r: max([p for p, q in zip(precision, recall, strict=True) if q >= r - 1e-12], default=0.0) for r in knots}
    if len(knots) == 1:
        return 0.0
    best[0.0] = best[knots[1]]
    total = 0.0
    for low, knot in itertools.pairwise(knots):
        high = knot
        while high - low > 0.05 + 1e-6:
            total += 0.05 * best[knot]
            high -= 0.05
        total += (high - low) * (best[knot] + best[low]) / 2
    return total


@pytest.mark.parametrize("seed", range(3))
def test_the_scores_are_those_of_the_plain_twin(seed):
    labels, found = random_scene(seed, 6)
    ours, twin = score_detections(labels, found).to_json(), plain(labels, found)
    assert set(ours) == set(twin)
    for name, expected in twin.items():
        assert ours[name] == pytest.approx(expected, abs=1e-9), name
    assert twin["OBJECT_TYPE_TYPE_VEHICLE_LEVEL_1"]["AP"] > 0.02


def test_frames_may_come_in_parts_of_any_size():
    labels, found = random_scene(5, 8)
    whole = score_detections(labels, found).to_json()
    scorer = WaymoScorer()
    for low, high in ((0, 3), (3, 4), (4, 8)):
        parts = [select(side, np.flatnonzero((side.timestamp >= low) & (side.timestamp < high))) for side in (labels, found)]
        scorer.add(*parts)
    parted = scorer.scores().to_json()
    for name in whole:
        assert parted[name] == pytest.approx(whole[name], abs=1e-12)


def test_counts_of_several_scorers_add_up_to_those_of_one():
    labels, found = random_scene(5, 8)
    scorer = WaymoScorer()
    for low, high in ((0, 3), (3, 3), (3, 8)):
        part = WaymoScorer()
        part.add(*(select(side, np.flatnonzero((side.timestamp >= low) & (side.timestamp < high))) for side in (labels, found)))
        scorer.add_counts(part.counts())
    whole, added = score_detections(labels, found), scorer.scores()
    for name, value in whole.to_json().items():
        assert added.to_json()[name] == pytest.approx(value, abs=1e-12)
    assert (added.labels, added.frames) == (whole.labels, whole.frames)


def test_golden_official_numbers_of_the_fixtures():
    folder = sample_path("waymo/metrics")
    labels, found = (read_objects(folder / f"fake_{name}.bin") for name in ("ground_truths", "predictions"))
    expected = json.loads((folder / "expected_detection.json").read_text())["official_tf_op"]
    words = ["score", "waymo-detection", str(folder / "fake_predictions.bin"), str(folder / "fake_ground_truths.bin"), "--json"]
    printed = json.loads(CliRunner().invoke(app, words).output)
    assert printed == score_detections(labels, found).to_json()
    assert len(expected) == 32
    assert set(printed) == set(expected)
    for name, official in expected.items():
        assert printed[name]["AP"] == pytest.approx(official["AP"], abs=1e-6), name
        assert printed[name]["APH"] == pytest.approx(official["APH"], abs=1e-6), name


def of_car(scores: dict[str, dict[str, float]], level: int = 1) -> dict[str, float]:
    return scores[f"OBJECT_TYPE_TYPE_VEHICLE_LEVEL_{level}"]


def test_perfect_predictions_score_one_and_half_a_turn_costs_all_of_aph():
    boxes = [[10.0, 0, 0, 4, 2, 1.5, 0.3], [0, 40, 0, 4, 2, 1.5, 3.1]]
    perfect = score_detections(objects(boxes), objects(boxes, score=[0.9, 0.4])).to_json()
    assert of_car(perfect) == pytest.approx({"AP": 1, "APH": 1})
    assert perfect["RANGE_TYPE_VEHICLE_[30, 50)_LEVEL_2"]["AP"] == pytest.approx(1)
    turned = [[*box[:6], box[6] + np.pi] for box in boxes]
    assert of_car(score_detections(objects(boxes), objects(turned, score=[0.9, 0.4])).to_json()) == pytest.approx(
        {"AP": 1, "APH": 0}, abs=1e-6
    )
    assert of_car(score_detections(objects(boxes), objects([[*boxes[0][:6], 0.3 + 2 * np.pi]], score=[0.9])).to_json())[
        "APH"
    ] == pytest.approx(0.5)


def test_a_hit_on_a_hard_label_counts_at_level_1_but_its_miss_does_not():
    boxes = [[10.0, 0, 0, 4, 2, 1.5, 0], [20.0, 0, 0, 4, 2, 1.5, 0]]
    labels = objects(boxes, difficulty=[1, 2])
    both = score_detections(labels, objects(boxes[:1], score=[0.8])).to_json()
    assert of_car(both)["AP"] == pytest.approx(1)
    assert of_car(both, 2)["AP"] == pytest.approx(0.5)
    assert of_car(score_detections(labels, objects(boxes[1:], score=[0.8])).to_json())["AP"] == pytest.approx(0.5)


def test_labels_without_points_do_not_count_and_few_points_are_level_2():
    boxes = [[10.0, 0, 0, 4, 2, 1.5, 0], [20.0, 0, 0, 4, 2, 1.5, 0], [30.0, 0, 0, 4, 2, 1.5, 0]]
    scores = score_detections(objects(boxes, num_points=[0, 5, 6]), objects(boxes, score=[0.8] * 3))
    assert (scores.labels["OBJECT_TYPE_TYPE_VEHICLE_LEVEL_1"], scores.labels["OBJECT_TYPE_TYPE_VEHICLE_LEVEL_2"]) == (1, 2)
    assert scores.to_json()["OBJECT_TYPE_TYPE_VEHICLE_LEVEL_2"]["AP"] == pytest.approx(2 / 3)


def test_predictions_in_no_label_zones_are_never_false():
    box = [[10.0, 0, 0, 4, 2, 1.5, 0], [20.0, 5, 0, 4, 2, 1.5, 0]]
    found = objects(box, score=[0.5, 0.9])
    assert of_car(score_detections(objects(box[:1]), found).to_json())["AP"] == pytest.approx(0.5)
    excused = replace(found, overlaps_no_label_zone=np.array([False, True]))
    assert of_car(score_detections(objects(box[:1]), excused).to_json())["AP"] == pytest.approx(1)


def test_a_box_on_a_border_of_ranges_belongs_to_the_farther_one():
    box = [[30.0, 0, 0, 4, 2, 1.5, 0]]
    labels = score_detections(objects(box), objects(box)).labels
    assert (labels["RANGE_TYPE_VEHICLE_[0, 30)_LEVEL_1"], labels["RANGE_TYPE_VEHICLE_[30, 50)_LEVEL_1"]) == (0, 1)


def test_nothing_predicted_nothing_labelled_and_boxes_without_size():
    none, box = objects([]), objects([[10.0, 0, 0, 4, 2, 1.5, 0]])
    for labels, found in ((none, none), (box, none), (none, objects([]))):
        scores = score_detections(labels, found).to_json()
        assert all(value == {"AP": 0, "APH": 0} for value in scores.values())
    flat = objects([[10.0, 0, 0, 0, 2, 1.5, 0]])
    assert of_car(score_detections(flat, flat).to_json())["AP"] == 0
    assert len(score_detections(box, objects([[10.0, 0, 0, 4, 2, 1.5, 0]], [0])).to_json()) == 32, "an unknown kind is nothing"


def test_a_looser_threshold_lets_more_match(tmp_path):
    labels, found = objects([[10.0, 0, 0, 4, 2, 1.5, 0]]), objects([[11.0, 0, 0, 4, 2, 1.5, 0]])
    assert of_car(score_detections(labels, found).to_json())["AP"] == 0  # IoU is 0.6
    assert of_car(score_detections(labels, found, iou_thresholds={CAR: 0.5}).to_json())["AP"] == pytest.approx(1)
    for name, side in (("labels", labels), ("found", found)):
        write_objects(tmp_path / name, side)
    words = ["score", "waymo-detection", str(tmp_path / "found"), str(tmp_path / "labels"), "--iou"]
    assert "L1 mAP 33.33" in CliRunner().invoke(app, [*words, "vehicle=0.5"]).output
    for bad, text in (
        ("vehikle=0.5", "Did you mean vehicle"),
        ("vehicle=70", "not of the form CLASS=THRESHOLD"),
        ("vehicle", "not of the form CLASS=THRESHOLD"),
    ):
        with pytest.raises(ConfigError, match=text):
            CliRunner().invoke(app, [*words, bad], catch_exceptions=False)


def test_broken_numbers_and_unknown_segments_are_refused_in_words():
    good = objects([[10.0, 0, 0, 4, 2, 1.5, 0]])
    with pytest.raises(DataError, match="segment segment, time 7 us: a prediction holds a number that is not finite"):
        score_detections(good, objects([[10.0, 0, 0, 4, 2, 1.5, 0]], score=[np.nan], time=7))
    with pytest.raises(DataError, match="a label holds a number"):
        score_detections(objects([[np.inf, 0, 0, 4, 2, 1.5, 0]]), good)
    strange = replace(good, context=("elsewhere",))
    with pytest.raises(DataError, match="segments that have no labels: elsewhere"):
        score_detections(good, strange)
