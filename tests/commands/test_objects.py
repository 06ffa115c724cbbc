from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from picture3d.cli import app
from picture3d.datasets.object_database import ObjectDatabase
from picture3d.errors import ConfigError
from tests.datasets.object_scenes import random_frame, write_scenes


def test_the_command_makes_a_database_that_the_dataset_is_told_to_have(tmp_path):
    rng = np.random.default_rng(0)
    write_scenes(tmp_path, {"log-a": [random_frame(i, rng, categories=("vehicle.car", "Sign")) for i in range(2)]})
    words = ["data", "objects", str(tmp_path), "--name", "mine", "--classes", "nuscenes", "--every", "car=2"]
    said = CliRunner().invoke(app, words)
    assert said.exit_code == 0, said.output
    database = ObjectDatabase(tmp_path / "objects" / "mine.objects")
    assert f"{len(database):,} objects of 1 logs (1 done now)" in said.stdout
    assert f"vehicle.car {len(database)}" in said.stdout
    assert {database.object(row).frame for row in range(len(database))} == {0}
    assert "(0 done now)" in CliRunner().invoke(app, words).stdout
    info = CliRunner().invoke(app, ["data", "info", str(tmp_path), "--json"])
    assert json.loads(info.stdout)["objects"] == ["mine"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--classes", "kitti"], "choose one of all, nuscenes, waymo"),
        (["--every", "car"], "not of the form CLASS=N"),
        (["--every", "car=two"], "not of the form CLASS=N"),
        (["--classes", "nuscenes", "--every", "cart=2"], "no class 'cart'"),
    ],
)
def test_wrong_words_are_explained(tmp_path, words, said):
    write_scenes(tmp_path, {"log-a": [random_frame(0, np.random.default_rng(0), categories=("vehicle.car",))]})
    result = CliRunner().invoke(app, ["data", "objects", str(tmp_path), *words])
    assert isinstance(result.exception, ConfigError)
    assert said in str(result.exception)
