"""Raw Waymo tfrecords are looked at before they are prepared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from picture3d.cli import app
from picture3d.datasets.check import CheckReport
from picture3d.datasets.check_waymo import check_raw_waymo
from picture3d.datasets.waymo_v2 import waymo_version
from picture3d.formats.tfrecord import RecordWriter, read_records
from tests.made_waymo import Made, calibration, echo, floats, image_of, label, laser, small_frame


def segment(root: Path, name: str, frames: list[Made], folder: str = "training") -> Path:
    path = root / folder / f"segment-{name}.tfrecord"
    path.parent.mkdir(parents=True, exist_ok=True)
    with RecordWriter(path) as writer:
        for index, frame in enumerate(frames):
            frame.timestamp_us = 1 + 100_000 * index
            writer.write(frame.bytes())
    return path


def frames(count: int = 3) -> list[Made]:
    return [small_frame(np.random.default_rng(index), lasers=[front(index)]) for index in range(count)]


def front(seed: int) -> bytes:
    return laser(2, echo(floats(image_of(np.random.default_rng(seed), 3, 5, 1.0))))


def kinds(report: CheckReport) -> dict[str, int]:
    return {finding.kind: finding.count for finding in report.findings}


def test_sound_segments_are_counted(tmp_path):
    segment(tmp_path, "a", frames())
    segment(tmp_path, "b", frames(2), "testing")
    calls: list[tuple[int, int]] = []
    report = check_raw_waymo(tmp_path, progress=lambda done, total: calls.append((done, total)))
    assert report.findings == ()
    assert report.counts == {"logs": 2, "frames": 5, "keyframes": 5, "points": 75, "boxes": 10, "labelled": 0}
    assert report.categories == {"vehicle": 5, "pedestrian": 5}
    assert calls == [(1, 2), (2, 2)]


def test_damage_is_named_with_its_byte_and_the_rest_is_looked_at(tmp_path):
    made = frames()
    made[0].lasers = [laser(2, echo(floats(np.ones((3, 5, 4)), (3, 6, 4))))]
    made[1].calibrations = [calibration(2, np.zeros((4, 4)))]
    segment(tmp_path, "a", made)
    path = segment(tmp_path, "b", frames())
    offset = [offset for offset, _ in read_records(path)][1]
    data = bytearray(path.read_bytes())
    data[offset + 50] ^= 1
    path.write_bytes(data)
    report = check_raw_waymo(tmp_path)
    first, second = report.findings
    assert (first.kind, first.where, first.count) == ("damaged", "a", 2)
    assert "record 0 at byte 0, LiDAR FRONT, return 1, range image" in first.what
    assert "the extrinsic of LiDAR 2" in first.what
    assert f"record at byte {offset} do not match their checksum" in second.what
    assert report.counts["frames"] == 2
    assert not report.sound


def test_jumps_strange_boxes_empty_frames_and_lost_points_are_found(tmp_path):
    made = frames(4)
    far = np.eye(4)
    far[0, 3] = 500
    made[1].pose = far
    made[2].labels = [label(box=(1, 1, 1, 0, 4, 2, 0))]
    made[3].lasers = []
    image = np.ones((3, 5, 4), np.float32)
    image[0, 0, 0] = np.inf
    made[0].lasers = [laser(2, echo(floats(image)))]
    segment(tmp_path, "a", made)
    report = check_raw_waymo(tmp_path)
    assert kinds(report) == {"not-finite": 1, "pose-jump": 2, "box-impossible": 1, "frame-empty": 1}
    assert report.sound


@pytest.mark.parametrize("name", ["training", "validation"])
def test_a_segment_in_two_splits_is_an_error(tmp_path, name):
    segment(tmp_path, "a", frames(1), name)
    segment(tmp_path, "a", frames(1), "testing")
    assert kinds(check_raw_waymo(tmp_path)) == {"split-overlap": 1}


def test_the_command_knows_waymo_by_its_folders(tmp_path):
    assert waymo_version(tmp_path) is None
    path = segment(tmp_path, "a", frames(1))
    assert waymo_version(tmp_path) == 1
    assert CliRunner().invoke(app, ["check", str(tmp_path)]).exit_code == 0
    path.write_bytes(path.read_bytes()[:-1])
    bad = CliRunner().invoke(app, ["check", str(tmp_path)])
    assert bad.exit_code == 1
    assert "cut off: the record at byte 0" in bad.stdout
