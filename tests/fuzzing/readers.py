"""Every reader of files that users bring, with small valid files of its kind: what fuzzing starts from."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow
import torch
from pyarrow import feather, parquet

from picture3d.datasets.log_file import LogHeader, LogReader, LogWriter
from picture3d.datasets.occupancy_store import KIND
from picture3d.formats.block_file import BlockFile, BlockWriter
from picture3d.formats.feather import read_feather
from picture3d.formats.nuscenes_results import read_labels, read_results
from picture3d.formats.nuscenes_tables import iterate_rows, read_panoptic
from picture3d.formats.openoccupancy import read_openoccupancy
from picture3d.formats.parquet import read_parquet
from picture3d.formats.pcd import read_pcd
from picture3d.formats.ply import read_ply
from picture3d.formats.point_tables import read_bin, read_npy
from picture3d.formats.tfrecord import RecordWriter, read_records, record_lengths
from picture3d.formats.waymo_objects import write_objects
from picture3d.formats.waymo_objects_reading import ObjectsFile, read_objects
from picture3d.training.checkpoint import save_checkpoint
from picture3d.training.weights_import import load_any_weights
from tests.datasets.made_frames import made_frame
from tests.formats import test_nuscenes_results, test_pcd, test_ply, test_waymo_frame, test_waymo_objects
from tests.made_waymo import small_frame

LAYOUT = ("x", "y", "z", "intensity")


@dataclass(frozen=True)
class Fuzzed:
    """A reader, and whole files it reads."""

    suffix: str
    files: tuple[bytes, ...]
    read: Callable[[Path], object]


def _written(write: Callable[[Path], object], suffix: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"file{suffix}"
        write(path)
        return path.read_bytes()


def _records(path: Path) -> None:
    with RecordWriter(path) as out:
        for seed in (1, 2):
            out.write(small_frame(np.random.default_rng(seed)).bytes())


def _log(path: Path) -> None:
    with LogWriter(path, LogHeader("log-a", "made")) as out:
        for index in range(2):
            out.add(made_frame("log-a", index))


def _read_log(path: Path) -> None:
    reader = LogReader(path)
    for index in range(len(reader)):
        reader.frame(index)


def _blocks(path: Path) -> None:
    with BlockWriter(path, KIND, {"log": "a"}) as out:
        out.add(3, b"some bytes", "token", 3)
        out.add(7, bytes(100))


def _read_blocks(path: Path) -> None:
    file = BlockFile(path, KIND)
    for number in file.blocks:
        file.read(number)


def _npy(array: np.ndarray) -> bytes:
    return _written(lambda path: np.save(path, array), ".npy")


def _objects() -> bytes:
    return _written(lambda path: write_objects(path, test_waymo_objects.some_objects(4)), ".bin")


def _read_by_segment(path: Path) -> None:
    file = ObjectsFile(path)
    for name in file.segments:
        file.read(name)


def _tables() -> Iterator[tuple[str, Fuzzed]]:
    table = pyarrow.table({"x": np.arange(5, dtype=np.float32), "n": np.arange(5)})
    kinds = {"x": "f", "n": "i"}
    files = [
        _written(lambda path, how=how: feather.write_feather(table, path, compression=how), ".feather")
        for how in ("lz4", "uncompressed")
    ]
    yield "feather", Fuzzed(".feather", tuple(files), lambda path: read_feather(path, kinds))
    one = _written(lambda path: parquet.write_table(table, path), ".parquet")
    yield "parquet", Fuzzed(".parquet", (one,), lambda path: read_parquet(path, kinds))
    results = {"results": {"a": [test_nuscenes_results.BOX], "b": []}, "meta": test_nuscenes_results.META}
    yield "nuscenes results", Fuzzed(".json", (json.dumps(results).encode(),), read_results)
    labels = {"results": {"a": [{**test_nuscenes_results.BOX, "num_lidar_pts": 3, "ego_translation": [1, 2, 3]}]}, "meta": {}}
    yield "nuscenes labels", Fuzzed(".json", (json.dumps(labels).encode(),), read_labels)
    rows = [{"token": "a", "n": 1.5, "deep": {"list": [1, None, "é"]}}, {"token": "b"}]
    yield "nuscenes table", Fuzzed(".json", (json.dumps(rows).encode(),), lambda path: list(iterate_rows(path)))


def _points() -> Iterator[tuple[str, Fuzzed]]:
    rows = np.arange(20, dtype=np.float32).reshape(5, 4)
    writers = (test_pcd.ascii_file, test_pcd.binary_file, test_pcd.compressed_file)
    yield "pcd", Fuzzed(".pcd", tuple(write(test_pcd.points(6)) for write in writers), read_pcd)
    forms = ("ascii", "binary_little_endian", "binary_big_endian")
    yield "ply", Fuzzed(".ply", tuple(test_ply.ply(form) for form in forms), read_ply)
    yield "bin", Fuzzed(".bin", (rows.tobytes(),), lambda path: read_bin(path, LAYOUT))
    yield "npy", Fuzzed(".npy", (_npy(rows),), lambda path: read_npy(path, LAYOUT))
    ids = _written(lambda path: np.savez_compressed(path, data=np.arange(9)), ".npz")
    yield "panoptic", Fuzzed(".npz", (ids,), read_panoptic)
    yield "openoccupancy", Fuzzed(".npy", (_npy(np.array([[1, 2, 3, 4], [1, 2, 4, 16]])),), read_openoccupancy)


def _others() -> Iterator[tuple[str, Fuzzed]]:
    yield "tfrecord", Fuzzed(".tfrecord", (_written(_records, ".tfrecord"),), lambda path: list(read_records(path)))
    yield "tfrecord lengths", Fuzzed(".tfrecord", (_written(_records, ".tfrecord"),), lambda path: list(record_lengths(path)))
    frame = small_frame(np.random.default_rng(5)).bytes()
    yield "waymo frame", Fuzzed(".bin", (frame,), lambda path: test_waymo_frame.read_all(path.read_bytes()))
    yield "waymo objects", Fuzzed(".bin", (_objects(), test_waymo_objects.odd_file(1, 6)), read_objects)
    yield "waymo objects by segment", Fuzzed(".bin", (_objects(),), _read_by_segment)
    yield "log", Fuzzed(".p3d", (_written(_log, ".p3d"),), _read_log)
    yield "blocks", Fuzzed(".occ", (_written(_blocks, ".occ"),), _read_blocks)
    weights = torch.arange(6.0)
    foreign = _written(lambda path: torch.save({"model_state": {"a.weight": weights}}, path), ".pth")
    yield "openpcdet checkpoint", Fuzzed(".pth", (foreign,), load_any_weights)
    own = _written(lambda path: save_checkpoint(path, {"model.a.weight": weights}, {"step": 1}), ".safetensors")
    yield "checkpoint", Fuzzed(".safetensors", (own,), load_any_weights)


READERS: dict[str, Fuzzed] = dict((*_points(), *_tables(), *_others()))


_HUGE = (b"\xff\xff\xff\x7f", b"\xff" * 8, b"\x00\x00\x00\x80", b"9" * 12, b"\xff\xff\xff\xff\x0f", b"-1", b"1e999")


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """A copy with one to four damages: bits, bytes, huge numbers, pieces cut, doubled or put in."""
    out = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        at = int(rng.integers(0, len(out) + 1))
        match int(rng.integers(0, 7)):
            case 0 if at < len(out):
                out[at] ^= 1 << int(rng.integers(0, 8))
            case 1 if at < len(out):
                out[at] = int(rng.choice([0, 1, 0x7F, 0x80, 0xFF, 0x30, 0x39, 0x2D]))
            case 2:
                huge = [
                    b"\xff\xff\xff\x7f",
                    b"\xff" * 8,
                    b"\x00\x00\x00\x80",
                    b"9" * 12,
                    b"\xff\xff\xff\xff\x0f",
                    b"-1",
                    b"1e999",
                ]
                piece = huge[int(rng.integers(0, len(huge)))]
                out[at : at + len(piece)] = piece
            case 3:
                del out[at:]
            case 4:
                del out[at : at + int(rng.integers(1, 40))]
            case 5:
                out[at:at] = out[at : at + int(rng.integers(1, 60))]
            case _:
                out[at:at] = rng.bytes(int(rng.integers(1, 20)))
    return bytes(out)
