"""The official devkit reads what we write. It pins numpy below 2, so it runs in an environment of its own (`make oracles`)."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from picture3d.synthetic.nuscenes_writer import write_nuscenes

CHECKOUT = Path(__file__).resolve().parents[2]
INTERPRETER = CHECKOUT / ".venv-oracles/bin/python"


@pytest.mark.long
@pytest.mark.skipif(not INTERPRETER.exists(), reason="no .venv-oracles: run `make oracles`")
def test_the_official_devkit_loads_the_town_and_agrees_with_it(tmp_path: Path):
    write_nuscenes(tmp_path, scenes=2, keyframes_per_scene=3, sweeps_per_keyframe=1, val_scenes=1, seed=3)
    script = CHECKOUT / "tests/oracles/nuscenes_devkit_check.py"
    done = subprocess.run([INTERPRETER, script, tmp_path, "v1.0-mini"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["scenes"] == 2
    assert answer["samples"] == answer["lidarseg"] == 6
    assert [index for index, _ in answer["categories"]] == list(range(32))
    assert answer["categories"][24] == [24, "flat.driveable_surface"]
    assert all(min(shape) > 10 for shape in answer["maps"])
    assert len(answer["maps"]) >= 1
    assert all(answer["chains"])
    assert answer["labels_equal_points"]
    assert answer["boxes"] > 20
    # A point on a face may fall on either side of it in another order of float32 operations.
    assert answer["counted_right"] == answer["boxes"]
    # The rest is ground between the wheels and things that lean into a neighbour's box.
    assert answer["agreeing_points"] > 0.7 * answer["points_in_boxes"]
