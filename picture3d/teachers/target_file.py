"""The stored targets of one log, one file (`<log>.targets`): every frame a block of its own, read without the others.

A block holds a frame's features, then one superclass byte per cell; what is around the blocks see `framed_file`.
"""

from __future__ import annotations

import json
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from picture3d.errors import DataError
from picture3d.formats.framed_file import HEAD_BYTES, FramedFile, FramedKind, FramedWriter
from picture3d.teachers.feature_basis import FeatureBasis, basis_digest
from picture3d.teachers.feature_codecs import FeatureCodec, codec_of, decode_features, encoded_size

FORMAT_VERSION = 1
KIND = FramedKind(
    b"P3DTGT\r\n",
    FORMAT_VERSION,
    "a file of teacher targets",
    "Delete the file and run `picture3d targets` again: only this log is done anew.",
    "Run `picture3d targets` first.",
)
_MAX_BLOCK_BYTES = 1 << 31


@dataclass(frozen=True, slots=True)
class TargetEntry:
    """A frame's line in the index."""

    frame: int  # position of the frame in its log
    points: int  # N
    cells: int  # M
    xyz_crc32c: int  # of the frame's xyz bytes: other points, other targets
    cells_crc32c: int  # of `point_cell` as int32: the rows fit only the cells they were made for
    codec: FeatureCodec
    cosine: float  # mean cosine between the teacher's features and the stored ones
    offset: int
    length: int
    crc32c: int  # of the block


class TargetWriter(FramedWriter):
    """Writes the targets of one log; a context manager. The file takes its name when the block ends without an error."""

    def __init__(
        self, path: Path, *, log: str, settings_digest: str, dimension: int, basis: FeatureBasis | None = None
    ) -> None:
        super().__init__(path, KIND)
        self.entries: list[TargetEntry] = []
        self._header = {"log": log, "settings": settings_digest, "dimension": dimension}
        if basis is not None:
            self._header["basis"] = basis_digest(basis)

    def add(
        self,
        frame: int,
        features: bytes,
        codec: FeatureCodec,
        cosine: float,
        superclass: NDArray[np.uint8],
        *,
        points: int,
        xyz_crc32c: int,
        cells_crc32c: int,
    ) -> None:
        """Appends a frame; `features` are encoded with `codec`, one row per entry of `superclass`."""
        block = features + superclass.tobytes()
        self.entries.append(
            TargetEntry(
                frame=frame,
                points=points,
                cells=len(superclass),
                xyz_crc32c=xyz_crc32c,
                cells_crc32c=cells_crc32c,
                codec=codec,
                cosine=round(cosine, 6),
                offset=self.write(block),
                length=len(block),
                crc32c=google_crc32c.value(block),
            )
        )

    def index(self) -> tuple[bytes, int]:
        """What holds for the log, and a line per frame."""
        tree = {**self._header, "frames": [astuple(entry) for entry in self.entries]}
        return json.dumps(tree, separators=(",", ":"), allow_nan=False).encode(), len(self.entries)


class TargetFile(FramedFile):
    """Reads the targets of one log. Safe to use from threads, after a fork and after being sent to another process."""

    def __init__(self, path: Path, basis: FeatureBasis | None = None) -> None:
        """Opens the file and reads its index.

        Args:
            path: of the file.
            basis: that of the store, where it has one.

        Raises:
            DataError: if it is missing, not a file of targets, of another version, damaged, or stored with another basis.
        """
        super().__init__(path, KIND)
        self.basis = basis
        tree = self.index()
        try:
            self.log, self.settings_digest = str(tree["log"]), str(tree["settings"])
            self.dimension = int(tree["dimension"])
            entries = [_entry(row) for row in tree["frames"]]
            stored_with = None if tree.get("basis") is None else str(tree["basis"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{self.path}: the index at byte {self.index_at} is garbled ({error}). {KIND.mend}") from None
        found = None if basis is None else basis_digest(basis)
        if stored_with != found:
            raise DataError(
                f"{self.path}: was stored with basis {stored_with or 'none'}, teacher.json holds {found or 'none'}. Bring the "
                f"teacher.json back that the file was made with, or delete the file and run `picture3d targets` again."
            )
        self.entries = {entry.frame: entry for entry in entries}
        if len(self.entries) != self.count or not all(self._plausible(entry) for entry in entries):
            raise DataError(f"{self.path}: the index at byte {self.index_at} contradicts itself. {KIND.mend}")

    @property
    def frames(self) -> tuple[int, ...]:
        """Which frames of the log have targets."""
        return tuple(self.entries)

    def read(self, entry: TargetEntry) -> tuple[NDArray[np.float16], NDArray[np.uint8]]:
        """(M, D) float16 features and (M,) uint8 superclasses of a frame; nothing else of the file is touched.

        Raises:
            DataError: if the block is damaged.
        """
        place = f"{self.path}: frame {entry.frame}"
        block = self.read_at(entry.offset, entry.length, entry.crc32c, place)
        split = entry.length - entry.cells
        return decode_features(block[:split], entry.codec, entry.cells, self.dimension, self.basis), block[split:]

    def check_bytes(self) -> None:
        """Compares every block with its checksum, decoding nothing.

        Raises:
            DataError: for the first that is damaged.
        """
        for entry in self.entries.values():
            self.read_at(entry.offset, entry.length, entry.crc32c, f"{self.path}: frame {entry.frame}")

    def _plausible(self, entry: TargetEntry) -> bool:
        if not (0 <= entry.cells <= entry.points and 0 < self.dimension <= 1 << 16):
            return False
        if entry.codec.needs_basis and (self.basis is None or codec_of(self.basis) is not entry.codec):
            return False
        size = encoded_size(entry.codec, entry.cells, self.dimension, self.basis) + entry.cells
        inside = entry.offset >= HEAD_BYTES and entry.offset + entry.length <= self.size
        return inside and entry.length == size <= _MAX_BLOCK_BYTES


def _entry(row: list[Any]) -> TargetEntry:
    frame, points, cells, xyz, own, codec, cosine, offset, length, crc = row
    return TargetEntry(
        int(frame),
        int(points),
        int(cells),
        int(xyz),
        int(own),
        FeatureCodec(codec),
        float(cosine),
        int(offset),
        int(length),
        int(crc),
    )
