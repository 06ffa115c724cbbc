"""TFRecord framing: published bytes, round trips, and every kind of damage, which must name file and offset."""

import struct
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from picture3d.errors import DataError
from picture3d.formats.tfrecord import RecordWriter, masked_crc32c, read_records
from tests.sample_data import sample_path


def _crc32c_bit_by_bit(data: bytes) -> int:
    """Castagnoli's polynomial, reflected, one bit after the other."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def _framed(payload: bytes) -> bytes:
    """A record written from the definition, with the slow checksum."""

    def masked(data: bytes) -> bytes:
        crc = _crc32c_bit_by_bit(data)
        return struct.pack("<I", ((crc >> 15 | (crc << 17) & 0xFFFFFFFF) + 0xA282EAD8) % 2**32)

    length = struct.pack("<Q", len(payload))
    return length + masked(length) + payload + masked(payload)


def _write(path: Path, payloads: list[bytes]) -> bytes:
    with RecordWriter(path) as writer:
        for payload in payloads:
            writer.write(payload)
    return path.read_bytes()


def _write_and_fail(writer: RecordWriter) -> None:
    writer.write(b"new")
    raise KeyError("stop")


def test_the_checksum_is_castagnolis_and_masked():
    # CRC-32C of "123456789" is E3069283 (RFC 3720 and every catalogue of checksums).
    assert _crc32c_bit_by_bit(b"123456789") == 0xE3069283
    assert masked_crc32c(b"123456789") == ((0xE3069283 >> 15 | 0xE3069283 << 17) % 2**32 + 0xA282EAD8) % 2**32


def test_the_file_is_the_definition_byte_by_byte(tmp_path: Path):
    payloads = [b"", b"one", bytes(range(256)) * 3]
    assert _write(tmp_path / "a.tfrecord", payloads) == b"".join(_framed(payload) for payload in payloads)


@given(st.lists(st.binary(max_size=200), max_size=6))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_written_is_read_with_its_offsets(tmp_path: Path, payloads: list[bytes]):
    raw = _write(tmp_path / "a.tfrecord", payloads)
    found = list(read_records(tmp_path / "a.tfrecord"))
    assert [payload for _, payload in found] == payloads
    assert [raw[at : at + 8] for at, _ in found] == [struct.pack("<Q", len(payload)) for payload in payloads]


def test_an_empty_file_has_no_records(tmp_path: Path):
    assert _write(tmp_path / "none.tfrecord", []) == b""
    assert list(read_records(tmp_path / "none.tfrecord")) == []


@pytest.mark.parametrize("cut", [1, 11, 12, 14, 19, 21, 30, 40])
def test_a_file_cut_anywhere_gives_the_whole_records_and_then_an_error_with_the_offset(tmp_path: Path, cut: int):
    path = tmp_path / "cut.tfrecord"
    raw = _write(path, [b"first", b"second"])  # 21 + 22 bytes
    path.write_bytes(raw[:cut])
    records = read_records(path)
    if cut >= 21:
        assert next(records) == (0, b"first")
    if cut == 21:
        assert next(records, None) is None
        return
    with pytest.raises(DataError, match=f"cut.tfrecord: cut off: the record at byte {0 if cut < 21 else 21} .*byte {cut}"):
        next(records)


@pytest.mark.parametrize("at", range(22))
def test_every_flipped_bit_of_a_record_is_noticed(tmp_path: Path, at: int):
    path = tmp_path / "flip.tfrecord"
    raw = bytearray(_write(path, [b"first", b"second"]))
    raw[21 + at] ^= 1 << at % 8
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"flip.tfrecord: the .*record at byte 21 do(es)? not match (its|their) checksum"):
        list(read_records(path))


def test_an_absurd_length_with_a_right_checksum_is_refused_before_memory_is_asked_for(tmp_path: Path):
    path = tmp_path / "huge.tfrecord"
    for length, message in ((2**62, "more than the"), (2**27, "cut off")):
        header = struct.pack("<Q", length)
        path.write_bytes(header + struct.pack("<I", masked_crc32c(header)) + b"little")
        tracemalloc.start()
        try:
            with pytest.raises(DataError, match=message):
                list(read_records(path))
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
        finally:
            tracemalloc.stop()


def test_a_record_above_the_callers_bound_is_refused(tmp_path: Path):
    _write(tmp_path / "a.tfrecord", [bytes(100)])
    assert len(list(read_records(tmp_path / "a.tfrecord", max_bytes=100))) == 1
    with pytest.raises(DataError, match="record at byte 0 says it has 100 bytes, more than the 99"):
        list(read_records(tmp_path / "a.tfrecord", max_bytes=99))


def test_a_missing_file_or_a_folder_is_our_error(tmp_path: Path):
    with pytest.raises(DataError, match="no such file"):
        list(read_records(tmp_path / "nowhere.tfrecord"))
    with pytest.raises(DataError, match="cannot be read"):
        list(read_records(tmp_path))


def test_an_error_while_writing_leaves_what_stood_there(tmp_path: Path):
    path = tmp_path / "a.tfrecord"
    before = _write(path, [b"old"])
    with pytest.raises(KeyError), RecordWriter(path) as writer:
        _write_and_fail(writer)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.tfrecord"]


def test_writing_outside_the_with_block_is_refused(tmp_path: Path):
    with pytest.raises(RuntimeError, match="inside its with block"):
        RecordWriter(tmp_path / "a.tfrecord").write(b"")


def test_a_record_no_reader_would_accept_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("picture3d.formats.tfrecord.MAX_RECORD_BYTES", 10)
    with pytest.raises(DataError, match="a record of 11 bytes"):
        _write(tmp_path / "a.tfrecord", [bytes(11)])
    assert list(tmp_path.iterdir()) == []


def test_the_golden_waymo_frame_has_one_record_with_right_checksums():
    path = sample_path("waymo/frame_without_lasers/pvps_data_one_frame.tfrecord")
    assert [(at, len(payload)) for at, payload in read_records(path)] == [(0, 2_168_758)]
