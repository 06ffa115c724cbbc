from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from picture3d.cli import app
from picture3d.commands.inspect import check
from picture3d.datasets.check import CheckReport, Finding, check_prepared
from picture3d.datasets.check_nuscenes import check_raw_nuscenes
from picture3d.datasets.prepared import LogHeader, set_aside_path
from picture3d.datasets.preparing import LogPlan, damaged_plan, write_logs
from picture3d.errors import DataError
from picture3d.structures.boxes import Boxes
from picture3d.structures.poses import Pose
from tests.datasets.made_frames import made_frame, write_made_dataset
from tests.datasets.raw_nuscenes import RawWorld


def kinds(report: CheckReport) -> dict[str, int]:
    return {finding.kind: finding.count for finding in report.findings}


def steady(index: int, log: str = "log-a", **changes):
    """A frame whose car moves 0.5 m per frame of 50 ms."""
    return made_frame(log, index, global_from_ego=Pose.from_yaw(0.0, (0.5 * index, 0.0, 0.0)), **changes)


def test_sound_data_is_called_sound_and_counted(tmp_path):
    root = write_made_dataset(tmp_path, {"log-a": [steady(0), steady(1)], "log-b": [steady(0, "log-b")]})
    seen = []
    report = check_prepared(root, progress=lambda done, total: seen.append((done, total)))
    assert report.sound
    assert report.findings == ()
    assert report.counts == {"logs": 2, "frames": 3, "keyframes": 3, "points": 120, "boxes": 9, "labelled": 3}
    assert sum(report.classes.values()) == 120
    assert sum(report.categories.values()) == 9
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert json.loads(json.dumps(report.to_json()))["sound"] is True


def test_a_flipped_byte_is_found_with_its_frame_and_the_other_frames_are_still_read(tmp_path):
    root = write_made_dataset(tmp_path, {"log-a": [steady(0), steady(1), steady(2)]})
    path = root / "logs" / "log-a.p3d"
    data = bytearray(path.read_bytes())
    data[40] ^= 1  # inside the first column of the first frame
    path.write_bytes(data)
    report = check_prepared(root)
    assert not report.sound
    (finding,) = report.findings
    assert (finding.kind, finding.count, finding.level) == ("damaged", 1, "error")
    assert "frame 0" in finding.what
    assert "checksum" in finding.what
    assert report.counts["frames"] == 2


def test_a_missing_log_is_an_error_and_a_stray_file_a_warning(tmp_path):
    root = write_made_dataset(tmp_path, {"log-a": [steady(0)], "log-b": [steady(0, "log-b")]})
    (root / "logs" / "log-a.p3d").unlink()
    (root / "logs" / "notes.txt").write_text("?")
    report = check_prepared(root)
    assert kinds(report) == {"stray-file": 1, "damaged": 1}
    assert not report.sound
    assert report.counts["frames"] == 1


def test_a_log_that_was_set_aside_is_told_with_its_reason(tmp_path):
    plans = [
        LogPlan(LogHeader("log-a", "made", "nuscenes-32"), 1, lambda: iter([(steady(0), 0)])),
        damaged_plan(LogHeader("log-b", "made", "nuscenes-32"), DataError("b.raw: cut off at byte 7")),
    ]
    splits = {"train": ["log-a", "log-b"]}
    write_logs(tmp_path, plans, name="made", label_set_name="nuscenes-32", splits=splits)
    report = check_prepared(tmp_path)
    assert report.findings == (Finding("warning", "set-aside", "log-b", "b.raw: cut off at byte 7"),)
    assert report.sound
    set_aside_path(tmp_path, "log-b").write_text("{")
    (finding,) = check_prepared(tmp_path).findings
    assert (finding.kind, "not JSON" in finding.what) == ("set-aside", True)


def test_times_that_stand_still_or_run_backwards_and_poses_that_jump_are_named(tmp_path):
    first = steady(0)
    frames = [
        first,
        replace(steady(1), timestamp_us=first.timestamp_us),
        replace(steady(2), timestamp_us=first.timestamp_us - 1_000_000),
        replace(steady(3), global_from_ego=Pose.from_yaw(0.0, (100.0, 0.0, 0.0)), timestamp_us=first.timestamp_us),
    ]
    report = check_prepared(write_made_dataset(tmp_path, {"log-a": frames}))
    assert kinds(report) == {"time-repeated": 1, "time-backwards": 1, "pose-jump": 1}
    assert not report.sound  # because of the clock alone
    words = {finding.kind: finding.what for finding in report.findings}
    assert "frame 2 is 1.000 s earlier than frame 1" in words["time-backwards"]
    assert "frame 3 is 99.0 m from frame 2" in words["pose-jump"]


def test_boxes_that_cannot_be_are_warned_of_and_nan_is_an_error(tmp_path):
    base = steady(0).boxes
    assert base is not None
    size, center = base.size.copy(), base.center.copy()
    size[0, 1] = 0.0
    center[1, 0] = np.nan
    center[2, 0] = 9_000.0
    boxes = replace(base, size=size, center=center)
    report = check_prepared(write_made_dataset(tmp_path, {"log-a": [steady(0, boxes=boxes)]}))
    assert kinds(report) == {"not-finite": 1, "box-impossible": 2}
    assert "x 0 x" in next(f.what for f in report.findings if f.kind == "box-impossible")


def test_labels_beyond_the_label_set_empty_frames_and_half_labelled_logs_are_found(tmp_path):
    labels = np.full(40, 40, np.uint8)
    frames = [steady(0, labels=labels), steady(1, labels=None), steady(2, points=0, boxes=Boxes.empty())]
    report = check_prepared(write_made_dataset(tmp_path, {"log-a": frames}))
    assert kinds(report) == {"label-unknown": 1, "frame-empty": 1, "labels-partly": 1}
    assert "label 40, label set nuscenes-32 ends at 31" in next(f.what for f in report.findings if f.kind == "label-unknown")


def test_many_cases_of_one_kind_are_one_finding_that_names_the_first(tmp_path):
    frames = [steady(index, points=0, labels=np.zeros(0, np.uint8), instances=None) for index in range(9)]
    (finding,) = check_prepared(write_made_dataset(tmp_path, {"log-a": frames})).findings
    assert finding.count == 9
    assert finding.what == "frame 0 has no points; frame 1 has no points; frame 2 has no points; ..."


def test_a_log_in_two_splits_is_an_error(tmp_path):
    root = write_made_dataset(tmp_path, {"log-a": [steady(0)]}, splits={"train": ["log-a"]})
    path = root / "dataset.json"
    tree = json.loads(path.read_text())
    tree["splits"]["val"] = ["log-a"]
    path.write_text(json.dumps(tree))
    assert kinds(check_prepared(root)) == {"split-overlap": 1}


def test_a_folder_that_is_no_dataset_is_refused(tmp_path):
    with pytest.raises(DataError, match="no dataset"):
        check_prepared(tmp_path)


def test_raw_nuscenes_is_followed_to_its_files(tmp_path):
    raw = tmp_path / "raw"
    RawWorld(raw).write()
    report = check_raw_nuscenes(raw)
    assert report.sound, report.findings
    assert report.counts["frames"] > 2
    sweeps = sorted((raw / "sweeps" / "LIDAR_TOP").iterdir())
    sweeps[0].unlink()
    keyframe = sorted((raw / "samples" / "LIDAR_TOP").iterdir())[0]
    keyframe.write_bytes(keyframe.read_bytes()[:-3])
    broken = check_raw_nuscenes(raw)
    assert not broken.sound
    assert kinds(broken)["missing"] == 1
    assert keyframe.name in next(f.what for f in broken.findings if f.kind == "damaged")


def test_raw_nuscenes_is_read_and_not_only_looked_for(tmp_path):
    raw = tmp_path / "raw"
    world = RawWorld(raw)
    world.write()
    points = world.sweep_points(0, 1)
    points[3, 2] = np.nan
    points.tofile(raw / "sweeps/LIDAR_TOP/s0-d1.pcd.bin")
    (raw / "sweeps/LIDAR_TOP/s0-d2.pcd.bin").write_bytes(b"")
    np.full(world.points, 40, np.uint8).tofile(raw / "lidarseg/v1.0-mini/s0-d3_lidarseg.bin")
    np.zeros(3, np.uint8).tofile(raw / "lidarseg/v1.0-mini/s1-d0_lidarseg.bin")
    tables = {name: json.loads((raw / f"v1.0-mini/{name}.json").read_text()) for name in ("sample_data", "ego_pose")}
    for row in tables["sample_data"]:
        if row["token"] == "s1-d5":
            row["timestamp"] -= 50_000
    for row in tables["ego_pose"]:
        if row["token"] == "s0-d6-pose":
            row["translation"][0] += 100
    for name, rows in tables.items():
        (raw / f"v1.0-mini/{name}.json").write_text(json.dumps(rows))
    report = check_raw_nuscenes(raw)
    found = {(f.where, f.kind): (f.level, f.what) for f in report.findings}
    assert set(found) == {
        ("scene-0001", "not-finite"), ("scene-0001", "frame-empty"), ("scene-0001", "label-unknown"),
        ("scene-0001", "pose-jump"), ("scene-0002", "damaged"), ("scene-0002", "time-repeated"),
    }  # fmt: skip
    assert "1 points are not finite" in found["scene-0001", "not-finite"][1]
    assert "s1-d0_lidarseg.bin: 3 labels for the 30 points" in found["scene-0002", "damaged"][1]
    assert report.counts == {"logs": 2, "frames": 13, "keyframes": 5, "points": 13 * 30 - 31, "boxes": 5, "labelled": 5}


def test_what_many_logs_have_is_told_once_and_counted(tmp_path):
    logs = {f"log-{i:02d}": [steady(0, f"log-{i:02d}"), steady(0, f"log-{i:02d}")] for i in range(9)}
    for frames in logs.values():
        frames[1] = steady(1, frames[0].log, timestamp_us=frames[0].timestamp_us)
    text, sound = check(write_made_dataset(tmp_path, logs), as_json=False)
    assert sound
    told = [line for line in text.splitlines() if "time-repeated" in line]
    assert [line.split(":")[2].strip() for line in told[:5]] == [f"log-{i:02d}" for i in range(5)]
    assert told[5:] == ["warning: time-repeated: 4 more places, 9 times in all; --json names each"]


def test_the_command_answers_with_its_exit_status_and_draws_a_frame(tmp_path):
    root = write_made_dataset(tmp_path / "data", {"log-a": [steady(0), steady(1)]})
    shell = CliRunner()
    good = shell.invoke(app, ["check", str(root), "--json"])
    assert good.exit_code == 0, good.output
    assert json.loads(good.stdout)["sound"] is True
    told = shell.invoke(app, ["data", "info", str(root), "--json", "--picture", str(tmp_path / "frame.png")])
    info = json.loads(told.stdout)
    assert (info["logs"], info["frames"], info["points"], info["splits"]) == (1, 2, 80, {"train": 1})
    assert (info["classes"]["keyframes"], info["categories"]["keyframes"]) == (2, 2)
    assert sum(info["classes"]["shares"].values()) == pytest.approx(1, abs=0.001)
    boxes = [steady(0).boxes, steady(1).boxes]
    names = [name for found in boxes if found is not None for name in found.category]
    assert info["categories"]["shares"] == pytest.approx({n: names.count(n) / len(names) for n in set(names)}, abs=1e-4)
    assert (tmp_path / "frame.png").read_bytes().startswith(b"\x89PNG")
    (root / "logs" / "log-a.p3d").write_bytes(b"short")
    bad = shell.invoke(app, ["check", str(root)])
    assert bad.exit_code == 1
    assert "damaged" in bad.stdout
