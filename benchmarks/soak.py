"""Does long work grow? Resident memory, open files and seconds per step at the start and at the end of many minutes.

    python benchmarks/soak.py --work FOLDER [--minutes 20] [--threads 2]

First `targets` (the town teacher, over and over into new stores, in one process) and then pre-training, on the prepared town in
FOLDER, which is made if it is not there: each for half of the time, in a process of its own. The first tenth of each is left
out, in which caches fill up.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from picture3d.cli import app
from picture3d.training.runlog import describe_environment

_PAGE = os.sysconf("SC_PAGE_SIZE")
_EVERY_S = 2.0


@dataclass(frozen=True)
class Look:
    """What a process holds at a moment."""

    at_s: float
    resident_mb: float
    files: int


def look(process: subprocess.Popen[bytes], begin: float) -> Look | None:
    try:
        pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
        files = len(list(Path(f"/proc/{process.pid}/fd").iterdir()))
    except OSError:
        return None
    return Look(time.monotonic() - begin, pages * _PAGE / 1e6, files)


def watched(words: list[str], seconds: float) -> list[Look]:
    """Runs Python with `words`, ends it by Ctrl-C after so many seconds, and says what it held on the way."""
    begin = time.monotonic()
    process = subprocess.Popen([sys.executable, *words], stderr=subprocess.DEVNULL)
    looks: list[Look] = []
    while process.poll() is None and time.monotonic() - begin < seconds:
        time.sleep(_EVERY_S)
        found = look(process, begin)
        if found is not None:
            looks.append(found)
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    process.wait()
    return looks


def tenths(looks: list[Look]) -> str:
    """Medians over the second and the last tenth of the time."""
    tenth = max(1, len(looks) // 10)
    parts = []
    for name, part in (("start", looks[tenth : 2 * tenth]), ("end", looks[-tenth:])):
        memory, files = (statistics.median(getattr(one, what) for one in part) for what in ("resident_mb", "files"))
        parts.append(f"{name} {memory:.0f} MB, {files:.0f} open files")
    return "; ".join(parts)


def repeat_targets(prepared: Path, threads: int) -> None:
    """Targets of the same frames into new stores until interrupted; a line of seconds per round in `rounds.txt`."""
    with (prepared.parent / "rounds.txt").open("w") as file:
        while True:
            shutil.rmtree(prepared / "targets", ignore_errors=True)
            begin = time.monotonic()
            try:
                app(["targets", str(prepared), "--threads", str(threads)])
            except SystemExit as end:
                if end.code:  # interrupted
                    return
            file.write(f"{time.monotonic() - begin}\n")
            file.flush()


def soak_targets(prepared: Path, seconds: float, threads: int) -> None:
    looks = watched([__file__, "--work", str(prepared.parent), "--threads", str(threads), "--repeat-targets"], seconds)
    rounds = [float(line) for line in (prepared.parent / "rounds.txt").read_text().split()]
    print(f"targets: {len(rounds)} rounds, first {rounds[0]:.1f} s, last {rounds[-1]:.1f} s; {tenths(looks)}")


def soak_pretraining(prepared: Path, out: Path, seconds: float, threads: int) -> None:
    shutil.rmtree(out, ignore_errors=True)
    words = ["-m", "picture3d.cli", "pretrain", "--recipe", "town-picture", "--data", str(prepared), "--out", str(out)]
    settings = ["--set", "training.max_steps=1000000", "--set", "training.checkpoint_every=50"]
    looks = watched([*words, "--threads", str(threads), *settings], seconds)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    tenth = max(1, len(rows) // 10)
    first, last = (statistics.median(row["seconds"] for row in part) for part in (rows[tenth : 2 * tenth], rows[-tenth:]))
    print(f"pretrain: {len(rows)} steps, start {first:.3f} s a step, end {last:.3f} s; {tenths(looks)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat-targets", action="store_true", help="what the watched process does")
    args = parser.parse_args()
    prepared = args.work / "prepared"
    if args.repeat_targets:
        repeat_targets(prepared, args.threads)
        return
    print(json.dumps(describe_environment("cpu")), f"{args.threads} threads")
    if not (prepared / "dataset.json").exists():
        town = ["--scenes", "12", "--keyframes", "20", "--sweeps-per-keyframe", "0"]
        for words in (["synth", str(args.work / "raw"), *town], ["prepare", "nuscenes", str(args.work / "raw"), str(prepared)]):
            subprocess.run([sys.executable, "-m", "picture3d.cli", *words], check=True, stderr=subprocess.DEVNULL)
    seconds = 30 * args.minutes
    soak_targets(prepared, seconds, args.threads)
    soak_pretraining(prepared, args.work / "run", seconds, args.threads)


if __name__ == "__main__":
    main()
