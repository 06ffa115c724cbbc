"""Disks that fill up, take no files or cannot be read, inputs that vanish and second processes: one clear line, nothing lost.

The system's own calls are made to fail in this process: a test may run as root, which no permission bit binds, and need not be
allowed to mount a small disk. What is promised: status 2, one line that names the place, nothing half-written, and the same
command, once the trouble is mended, ends with the files of a run that met none.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from picture3d.cli import main
from picture3d.files import LOCK_NAME, PARTIAL_SUFFIX, whole_file
from tests.command_line import do
from tests.commands.made_place import COMMANDS, RAW, READERS, Place, contents

FULL, READ_ONLY, FORBIDDEN, BROKEN = errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO
TROUBLE = [(FULL, 0.5), (READ_ONLY, 0.0), (FORBIDDEN, 0.3)]  # and at which share of the files it comes
A_DAY_NS = 86_400 * 10**9


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
def disk(folder: Path, fails_at: int | None = None, number: int = FULL) -> Iterator[Disk]:
    """A disk under `folder`: a full one says so when a file is synced, one that takes no files when one is made."""
    state = Disk(folder, fails_at, number)
    real_sync, real_open, real_mkdir = os.fsync, os.open, os.mkdir

    def sync(handle: int) -> None:
        name = os.readlink(f"/proc/self/fd/{handle}")
        if not os.path.isdir(name):
            state.takes(name)
        real_sync(handle)

    def opened(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            state.takes(path)
        return real_open(path, flags, *more, **named)

    def made(path: Any, *more: Any, **named: Any) -> None:
        state.takes(path)
        real_mkdir(path, *more, **named)

    with pytest.MonkeyPatch.context() as patch:
        if number == FULL:
            patch.setattr(os, "fsync", sync)
        else:
            patch.setattr(os, "open", opened)
            patch.setattr(os, "mkdir", made)
        yield state


def run(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit status and what was said on standard error; with status 1, that not all could be read, on both outputs."""
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["picture3d", *words])
        with pytest.raises(SystemExit) as end:
            main()
    printed, status = capsys.readouterr(), int(end.value.code or 0)
    return status, printed.out + printed.err if status == 1 else printed.err


def error_of(said: str) -> str:
    """The one line that says what is wrong."""
    assert "Traceback" not in said
    errors = [line for line in said.splitlines() if "error" in line.lower()]
    assert len(errors) == 1, said
    assert errors[0].startswith("error: ")
    return errors[0]


def left_overs(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.endswith(PARTIAL_SUFFIX) or path.name == LOCK_NAME]


def prepared_for(place: Place, folder: Path, name: str) -> Path:
    """An `out` folder for a command, with what has to be there before."""
    out = folder / "out"
    folder.mkdir()
    place.before(name, out)
    return out


def set_clock_of(folder: Path, nanoseconds: int) -> None:
    """As if all that is there had been written when the clock stood elsewhere."""
    for path in folder.rglob("*") if folder.exists() else ():
        os.utime(path, ns=(nanoseconds, nanoseconds))


_whole_runs: dict[tuple[Path, str], tuple[dict[str, str], int]] = {}


def whole_run(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> tuple[dict[str, str], int]:
    """What an untroubled run leaves, and how many files it writes; done once for each command."""
    if (place.root, name) not in _whole_runs:
        out = prepared_for(place, tmp_path / "whole", name)
        with disk(out) as counted:
            status, said = run(place.command(name, out), capsys)
        assert status == 0, said
        assert counted.files > 0
        _whole_runs[place.root, name] = contents(out), counted.files
    return _whole_runs[place.root, name]


def troubled_and_mended(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, trouble: list[tuple[int, float]]
) -> None:
    expected, files = whole_run(place, tmp_path, capsys, name)
    out = prepared_for(place, tmp_path / "broken", name)
    for number, share in trouble:
        earlier = contents(out) if out.exists() else {}
        with disk(out, 1 + int(share * (files - 1)), number) as counted:
            status, said = run(place.command(name, out), capsys)
        if counted.files < counted.fails_at and status == 0:  # type: ignore[operator]  # so much was finished before
            break
        assert status == 2, said
        error = error_of(said)
        assert str(out) in error
        assert os.strerror(number) in error
        assert "again" in error or "goes on" in error
        assert left_overs(out.parent) == []
        now = contents(out) if out.exists() else {}
        assert {path for path in earlier if now.get(path) != earlier[path]} == set(), "what was there before is untouched"
        # Clocks jump, too: what is finished is from tomorrow, or from 1970.
        set_clock_of(out, 0 if number == FULL else os.stat(tmp_path).st_mtime_ns + A_DAY_NS)
    status, said = run(place.command(name, out), capsys)
    assert status == 0, said
    assert contents(out) == expected


@pytest.mark.parametrize("name", ["prepare", "targets", "pretrain", "semantickitti", "predict json"])
def test_a_full_disk_is_one_clear_line_and_the_command_goes_on_when_mended(place, tmp_path, capsys, name):
    troubled_and_mended(place, tmp_path, capsys, name, TROUBLE[:1])


@pytest.mark.long
@pytest.mark.parametrize("name", COMMANDS)
def test_a_disk_that_takes_no_file_is_one_clear_line_at_any_file_of_any_command(place, tmp_path, capsys, name):
    troubled_and_mended(place, tmp_path, capsys, name, TROUBLE)


@contextmanager
def vanishing(source: Path, out: Path) -> Iterator[None]:
    """`source` is moved away when `out` gets its first whole file."""
    real_replace, away = os.replace, source.with_name(source.name + "-away")

    def replace(one: Any, other: Any) -> None:
        real_replace(one, other)
        if source.exists() and Path(other).is_relative_to(out):
            source.rename(away)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", replace)
        try:
            yield
        finally:
            away.rename(source)


@contextmanager
def unreadable(source: Path, at: int) -> Iterator[None]:
    """The disk of prepared frames below `source` fails at the piece of number `at`."""
    real_read, seen = os.preadv, 0

    def read(handle: int, *more: Any) -> int:
        nonlocal seen
        if Path(os.readlink(f"/proc/self/fd/{handle}")).is_relative_to(source.resolve()):
            seen += 1
            if seen >= at:
                raise OSError(BROKEN, os.strerror(BROKEN))
        return real_read(handle, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "preadv", read)
        yield


def vanished_and_mended(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    expected, _ = whole_run(place, tmp_path, capsys, name)
    out = prepared_for(place, tmp_path / "broken", name)
    source = place.raw(name) / ("nuScenes-Occupancy-v0.1" if name == "occupancy" else "")
    with vanishing(source, out):
        status, said = run(place.command(name, out), capsys)
    if name == "occupancy":  # a scene without labels is nothing damaged: one that vanishes ends the run
        assert status == 2, said
        assert str(source) in error_of(said)
    else:
        assert status == 1, said
        aside = [line for line in said.splitlines() if " is set aside: " in line]
        assert aside
        assert all(f"aside: {source}" in line for line in aside), "the file is named"
        known = json.loads((out / "dataset.json").read_text())["logs"]
        assert {path.stem for path in (out / "logs").glob("*.p3d")} == set(known)
    assert "Traceback" not in said
    assert left_overs(out.parent) == []
    status, said = run(place.command(name, out), capsys)
    assert status == 0, said
    assert contents(out) == expected


@pytest.mark.parametrize("name", ["prepare", "once"])
def test_a_log_whose_files_vanish_is_set_aside_and_made_when_they_are_back(place, tmp_path, capsys, name):
    vanished_and_mended(place, tmp_path, capsys, name)


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(RAW - {"prepare", "once"}))
def test_a_log_of_any_dataset_whose_files_vanish_is_set_aside_and_made_when_they_are_back(place, tmp_path, capsys, name):
    vanished_and_mended(place, tmp_path, capsys, name)


def unreadable_and_mended(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    expected, _ = whole_run(place, tmp_path, capsys, name)
    out = prepared_for(place, tmp_path / "broken", name)
    source = out if name in {"targets", "objects", "intensity"} else place.root / "prepared"
    earlier = contents(out) if out.exists() else {}
    with unreadable(source, 5):
        status, said = run(place.command(name, out), capsys)
    assert status == 2, said
    assert str(source) in error_of(said)
    assert left_overs(out.parent) == []
    now = contents(out) if out.exists() else {}
    assert {path for path in earlier if now.get(path) != earlier[path]} == set(), "what was there before is untouched"
    status, said = run(place.command(name, out), capsys)
    assert status == 0, said
    assert contents(out) == expected


@pytest.mark.parametrize("name", ["predict lidarseg", "intensity"])
def test_frames_that_cannot_be_read_are_named_and_nothing_half_written_stays(place, tmp_path, capsys, name):
    unreadable_and_mended(place, tmp_path, capsys, name)


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(READERS - {"predict lidarseg", "intensity"}))
def test_frames_that_cannot_be_read_are_named_by_every_command_that_reads_them(place, tmp_path, capsys, name):
    unreadable_and_mended(place, tmp_path, capsys, name)


ONE_FILE = {
    "predict json": "found.json",
    "predict nuscenes": "found.json",
    "predict pictures": "scene-0003_00000.png",
    "evaluate segmentation": "evaluation_val.json",
    "evaluate detection": "evaluation_val.json",
    "probe": "probe.json",
    "report": "report.html",
    "intensity": "intensity.json",
    "picture": "frame.png",
    "weights export": "exported.safetensors",
    "weights import": "imported.safetensors",
}  # commands that hold no folder, and a file that they write
FOLDERS = sorted(set(COMMANDS) - set(ONE_FILE) - {"compare", "predict lidarseg"})
HELD = {"targets": "targets/town", "objects": "objects", "occupancy": "occupancy"}


def refused(place: Place, out: Path, capsys: pytest.CaptureFixture[str], name: str) -> str:
    before = contents(out) if out.exists() else {}
    status, said = run(place.command(name, out), capsys)
    assert status == 2, said
    error = error_of(said)
    assert str(out) in error
    assert "another process" in error
    now = contents(out)
    assert {path for path in before if now.get(path) != before[path]} == set()
    return error


@pytest.mark.parametrize("name", ["predict json", "intensity"])
def test_a_file_that_another_process_writes_is_left_to_it(place, tmp_path, capsys, name):
    out = prepared_for(place, tmp_path / "one", name)
    with whole_file(out / ONE_FILE[name]) as file:
        refused(place, out, capsys, name)
        file.write(b"of the first")
    assert (out / ONE_FILE[name]).read_bytes() == b"of the first"


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(set(ONE_FILE) - {"predict json", "intensity"}))
def test_every_file_that_another_process_writes_is_left_to_it(place, tmp_path, capsys, name):
    test_a_file_that_another_process_writes_is_left_to_it(place, tmp_path, capsys, name)


def folders_are_held(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str], names: list[str]) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom contextlib import ExitStack\n"
        "from picture3d.files import sole_writer\n"
        "with ExitStack() as held:\n"
        "    for folder in sys.argv[1:]:\n        held.enter_context(sole_writer(Path(folder)))\n"
        "    print('held', flush=True)\n    time.sleep(600)\n"
    )
    outs = {name: prepared_for(place, tmp_path / name.replace(" ", "-"), name) for name in names}
    folders = [str(out / HELD.get(name, "")) for name, out in outs.items()]
    holder = subprocess.Popen([sys.executable, "-c", code, *folders], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        for name, out in outs.items():
            assert f"process {holder.pid} on " in refused(place, out, capsys, name), name
    finally:
        holder.kill()
        holder.communicate()


def test_a_command_that_fills_a_folder_names_the_process_that_holds_it(place, tmp_path, capsys):
    folders_are_held(place, tmp_path, capsys, ["semantickitti", "targets", "pretrain"])


@pytest.mark.long
def test_every_command_that_fills_a_folder_names_the_process_that_holds_it(place, tmp_path, capsys):
    folders_are_held(place, tmp_path, capsys, FOLDERS)


def printed_into_a_full_disk(*words: object) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "picture3d.cli", *map(str, words)]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert os.strerror(FULL) in error_of(done.stderr)


def test_what_is_printed_into_a_full_disk_ends_in_one_line_and_a_status_that_says_so():
    printed_into_a_full_disk("recipes")


@pytest.mark.long
def test_scores_that_cannot_be_printed_are_one_clear_line(place, tmp_path):
    do("predict", place.run("detection"), "--out", tmp_path / "found.json", "--format", "nuscenes", "--device", "cpu")
    printed_into_a_full_disk(
        "score", "nuscenes-detection", tmp_path / "found.json", "--labels", place.root / "prepared", "--json"
    )
    printed_into_a_full_disk("data", "info", place.root / "prepared", "--json")


def test_no_duration_is_measured_by_a_clock_that_can_be_set_back():
    package = Path(main.__code__.co_filename).parent
    assert [path.name for path in package.rglob("*.py") if "time.time()" in path.read_text(encoding="utf-8")] == []
