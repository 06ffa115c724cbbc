from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from picture3d.cli import app
from picture3d.datasets.label_sets import SEMANTICKITTI, SEMANTICKITTI_IDS, label_set
from picture3d.datasets.prepared import FrameKey, PreparedDataset
from picture3d.datasets.semantickitti import SPLITS, prepare_semantickitti
from picture3d.errors import DataError
from tests.sample_data import sample_path

# Camera looks along the LiDAR's x: camera x = -lidar y, camera y = -lidar z, camera z = lidar x.
TR = np.array([[0, -1, 0, 0.1], [0, 0, -1, -0.2], [1, 0, 0, -0.3]], float)


def write_sequence(root: Path, name: str = "00", count: int = 3, points: int = 5) -> tuple[Path, list[np.ndarray]]:
    folder = root / "sequences" / name
    for sub in ("velodyne", "labels"):
        (folder / sub).mkdir(parents=True)
    rng = np.random.default_rng(int(name))
    tables = []
    for i in range(count):
        table = rng.uniform(-1, 1, (points, 4)).astype(np.float32)
        table.tofile(folder / "velodyne" / f"{i:06d}.bin")
        ids = np.array(SEMANTICKITTI_IDS, np.uint32)[-points:]
        (ids | (np.uint32(i + 1) << 16)).astype("<u4").tofile(folder / "labels" / f"{i:06d}.label")
        tables.append(table)
    text = [" ".join(map(str, np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 2.0 * i]]).ravel())) for i in range(count)]
    (folder / "poses.txt").write_text("\n".join(text) + "\n")
    (folder / "calib.txt").write_text("P0: 1 0 0 0 0 1 0 0 0 0 1 0\nTr: " + " ".join(map(str, TR.ravel())) + "\n")
    (folder / "times.txt").write_text("\n".join(f"{0.1 * i:e}" for i in range(count)) + "\n")
    return folder, tables


def test_scans_labels_poses_and_times_arrive_in_the_frame(tmp_path):
    _, tables = write_sequence(tmp_path / "raw")
    write_sequence(tmp_path / "raw", "08")
    write_sequence(tmp_path / "raw", "11")
    summary = prepare_semantickitti(tmp_path / "raw", tmp_path / "out")
    assert (summary.logs, summary.frames, summary.labelled, summary.missing_files) == (3, 9, 9, 0)
    dataset = PreparedDataset(tmp_path / "out")
    assert [dataset.logs(split) for split in ("train", "val", "test")] == [("00",), ("08",), ("11",)]
    assert dataset.label_set is SEMANTICKITTI
    frame = dataset.frame(FrameKey("00", 2))
    assert np.array_equal(frame.points.xyz, tables[2][:, :3])
    assert np.array_equal(frame.points.intensity, tables[2][:, 3])
    assert frame.timestamp_us == 200_000
    assert frame.previous == (1, 0)
    assert frame.global_from_lidar is not None
    # The camera moved 4 m along its z, which is the LiDAR's x.
    np.testing.assert_allclose(
        frame.global_from_lidar.matrix, [[1, 0, 0, 4], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], atol=1e-12
    )
    assert frame.labels is not None
    assert frame.instances is not None
    assert [SEMANTICKITTI_IDS[i] for i in frame.labels] == [255, 256, 257, 258, 259]
    assert SEMANTICKITTI.to_train(frame.labels).tolist() == [8, 5, 5, 4, 5]
    assert frame.instances.tolist() == [3] * 5


def test_a_rotated_camera_pose_turns_the_lidar_about_its_own_axis(tmp_path):
    folder, _ = write_sequence(tmp_path / "raw", count=1)
    c, s = np.cos(0.3), np.sin(0.3)
    turn = np.array([[c, 0, s, 1], [0, 1, 0, 2], [-s, 0, c, 3]])  # about camera y, which points down
    (folder / "poses.txt").write_text(" ".join(map(repr, turn.ravel().tolist())))
    prepare_semantickitti(tmp_path / "raw", tmp_path / "out")
    pose = PreparedDataset(tmp_path / "out").frame(FrameKey("00", 0)).global_from_lidar
    assert pose is not None
    full = [np.vstack([m, [0, 0, 0, 1]]) for m in (TR, turn)]
    np.testing.assert_allclose(pose.matrix, np.linalg.inv(full[0]) @ full[1] @ full[0], atol=1e-12)
    assert pose.yaw == pytest.approx(-0.3)


def test_poses_times_and_labels_are_optional(tmp_path):
    folder, _ = write_sequence(tmp_path / "raw" / "dataset", "11")
    for name in ("poses.txt", "times.txt", "calib.txt", "labels/000000.label", "labels/000001.label", "labels/000002.label"):
        (folder / name).unlink()
    (folder / "labels").rmdir()
    summary = prepare_semantickitti(tmp_path / "raw", tmp_path / "out")
    assert (summary.frames, summary.labelled, summary.missing_files) == (3, 0, 0)
    frame = PreparedDataset(tmp_path / "out").frame(FrameKey("11", 1))
    assert frame.global_from_ego is None
    assert frame.timestamp_us == 100_000
    assert frame.previous == ()


def test_a_rerun_makes_only_what_changed(tmp_path):
    write_sequence(tmp_path / "raw")
    folder, _ = write_sequence(tmp_path / "raw", "01")
    assert prepare_semantickitti(tmp_path / "raw", tmp_path / "out").logs_made == 2
    assert prepare_semantickitti(tmp_path / "raw", tmp_path / "out").logs_made == 0
    (folder / "times.txt").write_text("0 0.2 0.3")
    assert prepare_semantickitti(tmp_path / "raw", tmp_path / "out").logs_made == 1


def test_points_that_are_not_finite_go_with_their_labels(tmp_path):
    folder, tables = write_sequence(tmp_path / "raw", count=1)
    tables[0][1, 2], tables[0][3, 3] = np.nan, np.inf
    tables[0].tofile(folder / "velodyne" / "000000.bin")
    assert prepare_semantickitti(tmp_path / "raw", tmp_path / "out").dropped_points == 2
    frame = PreparedDataset(tmp_path / "out").frame(FrameKey("00", 0))
    assert np.array_equal(frame.points.xyz, tables[0][[0, 2, 4], :3])
    assert frame.labels is not None
    assert [SEMANTICKITTI_IDS[i] for i in frame.labels] == [255, 257, 259]


def test_an_empty_scan_is_a_frame(tmp_path):
    write_sequence(tmp_path / "raw", count=1, points=1)
    for path in ("velodyne/000000.bin", "labels/000000.label"):
        (tmp_path / "raw/sequences/00" / path).write_bytes(b"")
    assert prepare_semantickitti(tmp_path / "raw", tmp_path / "out").points == 0


@pytest.mark.parametrize("name", ["velodyne/000001.bin", "labels/000001.label"])
def test_missing_files_are_refused_or_counted(tmp_path, name):
    folder, _ = write_sequence(tmp_path / "raw")
    (folder / name).unlink()
    with pytest.raises(DataError, match=f"1 files.*{name}.*--skip-missing"):
        prepare_semantickitti(tmp_path / "raw", tmp_path / "out")
    summary = prepare_semantickitti(tmp_path / "raw", tmp_path / "out", skip_missing=True)
    assert summary.missing_files == 1
    dataset = PreparedDataset(tmp_path / "out")
    last = dataset.frame(FrameKey("00", summary.frames - 1))
    assert last.token == "000002"
    assert last.global_from_ego is not None
    assert last.global_from_ego.translation[0] == pytest.approx(4)  # its own pose, though a scan before it is absent


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("velodyne/000001.bin", b"\0" * 30, "000001.bin"),
        ("labels/000001.label", b"\0" * 16, "000001.label: 4 labels for the 5 points"),
        ("labels/000001.label", b"\0" * 18, "000001.label: 18 bytes"),
        ("labels/000001.label", b"\x02\0\0\0" * 5, "class 2 of point 0"),
        ("poses.txt", b"1 0 0 0 0 1 0 0 0 0 1 0\n", "poses.txt: 1 lines, but scan 000002.bin needs line 3"),
        ("poses.txt", b"1 0 0 0 0 1 0 0 0 0 1 0\n" * 4, "4 poses in poses.txt, but 3 times"),
        ("poses.txt", b"9 0 0 0 0 1 0 0 0 0 1 0\n" * 3, "poses.txt, line 1"),
        ("times.txt", b"0 0.1 0.1", "times.txt: the time of sweep 2, 100000 us, is the time of the sweep before"),
        ("times.txt", b"0 0.2 0.1", "times.txt: the time of sweep 2, 100000 us, lies before"),
        ("times.txt", b"0 nan 0.1", "times.txt: holds a time"),
        ("times.txt", b"0 soon 0.1", "times.txt: holds something else"),
        ("calib.txt", b"P0: 1 0 0 0 0 1 0 0 0 0 1 0\n", "calib.txt: has no line 'Tr:'"),
        ("calib.txt", b"Tr: 1 0 0\n", "calib.txt, line 1"),
        ("velodyne/first.bin", b"", "first.bin: scans are called by their number"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, match):
    folder, _ = write_sequence(tmp_path / "raw")
    (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=match):
        prepare_semantickitti(tmp_path / "raw", tmp_path / "out")
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_a_folder_without_sequences_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds neither"):
        prepare_semantickitti(tmp_path, tmp_path / "out")


def test_the_command_tells_what_was_prepared(tmp_path):
    write_sequence(tmp_path / "raw")
    result = CliRunner().invoke(app, ["prepare", "semantickitti", str(tmp_path / "raw"), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "3 sweeps, 3 keyframes, 3 of them labelled" in " ".join(result.output.split())


def test_every_official_sequence_is_in_one_split():
    assert sorted(sum(SPLITS.values(), ())) == [f"{i:02d}" for i in range(22)]


def test_moving_classes_are_folded_into_the_classes_of_things_at_rest():
    names, train = SEMANTICKITTI.class_names, SEMANTICKITTI.train_names
    assert (len(names), SEMANTICKITTI.num_classes) == (34, 20)
    assert label_set("semantickitti") is SEMANTICKITTI
    for name in names:
        if name.startswith("moving-"):
            still = names.index(name.removeprefix("moving-"))
            assert SEMANTICKITTI.train_ids[names.index(name)] == SEMANTICKITTI.train_ids[still]
    same = [name for name in names if name in train]
    assert len(same) == 19
    assert all(train[SEMANTICKITTI.train_ids[names.index(name)]] == name for name in same)
    assert train[SEMANTICKITTI.train_ids[names.index("bus")]] == "other-vehicle"
    assert train[SEMANTICKITTI.train_ids[names.index("lane-marking")]] == "road"


def test_the_real_scans_hold_the_points_and_classes_that_were_counted(tmp_path):
    raw = sample_path("semantickitti")
    summary = prepare_semantickitti(raw, tmp_path / "out")
    assert (summary.frames, summary.labelled, summary.points) == (3, 3, 124231 + 124087 + 123861)
    dataset = PreparedDataset(tmp_path / "out")
    assert dataset.logs("train") == ("04",)
    frame = dataset.frame(FrameKey("04", 0))
    assert frame.labels is not None
    found = {SEMANTICKITTI_IDS[i] for i in np.unique(frame.labels)}
    assert found == {0, 1, 10, 13, 30, 40, 44, 48, 49, 50, 51, 70, 71, 72, 80, 81, 99, 252, 254}
    raw_labels = np.fromfile(raw / "sequences/04/labels/000000.label", "<u4")
    assert np.array_equal(np.array(SEMANTICKITTI_IDS)[frame.labels], raw_labels & 0xFFFF)
    assert np.array_equal(frame.instances, raw_labels >> 16)  # type: ignore[arg-type]
    road = frame.points.xyz[SEMANTICKITTI.to_train(frame.labels) == 9]
    assert -2.2 < np.median(road[:, 2]) < -1.4  # the scanner stands 1.73 m above the road


# Which raw ids the single-scan benchmark joins: `learning_map` of config/semantic-kitti.yaml in semantic-kitti-api.
OFFICIAL_CLASSES = {
    0: (0, 1, 52, 99), 1: (10, 252), 2: (11,), 3: (15,), 4: (18, 258), 5: (13, 16, 20, 256, 257, 259), 6: (30, 254),
    7: (31, 253), 8: (32, 255), 9: (40, 60), 10: (44,), 11: (48,), 12: (49,), 13: (50,), 14: (51,), 15: (70,), 16: (71,),
    17: (72,), 18: (80,), 19: (81,),
}  # fmt: skip


def test_the_classes_are_those_of_the_official_configuration():
    joined = {raw: train for train, raws in OFFICIAL_CLASSES.items() for raw in raws}
    assert sorted(joined) == list(SEMANTICKITTI_IDS)
    compact = np.arange(len(SEMANTICKITTI_IDS), dtype=np.uint8)
    assert dict(zip(SEMANTICKITTI_IDS, SEMANTICKITTI.to_train(compact).tolist(), strict=True)) == joined
    assert SEMANTICKITTI.train_names[5] == "other-vehicle"
    assert SEMANTICKITTI.train_names[19] == "traffic-sign"
