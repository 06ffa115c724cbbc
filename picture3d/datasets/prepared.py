"""Prepared frames on disk: ``ROOT/dataset.json`` and ``ROOT/logs/<log>.p3d``, one file per log."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import google_crc32c

from picture3d import __version__
from picture3d.datasets.label_sets import LabelSet, label_set
from picture3d.datasets.log_file import FORMAT_VERSION, LogHeader, LogReader, LogSummary, LogWriter, check_log_name
from picture3d.datasets.occupancy_store import OccupancyStore
from picture3d.datasets.sensor_intensity import MAX_TABLE_BYTES, TABLE_NAME, IntensityTable
from picture3d.errors import DataError
from picture3d.files import parse_json_object, read_json_object, refuse_url, write_json
from picture3d.formats.remote import MissingObject, RemoteFolder, read_beside, remote_folder
from picture3d.structures.frame import Frame

__all__ = [
    "FrameKey",
    "LogHeader",
    "LogReader",
    "LogSummary",
    "LogWriter",
    "PreparedDataset",
    "PreparedSummary",
    "finished_log",
    "log_path",
    "open_for_writing",
    "set_aside_path",
    "summarise",
    "write_dataset",
]

_FORMAT = "picture3d-prepared"
SET_ASIDE_SUFFIX = ".p3d.damaged"
_MAX_DATASET_JSON = 1 << 28
_OPEN_LOGS = 32
_OPEN_REMOTE_LOGS = 8


@dataclass(frozen=True, slots=True, order=True)
class FrameKey:
    """Where a frame is found in a prepared dataset."""

    log: str
    index: int

    def __str__(self) -> str:
        return f"{self.log}/{self.index}"


@dataclass(frozen=True, slots=True)
class PreparedSummary:
    """What a preparation did; counts over the whole dataset unless said otherwise."""

    root: Path
    logs: int
    logs_made: int  # in this run; the others were finished before
    frames: int
    keyframes: int
    points: int
    labelled: int  # frames with labels
    boxes: int
    missing_files: int = 0  # raw files that were listed and are not there; counted in this run
    dropped_points: int = 0  # points with NaN or infinite coordinates, left out in this run
    set_aside: tuple[str, ...] = ()  # one message for each log whose raw file is damaged; they are not in the dataset


class PreparedDataset:
    """A folder of prepared frames. Cheap to make and to send to another process; logs are opened when they are read."""

    def __init__(self, root: Path, *, open_logs: int = _OPEN_LOGS) -> None:
        """Reads ``dataset.json``.

        Args:
            root: the folder, or a URL (see `remote`).
            open_logs: how many log files are kept open; the least recently used is closed first.

        Raises:
            DataError: if the folder is not a prepared dataset, or its preparation did not finish.
        """
        self.root = Path(root)
        self._remote = remote_folder(root)
        # A log that is open takes its bytes on the disk even if the cache has dropped it.
        self._open_logs = max(1, open_logs if self._remote is None else min(open_logs, _OPEN_REMOTE_LOGS))
        self._readers: OrderedDict[str, LogReader] = OrderedDict()
        self._intensity: IntensityTable | None = None
        self._occupancy: OccupancyStore | None = None
        path = self.root / "dataset.json"
        if self._remote is not None:
            tree = parse_json_object(self._remote.read("dataset.json", max_bytes=_MAX_DATASET_JSON), str(path))
        elif path.exists():
            tree = read_json_object(path, max_bytes=_MAX_DATASET_JSON)
        else:
            raise DataError(
                f"{self.root}: no dataset.json, so this is not a folder of prepared frames, or its preparation did not finish. "
                "Run `picture3d prepare nuscenes RAW OUT` or `picture3d prepare points FOLDER OUT` (again)."
            )
        if tree.get("format") != _FORMAT or tree.get("version") != FORMAT_VERSION:
            raise DataError(
                f"{path}: format {tree.get('format')!r} version {tree.get('version')!r}, this picture3d reads "
                f"{_FORMAT!r} version {FORMAT_VERSION}. Prepare the raw data again."
            )
        try:
            self.name = str(tree["name"])
            self.label_set: LabelSet | None = None if tree["label_set"] is None else label_set(tree["label_set"])
            self._summaries = {check_log_name(str(log)): _summary(entry) for log, entry in tree["logs"].items()}
            self._splits = {str(split): tuple(str(log) for log in logs) for split, logs in tree["splits"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{path}: lacks or garbles {error}. Run the `prepare` command again to rewrite it.") from None
        for split, logs in self._splits.items():
            unknown = [log for log in logs if log not in self._summaries]
            if unknown:
                raise DataError(
                    f"{path}: split '{split}' names logs that are not there: {', '.join(unknown[:5])}. Run the `prepare` "
                    "command again to rewrite it."
                )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": OrderedDict()}

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return tuple(self._splits)

    def logs(self, split: str | None = None) -> tuple[str, ...]:
        """Names of the logs of a split, or of all, sorted.

        Raises:
            DataError: if there is no such split.
        """
        if split is None:
            return tuple(sorted(self._summaries))
        if split not in self._splits:
            known = ", ".join(self._splits)
            hint = f"Choose one of {known}." if known else "Prepare the data again: it has none."
            raise DataError(f"{self.root}: no split '{split}'. {hint}")
        return tuple(sorted(self._splits[split]))

    def keyframes(self, split: str | None = None) -> list[FrameKey]:
        """Every keyframe of a split (or of all), by log name and time; no log is opened for it."""
        return [FrameKey(log, index) for log in self.logs(split) for index in self._summaries[log].keyframes]

    def fingerprint(self, split: str | None = None) -> str:
        """Eight hex digits that change when a log of the split is added, removed or made anew from other data."""
        return self.fingerprint_of(self.logs(split))

    def fingerprint_of(self, logs: Sequence[str]) -> str:
        """The same over the named logs, in their order."""
        crc = 0
        for log in logs:
            crc = google_crc32c.extend(crc, f"{log}:{self._summaries[log].crc32c};".encode())
        return f"{crc:08x}"

    def occupancy(self) -> OccupancyStore:
        """The occupancy labels beside these frames, opened once.

        Raises:
            DataError: if none are attached, or their summary is damaged.
        """
        if self._occupancy is None:
            self._occupancy = OccupancyStore(self.root)
        return self._occupancy

    def intensity(self) -> IntensityTable:
        """The table of this dataset's sensors, read once.

        Raises:
            DataError: if `picture3d data intensity` was not run, or its file is damaged.
        """
        if self._intensity is None:
            path = self.root / TABLE_NAME
            try:
                data = read_beside(self.root, TABLE_NAME, max_bytes=MAX_TABLE_BYTES)
            except MissingObject:
                raise DataError(
                    f"{path}: is not there, so the intensities of its sensors are unknown. "
                    "Run `picture3d data intensity` on the folder of the prepared frames."
                ) from None
            self._intensity = IntensityTable.from_bytes(data, str(path))
        return self._intensity

    @property
    def notes_folder(self) -> Path:
        """Where this machine may leave what it found out about the frames: the root, or for a remote one its cache."""
        return self.root if self._remote is None else self._remote.folder

    def summary(self, log: str) -> LogSummary:
        """What a log holds, without opening it."""
        return self._summaries[log]

    def reader(self, log: str) -> LogReader:
        """The open log; the same object while it stays among the most recently used.

        Raises:
            DataError: if there is no such log, or its file is not the one that ``dataset.json`` was written for.
        """
        if log in self._readers:
            self._readers.move_to_end(log)
            return self._readers[log]
        if log not in self._summaries:
            raise DataError(
                f"{self.root}: no log '{log}' among its {len(self._summaries)}. Take one that `picture3d data info` lists"
            )
        reader = LogReader(log_path(self.root, log)) if self._remote is None else self._fetched(self._remote, log)
        if reader.header.log != log or reader.summary != self._summaries[log]:
            reader.close()
            raise DataError(f"{reader.path}: is not the file that dataset.json was written for. Run `prepare` again.")
        self._readers[log] = reader
        while len(self._readers) > self._open_logs:
            self._readers.popitem(last=False)  # closed when its last user lets go of it
        return reader

    def _fetched(self, remote: RemoteFolder, log: str) -> LogReader:
        """The log from the cache, every byte compared when it was fetched."""
        summary = self._summaries[log]

        def open_log(path: Path) -> LogReader:
            reader = LogReader(path)
            if reader.summary != summary:
                reader.close()
                raise DataError(f"{path}: is not the file that dataset.json was written for. Upload both anew.")
            return reader

        kept = f"{log}.{summary.crc32c:08x}"
        return remote.open(f"logs/{log}.p3d", kept, summary.bytes, open_log, LogReader.check_bytes)

    def frame(self, key: FrameKey, columns: Collection[str] | None = None) -> Frame:
        """Reads one frame; see :meth:`LogReader.frame`."""
        return self.reader(key.log).frame(key.index, columns)


def log_path(root: Path, log: str) -> Path:
    """Where the file of a log is."""
    return root / "logs" / f"{check_log_name(log)}.p3d"


def set_aside_path(root: Path, log: str) -> Path:
    """Where it says why a log is not there: JSON, "why". The file goes when the log is made."""
    return root / "logs" / f"{check_log_name(log)}{SET_ASIDE_SUFFIX}"


def open_for_writing(root: Path) -> None:
    """Makes the folder, and takes ``dataset.json`` away: until it is written again the dataset counts as unfinished.

    Raises:
        DataError: if the folder holds something else, or cannot be written.
    """
    refuse_url(root)
    path = root / "dataset.json"
    if path.exists() and read_json_object(path, max_bytes=_MAX_DATASET_JSON).get("format") != _FORMAT:
        raise DataError(f"{path}: belongs to something else than prepared frames. Choose another output folder.")
    try:
        (root / "logs").mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"{root}: cannot be written ({error.strerror or error}). Choose another output folder.") from error


def finished_log(root: Path, header: LogHeader) -> LogSummary | None:
    """The summary of a log that an earlier run finished with the same header, or None if it has to be made."""
    path = log_path(root, header.log)
    if not path.exists():
        return None
    try:
        reader = LogReader(path)
    except DataError:
        return None
    try:
        same = json.dumps(_identity(reader.header), sort_keys=True) == json.dumps(_identity(header), sort_keys=True)
        return reader.summary if same else None
    finally:
        reader.close()


def write_dataset(
    root: Path,
    *,
    name: str,
    label_set_name: str | None,
    splits: Mapping[str, Sequence[str]],
    logs: Mapping[str, LogSummary],
    set_aside: Collection[str] = (),
) -> None:
    """Writes ``dataset.json``, the last act of a preparation, and removes files of logs that do not belong to it any more.

    Files of logs that are `set_aside` are left alone: another process may be about to make such a log.

    Raises:
        DataError: if a split names an unknown log, or a log is in two splits.
    """
    seen: dict[str, str] = {}
    for split, members in splits.items():
        for log in members:
            if log not in logs:
                raise DataError(f"{root}: split '{split}' names log '{log}', which was not prepared. Correct the split.")
            if log in seen:
                raise DataError(
                    f"{root}: log '{log}' is in split '{seen[log]}' and in split '{split}'. Leave it in one of the two."
                )
            seen[log] = split
    kept = {log_path(root, log) for log in logs}
    for stale in (root / "logs").glob("*.p3d*"):
        if stale not in kept and stale.name.rpartition(".p3d")[0] not in set_aside:
            stale.unlink(missing_ok=True)
    tree = {
        "format": _FORMAT,
        "version": FORMAT_VERSION,
        "made_by": f"picture3d {__version__}",
        "name": name,
        "label_set": label_set_name,
        "splits": {split: sorted(members) for split, members in splits.items()},
        "logs": {log: {**asdict(logs[log]), "keyframes": list(logs[log].keyframes)} for log in sorted(logs)},
    }
    write_json(root / "dataset.json", tree)


def summarise(
    root: Path,
    logs: Mapping[str, LogSummary],
    *,
    logs_made: int,
    missing_files: int = 0,
    dropped_points: int = 0,
    set_aside: Sequence[str] = (),
) -> PreparedSummary:
    """Adds up what the logs hold."""
    summaries = logs.values()
    return PreparedSummary(
        root=root,
        logs=len(logs),
        logs_made=logs_made,
        frames=sum(s.frames for s in summaries),
        keyframes=sum(len(s.keyframes) for s in summaries),
        points=sum(s.points for s in summaries),
        labelled=sum(s.labelled for s in summaries),
        boxes=sum(s.boxes for s in summaries),
        missing_files=missing_files,
        dropped_points=dropped_points,
        set_aside=tuple(set_aside),
    )


def _identity(header: LogHeader) -> dict[str, Any]:
    """What must agree for a finished log to be kept; a newer version of this package alone is no reason to redo it."""
    return {name: value for name, value in asdict(header).items() if name != "made_by"}


def _summary(entry: dict[str, Any]) -> LogSummary:
    return LogSummary(**{**entry, "keyframes": tuple(int(index) for index in entry["keyframes"])})
