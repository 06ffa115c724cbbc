"""nuScenes-Occupancy labels attached to prepared frames: nothing lost, nothing mixed up, resumable."""

from __future__ import annotations

import errno
import json
import pickle
import shutil
import tracemalloc
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from picture3d.datasets.check import check_prepared
from picture3d.datasets.check_occupancy import with_occupancy
from picture3d.datasets.nuscenes import prepare_nuscenes
from picture3d.datasets.occupancy_store import KIND, OccupancyStore, has_occupancy, occupancy_path, read_occupancy
from picture3d.datasets.openoccupancy import NUSCENES_OCCUPANCY, OccupancySummary, attach_occupancy
from picture3d.datasets.prepared import FrameKey, PreparedDataset
from picture3d.errors import DataError
from picture3d.formats.block_file import BlockFile, BlockWriter
from picture3d.structures.occupancy import IGNORED
from tests.datasets.made_frames import made_frame, write_made_dataset
from tests.datasets.occupancy_labels import FOLDER, label_path, label_rows, prepared_world, write_labels
from tests.datasets.raw_nuscenes import RawWorld


@pytest.fixture
def world(tmp_path) -> RawWorld:
    return prepared_world(tmp_path)[0]


def attach(tmp_path: Path, labels: Path | None = None) -> OccupancySummary:
    return attach_occupancy(labels or tmp_path, PreparedDataset(tmp_path / "prepared"))


def kinds(root: Path) -> dict[str, int]:
    """What is found, but for what random labels always are: elsewhere than the points."""
    findings = with_occupancy(check_prepared(root)).findings
    return {finding.kind: finding.count for finding in findings if finding.kind != "occupancy-elsewhere"}


def test_every_voxel_of_every_file_comes_back_at_its_keyframe(world, tmp_path):
    summary = attach(tmp_path)
    assert (summary.logs, summary.logs_made, summary.keyframes, summary.labelled) == (2, 2, 6, 6)
    assert (summary.voxels, summary.other_files, summary.set_aside) == (6 * 400, 0, ())
    assert summary.label_bytes == 6 * label_path(tmp_path, 0, 0).stat().st_size
    dataset, store = PreparedDataset(tmp_path / "prepared"), OccupancyStore(tmp_path / "prepared")
    assert summary.bytes == sum(occupancy_path(dataset.root, log).stat().st_size for log in dataset.logs())
    for key in reversed(dataset.keyframes()):
        found = store.of(dataset.frame(key))
        assert found is not None
        scene = int(key.log[-4:]) - 1
        expected = {(x, y, z): IGNORED if label == 0 else label for z, y, x, label in label_rows(scene, key.index).tolist()}
        assert dict(zip(map(tuple, found.index.tolist()), found.label.tolist(), strict=True)) == expected
        assert (found.grid.shape, found.grid.origin, found.grid.cell_m) == ((512, 512, 40), (-51.2, -51.2, -5.0), 0.2)
    assert store.of(dataset.frame(FrameKey("scene-0001", 1))) is None  # a sweep
    assert store.labelled("scene-0001") == (0, 3, 6)


def test_the_folder_of_the_labels_or_the_one_around_it_may_be_named(world, tmp_path):
    assert attach(tmp_path, tmp_path / FOLDER).labelled == 6
    assert attach(tmp_path, tmp_path).logs_made == 0


def test_keyframes_without_a_file_are_counted_and_files_without_a_keyframe_too(world, tmp_path):
    label_path(tmp_path, 0, 3).rename(label_path(tmp_path, 0, 99))
    shutil.rmtree(tmp_path / FOLDER / "scene_s1")
    summary = attach(tmp_path)
    assert (summary.logs, summary.keyframes, summary.labelled, summary.other_files) == (2, 6, 2, 1)
    dataset, store = PreparedDataset(tmp_path / "prepared"), OccupancyStore(tmp_path / "prepared")
    assert store.labelled("scene-0001") == (0, 6)
    assert store.labelled("scene-0002") == ()
    assert store.of(dataset.frame(FrameKey("scene-0001", 3))) is None
    assert store.of(dataset.frame(FrameKey("scene-0002", 0))) is None
    assert not occupancy_path(dataset.root, "scene-0002").exists()
    assert kinds(dataset.root) == {"occupancy-partly": 1}


def test_an_empty_label_file_is_a_labelled_frame_with_nothing_in_it(world, tmp_path):
    np.save(label_path(tmp_path, 0, 0), np.zeros((0, 4), np.int64))
    assert attach(tmp_path).labelled == 6
    found = OccupancyStore(tmp_path / "prepared").read("scene-0001", 0, "s0-d0")
    assert found is not None
    assert len(found) == 0


def test_a_rerun_makes_only_logs_whose_label_files_changed(world, tmp_path):
    attach(tmp_path)
    paths = [occupancy_path(tmp_path / "prepared", f"scene-000{k}") for k in (1, 2)]
    before = [path.stat().st_mtime_ns for path in paths]
    whole = paths[1].read_bytes()
    assert attach(tmp_path).logs_made == 0
    assert [path.stat().st_mtime_ns for path in paths] == before
    np.save(label_path(tmp_path, 1, 6), label_rows(1, 6)[:100])
    assert attach(tmp_path).logs_made == 1
    assert paths[0].stat().st_mtime_ns == before[0]
    np.save(label_path(tmp_path, 1, 6), label_rows(1, 6))
    attach(tmp_path)
    assert paths[1].read_bytes() == whole


class Stop(BaseException):
    """Stands for a signal."""


def test_a_run_that_was_killed_goes_on_and_ends_with_the_same_bytes(world, tmp_path):
    attach(tmp_path)
    folder = tmp_path / "prepared" / "occupancy"
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    shutil.rmtree(folder)

    def stop(done: int, total: int) -> None:
        if done == 4:
            raise Stop

    with pytest.raises(Stop):
        attach_occupancy(tmp_path, PreparedDataset(tmp_path / "prepared"), progress=stop)
    assert [path.name for path in folder.iterdir()] == ["scene-0001.occ"]
    assert not has_occupancy(tmp_path / "prepared")
    with pytest.raises(DataError, match="no occupancy labels are attached"):
        OccupancyStore(tmp_path / "prepared")
    assert attach(tmp_path).logs_made == 1
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole


def test_a_damaged_label_file_sets_its_log_aside_and_the_others_go_on(world, tmp_path):
    path = label_path(tmp_path, 0, 3)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    summary = attach(tmp_path)
    assert (summary.logs, summary.labelled, len(summary.set_aside)) == (1, 3, 1)
    assert str(path) in summary.set_aside[0]
    assert "Unpack this file" in summary.set_aside[0]
    store = OccupancyStore(tmp_path / "prepared")
    with pytest.raises(DataError, match="label file of it could not be read"):
        store.labelled("scene-0001")
    assert kinds(tmp_path / "prepared") == {"occupancy-set-aside": 1}
    path.write_bytes(whole)
    summary = attach(tmp_path)
    assert (summary.logs, summary.logs_made, summary.labelled, summary.set_aside) == (2, 1, 6, ())


def test_a_full_disk_is_no_damaged_label(world, tmp_path, monkeypatch):
    def full(self: BlockWriter, number: int, data: bytes, *about: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(BlockWriter, "add", full)
    with pytest.raises(DataError, match="No space left on device"):
        attach(tmp_path)
    assert list((tmp_path / "prepared" / "occupancy").iterdir()) == []
    monkeypatch.undo()
    assert attach(tmp_path).labelled == 6


@pytest.mark.parametrize(
    ("row", "words"),
    [([0, 0, 512, 4], "outside of the grid"), ([40, 0, 0, 4], "outside of the grid"), ([0, 0, 0, 40], "has a class")],
)
def test_labels_of_another_grid_or_other_classes_are_refused_in_words(world, tmp_path, row, words):
    for scene in (0, 1):
        np.save(label_path(tmp_path, scene, 0), np.array([row]))
    with pytest.raises(DataError, match=words):
        attach(tmp_path)
    assert not has_occupancy(tmp_path / "prepared")


def test_labels_of_other_frames_are_refused_in_words(world, tmp_path):
    for number in (0, 3, 6):
        label_path(tmp_path, 1, number).rename(label_path(tmp_path, 1, number + 100))
    with pytest.raises(DataError, match=r"none of its 3 files is named after a keyframe of log 'scene-0002'"):
        attach(tmp_path)
    for scene in (0, 1):
        (tmp_path / FOLDER / f"scene_s{scene}").rename(tmp_path / FOLDER / f"scene_t{scene}")
    with pytest.raises(DataError, match="no label file for any keyframe"):
        attach(tmp_path)
    with pytest.raises(DataError, match=r"holds no folder scene_<token>"):
        attach(tmp_path, tmp_path / "raw")
    with pytest.raises(DataError, match=r"holds no folder scene_<token>"):
        attach(tmp_path, tmp_path / "nowhere")


def test_frames_of_another_dataset_are_refused_in_words(tmp_path):
    write_made_dataset(tmp_path / "prepared", {"log-a": [made_frame()]})
    label_path(tmp_path, 0, 0).parent.mkdir(parents=True)
    with pytest.raises(DataError, match="does not say which nuScenes scene it is"):
        attach(tmp_path)


def test_frames_prepared_anew_do_not_get_the_labels_of_others(world, tmp_path):
    attach(tmp_path)
    shutil.rmtree(tmp_path / "raw")
    other = RawWorld(tmp_path / "raw", keyframes=4, between=1)
    other.write()
    prepare_nuscenes(other.root, tmp_path / "prepared")
    dataset, store = PreparedDataset(tmp_path / "prepared"), OccupancyStore(tmp_path / "prepared")
    assert store.of(dataset.frame(FrameKey("scene-0001", 0))) is not None  # the same sweep still
    assert store.of(dataset.frame(FrameKey("scene-0001", 6))) is not None
    assert kinds(dataset.root) == {"occupancy-foreign": 1, "occupancy-partly": 1}  # frame 3 is no keyframe any more
    with pytest.raises(DataError, match="belong to sweep s0-d0, the frame is sweep s9-d0"):
        store.read("scene-0001", 0, "s9-d0")
    shutil.rmtree(tmp_path / FOLDER)
    write_labels(other, tmp_path)
    assert attach(tmp_path).labelled == 8
    assert kinds(dataset.root) == {}


def test_files_of_logs_that_are_gone_are_removed(world, tmp_path):
    attach(tmp_path)
    folder = tmp_path / "prepared" / "occupancy"
    shutil.copy(folder / "scene-0001.occ", folder / "scene-0009.occ")
    attach(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["occupancy.json", "scene-0001.occ", "scene-0002.occ"]


def test_every_kind_of_damage_to_the_store_is_told(world, tmp_path):
    attach(tmp_path)
    root = tmp_path / "prepared"
    path = occupancy_path(root, "scene-0001")
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[100] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=r"block 0: the \d+ bytes at byte 16 do not match their checksum"):
        OccupancyStore(root).read("scene-0001", 0, "s0-d0")
    assert kinds(root) == {"damaged": 1}
    path.write_bytes(whole[:-1])
    assert kinds(root) == {"damaged": 1}
    shutil.copy(occupancy_path(root, "scene-0002"), path)
    with pytest.raises(DataError, match="is not the file that occupancy"):
        OccupancyStore(root).labelled("scene-0001")
    path.unlink()
    with pytest.raises(DataError, match="no such file"):
        OccupancyStore(root).labelled("scene-0001")
    assert attach(tmp_path).logs_made == 1
    assert path.read_bytes() == whole


def test_a_garbled_summary_is_told(world, tmp_path):
    attach(tmp_path)
    path = tmp_path / "prepared" / "occupancy" / "occupancy.json"
    tree = json.loads(path.read_text())
    path.write_text(json.dumps({**tree, "version": 9}))
    with pytest.raises(DataError, match="version 9"):
        OccupancyStore(tmp_path / "prepared")
    path.write_text(json.dumps({**tree, "grid": {"shape": [1, 2]}}))
    with pytest.raises(DataError, match="lacks or garbles"):
        OccupancyStore(tmp_path / "prepared")
    assert kinds(tmp_path / "prepared") == {"damaged": 1}
    path.write_text(json.dumps({**tree, "logs": {}}))
    with pytest.raises(DataError, match="it was prepared since"):
        OccupancyStore(tmp_path / "prepared").labelled("scene-0001")


def test_sound_labels_are_counted_by_the_check(world, tmp_path):
    root = tmp_path / "prepared"
    plain = check_prepared(root)
    assert with_occupancy(plain) is plain
    attach(tmp_path)
    report = with_occupancy(check_prepared(root))
    assert report.sound
    assert {finding.kind for finding in report.findings} == {"occupancy-elsewhere"}  # the made labels are random
    assert report.counts == {**plain.counts, "occupancy keyframes": 6, "occupied voxels": 2400}


def test_a_store_goes_to_other_processes_and_keeps_few_files_open(world, tmp_path):
    attach(tmp_path)
    store = pickle.loads(pickle.dumps(OccupancyStore(tmp_path / "prepared", open_files=1)))
    for log, scene in (("scene-0001", 0), ("scene-0002", 1), ("scene-0001", 0)):
        found = store.read(log, 3, f"s{scene}-d3")
        assert found is not None
        assert len(found) == 400
    assert len(store._files) == 1


def test_memory_does_not_grow_with_the_logs(tmp_path):
    def peak(folder: Path, scenes: int) -> int:
        _, prepared = prepared_world(folder, scenes=scenes, keyframes=4, between=0, points=3)
        dataset = PreparedDataset(prepared, open_logs=1)
        tracemalloc.start()
        attach_occupancy(folder, dataset)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(tmp_path / "warm", 1)
    few, many = peak(tmp_path / "few", 2), peak(tmp_path / "many", 22)
    assert many - few < 20 * 8000  # some 3 kB of summary a log; its label files are 51,712 bytes


@given(st.binary(max_size=60), st.integers(-5, 1 << 40), st.integers(-5, 100), st.booleans())
@example(zlib.compress(bytes(1 << 20)), 1 << 18, 1 << 10, False)
@example(zlib.compress(bytes(4 * 7)) + zlib.compress(bytes(7)), 7, len(zlib.compress(bytes(4 * 7))), False)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_blocks_with_a_right_checksum_and_any_content_give_only_our_own_error(tmp_path, data, count, split, packed):
    with BlockWriter(tmp_path / "a.occ", KIND, {}) as out:
        out.add(0, zlib.compress(data) if packed else data, "token", count, split)
    file = BlockFile(tmp_path / "a.occ", KIND)
    with suppress(DataError):
        found = read_occupancy(file, 0, NUSCENES_OCCUPANCY)
        assert len(found) == count


@pytest.mark.parametrize("about", [(), ("token",), ("token", "many", 3), ("token", 1, 2, 3), ("token", None, None)])
def test_a_garbled_row_of_the_index_is_told(tmp_path, about):
    with BlockWriter(tmp_path / "a.occ", KIND, {}) as out:
        out.add(0, b"", *about)
    with pytest.raises(DataError, match="frame 0"):
        read_occupancy(BlockFile(tmp_path / "a.occ", KIND), 0, NUSCENES_OCCUPANCY)
