"""`score occupancy` on files: the labels themselves are perfect, and what is missing is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from picture3d.cli import app
from picture3d.commands.score_occupancy import score_occupancy
from picture3d.datasets.openoccupancy import attach_occupancy
from picture3d.datasets.prepared import PreparedDataset
from picture3d.errors import DataError
from tests.datasets.occupancy_labels import FOLDER, label_path, label_rows, prepared_world


@pytest.fixture
def attached(tmp_path) -> Path:
    """Prepared frames of which scene 2 is for validation, with labels; the label files are at hand as predictions."""
    _, prepared = prepared_world(tmp_path)
    tree = json.loads((prepared / "dataset.json").read_text())
    tree["splits"] = {"train": ["scene-0001"], "val": ["scene-0002"]}
    (prepared / "dataset.json").write_text(json.dumps(tree))
    attach_occupancy(tmp_path, PreparedDataset(prepared))
    shutil.copytree(tmp_path / FOLDER, tmp_path / "found")
    return prepared


def found_path(folder: Path, number: int) -> Path:
    return folder / "found" / label_path(folder, 1, number).relative_to(folder / FOLDER)


def test_the_labels_themselves_score_one_and_noise_is_left_out(attached, tmp_path):
    result = CliRunner().invoke(app, ["score", "occupancy", str(tmp_path / "found"), "--labels", str(attached), "--json"])
    assert result.exit_code == 0
    scores = json.loads(result.stdout.splitlines()[-1])
    noise = sum(int((label_rows(1, number)[:, 3] == 0).sum()) for number in (0, 3, 6))
    assert (scores["miou"], scores["geometric_iou"], scores["frames"], scores["ignored"]) == (1.0, 1.0, 3, noise)
    assert scores["cells"] == 3 * 512 * 512 * 40 - noise


def test_a_missed_half_is_half_the_recall(attached, tmp_path):
    for number in (0, 3, 6):
        rows = label_rows(1, number)
        named = rows[rows[:, 3] > 0]
        np.save(found_path(tmp_path, number), named[: len(named) // 2])
        np.save(label_path(tmp_path, 1, number), named[: len(named) // 2 * 2])  # an even number
    attach_occupancy(tmp_path, PreparedDataset(attached))
    scores = json.loads(score_occupancy(tmp_path / "found", attached, split="val", as_json=True))
    assert (scores["precision"], scores["recall"], scores["geometric_iou"]) == (1.0, 0.5, 0.5)
    text = score_occupancy(tmp_path / "found", attached, split="val", as_json=False)
    assert "geometric IoU" in text
    assert "50.0" in text
    assert "driveable_surface" in text


def test_a_keyframe_without_a_prediction_is_named(attached, tmp_path):
    found_path(tmp_path, 3).unlink()
    with pytest.raises(
        DataError, match=r"1 of the 3 labelled keyframes of log 'scene-0002' have no prediction, the first is s1-d3"
    ):
        score_occupancy(tmp_path / "found", attached, split="val", as_json=False)


def test_a_split_without_labels_and_frames_without_labels_are_refused(attached, tmp_path):
    shutil.rmtree(tmp_path / FOLDER / "scene_s1")
    attach_occupancy(tmp_path, PreparedDataset(attached))
    with pytest.raises(DataError, match="no keyframe of split 'val' has occupancy labels"):
        score_occupancy(tmp_path / "found", attached, split="val", as_json=False)
    shutil.rmtree(attached / "occupancy")
    with pytest.raises(DataError, match="no occupancy labels are attached"):
        score_occupancy(tmp_path / "found", attached, split="val", as_json=False)
