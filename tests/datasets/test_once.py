from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors
from typer.testing import CliRunner

from picture3d.cli import app
from picture3d.datasets.detection_classes import ONCE_DETECTION
from picture3d.datasets.object_database import ObjectDatabase
from picture3d.datasets.once import EGO_FROM_LIDAR, once_sequences, prepare_once, read_once_sequence
from picture3d.datasets.prepared import FrameKey, PreparedDataset
from picture3d.errors import DataError
from picture3d.structures.poses import Pose
from tests.sample_data import sample_path

FIRST_MS = 1616343527200


def box_points(box: list[float], count: int, rng: np.random.Generator) -> np.ndarray:
    """Points in the inner part of a box, placed by hand: along the heading, across it, upwards."""
    x, y, z, length, width, height, yaw = box
    along, across, up = (rng.uniform(-0.45, 0.45, count) * side for side in (length, width, height))
    return np.stack([x + along * np.cos(yaw) - across * np.sin(yaw), y + along * np.sin(yaw) + across * np.cos(yaw), z + up], 1)


BOXES = [[10.0, -20.0, -0.8, 4.5, 1.8, 1.6, 0.4], [-6.0, 8.0, -0.9, 0.6, 0.7, 1.7, -2.0]]


def write_sequence(root: Path, name: str = "000076", count: int = 3, split: str | None = "train") -> dict[str, Any]:
    """A sequence that turns left by 0.1 rad per sweep, every sweep annotated but the last; returns the tree of its file."""
    folder = root / "data" / name / "lidar_roof"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(int(name))
    frames = []
    for i in range(count):
        frame_id = str(FIRST_MS + 500 * i)
        inside = np.concatenate([box_points(BOXES[0], 40, rng), box_points(BOXES[1], 7, rng)])
        xyz = np.concatenate([inside, rng.uniform(30, 60, (20, 3))])
        table = np.concatenate([xyz, rng.integers(0, 256, (len(xyz), 1))], axis=1).astype("<f4")
        table.tofile(folder / f"{frame_id}.bin")
        w, x, y, z = Pose.from_yaw(0.1 * i).quaternion_wxyz.tolist()
        frame: dict[str, Any] = {"frame_id": frame_id, "timestamp": frame_id, "pose": [x, y, z, w, 1.0 * i, -2.0 * i, 0.5]}
        if i + 1 < count:
            frame["annos"] = {
                "names": ["Truck", "Pedestrian"],
                "boxes_3d": BOXES,
                "boxes_2d": {"cam01": [[-1, -1, -1, -1]] * 2},
            }
        frames.append(frame)
    tree = {"meta_info": {"weather": "sunny"}, "calib": {"cam01": {}}, "frames": frames}
    save(root, tree, name)
    if split is not None:
        (root / "ImageSets").mkdir(exist_ok=True)
        with (root / "ImageSets" / f"{split}.txt").open("a") as file:
            file.write(name + "\n")
    return tree


def save(root: Path, tree: dict[str, Any], name: str = "000076") -> None:
    (root / "data" / name / f"{name}.json").write_text(json.dumps(tree))


def test_points_poses_boxes_and_splits_arrive_in_the_frame(tmp_path):
    for name, split in (("000076", "train"), ("000080", "val"), ("000200", "test"), ("000300", "raw_small")):
        write_sequence(tmp_path / "raw", name, split=split)
    (tmp_path / "raw" / "ImageSets" / "raw_large.txt").write_text("000300\n000999\n")
    summary = prepare_once(tmp_path / "raw", tmp_path / "out")
    assert (summary.logs, summary.frames, summary.missing_files) == (4, 12, 0)
    dataset = PreparedDataset(tmp_path / "out")
    splits = {split: dataset.logs(split) for split in ("train", "val", "test", "raw_small")}
    assert splits == {"train": ("000076",), "val": ("000080",), "test": ("000200",), "raw_small": ("000300",)}
    frame = dataset.frame(FrameKey("000076", 1))
    table = np.fromfile(tmp_path / "raw/data/000076/lidar_roof" / f"{FIRST_MS + 500}.bin", "<f4").reshape(-1, 4)
    assert np.array_equal(frame.points.xyz, table[:, :3])
    assert np.array_equal(frame.points.intensity, table[:, 3])
    assert frame.points.intensity_unit == "0-255"
    assert (frame.token, frame.timestamp_us, frame.previous) == (str(FIRST_MS + 500), (FIRST_MS + 500) * 1000, (0,))
    assert frame.global_from_lidar is not None
    expected = Pose.from_yaw(0.1, [1.0, -2.0, 0.5]).matrix
    np.testing.assert_allclose(frame.global_from_lidar.matrix, expected, atol=1e-12)
    assert frame.boxes is not None
    assert frame.boxes.category == ("Truck", "Pedestrian")
    np.testing.assert_array_equal(frame.boxes.size, np.array(BOXES)[:, 3:6])
    assert np.isnan(frame.boxes.velocity).all()
    assert dataset.frame(FrameKey("000076", 2)).boxes is None
    assert dataset.frame(FrameKey("000076", 2)).previous == (1, 0)


def test_points_put_into_boxes_by_hand_are_counted_in_them(tmp_path):
    write_sequence(tmp_path / "raw")
    prepare_once(tmp_path / "raw", tmp_path / "out")
    boxes = PreparedDataset(tmp_path / "out").frame(FrameKey("000076", 0)).boxes
    assert boxes is not None
    assert boxes.num_points.tolist() == [40, 7]


def test_the_car_looks_against_y_of_the_lidar_and_x_is_to_its_left():
    ahead, left = EGO_FROM_LIDAR.apply(np.array([[0.0, -10.0, 1.0], [5.0, 0.0, 1.0]]))
    assert ahead.tolist() == [10.0, 0.0, 1.0]
    assert left.tolist() == [0.0, 5.0, 1.0]
    assert np.linalg.det(EGO_FROM_LIDAR.rotation) == 1.0


def test_the_lists_of_the_benchmark_are_merged_into_three_classes():
    names = ["Car", "Truck", "Bus", "Pedestrian", "Cyclist", "Tricycle"]
    assert ONCE_DETECTION.names == ("Vehicle", "Pedestrian", "Cyclist")
    assert ONCE_DETECTION.of(names).tolist() == [1, 1, 1, 2, 3, 0]


@pytest.mark.parametrize("pose", [None, [], [0, 0, 0, 0, 0, 0, 0]])
def test_a_frame_without_a_pose_is_linked_to_nothing(tmp_path, pose):
    tree = write_sequence(tmp_path / "raw")
    tree["frames"][1]["pose"] = pose
    save(tmp_path / "raw", tree)
    prepare_once(tmp_path / "raw", tmp_path / "out")
    dataset = PreparedDataset(tmp_path / "out")
    assert [dataset.frame(FrameKey("000076", i)).previous for i in range(3)] == [(), (), (0,)]
    assert dataset.frame(FrameKey("000076", 1)).global_from_ego is None


def test_empty_annotations_and_empty_sweeps_are_kept(tmp_path):
    tree = write_sequence(tmp_path / "raw", split=None)
    tree["frames"][0]["annos"] = {"names": [], "boxes_3d": []}
    save(tmp_path / "raw", tree)
    (tmp_path / "raw/data/000076/lidar_roof" / f"{FIRST_MS}.bin").write_bytes(b"")
    assert once_sequences(tmp_path / "raw") == {"000076": "train"}
    prepare_once(tmp_path / "raw", tmp_path / "out")
    frame = PreparedDataset(tmp_path / "out").frame(FrameKey("000076", 0))
    assert frame.boxes is not None
    assert (len(frame.boxes), len(frame.points)) == (0, 0)


def test_missing_files_are_counted_and_left_out_only_when_wanted(tmp_path):
    raw = tmp_path / "raw"
    write_sequence(raw)
    write_sequence(raw, "000080", split="val")
    (raw / "data/000076/lidar_roof" / f"{FIRST_MS}.bin").unlink()
    (raw / "data/000080/000080.json").unlink()
    with pytest.raises(DataError, match="2 files that belong to the dataset are not on disk"):
        prepare_once(raw, tmp_path / "out")
    summary = prepare_once(raw, tmp_path / "out", skip_missing=True)
    assert (summary.logs, summary.frames, summary.missing_files) == (1, 2, 2)


def test_a_second_run_makes_nothing_and_an_edited_box_makes_its_log_anew(tmp_path):
    tree = write_sequence(tmp_path / "raw")
    assert prepare_once(tmp_path / "raw", tmp_path / "out").logs_made == 1
    assert prepare_once(tmp_path / "raw", tmp_path / "out").logs_made == 0
    tree["frames"][0]["annos"]["names"][0] = "Bus"
    save(tmp_path / "raw", tree)
    assert prepare_once(tmp_path / "raw", tmp_path / "out").logs_made == 1


def _nan_pose(frame: dict[str, Any]) -> None:
    frame["pose"][5] = float("nan")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_nan_pose, "frame 1616343527200, pose: holds NaN"),
        (lambda f: f.update(pose=[0, 0, 0, 2, 0, 0, 0]), "no unit quaternion"),
        (lambda f: f.update(pose=[0, 0, 0, 1]), r"has shape \(4,\), expected \(7,\)"),
        (lambda f: f.update(pose="north"), "something else than numbers"),
        (lambda f: f.update(pose=[10**400, 0, 0, 1, 0, 0, 0]), "something else than numbers"),
        (lambda f: f.update(frame_id="../../secret"), "is no frame_id"),
        (lambda f: f.update(frame_id="1616343527700"), "is the time of the sweep before it too"),
        (lambda f: f["annos"].update(names=["Car"]), r"has shape \(2, 7\), expected \(1, 7\)"),
        (lambda f: f["annos"].update(names=["Car", ["Bus"]]), "category .* is none of Car"),
        (lambda f: f["annos"]["boxes_3d"].__setitem__(1, [0, 0, 0, 1, 0, 1, 0]), "box 1 has a side of 0 m"),
        (lambda f: f["annos"]["boxes_3d"].__setitem__(1, [0, 0, 0, 1, float("inf"), 1, 0]), "boxes_3d: holds NaN or inf"),
        (lambda f: f.update(annos=[1]), "annos are no object"),
    ],
)
def test_damaged_frames_are_one_clear_error_each(tmp_path, change, words):
    tree = json.loads(json.dumps(write_sequence(tmp_path / "raw")))
    change(tree["frames"][0])
    save(tmp_path / "raw", tree)
    with pytest.raises(DataError, match=words) as caught:
        prepare_once(tmp_path / "raw", tmp_path / "out")
    assert "000076.json" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", '{"frames": 3}', "[]", '{"frames": [3]}', '{"frames": [{"frame_id": true}]}'])
def test_a_damaged_sequence_file_is_a_clear_error(tmp_path, text):
    path = tmp_path / "000076.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"000076\.json"):
        read_once_sequence(path)


_JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=3) | st.sampled_from(["Car", "1616343527200"]),
    lambda inner: (
        st.lists(inner, max_size=8) | st.dictionaries(st.sampled_from(["names", "boxes_3d", "pose"]), inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(frame=st.fixed_dictionaries({"frame_id": st.just("1616343527200") | _JSON}, optional={"pose": _JSON, "annos": _JSON}))
def test_any_json_gives_frames_or_our_error(tmp_path, frame):
    path = tmp_path / "000076.json"
    path.write_text(json.dumps({"frames": [frame]}))
    with suppress(DataError):
        (found,) = read_once_sequence(path)
        assert found.boxes is None or np.isfinite(found.boxes.center).all()


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=60))
def test_any_bytes_give_frames_or_our_error(tmp_path, data):
    path = tmp_path / "000076.json"
    path.write_bytes(data)
    with suppress(DataError):
        read_once_sequence(path)


def test_a_cut_sweep_names_its_file(tmp_path):
    write_sequence(tmp_path / "raw")
    path = tmp_path / "raw/data/000076/lidar_roof" / f"{FIRST_MS + 500}.bin"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(DataError, match=rf"{FIRST_MS + 500}\.bin"):
        prepare_once(tmp_path / "raw", tmp_path / "out")


def test_points_that_are_not_finite_are_dropped_and_counted(tmp_path):
    write_sequence(tmp_path / "raw")
    path = tmp_path / "raw/data/000076/lidar_roof" / f"{FIRST_MS}.bin"
    table = np.fromfile(path, "<f4").reshape(-1, 4)
    table[-1, 0] = np.nan
    table.tofile(path)
    assert prepare_once(tmp_path / "raw", tmp_path / "out").dropped_points == 1


def test_lists_may_not_leave_the_folder_nor_overlap_nor_forget_a_sequence(tmp_path):
    raw = tmp_path / "raw"
    write_sequence(raw)
    (raw / "ImageSets" / "val.txt").write_text("../../other\n")
    with pytest.raises(DataError, match="outside of the dataset"):
        once_sequences(raw)
    (raw / "ImageSets" / "val.txt").write_text("000076\n")
    with pytest.raises(DataError, match="is in the list of split train too"):
        once_sequences(raw)
    (raw / "ImageSets" / "val.txt").unlink()
    write_sequence(raw, "000077", split=None)
    with pytest.raises(DataError, match="no list names sequence 000077"):
        once_sequences(raw)
    with pytest.raises(DataError, match="holds no data/"):
        once_sequences(tmp_path / "elsewhere")


def test_the_command_prepares_and_tells_what_is_missing(tmp_path):
    write_sequence(tmp_path / "raw")
    done = CliRunner().invoke(app, ["prepare", "once", str(tmp_path / "raw"), str(tmp_path / "out"), "--sweeps", "1"])
    assert done.exit_code == 0, done.output
    assert PreparedDataset(tmp_path / "out").frame(FrameKey("000076", 2)).previous == (1,)


def test_objects_of_once_are_cut_out_by_the_merged_classes(tmp_path):
    write_sequence(tmp_path / "raw", count=4)
    prepare_once(tmp_path / "raw", tmp_path / "out")
    done = CliRunner().invoke(app, ["data", "objects", str(tmp_path / "out"), "--classes", "once", "--sweeps", "2"])
    assert done.exit_code == 0, done.output
    (path,) = (tmp_path / "out" / "objects").iterdir()
    found = ObjectDatabase(path)
    assert len(found) == 6
    assert found.classes(ONCE_DETECTION).tolist() == [1, 2] * 3


def test_real_sweeps_meet_by_a_pose_that_drives_the_car_forward(tmp_path):
    """Real sweeps, 0.5 s apart. The pose was found by registration; the gain shows the order x, y, z, w and LiDAR to global."""
    real = sorted(sample_path("once/000076/lidar_roof").glob("*.bin"))
    lidar = tmp_path / "raw/data/000076/lidar_roof"
    lidar.mkdir(parents=True)
    turn = np.radians(-5.702) / 2
    poses = [[0, 0, 0, 1, 0, 0, 0], [0, 0, np.sin(turn), np.cos(turn), -0.308, -2.654, -0.047]]
    for path in real:
        (lidar / path.name).write_bytes(path.read_bytes())
    save(tmp_path / "raw", {"frames": [{"frame_id": p.stem, "pose": pose} for p, pose in zip(real, poses, strict=True)]})
    prepare_once(tmp_path / "raw", tmp_path / "out")
    first, second = (PreparedDataset(tmp_path / "out").frame(FrameKey("000076", i)) for i in range(2))
    assert first.global_from_lidar is not None
    assert second.global_from_lidar is not None
    moved = (first.global_from_lidar.inverse() @ second.global_from_lidar).apply(second.points.xyz)

    def distance(xyz: np.ndarray) -> float:
        away = np.hypot(*second.points.xyz[:, :2].T)
        chosen = xyz[(second.points.xyz[:, 2] > -1) & (away > 5) & (away < 50)][::20]
        return float(np.median(NearestNeighbors(n_neighbors=1).fit(first.points.xyz).kneighbors(chosen)[0]))

    assert distance(second.points.xyz) > 0.5
    assert distance(moved) < 0.25
    assert first.global_from_ego is not None
    assert second.global_from_ego is not None
    step = (first.global_from_ego.inverse() @ second.global_from_ego).translation
    assert step[0] > 2.5  # forward
    assert abs(step[1]) < 0.5


def test_real_sweeps_show_the_cars_own_roof_along_its_heading(tmp_path):
    """Real sweeps: what the LiDAR sees of its own car is longer along the ego frame's x than along its y."""
    real = sample_path("once/000076/lidar_roof")
    lidar = tmp_path / "raw/data/000076/lidar_roof"
    lidar.mkdir(parents=True)
    frames = []
    for path in sorted(real.glob("*.bin")):
        (lidar / path.name).write_bytes(path.read_bytes())
        frames.append({"frame_id": path.stem})
    save(tmp_path / "raw", {"frames": frames})
    summary = prepare_once(tmp_path / "raw", tmp_path / "out")
    assert (summary.frames, summary.dropped_points) == (2, 0)
    dataset = PreparedDataset(tmp_path / "out")
    assert [len(dataset.frame(FrameKey("000076", i)).points) for i in range(2)] == [62998, 63385]
    frame = dataset.frame(FrameKey("000076", 0))
    assert (frame.points.intensity.min(), frame.points.intensity.max()) == (0, 196)
    xyz = frame.ego_from_lidar.apply(frame.points.xyz)
    roof = xyz[(np.hypot(xyz[:, 0], xyz[:, 1]) < 2.5) & (xyz[:, 2] > -1.2)]
    extent = np.ptp(roof, axis=0)
    assert len(roof) > 500
    assert 3.5 < extent[0] < 5
    assert extent[1] < 2
