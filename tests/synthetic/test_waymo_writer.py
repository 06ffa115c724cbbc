"""The written tfrecords, decoded by field number and turned into points by the definition in float64, are the town."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from picture3d.commands.data import synth
from picture3d.errors import ConfigError
from picture3d.formats.tfrecord import read_records
from picture3d.synthetic.nuscenes_rows import town_seed
from picture3d.synthetic.scene_jobs import SPLITS_FILE
from picture3d.synthetic.waymo_drive import WaymoConfig, WaymoFrame, waymo_frame
from picture3d.synthetic.waymo_writer import write_waymo
from picture3d.synthetic.world import build_town
from tests.sample_data import sample_path
from tests.waymo_reference import SHAPES, Message, matrix, vehicle_points

SEED = 11
TYPES = {"vehicle": 1, "pedestrian": 2, "sign": 3, "cyclist": 4}


def write(root: Path, **changes: Any) -> Path:
    write_waymo(root, **{"scenes": 2, "frames_per_scene": 2, "seed": SEED, **changes})
    return root


def digest(root: Path) -> dict[str, str]:
    files = (p for p in sorted(root.rglob("*")) if p.is_file())
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("town") / "raw")


def segments(root: Path) -> list[Path]:
    return sorted(root.glob("*/segment-*_with_camera_labels.tfrecord"))


def truth(root: Path, path: Path, index: int) -> WaymoFrame:
    """What the town says about a frame of a segment."""
    splits = json.loads((root / SPLITS_FILE).read_text())["splits"]
    name = path.name.removeprefix("segment-").removesuffix("_with_camera_labels.tfrecord")
    scene = [*splits["train"], *splits["val"]].index(name) + 1
    return waymo_frame(build_town(town_seed(SEED, scene)), WaymoConfig(frames=2), index)


@pytest.fixture(scope="module")
def pairs(dataset) -> list[tuple[Message, WaymoFrame]]:
    """Message and truth of every frame of the first file, and of the second frame of the other."""
    first, other = segments(dataset)
    decoded = {path: [Message.of(payload) for _, payload in read_records(path)] for path in (first, other)}
    rows = [(first, 0), (first, 1), (other, 1)]
    return [(decoded[path][index], truth(dataset, path, index)) for path, index in rows]


# -- the files ----------------------------------------------------------------------------------------------------------


def test_files_lie_in_their_splits_and_nothing_is_left_over(dataset):
    assert sorted(p.name for p in dataset.iterdir()) == [SPLITS_FILE, "training", "validation"]
    settings = json.loads((dataset / SPLITS_FILE).read_text())
    for split, folder in (("train", "training"), ("val", "validation")):
        (name,) = settings["splits"][split]
        assert [p.name for p in (dataset / folder).iterdir()] == [f"segment-{name}_with_camera_labels.tfrecord"]
        assert name.endswith("_0_000_0_200")


def test_two_processes_write_the_same_bytes(dataset, tmp_path):
    assert digest(write(tmp_path / "raw", processes=2)) == digest(dataset)


class Killed(BaseException):
    """Stands for a signal."""


@pytest.mark.parametrize("after", [1, 2])
def test_a_killed_run_is_finished_to_the_same_bytes(dataset, tmp_path, after):
    def stop(done: int, total: int) -> None:
        assert total == 4
        if done == after:
            raise Killed

    with pytest.raises(Killed):
        write(tmp_path / "raw", progress=stop)
    assert not (tmp_path / "raw" / SPLITS_FILE).exists()
    assert len(segments(tmp_path / "raw")) == after // 2
    calls: list[int] = []
    write(tmp_path / "raw", progress=lambda done, total: calls.append(done))
    assert digest(tmp_path / "raw") == digest(dataset)
    assert calls == list(range(after // 2 * 2, 5))


def test_a_whole_dataset_is_left_alone(dataset):
    before = {p: p.stat().st_mtime_ns for p in dataset.rglob("*") if p.is_file()}
    calls: list[tuple[int, int]] = []
    write(dataset, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(4, 4)]
    assert {p: p.stat().st_mtime_ns for p in dataset.rglob("*") if p.is_file()} == before


def test_other_settings_and_foreign_folders_are_refused(dataset, tmp_path):
    with pytest.raises(ConfigError, match=r"other settings \(seed, splits differ\)"):
        write(dataset, seed=12)
    (tmp_path / "raw" / "validation").mkdir(parents=True)
    with pytest.raises(ConfigError, match="never mixed with a town"):
        write(tmp_path / "raw")
    for name in ("scenes", "frames_per_scene", "processes"):
        with pytest.raises(ConfigError, match=f"{name} = 0: too few. Ask for at least 1"):
            write(tmp_path / "none", **{name: 0})
    assert not (tmp_path / "none").exists()


def test_the_command_writes_the_same_files_and_refuses_what_belongs_to_nuscenes(dataset, tmp_path):
    words: dict[str, Any] = {"scenes": 1, "keyframes": 1, "val_scenes": 0, "seed": SEED, "processes": 1}
    line = synth(tmp_path / "raw", **words, sweeps_per_keyframe=None, version=None, layout="waymo")
    assert "1 segments of 1 frames" in line
    (path,) = segments(tmp_path / "raw")
    (payload,) = (payload for _, payload in read_records(path))
    # The town of scene 1 is the same, however long the drive: all but the context, which tells of the whole segment.
    scene = json.loads((dataset / SPLITS_FILE).read_text())["splits"]["train"][0]
    whole = next(p for p in segments(dataset) if scene in p.name)
    other = next(read_records(whole))[1]
    assert without_context(payload) == without_context(other)
    for extra in ({"sweeps_per_keyframe": 3, "version": None}, {"sweeps_per_keyframe": None, "version": "v1.0-mini"}):
        with pytest.raises(ConfigError, match="belong to nuScenes"):
            synth(tmp_path / "other", **words, **extra, layout="waymo")
    with pytest.raises(ConfigError, match="nuscenes, waymo or waymo-v2"):
        synth(tmp_path / "other", **words, sweeps_per_keyframe=None, version=None, layout="kitti")


def without_context(payload: bytes) -> bytes:
    return payload[Message.of(payload).one(1).stop :]


# -- the messages -------------------------------------------------------------------------------------------------------


def test_frames_are_a_tenth_of_a_second_apart_and_tell_their_segment(dataset):
    for path in segments(dataset):
        frames = [Message.of(payload) for _, payload in read_records(path)]
        assert len(frames) == 2
        assert frames[1].integer(2) - frames[0].integer(2) == 100_000
        for frame in frames:
            (context,) = frame.inside(1)
            assert f"segment-{context.text(1)}_with_camera_labels.tfrecord" == path.name
            assert sorted(m.integer(1) for m in context.inside(3)) == [1, 2, 3, 4, 5]
            assert [m.integer(1) for m in frame.inside(5)] == [1, 2, 3, 4, 5]


def test_the_context_counts_the_different_objects_of_the_segment(dataset):
    for path in segments(dataset):
        frames = [Message.of(payload) for _, payload in read_records(path)]
        objects = {(label.text(4), label.integer(3)) for frame in frames for label in frame.inside(6)}
        for frame in frames:
            counts = {m.integer(1): m.integer(2) for m in frame.inside(1)[0].inside(4)[0].inside(1)}
            kinds = [kind for _, kind in objects]
            assert counts == {kind: kinds.count(kind) for kind in set(kinds)}
            assert frame.inside(1)[0].inside(4)[0].text(2) == "Day"


def test_range_images_give_the_ray_cast_points_back(pairs):
    for message, frame in pairs:
        for name in SHAPES:
            for which in (0, 1):
                found = vehicle_points(message, name, which)
                images = next(images for images in frame.lasers if images.laser.name == name)
                order = np.argsort(images.returns[which].pixel)
                np.testing.assert_allclose(found, frame.points(name, which)[order], rtol=0, atol=1e-9)
        assert len(vehicle_points(message, 1, 0)) > 100_000
        assert 0 < len(vehicle_points(message, 1, 1)) < 40_000


def test_points_of_the_road_lie_on_the_road_of_the_town(dataset, pairs):
    """Truth from outside the ray caster: with the frame's pose for every column the points would miss by the car's way."""
    for message, frame in pairs:
        images = frame.lasers[0]
        splits = json.loads((dataset / SPLITS_FILE).read_text())["splits"]
        scene = [*splits["train"], *splits["val"]].index(message.inside(1)[0].text(1)) + 1
        town = build_town(town_seed(SEED, scene))
        found = frame.global_from_vehicle.apply(vehicle_points(message, 1, 0))
        order = np.argsort(images.returns[0].pixel)
        flat = images.returns[0].primitive[order] < 0
        above = found[flat, 2] - town.ground.surface(found[flat, 0], found[flat, 1])
        assert np.median(np.abs(above)) < 0.01
        assert np.abs(above).max() < 0.35  # range noise along shallow rays, kerbs


def test_every_column_has_its_pose_and_the_car_moves_between_them(pairs):
    for message, frame in pairs:
        pose = matrix(message.inside(5)[0].inside(2)[0].data(4), "float")
        assert np.array_equal(pose, np.broadcast_to(pose[:1], pose.shape))
        assert len(np.unique(pose[0], axis=0)) == 10
        way = np.linalg.norm(pose[0, -1, 3:] - pose[0, 0, 3:])
        assert 0.1 < way < 1.5
        middle = frame.global_from_vehicle.translation
        assert np.linalg.norm(pose[0, [0, -1], 3:].mean(0) - middle) < 0.02
        for other in message.inside(5)[1:]:
            assert not other.inside(2)[0].all(4)
        assert not message.inside(5)[0].inside(3)[0].all(4)  # second returns share the pose of the first


def test_intensity_elongation_and_the_zone_are_in_their_channels(pairs):
    for message, frame in pairs:
        polygon = message.inside(7)[0]
        np.testing.assert_array_equal(np.stack([polygon.doubles(1), polygon.doubles(2)], 1), frame.zone.outline)
        for name, images in zip(SHAPES, frame.lasers, strict=True):
            image = matrix(message.inside(5)[name - 1].inside(2)[0].data(2), "float")
            hit = image[..., 0] > 0
            assert (image[~hit] == -1).all()
            order = np.argsort(images.returns[0].pixel)
            assert np.array_equal(image[hit][:, 1], images.returns[0].intensity[order])
            assert np.array_equal(image[hit][:, 2], images.returns[0].elongation[order])
            points = frame.global_from_vehicle.apply(vehicle_points(message, name, 0))
            assert np.array_equal(image[hit][:, 3] == 1, frame.zone.contains(points[:, :2]))
            assert set(np.unique(image[hit][:, 3])) <= {-1.0, 1.0}


def test_labels_are_the_things_of_the_town_with_their_points_counted(pairs):
    for message, frame in pairs:
        labels = message.inside(6)
        assert len(labels) == len(frame.boxes) > 20
        by_laser = {name: np.concatenate([vehicle_points(message, name, k) for k in (0, 1)]) for name in SHAPES}
        every = np.concatenate(list(by_laser.values()))
        for row, label in enumerate(labels):
            box = label.inside(1)[0]
            x, y, z, width, length, height, heading = (box.double(k) for k in range(1, 8))
            assert [x, y, z, length, width, height] == [*frame.boxes.center[row], *frame.boxes.size[row]]
            assert -np.pi <= heading < np.pi
            assert np.isclose(np.exp(1j * heading), np.exp(1j * frame.boxes.yaw[row]))
            assert label.integer(3) == TYPES[frame.boxes.category[row]]

            def inside(points: np.ndarray, box=(x, y, z, length, width, height, heading)) -> int:
                close = np.abs(points[:, 0] - box[0]) < 15
                offset = points[close] - box[:3]
                c, s = np.cos(box[6]), np.sin(box[6])
                along = np.abs(np.stack([offset @ [c, s, 0], offset @ [-s, c, 0], offset[:, 2]], 1))
                return int((along <= np.array(box[3:6]) / 2).all(1).sum())

            assert label.integer(7) == inside(every) > 0
            assert label.integer(13) == inside(by_laser[1])
            hard = label.integer(7) <= 5
            assert [label.reader.signed(f) for f in label.all(5)] == ([2] if hard else [])
            globally = frame.global_from_vehicle.apply(np.array([[x, y, z]]))
            assert not frame.zone.contains(globally[:, :2])[0]


def test_speeds_are_how_far_objects_go_between_frames(dataset):
    """In the global frame: positions of the same object in two frames, each moved there by its frame's pose."""
    moved = 0
    for path in segments(dataset):
        place: list[dict[str, np.ndarray]] = []
        speed: dict[str, np.ndarray] = {}
        for _, payload in read_records(path):
            frame = Message.of(payload)
            pose = frame.inside(3)[0].doubles(1).reshape(4, 4)
            here = {}
            for label in frame.inside(6):
                box = label.inside(1)[0]
                here[label.text(4)] = (pose @ [box.double(1), box.double(2), box.double(3), 1.0])[:2]
                speed[label.text(4)] = np.array([label.inside(2)[0].double(k) for k in (1, 2)])
            place.append(here)
        errors = []
        for name in place[0].keys() & place[1].keys():
            gone = (place[1][name] - place[0][name]) / 0.1
            errors.append(np.abs(gone - speed[name]).max())
            moved += bool(np.linalg.norm(gone) > 1)
        # Long vehicles swing around their ground point at the corners of a way.
        assert np.median(errors) < 0.01
        assert np.max(errors) < 2.0
    assert moved > 10


def test_keyframes_have_classes_of_the_top_lidars_points_and_other_frames_none(pairs):
    for message, frame in pairs:
        for laser, images in zip(message.inside(5), frame.lasers, strict=True):
            for which in (0, 1):
                found = laser.inside(2 + which)[0].all(6)
                assert bool(found) == (images.laser.name == 1 and frame.index == 0)
                if not found:
                    continue
                image = matrix(laser.inside(2 + which)[0].data(6), "int")
                assert image.shape == (64, 2650, 2)
                hit = matrix(laser.inside(2 + which)[0].data(2), "float")[..., 0] > 0
                assert (image[~hit] == 0).all()
                assert images.classes is not None
                order = np.argsort(images.returns[which].pixel)
                assert np.array_equal(image[hit][:, 1], images.classes[which][order])
                assert np.array_equal(image[hit][:, 0], images.returns[which].instance[order])
                if which == 0:
                    assert {1, 7, 14, 15, 18, 22} <= set(np.unique(image[hit][:, 1]).tolist()) <= set(range(23))


def test_no_pixel_was_seen_by_a_camera(pairs):
    message, _ = pairs[0]
    for laser in message.inside(5):
        for number in (2, 3):
            image = matrix(laser.inside(number)[0].data(3), "int")
            assert image.shape == (*SHAPES[laser.integer(1)], 6)
            assert not image.any()


def test_the_golden_waymo_frame_has_the_same_fields_by_the_same_numbers(pairs):
    path = sample_path("waymo/frame_without_lasers/pvps_data_one_frame.tfrecord")
    (payload,) = (payload for _, payload in read_records(path))
    real, ours = Message.of(payload), pairs[0][0]

    def kinds(messages: list[Message]) -> dict[int, int]:
        return {field.number: field.wire_type for message in messages for field in message.list}

    def agree(a: list[Message], b: list[Message], *, more: set[int], fewer: set[int]) -> None:
        real_kinds, our_kinds = kinds(a), kinds(b)
        assert our_kinds.keys() - real_kinds.keys() == more
        assert real_kinds.keys() - our_kinds.keys() == fewer
        assert all(our_kinds[number] == kind for number, kind in real_kinds.items() if number in our_kinds)

    agree([real], [ours], more={7}, fewer={4, 8, 9})  # no images, no camera labels, no projected labels
    agree(real.inside(1), ours.inside(1), more=set(), fewer={2})
    for number, fewer in ((3, set[int]()), (4, {5})):
        agree(real.inside(1)[0].inside(number), ours.inside(1)[0].inside(number), more=set(), fewer=fewer)
    agree(real.inside(6), ours.inside(6), more={13}, fewer=set())
    for number in (1, 2):
        agree(
            [m for label in real.inside(6) for m in label.inside(number)],
            [m for label in ours.inside(6) for m in label.inside(number)],
            more=set(),
            fewer=set(),
        )
    for theirs, mine in zip(
        sorted(real.inside(1)[0].inside(3), key=lambda m: m.integer(1)), ours.inside(1)[0].inside(3), strict=True
    ):
        assert len(theirs.doubles(2)) == len(mine.doubles(2))
        # Mounted where the real ones are, looking the same way, to a few degrees and half a metre.
        a, b = (m.inside(5)[0].doubles(1).reshape(4, 4) for m in (theirs, mine))
        np.testing.assert_allclose(a[:3, :3], b[:3, :3], atol=0.05)
        np.testing.assert_allclose(a[:3, 3], b[:3, 3], atol=0.5)
