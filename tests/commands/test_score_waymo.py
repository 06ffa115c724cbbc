"""`score waymo-detection` on files: names and order of the breakdowns, the table, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from picture3d.cli import app
from picture3d.commands.score_waymo import score_waymo_detection
from picture3d.errors import ConfigError, DataError
from picture3d.formats.waymo_objects import PEDESTRIAN, VEHICLE, WaymoObjects, make_objects, write_objects
from tests.sample_data import sample_path

BOXES = np.array([[10.0, 0, 0, 4, 2, 1.5, 0], [35.0, 0, 0, 4, 2, 1.5, 1], [0.0, 8, 0, 1, 1, 1.8, 2]])
KINDS = np.array([VEHICLE, VEHICLE, PEDESTRIAN])


def written(folder: Path, labels: WaymoObjects, found: WaymoObjects) -> tuple[Path, Path]:
    """Predictions and labels as files."""
    write_objects(folder / "labels.bin", labels)
    write_objects(folder / "found.bin", found)
    return folder / "found.bin", folder / "labels.bin"


def labels() -> WaymoObjects:
    return make_objects(BOXES, KINDS, "segment", 3, num_points=np.array([40, 4, 9]))


def found(rows: list[int], scores: list[float]) -> WaymoObjects:
    return make_objects(BOXES[rows], KINDS[rows], "segment", 3, score=np.array(scores))


def test_golden_breakdowns_are_printed_by_their_official_names_in_the_official_order(tmp_path):
    expected = json.loads((sample_path("waymo/metrics") / "expected_detection.json").read_text())["official_tf_op"]
    predictions, truth = written(tmp_path, labels(), found([0], [0.5]))
    printed = json.loads(CliRunner().invoke(app, ["score", "waymo-detection", str(predictions), str(truth), "--json"]).output)
    assert list(printed) == list(expected)
    assert all(list(value) == ["AP", "APH"] for value in printed.values())


def test_a_found_and_a_missed_vehicle_give_half_at_the_level_of_the_missed_one(tmp_path):
    predictions, truth = written(tmp_path, labels(), found([0], [0.5]))
    printed = json.loads(score_waymo_detection(predictions, truth, iou=[], as_json=True))
    # The missed label has 4 points, so it counts at LEVEL_2 only.
    assert printed["OBJECT_TYPE_TYPE_VEHICLE_LEVEL_1"]["AP"] == pytest.approx(1)
    assert printed["OBJECT_TYPE_TYPE_VEHICLE_LEVEL_2"]["AP"] == pytest.approx(0.5)
    assert printed["RANGE_TYPE_VEHICLE_[30, 50)_LEVEL_2"]["AP"] == 0
    assert printed["OBJECT_TYPE_TYPE_CYCLIST_LEVEL_2"] == {"AP": 0, "APH": 0}


def test_the_table_names_the_file_and_each_class(tmp_path):
    predictions, truth = written(tmp_path, labels(), found([0, 1, 2], [0.5, 0.5, 0.5]))
    lines = score_waymo_detection(predictions, truth, iou=[], as_json=False).splitlines()
    assert lines[0] == str(predictions)
    assert [line.split()[0] for line in lines[2:6]] == ["VEHICLE", "PEDESTRIAN", "SIGN", "CYCLIST"]
    assert lines[2].split()[1:] == ["100.00", "100.00", "1", "100.00", "100.00", "2"]


def test_a_threshold_is_that_of_its_class_alone(tmp_path):
    moved = replace(found([0, 2], [0.5, 0.5]), box=BOXES[[0, 2]] + np.array([[1.0, 0, 0, 0, 0, 0, 0], [0.5, 0, 0, 0, 0, 0, 0]]))
    predictions, truth = written(tmp_path, labels(), moved)  # IoU 0.6 for the vehicle
    strict = json.loads(score_waymo_detection(predictions, truth, iou=["pedestrian=0.01"], as_json=True))
    assert strict["OBJECT_TYPE_TYPE_VEHICLE_LEVEL_1"]["AP"] == 0
    assert strict["OBJECT_TYPE_TYPE_PEDESTRIAN_LEVEL_1"]["AP"] == pytest.approx(1)
    loose = json.loads(score_waymo_detection(predictions, truth, iou=["VEHICLE=0.55"], as_json=True))
    assert loose["OBJECT_TYPE_TYPE_VEHICLE_LEVEL_1"]["AP"] == pytest.approx(1)
    assert loose["OBJECT_TYPE_TYPE_PEDESTRIAN_LEVEL_1"]["AP"] == 0


@pytest.mark.parametrize("text", ["vehicle", "vehicle=", "vehicle=0", "vehicle=1.1", "vehicle=nan", "boat=0.5"])
def test_a_threshold_that_means_nothing_is_refused(tmp_path, text):
    predictions, truth = written(tmp_path, labels(), found([0], [0.5]))
    with pytest.raises(ConfigError, match=text):
        score_waymo_detection(predictions, truth, iou=[text], as_json=True)


def test_what_is_refused_names_the_file(tmp_path):
    predictions, truth = written(tmp_path, labels(), found([0], [float("nan")]))
    with pytest.raises(DataError, match=r"found\.bin.*segment segment, time 3 us: a prediction"):
        score_waymo_detection(predictions, truth, iou=[], as_json=True)
    with pytest.raises(DataError, match=r"absent\.bin"):
        score_waymo_detection(tmp_path / "absent.bin", truth, iou=[], as_json=True)
    write_objects(predictions, replace(found([0], [0.5]), context=("elsewhere",)))
    with pytest.raises(DataError, match=r"found\.bin.*elsewhere"):
        score_waymo_detection(predictions, truth, iou=[], as_json=True)
