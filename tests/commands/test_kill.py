"""Killed at any moment and run again, every long command ends with the files of an unbroken run, and with no others."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from picture3d.cli import app
from picture3d.recipes.catalogue import detection_recipe, pretraining_recipe, segmentation_recipe, tiny
from picture3d.synthetic.occupancy import write_occupancy

TIMES = {"seconds", "data_seconds"}
NOT_COMPARED = {"log.txt", "environment.json"}  # they tell of times, machines and interruptions


@dataclass(frozen=True)
class Place:
    """What commands read, made once."""

    root: Path

    def command(self, name: str, out: Path) -> list[str]:
        raw = str(self.root / "raw")
        town = ["--scenes", "3", "--keyframes", "3", "--sweeps-per-keyframe", "2", "--val-scenes", "1"]
        match name:
            case "synth":
                return ["synth", str(out), *town]
            case "synth waymo":
                return ["synth", str(out), "--format", "waymo", "--scenes", "2", "--keyframes", "2", "--val-scenes", "1"]
            case "synth occupancy":
                return ["synth", str(out), *town, "--occupancy"]
            case "occupancy":
                return ["prepare", "occupancy", raw, str(out)]
            case "prepare":
                return ["prepare", "nuscenes", raw, str(out)]
            case "targets":  # they are written beside the frames: each run has frames of its own
                return ["targets", str(out)]
            case "objects":
                return ["data", "objects", str(out)]
            case "pretrain":
                return ["pretrain", "--config", f"{self.root}/pretrain.json", "--out", str(out), "--resume"]
            case "segmentation" | "detection":
                return ["finetune", name, "--config", f"{self.root}/{name}.json", "--out", str(out), "--resume"]
            case _:
                raise ValueError(name)

    def before(self, name: str, out: Path) -> None:
        """What has to be in `out` before the command runs."""
        if name == "occupancy":
            write_occupancy(self.root / "raw")  # the first time
        if name in {"targets", "objects", "occupancy"}:
            subprocess.run(["cp", "-r", str(self.root / "prepared"), str(out)], check=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("kill")
    for words in (
        ["synth", f"{root}/raw", "--scenes", "3", "--keyframes", "3", "--sweeps-per-keyframe", "2", "--val-scenes", "1"],
        ["prepare", "nuscenes", f"{root}/raw", f"{root}/prepared"],
    ):
        result = CliRunner().invoke(app, words, catch_exceptions=False)
        assert result.exit_code == 0, result.output
    changes = ["training.max_steps=8", "training.checkpoint_every=2", "training.keep_last=1"]
    pretraining = tiny(pretraining_recipe("town-picture", root / "prepared"))
    pretraining.with_overrides([*changes, "targets.mode=online"]).save(root / "pretrain.json")
    tiny(segmentation_recipe("town-segmentation", root / "prepared")).with_overrides(changes).save(root / "segmentation.json")
    tiny(detection_recipe("town-detection", root / "prepared")).with_overrides(changes).save(root / "detection.json")
    return Place(root)


def start(words: list[str]) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "picture3d.cli", *words]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment, start_new_session=True)


def finish(words: list[str]) -> float:
    begin = time.monotonic()
    process = start(words)
    _, said = process.communicate()
    assert process.returncode == 0, said.decode()
    return time.monotonic() - begin


def kill_after(words: list[str], seconds: float) -> bool:
    """Whether the command was still running."""
    process = start(words)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True
    finally:
        assert process.stderr is not None
        process.stderr.close()
    return False


def contents(folder: Path) -> dict[str, str]:
    """Every file by its bytes; JSON without what a clock said; checkpoints, which keep the seconds spent, by their names."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir() or path.name in NOT_COMPARED:
            continue
        data = path.read_bytes()
        if path.suffix in {".json", ".jsonl"}:
            trees = [json.loads(line) for line in (data.splitlines() if path.suffix == ".jsonl" else [data])]
            cleaned = [{k: v for k, v in tree.items() if k not in TIMES} if isinstance(tree, dict) else tree for tree in trees]
            data = json.dumps(cleaned).encode()
        if path.parent.name == "checkpoints":
            data = b""
        found[str(path.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return found


def killed_and_finished(place: Place, tmp_path: Path, name: str, seed: int, kills: int) -> None:
    whole, broken = tmp_path / "whole" / "out", tmp_path / "broken" / "out"
    for out in (whole, broken):
        out.parent.mkdir()
        place.before(name, out)
    seconds = finish(place.command(name, whole))
    rng = random.Random(seed)
    hit = 0
    while hit < kills:
        if kill_after(place.command(name, broken), rng.uniform(0.3, 0.95) * seconds):
            hit += 1
        elif hit:  # less was left to do than this kill waited for
            break
        else:  # the unbroken run was the slow one of the two: begin anew, and strike sooner
            seconds *= 0.7
            shutil.rmtree(broken)
            place.before(name, broken)
    finish(place.command(name, broken))
    one, two = contents(whole), contents(broken)
    assert set(two) == set(one)
    assert {path for path in one if one[path] != two[path]} == set()


@pytest.mark.parametrize("name", ["prepare", "targets", "pretrain"])
def test_a_killed_command_ends_as_an_unbroken_one(place, tmp_path, name):
    killed_and_finished(place, tmp_path, name, seed=1, kills=1)


@pytest.mark.long
@pytest.mark.parametrize(
    "name",
    [
        "synth", "synth waymo", "synth occupancy", "prepare", "occupancy", "targets", "objects", "pretrain", "segmentation",
        "detection",
    ],
)  # fmt: skip
def test_a_command_killed_three_times_ends_as_an_unbroken_one(place, tmp_path, name):
    killed_and_finished(place, tmp_path, name, seed=2, kills=3)
