"""`finetune detection`, `evaluate` and `predict`, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from picture3d.datasets.prepared import PreparedDataset
from picture3d.errors import ConfigError, DataError
from picture3d.formats.nuscenes_results import CLASSES
from picture3d.formats.waymo_objects_reading import read_objects
from picture3d.recipes.catalogue import detection_recipe, segmentation_recipe, tiny
from tests.command_line import do


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A town of two scenes, a detector of either kind and a segmentation, all hardly trained."""
    root = tmp_path_factory.mktemp("predict")
    do("synth", root / "raw", "--scenes", 2, "--keyframes", 2, "--sweeps-per-keyframe", 0, "--val-scenes", 1)
    do("prepare", "nuscenes", root / "raw", root / "prepared", "--sweeps", 0)
    for name, recipe in (("center", "town-detection"), ("transfusion", "nuscenes-detection"), ("waymo", "waymo-detection")):
        config = tiny(detection_recipe(recipe, root / "prepared"))
        data = config.data.model_copy(update={"features": ("intensity",), "intensity_scale": "unit", "sweeps": 1})
        head = config.task.head.model_copy(update={"score_threshold": 0.0})
        config.model_copy(update={"data": data, "task": config.task.model_copy(update={"head": head})}).save(root / "c.json")
        said = do("finetune", "detection", "--config", root / "c.json", "--out", root / name)
        assert "finished after 2 steps" in said
    tiny(segmentation_recipe("town-segmentation", root / "prepared")).save(root / "c.json")
    do("finetune", "segmentation", "--config", root / "c.json", "--out", root / "segment")
    return root


@pytest.mark.parametrize("name", ["center", "transfusion"])
def test_evaluating_a_detector_is_scoring_its_submission(place, tmp_path, name):
    evaluated = json.loads(do("evaluate", place / name, "--json"))
    assert evaluated == json.loads((place / name / "evaluation_val.json").read_text())
    said = do("predict", place / name, "--out", tmp_path / "results_nusc.json", "--format", "nuscenes")
    assert "2 frames" in said
    scored = json.loads(
        do("score", "nuscenes-detection", tmp_path / "results_nusc.json", "--labels", place / "prepared", "--json")
    )
    assert set(evaluated["mean_dist_aps"]) == set(CLASSES)
    assert scored["mean_ap"] == pytest.approx(evaluated["mean_ap"], abs=1e-12)
    assert scored["nd_score"] == pytest.approx(evaluated["nd_score"], abs=1e-12)
    results = json.loads((tmp_path / "results_nusc.json").read_text())["results"]
    raw = json.loads((place / "raw" / "v1.0-mini" / "sample.json").read_text())
    assert set(results) <= {sample["token"] for sample in raw}, "samples go by their official tokens"


def test_boxes_as_json_hold_every_frame_and_class(place, tmp_path):
    do("predict", place / "transfusion", "--out", tmp_path / "a.json", "--min-score", 0.01)
    tree = json.loads((tmp_path / "a.json").read_text())
    dataset = PreparedDataset(place / "prepared")
    assert [frame["frame"] for frame in tree["frames"]] == [str(key) for key in dataset.keyframes("val")]
    boxes = [box for frame in tree["frames"] for box in frame["boxes"]]
    assert boxes
    assert all(box["score"] >= 0.01 and box["class"] in tree["classes"][1:] and len(box["velocity"]) == 2 for box in boxes)
    do("predict", place / "center", "--out", tmp_path / "b.json", "--frame", tree["frames"][1]["frame"])
    one = json.loads((tmp_path / "b.json").read_text())["frames"]
    assert [frame["token"] for frame in one] == [tree["frames"][1]["token"]]
    assert one[0]["boxes"][0]["velocity"] is None, "this head knows no velocities"


def test_waymo_objects_name_segment_and_time(place, tmp_path):
    do("predict", place / "waymo", "--out", tmp_path / "objects.bin")
    found = read_objects(tmp_path / "objects.bin")
    dataset = PreparedDataset(place / "prepared")
    keys = dataset.keyframes("val")
    assert set(found.context) == {keys[0].log}
    assert set(found.timestamp.tolist()) <= {dataset.frame(key, ()).timestamp_us for key in keys}


def test_pictures_are_one_file_or_a_folder(place, tmp_path):
    key = PreparedDataset(place / "prepared").keyframes("val")[0]
    do("predict", place / "center", "--out", tmp_path / "one.png", "--frame", key, "--min-score", 0)
    do("predict", place / "center", "--out", tmp_path / "plain.png", "--frame", key, "--min-score", 2)
    with_boxes, without = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("one", "plain"))
    assert with_boxes.shape == (960, 960, 3)
    assert (with_boxes != without).any(2).sum() > 100, "boxes are drawn"
    do("predict", place / "segment", "--out", tmp_path / "many", "--format", "picture")
    assert len(list((tmp_path / "many").glob("*.png"))) == 2
    ahead = np.column_stack([np.linspace(20, 40, 500), np.zeros((500, 2)), np.ones(500)]).astype(np.float32)
    for name, sweep in (("up", ahead), ("empty", ahead[:1] + 90)):  # one in sight, one out of it
        np.save(tmp_path / f"{name}.npy", sweep)
        words = ("--points", tmp_path / f"{name}.npy", "--intensity", "0-1", "--out", tmp_path / f"{name}.png")
        do("predict", place / "center", *words, "--min-score", 2)
    up, empty = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("up", "empty"))
    rows, columns = np.nonzero((up != empty).any(2))
    assert abs(np.median(columns) - 480) <= 2, "x is ahead in a sweep file's frame, and the car looks up"
    assert rows.max() < 480 - 20 * 9.6 + 3
    with pytest.raises(ConfigError, match="is one picture, there are more frames"):
        do("predict", place / "segment", "--out", tmp_path / "no.png")
    assert not (tmp_path / "no.png").exists()


def test_classes_of_points_for_the_lidarseg_challenge(place, tmp_path):
    do("predict", place / "segment", "--out", tmp_path / "seg", "--format", "lidarseg")
    dataset = PreparedDataset(place / "prepared")
    for key in dataset.keyframes("val"):
        frame = dataset.frame(key, ())
        found = np.fromfile(tmp_path / "seg" / f"{frame.token}_lidarseg.bin", np.uint8)
        assert len(found) == len(frame.points)
        assert set(found.tolist()) <= set(range(1, 17))


def test_a_sweep_file_is_predicted_row_by_row(place, tmp_path):
    key = PreparedDataset(place / "prepared").keyframes("val")[0]
    points = PreparedDataset(place / "prepared").frame(key).points
    rows = np.column_stack([points.xyz, points.intensity]).astype(np.float32)
    rows[7] = np.nan
    rows.tofile(tmp_path / "sweep.bin")
    words = ("--points", tmp_path / "sweep.bin", "--intensity", "0-255")
    do("predict", place / "segment", "--out", tmp_path / "labels.json", *words)
    tree = json.loads((tmp_path / "labels.json").read_text())
    labels = tree["frames"][0]["labels"]
    assert len(labels) == len(rows)
    assert labels[7] == 0
    assert min(labels[:7] + labels[8:]) >= 1
    do("predict", place / "center", "--out", tmp_path / "boxes.json", *words)
    do("predict", place / "center", "--out", tmp_path / "frame.json", "--frame", key)
    of_file, of_frame = (
        np.array([box["center"] for box in json.loads((tmp_path / f"{name}.json").read_text())["frames"][0]["boxes"]])
        for name in ("boxes", "frame")
    )
    nearest = np.linalg.norm(of_file[:, None] - of_frame[None], axis=2).min(1)
    assert np.quantile(nearest, 0.95) < 0.05, "one point in thousands makes no other boxes"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["center", "--out", "x.xyz"], "does not say which format is wanted"),
        (["center", "--out", "x.json", "--format", "yaml"], "no format is called 'yaml'"),
        (
            ["center", "--out", "x", "--format", "lidarseg"],
            "a network for detection, .* Use json or nuscenes",
        ),
        (
            ["segment", "--out", "x.json", "--format", "nuscenes"],
            "a network for segmentation, .* Use json or lidarseg",
        ),
        (["waymo", "--out", "x.json", "--format", "nuscenes"], "not a class of the nuScenes challenge"),
        (["center", "--out", "x.json", "--frame", "scene-0002/99"], "there is no frame scene-0002/99"),
        (["center", "--out", "x.json", "--split", "test"], "no split 'test'"),
    ],
)
def test_what_cannot_be_predicted_is_refused_and_leaves_nothing(place, tmp_path, words, expected):
    out = tmp_path / words[2]
    with pytest.raises((ConfigError, DataError), match=expected):
        do("predict", place / words[0], "--out", out, *words[3:])
    assert list(tmp_path.rglob("*")) == []
