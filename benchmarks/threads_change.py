"""Does a process that goes from one thread to two midway become slower than one that began with two?

    python benchmarks/threads_change.py [--steps 12] PREPARED

Four processes do the same training steps of the town's PICTURE recipe on PREPARED frames (any dataset, online town teacher):
with one thread, with two, with one for the first half and two for the second, and the other way round. Prints the median step
of each half.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from picture3d.commands.build import build_picture, build_targets, training_batches
from picture3d.recipes.catalogue import pretraining_recipe
from picture3d.training.runlog import describe_environment


def steps(prepared: Path, count: int, first: int, second: int) -> list[float]:
    """Seconds of each step; the threads change after half of them."""
    torch.set_num_threads(first)
    config = pretraining_recipe("town-picture", prepared).with_overrides(["targets.mode=online"])
    device = torch.device("cpu")
    task = build_picture(config, device)
    batches = training_batches(config, build_targets(config.targets, prepared, device))
    batch = next(iter(batches.epoch(0)))
    taken = []
    for step in range(count):
        if step == count // 2:
            torch.set_num_threads(second)
        begin = time.perf_counter()
        task.loss(batch, torch.Generator().manual_seed(step))["total"].backward()
        task.module.zero_grad()
        taken.append(time.perf_counter() - begin)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prepared", type=Path)
    parser.add_argument("--steps", type=int, default=12, help="of each process")
    parser.add_argument("--threads", type=int, nargs=2, help="only this: print the seconds of one process as JSON")
    args = parser.parse_args()
    if args.threads:
        print(json.dumps(steps(args.prepared, args.steps, *args.threads)))
        return
    print(json.dumps(describe_environment("cpu")))
    for first, second in ((1, 1), (2, 2), (1, 2), (2, 1)):
        command = [
            sys.executable,
            __file__,
            str(args.prepared),
            "--steps",
            str(args.steps),
            "--threads",
            str(first),
            str(second),
        ]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        taken = json.loads(said.splitlines()[-1])
        half = len(taken) // 2
        print(
            f"{first} threads, then {second}: first half {statistics.median(taken[1:half]):.3f} s a step, "
            f"second half {statistics.median(taken[half + 1 :]):.3f} s"
        )


if __name__ == "__main__":
    main()
