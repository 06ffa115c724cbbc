"""How fast the town is written: full sweeps per second on one core, files included.

    python benchmarks/synth_speed.py [--scenes 1] [--keyframes 11] [--seed 0] [--out FOLDER]

Prints the circumstances, then one row. Towns are built once per scene; the row gives the rate with and without that. The
first check is that what was written is whole: as many points in the files as were counted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path

# One core: BLAS must not help. Set before numpy is loaded.
os.environ.update({"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"})

import numpy as np

from picture3d.synthetic.drive import DriveConfig, drive_step
from picture3d.synthetic.nuscenes_writer import town_seed, write_nuscenes
from picture3d.synthetic.world import build_town


def main() -> None:
    """Writes, checks, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=1)
    parser.add_argument("--keyframes", type=int, default=11)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="folder for the files; a temporary one by default")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    start = time.perf_counter()
    town, *_ = [build_town(town_seed(options.seed, scene)) for scene in range(1, options.scenes + 1)]
    build_s = time.perf_counter() - start
    config = DriveConfig(keyframes=options.keyframes)
    start = time.perf_counter()
    for index in range(10):
        drive_step(town, config, index)
    in_memory_s = (time.perf_counter() - start) / 10

    with tempfile.TemporaryDirectory() as folder:
        root = (options.out or Path(folder)) / "town"
        wall, cpu = time.perf_counter(), time.process_time()
        write_nuscenes(root, scenes=options.scenes, keyframes_per_scene=options.keyframes, seed=options.seed, val_scenes=0)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        files = sorted(root.glob("*/LIDAR_TOP/*.pcd.bin"))
        points = sum(file.stat().st_size for file in files) // 20
        tables = json.loads((root / "v1.0-mini" / "sample_data.json").read_text())
    sweeps = config.sweeps * options.scenes
    assert len(files) == len(tables) == sweeps, "not every sweep was written"
    assert points > 20_000 * sweeps, "sweeps are too thin to be compared"

    print(
        f"{_processor()} · 1 core, load {os.getloadavg()[0]:.1f} · Python {platform.python_version()} · numpy {np.__version__}"
    )
    print(f"{options.scenes} scene(s), {sweeps} sweeps of {points // sweeps} points from 34,688 rays, seed {options.seed}")
    print("sweeps/s written | ... of CPU time | ... without building towns | in memory only | town s")
    rates = (sweeps / wall, sweeps / cpu, sweeps / max(wall - build_s, 1e-9), 1 / in_memory_s)
    print(" | ".join(f"{rate:.1f}" for rate in rates) + f" | {build_s / options.scenes:.2f}")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
