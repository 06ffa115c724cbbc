"""Valid files with flipped bits, cut ends, inserted bytes and absurd sizes: points or our own error, in bounded memory."""

from __future__ import annotations

import json
import tempfile
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from picture3d.datasets.log_file import LogReader
from picture3d.errors import DataError
from picture3d.formats.nuscenes_results import read_labels, read_results
from picture3d.formats.openoccupancy import OccupiedVoxels, read_openoccupancy, write_openoccupancy
from picture3d.formats.pcd import read_pcd
from picture3d.formats.ply import read_ply
from picture3d.formats.point_tables import read_bin, read_npy
from picture3d.formats.tfrecord import RecordWriter, read_records, record_lengths
from picture3d.formats.waymo_objects import make_objects, write_objects
from picture3d.formats.waymo_objects_reading import read_objects
from tests.datasets.made_frames import made_boxes, made_frame, write_log
from tests.formats import test_nuscenes_results, test_pcd, test_ply, test_waymo_frame

MAX_PEAK_BYTES = 64 << 20  # the largest of the files below has some kilobytes
LAYOUT = ("x", "y", "z", "intensity")


def _bytes_of(write: Callable[[Path], Any]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a")
        made = write(path)
        return (made if isinstance(made, Path) else path).read_bytes()


def _records(path: Path) -> None:
    with RecordWriter(path) as writer:
        for payload in (b"", b"one", bytes(range(200))):
            writer.write(payload)


def _npy(path: Path) -> Path:
    np.save(path.with_suffix(".npy"), np.arange(20, dtype=np.float32).reshape(5, 4))
    return path.with_suffix(".npy")


def _voxels(path: Path) -> None:
    write_openoccupancy(path, OccupiedVoxels(np.arange(12, dtype=np.int16).reshape(4, 3), np.arange(1, 5, dtype=np.uint8)))


def _log(path: Path) -> Path:
    return write_log(
        path.parent, [made_frame(index=i, points=3, boxes=made_boxes(np.random.default_rng(0), 1)) for i in range(2)]
    )


def _objects(path: Path) -> None:
    write_objects(path, make_objects(np.arange(14.0).reshape(2, 7) + 1, np.array([1, 2]), "segment", 7))


def _results(path: Path) -> None:
    path.write_text(
        json.dumps(
            {
                "results": {"a": [test_nuscenes_results.BOX | {"num_lidar_pts": 3, "num_radar_pts": 0}]},
                "meta": test_nuscenes_results.META,
            }
        )
    )


READERS: dict[str, tuple[Callable[[], bytes], Callable[[Path], object]]] = {
    "records": (lambda: _bytes_of(_records), lambda path: [list(read_records(path)), list(record_lengths(path))]),
    "waymo frame": (lambda: test_waymo_frame.WHOLE, lambda path: test_waymo_frame.read_all(path.read_bytes())),
    "pcd ascii": (lambda: test_pcd.ascii_file(test_pcd.points(4)), read_pcd),
    "pcd binary": (lambda: test_pcd.binary_file(test_pcd.points(4)), read_pcd),
    "pcd compressed": (lambda: test_pcd.compressed_file(test_pcd.points(4)), read_pcd),
    "ply ascii": (lambda: test_ply.ply("ascii"), read_ply),
    "ply binary": (lambda: test_ply.ply("binary_big_endian"), read_ply),
    "npy": (lambda: _bytes_of(_npy), lambda path: read_npy(path, LAYOUT)),
    "bin": (lambda: bytes(160), lambda path: read_bin(path, LAYOUT)),
    "occupancy": (lambda: _bytes_of(_voxels), read_openoccupancy),
    "waymo objects": (lambda: _bytes_of(_objects), read_objects),
    "nuscenes results": (lambda: _bytes_of(_results), read_results),
    "nuscenes labels": (lambda: _bytes_of(_results), read_labels),
    "prepared log": (lambda: _bytes_of(_log), lambda path: LogReader(path).verify()),
}


@cache
def whole(name: str) -> bytes:
    return READERS[name][0]()


SIZES = [0, 1, 127, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1]
Change = tuple[str, float, int, bytes]
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "remove", "size", "digits"]),
        st.floats(0, 1, exclude_max=True),
        st.integers(0, 63),
        st.binary(min_size=1, max_size=8),
    ),
    min_size=1,
    max_size=4,
)


def changed(data: bytes, changes: list[Change]) -> bytes:
    out = bytearray(data)
    for kind, where, choice, patch in changes:
        at = int(where * len(out))
        size = SIZES[choice % len(SIZES)]
        match kind:
            case "flip" if out:
                out[at] ^= 1 << choice % 8
            case "cut":
                del out[at:]
            case "insert":
                out[at:at] = patch
            case "remove":
                del out[at : at + len(patch)]
            case "size":
                width = 8 if size >= 2**32 else 4
                out[at : at + width] = size.to_bytes(width, "little")
            case "digits":  # in the headers that are text
                out[at : at + 1] = str(size).encode()
    return bytes(out)


def read_changed(name: str, changes: list[Change]) -> None:
    data = changed(whole(name), changes)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.npy" if name == "npy" else "a.bin")
        path.write_bytes(data)
        tracemalloc.start()
        try:
            with suppress(DataError):
                READERS[name][1](path)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < MAX_PEAK_BYTES, f"{peak} bytes for a file of {len(data)}"


@pytest.mark.parametrize("name", READERS)
def test_the_files_that_are_changed_below_can_be_read(tmp_path, name):
    path = tmp_path / ("a.npy" if name == "npy" else "a.bin")
    path.write_bytes(whole(name))
    READERS[name][1](path)


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("name", READERS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(changes=CHANGES)
def test_a_changed_file_is_read_or_refused_in_words_in_bounded_memory(name, changes):
    read_changed(name, changes)


@pytest.mark.long
@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("name", READERS)
@settings(max_examples=3000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(changes=CHANGES)
def test_thousands_of_changed_files_are_read_or_refused_in_words(name, changes):
    read_changed(name, changes)
