"""Killed at any moment and run again, every long command ends with the files of an unbroken run, and with no others.

SIGKILL comes at seeded moments between the first file that a command makes and its end; of a command that writes once, at the
end, between a third of its time and its end. Three kills are quick tests: one each of `prepare`, `targets` and `pretrain`. The
long tests add three for each of twelve commands, 36 in all: `synth` in both formats and with occupancy, `prepare` of frames and
of occupancy labels, `targets`, the database of objects, `pretrain`, `finetune` of both kinds, `report` and `experiment`.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.commands.made_place import Place, contents

LONG = [
    "synth", "synth waymo", "synth occupancy", "prepare", "occupancy", "targets", "objects", "pretrain", "segmentation",
    "detection", "report", "experiment",
]  # fmt: skip
_LOOK_S = 0.005


def start(words: list[str]) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "picture3d.cli", *words]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment, start_new_session=True)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")} if folder.exists() else set()


def unbroken(words: list[str], out: Path) -> tuple[float, float]:
    """Seconds from the start of a command to the first file it makes, and to its end."""
    before, begin, first = files(out), time.monotonic(), None
    process = start(words)
    while process.poll() is None:
        if first is None and files(out) - before:
            first = time.monotonic() - begin
        time.sleep(_LOOK_S)
    _, said = process.communicate()
    assert process.returncode == 0, said.decode()
    end = time.monotonic() - begin
    return (first if first is not None and first < 0.9 * end else 0.3 * end), end


def kill_after(words: list[str], seconds: float) -> bool:
    """Whether the command was still running."""
    process = start(words)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True
    finally:
        assert process.stderr is not None
        process.stderr.close()
    return False


def killed_and_finished(place: Place, tmp_path: Path, name: str, seed: int, kills: int) -> None:
    whole, broken = tmp_path / "whole" / "out", tmp_path / "broken" / "out"
    for out in (whole, broken):
        out.parent.mkdir()
        place.before(name, out)
    first, end = unbroken(place.command(name, whole), whole)
    rng = random.Random(seed)
    hit = 0
    while hit < kills:
        if kill_after(place.command(name, broken), rng.uniform(first, end)):
            hit += 1
        else:  # finished before: what is left to do has become less, or the unbroken run was slow. Begin anew, strike sooner.
            end = first + 0.7 * (end - first)
            shutil.rmtree(broken)
            place.before(name, broken)
    unbroken(place.command(name, broken), broken)
    one, two = contents(whole), contents(broken)
    assert set(two) == set(one)
    assert {path for path in one if one[path] != two[path]} == set()


@pytest.mark.parametrize("name", ["prepare", "targets", "pretrain"])
def test_a_killed_command_ends_as_an_unbroken_one(place, tmp_path, name):
    killed_and_finished(place, tmp_path, name, seed=1, kills=1)


@pytest.mark.long
@pytest.mark.parametrize("name", LONG)
def test_a_command_killed_three_times_ends_as_an_unbroken_one(place, tmp_path, name):
    killed_and_finished(place, tmp_path, name, seed=2, kills=3)
