"""Several datasets, one of them on a server, trained on by the commands a user types."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from picture3d.cli import main
from picture3d.recipes.catalogue import pretraining_recipe, tiny
from tests.command_line import do
from tests.datasets.made_frames import made_frame, write_made_dataset
from tests.datasets.object_store import object_store


@pytest.fixture
def roots(tmp_path, monkeypatch):
    monkeypatch.setenv("PICTURE3D_CACHE", str(tmp_path / "cache"))
    here = write_made_dataset(tmp_path / "here", {"a": [made_frame("a", i, points=300, seed=1) for i in range(3)]})
    there = write_made_dataset(tmp_path / "there", {log: [made_frame(log, 0, points=300, seed=2)] for log in "ab"})
    for root in (here, there):
        assert "sensor 5: " in do("data", "intensity", root)
    return here, there


def settings(roots: tuple[Path, Path], out: Path, url: str) -> list[object]:
    mixture = json.dumps([{"root": url, "weight": 0.7, "name": "served"}])
    plain = tiny(pretraining_recipe("town-picture", roots[0]))
    tree = plain.model_dump(mode="json")
    tree["targets"]["mode"], tree["mask"]["kind"], tree["loss"]["features_weight"] = "none", "random", 0
    path = out.parent / f"{out.name}.json"
    path.write_text(json.dumps(tree))
    words = ["pretrain", "--config", path, "--out", out, "--set", f"data.also={mixture}", "--set", "data.shuffle_window=1"]
    return [*words, "--set", "data.intensity_scale=sensor_quantile"]


def test_a_run_on_a_folder_and_a_server_is_the_run_on_two_folders(roots, tmp_path):
    with object_store(roots[1]) as store:
        do(*settings(roots, tmp_path / "run-url", store.url), "--set", "training.max_steps=4")
        assert set(store.logs()) <= {"a", "b"}
        assert "http:" in (tmp_path / "run-url" / "config.json").read_text()
    do(*settings(roots, tmp_path / "run-folder", str(roots[1])), "--set", "training.max_steps=4")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("run-url", "run-folder"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_what_a_server_lacks_is_one_line_and_status_2(roots, tmp_path, monkeypatch, capsys):
    with object_store(roots[1]) as store:
        words = settings(roots, tmp_path / "run", f"{store.url}/nowhere")
        monkeypatch.setattr("sys.argv", ["picture3d", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            main()
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "/nowhere/dataset.json: is not there" in said


@pytest.mark.parametrize("words", ["targets {}", "data objects {}", "data intensity {}", "pretrain --data {0} --out {0}/run"])
def test_nothing_is_written_to_a_url(roots, tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    with object_store(roots[1]) as store:
        monkeypatch.setattr("sys.argv", ["picture3d", *words.format(store.url).split()])
        with pytest.raises(SystemExit) as caught:
            main()
    assert caught.value.code == 2
    assert "nothing is written to a URL" in capsys.readouterr().err
    assert not (tmp_path / "http:").exists()


def test_the_info_of_a_served_dataset_needs_no_log(roots):
    with object_store(roots[1]) as store:
        assert json.loads(do("data", "info", store.url, "--json"))["logs"] == 2
        assert store.logs() == []
