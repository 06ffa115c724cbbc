"""The written dataset: same bytes whatever happens on the way, whole tables, refusals in words."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from picture3d.errors import ConfigError
from picture3d.formats.lidarseg_categories import INDEX_OF, LIDARSEG_CATEGORIES
from picture3d.synthetic.nuscenes_writer import write_nuscenes
from picture3d.synthetic.scene_jobs import SPLITS_FILE

TABLES = [
    *("attribute", "calibrated_sensor", "category", "ego_pose", "instance", "lidarseg", "log"),
    *("map", "sample", "sample_annotation", "sample_data", "scene", "sensor", "visibility"),
]


def write(root: Path, **changes: object) -> Path:
    settings: dict = {"scenes": 2, "keyframes_per_scene": 2, "sweeps_per_keyframe": 1, "seed": 7, **changes}
    write_nuscenes(root, **settings)
    return root


def digest(root: Path) -> dict[str, str]:
    """Relative path -> hash of every file."""
    files = (p for p in sorted(root.rglob("*")) if p.is_file())
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def table(root: Path, name: str) -> list[dict]:
    return json.loads((root / "v1.0-mini" / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("town") / "raw")


class Killed(BaseException):
    """Stands for a signal."""


def test_all_tables_are_there_and_nothing_is_left_over(dataset):
    assert sorted(p.stem for p in (dataset / "v1.0-mini").iterdir()) == TABLES
    assert sorted(p.name for p in dataset.iterdir()) == sorted(
        ["lidarseg", "maps", "samples", "sweeps", "v1.0-mini", SPLITS_FILE]
    )


def test_two_processes_write_the_same_bytes(dataset, tmp_path):
    assert digest(write(tmp_path / "raw", processes=2)) == digest(dataset)


@pytest.mark.parametrize("after", [1, 4])
def test_a_killed_run_is_finished_to_the_same_bytes(dataset, tmp_path, after):
    def stop(done: int, total: int) -> None:
        assert total == 6
        if done == after:
            raise Killed

    with pytest.raises(Killed):
        write(tmp_path / "raw", progress=stop)
    assert not (tmp_path / "raw" / SPLITS_FILE).exists()
    calls: list[int] = []
    write(tmp_path / "raw", progress=lambda done, total: calls.append(done))
    assert digest(tmp_path / "raw") == digest(dataset)
    # Finished scenes are not written again: three sweeps each.
    assert calls[0] == after // 3 * 3
    assert calls[-1] == 6


def test_a_whole_dataset_is_left_alone(dataset):
    before = {p: p.stat().st_mtime_ns for p in dataset.rglob("*") if p.is_file()}
    calls: list[tuple[int, int]] = []
    write(dataset, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(6, 6)]
    assert {p: p.stat().st_mtime_ns for p in dataset.rglob("*") if p.is_file()} == before


def test_other_settings_are_refused_by_name(dataset):
    with pytest.raises(ConfigError, match="seed"):
        write(dataset, seed=8)


def test_foreign_tables_are_never_mixed_with_a_town(tmp_path):
    (tmp_path / "v1.0-mini").mkdir()
    with pytest.raises(ConfigError, match="real data"):
        write(tmp_path)


@pytest.mark.parametrize("wrong", [{"scenes": 0}, {"val_scenes": 3}, {"sweeps_per_keyframe": -1}, {"processes": 0}])
def test_impossible_numbers_are_refused_before_anything_is_written(tmp_path, wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        write(tmp_path / "raw", **wrong)
    assert not (tmp_path / "raw").exists()


def test_points_have_five_columns_and_a_label_each(dataset):
    files = {record["sample_data_token"]: record["filename"] for record in table(dataset, "lidarseg")}
    keyframes = [record for record in table(dataset, "sample_data") if record["is_key_frame"]]
    assert len(files) == len(keyframes) == 4
    for record in keyframes:
        points = np.fromfile(dataset / record["filename"], "<f4").reshape(-1, 5)
        labels = np.fromfile(dataset / files[record["token"]], np.uint8)
        assert len(points) == len(labels) > 20_000
        assert labels.max() < 32
        assert set(np.unique(points[:, 4])) <= set(range(32))
        assert 0 <= points[:, 3].min() <= points[:, 3].max() <= 255
        assert np.isfinite(points).all()


def test_samples_and_sweeps_lie_where_nuscenes_has_them(dataset):
    for record in table(dataset, "sample_data"):
        folder = "samples/LIDAR_TOP/" if record["is_key_frame"] else "sweeps/LIDAR_TOP/"
        assert record["filename"].startswith(folder)
        assert record["filename"].endswith(f"__{record['timestamp']}.pcd.bin")


def test_a_sweep_between_keyframes_belongs_to_the_sample_after_it(dataset):
    samples = {record["token"]: record for record in table(dataset, "sample")}
    for record in table(dataset, "sample_data"):
        ahead = samples[record["sample_token"]]["timestamp"] - record["timestamp"]
        assert ahead == (0 if record["is_key_frame"] else 250_000)


def test_tokens_are_unique_and_every_reference_is_met(dataset):
    tokens = {}
    for name in TABLES:
        rows = table(dataset, name)
        tokens[name] = {row["token"] for row in rows}
        assert len(tokens[name]) == len(rows) > 0
        if name != "visibility":
            assert all(len(token) == 32 and set(token) <= set("0123456789abcdef") for token in tokens[name])
    for row in table(dataset, "sample_annotation"):
        assert row["sample_token"] in tokens["sample"]
        assert row["instance_token"] in tokens["instance"]
        assert row["visibility_token"] in tokens["visibility"]
        assert set(row["attribute_tokens"]) <= tokens["attribute"]
        assert row["num_lidar_pts"] >= 1
        assert min(row["size"]) > 0
        assert np.linalg.norm(row["rotation"]) == pytest.approx(1)
    for row in table(dataset, "instance"):
        assert row["category_token"] in tokens["category"]


def test_categories_have_the_official_indices(dataset):
    rows = table(dataset, "category")
    assert [row["name"] for row in sorted(rows, key=lambda row: row["index"])] == list(LIDARSEG_CATEGORIES)
    assert {row["name"]: row["index"] for row in rows} == INDEX_OF


def test_sizes_are_width_length_height(dataset):
    cars = {row["token"] for row in table(dataset, "category") if row["name"] == "vehicle.car"}
    instances = {row["token"] for row in table(dataset, "instance") if row["category_token"] in cars}
    sizes = np.array([row["size"] for row in table(dataset, "sample_annotation") if row["instance_token"] in instances])
    width, length, height = np.median(sizes, axis=0)
    assert 1.6 < width < 2.3
    assert 3.7 < length < 5.6
    assert 1.3 < height < 2.3


def test_the_splits_name_every_scene_once(dataset):
    splits = json.loads((dataset / SPLITS_FILE).read_text())["splits"]
    assert splits == {"train": ["scene-0001"], "val": ["scene-0002"]}
    assert [row["name"] for row in table(dataset, "scene")] == ["scene-0001", "scene-0002"]


def test_one_keyframe_alone_is_a_dataset(tmp_path):
    root = write(tmp_path / "raw", scenes=1, keyframes_per_scene=1, val_scenes=0)
    (scene,) = table(root, "scene")
    assert scene["nbr_samples"] == 1
    assert scene["first_sample_token"] == scene["last_sample_token"]
    (record,) = table(root, "sample_data")
    assert record["prev"] == record["next"] == ""
