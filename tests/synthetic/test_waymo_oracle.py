"""The official Waymo package reads what the town writes. It needs Python 3.10 and TensorFlow: an environment of its own."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from picture3d.synthetic.drive import count_points
from picture3d.synthetic.nuscenes_rows import town_seed
from picture3d.synthetic.waymo_drive import WaymoConfig, WaymoFrame, waymo_frame
from picture3d.synthetic.waymo_writer import write_waymo
from picture3d.synthetic.world import build_town

REPOSITORY = Path(__file__).resolve().parent.parent.parent
PYTHON = REPOSITORY / ".venv-waymo" / "bin" / "python"
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-waymo: run `make oracles-waymo` for the official package, 2.5 GB"),
]
SEED = 21


@pytest.fixture(scope="module")
def official(tmp_path_factory) -> dict[str, np.ndarray]:
    folder = tmp_path_factory.mktemp("official")
    write_waymo(folder / "raw", scenes=1, frames_per_scene=2, seed=SEED, val_scenes=0)
    (file,) = (folder / "raw" / "training").iterdir()
    script = REPOSITORY / "tests" / "oracles" / "waymo_official_check.py"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [PYTHON, script, file, folder / "out.npz"], capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    with np.load(folder / "out.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def frames() -> list[WaymoFrame]:
    town = build_town(town_seed(SEED, 1))
    return [waymo_frame(town, WaymoConfig(frames=2), index) for index in (0, 1)]


def test_the_official_points_are_the_ray_cast_ones(official, frames):
    for frame in frames:
        for images in frame.lasers:
            for which, echoes in enumerate(images.returns):
                order = np.argsort(echoes.pixel)
                found = official[f"{frame.index}/{images.laser.name}/{which}"]
                assert np.array_equal(found[:, 0], echoes.range_m[order])
                assert np.array_equal(found[:, 1], echoes.intensity[order])
                assert np.array_equal(found[:, 2], echoes.elongation[order])
                # The official code computes in float32.
                np.testing.assert_allclose(found[:, 3:], frame.points(images.laser.name, which)[order], rtol=0, atol=1e-4)


def test_the_official_labels_are_the_towns_and_hold_as_many_official_points(official, frames):
    for frame in frames:
        rows = official[f"{frame.index}/boxes"]
        assert np.array_equal(rows[:, :3], frame.boxes.center)
        assert np.array_equal(rows[:, 3:6], frame.boxes.size)
        assert np.array_equal(rows[:, 7], frame.boxes.num_points)
        assert np.array_equal(rows[:, 8], frame.box_type)
        every = [official[f"{frame.index}/{laser}/{which}"][:, 3:] for laser in range(1, 6) for which in (0, 1)]
        counted = count_points(frame.boxes, np.concatenate(every).astype(np.float64))
        # A point within 0.1 mm of a face may fall on its other side.
        assert np.abs(counted - frame.boxes.num_points).max() <= 2
        assert np.mean(counted == frame.boxes.num_points) > 0.95


def test_the_official_classes_are_the_towns(official, frames):
    assert "1/classes/0" not in official
    images = frames[0].lasers[0]
    assert images.classes is not None
    for which, echoes in enumerate(images.returns):
        found = official[f"0/classes/{which}"]
        assert found.shape == (64, 2650)
        assert np.array_equal(found.ravel()[echoes.pixel], images.classes[which])
