"""Does long work grow? Memory, open files and seconds per unit of work at the start and at the end of many minutes.

    python benchmarks/soak.py --work FOLDER [--minutes 20] [--threads 1] [--only targets | pretrain]

`targets` (the town teacher, loaded anew for every pass over the frames, each pass into a new store) and pre-training (PICTURE
on the town, one loader process, a checkpoint every 50 steps) run for so many minutes each, on the prepared town in FOLDER; it
is made if it is not there. Each is a process of its own that is watched from outside every two seconds.

Every second tenth of the time is told; in the first one caches fill up. Memory and files are medians, the pages that a loader
process shares with its parent count for both. Seconds are given by the clock and by the processor: the second hardly depends on
what else the machine is doing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from picture3d.commands.build import build_teacher
from picture3d.datasets.prepared import PreparedDataset
from picture3d.teachers.targets import compute_targets
from picture3d.training.runlog import describe_environment
from picture3d.training.threads import set_threads

_PAGE, _TICKS = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")
_EVERY_S = 2.0


@dataclass(frozen=True)
class Look:
    """What a process holds at a moment, and how far it has come."""

    at_s: float
    resident_mb: float
    loader_mb: float  # of its loader processes, pages shared with it included
    files: int
    processor_s: float  # used so far, loader processes that have ended included
    done: int  # frames or steps


def look(pid: int, begin: float, log: Path) -> Look | None:
    """None if the process has ended."""
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        # After the name in brackets: state is field 3; user, system, and both of ended children are fields 14 to 17.
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]
        resident = _resident_mb(pid)
    except OSError:
        return None
    done = log.read_bytes().count(b"\n") if log.exists() else 0
    loaders = sum(map(_resident_mb, children))
    return Look(time.monotonic() - begin, resident, loaders, files, sum(map(int, ticks)) / _TICKS, done)


def _resident_mb(pid: int) -> float:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE / 1e6
    except OSError:  # a loader process that ended between two looks
        return 0.0


def watched(words: list[str], log: Path, seconds: float) -> list[Look]:
    """Runs Python with `words`, which adds a line to `log` for each piece of work, and ends it after so long."""
    begin = time.monotonic()
    process = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL)
    looks: list[Look] = []
    while process.poll() is None and time.monotonic() - begin < seconds:
        time.sleep(_EVERY_S)
        found = look(process.pid, begin, log)
        if found is not None:
            looks.append(found)
    if process.poll() is not None:
        raise SystemExit(f"{' '.join(words)}: ended after {time.monotonic() - begin:.0f} s with status {process.returncode}")
    process.terminate()
    process.wait()
    return looks


def report(name: str, unit: str, looks: list[Look]) -> None:
    tenth = len(looks) // 10
    print(f"{name}: {looks[-1].done} {unit}s in {looks[-1].at_s / 60:.1f} minutes, load at the end {os.getloadavg()[0]:.1f}")
    for number in (2, 4, 6, 8, 10):
        part = looks[(number - 1) * tenth : number * tenth + 1]
        done = max(1, part[-1].done - part[0].done)
        clock_s, processor_s = ((getattr(part[-1], what) - getattr(part[0], what)) / done for what in ("at_s", "processor_s"))
        memory, loader, files = (
            statistics.median(getattr(one, what) for one in part) for what in ("resident_mb", "loader_mb", "files")
        )
        print(
            f"  tenth {number:2d}: {memory:6.0f} MB resident (most {max(one.resident_mb for one in part):.0f}), "
            f"{loader:5.0f} MB in loader processes, {files:.0f} open files, {clock_s:.3f} s a {unit} by the clock, "
            f"{processor_s:.3f} s of processor ({done} {unit}s)"
        )


def repeat_targets(prepared: Path, log: Path) -> None:
    """Targets of the same frames into new stores until ended from outside; a line in `log` for each frame."""
    with log.open("w", buffering=1) as file:
        while True:
            shutil.rmtree(prepared / "targets", ignore_errors=True)
            seen = 0

            def count(done: int, _: int) -> None:  # also told where a log begins and ends
                nonlocal seen
                file.writelines(f"{frame}\n" for frame in range(seen, done))
                seen = done

            teacher = build_teacher("town", None, torch.device("cpu"))
            compute_targets(PreparedDataset(prepared), teacher, progress=count)


def soak_targets(work: Path, seconds: float, threads: int) -> None:
    log = work / "frames.txt"
    log.unlink(missing_ok=True)
    words = [__file__, "--work", str(work), "--threads", str(threads), "--repeat-targets"]
    report("targets", "frame", watched(words, log, seconds))


def soak_pretraining(work: Path, seconds: float, threads: int) -> None:
    out, prepared = work / "run", work / "prepared"
    shutil.rmtree(out, ignore_errors=True)
    picture3d = ["-m", "picture3d.cli"]
    subprocess.run([sys.executable, *picture3d, "targets", str(prepared), "--threads", str(threads)], check=True)
    words = [*picture3d, "pretrain", "--recipe", "town-picture", "--data", str(prepared), "--out", str(out)]
    settings = ["--set", "training.max_steps=1000000", "--set", "training.checkpoint_every=50", "--set", "workers=1"]
    report("pretrain", "step", watched([*words, "--threads", str(threads), *settings], out / "metrics.jsonl", seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=20, help="of each")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=("targets", "pretrain"))
    parser.add_argument("--repeat-targets", action="store_true", help="what the watched process does")
    args = parser.parse_args()
    prepared = args.work / "prepared"
    if args.repeat_targets:
        set_threads(args.threads)
        repeat_targets(prepared, args.work / "frames.txt")
    print(json.dumps(describe_environment("cpu")), f"{args.threads} threads, load {os.getloadavg()[0]:.1f}")
    if not (prepared / "dataset.json").exists():
        town = ["--scenes", "12", "--keyframes", "10", "--sweeps-per-keyframe", "0"]
        for words in (["synth", str(args.work / "raw"), *town], ["prepare", "nuscenes", str(args.work / "raw"), str(prepared)]):
            subprocess.run([sys.executable, "-m", "picture3d.cli", *words], check=True)
    if args.only != "pretrain":
        soak_targets(args.work, 60 * args.minutes, args.threads)
    if args.only != "targets":
        soak_pretraining(args.work, 60 * args.minutes, args.threads)


if __name__ == "__main__":
    main()
