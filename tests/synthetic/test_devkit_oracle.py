"""The official nuScenes devkit reads what the town writes. It needs numpy < 2, so it lives in an environment of its own."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from picture3d.datasets.nuscenes_splits import official_split
from picture3d.formats.lidarseg_categories import LIDARSEG_CATEGORIES
from picture3d.synthetic.nuscenes_writer import write_nuscenes

REPOSITORY = Path(__file__).resolve().parent.parent.parent
PYTHON = REPOSITORY / ".venv-oracles" / "bin" / "python"
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-oracles: run `make oracles` for the nuScenes devkit"),
]


@pytest.fixture(scope="module")
def answer(tmp_path_factory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("devkit") / "town"
    write_nuscenes(root, scenes=2, keyframes_per_scene=3, sweeps_per_keyframe=2, seed=3)
    script = REPOSITORY / "tests" / "oracles" / "nuscenes_devkit_check.py"
    done = subprocess.run([PYTHON, script, root, "v1.0-mini"], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.rpartition("ANSWER ")[2])


def test_the_devkit_loads_the_tables_and_every_chain_is_whole(answer):
    assert answer["scenes"] == ["scene-0001", "scene-0002"]
    assert answer["points"] == answer["lidarseg_points"] > 6 * 20_000


@pytest.mark.parametrize(
    ("version", "devkits", "ours", "scenes"),
    [
        ("v1.0-trainval", "train", "train", 700), ("v1.0-trainval", "val", "val", 150), ("v1.0-test", "test", "test", 150),
        ("v1.0-mini", "mini_train", "train", 8), ("v1.0-mini", "mini_val", "val", 2),
    ],
)  # fmt: skip
def test_every_scene_is_in_the_split_of_the_devkits_lists(answer, version, devkits, ours, scenes):
    assert len(answer["splits"][devkits]) == scenes
    assert {official_split(version, scene) for scene in answer["splits"][devkits]} == {ours}


def test_the_devkits_category_indices_are_the_official_ones(answer):
    assert tuple(answer["categories"]) == LIDARSEG_CATEGORIES


def test_the_devkit_counts_the_same_points_in_every_box(answer):
    assert answer["worst_count"] == 0


def test_points_in_the_devkits_boxes_have_the_boxs_class(answer):
    # The rest is the ground that a box's floor touches.
    assert answer["agree"] > 0.85 * answer["inside"] > 1000


def test_the_devkit_derives_velocities_of_moving_and_standing_things(answer):
    assert min(answer["moving"], answer["standing"]) > 20


def test_the_devkit_opens_the_maps_and_finds_the_car_on_them(answer):
    assert len(answer["maps"]) == 2


def test_sweeps_lie_on_each_other_in_the_devkits_global_frame(answer):
    # The cells that differ are rings on the ground, which move with the car.
    assert answer["shared_cells"] > 0.35
