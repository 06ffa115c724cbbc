"""Stored teacher features: ``PREPARED_ROOT/targets/<teacher>/`` holds `teacher.json` and one `<log>.targets` per log.

Of a store under a URL only the files that are read are fetched (`formats.remote`); `files.json` says what they are.

Cells are not stored: they are derived again from the points by the teacher's quantisation, and checksums of points and cells
refuse a frame that has changed since. Reading a frame touches one block of one file.
"""

from __future__ import annotations

import json
import math
import threading
from collections import OrderedDict
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import google_crc32c
import numpy as np
import torch
from numpy.typing import NDArray

from picture3d.errors import DataError
from picture3d.files import parse_json_object, write_json, write_json_first
from picture3d.formats.framed_file import FramedFile
from picture3d.formats.remote import MissingObject, read_beside, remote_folder
from picture3d.ops.quantize import Quantisation, continuous_cells, quantise_points
from picture3d.structures.frame import Frame
from picture3d.structures.targets import FrameTargets
from picture3d.teachers.feature_basis import FeatureBasis, basis_of_tree, basis_tree
from picture3d.teachers.feature_codecs import FeatureCodec
from picture3d.teachers.protocol import Teacher
from picture3d.teachers.target_file import FORMAT_VERSION, KIND, TargetEntry, TargetFile

_FORMAT = "picture3d-targets"
_MAX_JSON_BYTES = 1 << 25  # a basis of 2048 x 2048 numbers fits
_MAX_LIST_BYTES = 1 << 28
_LIST_NAME = "files.json"
_OPEN_FILES = 32
_OPEN_REMOTE_FILES = 8  # one that is open takes its bytes on the disk even if the cache has dropped it


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
    basis: FeatureBasis | None = field(default=None, compare=False)  # what was fitted for the codec

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
        try:
            data = read_beside(folder, path.name, max_bytes=_MAX_JSON_BYTES)
        except MissingObject:
            raise DataError(f"{folder}: holds no teacher features (no teacher.json). Run `picture3d targets` first.") from None
        tree = parse_json_object(data, str(path))
        if tree.get("format") != _FORMAT or tree.get("version") != FORMAT_VERSION:
            raise DataError(
                f"{path}: format {tree.get('format')!r} version {tree.get('version')!r}, this picture3d reads {_FORMAT!r} "
                f"version {FORMAT_VERSION}. Remove the folder and run `picture3d targets` again."
            )
        try:
            cells, basis = tree["quantisation"], tree.get("basis")
            settings = StoreSettings(
                name=str(tree["name"]),
                dimension=int(tree["dimension"]),
                licence=str(tree["licence"]),
                fingerprint=str(tree["fingerprint"]),
                quantisation=Quantisation(cells["kind"], tuple(cells["cell"])),
                num_superclasses=int(tree["num_superclasses"]),
                seed=int(tree["seed"]),
                codec=str(tree["codec"]),
                basis=None if basis is None else basis_of_tree(basis),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: lacks or garbles {error}. Remove the folder and run `picture3d targets` again.") from None
        if settings.basis is None and settings.codec in (FeatureCodec.PCA, FeatureCodec.PRODUCT):
            raise DataError(
                f"{path}: lacks the basis that its codec '{settings.codec}' needs. Bring the file back as it was, or "
                f"remove the folder and run `picture3d targets` again."
            )
        return settings

    def save(self, folder: Path) -> None:
        """Writes `teacher.json`, whole or not at all, unless another process of the job did by now."""
        write_json_first(folder / "teacher.json", {"format": _FORMAT, "version": FORMAT_VERSION, **self._tree()})

    @property
    def digest(self) -> str:
        """Short text that differs where any setting differs; every file of the store carries it."""
        return f"{google_crc32c.value(json.dumps(self._tree(), sort_keys=True).encode()):08x}"

    def differences(self, other: Self) -> list[str]:
        """Names of the settings that differ, with both values; a basis is not a setting but follows from them."""
        mine, theirs = replace(self, basis=None)._tree(), replace(other, basis=None)._tree()
        return [f"{key} (there {mine[key]}, here {theirs[key]})" for key in mine if mine[key] != theirs[key]]

    def _tree(self) -> dict[str, Any]:
        tree = {name: value for name, value in asdict(replace(self, basis=None)).items() if name != "basis"}
        # Stores from before there was a basis keep their digest.
        return json.loads(json.dumps(tree | ({} if self.basis is None else {"basis": basis_tree(self.basis)})))


class FeatureStore:
    """Reads stored targets; a `FeatureSource`. Usable from threads, after a fork and after being sent to another process."""

    def __init__(self, folder: Path, *, open_files: int = _OPEN_FILES) -> None:
        """Reads the store's settings; files are opened when they are read.

        Args:
            folder: ``PREPARED_ROOT/targets/<teacher>``, or a URL of one.
            open_files: how many logs are kept open.

        Raises:
            DataError: if there is no store in the folder.
        """
        self.folder = Path(folder)
        self.settings = StoreSettings.load(self.folder)
        self._digest = self.settings.digest
        self._remote = remote_folder(self.folder)
        self._listed = {} if self._remote is None else _read_file_list(self.folder)
        self._open_files = max(1, open_files if self._remote is None else min(open_files, _OPEN_REMOTE_FILES))
        self._files: OrderedDict[str, TargetFile] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "open_files": self._open_files}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"], open_files=state["open_files"])

    @property
    def logs(self) -> tuple[str, ...]:
        """Logs whose targets are finished, sorted."""
        return tuple(sorted(self._listed if self._remote is not None else _finished_logs(self.folder)))

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
            file = self._opened(log)
            self._files[log] = file
            while len(self._files) > self._open_files:
                self._files.popitem(last=False)  # closed when its last user lets go of it
            return file

    def _opened(self, log: str) -> TargetFile:
        path = target_path(self.folder, log)
        if not path.exists() if self._remote is None else log not in self._listed:
            raise DataError(
                f"{path}: no targets for log '{log}'. Run `picture3d targets` (again): it computes what is missing."
            )
        if self._remote is None:
            return self._own(path, log)
        size, crc = self._listed[log]

        def open_file(path: Path) -> TargetFile:
            file = self._own(path, log)
            if file.crc32c != crc:
                raise DataError(f"{path}: is not the file that {_LIST_NAME} was written for. Upload the folder anew.")
            return file

        return self._remote.open(path.name, f"{log}.{crc:08x}", size, open_file, TargetFile.check_bytes)

    def _own(self, path: Path, log: str) -> TargetFile:
        file = TargetFile(path, self.settings.basis)
        if file.log != log or file.settings_digest != self._digest or file.dimension != self.settings.dimension:
            raise DataError(
                f"{path}: was made by another teacher or with other settings than teacher.json says. "
                f"Delete the file and run `picture3d targets` again."
            )
        return file


def write_file_list(folder: Path) -> None:
    """Writes `files.json`: size and checksum of every finished file, for those who read the folder from elsewhere.

    A damaged file is not finished and not listed.

    Raises:
        DataError: if the list cannot be written.
    """
    files = {}
    for log in sorted(_finished_logs(folder)):
        try:
            file = FramedFile(target_path(folder, log), KIND)
        except DataError:
            continue
        files[log] = {"bytes": file.size, "crc32c": file.crc32c}
        file.close()
    write_json(folder / _LIST_NAME, {"format": _FORMAT, "version": FORMAT_VERSION, "files": files})


def _read_file_list(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and checksum of every file."""
    path = folder / _LIST_NAME
    mend = (
        "Run `picture3d targets` again on the folder of the prepared frames (what is finished is kept) and upload its targets."
    )
    try:
        tree = parse_json_object(read_beside(folder, _LIST_NAME, max_bytes=_MAX_LIST_BYTES), str(path))
    except MissingObject:
        raise DataError(f"{path}: is not there, so it is unknown which targets are finished. {mend}") from None
    try:
        return {_checked_name(str(log)): (int(entry["bytes"]), int(entry["crc32c"])) for log, entry in tree["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: lacks or garbles {error}. {mend}") from None


def _finished_logs(folder: Path) -> list[str]:
    return [path.name.removesuffix(".targets") for path in folder.glob("*.targets")]


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
    # From here on column by column and in numpy, which looks for extremes and sorts many times faster than torch.
    columns = np.ascontiguousarray(continuous_cells(_tensor(xyz), quantisation).numpy().T)
    point_cell = np.full(len(xyz), -1, np.int64)
    kept = None
    if not np.isfinite(columns).all():
        kept = np.flatnonzero(np.isfinite(columns).all(0))
        columns = columns[:, kept]
    if columns.shape[1] == 0:
        return point_cell
    np.floor(columns, out=columns)
    low, high = ([int(value) for value in ends] for ends in (columns.min(1), columns.max(1)))
    extent = [last - first + 1 for first, last in zip(low, high, strict=True)]
    row_bits = columns.shape[1].bit_length()
    if math.prod(extent) >= 1 << (63 - row_bits):
        return quantise_points(_tensor(xyz), quantisation).point_cell.numpy()
    # Key and row in one number: plain integers are sorted with vector instructions, and no second look-up is needed.
    packed = columns[0].astype(np.int64) - low[0]
    for axis in (1, 2):
        packed *= extent[axis]
        packed += columns[axis].astype(np.int64) - low[axis]
    packed <<= row_bits
    packed |= np.arange(len(packed))
    packed.sort()
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
        raise DataError(f"{name!r} cannot name a file. Use letters, digits, '-', '_', '+' and '.', not starting with '.'")
    return name
