"""How all writers of towns go about it: scenes side by side, what is missing only, refusals, the splits last."""

from __future__ import annotations

import multiprocessing
import queue
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

from picture3d.errors import ConfigError, DataError
from picture3d.files import read_json_object, write_json
from picture3d.workers import worker_pool

# Written last into the root of a dataset: its settings, and which scenes are for training and which for validation.
SPLITS_FILE = "picture3d_splits.json"
# What is not finished, and the settings it was begun with; removed in the end.
UNFINISHED = "unfinished"
Progress = Callable[[int, int], None]  # (frames done, frames in all)
Job = TypeVar("Job")


def write_town(
    root: Path,
    settings: dict[str, Any],
    jobs: list[Job],
    *,
    write: Callable[[Job], Iterable[int]],
    is_written: Callable[[Job], bool],
    frames: int,
    own_folders: Iterable[str],
    finish: Callable[[], None] = lambda: None,
    processes: int = 1,
    progress: Progress | None = None,
) -> None:
    """Writes a dataset, or what is missing of it; does nothing if it is whole.

    Args:
        root: folder of the dataset; made if missing.
        settings: all that the bytes depend on, as JSON.
        jobs: one per scene.
        write: see :func:`run_jobs`; keeps what is unfinished in ``root/UNFINISHED``.
        is_written: whether an earlier run finished a scene.
        frames: of a scene.
        own_folders: below the root, in which files are that this command did not write, unless it began the dataset.
        finish: called when all scenes are written, before the dataset counts as whole.
        processes: scenes written at the same time.
        progress: called with (frames done, frames in all).

    Raises:
        ConfigError: if `root` holds a dataset of other settings, or files of somebody else.
        DataError: if a file cannot be written.
    """
    total = len(jobs) * frames
    report = progress or (lambda done, total: None)
    if (root / SPLITS_FILE).exists():
        refuse_other(root / SPLITS_FILE, settings)
        shutil.rmtree(root / UNFINISHED, ignore_errors=True)
        report(total, total)
        return
    plan = root / UNFINISHED / "settings.json"
    if plan.exists():
        refuse_other(plan, settings)
    else:
        for folder in own_folders:
            if (root / folder).exists():
                raise ConfigError(
                    f"{root / folder} holds files that this command did not write. Choose an empty folder: "
                    "real data is never mixed with a town."
                )
        write_json(plan, settings)
    missing = [job for job in jobs if not is_written(job)]
    done = (len(jobs) - len(missing)) * frames
    report(done, total)
    for written in run_jobs(write, missing, processes):
        done += written
        report(done, total)
    finish()
    write_json(root / SPLITS_FILE, settings)
    shutil.rmtree(root / UNFINISHED)


def run_jobs(write: Callable[[Job], Iterable[int]], jobs: list[Job], processes: int) -> Iterator[int]:
    """Writes all jobs, `processes` at a time; yields what `write` yields: the number of frames finished since the last time.

    Args:
        write: a function of a module (workers find it by name) that writes one job.
        jobs: picklable descriptions of what to write.
        processes: 1 writes in this process, one job after the other.

    Raises:
        DataError: if a worker was ended from outside; else what `write` raises.
    """
    if processes == 1 or len(jobs) < 2:
        for job in jobs:
            yield from write(job)
        return
    context = multiprocessing.get_context("spawn")
    ticks, stop = context.Queue(), context.Event()
    with worker_pool(min(processes, len(jobs)), initializer=_set_worker, initargs=(ticks, stop)) as pool:
        futures = [pool.submit(_write_in_worker, write, job) for job in jobs]
        try:
            while not all(future.done() for future in futures) or not ticks.empty():
                try:
                    yield ticks.get(timeout=0.2)
                except queue.Empty:
                    for future in futures:
                        if future.done():
                            future.result()
            for future in futures:
                future.result()
        except BrokenProcessPool as error:
            pool.shutdown()  # the others are being ended, too: none may hold a file any more when this is told
            raise DataError(
                "A process that wrote a scene was ended from outside, perhaps for want of memory. "
                "Run again with fewer processes: finished scenes are kept."
            ) from error
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)


_ticks: Any = None
_stop: Any = None


def _set_worker(ticks: Any, stop: Any) -> None:
    global _ticks, _stop
    _ticks, _stop = ticks, stop


def _write_in_worker(write: Callable[[Any], Iterable[int]], job: Any) -> None:
    for written in write(job):
        _ticks.put(written)
        if _stop.is_set():
            return


def check_counts(*, scenes: int, frames: tuple[str, int], val_scenes: int, processes: int) -> None:
    """Refuses impossible numbers; `frames` is name and value of the number of frames of a scene.

    Raises:
        ConfigError: naming the number.
    """
    for name, value, least in (("scenes", scenes, 1), (*frames, 1), ("val_scenes", val_scenes, 0), ("processes", processes, 1)):
        if value < least:
            raise ConfigError(f"{name} = {value}: too few. Ask for at least {least}.")
    if scenes > 9999:
        raise ConfigError(f"scenes = {scenes}: town seeds are told apart for up to 9999 scenes; use another seed for more.")
    if val_scenes > scenes:
        raise ConfigError(
            f"val_scenes = {val_scenes}, but there are only {scenes} scenes. Ask for fewer, or write more scenes."
        )


def refuse_other(path: Path, settings: dict[str, Any]) -> None:
    """Refuses to go on with a dataset of other settings than those in `path`.

    Raises:
        ConfigError: naming the settings that differ.
    """
    found = read_json_object(path, max_bytes=1 << 24)
    different = sorted(key for key in {*found, *settings} if found.get(key) != settings.get(key))
    if different:
        raise ConfigError(
            f"{path} belongs to a dataset of other settings ({', '.join(different)} differ). "
            "Choose another folder, remove this one, or repeat the command with its settings."
        )
