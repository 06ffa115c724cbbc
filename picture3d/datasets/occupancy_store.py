"""Occupancy labels beside prepared frames: ``ROOT/occupancy/occupancy.json`` and ``<log>.occ``, one file per log.

A frame's block holds the keys ``(x * Y + y) * Z + z`` of its occupied cells in rising order, each as the difference to the
one before, then the labels; both as zlib-compressed byte planes (`formats.columns`). Its row of the index holds the frame's
token, the number of cells and where the labels begin.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from picture3d.errors import DataError
from picture3d.files import parse_json_object
from picture3d.formats.block_file import BlockFile, BlockWriter
from picture3d.formats.columns import PLANES, decode, encode
from picture3d.formats.framed_file import FramedKind
from picture3d.formats.remote import MissingObject, read_beside, remote_folder
from picture3d.structures.frame import Frame
from picture3d.structures.occupancy import Occupancy, OccupancyGrid

FORMAT = "picture3d-occupancy"
SUMMARY_NAME = "occupancy.json"
KIND = FramedKind(
    b"P3DOCC\r\n",
    1,
    "a file of occupancy labels",
    "Delete the file and run `picture3d prepare occupancy LABELS PREPARED` again: only this log is done anew.",
)
_ZLIB_LEVEL = 6  # measured: 40 % smaller than level 1 for 20 ms a frame, read as fast
_MAX_JSON_BYTES = 1 << 28
_OPEN_FILES = 32


@dataclass(frozen=True, slots=True)
class LogOccupancy:
    """What one log has."""

    keyframes: int
    labelled: int  # of them
    voxels: int  # occupied ones, over all keyframes
    bytes: int  # of the file; 0 if there is none
    crc32c: int  # of its index; 0 if there is none


def occupancy_folder(prepared_root: Path) -> Path:
    """Where occupancy labels are kept in a folder of prepared frames."""
    return prepared_root / "occupancy"


def has_occupancy(prepared_root: Path) -> bool:
    """Whether labels were attached, to the end.

    Raises:
        DataError: if the frames lie elsewhere and cannot be asked.
    """
    try:
        read_beside(occupancy_folder(prepared_root), SUMMARY_NAME, max_bytes=_MAX_JSON_BYTES)
    except MissingObject:
        return False
    return True


def occupancy_path(prepared_root: Path, log: str) -> Path:
    """Where the labels of a log are."""
    return occupancy_folder(prepared_root) / f"{log}.occ"


def add_occupancy(file: BlockWriter, frame: int, token: str, occupancy: Occupancy) -> None:
    """Appends the labels of a frame to its log's file."""
    steps = encode(np.diff(occupancy.keys, prepend=0).astype("<u4"), PLANES, level=_ZLIB_LEVEL)
    label = encode(occupancy.label, PLANES, level=_ZLIB_LEVEL)
    file.add(frame, steps + label, token, len(occupancy), len(steps))


def read_occupancy(file: BlockFile, frame: int, grid: OccupancyGrid) -> Occupancy:
    """The labels of a frame out of its log's file.

    Raises:
        DataError: if there are none, or the block does not hold them.
    """
    data = file.read(frame)
    block = file.blocks[frame]
    try:
        _, count, split = block.about
        count, split = int(count), int(split)
        if count > grid.cells:
            raise ValueError(f"claims {count} voxels, the grid has {grid.cells}")
        steps = decode(data[:split], PLANES, "<u4", (count,))
        label = decode(data[split:], PLANES, "|u1", (count,)).view(np.uint8)
        keys = np.cumsum(steps, dtype=np.int64)
        if count and keys[-1] >= grid.cells:
            raise ValueError(f"voxel {keys[-1]} lies outside of the grid")
        return Occupancy(grid.cells_of(keys), label, grid)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{file.path}: frame {frame} at byte {block.offset}: {error}. {KIND.mend}") from None


class OccupancyStore:
    """Reads attached labels. Usable from threads, after a fork and after being sent to another process."""

    def __init__(self, prepared_root: Path, *, open_files: int = _OPEN_FILES) -> None:
        """Reads what is attached; files are opened when they are read.

        Raises:
            DataError: if nothing is attached to these frames, or it was not finished.
        """
        self.root = Path(prepared_root)
        self.folder = occupancy_folder(self.root)
        self._remote = remote_folder(self.folder)
        path = self.folder / SUMMARY_NAME
        try:
            data = read_beside(self.folder, SUMMARY_NAME, max_bytes=_MAX_JSON_BYTES)
        except MissingObject:
            place = self.root if self._remote is None else "PREPARED, and upload PREPARED/occupancy"
            raise DataError(
                f"{self.root}: no occupancy labels are attached. Run `picture3d prepare occupancy LABELS {place}`."
            ) from None
        tree = parse_json_object(data, str(path))
        if tree.get("format") != FORMAT or tree.get("version") != KIND.version:
            raise DataError(
                f"{path}: format {tree.get('format')!r} version {tree.get('version')!r}, this picture3d reads {FORMAT!r} "
                f"version {KIND.version}. Run `picture3d prepare occupancy` again."
            )
        try:
            self.grid = _grid_of(tree["grid"])
            self.logs = {str(log): LogOccupancy(**entry) for log, entry in tree["logs"].items()}
            self.set_aside = tuple(str(log) for log in tree["set_aside"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{path}: lacks or garbles {error}. Run `picture3d prepare occupancy` again.") from None
        self._open_files = max(1, open_files)
        self._files: OrderedDict[str, BlockFile] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "open_files": self._open_files}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["root"], open_files=state["open_files"])

    def fingerprint_of(self, logs: Iterable[str]) -> str:
        """Eight hex digits that change when the labels of one of these logs do; a log that is not attached counts too."""
        crc = 0
        for log in sorted(logs):
            own = self.logs[log].crc32c if log in self.logs else "none"
            crc = google_crc32c.extend(crc, f"{log}:{own};".encode())
        return f"{crc:08x}"

    def labelled(self, log: str) -> tuple[int, ...]:
        """Which frames of a log have labels.

        Raises:
            DataError: if the log is not among the attached ones, or its file is missing or damaged.
        """
        file = self._file(log)
        return () if file is None else tuple(file.blocks)

    def token(self, log: str, frame: int) -> str | None:
        """The sweep that the labels of a frame were made for; None where it has none. Errors as :meth:`labelled`."""
        file = self._file(log)
        block = None if file is None else file.blocks.get(frame)
        return None if block is None or not block.about else str(block.about[0])

    def read(self, log: str, frame: int, token: str) -> Occupancy | None:
        """The labels of a frame, by its place in the log and its token; None where it has none.

        Raises:
            DataError: as :meth:`labelled`, if the block is damaged, or if another sweep stands in this place now.
        """
        file = self._file(log)
        block = None if file is None else file.blocks.get(frame)
        if file is None or block is None:
            return None
        place = f"{file.path}: frame {frame}"
        own = self.token(log, frame)
        if own != token:
            raise DataError(
                f"{place}: these labels belong to sweep {own}, the frame is sweep {token}. "
                "The frames were prepared anew since: run `picture3d prepare occupancy` again."
            )
        return read_occupancy(file, frame, self.grid)

    def of(self, frame: Frame) -> Occupancy | None:
        """The labels of a frame; None where it has none. Errors as :meth:`read`."""
        return self.read(frame.log, frame.index, frame.token)

    def _file(self, log: str) -> BlockFile | None:
        if log not in self.logs:
            why = "a label file of it could not be read" if log in self.set_aside else "it was prepared since"
            raise DataError(f"{self.folder}: log '{log}' is not attached ({why}). Run `picture3d prepare occupancy` again.")
        if self.logs[log].labelled == 0:
            return None
        with self._lock:
            if log in self._files:
                self._files.move_to_end(log)
                return self._files[log]
            self._files[log] = file = self._opened(log)
            while len(self._files) > self._open_files:
                self._files.popitem(last=False)  # closed when its last user lets go of it
            return file

    def _opened(self, log: str) -> BlockFile:
        entry = self.logs[log]

        def open_file(path: Path) -> BlockFile:
            file = BlockFile(path, KIND)
            if file.header.get("log") != log or file.crc32c != entry.crc32c:
                raise DataError(f"{file.path}: is not the file that occupancy.json was written for. {KIND.mend}")
            return file

        path = occupancy_path(self.root, log)
        if self._remote is None:
            return open_file(path)
        kept = f"{log}.{entry.crc32c:08x}"
        return self._remote.open(path.name, kept, entry.bytes, open_file, BlockFile.check_bytes)


def grid_tree(grid: OccupancyGrid) -> dict[str, Any]:
    """As JSON."""
    return {"shape": list(grid.shape), "origin": list(grid.origin), "cell_m": grid.cell_m, "frame": grid.frame}


def _grid_of(tree: Any) -> OccupancyGrid:
    (sx, sy, sz), (ox, oy, oz) = tree["shape"], tree["origin"]
    shape, origin = (int(sx), int(sy), int(sz)), (float(ox), float(oy), float(oz))
    return OccupancyGrid(shape, origin, float(tree["cell_m"]), str(tree["frame"]))
