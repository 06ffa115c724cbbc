"""The raw dataset: the same bytes however it is made, and nothing left over."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from picture3d.errors import Picture3dError
from picture3d.synthetic.nuscenes_writer import write_nuscenes

SMALL = {"scenes": 2, "keyframes_per_scene": 2, "sweeps_per_keyframe": 1, "val_scenes": 1, "seed": 4}


def _digests(root: Path) -> dict[str, str]:
    files = sorted(p for p in root.rglob("*") if p.is_file())
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("town")
    write_nuscenes(root, **SMALL)  # type: ignore[arg-type]
    return root


def test_thirteen_tables_and_lidarseg_are_there(whole: Path):
    tables = {p.stem for p in (whole / "v1.0-mini").glob("*.json")}
    assert tables == {
        *("category", "attribute", "visibility", "instance", "sensor", "calibrated_sensor", "ego_pose", "log", "scene"),
        *("sample", "sample_data", "sample_annotation", "map", "lidarseg"),
    }
    samples = json.loads((whole / "v1.0-mini/sample.json").read_text())
    data = json.loads((whole / "v1.0-mini/sample_data.json").read_text())
    assert len(samples) == 4
    assert sum(row["is_key_frame"] for row in data) == 4
    assert len(data) == 6
    for row in data:
        points = np.fromfile(whole / row["filename"], np.float32).reshape(-1, 5)
        assert np.isfinite(points).all()
        assert points[:, 4].min() >= 0
        assert points[:, 4].max() <= 31
        assert points[:, 3].min() >= 0
        assert points[:, 3].max() <= 255


def test_a_run_that_dies_goes_on_and_ends_with_the_same_bytes(whole: Path, tmp_path: Path):
    class _KilledError(Exception):
        pass

    def die(done: int, total: int) -> None:
        if done >= 4:
            raise _KilledError

    with pytest.raises(_KilledError):
        write_nuscenes(tmp_path, **SMALL, progress=die)  # type: ignore[arg-type]
    assert not (tmp_path / "picture3d_splits.json").exists()
    write_nuscenes(tmp_path, **SMALL)  # type: ignore[arg-type]
    assert _digests(tmp_path) == _digests(whole)


def test_two_processes_write_the_same_bytes_as_one(whole: Path, tmp_path: Path):
    write_nuscenes(tmp_path, **SMALL, processes=2)  # type: ignore[arg-type]
    assert _digests(tmp_path) == _digests(whole)


def test_a_finished_dataset_is_left_alone_and_other_settings_are_refused(whole: Path):
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file()}
    write_nuscenes(whole, **SMALL)  # type: ignore[arg-type]
    assert {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file()} == before
    with pytest.raises(Picture3dError):
        write_nuscenes(whole, **{**SMALL, "seed": 5})  # type: ignore[arg-type]
