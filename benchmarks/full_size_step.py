"""Seconds per step and peak memory of pre-training at the full published sizes, batch 1, on this machine.

    python benchmarks/full_size_step.py waymo --points FOLDER      # *.bin of x y z tanh(intensity) elongation
    python benchmarks/full_size_step.py nuscenes --prepared FOLDER # prepared frames with 9 earlier sweeps each

Run one size per process: the peak is the process's. The town teacher runs inside the step's loading (online), timed apart.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from pathlib import Path

import torch

from picture3d.commands.build import build_picture, build_targets, training_batches
from picture3d.datasets.point_files import prepare_points
from picture3d.recipes.catalogue import pretraining_recipe
from picture3d.recipes.configs import TargetsConfig
from picture3d.training.optim import build_optimizer
from picture3d.training.runlog import describe_environment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=("waymo", "nuscenes"))
    parser.add_argument("--points", type=Path)
    parser.add_argument("--prepared", type=Path, required=True, help="for waymo: where to put the prepared frames")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpointing", action="store_true", help="recompute blocks in the backward")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.size == "waymo" and args.points is not None:
        prepare_points(args.points, args.prepared, layout="x,y,z,intensity,elongation", intensity_unit="tanh")
    base = pretraining_recipe(f"{args.size}-picture", args.prepared)
    config = base.model_copy(
        update={
            "workers": 0,
            "targets": TargetsConfig(mode="online"),
            "encoder": base.encoder.model_copy(update={"activation_checkpointing": args.checkpointing}),
            "training": base.training.model_copy(update={"batch_size": 1, "precision": "float32"}),
        }
    )
    device = torch.device("cpu")
    batches = training_batches(config, build_targets(config.targets, config.data.root, device))
    task = build_picture(config, device)
    optimizer = build_optimizer(task.module, config.training.optim)
    generator = torch.Generator().manual_seed(0)
    loading, steps, last = [], [], {}
    for i in range(args.steps):
        begin = time.perf_counter()
        batch = batches.batch(0, i % batches.steps_per_epoch)
        loading.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        optimizer.zero_grad()
        last = task.loss(batch, generator)
        last["total"].backward()
        optimizer.step()
        steps.append(time.perf_counter() - begin)
        print(f"step {i}: {len(batch.xyz)} points, {steps[-1]:.2f} s, loading with the teacher {loading[-1]:.2f} s", flush=True)
    print(
        json.dumps(
            {
                "size": args.size,
                "seconds_per_step": round(statistics.median(steps), 2),
                "loading_seconds": round(statistics.median(loading), 2),
                "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
                "parameters": sum(p.numel() for p in task.module.parameters()),
                "checkpointing": args.checkpointing,
                "losses": {name: round(float(value.detach()), 4) for name, value in last.items()},
                **describe_environment("cpu"),
            }
        )
    )


if __name__ == "__main__":
    main()
