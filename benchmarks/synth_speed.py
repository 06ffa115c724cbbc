"""How fast the town is written: full sweeps per second on one core, files included.

    python benchmarks/synth_speed.py [--scenes 1] [--keyframes 11] [--waymo-frames 20] [--seed 0] [--out FOLDER]

Prints the circumstances, then one row for nuScenes and one for Waymo. Towns are built once per scene; the rows give the rate
with and without that. The first check is that what was written is whole: as many points in the files as were counted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import tempfile
import time
from pathlib import Path

# One core: BLAS must not help. Set before numpy is loaded.
os.environ.update({"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"})

import numpy as np

from picture3d.formats.tfrecord import read_records
from picture3d.synthetic.drive import DriveConfig, drive_step
from picture3d.synthetic.nuscenes_writer import town_seed, write_nuscenes
from picture3d.synthetic.waymo_drive import WaymoConfig, waymo_frame
from picture3d.synthetic.waymo_lidar import LASERS
from picture3d.synthetic.waymo_messages import frame_body
from picture3d.synthetic.waymo_writer import write_waymo
from picture3d.synthetic.world import build_town


def main() -> None:
    """Writes, checks, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=1)
    parser.add_argument("--keyframes", type=int, default=11)
    parser.add_argument("--waymo-frames", type=int, default=20, help="0 leaves the Waymo row out")
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
    if options.waymo_frames:
        _waymo(options.waymo_frames, options.seed, options.out)


def _waymo(frames: int, seed: int, out: Path | None) -> None:
    """Writes one segment, checks that it is whole, prints its row."""
    town = build_town(town_seed(seed, 1))
    config = WaymoConfig(frames=frames)
    cast_s = encode_s = points = 0.0
    some = range(0, frames, max(frames // 5, 1))
    for index in some:
        start = time.perf_counter()
        frame = waymo_frame(town, config, index)
        middle = time.perf_counter()
        frame_body(frame)
        cast_s += middle - start
        encode_s += time.perf_counter() - middle
        points += sum(len(echoes) for images in frame.lasers for echoes in images.returns)
    with tempfile.TemporaryDirectory() as folder:
        root = (out or Path(folder)) / "town-waymo"
        wall, cpu = time.perf_counter(), time.process_time()
        write_waymo(root, scenes=1, frames_per_scene=frames, seed=seed, val_scenes=0)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        (file,) = root.glob("training/*.tfrecord")
        size = file.stat().st_size
        assert sum(1 for _ in read_records(file)) == frames, "not every frame was written"
    rays = sum(laser.height * laser.field_columns for laser in LASERS)
    count = len(some)
    print(f"Waymo v1: 1 segment, {frames} frames of {points / count:.0f} points (both returns) from {rays} rays, seed {seed}")
    print("s per frame written, town included | ... of CPU time | casting | encoding | MB per frame | peak MB of memory")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    row = (wall / frames, cpu / frames, cast_s / count, encode_s / count, size / frames / 1e6)
    print(" | ".join(f"{value:.2f}" for value in row) + f" | {peak:.0f}")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
