"""Logs made one after the other or side by side; raw data that cannot be read; processes that die."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from picture3d.datasets import preparing
from picture3d.datasets.argoverse2 import prepare_argoverse2
from picture3d.datasets.nuscenes import prepare_nuscenes
from picture3d.datasets.once import prepare_once
from picture3d.datasets.point_files import prepare_points
from picture3d.datasets.prepared import LogHeader, PreparedDataset, PreparedSummary, write_dataset
from picture3d.datasets.preparing import LogPlan, damaged_plan, refuse_missing, write_logs
from picture3d.datasets.semantickitti import prepare_semantickitti
from picture3d.errors import DataError
from picture3d.structures.frame import Frame
from tests.datasets import test_once as once
from tests.datasets import test_point_files as point_files
from tests.datasets import test_semantickitti as semantickitti
from tests.datasets.made_frames import made_frame
from tests.datasets.raw_nuscenes import RawWorld

# How to prepare a made dataset, a file of its second log, and its other logs.
PrepareAll = tuple[Callable[..., PreparedSummary], Path, tuple[str, ...]]


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


def test_damaged_logs_are_set_aside_and_the_others_go_on(tmp_path):
    plans = [plan("a", partial(good, "a", 2)), plan("b", partial(damaged, "b")), plan("c", partial(good, "c", 2))]
    calls: list[tuple[int, int]] = []
    summary = write(tmp_path / "out", plans, progress=lambda done, total: calls.append((done, total)))
    assert summary.set_aside == ("log b is set aside: b.raw: cut off at byte 7",)
    assert (summary.logs, summary.logs_made, summary.frames, summary.dropped_points) == (2, 2, 4, 8)
    assert PreparedDataset(tmp_path / "out").logs("train") == ("a", "c")
    (note,) = (tmp_path / "out" / "logs").glob("b*")
    assert json.loads(note.read_text()) == {"why": "b.raw: cut off at byte 7"}
    assert calls[0] == (0, 6)
    assert calls[-1] == (6, 6)
    assert calls == sorted(calls)


def test_a_log_that_cannot_even_be_listed_is_set_aside_and_no_older_one_is_kept(tmp_path):
    plans = [plan("a", partial(good, "a", 2)), plan("b", partial(good, "b", 2))]
    write(tmp_path / "out", plans)
    plans[1] = damaged_plan(plans[1].header, DataError("b/poses.txt, line 3: expected 12 numbers"))
    summary = write(tmp_path / "out", plans)
    assert summary.set_aside == ("log b is set aside: b/poses.txt, line 3: expected 12 numbers",)
    assert (summary.logs, summary.logs_made) == (1, 0)
    assert PreparedDataset(tmp_path / "out").logs("train") == ("a",)
    assert {path.name for path in (tmp_path / "out/logs").iterdir()} == {"a.p3d", "b.p3d.damaged"}
    with pytest.raises(DataError, match=r"no log could be read\..* log b is set aside: b/poses\.txt"):
        write(tmp_path / "none", plans[1:])
    assert not (tmp_path / "none" / "dataset.json").exists()


def test_missing_files_are_told_by_folder():
    refuse_missing(Path("raw"), [], skip_missing=False)
    missing = ["sweeps/a", "sweeps/b", "samples/c", "labels/d", "maps/e"]
    refuse_missing(Path("raw"), missing, skip_missing=True)
    expected = (
        r"raw: 5 files .* \(2 in sweeps, 1 in samples, 1 in labels, the others in 1 more folders\), the first is sweeps/a.*"
        r"--skip-missing"
    )
    with pytest.raises(DataError, match=expected):
        refuse_missing(Path("raw"), missing, skip_missing=False)


def _semantickitti(raw: Path) -> PrepareAll:
    for name in ("00", "01", "08"):
        semantickitti.write_sequence(raw, name)
    return prepare_semantickitti, raw / "sequences/01/velodyne/000001.bin", ("00", "08")


def _once(raw: Path) -> PrepareAll:
    for name in ("000076", "000077", "000078"):
        once.write_sequence(raw, name)
    return prepare_once, raw / f"data/000077/lidar_roof/{once.FIRST_MS}.bin", ("000076", "000078")


def _nuscenes(raw: Path) -> PrepareAll:
    RawWorld(raw, scenes=3).write()
    return prepare_nuscenes, raw / "samples/LIDAR_TOP/s1-d3.pcd.bin", ("scene-0001", "scene-0003")


def _points(raw: Path) -> PrepareAll:
    for log in "abc":
        point_files.write_sweeps(raw / log)
    return partial(prepare_points, layout=point_files.LAYOUT), raw / "b/sweep9.bin", ("a", "c")


def _argoverse2(raw: Path) -> PrepareAll:
    argoverse2 = pytest.importorskip("tests.datasets.test_argoverse2")
    for log in "abc":
        argoverse2.write_log(raw / "train" / log)
    return prepare_argoverse2, raw / f"train/b/sensors/lidar/{10**15}.feather", ("a", "c")


@pytest.mark.parametrize("make", [_nuscenes, _semantickitti, _once, _argoverse2, _points])
def test_every_dataset_sets_a_damaged_log_aside_whatever_the_number_of_processes(tmp_path, make):
    prepare, damaged_file, whole = make(tmp_path / "raw")
    damaged_file.write_bytes(damaged_file.read_bytes()[:-3])
    alone = prepare(tmp_path / "raw", tmp_path / "alone")
    together = prepare(tmp_path / "raw", tmp_path / "together", processes=2)
    assert alone.set_aside == together.set_aside
    (why,) = alone.set_aside
    assert str(damaged_file) in why
    for out in (tmp_path / "alone", tmp_path / "together"):
        assert PreparedDataset(out).logs("train" if make is not _semantickitti else None) == whole
    files = [{path.name: path.read_bytes() for path in (tmp_path / out / "logs").iterdir()} for out in ("alone", "together")]
    assert files[0] == files[1]
    assert {name for name in files[0] if name.endswith(".p3d")} == {f"{log}.p3d" for log in whole}
    assert len(files[0]) == len(whole) + 1, "and why one is missing"


@pytest.mark.parametrize("make", [_semantickitti, _argoverse2])
def test_a_file_that_is_a_link_to_itself_sets_its_log_aside(tmp_path, make):
    prepare, file, _ = make(tmp_path / "raw")
    file.unlink()
    file.symlink_to(file.name)
    (file.parent / "again").symlink_to(file.parent, target_is_directory=True)
    (why,) = prepare(tmp_path / "raw", tmp_path / "out").set_aside
    assert f"{file}: cannot be read (Too many levels" in why


@pytest.mark.parametrize("make", [_once, _points])
def test_a_sweep_that_is_a_link_to_itself_is_not_there(tmp_path, make):
    prepare, file, _ = make(tmp_path / "raw")
    whole = prepare(tmp_path / "raw", tmp_path / "whole").frames
    file.unlink()
    file.symlink_to(file.name)
    (file.parent / "again").symlink_to(file.parent, target_is_directory=True)
    chosen = {"skip_missing": True} if make is _once else {}
    assert prepare(tmp_path / "raw", tmp_path / "out", **chosen).frames == whole - 1


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_processes_of_a_job_leave_the_files_of_one_also_when_the_job_is_run_again(tmp_path, order):
    plans = [plan(log, partial(damaged, log) if log in "bd" else partial(good, log, 2)) for log in "abcde"]
    whole = [plan(log, partial(good, log, 2)) for log in "abcde"]
    own = {0: ("d",), 1: ("b",), 2: ()}  # ranks of logs: a 0, b 1, c 2, d 0, e 1
    alone = write(tmp_path / "one", plans)
    assert alone.set_aside == tuple(f"log {log} is set aside: {log}.raw: cut off at byte 7" for log in "bd")
    before = contents(tmp_path / "one")
    write(tmp_path / "one", whole)
    after = contents(tmp_path / "one")
    for ranks in (order, (0, 1, 2), order[::-1]):
        for rank in ranks:
            said = write(tmp_path / "parts", plans, share=(rank, 3)).set_aside
            assert said == tuple(f"log {log} is set aside: {log}.raw: cut off at byte 7" for log in own[rank])
        assert contents(tmp_path / "parts") == before
    for rank in order:
        assert write(tmp_path / "parts", whole, share=(rank, 3)).set_aside == ()
    assert contents(tmp_path / "parts") == after, "the mended logs are there, and no note"


@pytest.mark.parametrize("mended", ["ab", "a", ""])
def test_a_process_that_writes_down_what_another_has_changed_meanwhile_looks_again(tmp_path, monkeypatch, mended):
    plans = [plan("a", partial(damaged, "a")), plan("b", partial(damaged, "b")), plan("c", partial(good, "c", 2))]
    write(tmp_path / "out", plans)
    again = [plan(log, partial(good, log, 2) if log in f"{mended}c" else partial(damaged, log)) for log in "abc"]
    ahead = iter([0, 1])  # ranks that do their part between the look of rank 2 and its writing, each before one writing

    def overtaken(*args: Any, **settings: Any) -> None:
        for rank in itertools.islice(ahead, 1):
            write(tmp_path / "out", again, share=(rank, 3))
        write_dataset(*args, **settings)

    monkeypatch.setattr(preparing, "write_dataset", overtaken)
    write(tmp_path / "out", again, share=(2, 3))
    assert next(ahead, None) is None, "both have come"
    assert PreparedDataset(tmp_path / "out").logs() == (*mended, "c")


def test_a_job_with_more_processes_than_logs_and_no_readable_log_fails_where_the_log_was_read(tmp_path):
    plans = [plan("a", partial(damaged, "a"))]
    with pytest.raises(DataError, match="no log could be read"):
        write(tmp_path / "out", plans, share=(0, 2))
    assert write(tmp_path / "out", plans, share=(1, 2)).logs == 0
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_a_process_that_dies_is_told_and_what_is_finished_stays(tmp_path):
    plans = [plan("a", partial(good, "a", 2)), plan("b", partial(os._exit, 9))]
    write(tmp_path / "out", plans[:1])
    before = (tmp_path / "out/logs/a.p3d").stat().st_mtime_ns
    with pytest.raises(DataError, match="a process that prepared a log was ended from outside"):
        write(tmp_path / "out", [*plans, plan("c", partial(os._exit, 9))], processes=2)
    assert multiprocessing.active_children() == [], "none of them may hold a file any more"
    assert (tmp_path / "out/logs/a.p3d").stat().st_mtime_ns == before
    assert not (tmp_path / "out" / "dataset.json").exists()
    again = write(tmp_path / "out", [plans[0], plan("b", partial(good, "b", 1))], processes=2)
    assert (again.logs, again.logs_made) == (2, 1)
