"""Raw ONCE, Argoverse 2, Waymo v2, SemanticKITTI and sweeps of one's own are looked at before they are prepared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from picture3d.cli import app
from picture3d.commands.inspect import check
from picture3d.datasets.check import CheckReport
from picture3d.datasets.check_argoverse2 import check_raw_argoverse2, is_raw_argoverse2
from picture3d.datasets.check_once import check_raw_once, is_raw_once
from picture3d.datasets.check_points import check_raw_points, is_raw_points
from picture3d.datasets.check_semantickitti import check_raw_semantickitti, is_raw_semantickitti
from picture3d.datasets.check_waymo import check_raw_waymo_v2
from picture3d.datasets.waymo_v2 import waymo_version
from picture3d.errors import DataError
from picture3d.formats.waymo_v2 import component_file
from tests.datasets import test_argoverse2 as argoverse2
from tests.datasets import test_once as once
from tests.datasets import test_point_files as point_files
from tests.datasets import test_semantickitti as semantickitti
from tests.datasets import test_waymo_v2 as waymo_v2
from tests.sample_data import sample_path


def kinds(report: CheckReport) -> dict[str, int]:
    return {finding.kind: finding.count for finding in report.findings}


def sweeps_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.*"))


# -- SemanticKITTI and own sweeps ---------------------------------------------------------------------------------------


def test_sound_scans_are_counted_and_damage_is_named(tmp_path):
    folder, _ = semantickitti.write_sequence(tmp_path)
    other, _ = semantickitti.write_sequence(tmp_path, "08")
    assert is_raw_semantickitti(tmp_path)
    report = check_raw_semantickitti(tmp_path)
    assert report.findings == ()
    assert report.counts == {"logs": 2, "frames": 6, "keyframes": 6, "points": 30, "boxes": 0, "labelled": 6}
    first, second, third = sweeps_of(folder / "velodyne")
    first.write_bytes(first.read_bytes()[:-3])
    np.full((5, 4), np.inf, "<f4").tofile(second)
    third.unlink()
    (other / "poses.txt").write_text("1 2 3\n")
    report = check_raw_semantickitti(tmp_path)
    found = {(f.where, f.kind): f for f in report.findings}
    assert set(found) == {("00", "damaged"), ("00", "not-finite"), ("00", "frame-empty"), ("00", "missing"), ("08", "damaged")}
    assert first.name in found["00", "damaged"].what
    assert third.name in found["00", "missing"].what
    assert "poses.txt, line 1" in found["08", "damaged"].what
    assert found["00", "not-finite"].count == 5


def test_real_scans_are_sound():
    report = check_raw_semantickitti(sample_path("semantickitti"))
    assert report.findings == ()
    assert (report.counts["frames"], report.counts["points"]) == (3, 124231 + 124087 + 123861)
    assert report.classes["road"] > 100_000


def test_own_sweeps_are_read_by_their_layout(tmp_path):
    for log in "ab":
        point_files.write_sweeps(tmp_path / log, 2)
    assert is_raw_points(tmp_path)
    seen: list[tuple[int, int]] = []
    report = check_raw_points(tmp_path, layout=point_files.LAYOUT, progress=lambda *done: seen.append(done))
    assert report.findings == ()
    assert report.counts == {"logs": 2, "frames": 4, "keyframes": 4, "points": 80, "boxes": 0, "labelled": 0}
    assert seen == [(i, 4) for i in range(1, 5)]
    (tmp_path / "a" / "sweep8.bin").write_bytes(bytes(7))
    text, sound = check(tmp_path, as_json=False, layout=point_files.LAYOUT)
    assert not sound
    assert "damaged: a: " in text
    assert "sweep8.bin" in text
    with pytest.raises(DataError, match="layout"):
        check(tmp_path, as_json=False, layout="x,y,w")


# -- ONCE ---------------------------------------------------------------------------------------------------------------


def test_sound_sequences_are_counted(tmp_path):
    once.write_sequence(tmp_path)
    once.write_sequence(tmp_path, "000080", split="val")
    report = check_raw_once(tmp_path)
    assert report.findings == ()
    assert report.counts == {"logs": 2, "frames": 6, "keyframes": 6, "points": 6 * 67, "boxes": 8, "labelled": 0}
    assert report.categories == {"Pedestrian": 4, "Truck": 4}


def test_a_cut_sweep_of_once_is_named_and_the_next_is_read(tmp_path):
    once.write_sequence(tmp_path)
    first, second, third = sweeps_of(tmp_path / "data/000076/lidar_roof")
    first.write_bytes(first.read_bytes()[:-1])
    table = np.fromfile(second, "<f4").reshape(-1, 4)
    table[:2, 1] = np.inf
    table.tofile(second)
    third.unlink()
    report = check_raw_once(tmp_path)
    assert kinds(report) == {"damaged": 1, "not-finite": 2, "missing": 1}
    assert first.name in next(f.what for f in report.findings if f.kind == "damaged")
    assert third.name in next(f.what for f in report.findings if f.kind == "missing")
    assert report.counts["frames"] == 1


def test_once_without_its_json_with_a_damaged_one_or_in_two_lists_is_not_sound(tmp_path):
    once.write_sequence(tmp_path)
    once.write_sequence(tmp_path, "000077")
    tree = once.write_sequence(tmp_path, "000078")
    (tmp_path / "data/000076/000076.json").unlink()
    (tmp_path / "data/000077/000077.json").write_text('{"frames": [')
    tree["frames"][1]["pose"][4] = 500.0
    once.save(tmp_path, tree, "000078")
    (tmp_path / "ImageSets" / "val.txt").write_text("000078\n")
    report = check_raw_once(tmp_path)
    assert kinds(report) == {"split-overlap": 1, "missing": 1, "damaged": 1, "pose-jump": 2}
    assert report.counts["logs"] == 3


# -- Argoverse 2 --------------------------------------------------------------------------------------------------------


def test_sound_logs_are_counted(tmp_path):
    argoverse2.write_log(tmp_path / "train" / "a")
    argoverse2.write_log(tmp_path / "test" / "b", annotated=False)
    report = check_raw_argoverse2(tmp_path)
    assert report.findings == ()
    assert report.counts == {"logs": 2, "frames": 6, "keyframes": 6, "points": 24, "boxes": 3, "labelled": 0}


def test_damaged_sweeps_and_tables_of_argoverse_are_named_and_the_rest_is_read(tmp_path):
    argoverse2.write_log(tmp_path / "train" / "a")
    argoverse2.write_log(tmp_path / "train" / "b")
    argoverse2.write_log(tmp_path / "val" / "b")
    first, second, _ = sweeps_of(tmp_path / "train/a/sensors/lidar")
    first.write_bytes(first.read_bytes()[:50])
    second.unlink()
    (tmp_path / "train/b/city_SE3_egovehicle.feather").unlink()
    report = check_raw_argoverse2(tmp_path)
    assert [(f.kind, f.where) for f in report.findings] == [
        ("damaged", "a"),
        ("missing", "a"),
        ("damaged", "b"),
        ("split-overlap", "b"),
    ]
    assert first.name in report.findings[0].what
    assert second.name in report.findings[1].what
    assert "city_SE3_egovehicle.feather: no such file" in report.findings[2].what
    assert report.counts["frames"] == 4


# -- Waymo v2 -----------------------------------------------------------------------------------------------------------


def test_sound_segments_of_v2_are_counted(tmp_path):
    waymo_v2.write_small(tmp_path, waymo_v2.small_rows())
    report = check_raw_waymo_v2(tmp_path)
    assert report.findings == ()
    assert report.counts == {"logs": 1, "frames": 2, "keyframes": 2, "points": 2 * (23 + 23 + 14), "boxes": 2, "labelled": 2}
    assert report.categories == {"vehicle": 2}


def test_missing_components_damage_and_segments_in_two_splits_are_found(tmp_path):
    folder = waymo_v2.write_small(tmp_path, waymo_v2.small_rows())
    other = waymo_v2.write_small(tmp_path, waymo_v2.small_rows(), "validation")
    component_file(other, "lidar_pose", "s").unlink()
    path = component_file(folder, "lidar", "s")
    path.write_bytes(path.read_bytes()[:-20])
    report = check_raw_waymo_v2(tmp_path)
    assert kinds(report) == {"damaged": 1, "split-overlap": 1, "missing": 1}
    assert any("lacks lidar_pose" in finding.what for finding in report.findings)
    assert report.counts["frames"] == 0


def test_a_damaged_frame_of_v2_is_noted_and_the_next_is_read(tmp_path):
    rows = waymo_v2.small_rows()
    rows["lidar_pose"].pop(0)
    waymo_v2.write_small(tmp_path, rows)
    report = check_raw_waymo_v2(tmp_path)
    assert kinds(report) == {"damaged": 1}
    assert "lacks the poses of its pixels" in report.findings[0].what
    assert report.counts["frames"] == 1


# -- the command --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["once", "argoverse2", "one log", "waymo v2"])
def test_the_command_knows_what_lies_in_the_folder(tmp_path, kind):
    raw = tmp_path / "raw"
    where = raw
    match kind:
        case "once":
            once.write_sequence(raw)
            damaged = sweeps_of(raw / "data/000076/lidar_roof")[0]
        case "waymo v2":
            damaged = component_file(waymo_v2.write_small(raw, waymo_v2.small_rows()), "lidar", "s")
        case _:
            log = argoverse2.write_log(raw / "val" / "a")
            where = log if kind == "one log" else raw
            damaged = sweeps_of(log / "sensors" / "lidar")[0]
    done = CliRunner().invoke(app, ["check", str(where), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["counts"]["logs"] == 1
    damaged.write_bytes(damaged.read_bytes()[:-1])
    broken = CliRunner().invoke(app, ["check", str(where)])
    assert broken.exit_code == 1
    assert damaged.name in broken.output


def test_a_folder_of_both_versions_of_waymo_is_not_half_checked(tmp_path):
    waymo_v2.write_small(tmp_path, waymo_v2.small_rows())
    assert waymo_version(tmp_path) == 2
    (tmp_path / "training" / "segment-a.tfrecord").touch()
    with pytest.raises(DataError, match="Keep one version"):
        check(tmp_path, as_json=False)


def test_other_folders_are_not_taken_for_raw_data(tmp_path):
    (tmp_path / "data" / "pictures").mkdir(parents=True)
    assert not is_raw_once(tmp_path)
    assert not is_raw_argoverse2(tmp_path)
    once.write_sequence(tmp_path)
    shutil.rmtree(tmp_path / "data" / "000076" / "lidar_roof")
    assert is_raw_once(tmp_path)
