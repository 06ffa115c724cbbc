"""A disk that fills up or stops taking files, at the first, a middle and the last file of every writing command.

The system's own calls are made to fail in this process: a test may run as root, which no permission bit binds, and need not be
allowed to mount a small disk. What is promised: status 2, one line that names the place, nothing half-written, and the same
command, once the disk is mended, ends with the files of a run that met no trouble.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from picture3d.cli import main
from picture3d.files import LOCK_NAME, PARTIAL_SUFFIX
from tests.commands import test_kill
from tests.commands.test_kill import Place, contents

place = test_kill.place  # the same made data

COMMANDS = ["synth", "synth waymo", "prepare", "targets", "objects", "pretrain", "segmentation", "detection"]


class Disk:
    """Counts the files that reach it; the one of number `fails_at` (from 1) and all later ones are refused by `number`."""

    def __init__(self, folder: Path, fails_at: int | None, number: int) -> None:
        self.folder, self.fails_at, self.number = folder.resolve(), fails_at, number
        self.files = 0

    def takes(self, path: str | os.PathLike[str]) -> None:
        if Path(path).resolve().is_relative_to(self.folder):
            self.files += 1
            if self.fails_at is not None and self.files >= self.fails_at:
                raise OSError(self.number, os.strerror(self.number), str(path))


@contextmanager
def disk(folder: Path, fails_at: int | None = None, number: int = errno.ENOSPC) -> Iterator[Disk]:
    """A disk under `folder`: a full one says so when a file is synced, one that takes no files when they get their names."""
    state = Disk(folder, fails_at, number)
    real_sync, real_replace = os.fsync, os.replace

    def sync(handle: int) -> None:
        name = os.readlink(f"/proc/self/fd/{handle}")
        if not os.path.isdir(name):
            state.takes(name)
        real_sync(handle)

    def replace(source: Any, target: Any) -> None:
        state.takes(target)
        real_replace(source, target)

    with pytest.MonkeyPatch.context() as patch:
        if number == errno.ENOSPC:
            patch.setattr(os, "fsync", sync)
        else:
            patch.setattr(os, "replace", replace)
        yield state


def run(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit status and what was said on standard error."""
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["picture3d", *words])
        with pytest.raises(SystemExit) as end:
            main()
    return int(end.value.code or 0), capsys.readouterr().err


def left_overs(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.endswith(PARTIAL_SUFFIX) or path.name == LOCK_NAME]


def failed_and_mended(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, numbers: list[int]) -> None:
    whole = tmp_path / "whole" / "out"
    whole.parent.mkdir()
    place.before(name, whole)
    with disk(whole, number=numbers[0]) as counted:
        status, said = run(place.command(name, whole), capsys)
    assert status == 0, said
    assert counted.files > 0
    expected = contents(whole)
    moments = sorted({1, (counted.files + 1) // 2, counted.files})
    for index, moment in enumerate(moments if len(numbers) > 1 else moments[-1:]):
        number = numbers[index % len(numbers)]
        out = tmp_path / f"broken{index}" / "out"
        out.parent.mkdir()
        place.before(name, out)
        earlier = contents(out) if out.exists() else {}
        with disk(out, moment, number):
            status, said = run(place.command(name, out), capsys)
        assert status == 2, said
        errors = [line for line in said.splitlines() if "error" in line.lower()]
        assert len(errors) == 1, said
        assert errors[0].startswith("error: ")
        assert str(out) in errors[0]
        assert os.strerror(number) in errors[0]
        assert "again" in errors[0] or "goes on" in errors[0]
        assert "Traceback" not in said
        assert left_overs(out.parent) == []
        now = contents(out) if out.exists() else {}
        assert {path for path in earlier if now.get(path) != earlier[path]} == set(), "what was there before is untouched"
        status, said = run(place.command(name, out), capsys)
        assert status == 0, said
        assert contents(out) == expected


@pytest.mark.parametrize("name", ["prepare", "targets", "pretrain"])
def test_a_full_disk_is_one_clear_line_and_the_command_goes_on_when_mended(place, tmp_path, capsys, name):
    failed_and_mended(place, tmp_path, capsys, name, [errno.ENOSPC])


@pytest.mark.long
@pytest.mark.parametrize("name", COMMANDS)
def test_a_disk_that_takes_no_file_is_one_clear_line_at_any_file_of_any_command(place, tmp_path, capsys, name):
    failed_and_mended(place, tmp_path, capsys, name, [errno.ENOSPC, errno.EROFS, errno.EACCES])


def test_sweeps_that_vanish_while_they_are_prepared_are_named_and_the_rest_is_kept(place, tmp_path, capsys, monkeypatch):
    raw, out = tmp_path / "raw", tmp_path / "out"
    shutil.copytree(place.root / "raw", raw)
    real_replace = os.replace

    def replace(source: Any, target: Any) -> None:
        real_replace(source, target)
        if Path(target).suffix == ".p3d" and raw.exists():  # the first log is whole
            raw.rename(tmp_path / "away")

    monkeypatch.setattr(os, "replace", replace)
    words = ["prepare", "nuscenes", str(raw), str(out)]
    status, said = run(words, capsys)
    assert status == 1, said  # what the other logs are made from is gone: they are set aside, and told on standard output
    logs = json.loads((out / "dataset.json").read_text())["logs"]
    assert {path.stem for path in (out / "logs").iterdir()} == set(logs)
    assert len(logs) == 1
    assert left_overs(out) == []
    (tmp_path / "away").rename(raw)
    monkeypatch.setattr(os, "replace", real_replace)
    status, said = run(words, capsys)
    assert status == 0, said
    assert contents(out) == contents(place.root / "prepared")


def test_no_duration_is_measured_by_a_clock_that_can_be_set_back():
    package = Path(main.__code__.co_filename).parent
    assert [path.name for path in package.rglob("*.py") if "time.time()" in path.read_text(encoding="utf-8")] == []
