from __future__ import annotations

import json
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from picture3d.errors import DataError
from picture3d.formats import nuscenes_tables
from picture3d.formats.nuscenes_tables import iterate_rows, path_inside, read_panoptic, read_sweep, read_tables
from tests.datasets.raw_nuscenes import RawWorld

ROWS = [
    {"token": f"t{i}", "text": 'brackets ]}[{ and "quotes" ' * (i % 3), "numbers": [i, -1.5e-7], "none": None}
    for i in range(40)
]


@pytest.mark.parametrize("chunk", [1, 7, 100, 1 << 20])
@pytest.mark.parametrize("indent", [None, 0, 4])
def test_rows_come_one_by_one_as_json_would_read_them(tmp_path, monkeypatch, chunk, indent):
    (tmp_path / "t.json").write_text(json.dumps(ROWS, indent=indent))
    monkeypatch.setattr(nuscenes_tables, "_CHUNK", chunk)
    assert list(iterate_rows(tmp_path / "t.json")) == ROWS


def test_an_empty_table_has_no_rows(tmp_path):
    (tmp_path / "t.json").write_text(" [ ] ")
    assert list(iterate_rows(tmp_path / "t.json")) == []


@pytest.mark.parametrize("content", [b"", b"{}", b"[{}, ", b'[{"a": 1', b"[1]", b"[{} x", b"\xff\xfe[", b"[" * 5000, b"null"])
def test_a_damaged_table_is_named(tmp_path, content):
    (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(DataError, match=r"t\.json"):
        list(iterate_rows(tmp_path / "t.json"))


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "samples/../../x", "a\\..\\b", "", "x\0y"])
def test_a_name_that_leaves_the_root_is_refused(tmp_path, name):
    with pytest.raises(DataError, match="outside of the dataset"):
        path_inside(tmp_path, name)


def test_a_name_inside_of_the_root_is_found(tmp_path):
    assert path_inside(tmp_path, "samples/LIDAR_TOP/a.pcd.bin") == tmp_path / "samples" / "LIDAR_TOP" / "a.pcd.bin"


def test_a_sweep_that_is_cut_off_is_named(tmp_path):
    (tmp_path / "a.pcd.bin").write_bytes(bytes(39))
    with pytest.raises(DataError, match=r"a\.pcd\.bin: 39 bytes are no whole number of points"):
        read_sweep(tmp_path / "a.pcd.bin")


def test_panoptic_ids_are_read_and_damage_is_named(tmp_path):
    path = tmp_path / "a_panoptic.npz"
    np.savez_compressed(path, data=np.array([17001, 24000], np.uint16))
    assert read_panoptic(path).tolist() == [17001, 24000]
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"a_panoptic\.npz"):
        read_panoptic(path)


def test_tables_are_joined(tmp_path):
    world = RawWorld(tmp_path)
    world.write()
    tables = read_tables(tmp_path, "v1.0-mini")
    assert [scene.name for scene in tables.scenes] == ["scene-0001", "scene-0002"]
    sweeps = tables.sweeps[tables.scenes[0].token]
    assert [sweep.timestamp_us for sweep in sweeps] == sorted(sweep.timestamp_us for sweep in sweeps)
    assert sum(sweep.is_keyframe for sweep in sweeps) == world.keyframes
    assert all((sweep.lidarseg is not None) == sweep.is_keyframe for sweep in sweeps)


def test_the_table_folders_that_are_there_are_named(tmp_path):
    (tmp_path / "v1.0-trainval").mkdir()
    with pytest.raises(DataError, match=r"Choose --version among v1\.0-trainval"):
        read_tables(tmp_path, "v1.0-mini")


@pytest.mark.parametrize(
    "table", ["scene", "sample", "sample_data", "ego_pose", "calibrated_sensor", "sensor", "category", "instance"]
)
def test_a_missing_table_is_named(tmp_path, table):
    RawWorld(tmp_path).write()
    (tmp_path / "v1.0-mini" / f"{table}.json").unlink()
    with pytest.raises(DataError, match=rf"{table}\.json"):
        read_tables(tmp_path, "v1.0-mini")


@pytest.mark.parametrize("table", ["scene", "sample", "sample_data", "ego_pose", "sample_annotation"])
def test_a_token_used_twice_is_named(tmp_path, table):
    RawWorld(tmp_path).write()
    path = tmp_path / "v1.0-mini" / f"{table}.json"
    rows = json.loads(path.read_text())
    path.write_text(json.dumps([*rows, rows[0]]))
    with pytest.raises(DataError, match="used by two rows"):
        read_tables(tmp_path, "v1.0-mini")


@pytest.mark.parametrize(("table", "points_to"), [("ego_pose", "ego_pose"), ("sample", "sample"), ("scene", "scene")])
def test_a_row_that_points_nowhere_is_named(tmp_path, table, points_to):
    RawWorld(tmp_path).write()
    path = tmp_path / "v1.0-mini" / f"{table}.json"
    path.write_text(json.dumps(json.loads(path.read_text())[1:]))
    with pytest.raises(DataError, match=rf"points to {points_to}"):
        read_tables(tmp_path, "v1.0-mini")


VALUES = st.one_of(st.none(), st.integers(), st.floats(), st.text(max_size=3), st.lists(st.floats(), max_size=4), st.just({}))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["sample_data", "ego_pose", "calibrated_sensor", "sample_annotation", "sample"]), st.data())
def test_a_garbled_value_gives_tables_or_our_own_error(table, data):
    with tempfile.TemporaryDirectory() as folder:
        RawWorld(Path(folder), scenes=1, keyframes=2).write()
        path = Path(folder, "v1.0-mini", f"{table}.json")
        rows = json.loads(path.read_text())
        row = data.draw(st.sampled_from(rows))
        row[data.draw(st.sampled_from(sorted(row)))] = data.draw(VALUES)
        path.write_text(json.dumps(rows))
        with suppress(DataError):
            read_tables(Path(folder), "v1.0-mini")
