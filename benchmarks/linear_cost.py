"""The encoder's time and memory over the number of voxels: both are to grow in proportion, and no faster.

    python benchmarks/linear_cost.py [--threads 2] [--sizes 5000 20000 50000 100000] [--forward 500000]

Waymo's encoder (width 192), one sample, float32. Voxels lie on rings around the sensor, dense near it and thin far away, as
those of a sweep. Every size runs in a process of its own, so that its peak of resident memory is its own; the memory of an idle
process with the network is subtracted. `--forward` sizes are run without gradients. Processor seconds of all threads are least
affected by other load; the seconds on the clock are given too. Freed memory is kept, as commands do.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time

import numpy as np
import torch

from picture3d.models.dsvt import Dsvt
from picture3d.models.dsvt_config import waymo_voxel_192
from picture3d.structures.voxels import SparseVoxels
from picture3d.training.host_memory import keep_freed_memory

GRID = (468, 468, 32)


def ring_voxels(count: int, channels: int) -> SparseVoxels:
    """`count` different voxels whose density falls with the distance."""
    rng = np.random.default_rng(0)
    found = np.zeros(0, np.int64)
    while len(found) < count:
        radius, angle = 234 * rng.random(2 * count) ** 1.2, rng.uniform(0, 2 * np.pi, 2 * count)
        x, y = (234 + radius * turn(angle) for turn in (np.cos, np.sin))
        z = np.clip(rng.normal(10, 5, 2 * count), 0, GRID[2] - 1)
        key = (x.astype(np.int64).clip(0, 467) * GRID[1] + y.astype(np.int64).clip(0, 467)) * GRID[2] + z.astype(np.int64)
        found = np.unique(np.concatenate([found, key]))
    key = np.sort(rng.choice(found, count, replace=False))
    coords = np.stack([np.zeros(count, np.int64), key // GRID[2] // GRID[1], key // GRID[2] % GRID[1], key % GRID[2]], 1)
    feats = torch.randn(count, channels, generator=torch.Generator().manual_seed(0))
    return SparseVoxels(torch.from_numpy(coords.astype(np.int32)), feats, GRID, 1)


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def one(count: int, threads: int, backward: bool) -> None:
    """Runs one size and prints seconds and peak as JSON."""
    keep_freed_memory()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    network = Dsvt(waymo_voxel_192(), GRID)
    seconds, clock = [], []
    network(ring_voxels(500, 192)).output.feats.sum().backward()
    idle = peak_mib()
    voxels = ring_voxels(count, 192)
    for _ in range(2):
        begin, begin_clock = time.process_time(), time.perf_counter()
        with torch.set_grad_enabled(backward):
            out = network(voxels).output.feats.square().mean()
            if backward:
                out.backward()
        seconds.append(time.process_time() - begin)
        clock.append(time.perf_counter() - begin_clock)
        del out
    print(json.dumps({"seconds": min(seconds), "clock": min(clock), "peak_mib": peak_mib() - idle}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sizes", type=int, nargs="*", default=[5_000, 20_000, 50_000, 100_000])
    parser.add_argument("--forward", type=int, nargs="*", default=[100_000, 500_000])
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--backward", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        one(args.one, args.threads, args.backward)
        return
    print(
        f"torch {torch.__version__}, {platform.machine()}, {args.threads} threads, float32, best of 2, load {os.getloadavg()}"
    )
    for name, sizes, backward in (("forward and backward", args.sizes, True), ("forward", args.forward, False)):
        for count in sizes:
            words = [sys.executable, __file__, "--one", str(count), "--threads", str(args.threads)]
            words += ["--backward"] if backward else []
            done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            print(
                f"{name}, {count:7,} voxels: {found['seconds']:7.2f} s, {1e6 * found['seconds'] / count:6.1f} us a voxel, "
                f"on the clock {found['clock']:7.2f} s; "
                f"peak {found['peak_mib']:7.0f} MiB, {1024 * found['peak_mib'] / count:6.1f} KiB a voxel"
            )


if __name__ == "__main__":
    main()
