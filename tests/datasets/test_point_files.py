from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from picture3d.datasets.point_files import prepare_points
from picture3d.datasets.prepared import FrameKey, PreparedDataset
from picture3d.datasets.sweep_files import read_labels, read_poses
from picture3d.errors import DataError
from picture3d.structures.points import IntensityUnit

LAYOUT = "x,y,z,intensity,ring"


def rows(seed: int, count: int = 20) -> np.ndarray:
    rng = np.random.default_rng(seed)
    table = rng.uniform(-30, 30, (count, 5)).astype(np.float32)
    table[:, 3], table[:, 4] = rng.random(count), rng.integers(0, 64, count)
    return table


def write_sweeps(folder: Path, count: int = 4, first: int = 0) -> list[np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    tables = [rows(first + i) for i in range(count)]
    for i, table in enumerate(tables):
        table.tofile(folder / f"sweep{i + 8}.bin")  # sweep8, sweep9, sweep10: not in the order of letters
    return tables


def write_poses(path: Path, count: int) -> list[np.ndarray]:
    matrices = []
    for i in range(count):
        c, s = np.cos(0.1 * i), np.sin(0.1 * i)
        matrices.append(np.array([[c, -s, 0, i], [s, c, 0, 2], [0, 0, 1, 0.5]]))
    path.write_text("\n".join(" ".join(f"{v:.6e}" for v in m.ravel()) for m in matrices) + "\n")
    return matrices


def test_sweeps_come_in_the_order_of_their_numbers(tmp_path):
    tables = write_sweeps(tmp_path / "drive")
    summary = prepare_points(tmp_path / "drive", tmp_path / "out", layout=LAYOUT, intensity_unit="0-1", name="mine")
    assert (summary.logs, summary.frames, summary.keyframes, summary.labelled) == (1, 4, 4, 0)
    dataset = PreparedDataset(tmp_path / "out")
    assert dataset.name == "mine"
    assert dataset.label_set is None
    for index, table in enumerate(tables):
        frame = dataset.frame(FrameKey("drive", index))
        assert frame.token == f"sweep{index + 8}.bin"
        assert frame.timestamp_us == index * 100_000
        assert np.array_equal(frame.points.xyz, table[:, :3])
        assert np.array_equal(frame.points.intensity, table[:, 3])
        assert frame.points.intensity_unit is IntensityUnit.UNIT
        assert frame.points.ring is not None
        assert np.array_equal(frame.points.ring, table[:, 4].astype(np.int16))
        assert frame.global_from_ego is None
        assert frame.previous == ()


def test_sub_folders_are_logs_and_the_last_are_held_out(tmp_path):
    for i, name in enumerate(["drive2", "drive10", "drive1"]):
        write_sweeps(tmp_path / "raw" / name, 2, first=10 * i)
        write_poses(tmp_path / f"{name}.txt", 2)
    (tmp_path / "raw" / "empty").mkdir()
    prepare_points(tmp_path / "raw", tmp_path / "out", layout=LAYOUT, poses=tmp_path, val=1)
    dataset = PreparedDataset(tmp_path / "out")
    assert dataset.logs("train") == ("drive1", "drive2")
    assert dataset.logs("val") == ("drive10",)
    assert dataset.frame(FrameKey("drive10", 1)).previous == (0,)


@pytest.mark.parametrize("val", [2, ["sweep10", "sweep11"]])
def test_the_last_sweeps_of_a_single_log_are_held_out(tmp_path, val):
    tables = write_sweeps(tmp_path / "drive")
    write_poses(tmp_path / "poses.txt", 4)
    prepare_points(tmp_path / "drive", tmp_path / "out", layout=LAYOUT, poses=tmp_path / "poses.txt", val=val)
    dataset = PreparedDataset(tmp_path / "out")
    assert dataset.logs("train") == ("drive",)
    assert dataset.logs("val") == ("drive-val",)
    held_out = dataset.frame(FrameKey("drive-val", 0))
    assert np.array_equal(held_out.points.xyz, tables[2][:, :3])
    assert held_out.previous == ()
    assert held_out.global_from_ego is not None
    np.testing.assert_allclose(held_out.global_from_ego.translation, [2, 2, 0.5])


@pytest.mark.parametrize("val", [4, ["sweep99"], ["sweep8", "sweep9", "sweep10", "sweep11"]])
def test_a_validation_split_that_does_not_fit_is_refused(tmp_path, val):
    write_sweeps(tmp_path / "drive")
    with pytest.raises(DataError, match="validation split"):
        prepare_points(tmp_path / "drive", tmp_path / "out", layout=LAYOUT, val=val)


def test_poses_are_global_from_lidar_and_link_the_sweeps(tmp_path):
    write_sweeps(tmp_path / "drive")
    matrices = write_poses(tmp_path / "poses.txt", 4)
    prepare_points(tmp_path / "drive", tmp_path / "out", layout=LAYOUT, poses=tmp_path / "poses.txt", sweeps=2)
    for index, matrix in enumerate(matrices):
        frame = PreparedDataset(tmp_path / "out").frame(FrameKey("drive", index))
        assert frame.global_from_lidar is not None
        np.testing.assert_allclose(frame.global_from_lidar.matrix[:3], matrix, atol=1e-6)
        rotation = frame.global_from_lidar.rotation
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
        assert frame.previous == tuple(range(index - 1, max(-1, index - 3), -1))


@pytest.mark.parametrize(
    "line", ["1 2 3", "a b c d e f g h i j k l", " ".join(["1"] * 12), "nan " * 12, "-1 0 0 0 0 1 0 0 0 0 1 0"]
)
def test_a_line_that_is_no_pose_is_named(tmp_path, line):
    (tmp_path / "poses.txt").write_text(f"1 0 0 0 0 1 0 0 0 0 1 0\n\n{line}\n")
    with pytest.raises(DataError, match=r"poses\.txt, line 3"):
        read_poses(tmp_path / "poses.txt")


def test_a_pose_for_every_sweep_is_needed(tmp_path):
    write_sweeps(tmp_path / "drive")
    write_poses(tmp_path / "poses.txt", 3)
    with pytest.raises(DataError, match="3 poses for the 4 sweeps"):
        prepare_points(tmp_path / "drive", tmp_path / "out", layout=LAYOUT, poses=tmp_path / "poses.txt")


def write_label(path: Path, labels: np.ndarray) -> None:
    match path.suffix:
        case ".npy":
            np.save(path, labels.astype(np.int64))
        case ".label":
            (labels.astype("<u4") | (labels.astype("<u4") + 500) << 16).tofile(path)
        case ".bin":
            labels.astype(np.uint8).tofile(path)
        case _:
            path.write_text("\n".join(str(int(v)) for v in labels))


@pytest.mark.parametrize("suffix", [".npy", ".label", ".bin", ".txt"])
def test_labels_of_every_kind_are_read(tmp_path, suffix):
    write_sweeps(tmp_path / "drive")
    (tmp_path / "labels").mkdir()
    labels = np.random.default_rng(0).integers(0, 256, (3, 20))
    for i in range(3):  # the last sweep has none
        write_label(tmp_path / "labels" / f"sweep{i + 8}{suffix}", labels[i])
    summary = prepare_points(
        tmp_path / "drive", tmp_path / "out", layout=LAYOUT, label_dir=tmp_path / "labels", label_set="nuscenes-16"
    )
    assert summary.labelled == 3
    dataset = PreparedDataset(tmp_path / "out")
    assert dataset.label_set is not None
    assert dataset.label_set.name == "nuscenes-16"
    for i in range(3):
        frame = dataset.frame(FrameKey("drive", i))
        assert frame.labels is not None
        assert np.array_equal(frame.labels, labels[i])
        assert (frame.instances is not None) == (suffix == ".label")
        if frame.instances is not None:
            assert np.array_equal(frame.instances, labels[i] + 500)
    assert dataset.frame(FrameKey("drive", 3)).labels is None


@pytest.mark.parametrize("labels", [[0, 256], [-1, 0], [0.5, 1], [np.nan, 1]])
def test_labels_that_are_no_bytes_are_refused(tmp_path, labels):
    np.save(tmp_path / "a.npy", np.array(labels))
    with pytest.raises(DataError, match=r"a\.npy: label .* map the labels first"):
        read_labels(tmp_path / "a.npy")


def test_labels_that_do_not_fit_are_named(tmp_path):
    write_sweeps(tmp_path / "drive")
    (tmp_path / "labels").mkdir()
    np.save(tmp_path / "labels" / "sweep9.npy", np.zeros(19, int))
    with pytest.raises(DataError, match=r"sweep9\.npy: 19 labels for the 20 points of sweep9\.bin"):
        prepare_points(tmp_path / "drive", tmp_path / "out", layout=LAYOUT, label_dir=tmp_path / "labels")


def test_a_folder_of_labels_that_match_nothing_is_an_error(tmp_path):
    write_sweeps(tmp_path / "drive")
    (tmp_path / "labels").mkdir()
    with pytest.raises(DataError, match=r"no label file has the name of a sweep\. Rename them, for example to sweep8\.npy"):
        prepare_points(tmp_path / "drive", tmp_path / "out", layout=LAYOUT, label_dir=tmp_path / "labels")


def test_points_that_are_not_finite_are_dropped_with_their_labels(tmp_path):
    table = rows(0)
    table[[3, 7, 11], [0, 2, 3]] = [np.nan, -np.inf, np.nan]
    (tmp_path / "drive").mkdir()
    table.tofile(tmp_path / "drive" / "a.bin")
    (tmp_path / "labels").mkdir()
    write_label(tmp_path / "labels" / "a.label", np.arange(20))
    summary = prepare_points(tmp_path / "drive", tmp_path / "out", layout=LAYOUT, label_dir=tmp_path / "labels")
    assert summary.dropped_points == 3
    frame = PreparedDataset(tmp_path / "out").frame(FrameKey("drive", 0))
    kept = np.setdiff1d(np.arange(20), [3, 7, 11])
    assert frame.labels is not None
    assert frame.instances is not None
    assert frame.labels.tolist() == kept.tolist()
    assert frame.instances.tolist() == (kept + 500).tolist()
    assert np.array_equal(frame.points.xyz, table[kept, :3])


def test_an_empty_sweep_is_a_frame(tmp_path):
    write_sweeps(tmp_path / "drive", 1)
    (tmp_path / "drive" / "sweep9.bin").write_bytes(b"")
    prepare_points(tmp_path / "drive", tmp_path / "out", layout=LAYOUT)
    assert len(PreparedDataset(tmp_path / "out").frame(FrameKey("drive", 1)).points) == 0


def test_files_of_different_kinds_form_one_log(tmp_path):
    folder = tmp_path / "drive"
    folder.mkdir()
    table = rows(0, 3)
    table.tofile(folder / "a.bin")
    np.save(folder / "b.npy", table.astype(np.float64))
    text = "\n".join(" ".join(repr(float(v)) for v in row) for row in table)
    head = "VERSION 0.7\nFIELDS x y z intensity ring\nSIZE 4 4 4 4 2\nTYPE F F F F U\nWIDTH 3\nHEIGHT 1\nPOINTS 3\n"
    (folder / "c.pcd").write_text(f"{head}DATA ascii\n{text}\n")
    names = "".join(f"property float {name}\n" for name in ("x", "y", "z", "reflectivity", "laser_id"))
    (folder / "d.ply").write_text(f"ply\nformat ascii 1.0\nelement vertex 3\n{names}end_header\n{text}\n")
    (folder / ".hidden.bin").write_bytes(b"x")
    (folder / "notes.txt").write_text("not a sweep")
    prepare_points(folder, tmp_path / "out", layout=LAYOUT)
    dataset = PreparedDataset(tmp_path / "out")
    frames = [dataset.frame(key) for key in dataset.keyframes()]
    assert [frame.token for frame in frames] == ["a.bin", "b.npy", "c.pcd", "d.ply"]
    for frame in frames:
        np.testing.assert_array_equal(frame.points.xyz, table[:, :3])
        np.testing.assert_array_equal(frame.points.intensity, table[:, 3])
        assert frame.points.ring is not None
        np.testing.assert_array_equal(frame.points.ring, table[:, 4])


def test_without_an_intensity_column_it_is_zero_in_a_known_unit(tmp_path):
    (tmp_path / "drive").mkdir()
    rows(0)[:, :3].tofile(tmp_path / "drive" / "a.bin")
    prepare_points(tmp_path / "drive", tmp_path / "out", layout="x,y,z")
    points = PreparedDataset(tmp_path / "out").frame(FrameKey("drive", 0)).points
    assert points.intensity_unit is IntensityUnit.UNIT
    assert not points.intensity.any()


def test_a_rerun_makes_only_what_changed(tmp_path):
    for name in ("a", "b"):
        write_sweeps(tmp_path / "raw" / name)
    prepare_points(tmp_path / "raw", tmp_path / "out", layout=LAYOUT)
    assert prepare_points(tmp_path / "raw", tmp_path / "out", layout=LAYOUT).logs_made == 0
    rows(9, 21).tofile(tmp_path / "raw" / "b" / "sweep8.bin")
    assert prepare_points(tmp_path / "raw", tmp_path / "out", layout=LAYOUT).logs_made == 1
    assert prepare_points(tmp_path / "raw", tmp_path / "out", layout="x,y,z,intensity,-").logs_made == 2


@pytest.mark.parametrize("content", [None, [], ["notes.txt"]])
def test_a_folder_without_sweeps_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "drive").mkdir()
        for name in content:
            (tmp_path / "drive" / name).write_text("")
    with pytest.raises(DataError, match="drive"):
        prepare_points(tmp_path / "drive", tmp_path / "out")


def test_an_unknown_unit_or_label_set_is_refused(tmp_path):
    write_sweeps(tmp_path / "drive")
    with pytest.raises(DataError, match="intensity unit 'percent'"):
        prepare_points(tmp_path / "drive", tmp_path / "out", layout=LAYOUT, intensity_unit="percent")
    with pytest.raises(DataError, match="without a folder of labels"):
        prepare_points(tmp_path / "drive", tmp_path / "out", layout=LAYOUT, label_set="nuscenes-16")
