from __future__ import annotations

import json
import os
import pickle
import tempfile
import tracemalloc
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from picture3d.datasets import log_file
from picture3d.datasets.log_file import LogHeader, LogReader, LogWriter, check_log_name
from picture3d.errors import DataError
from picture3d.formats import framed_file
from picture3d.formats.columns import Codec, CodecKind
from picture3d.structures.boxes import Boxes
from picture3d.structures.frame import Frame
from picture3d.structures.points import PointCloud
from picture3d.structures.poses import Pose
from tests.datasets.made_frames import made_boxes, made_frame, write_log


def assert_equal(found: Any, expected: Any, name: str = "frame") -> None:
    """Every field, to the last bit; NaN equals NaN."""
    assert type(found) is type(expected), name
    if isinstance(expected, Frame | PointCloud | Boxes | Pose):
        for field in fields(expected):
            assert_equal(getattr(found, field.name), getattr(expected, field.name), f"{name}.{field.name}")
    elif isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype, name
        np.testing.assert_array_equal(found, expected, err_msg=name)
    else:
        assert found == expected, name


VARIANTS = {
    "everything": {},
    "nothing optional": {"labels": None, "instances": None, "boxes": None, "global_from_ego": None, "previous": ()},
    "no boxes in an annotated frame": {"boxes": Boxes.empty()},
    "not a keyframe": {"is_keyframe": False},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("points", [0, 1, 500])
def test_every_field_of_a_frame_comes_back(tmp_path, changes, points):
    frames = [made_frame(index=index, points=points, **changes) for index in range(3)]
    reader = LogReader(write_log(tmp_path, frames))
    assert len(reader) == 3
    for index in (2, 0, 1):
        assert_equal(reader.frame(index), frames[index])


def test_a_frame_without_optional_point_columns_comes_back(tmp_path):
    frame = made_frame()
    frame = replace(frame, points=replace(frame.points, ring=None, elongation=None, time_s=None))
    assert_equal(LogReader(write_log(tmp_path, [frame])).frame(0), frame)


def test_header_and_summary_say_what_the_log_holds(tmp_path):
    frames = [made_frame(index=i, points=10 + i, is_keyframe=i % 2 == 0, labels=None) for i in range(5)]
    reader = LogReader(write_log(tmp_path, frames, source={"sweeps": 9, "nested": [1, {"a": None}]}))
    assert reader.header.source == {"sweeps": 9, "nested": [1, {"a": None}]}
    assert reader.keyframes == (0, 2, 4)
    assert (reader.summary.points, reader.summary.labelled, reader.summary.boxes) == (60, 0, 15)
    assert reader.summary.bytes == reader.path.stat().st_size
    assert reader.num_points(3) == 13


def test_the_same_frames_give_the_same_bytes(tmp_path):
    frames = [made_frame(index=i) for i in range(3)]
    assert write_log(tmp_path / "a", frames).read_bytes() == write_log(tmp_path / "b", frames).read_bytes()


def test_only_the_columns_asked_for_are_read(tmp_path, monkeypatch):
    frames = [made_frame(index=i, points=2000) for i in range(20)]
    reader = LogReader(write_log(tmp_path, frames))
    read: list[tuple[int, int]] = []
    preadv = os.preadv

    def counting(handle: int, buffers: list[memoryview], offset: int) -> int:
        read.append((offset, sum(len(buffer) for buffer in buffers)))
        return preadv(handle, buffers, offset)

    monkeypatch.setattr(framed_file.os, "preadv", counting)
    frame = reader.frame(7, columns=["labels"])
    assert frame.points.ring is None
    assert frame.boxes is None
    assert frame.instances is None
    assert frame.labels is not None
    some = sum(length for _, length in read)
    assert len(read) == 4  # the record, xyz, intensity, labels
    read.clear()
    reader.frame(7)
    everything = sum(length for _, length in read)
    assert some < everything < reader.summary.bytes / 15


def test_an_unknown_column_is_a_mistake_of_the_caller(tmp_path):
    with pytest.raises(ValueError, match="colour"):
        LogReader(write_log(tmp_path, [made_frame()])).frame(0, columns=["colour"])


def test_a_log_without_frames_is_a_log(tmp_path):
    reader = LogReader(write_log(tmp_path, []))
    assert len(reader) == 0
    with pytest.raises(DataError, match="no frame 0"):
        reader.frame(0)


def test_every_flipped_byte_is_noticed(tmp_path):
    """The checksums leave no byte of the file out: wherever one bit changes, opening or reading fails with our own error."""
    path = write_log(tmp_path, [made_frame(points=3, boxes=made_boxes(np.random.default_rng(0), 1), instances=None)])
    original = path.read_bytes()
    with path.open("r+b", buffering=0) as file:
        for at, byte in enumerate(original):
            os.pwrite(file.fileno(), bytes([byte ^ 1 << (at % 8)]), at)
            with pytest.raises(DataError, match=r"log-a\.p3d"):
                LogReader(path).verify()
            os.pwrite(file.fileno(), bytes([byte]), at)
    LogReader(path).verify()


def test_a_log_cut_off_anywhere_is_noticed(tmp_path):
    path = write_log(tmp_path, [made_frame(points=4)])
    original = path.read_bytes()
    for end in range(0, len(original), 5):
        path.write_bytes(original[:end])
        with pytest.raises(DataError, match=r"log-a\.p3d"):
            LogReader(path)


def test_damage_is_named_by_frame_column_and_byte(tmp_path):
    path = write_log(tmp_path, [made_frame(index=i) for i in range(3)])
    record = bytes(path.read_bytes())
    start = record.index(b'{"token":"log-a-1')
    chunk = json.JSONDecoder().raw_decode(record[start:].decode("latin-1"))[0]["columns"]["labels"]
    damaged = bytearray(record)
    damaged[chunk["offset"] + 2] ^= 255
    path.write_bytes(damaged)
    reader = LogReader(path)
    reader.frame(0)
    reader.frame(1, columns=[])
    with pytest.raises(DataError, match=rf"frame 1, column labels: the {chunk['length']} bytes at byte {chunk['offset']} "):
        reader.frame(1)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 100_000), st.binary(min_size=1, max_size=3))
def test_a_forged_file_whose_checksums_fit_gives_a_frame_or_our_own_error(at, patch):
    """Whoever writes a bad file can write its checksums too: here they are switched off, so that every parser is reached."""
    with pytest.MonkeyPatch.context() as patched, tempfile.TemporaryDirectory() as folder:
        patched.setattr(log_file.google_crc32c, "value", lambda data: 0)
        path = write_log(
            Path(folder), [made_frame(index=i, points=2, boxes=made_boxes(np.random.default_rng(0), 1)) for i in range(2)]
        )
        content = bytearray(path.read_bytes())
        at %= len(content)
        content[at : at + len(patch)] = patch
        path.write_bytes(content)
        with suppress(DataError):
            LogReader(path).verify()


def test_a_newer_version_is_refused_in_words(tmp_path, monkeypatch):
    monkeypatch.setattr(log_file, "KIND", replace(log_file.KIND, version=9))
    path = write_log(tmp_path, [made_frame()])
    monkeypatch.undo()
    with pytest.raises(DataError, match="format version 9, this picture3d reads version 1"):
        LogReader(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"log": "other"},
        {"index": 1},
        {"previous": (0,)},
        {"previous": (-1,)},
        {"global_from_ego": Pose(np.eye(3), np.array([np.nan, 0, 0]))},
        {"labels": np.zeros(40, np.int64)},
    ],
)
def test_a_frame_that_does_not_belong_is_refused(tmp_path, changes):
    with pytest.raises(DataError, match=r"log-a\.p3d: frame"):
        write_log(tmp_path, [made_frame(**changes)])
    assert list((tmp_path / "logs").iterdir()) == []


def test_points_that_are_not_finite_are_refused(tmp_path):
    frame = made_frame()
    frame.points.xyz[3, 1] = np.nan
    with pytest.raises(DataError, match="column xyz: holds NaN"):
        write_log(tmp_path, [frame])


def test_an_error_while_writing_leaves_no_file(tmp_path):
    def write_and_fail() -> None:
        with LogWriter(tmp_path / "a.p3d", LogHeader("log-a", "made")) as log:
            log.add(made_frame())
            raise KeyError("stop")

    with pytest.raises(KeyError):
        write_and_fail()
    assert list(tmp_path.iterdir()) == []


def test_the_lossy_codec_moves_points_by_half_a_step_at_most(tmp_path):
    frame = made_frame(points=300)
    with LogWriter(tmp_path / "log-a.p3d", LogHeader("log-a", "made"), xyz_codec=Codec(CodecKind.GRID, 0.001)) as log:
        log.add(frame)
    back = LogReader(tmp_path / "log-a.p3d").frame(0)
    assert 0 < np.abs(back.points.xyz - frame.points.xyz).max() <= 0.00051
    assert_equal(replace(back, points=replace(back.points, xyz=frame.points.xyz)), frame)


def test_a_reader_survives_being_sent_to_another_process(tmp_path):
    reader = LogReader(write_log(tmp_path, [made_frame()]))
    again = pickle.loads(pickle.dumps(reader))
    assert_equal(again.frame(0), reader.frame(0))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_reader_survives_a_fork(tmp_path):
    frames = [made_frame(index=i, points=2000) for i in range(10)]
    reader = LogReader(write_log(tmp_path, frames))
    child = os.fork()
    failed = False
    try:
        for _ in range(5):
            reader.verify()
    except Exception:
        failed = True
    if child == 0:
        os._exit(int(failed))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert not failed


def test_memory_while_writing_does_not_grow_with_frames(tmp_path):
    frame = made_frame(points=5000, previous=())

    def peak(frames: int) -> int:
        tracemalloc.start()
        with LogWriter(tmp_path / "log-a.p3d", LogHeader("log-a", "made")) as log:
            for index in range(frames):
                log.add(replace(frame, index=index))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    few, many = peak(10), peak(110)
    assert many - few < 100 * 1000  # the index alone: some hundred bytes a frame, against 160 kB of points


@pytest.mark.parametrize("name", ["", ".hidden", "..", "a/b", "a\\b", "a\0b", "x" * 300, "a:b"])
def test_a_name_that_could_leave_the_folder_is_refused(name):
    with pytest.raises(DataError, match="cannot name a log"):
        check_log_name(name)
