"""How much faster two one-thread processes make targets than one: the share of the ideal that several processes reach.

    python benchmarks/targets_efficiency.py PREPARED [--teacher town] [--processes 1 2] [--repeats 3]

PREPARED holds prepared frames of several logs (`picture3d synth`, then `picture3d prepare`). Every process computes with one
thread and takes its part of the logs, as `picture3d targets` does under torchrun. Python, the teacher and the first frame are
loaded before the clock starts; it stops when the slowest process has its last log on disk. The best of the repeats counts;
different numbers of processes take turns. Where other work runs on the machine, the load says so; the seconds of processor that
the busiest process used then still tell how the work is divided, though not whether the processes hinder each other.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from picture3d.commands.build import build_teacher
from picture3d.datasets.prepared import PreparedDataset
from picture3d.teachers.targets import compute_targets, view_frame


def work(prepared: Path, out: Path, teacher: str, share: tuple[int, int], barrier: Any, times: Any) -> None:
    """One process: gets ready, waits for the others, does its part, says how long it took."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(share[0]), "WORLD_SIZE": str(share[1])}
    network = build_teacher(teacher, None, torch.device("cpu"))
    dataset = PreparedDataset(prepared)
    view_frame(dataset.frame(dataset.keyframes()[0], ()), network, num_superclasses=8, seed=0)
    barrier.wait()
    begin, processor = time.perf_counter(), time.process_time()
    summary = compute_targets(dataset, network, folder=out, share=share)
    times.put((time.perf_counter() - begin, time.process_time() - processor, summary.frames))


def seconds(prepared: Path, teacher: str, processes: int) -> tuple[float, float, int]:
    """Of the slowest process by the clock, of the busiest by the processor, and the frames of all."""
    context = multiprocessing.get_context("spawn")
    barrier, times = context.Barrier(processes), context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        team = [
            context.Process(target=work, args=(prepared, Path(folder) / "t", teacher, (rank, processes), barrier, times))
            for rank in range(processes)
        ]
        for one in team:
            one.start()
        found = [times.get(timeout=1800) for _ in team]
        for one in team:
            one.join()
    return max(took for took, _, _ in found), max(used for _, used, _ in found), sum(frames for _, _, frames in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prepared", type=Path)
    parser.add_argument("--teacher", default="town")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    logs = PreparedDataset(given.prepared).logs()
    print(f"{platform.machine()}, {os.cpu_count()} cores, one thread a process, torch {torch.__version__}, {len(logs)} logs")
    print(f"load at the start {os.getloadavg()[0]:.1f}; teacher {given.teacher}; best of {given.repeats}")
    best: dict[int, float] = {}
    busiest: dict[int, float] = {}
    frames = 0
    for number in range(given.repeats):
        for processes in given.processes:
            took, used, frames = seconds(given.prepared, given.teacher, processes)
            print(f"reading {number + 1}, {processes} processes: {took:.2f} s, processor {used:.2f} s", flush=True)
            best[processes] = min(took, best.get(processes, took))
            busiest[processes] = min(used, busiest.get(processes, used))
    print(f"{'processes':>9} {'seconds':>8} {'frames/s':>9} {'times one':>9} {'processor s':>11} {'times one':>9}")
    for processes, took in best.items():
        first = given.processes[0]
        print(
            f"{processes:9d} {took:8.2f} {frames / took:9.2f} {best[first] / took:9.2f} {busiest[processes]:11.2f} "
            f"{busiest[first] / busiest[processes]:9.2f}"
        )
    print(f"load at the end {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
