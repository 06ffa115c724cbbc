"""What all preparations share: log by log, a finished log is kept, and the dataset counts as whole only at the very end."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from picture3d.datasets.prepared import (
    LogHeader,
    LogSummary,
    LogWriter,
    PreparedSummary,
    finished_log,
    log_path,
    open_for_writing,
    set_aside_path,
    summarise,
    write_dataset,
)
from picture3d.errors import DataError
from picture3d.files import job_share, unreadable, write_json
from picture3d.formats.columns import PLANES, Codec
from picture3d.structures.frame import Frame
from picture3d.structures.points import PointCloud
from picture3d.workers import worker_pool

Progress = Callable[[int, int], None]
_FOLDERS_NAMED = 3  # with the most missing files; of the others the number is told


@dataclass(frozen=True, slots=True, eq=False)
class LogPlan:
    """What one log will hold; nothing of it is read before `frames` is asked for."""

    header: LogHeader
    count: int  # frames
    frames: Callable[[], Iterator[tuple[Frame, int]]]  # each with the number of points it lost because they were not finite


def damaged_plan(header: LogHeader, why: DataError) -> LogPlan:
    """A log whose raw files could not even be listed: it is set aside for that reason when its turn comes.

    No finished log has this header, so one that was made while the files were whole is not kept either.
    """
    return LogPlan(replace(header, source={**header.source, "damaged": str(why)}), 1, partial(_fail, why))


def _fail(why: DataError) -> Iterator[tuple[Frame, int]]:
    raise why


def write_logs(
    out: Path,
    plans: Sequence[LogPlan],
    *,
    name: str,
    label_set_name: str | None,
    splits: Mapping[str, Sequence[str]],
    missing_files: int = 0,
    xyz_codec: Codec = PLANES,
    processes: int = 1,
    progress: Progress | None = None,
    share: tuple[int, int] | None = None,
) -> PreparedSummary:
    """Makes the logs that an earlier run did not finish, one frame in memory at a time, then ``dataset.json``.

    A log whose raw data cannot be read is set aside: it is left out of the dataset and its splits, the summary says why, and
    the others go on. With several `processes` that many logs are made side by side (the same bytes; `plans` must be
    picklable) and `progress` counts whole logs.

    A log that is set aside leaves a note beside the logs that says why, until it can be made.

    With a `share` (rank, world), by default that of the environment (`files.job_share`), every `world`-th log is made here and
    the others by the other processes of the job, now, before or later. Whoever finds every log finished or set aside writes
    ``dataset.json``; the summary counts all logs that are finished by then, and names those that were set aside here.

    Raises:
        DataError: from reading the raw files, if the folder cannot be written, if no log at all could be read, or if a
            process was ended from outside.
    """
    rank, world = job_share() if share is None else share
    everything, plans = plans, plans[rank::world]
    total = sum(plan.count for plan in plans)
    done = dropped = made = 0
    logs: dict[str, LogSummary] = {}
    set_aside: dict[str, str] = {}  # log -> why
    waiting: list[LogPlan] = []
    open_for_writing(out)
    for plan in plans:
        summary = finished_log(out, plan.header)
        if summary is None:
            set_aside_path(out, plan.header.log).unlink(missing_ok=True)
            waiting.append(plan)
        else:
            logs[plan.header.log] = summary
            done += plan.count

    def tick(frames: int) -> None:
        if progress is not None:
            progress(done + frames, total)

    tick(0)
    for plan, (summary, lost) in zip(waiting, _written(out, waiting, xyz_codec, processes, tick), strict=True):
        log = plan.header.log
        if isinstance(summary, DataError):
            set_aside[log] = f"log {log} is set aside: {summary}"
            log_path(out, log).unlink(missing_ok=True)  # made of what the raw files were before
            write_json(set_aside_path(out, log), {"why": str(summary)})
        else:
            logs[log] = summary
            made += 1
            dropped += lost
        done += plan.count
        tick(0)
    others = [plan for plan in everything if plan.header.log not in logs and plan.header.log not in set_aside]
    found = _outcomes(out, others)
    while True:
        logs |= {log: summary for log, summary in found.items() if isinstance(summary, LogSummary)}
        said = summarise(
            out,
            logs,
            logs_made=made,
            missing_files=missing_files,
            dropped_points=dropped,
            set_aside=list(set_aside.values()),
        )
        if len(found) < len(others):  # who makes the last of them goes on
            return said
        if not logs and everything:
            if not set_aside:  # who did so says it
                return said
            first = next(iter(set_aside.values()))
            raise DataError(f"{out}: no log could be read. Mend or remove the first of these and run again: {first}")
        whole = {plan.header.log: logs[plan.header.log] for plan in everything if plan.header.log in logs}
        left_out = {plan.header.log for plan in everything} - whole.keys()
        members = {split: [log for log in of_split if log not in left_out] for split, of_split in splits.items()}
        write_dataset(out, name=name, label_set_name=label_set_name, splits=members, logs=whole, set_aside=left_out)
        # What another process made between the look and the writing it may have written down in between: look again.
        before, found = found, _outcomes(out, others)
        if found == before:
            return said


def _outcomes(out: Path, plans: Sequence[LogPlan]) -> dict[str, LogSummary | None]:
    """What has become of logs that other processes make: a summary, None for one that is set aside; of one without an outcome
    there is nothing."""
    found: dict[str, LogSummary | None] = {}
    for plan in plans:
        summary = finished_log(out, plan.header)
        if summary is not None or set_aside_path(out, plan.header.log).exists():
            found[plan.header.log] = summary
    return found


# The summary of a log, or why its raw data could not be read; and how many points were not finite.
_Outcome = tuple[LogSummary | DataError, int]


def _written(
    out: Path, plans: Sequence[LogPlan], xyz_codec: Codec, processes: int, tick: Callable[[int], None]
) -> Iterator[_Outcome]:
    """Writes the logs; yields what became of each, in order."""
    if processes == 1 or len(plans) < 2:
        for plan in plans:
            yield _write_log(out, plan, xyz_codec, tick)
        return
    with worker_pool(min(processes, len(plans))) as pool:
        futures = [pool.submit(_write_log, out, plan, xyz_codec) for plan in plans]
        try:
            for future in futures:
                yield future.result()
        except BrokenProcessPool as error:
            pool.shutdown()  # the others are being ended, too: none may hold a file any more when this is told
            raise DataError(
                f"{out}: a process that prepared a log was ended from outside, perhaps for want of memory. "
                "Run again with fewer processes: finished logs are kept."
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _write_log(out: Path, plan: LogPlan, xyz_codec: Codec, tick: Callable[[int], None] = lambda frames: None) -> _Outcome:
    lost_points = 0
    try:
        with LogWriter(log_path(out, plan.header.log), plan.header, xyz_codec=xyz_codec) as writer:
            for index, (frame, lost) in enumerate(_told_apart(plan.frames)):
                writer.add(frame)
                lost_points += lost
                tick(index + 1)
    except _RawDataError as error:
        return error.why, 0
    return writer.finished, lost_points


class _RawDataError(Exception):
    """Raw data could not be read, which is told apart from prepared data that could not be written."""

    def __init__(self, why: DataError) -> None:
        super().__init__(str(why))
        self.why = why


def _told_apart(frames: Callable[[], Iterator[tuple[Frame, int]]]) -> Iterator[tuple[Frame, int]]:
    try:
        yield from frames()
    except DataError as error:
        raise _RawDataError(error) from error


def refuse_missing(raw: Path, missing: Sequence[Path | str], *, skip_missing: bool) -> None:
    """Refuses a partial download unless it is wanted.

    Raises:
        DataError: with the number of missing files, in all and by folder, and the first of them.
    """
    if not missing or skip_missing:
        return
    folders = Counter(str(Path(file).parent) for file in missing)
    counts = [f"{count} in {folder}" for folder, count in folders.most_common(_FOLDERS_NAMED)]
    if len(folders) > len(counts):
        counts.append(f"the others in {len(folders) - len(counts)} more folders")
    raise DataError(
        f"{raw}: {len(missing)} files that belong to the dataset are not on disk ({', '.join(counts)}), the first is "
        f"{missing[0]}. Download the archives that hold them, or pass --skip-missing to leave these out."
    )


def check_clock(times: Sequence[int] | NDArray[np.int64], where: object, unit: str = "us") -> None:
    """Sweeps of a log come one after the other.

    Raises:
        DataError: naming the first sweep whose time is that of the one before it, or earlier.
    """
    steps = np.diff(np.asarray(times, np.int64))
    wrong = np.flatnonzero(steps <= 0)
    if len(wrong):
        at = int(wrong[0]) + 1
        what = "is the time of the sweep before it too" if steps[at - 1] == 0 else "lies before that of the sweep before it"
        raise DataError(
            f"{where}: the time of sweep {at}, {times[at]} {unit}, {what}. Times of a log must grow. Sort the sweeps by time, "
            "or correct it."
        )


def previous_sweeps(index: int, sweeps: int) -> tuple[int, ...]:
    """Indices of the `sweeps` frames before frame `index`, newest first."""
    return tuple(range(index - 1, max(-1, index - 1 - sweeps), -1))


def finite_points(points: PointCloud) -> NDArray[np.bool_]:
    """(N,) which points are finite: coordinates, intensity and, where there are some, elongation and time."""
    finite = np.isfinite(points.xyz).all(axis=1) & np.isfinite(points.intensity)
    for column in (points.elongation, points.time_s):
        if column is not None:
            finite &= np.isfinite(column)
    return finite


def keep_points(
    keep: NDArray[np.bool_],
    points: PointCloud,
    labels: NDArray[np.uint8] | None = None,
    instances: NDArray[np.uint16] | None = None,
) -> tuple[PointCloud, NDArray[np.uint8] | None, NDArray[np.uint16] | None, int]:
    """The points of a mask (N,) with their labels and instances, and how many are left out."""
    lost = len(keep) - int(np.count_nonzero(keep))
    if not lost:
        return points, labels, instances, 0
    return (
        points.select(keep),
        None if labels is None else labels[keep],
        None if instances is None else instances[keep],
        lost,
    )


def checksum(lines: Iterable[object]) -> int:
    """CRC-32C of values that JSON can hold: what a log is made from, so that a change makes it anew."""
    crc = 0
    for line in lines:
        crc = google_crc32c.extend(crc, json.dumps(line).encode())
    return crc


def file_size(path: Path) -> int:
    """Bytes of a file.

    Raises:
        DataError: if it cannot be reached, as a link that leads to itself.
    """
    try:
        return path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}). Copy it again, or take it away.") from error


def checksum_file(path: Path) -> int:
    """CRC-32C of a file, read piece by piece.

    Raises:
        DataError: if it cannot be read.
    """
    crc = 0
    try:
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                crc = google_crc32c.extend(crc, piece)
    except OSError as error:
        raise unreadable(path, error) from error
    return crc
