"""Stored teacher features: ``PREPARED_ROOT/targets/<teacher>/`` holds `teacher.json` and one `<log>.targets` per log.

Cells are not stored: they are derived again from the points by the teacher's quantisation, and checksums of points and cells
refuse a frame that has changed since. Reading a frame touches one block of one file.
"""

from __future__ import annotations

import json
import math
import threading
from collections import OrderedDict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import google_crc32c
import numpy as np
import torch
from numpy.typing import NDArray

from picture3d.errors import DataError
from picture3d.files import read_json_object, write_json
from picture3d.ops.quantize import Quantisation, continuous_cells, quantise_points
from picture3d.structures.frame import Frame
from picture3d.structures.targets import FrameTargets
from picture3d.teachers.protocol import Teacher
from picture3d.teachers.target_file import FORMAT_VERSION, TargetEntry, TargetFile

_FORMAT = "picture3d-targets"
_MAX_JSON_BYTES = 1 << 20
_OPEN_FILES = 32


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """What the features of a store depend on; `teacher.json`."""

    name: str
    dimension: int  # D
    licence: str
    fingerprint: str
    quantisation: Quantisation
    num_superclasses: int
    seed: int  # of the clustering
    codec: str  # "auto", or the name of a `FeatureCodec`

    @staticmethod
    def of(teacher: Teacher, *, num_superclasses: int, seed: int, codec: str) -> StoreSettings:
        """The settings under which a teacher's features are stored."""
        return StoreSettings(
            name=teacher.name,
            dimension=teacher.dimension,
            licence=teacher.licence,
            fingerprint=teacher.fingerprint,
            quantisation=teacher.quantisation,
            num_superclasses=num_superclasses,
            seed=seed,
            codec=codec,
        )

    @staticmethod
    def load(folder: Path) -> StoreSettings:
        """Reads `teacher.json`.

        Raises:
            DataError: if it is missing, damaged or of another version.
        """
        path = folder / "teacher.json"
        if not path.exists():
            raise DataError(f"{folder}: holds no teacher features (no teacher.json). Run `picture3d targets` first.")
        tree = read_json_object(path, max_bytes=_MAX_JSON_BYTES)
        if tree.get("format") != _FORMAT or tree.get("version") != FORMAT_VERSION:
            raise DataError(
                f"{path}: format {tree.get('format')!r} version {tree.get('version')!r}, this picture3d reads {_FORMAT!r} "
                f"version {FORMAT_VERSION}. Remove the folder and run `picture3d targets` again."
            )
        try:
            cells = tree["quantisation"]
            return StoreSettings(
                name=str(tree["name"]),
                dimension=int(tree["dimension"]),
                licence=str(tree["licence"]),
                fingerprint=str(tree["fingerprint"]),
                quantisation=Quantisation(cells["kind"], tuple(cells["cell"])),
                num_superclasses=int(tree["num_superclasses"]),
                seed=int(tree["seed"]),
                codec=str(tree["codec"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: lacks or garbles {error}. Remove the folder and run `picture3d targets` again.") from None

    def save(self, folder: Path) -> None:
        """Writes `teacher.json`, whole or not at all."""
        write_json(folder / "teacher.json", {"format": _FORMAT, "version": FORMAT_VERSION, **self._tree()})

    @property
    def digest(self) -> str:
        """Short text that differs where any setting differs; every file of the store carries it."""
        return f"{google_crc32c.value(json.dumps(self._tree(), sort_keys=True).encode()):08x}"

    def differences(self, other: Self) -> list[str]:
        """Names of the settings that differ, with both values."""
        mine, theirs = self._tree(), other._tree()
        return [f"{key} (there {mine[key]}, here {theirs[key]})" for key in mine if mine[key] != theirs[key]]

    def _tree(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)))


class FeatureStore:
    """Reads stored targets; a `FeatureSource`. Usable from threads, after a fork and after being sent to another process."""

    def __init__(self, folder: Path, *, open_files: int = _OPEN_FILES) -> None:
        """Reads the store's settings; files are opened when they are read.

        Args:
            folder: ``PREPARED_ROOT/targets/<teacher>``.
            open_files: how many logs are kept open.

        Raises:
            DataError: if there is no store in the folder.
        """
        self.folder = Path(folder)
        self.settings = StoreSettings.load(self.folder)
        self._digest = self.settings.digest
        self._open_files = max(1, open_files)
        self._files: OrderedDict[str, TargetFile] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "open_files": self._open_files}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"], open_files=state["open_files"])

    @property
    def logs(self) -> tuple[str, ...]:
        """Logs whose targets are finished, sorted."""
        return tuple(sorted(path.name.removesuffix(".targets") for path in self.folder.glob("*.targets")))

    def targets(self, frame: Frame) -> FrameTargets | None:
        """The stored targets of an un-augmented frame; None where none were stored for it (it was no keyframe).

        Raises:
            DataError: if the frame's log has no file, the file is damaged, or the frame's points have changed since.
        """
        file = self.file(frame.log)
        entry = file.entries.get(frame.index)
        if entry is None:
            return None
        place = f"{file.path}: frame {frame.index}"
        if len(frame.points) != entry.points or xyz_checksum(frame.points.xyz) != entry.xyz_crc32c:
            raise DataError(
                f"{place}: these targets were computed for other points ({entry.points}, the frame has {len(frame.points)}). "
                f"The frames were prepared anew since: remove {self.folder} and run `picture3d targets` again."
            )
        point_cell = derive_cells(frame.points.xyz, self.settings.quantisation)
        if cells_checksum(point_cell) != entry.cells_crc32c:
            raise DataError(
                f"{place}: its points fall into other cells than on the machine that stored the targets. "
                f"Remove {self.folder} and run `picture3d targets` on this machine."
            )
        features, superclass = file.read(entry)
        return FrameTargets(features, superclass, point_cell)

    def file(self, log: str) -> TargetFile:
        """The open file of a log; the same object while it stays among the most recently used.

        Raises:
            DataError: if it is missing, damaged, or from another teacher or other settings.
        """
        with self._lock:
            if log in self._files:
                self._files.move_to_end(log)
                return self._files[log]
            path = target_path(self.folder, log)
            if not path.exists():
                raise DataError(
                    f"{path}: no targets for log '{log}'. Run `picture3d targets` (again): it computes what is missing."
                )
            file = TargetFile(path)
            if file.log != log or file.settings_digest != self._digest or file.dimension != self.settings.dimension:
                raise DataError(
                    f"{path}: was made by another teacher or with other settings than teacher.json says. "
                    f"Delete the file and run `picture3d targets` again."
                )
            self._files[log] = file
            while len(self._files) > self._open_files:
                self._files.popitem(last=False)  # closed when its last user lets go of it
            return file


def store_folder(prepared_root: Path, teacher_name: str) -> Path:
    """Where the features of a teacher are kept in a folder of prepared frames.

    Raises:
        DataError: if the name cannot be a folder's.
    """
    return prepared_root / "targets" / _checked_name(teacher_name)


def target_path(folder: Path, log: str) -> Path:
    """Where the targets of a log are.

    Raises:
        DataError: if the log's name cannot be a file's.
    """
    return folder / f"{_checked_name(log)}.targets"


def derive_cells(xyz: NDArray[np.float32], quantisation: Quantisation) -> NDArray[np.int64]:
    """(N,) int64: the cell of every point, -1 where it is not finite; the `point_cell` of `quantise_points`, but faster.

    Always computed on the CPU, so that rows agree whatever device the teacher ran on.
    """
    position = continuous_cells(_tensor(xyz), quantisation)
    point_cell = np.full(len(xyz), -1, np.int64)
    kept = None
    if not bool(torch.isfinite(position).all()):
        kept = np.flatnonzero(torch.isfinite(position).all(1).numpy())
        position = position[torch.from_numpy(kept)]
    if len(position) == 0:
        return point_cell
    index = position.floor().to(torch.int64)
    index -= index.amin(0)
    extent = (index.amax(0) + 1).tolist()
    row_bits = len(position).bit_length()
    if math.prod(extent) >= 1 << (63 - row_bits):
        return quantise_points(_tensor(xyz), quantisation).point_cell.numpy()
    # Key and row in one number: numpy sorts plain integers with vector instructions, and no second look-up is needed.
    keys = (index[:, 0] * extent[1] + index[:, 1]) * extent[2] + index[:, 2]
    packed = np.sort(((keys << row_bits) | torch.arange(len(keys))).numpy())
    rows, keys_sorted = packed & ((1 << row_bits) - 1), packed >> row_bits
    rank = np.zeros(len(rows), np.int64)
    np.cumsum(keys_sorted[1:] != keys_sorted[:-1], out=rank[1:])
    point_cell[rows if kept is None else kept[rows]] = rank
    return point_cell


def xyz_checksum(xyz: NDArray[np.float32]) -> int:
    """CRC-32C of (N, 3) points as little-endian float32, row by row."""
    return google_crc32c.value(np.ascontiguousarray(xyz, "<f4").tobytes())


def cells_checksum(point_cell: NDArray[np.int64]) -> int:
    """CRC-32C of the cell of every point, as little-endian int32."""
    return google_crc32c.value(point_cell.astype("<i4").tobytes())


def fits(file: TargetFile, settings: StoreSettings, log: str, frames: tuple[int, ...]) -> bool:
    """Whether a finished file holds what a run with these settings would write for these frames."""
    return (file.log, file.settings_digest, file.frames) == (log, settings.digest, frames)


def same_points(entry: TargetEntry, frame: Frame) -> bool:
    """Whether stored targets belong to this frame as it is now."""
    return entry.points == len(frame.points) and entry.xyz_crc32c == xyz_checksum(frame.points.xyz)


def _tensor(xyz: NDArray[np.float32]) -> torch.Tensor:
    # Arrays over files or bytes may be read-only, which torch does not know.
    xyz = np.ascontiguousarray(xyz, np.float32)
    return torch.from_numpy(xyz if xyz.flags.writeable else xyz.copy())


def _checked_name(name: str) -> str:
    if not name or name.startswith(".") or len(name.encode()) > 200 or any(c in '/\\:"*?<>|' or ord(c) < 32 for c in name):
        raise DataError(f"{name!r} cannot name a file: use letters, digits, '-', '_', '+' and '.', not starting with '.'")
    return name
