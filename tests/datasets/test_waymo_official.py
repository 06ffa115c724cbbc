"""Our frames against those of the official Waymo package, which needs Python 3.10 and TensorFlow: an environment of its own."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from picture3d.datasets.waymo import CATEGORIES, frame_of_waymo
from picture3d.formats.tfrecord import RecordWriter, read_records
from picture3d.formats.waymo_frame import read_frame
from picture3d.structures.frame import Frame
from picture3d.synthetic.waymo_writer import write_waymo
from tests.formats.test_range_image import full_frame

REPOSITORY = Path(__file__).resolve().parent.parent.parent
PYTHON = REPOSITORY / ".venv-waymo" / "bin" / "python"
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-waymo: run `make oracles-waymo` for the official package, 2.5 GB"),
]


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> tuple[list[Frame], dict[str, np.ndarray]]:
    """Two frames of a town and one of random calibrations and poses: ours, and what the official code makes of them."""
    folder = tmp_path_factory.mktemp("official")
    write_waymo(folder / "raw", scenes=1, frames_per_scene=2, seed=22, val_scenes=0)
    (file,) = (folder / "raw" / "training").iterdir()
    payloads = [payload for _, payload in read_records(file)]
    # Near the origin: the official code computes in float32, and the poses are global.
    payloads.append(full_frame(np.random.default_rng(2), reach=50).bytes())
    with RecordWriter(folder / "frames.tfrecord") as writer:
        for payload in payloads:
            writer.write(payload)
    script = REPOSITORY / "tests" / "oracles" / "waymo_official_check.py"
    done = subprocess.run(
        [PYTHON, script, folder / "frames.tfrecord", folder / "out.npz"],
        capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    with np.load(folder / "out.npz") as arrays:
        return [frame_of_waymo(read_frame(p), "log", i, "f")[0] for i, p in enumerate(payloads)], dict(arrays)


def test_points_are_within_a_tenth_of_a_millimetre_of_the_official_ones(both):
    frames, official = both
    for number, frame in enumerate(frames):
        points = frame.points
        assert points.elongation is not None
        seen = 0
        for name in range(1, 6):
            for which in (0, 1):
                rows = (points.sensor == name) & (points.return_index == which + 1)
                expected = official[f"{number}/{name}/{which}"]
                np.testing.assert_allclose(points.xyz[rows], expected[:, 3:], rtol=0, atol=1e-4)
                assert np.array_equal(points.intensity[rows], expected[:, 1])
                assert np.array_equal(points.elongation[rows], expected[:, 2])
                seen += len(expected)
        assert seen == len(points) > 100_000


def test_boxes_and_classes_are_the_official_ones(both):
    frames, official = both
    types = {name: number for number, name in CATEGORIES.items()}
    for number, frame in enumerate(frames):
        boxes, expected = frame.boxes, official[f"{number}/boxes"]
        assert boxes is not None
        found = np.column_stack([boxes.center, boxes.size, boxes.yaw, boxes.num_points, [types[n] for n in boxes.category]])
        assert np.array_equal(found.reshape(-1, 9), expected)
    assert len(official["0/boxes"]) > 20
    for which in (0, 1):
        rows = (frames[0].points.sensor == 1) & (frames[0].points.return_index == which + 1)
        assert frames[0].labels is not None
        counts = np.bincount(frames[0].labels[rows], minlength=23)[1:]
        assert np.array_equal(counts, np.bincount(official[f"0/classes/{which}"].ravel(), minlength=23)[1:])
