"""The whole way of occupancy labels in a town: written, attached, shown, checked, loaded, scored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from picture3d.cli import app
from picture3d.commands.train import run_finetuning
from picture3d.datasets.loading import DataConfig, FrameBatches
from picture3d.formats.openoccupancy import read_openoccupancy
from picture3d.recipes.catalogue import occupancy_recipe, tiny
from picture3d.synthetic.occupancy import OCCUPANCY_FOLDER


def run(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def town(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("town")
    settings = ("--scenes", 2, "--keyframes", 1, "--val-scenes", 1)
    assert "prepare occupancy" in run("synth", root / "raw", *settings, "--occupancy")
    run("prepare", "nuscenes", root / "raw", root / "prepared")
    told = run("prepare", "occupancy", root / "raw", root / "prepared")
    assert "2 logs (2 made now); 2 of 2 keyframes labelled" in told
    assert "2 logs (0 made now)" in run("prepare", "occupancy", root / "raw" / OCCUPANCY_FOLDER, root / "prepared")
    return root


def test_info_and_check_know_of_the_labels(town):
    info = json.loads(run("data", "info", town / "prepared", "--json").splitlines()[-1])
    assert info["occupancy"]["labelled"] == 2
    assert info["occupancy"]["bytes"] == sum(path.stat().st_size for path in (town / "prepared/occupancy").glob("*.occ"))
    report = json.loads(run("check", town / "prepared", "--json").splitlines()[-1])
    assert report["sound"]
    assert report["findings"] == []
    assert report["counts"]["occupied voxels"] == info["occupancy"]["voxels"]


def test_labels_of_swapped_axes_are_pointed_at(town, tmp_path):
    for path in (town / "raw" / OCCUPANCY_FOLDER).rglob("*.npy"):
        copy = tmp_path / path.relative_to(town / "raw")
        copy.parent.mkdir(parents=True)
        np.save(copy, np.load(path)[:, [0, 2, 1, 3]])
    shutil.copytree(town / "prepared", tmp_path / "prepared", ignore=shutil.ignore_patterns("occupancy"))
    run("prepare", "occupancy", tmp_path, tmp_path / "prepared")
    report = json.loads(run("check", tmp_path / "prepared", "--json").splitlines()[-1])
    assert report["sound"]
    assert {(finding["level"], finding["kind"]) for finding in report["findings"]} == {("warning", "occupancy-elsewhere")}


def test_stored_labels_take_a_fortieth_of_the_files_at_most(town):
    stored = sum(path.stat().st_size for path in (town / "prepared/occupancy").glob("*.occ"))
    assert stored * 40 < sum(path.stat().st_size for path in (town / "raw" / OCCUPANCY_FOLDER).rglob("*.npy"))


def test_points_and_labels_of_a_batch_agree(town):
    config = DataConfig(root=town / "prepared", split=None, occupancy=True)
    batch = FrameBatches(config, batch_size=2, seed=0, train=False).batch(0, 0)
    dense, grid = batch.dense_occupancy().numpy(), batch.occupancy_grid
    assert grid is not None
    assert batch.labels is not None
    cells, inside = grid.locate(batch.xyz.numpy())
    found = dense[(batch.sample.numpy()[inside], *cells.T)]
    assert (found == batch.labels.numpy()[inside]).mean() > 0.93


def test_the_labels_score_one_and_a_shifted_copy_does_not(town, tmp_path):
    words = ("--labels", town / "prepared", "--json")
    perfect = json.loads(run("score", "occupancy", town / "raw", *words).splitlines()[-1])
    assert (perfect["miou"], perfect["geometric_iou"], perfect["frames"]) == (1.0, 1.0, 1)
    for path in (town / "raw" / OCCUPANCY_FOLDER).rglob("*.npy"):
        copy = tmp_path / path.relative_to(town / "raw")
        copy.parent.mkdir(parents=True)
        found = read_openoccupancy(path)
        x = found.index[:, 0].astype(np.int64) + 1
        rows = np.column_stack([found.index[:, 2], found.index[:, 1], x, found.label])[(x < 512) & (found.label < 255)]
        np.save(copy, rows)
    shifted = json.loads(run("score", "occupancy", tmp_path, *words).splitlines()[-1])
    assert 0 < shifted["miou"] < 0.9
    assert 0 < shifted["geometric_iou"] < 0.9


def test_a_network_is_trained_and_scored_and_its_files_score_the_same(town, tmp_path):
    # Two steps would leave most of the space occupied, and the file larger than label files may be.
    config = tiny(occupancy_recipe("town-occupancy", town / "prepared")).with_overrides(
        ["training.max_steps=25", "training.optim.peak_lr=5e-2"]
    )
    run_finetuning(config, tmp_path / "run", False, "cpu", 1)
    words = ("evaluate", tmp_path / "run", "--threads", 1)
    scores = json.loads(run(*words, "--json").splitlines()[-1])
    assert (scores["frames"], scores["cells"] + scores["ignored"]) == (1, 512 * 512 * 40)
    assert "geometric IoU" in run(*words)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["miou_val"], summary["geometric_iou_val"]) == (scores["miou"], scores["geometric_iou"])
    run("predict", tmp_path / "run", "--out", tmp_path / "found", "--format", "occupancy")
    again = json.loads(run("score", "occupancy", tmp_path / "found", "--labels", town / "prepared", "--json").splitlines()[-1])
    assert again["confusion"] == scores["confusion"]
    run("predict", tmp_path / "run", "--out", tmp_path / "from_above", "--format", "picture")
    assert len(list((tmp_path / "from_above").glob("*.png"))) == 1
    refused = CliRunner().invoke(app, ["predict", str(tmp_path / "run"), "--out", str(tmp_path / "found.json")])
    assert "Use occupancy or picture" in str(refused.exception)


def test_without_labels_it_says_how_to_attach_them(town, tmp_path):
    shutil.copytree(town / "prepared", tmp_path / "prepared", ignore=shutil.ignore_patterns("occupancy"))
    words = ["finetune", "occupancy", "--data", str(tmp_path / "prepared"), "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(app, words)
    assert "prepare occupancy" in str(result.exception)


def test_occupancy_of_a_waymo_town_is_refused(tmp_path):
    result = CliRunner().invoke(app, ["synth", str(tmp_path / "raw"), "--format", "waymo", "--occupancy"])
    assert result.exit_code != 0
    assert "--occupancy belong to nuScenes" in str(result.exception)
