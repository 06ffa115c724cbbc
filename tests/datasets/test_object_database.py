from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import tracemalloc
from dataclasses import replace
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import picture3d.datasets.object_building as building
from picture3d.datasets.detection_classes import NUSCENES_DETECTION, WAYMO_DETECTION, DetectionClasses
from picture3d.datasets.object_building import build_object_database
from picture3d.datasets.object_database import HEAD, ObjectDatabase, database_path, databases_of
from picture3d.datasets.object_parts import KIND, PartFile
from picture3d.datasets.prepared import FrameKey, PreparedDataset
from picture3d.datasets.samples import DataConfig, read_sample
from picture3d.errors import ConfigError, DataError
from picture3d.formats.block_file import BlockWriter
from picture3d.structures.boxes import Boxes
from picture3d.structures.points import IntensityUnit
from picture3d.structures.poses import Pose
from tests.datasets.object_scenes import box_points, boxes_of, cloud_of, frame_of, random_frame, write_scenes

CAR, ADULT = "vehicle.car", "human.pedestrian.adult"


def built(root: Path, **options) -> ObjectDatabase:
    return ObjectDatabase(build_object_database(root, **options).path)


def test_an_object_is_cut_out_as_computed_by_hand(tmp_path):
    """The box is turned by 90 degrees, so that its 4 m of length lie along y; points stay in the axes of the LiDAR."""
    points = [[10, 1.9, 1], [10.9, 0, 1], [10, 2.1, 1], [11.1, 0, 1], [9.5, -1.5, 0.5]]
    boxes = boxes_of(
        [(CAR, [10, 0, 1, 4, 2, 1.5, np.pi / 2, 3, np.nan]), (ADULT, [50, 50, 0, 1, 1, 2, 0])],
        difficulty=np.array([2, 1], np.int8),
    )
    write_scenes(tmp_path, {"log-a": [frame_of(cloud_of(points, elongation=True), boxes)]})
    database = built(tmp_path)
    assert len(database) == 1  # the pedestrian has no points
    found = database.object(0)
    np.testing.assert_allclose(found.xyz, [[0, 1.9, 0], [0.9, 0, 0], [-0.5, -1.5, -0.5]], atol=1e-6)
    assert found.intensity.tolist() == [0, 1, 4]
    assert found.unit is IntensityUnit.RAW_255
    assert found.elongation is not None
    assert found.elongation.tolist() == [0, 0.125, 0.5]
    assert found.time_lag.tolist() == [0, 0, 0]
    np.testing.assert_array_equal(found.box, [10, 0, 1, 4, 2, 1.5, np.pi / 2, 3, np.nan])
    assert (found.category, found.difficulty, found.log, found.frame) == (CAR, 2, "log-a", 0)
    assert database.count.tolist() == [3]
    assert database.classes(NUSCENES_DETECTION).tolist() == [1]
    assert database.classes(WAYMO_DETECTION).tolist() == [0]


def test_a_point_in_two_boxes_belongs_to_both(tmp_path):
    boxes = boxes_of([(CAR, [0, 0, 0, 4, 2, 2, 0]), (ADULT, [1, 0, 0, 1, 1, 2, 0])])
    write_scenes(tmp_path, {"log-a": [frame_of(cloud_of([[1, 0, 0], [-1, 0, 0]]), boxes)]})
    assert built(tmp_path).count.tolist() == [2, 1]


def test_earlier_sweeps_are_merged_as_for_a_training_sample(tmp_path):
    """By hand: the car drives 1 m along x between sweeps; what was at 6 is at 5 now, 0.05 s later."""
    poses = [Pose(np.eye(3), np.array([float(i), 0, 0])) for i in range(3)]
    sweeps = [
        frame_of(cloud_of([[7.0 - i, 0.25 * i, 0], [0.5, 0, 0]]), None, index=i, global_from_ego=poses[i], is_keyframe=i == 2)
        for i in range(3)
    ]
    boxes = boxes_of([(CAR, [5, 0, 0, 4, 2, 2, 0])])
    frames = [*sweeps[:2], replace(sweeps[2], boxes=boxes, previous=(1, 0))]
    write_scenes(tmp_path, {"log-a": frames})
    found = built(tmp_path, sweeps=3).object(0)
    np.testing.assert_allclose(found.xyz, [[0, 0.5, 0], [0, 0.25, 0], [0, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(found.time_lag, [0, 0.05, 0.1], atol=1e-7)
    assert len(built(tmp_path, sweeps=1).object(0).xyz) == 1
    assert databases_of(tmp_path) == ["train-1sweeps", "train-3sweeps"]


def test_objects_hold_the_rows_of_the_merged_sample_that_lie_in_their_boxes(tmp_path):
    rng = np.random.default_rng(0)
    frames = [random_frame(i, rng, categories=(CAR, ADULT)) for i in range(3)]
    frames = [
        replace(frame, global_from_ego=Pose.from_yaw(0.1 * i, [i, 0.2, 0]), previous=tuple(range(i - 1, -1, -1)))
        for i, frame in enumerate(frames)
    ]
    write_scenes(tmp_path, {"log-a": frames})
    database = built(tmp_path, sweeps=2)
    features = {"features": ("intensity", "time_lag"), "intensity_scale": "raw", "box_classes": NUSCENES_DETECTION.names}
    config = DataConfig.from_tree({"root": str(tmp_path), "sweeps": 2, "min_box_points": 0, **features})
    dataset = PreparedDataset(tmp_path)
    assert len(database) > 15
    for row in range(len(database)):
        found = database.object(row)
        sample = read_sample(dataset, FrameKey("log-a", found.frame), config)
        cos, sin = np.cos(found.box[6]), np.sin(found.box[6])
        offset = sample.xyz.astype(np.float64) - found.box[:3]
        local = np.column_stack([offset[:, :2] @ [cos, sin], offset[:, :2] @ [-sin, cos], offset[:, 2]])
        inside = (np.abs(local) <= found.box[3:6] / 2).all(axis=1)
        # Two roundings to float32, of at most 5 m from the centre and of at most 25 m from the sensor.
        np.testing.assert_allclose(found.points_lidar_m, sample.xyz[inside], rtol=0, atol=1.3e-6)
        np.testing.assert_array_equal(np.column_stack([found.intensity, found.time_lag]), sample.features[inside])


def dataset_of_three_logs(root: Path) -> Path:
    rng = np.random.default_rng(1)
    logs = {f"log-{n}": [random_frame(i, rng, log=f"log-{n}", categories=(CAR, ADULT)) for i in range(4)] for n in "abc"}
    return write_scenes(root, logs)


def test_a_build_broken_off_goes_on_and_gives_the_same_bytes(tmp_path, monkeypatch):
    dataset_of_three_logs(tmp_path)
    whole = build_object_database(tmp_path, name="whole")
    written: list[str] = []
    write = building.write_part

    def dies_at_the_third(path, dataset, log, settings):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(log)
        return write(path, dataset, log, settings)

    monkeypatch.setattr(building, "write_part", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        build_object_database(tmp_path, name="again")
    assert not database_path(tmp_path, "again").exists()
    # One of the two finished logs is damaged afterwards: it is made anew, the other is kept.
    part = tmp_path / "objects" / "again.parts" / "log-a.part"
    data = bytearray(part.read_bytes())
    data[100] ^= 1
    part.write_bytes(data)
    monkeypatch.setattr(building, "write_part", write)
    again = build_object_database(tmp_path, name="again")
    assert again.logs_made == 2
    assert again.path.read_bytes() == whole.path.read_bytes()
    assert not part.parent.exists()


def _build(root: Path) -> None:
    write = building.write_part

    def killed(path, dataset, log, settings):
        if log == "log-b":
            path.with_name(path.name + ".partial").write_bytes(b"torn")
            os.kill(os.getpid(), 9)
        return write(path, dataset, log, settings)

    building.write_part = killed
    build_object_database(root, name="killed")


def test_a_killed_build_goes_on_and_gives_the_same_bytes(tmp_path):
    dataset_of_three_logs(tmp_path)
    process = multiprocessing.get_context("fork").Process(target=_build, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == -9
    again = build_object_database(tmp_path, name="killed")
    assert again.logs_made == 2
    assert again.path.read_bytes() == build_object_database(tmp_path, name="whole").path.read_bytes()


@pytest.mark.parametrize(
    "about", [(1, 0, False, "0-255"), (0, 0, False, "percent"), (0, 0, False), (-1, 4, False, "0-255"), ("x", 0, 0, "0-1")]
)
def test_a_part_whose_index_does_not_fit_its_blocks_is_our_error(tmp_path, about):
    with BlockWriter(tmp_path / "a.part", KIND, {"identity": {}, "categories": [], "skipped": 0}) as file:
        file.add(0, b"", *about)
    with pytest.raises(DataError, match=r"a\.part: the index at byte 16 lacks or garbles .*Delete the file"):
        PartFile(tmp_path / "a.part")


def test_several_processes_give_the_same_bytes(tmp_path):
    dataset_of_three_logs(tmp_path)
    one = build_object_database(tmp_path, name="one")
    two = build_object_database(tmp_path, name="two", processes=2)
    assert one.path.read_bytes() == two.path.read_bytes()


def test_what_is_finished_is_not_done_again_unless_frames_or_settings_change(tmp_path):
    dataset_of_three_logs(tmp_path)
    first = build_object_database(tmp_path)
    assert (first.logs_made, first.logs, first.frames) == (3, 3, 12)
    assert build_object_database(tmp_path).logs_made == 0
    assert build_object_database(tmp_path, min_points=9).logs_made == 3
    rng = np.random.default_rng(9)
    write_scenes(tmp_path, {"log-a": [random_frame(0, rng, categories=(CAR,))]})
    assert build_object_database(tmp_path, min_points=9).logs_made == 1


def test_merging_in_small_pieces_gives_the_same_bytes(tmp_path, monkeypatch):
    dataset_of_three_logs(tmp_path)
    whole = build_object_database(tmp_path, name="whole")
    monkeypatch.setattr(building, "_POINTS_AT_ONCE", 1)
    assert build_object_database(tmp_path, name="pieces").path.read_bytes() == whole.path.read_bytes()


def test_memory_does_not_grow_with_objects(tmp_path, monkeypatch):
    """A frame holds 160 kB of points in boxes; what stays of it is its line in two indices."""
    monkeypatch.setattr(building, "_POINTS_AT_ONCE", 1)
    rng = np.random.default_rng(2)
    row = [0.0, 0, 0, 4, 2, 2, 0]
    frame = frame_of(cloud_of(box_points(row, 10_000, rng)), boxes_of([(CAR, row)]))
    peaks = []
    for length in (3, 23):
        root = write_scenes(tmp_path / str(length), {"log-a": [replace(frame, index=i, token=str(i)) for i in range(length)]})
        build_object_database(root, name="warm")
        tracemalloc.start()
        assert build_object_database(root).points == 10_000 * length
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 20 * 4000


def test_classes_and_intervals_choose_what_is_kept(tmp_path):
    dataset_of_three_logs(tmp_path)
    every = built(tmp_path, name="every")
    cars = built(tmp_path, name="cars", classes=DetectionClasses(("car",)))
    assert set(every.categories) == {CAR, ADULT}
    assert cars.categories == (CAR,)
    assert len(cars) == int((every.classes(NUSCENES_DETECTION) == 1).sum())
    second = built(tmp_path, name="second", classes=NUSCENES_DETECTION, every={"pedestrian": 2})
    frames = [second.object(row) for row in range(len(second))]
    assert {found.frame for found in frames if found.category == CAR} == {0, 1, 2, 3}
    assert {found.frame for found in frames if found.category == ADULT} == {0, 2}
    fewest = built(tmp_path, name="fewest", min_points=10)
    assert len(fewest) == int((every.count >= 10).sum())


@pytest.mark.parametrize(
    "options", [{"sweeps": 0}, {"processes": 0}, {"every": {"car": 0}}, {"every": {"cart": 2}, "classes": NUSCENES_DETECTION}]
)
def test_impossible_settings_are_refused(tmp_path, options):
    dataset_of_three_logs(tmp_path)
    with pytest.raises(ConfigError):
        build_object_database(tmp_path, **options)


def test_frames_without_objects_give_an_empty_database(tmp_path):
    frames = [
        frame_of(cloud_of([[1, 1, 1]]), Boxes.empty()),
        frame_of(cloud_of([]), boxes_of([(CAR, [0, 0, 0, 1, 1, 1, 0])]), index=1),
        frame_of(cloud_of([[0, 0, 0]]), None, index=2),
    ]
    write_scenes(tmp_path, {"log-a": frames})
    summary = build_object_database(tmp_path)
    database = ObjectDatabase(summary.path)
    assert (summary.frames, summary.objects, summary.points, len(database)) == (2, 0, 0, 0)
    assert database.classes(NUSCENES_DETECTION).shape == (0,)
    database.verify()


def test_a_dataset_without_boxes_is_refused(tmp_path):
    write_scenes(tmp_path, {"log-a": [frame_of(cloud_of([[0, 0, 0]]), None)]})
    with pytest.raises(DataError, match="has boxes"):
        build_object_database(tmp_path)
    with pytest.raises(DataError, match="no split 'val'"):
        build_object_database(tmp_path, split="val")


def test_a_box_that_is_not_finite_is_left_out_and_counted(tmp_path):
    boxes = boxes_of([(CAR, [np.nan, 0, 0, 4, 2, 2, 0]), (CAR, [0, 0, 0, 4, 2, 2, 0]), (CAR, [0, 0, 0, 4, np.inf, 2, 0])])
    write_scenes(tmp_path, {"log-a": [frame_of(cloud_of([[0, 0, 0]]), boxes)]})
    summary = build_object_database(tmp_path)
    assert (summary.objects, summary.skipped_boxes) == (1, 2)


def test_elongation_is_kept_only_if_every_log_tells_it(tmp_path):
    boxes = boxes_of([(CAR, [0, 0, 0, 4, 2, 2, 0])])
    frames = {log: [frame_of(cloud_of([[0, 0, 0]], elongation=log == "log-a"), boxes, log=log)] for log in ("log-a", "log-b")}
    write_scenes(tmp_path, frames, splits={"train": ["log-a"], "val": ["log-b"]})
    assert built(tmp_path, split="train").has_elongation
    both = built(tmp_path, split=None)
    assert not both.has_elongation
    assert both.object(0).elongation is None


def test_units_of_intensity_are_kept_per_object(tmp_path):
    boxes = boxes_of([(CAR, [0, 0, 0, 4, 2, 2, 0])])
    units = {"log-a": IntensityUnit.RAW_255, "log-b": IntensityUnit.TANH}
    write_scenes(tmp_path, {log: [frame_of(cloud_of([[0, 0, 0]], unit=unit), boxes, log=log)] for log, unit in units.items()})
    database = built(tmp_path)
    assert [database.object(row).unit for row in range(2)] == list(units.values())


def test_a_database_is_opened_anew_in_another_process(tmp_path):
    dataset_of_three_logs(tmp_path)
    database = built(tmp_path)
    sent = pickle.dumps(database)
    assert len(sent) < 500
    np.testing.assert_array_equal(pickle.loads(sent).object(3).xyz, database.object(3).xyz)


def test_every_flipped_byte_is_found(tmp_path):
    write_scenes(tmp_path, {"log-a": [random_frame(0, np.random.default_rng(3), categories=(CAR,), objects=3)]})
    path = build_object_database(tmp_path).path
    good = path.read_bytes()
    copy = path.with_name("copy.objects")
    for at in range(0, len(good), 37):
        bad = bytearray(good)
        bad[at] ^= 0x10
        copy.write_bytes(bad)
        try:
            database = ObjectDatabase(copy)
            database.verify()
        except DataError:
            continue
        assert good[at] == 0, f"byte {at} is not covered by a checksum"  # between columns, up to the alignment
    for end in range(0, len(good), 97):
        copy.write_bytes(good[:end])
        with pytest.raises(DataError):
            ObjectDatabase(copy)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_forged_description_gives_our_own_error_or_a_database(tmp_path, data):
    """The checksum of the description is made to fit, so that what it says is all that can be judged."""
    path = tmp_path / "objects" / "train-1sweeps.objects"
    if not path.exists():
        write_scenes(tmp_path, {"log-a": [random_frame(0, np.random.default_rng(3), categories=(CAR,), objects=3)]})
        build_object_database(tmp_path)
    good = path.read_bytes()
    length = HEAD.unpack(good[: HEAD.size])[2]
    tree = json.loads(good[HEAD.size : HEAD.size + length])
    place = data.draw(st.sampled_from([(name,) for name in tree] + [(k, n) for k in ("identity", "columns") for n in tree[k]]))
    anything = st.one_of(
        st.none(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=9), st.lists(st.integers(), max_size=3),
        st.dictionaries(st.sampled_from(["box", "xyz", "nothing"]), st.text("0123456789abcdef", min_size=8, max_size=8)),
    )  # fmt: skip
    (tree[place[0]] if len(place) == 2 else tree)[place[-1]] = data.draw(anything)
    text = json.dumps(tree).encode()
    start = HEAD.pack(good[:8], 1, len(text), google_crc32c.value(text), 0)[:20]
    forged = path.with_name("forged.objects")
    forged.write_bytes(start + google_crc32c.value(start).to_bytes(4, "little") + text + good[HEAD.size + length :])
    try:
        database = ObjectDatabase(forged)
        for row in range(len(database)):
            database.object(row)
    except DataError:
        pass


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    dataset_of_three_logs(tmp_path)

    def full(file, offset, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(building, "_write_at", full)
    with pytest.raises(DataError, match="No space left on device"):
        build_object_database(tmp_path, name="mine")
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "objects").iterdir()] == ["mine.parts"]
    assert build_object_database(tmp_path, name="mine").logs_made == 0  # the logs were finished


def test_damaged_points_are_found_when_they_are_read(tmp_path):
    dataset_of_three_logs(tmp_path)
    database = built(tmp_path)
    data = bytearray(database.path.read_bytes())
    data[-5] ^= 1  # the last intensity
    database.path.write_bytes(data)
    damaged = ObjectDatabase(database.path)
    assert len(damaged.object(0).xyz)
    with pytest.raises(DataError, match=rf"points of object {len(damaged) - 1} "):
        damaged.object(len(damaged) - 1)


def test_a_missing_database_says_how_to_make_one(tmp_path):
    with pytest.raises(DataError, match="picture3d data objects"):
        ObjectDatabase(tmp_path / "no.objects")
