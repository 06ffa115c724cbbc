"""TFRecord files: records one after the other, each with its length and two checksums. Read and written without TensorFlow.

A record is ``length: uint64 | masked CRC-32C of the 8 bytes of length: uint32 | payload | masked CRC-32C of payload: uint32``,
all little-endian; masking rotates the checksum right by 15 bits and adds 0xa282ead8 (TensorFlow, ``record_writer.h`` and
``crc32c.h``). A file has no header and no index; an empty file holds no records.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import google_crc32c

from picture3d.errors import FETCH_AGAIN, DataError
from picture3d.files import unreadable, whole_file

# The largest frames of the Waymo Open Dataset have 10 to 20 MB; a damaged length must not ask for the whole memory.
MAX_RECORD_BYTES = 1 << 28
_HEADER = struct.Struct("<QI")
_LENGTH = struct.Struct("<Q")
_CHECKSUM = struct.Struct("<I")
_MASK_DELTA = 0xA282EAD8


def masked_crc32c(data: bytes) -> int:
    """The checksum that the format stores for `data`, 32 bits."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFF_FFFF


def read_records(path: Path, *, max_bytes: int = MAX_RECORD_BYTES) -> Iterator[tuple[int, bytes]]:
    """The records of a file in order: byte offset in the file where the record begins (its length), and its payload.

    One record is in memory at a time. A length is believed only after its checksum, `max_bytes` and the size of the file
    have been looked at. Records before a damaged one are yielded.

    Raises:
        DataError: naming file and byte offset, if the file cannot be read, is cut off inside a record, a checksum does not
            match, or a record is larger than `max_bytes`.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            offset = 0
            while offset < size:
                payload = _read_record(path, file, offset, size, max_bytes)
                yield offset, payload
                offset += _HEADER.size + len(payload) + _CHECKSUM.size
    except OSError as error:
        raise unreadable(path, error) from error


def record_lengths(path: Path, *, max_bytes: int = MAX_RECORD_BYTES) -> Iterator[tuple[int, int]]:
    """Bytes of each payload and the checksum the file stores for it; the payloads themselves are stepped over unread.

    Cheap for counting records, and for telling whether a file is still the same.

    Raises:
        DataError: as :func:`read_records`, but for the checksums of the payloads.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            offset = 0
            while offset < size:
                file.seek(offset)
                length, end = _read_header(path, file, offset, size, max_bytes)
                file.seek(end - _CHECKSUM.size)
                tail = file.read(_CHECKSUM.size)
                if len(tail) < _CHECKSUM.size:
                    raise _cut_off(path, offset, end, end - _CHECKSUM.size + len(tail))
                yield length, _CHECKSUM.unpack(tail)[0]
                offset = end
    except OSError as error:
        raise unreadable(path, error) from error


def _read_header(path: Path, file: BinaryIO, offset: int, size: int, max_bytes: int) -> tuple[int, int]:
    """Length of the payload of the record at `offset`, and where the record ends."""
    header = file.read(_HEADER.size)
    if len(header) < _HEADER.size:
        raise _cut_off(path, offset, offset + _HEADER.size, size)
    length, length_crc = _HEADER.unpack(header)
    if masked_crc32c(header[: _LENGTH.size]) != length_crc:
        raise DataError(
            f"{path}: the length of the record at byte {offset} does not match its checksum. The file is damaged there, "
            "or is not a tfrecord file; fetch it again."
        )
    if length > max_bytes:
        raise DataError(
            f"{path}: the record at byte {offset} says it has {length} bytes, more than the {max_bytes} a record may have; it "
            f"was not read. {FETCH_AGAIN}"
        )
    end = offset + _HEADER.size + length + _CHECKSUM.size
    if end > size:
        raise _cut_off(path, offset, end, size)
    return length, end


def _read_record(path: Path, file: BinaryIO, offset: int, size: int, max_bytes: int) -> bytes:
    length, end = _read_header(path, file, offset, size, max_bytes)
    payload, tail = file.read(length), file.read(_CHECKSUM.size)
    if len(payload) < length or len(tail) < _CHECKSUM.size:  # the file became shorter while it was read
        raise _cut_off(path, offset, end, offset + _HEADER.size + len(payload) + len(tail))
    if masked_crc32c(payload) != _CHECKSUM.unpack(tail)[0]:
        raise DataError(
            f"{path}: the {length} bytes of the record at byte {offset} do not match their checksum. The file is damaged; "
            "fetch it again."
        )
    return payload


def _cut_off(path: Path, offset: int, end: int, size: int) -> DataError:
    return DataError(
        f"{path}: cut off: the record at byte {offset} ends at byte {end} or later, the file at byte {size}. Fetch it again."
    )


class RecordWriter:
    """Writes records to a file that takes its name only when the ``with`` block ends without an error.

    Until then the records are in ``<path>.partial`` (see :func:`picture3d.files.replacing`); the file is synced before it is
    renamed. Without records the file is empty, which is a tfrecord file too.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._whole: AbstractContextManager[BinaryIO] = whole_file(path)
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        self._file = self._whole.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file = None
        self._whole.__exit__(kind, error, trace)

    def write(self, payload: bytes) -> None:
        """Appends one record; OSError of a full disk leaves the ``with`` block as DataError.

        Raises:
            DataError: if the payload is larger than a reader would accept.
        """
        if self._file is None:
            raise RuntimeError("RecordWriter.write is for use inside its with block.")
        if len(payload) > MAX_RECORD_BYTES:
            raise DataError(
                f"{self._path}: a record of {len(payload)} bytes, but at most {MAX_RECORD_BYTES} can be read again. Write it "
                "as several."
            )
        length = _LENGTH.pack(len(payload))
        self._file.write(length + _CHECKSUM.pack(masked_crc32c(length)))
        self._file.write(payload)
        self._file.write(_CHECKSUM.pack(masked_crc32c(payload)))
