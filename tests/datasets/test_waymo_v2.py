"""Waymo v2 is read to the frames that v1 gives: the same town, written as both, is the oracle."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from typer.testing import CliRunner

from picture3d.cli import app, main
from picture3d.datasets.prepared import PreparedDataset
from picture3d.datasets.waymo import prepare_waymo
from picture3d.datasets.waymo_v2 import frames_of_segment, is_waymo_v2, prepare_waymo_v2
from picture3d.errors import ConfigError, DataError
from picture3d.formats import waymo_v2
from picture3d.formats.waymo_v2 import component_file, frame_count, read_segment
from picture3d.structures.frame import Frame
from picture3d.synthetic.waymo_v2_writer import component_schemas, write_waymo_v2
from picture3d.synthetic.waymo_writer import write_waymo

SEED = 31
VALUES = "[LiDARComponent].range_image_return1.values"
SHAPE = "[LiDARComponent].range_image_return1.shape"


@pytest.fixture(scope="module")
def town(tmp_path_factory) -> Path:
    """The same two scenes as v1 and as v2; the first segment has two frames, with classes in the first."""
    root = tmp_path_factory.mktemp("town")
    write_waymo(root / "v1", scenes=2, frames_per_scene=2, seed=SEED, val_scenes=1)
    write_waymo_v2(root / "v2", scenes=2, frames_per_scene=2, seed=SEED, val_scenes=1)
    return root


def assert_equal_frames(a: Frame, b: Frame) -> None:
    assert (a.log, a.index, a.token, a.timestamp_us, a.previous, a.is_keyframe) == (
        b.log, b.index, b.token, b.timestamp_us, b.previous, b.is_keyframe
    )  # fmt: skip
    for pose, other in ((a.global_from_ego, b.global_from_ego), (a.ego_from_lidar, b.ego_from_lidar)):
        assert pose is not None
        assert other is not None
        assert np.array_equal(pose.matrix, other.matrix)
    pairs = [(part, getattr(a, part), getattr(b, part)) for part in ("labels", "instances")]
    for whole, other in ((a.points, b.points), (a.boxes, b.boxes)):
        assert type(whole) is type(other)
        if whole is not None:
            pairs += [(field.name, getattr(whole, field.name), getattr(other, field.name)) for field in fields(whole)]
    for name, column, other in pairs:
        if isinstance(column, np.ndarray):
            np.testing.assert_array_equal(column, other, err_msg=name)
            assert column.dtype == other.dtype
        else:
            assert column == other, name


def test_the_town_as_v2_gives_exactly_the_frames_of_v1(town, tmp_path):
    first, second = prepare_waymo(town / "v1", tmp_path / "v1"), prepare_waymo_v2(town / "v2", tmp_path / "v2")
    assert (first.logs, first.frames, first.points, first.boxes) == (second.logs, second.frames, second.points, second.boxes)
    assert second.points > 400_000
    assert second.labelled == 2
    one, other = PreparedDataset(tmp_path / "v1"), PreparedDataset(tmp_path / "v2")
    assert {split: one.logs(split) for split in one.splits} == {split: other.logs(split) for split in other.splits}
    assert one.label_set is other.label_set
    for key in one.keyframes():
        assert_equal_frames(one.frame(key), other.frame(key))
    again = prepare_waymo_v2(town / "v2", tmp_path / "v2")
    assert (again.logs_made, again.set_aside) == (0, ())


def test_the_command_sees_which_version_lies_in_the_folder(town, tmp_path):
    done = CliRunner().invoke(app, ["prepare", "waymo", str(town / "v2"), str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert PreparedDataset(tmp_path / "out").logs("train") == (segment_of(town / "v2"),)
    both = tmp_path / "both"
    (both / "training" / "lidar").mkdir(parents=True)
    (both / "training" / "lidar" / "a.parquet").touch()
    (both / "training" / "segment-a.tfrecord").touch()
    refused = CliRunner().invoke(app, ["prepare", "waymo", str(both), str(tmp_path / "none")])
    assert isinstance(refused.exception, DataError)
    assert "Keep one version" in str(refused.exception)


def test_the_writer_goes_on_where_it_was_stopped_and_ends_with_the_same_bytes(town, tmp_path):
    raw = tmp_path / "raw"
    arguments: dict[str, Any] = {"scenes": 2, "frames_per_scene": 1, "seed": 5, "val_scenes": 1}
    write_waymo_v2(raw, **arguments)
    files = {path: path.read_bytes() for path in raw.rglob("*.parquet")}
    assert len(files) == 12
    assert not list(raw.rglob("*.partial"))
    (raw / "unfinished").mkdir()
    (raw / "picture3d_splits.json").rename(raw / "unfinished" / "settings.json")
    component_file(raw / "training", "lidar", segment_of(raw)).unlink()
    component_file(raw / "training", "lidar_box", segment_of(raw)).write_bytes(b"half")
    write_waymo_v2(raw, **arguments)
    assert {path: path.read_bytes() for path in raw.rglob("*.parquet")} == files
    write_waymo_v2(raw, **arguments)
    with pytest.raises(ConfigError):
        write_waymo_v2(raw, **{**arguments, "seed": 6})
    (tmp_path / "real" / "training").mkdir(parents=True)
    with pytest.raises(ConfigError, match="did not write"):
        write_waymo_v2(tmp_path / "real", **arguments)


def test_synth_writes_v2_and_says_what_comes_next(tmp_path):
    words = ["synth", str(tmp_path / "raw"), "--format", "waymo-v2", "--scenes", "1", "--keyframes", "1", "--val-scenes", "0"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "raw Waymo v2, 1 segments of 1 frames" in done.output
    assert is_waymo_v2(tmp_path / "raw")


# -- small segments, right or wrong in a chosen place -------------------------------------------------------------------


def segment_of(raw: Path, split: str = "training") -> str:
    return next((raw / split / "vehicle_pose").glob("*.parquet")).stem


def cells(component: str, images: list[np.ndarray | None]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for number, image in enumerate(images, start=1):
        out[f"[{component}].range_image_return{number}.values"] = None if image is None else image.ravel()
        out[f"[{component}].range_image_return{number}.shape"] = None if image is None else list(image.shape)
    return out


def small_rows(frames: int = 2) -> dict[str, list[dict[str, Any]]]:
    """TOP (4 x 6, beams given, poses, classes) and FRONT (3 x 5, no second return); one label in each frame."""
    rng = np.random.default_rng(0)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in ("lidar", "lidar_pose", "lidar_segmentation", "lidar_box")}
    eye = np.eye(4).ravel().tolist()
    rows["vehicle_pose"] = []
    for i in range(frames):
        key = {"key.segment_context_name": "s", "key.frame_timestamp_micros": 1_000_000 + 100_000 * i}
        rows["vehicle_pose"].append({**key, "[VehiclePoseComponent].world_from_vehicle.transform": eye})
        for laser, shape in ((1, (4, 6)), (2, (3, 5))):
            image = rng.uniform(1, 70, (*shape, 4)).astype(np.float32)
            image[0, 0] = -1
            at = {**key, "key.laser_name": laser}
            rows["lidar"].append({**at, **cells("LiDARComponent", [image, image + 1 if laser == 1 else None])})
            if laser == 1:
                rows["lidar_pose"].append({**at, **cells("LiDARPoseComponent", [np.zeros((*shape, 6), np.float32)])})
                classes = rng.integers(0, 23, (*shape, 2)).astype(np.int32)
                rows["lidar_segmentation"].append({**at, **cells("LiDARSegmentationLabelComponent", [classes, classes])})
        numbers = dict.fromkeys((f"{part}.{axis}" for part in ("speed", "acceleration") for axis in "xyz"), 1.0)
        numbers |= {"box.center.x": 10.0, "box.center.y": 2.0, "box.center.z": 1.0, "box.heading": 0.5}
        numbers |= {"box.size.x": 4.0, "box.size.y": 2.0, "box.size.z": 1.5}
        label = {**numbers, "type": 1, "num_lidar_points_in_box": 7, "num_top_lidar_points_in_box": 6}
        label |= {"difficulty_level.detection": None, "difficulty_level.tracking": 2}
        named = {f"[LiDARBoxComponent].{name}": value for name, value in label.items()}
        rows["lidar_box"].append({**key, "key.laser_object_id": f"object {i}", **named})
    beams = "[LiDARCalibrationComponent].beam_inclination"
    rows["lidar_calibration"] = [
        {
            "key.segment_context_name": "s",
            "key.laser_name": laser,
            "[LiDARCalibrationComponent].extrinsic.transform": eye,
            f"{beams}.min": -0.3,
            f"{beams}.max": 0.1,
            f"{beams}.values": [-0.3, -0.1, 0.0, 0.1] if laser == 1 else None,
        }
        for laser in (1, 2)
    ]
    return rows


def write_small(root: Path, rows: dict[str, list[dict[str, Any]]], split: str = "training", name: str = "s") -> Path:
    schemas = component_schemas()
    for component, lines in rows.items():
        path = component_file(root / split, component, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pa.Table.from_pylist(lines, schemas[component]), path, write_page_checksum=True)
    return root / split


def frames(folder: Path) -> list[Frame]:
    return [frame for frame, _ in frames_of_segment(folder, "s", "train")]


def test_absent_second_returns_and_optional_cells_are_told(tmp_path):
    found = list(read_segment(write_small(tmp_path, small_rows()), "s"))
    assert [frame.timestamp_us for frame in found] == [1_000_000, 1_100_000]
    assert frame_count(tmp_path / "training", "s") == 2
    first, second = found[0].lasers[2]
    assert first.read_range_image("f") is not None
    assert second.read_range_image("f") is None
    assert found[0].calibrations[2].beam_inclinations.shape == (0,)
    assert found[0].labels.difficulty.tolist() == [0]
    assert found[0].labels.tracking_difficulty.tolist() == [2]
    rows = small_rows()
    for row in rows["lidar_box"]:
        row |= {name: None for name in row if ".speed." in name}
    labels = next(read_segment(write_small(tmp_path / "still", rows), "s")).labels
    assert np.isnan(labels.velocity).all()
    for row in rows["lidar_box"]:
        row["[LiDARBoxComponent].type"] = None  # of an unknown type: left out
    boxes = frames(write_small(tmp_path / "unknown", rows))[0].boxes
    assert boxes is not None
    assert len(boxes) == 0


def test_classes_of_another_width_are_read(tmp_path):
    folder = write_small(tmp_path, small_rows())
    path = component_file(folder, "lidar_segmentation", "s")
    expected = frames(folder)
    table = parquet.read_table(path)
    for number, name in enumerate(table.schema.names):
        if name.endswith("values"):
            table = table.set_column(number, name, table.column(name).cast(pa.list_(pa.int64())))
    parquet.write_table(table, path)
    for one, other in zip(expected, frames(folder), strict=True):
        assert_equal_frames(one, other)


def test_rows_laser_by_laser_give_the_frames_of_rows_time_by_time(tmp_path):
    rows = small_rows(3)
    expected = frames(write_small(tmp_path / "a", rows))
    rows["lidar"].sort(key=lambda row: row["key.laser_name"])
    rows["lidar_box"].reverse()
    rows["vehicle_pose"].reverse()
    for one, other in zip(expected, frames(write_small(tmp_path / "b", rows)), strict=True):
        assert_equal_frames(one, other)


def test_without_boxes_nobody_looked_and_without_classes_nothing_is_labelled(tmp_path):
    folder = write_small(tmp_path, small_rows())
    assert all(frame.boxes is not None and frame.labels is not None for frame in frames(folder))
    shutil.rmtree(folder / "lidar_box")
    shutil.rmtree(folder / "lidar_segmentation")
    assert all(frame.boxes is None and frame.labels is None for frame in frames(folder))
    rows = small_rows()
    rows["lidar_box"] = rows["lidar_box"][1:]
    rows["lidar"] = rows["lidar"][2:]
    first, _ = frames(write_small(tmp_path / "few", rows))
    assert first.boxes is not None
    assert (len(first.boxes), len(first.points)) == (0, 0)


def _cell(component: str, row: int, column: str, value: object) -> Callable[[dict[str, list[dict[str, Any]]]], None]:
    return lambda rows: rows[component][row].update({column: value})


def _late_row(rows: dict[str, list[dict[str, Any]]]) -> None:
    rows["lidar"].append({**rows["lidar"][0], "key.frame_timestamp_micros": 9})


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_cell("lidar", 1, SHAPE, [3, 5, 3]), r"row 1, .*values: has shape \(3, 5, 3\)"),
        (_cell("lidar", 1, SHAPE, [1 << 15, 1 << 15, 4]), "has shape"),
        (_cell("lidar", 1, SHAPE, [5, 5, 4]), "holds 60 numbers"),
        (_cell("lidar", 1, SHAPE, None), "a shape beside it"),
        (_cell("lidar", 1, "key.laser_name", 1), "LiDAR 1 is not in order of time there, or occurs twice"),
        (_cell("lidar", 1, "key.laser_name", 9), "LiDAR 9 is none of 1 to 5"),
        (_late_row, "not in order of time"),
        (_cell("lidar", 3, "key.frame_timestamp_micros", 7_000_000), "at which vehicle_pose has no frame"),
        (_cell("lidar_box", 1, "key.frame_timestamp_micros", 7), "at which vehicle_pose has no frame"),
        (_cell("lidar_box", 0, "[LiDARBoxComponent].box.size.x", -1.0), "label 'object 0' at 1000000 us has a box"),
        (_cell("lidar_box", 0, "[LiDARBoxComponent].box.heading", float("nan")), "label 'object 0' at 1000000 us has a box"),
        (
            _cell("vehicle_pose", 0, "[VehiclePoseComponent].world_from_vehicle.transform", [1.0] * 16),
            "row 0: the pose is not a rot",
        ),
        (
            _cell("vehicle_pose", 0, "[VehiclePoseComponent].world_from_vehicle.transform", None),
            "row 0 does not hold the 16",
        ),
        (_cell("vehicle_pose", 1, "key.frame_timestamp_micros", 1_000_000), "two frames have the time"),
        (_cell("vehicle_pose", 1, "key.segment_context_name", "t"), "belongs to segment t"),
        (_cell("lidar_calibration", 1, "key.laser_name", 1), "calibrated twice"),
        (lambda rows: rows["lidar_calibration"].pop(), "holds no calibration of it"),
        (lambda rows: rows["lidar_pose"].pop(), "lacks the poses of its pixels"),
    ],
)
def test_segments_that_contradict_themselves_are_set_aside_and_the_others_go_on(tmp_path, change, why):
    rows = small_rows()
    change(rows)
    write_small(tmp_path / "raw", rows)
    good = small_rows()
    for lines in good.values():
        for line in lines:
            line["key.segment_context_name"] = "t"
    write_small(tmp_path / "raw", good, name="t")
    summary = prepare_waymo_v2(tmp_path / "raw", tmp_path / "out")
    (found,) = summary.set_aside
    assert found.startswith("log s is set aside: ")
    assert re.search(why, found), found
    assert PreparedDataset(tmp_path / "out").logs("train") == ("t",)


@pytest.mark.parametrize("component", ["lidar", "lidar_pose", "lidar_calibration", "vehicle_pose", "lidar_box"])
def test_a_component_that_is_missing_cut_or_something_else_is_named(tmp_path, component):
    folder = write_small(tmp_path / "raw", small_rows())
    path = component_file(folder, component, "s")
    whole = path.read_bytes()
    for damage in (None, whole[:-9], whole[: len(whole) // 2], b"", b"PAR1" + bytes(40) + b"PAR1"):
        path.unlink(missing_ok=True)
        if damage is not None:
            path.write_bytes(damage)
        with pytest.raises(DataError, match=rf"{component}/s\.parquet"):
            frames(folder)


def test_a_flipped_byte_in_a_range_image_is_found_by_the_checksum_of_its_page(tmp_path):
    folder = write_small(tmp_path / "raw", small_rows())
    path = component_file(folder, "lidar", "s")
    chunk = next(
        column
        for column in (parquet.read_metadata(path).row_group(0).column(i) for i in range(20))
        if column.path_in_schema.startswith(VALUES)
    )
    data = bytearray(path.read_bytes())
    data[chunk.data_page_offset + chunk.total_compressed_size // 4] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"lidar/s\.parquet"):
        frames(folder)


@pytest.mark.parametrize("seed", range(40))
def test_any_damage_gives_our_error_or_a_frame(tmp_path, seed):
    rng = np.random.default_rng(seed)
    folder = write_small(tmp_path, small_rows())
    component = ("lidar", "lidar_box", "vehicle_pose", "lidar_calibration", "lidar_pose")[seed % 5]
    path = component_file(folder, component, "s")
    if seed % 2:  # as files without checksums of their pages
        parquet.write_table(parquet.read_table(path), path, compression="brotli")
    data = bytearray(path.read_bytes())
    for at in rng.integers(0, len(data), 3):
        data[at] = rng.integers(256)
    path.write_bytes(data)
    with suppress(DataError):
        assert len(frames(folder)) <= 2


def test_columns_of_another_kind_or_absent_are_refused(tmp_path):
    rows = small_rows()
    folder = write_small(tmp_path, rows)
    path = component_file(folder, "lidar", "s")
    table = parquet.read_table(path)
    parquet.write_table(table.drop_columns([SHAPE]), path)
    with pytest.raises(DataError, match="has no column"):
        frames(folder)
    strings = pa.array([["a"] for _ in range(table.num_rows)], pa.list_(pa.string()))
    parquet.write_table(table.set_column(table.schema.get_field_index(VALUES), VALUES, strings), path)
    with pytest.raises(DataError, match="holds string"):
        frames(folder)


def test_a_file_that_claims_more_numbers_than_a_range_image_may_have_is_not_decoded(tmp_path, monkeypatch):
    folder = write_small(tmp_path, small_rows())
    monkeypatch.setattr(waymo_v2, "MAX_PIXELS", 10)
    with pytest.raises(DataError, match=r"claims .* values of .*more than 40 in each"):
        frames(folder)


def test_without_pyarrow_one_line_names_the_extra(tmp_path, monkeypatch, capsys):
    write_small(tmp_path / "raw", small_rows())
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setattr(sys, "argv", ["picture3d", "prepare", "waymo", str(tmp_path / "raw"), str(tmp_path / "out")])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert "pip install picture3d[arrow]" in told
    assert "Traceback" not in told


def test_two_processes_make_the_same_bytes_and_set_the_same_segment_aside(tmp_path):
    for name in "abc":
        rows = small_rows()
        for lines in rows.values():
            for line in lines:
                line["key.segment_context_name"] = name
        write_small(tmp_path / "raw", rows, name=name)
    component_file(tmp_path / "raw" / "training", "lidar_pose", "b").unlink()
    alone = prepare_waymo_v2(tmp_path / "raw", tmp_path / "alone")
    together = prepare_waymo_v2(tmp_path / "raw", tmp_path / "together", processes=2)
    assert alone.set_aside == together.set_aside
    assert len(alone.set_aside) == 1
    for log in "ac":
        assert (tmp_path / "alone/logs" / f"{log}.p3d").read_bytes() == (tmp_path / "together/logs" / f"{log}.p3d").read_bytes()


def test_a_segment_in_two_splits_and_a_folder_without_any_are_refused(tmp_path):
    write_small(tmp_path / "raw", small_rows())
    write_small(tmp_path / "raw", small_rows(), "validation")
    with pytest.raises(DataError, match="holds segment s, as"):
        prepare_waymo_v2(tmp_path / "raw", tmp_path / "out")
    with pytest.raises(DataError, match="no lidar/"):
        prepare_waymo_v2(tmp_path, tmp_path / "out")
