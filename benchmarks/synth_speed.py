"""Sweeps per second of `picture3d synth` on one core, writing included.

OMP_NUM_THREADS=1 python benchmarks/synth_speed.py [--scenes 2] [--keyframes 8]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from picture3d.synthetic.nuscenes_writer import write_nuscenes
from picture3d.synthetic.world import build_town
from picture3d.training.runlog import describe_environment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=2)
    parser.add_argument("--keyframes", type=int, default=8)
    args = parser.parse_args()
    begin = time.process_time()
    for seed in range(args.scenes):
        build_town(seed)
    town_s = (time.process_time() - begin) / args.scenes
    with tempfile.TemporaryDirectory() as folder:
        wall, cpu = time.perf_counter(), time.process_time()
        write_nuscenes(Path(folder), scenes=args.scenes, keyframes_per_scene=args.keyframes, val_scenes=0, seed=1)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        sweeps = args.scenes * ((args.keyframes - 1) * 10 + 1)
        size = sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())
    row = {
        "sweeps": sweeps,
        "sweeps_per_second": round(sweeps / wall, 1),
        "sweeps_per_cpu_second": round(sweeps / cpu, 1),
        "seconds_to_build_a_town": round(town_s, 2),
        "bytes_per_sweep": size // sweeps,
    }
    print(json.dumps({**row, **describe_environment("cpu")}))


if __name__ == "__main__":
    main()
