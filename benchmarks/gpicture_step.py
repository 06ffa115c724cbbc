"""What GPICTURE's two extensions cost: a step of `town-gpicture` against one of `town-picture`, on the same batch.

    python benchmarks/gpicture_step.py PREPARED [--steps 15] [--threads 1]

Steps of the two take turns, so that other work on the machine falls on both. Given are the process's own CPU seconds and
those of the clock; the teacher looks at the sweeps beforehand. The gate's looks are in it, one in `gate.interval` steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from picture3d.commands.build import build_picture, build_targets, training_batches
from picture3d.recipes.catalogue import pretraining_recipe
from picture3d.training.runlog import describe_environment


def main() -> None:
    """Measures and prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("prepared", type=Path)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device("cpu")
    tasks, batch = {}, None
    for name in ("town-picture", "town-gpicture"):
        config = pretraining_recipe(name, args.prepared).with_overrides(["targets.mode=online"])
        batches = training_batches(config, build_targets(config.targets, args.prepared, device))
        tasks[name] = build_picture(config, device, epoch_batches=batches.steps_per_epoch)
        batch = batch if batch is not None else batches.batch(0, 0)
    assert batch is not None
    clock: dict[str, list[float]] = {name: [] for name in tasks}
    cpu: dict[str, list[float]] = {name: [] for name in tasks}
    for step in range(args.steps + 1):
        for name, task in tasks.items():
            begin, begin_cpu = time.perf_counter(), time.process_time()
            task.loss(batch, torch.Generator().manual_seed(step))["total"].backward()
            if step > 0:  # the first one warms up
                clock[name].append(time.perf_counter() - begin)
                cpu[name].append(time.process_time() - begin_cpu)
    mean = {name: statistics.mean(values) for name, values in cpu.items()}
    print(
        json.dumps(
            {
                "mean_cpu_s": {name: round(value, 3) for name, value in mean.items()},
                "median_clock_s": {name: round(statistics.median(values), 3) for name, values in clock.items()},
                "ratio_cpu": round(mean["town-gpicture"] / mean["town-picture"], 3),
                "steps": args.steps,
                "threads": args.threads,
                "points": len(batch.xyz),
                "environment": describe_environment(str(device)),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
