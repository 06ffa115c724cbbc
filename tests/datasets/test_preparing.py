"""Logs made one after the other or side by side; raw data that cannot be read; processes that die."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from picture3d.datasets.prepared import LogHeader, PreparedDataset
from picture3d.datasets.preparing import LogPlan, write_logs
from picture3d.errors import DataError
from picture3d.structures.frame import Frame
from tests.datasets.made_frames import made_frame


def good(log: str, count: int) -> Iterator[tuple[Frame, int]]:
    for index in range(count):
        yield made_frame(log, index), 2


def damaged(log: str) -> Iterator[tuple[Frame, int]]:
    yield made_frame(log, 0), 0
    raise DataError(f"{log}.raw: cut off at byte 7")


def plan(log: str, frames: Callable[[], Iterator[tuple[Frame, int]]], count: int = 2) -> LogPlan:
    return LogPlan(LogHeader(log, "made", "nuscenes-32"), count, frames)


def write(out: Path, plans: list[LogPlan], **settings: object):
    splits = {"train": [p.header.log for p in plans]}
    return write_logs(out, plans, name="made", label_set_name="nuscenes-32", splits=splits, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("processes", [1, 2])
def test_damaged_logs_are_set_aside_only_if_asked(tmp_path, processes):
    plans = [plan("a", partial(good, "a", 2)), plan("b", partial(damaged, "b")), plan("c", partial(good, "c", 2))]
    with pytest.raises(DataError, match=r"^b\.raw: cut off at byte 7$"):
        write(tmp_path / "strict", plans, processes=processes)
    assert not (tmp_path / "strict" / "dataset.json").exists()
    calls: list[tuple[int, int]] = []
    summary = write(
        tmp_path / "out", plans, processes=processes, set_damaged_aside=True,
        progress=lambda done, total: calls.append((done, total)),
    )  # fmt: skip
    assert summary.set_aside == ("log b is set aside: b.raw: cut off at byte 7",)
    assert (summary.logs, summary.logs_made, summary.frames, summary.dropped_points) == (2, 2, 4, 8)
    assert PreparedDataset(tmp_path / "out").logs("train") == ("a", "c")
    assert not list((tmp_path / "out" / "logs").glob("b*"))
    assert calls[0] == (0, 6)
    assert calls[-1] == (6, 6)
    assert calls == sorted(calls)


def test_a_process_that_dies_is_told_and_what_is_finished_stays(tmp_path):
    plans = [plan("a", partial(good, "a", 2)), plan("b", partial(os._exit, 9))]
    write(tmp_path / "out", plans[:1])
    before = (tmp_path / "out/logs/a.p3d").stat().st_mtime_ns
    with pytest.raises(DataError, match="a process that prepared a log was ended from outside"):
        write(tmp_path / "out", [*plans, plan("c", partial(os._exit, 9))], processes=2)
    assert (tmp_path / "out/logs/a.p3d").stat().st_mtime_ns == before
    assert not (tmp_path / "out" / "dataset.json").exists()
    again = write(tmp_path / "out", [plans[0], plan("b", partial(good, "b", 1))], processes=2)
    assert (again.logs, again.logs_made) == (2, 1)
