"""Block files: what was written comes back, and no flipped byte goes unnoticed."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from picture3d.errors import DataError
from picture3d.formats.block_file import BlockFile, BlockWriter
from picture3d.formats.framed_file import FramedKind

KIND = FramedKind(b"P3DTEST\n", 3, "a test file", "Make it anew.")
BLOCKS = {0: b"first", 4: b"", 7: bytes(range(256))}


def written(path: Path) -> Path:
    with BlockWriter(path, KIND, {"name": "x", "sizes": [1, 2]}) as out:
        for number, data in BLOCKS.items():
            out.add(number, data, "note", number)
    return path


def read_all(path: Path) -> dict[int, bytes]:
    file = BlockFile(path, KIND)
    return {number: file.read(number) for number in file.blocks}


def test_blocks_come_back_by_number_with_their_notes(tmp_path):
    file = BlockFile(written(tmp_path / "a.blk"), KIND)
    assert file.header == {"name": "x", "sizes": [1, 2]}
    assert list(file.blocks) == list(BLOCKS)
    assert file.read(7) == BLOCKS[7]
    assert file.read(4) == b""
    assert file.blocks[7].about == ("note", 7)
    assert file.size == (tmp_path / "a.blk").stat().st_size
    with pytest.raises(DataError, match="no block 1"):
        file.read(1)


def test_a_file_without_blocks_is_a_file(tmp_path):
    with BlockWriter(tmp_path / "a.blk", KIND, {}):
        pass
    assert BlockFile(tmp_path / "a.blk", KIND).blocks == {}


def test_it_opens_itself_again_in_another_process(tmp_path):
    file = pickle.loads(pickle.dumps(BlockFile(written(tmp_path / "a.blk"), KIND)))
    assert file.read(0) == b"first"


def test_an_error_leaves_nothing_and_keeps_what_stood_there(tmp_path):
    path = written(tmp_path / "a.blk")
    before = path.read_bytes()

    def interrupted() -> None:
        with BlockWriter(path, KIND, {}) as out:
            out.add(0, b"new")
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_numbers_must_rise_and_writing_needs_the_with_block(tmp_path):
    with pytest.raises(ValueError, match="context manager"):
        BlockWriter(tmp_path / "a.blk", KIND, {}).add(0, b"")
    with BlockWriter(tmp_path / "a.blk", KIND, {}) as out:
        out.add(3, b"")
        with pytest.raises(ValueError, match="comes after"):
            out.add(3, b"")


def test_every_flipped_byte_is_noticed(tmp_path):
    path = written(tmp_path / "a.blk")
    whole = path.read_bytes()
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"Make it anew\."):
            read_all(path)


def test_every_shorter_file_is_refused(tmp_path):
    path = written(tmp_path / "a.blk")
    whole = path.read_bytes()
    for length in [*range(0, 60), *np.linspace(60, len(whole) - 1, 40).astype(int).tolist()]:
        path.write_bytes(whole[:length])
        with pytest.raises(DataError):
            read_all(path)


def test_other_kinds_versions_and_missing_files_are_refused_in_words(tmp_path):
    path = written(tmp_path / "a.blk")
    with pytest.raises(DataError, match="not another file"):
        BlockFile(path, FramedKind(b"P3DOTHER", 3, "another file", "Mend."))
    with pytest.raises(DataError, match="format version 3, this picture3d reads version 4"):
        BlockFile(path, FramedKind(KIND.mark, 4, KIND.what, KIND.mend))
    with pytest.raises(DataError, match="no such file"):
        BlockFile(tmp_path / "none.blk", KIND)
    with pytest.raises(DataError, match="cannot be"):
        BlockFile(tmp_path, KIND).read(0)


def test_an_index_that_cannot_be_written_leaves_what_stood_there(tmp_path):
    path = written(tmp_path / "a.blk")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="JSON"), BlockWriter(path, KIND, {"number": float("nan")}) as out:
        out.add(0, b"other")
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.blk"]
