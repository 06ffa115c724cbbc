from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from picture3d.cli import app
from picture3d.datasets.nuscenes import nuscenes_frames, prepare_nuscenes
from picture3d.datasets.point_files import prepare_points
from picture3d.datasets.prepared import PreparedDataset
from picture3d.datasets.projection import (
    FULL_SIZES,
    Measured,
    kind_of_raw,
    measure_prepared,
    measure_raw,
    project,
)
from picture3d.datasets.waymo import prepare_waymo
from picture3d.errors import DataError
from picture3d.formats.columns import Codec, CodecKind
from picture3d.formats.nuscenes_tables import read_tables
from picture3d.synthetic.nuscenes_writer import write_nuscenes
from tests.datasets.test_waymo import small_segment, write_segment
from tests.datasets.test_waymo_v2 import small_rows, write_small


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    raw = tmp_path_factory.mktemp("nuscenes") / "raw"
    write_nuscenes(raw, scenes=2, keyframes_per_scene=2, sweeps_per_keyframe=2, val_scenes=1, seed=3)
    return raw


def test_a_sample_of_known_cost_is_projected_by_hand():
    sample = Measured("waymo", 10, 10, 1000, 20_000_000, 2.0, 0.5, peak_bytes=400)
    training, validation = project(sample)
    assert (training.full.keyframes, validation.full.keyframes) == (158_081, 39_987)
    assert training.hours == pytest.approx(158_081 * 0.2 / 3600)
    assert training.bytes == 158_081 * 2_000_000
    assert training.epoch_hours == pytest.approx(158_081 * 0.05 / 3600)
    assert training.peak_bytes == 400  # memory does not grow with the frames
    assert training.memory(3) == 1200


def test_sweeps_count_with_their_keyframe_and_tables_with_the_scenes():
    # A log of 5 keyframes, 3 sweeps before each but the first; tables of 85 of the 850 scenes took 3 s and 100 bytes.
    sample = Measured("nuscenes", 17, 5, 99, 500, 10.0, 1.0, 3.0, 85, 100, 1000)
    frames = 700 + (28_130 - 700) * 4
    assert sample.frames_of(FULL_SIZES[2]) == frames
    train, val = project(sample)
    assert (train.full.keyframes, val.full.keyframes) == (28_130, 6_019)
    assert train.hours == pytest.approx((frames * 10 / 17 + 30.0) / 3600)
    assert train.bytes == pytest.approx(frames * 500 / 17, abs=1)
    assert train.peak_bytes == 1000 + 900
    # 1000 bytes of tables are held once, 900 by each process that makes logs.
    assert (train.memory(1), train.memory(4)) == (1900, 1000 + 4 * 900)
    whole = project(Measured("nuscenes", 17, 5, 99, 500, 10.0, 1.0, 3.0, 1000, 100, 1000))
    assert whole[0].peak_bytes == 1000  # never less than what was measured


def test_keyframes_without_sweeps_before_them_are_the_frames():
    train = FULL_SIZES[2]
    assert Measured("nuscenes", 6, 6, 1, 1, 1.0, 1.0, logs=2).frames_of(train) == train.keyframes
    assert Measured("nuscenes", 20, 2, 1, 1, 1.0, 1.0, logs=2).frames_of(train) == 10 * train.keyframes


def test_published_sizes_add_up():
    sizes = {(full.dataset, full.split): full for full in FULL_SIZES}
    train, val = sizes["nuscenes", "train"], sizes["nuscenes", "val"]
    assert (train.keyframes + val.keyframes, train.logs + val.logs) == (34_149, 850)
    assert sum(full.logs for full in FULL_SIZES if full.dataset == "waymo") == 1_000


@pytest.mark.parametrize("kind", ["waymo", "waymo-v2"])
def test_first_frames_of_raw_waymo_are_prepared_and_measured(tmp_path, kind):
    if kind == "waymo":
        write_segment(tmp_path / "raw", "a", small_segment("a", 3))
        write_segment(tmp_path / "raw", "b", small_segment("b", 3), "validation")
        size = sum(path.stat().st_size for path in (_prepared(tmp_path) / "logs").iterdir())
    else:
        write_small(tmp_path / "raw", small_rows(6))
        size = None
    assert kind_of_raw(tmp_path / "raw") == kind
    found = measure_raw(tmp_path / "raw", 100)
    assert (found.kind, found.frames, found.keyframes, found.table_seconds) == (kind, 6, 6, 0)
    assert found.points > 100
    assert found.frame_seconds is not None
    assert found.read_seconds > 0
    if size is not None:  # headers, which name settings and splits, differ by some bytes
        assert found.bytes == pytest.approx(size, rel=0.1)
    few = measure_raw(tmp_path / "raw", 2, xyz_codec=Codec(CodecKind.GRID, 0.01))
    assert few.frames == 2
    assert few.bytes < found.bytes
    assert few.peak_bytes is None or few.peak_bytes > 10_000_000


def _prepared(tmp_path: Path) -> Path:
    prepare_waymo(tmp_path / "raw", tmp_path / "out")
    return tmp_path / "out"


def test_frames_of_nuscenes_are_those_that_are_prepared(scenes, tmp_path):
    prepare_nuscenes(scenes, tmp_path / "out", sweeps=2)
    dataset = PreparedDataset(tmp_path / "out")
    expected = [(log, dataset.summary(log).frames, dataset.summary(log).points) for log in dataset.logs()]
    frames = [frame for frame, _ in nuscenes_frames(scenes, read_tables(scenes, "v1.0-mini"), "v1.0-mini", sweeps=2)]
    for log, count, points in expected:
        own = [frame for frame in frames if frame.log == log]
        assert (len(own), sum(len(frame.points) for frame in own)) == (count, points)
        assert [frame.index for frame in own] == list(range(count))


def test_a_sample_of_nuscenes_ends_at_a_keyframe_and_tells_of_its_tables(scenes):
    found = measure_raw(scenes, 2, sweeps=2)
    assert (found.kind, found.table_scenes) == ("nuscenes", 2)
    assert found.keyframes == 2
    assert found.table_seconds > 0
    assert measure_raw(scenes, 99, sweeps=0).frames == 4


def test_prepared_frames_tell_bytes_and_reading_time_but_not_the_time_to_prepare(tmp_path):
    write_segment(tmp_path / "raw", "a", small_segment("a", 4))
    out = _prepared(tmp_path)
    found = measure_prepared(out, 2)
    assert (found.frames, found.keyframes, found.frame_seconds, found.peak_bytes) == (4, 4, None, None)
    assert found.bytes == sum(path.stat().st_size for path in (out / "logs").iterdir())
    training = project(found)[0]
    assert training.hours is None
    assert training.bytes == pytest.approx(found.bytes / 4 * 158_081, abs=1)
    assert training.epoch_hours > 0


def test_folders_of_unknown_size_are_refused(tmp_path):
    with pytest.raises(DataError, match="neither raw Waymo nor raw nuScenes"):
        measure_raw(tmp_path, 3)
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "0.bin").write_bytes(bytes(32))
    prepare_points(tmp_path / "sweeps", tmp_path / "out")
    with pytest.raises(DataError, match="neither from Waymo nor from nuScenes"):
        measure_prepared(tmp_path / "out", 3)


def test_the_command_prints_a_table_or_json(tmp_path):
    write_segment(tmp_path / "raw", "a", small_segment("a", 3))
    done = CliRunner().invoke(app, ["data", "projection", str(tmp_path / "raw"), "--frames", "2", "--processes", "4"])
    assert done.exit_code == 0, done.output
    assert "2 frames of waymo (2 keyframes)" in done.output
    assert "hours, 4 at once" in done.output
    assert "158,081" in done.output
    tree = json.loads(CliRunner().invoke(app, ["data", "projection", str(_prepared(tmp_path)), "--json"]).output)
    assert tree["measured"]["frames"] == 3
    assert [entry["full"]["split"] for entry in tree["projections"]] == ["training", "validation"]
    assert tree["projections"][0]["hours"] is None
    assert tree["circumstances"]["cores"] >= 1
