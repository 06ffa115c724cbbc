"""Prepared frames -> batches: milliseconds of each step, and frames a second that one worker delivers.

    python benchmarks/loading.py PREPARED [--split train] [--sweeps 1] [--frames 40]

A sample is read (decoded, checksums compared), augmented, cropped to 75 m, shuffled and made a batch of one. Frames are taken
in a random order; the files are in the page cache. Where other work runs, the time of the processor is nearer to the truth
than the clock, and the frames a second of the worker are a lower bound.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from picture3d.datasets.augment import AugmentConfig
from picture3d.datasets.loading import FrameBatches, collate
from picture3d.datasets.prepared import PreparedDataset
from picture3d.datasets.samples import DataConfig, finish_sample, read_sample


def _now() -> NDArray[np.float64]:
    """Seconds by the clock, and of the processor."""
    return np.array([time.perf_counter(), time.process_time()])


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prepared", type=Path)
    parser.add_argument("--split", default="train")
    parser.add_argument("--sweeps", type=int, default=1)
    parser.add_argument("--frames", type=int, default=40)
    arguments = parser.parse_args()
    config = DataConfig(
        root=arguments.prepared,
        split=arguments.split,
        sweeps=arguments.sweeps,
        intensity_scale="tanh",
        max_frames=arguments.frames,
        range_min=(-75.0, -75.0, -5.0),
        range_max=(75.0, 75.0, 5.0),
        augment=AugmentConfig(),
        shuffle_points=True,
    )
    dataset = PreparedDataset(config.root)
    keys = dataset.keyframes(config.split)[: arguments.frames]
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    print(f"{machine}; numpy {np.__version__}, torch {torch.__version__}, {torch.get_num_threads()} thread(s)")
    points = np.mean([dataset.reader(key.log).num_points(key.index) for key in keys])
    print(f"{len(keys)} frames of {points:.0f} points, {config.sweeps} sweep(s) a sample\n")
    print("| step | clock ms, median | 95 % below | processor ms, median | 95 % below |\n|---|---|---|---|---|")
    rng = np.random.default_rng(0)
    steps: dict[str, list[NDArray[np.float64]]] = {
        "frame, all columns": [], "read": [], "augment, crop, shuffle": [], "batch": [],
    }  # fmt: skip
    for place in rng.permutation(np.tile(np.arange(len(keys)), 3)):
        times = [_now()]
        dataset.frame(keys[place])
        times.append(_now())
        sample = read_sample(dataset, keys[place], config)
        times.append(_now())
        sample = finish_sample(sample, config, rng)
        times.append(_now())
        collate([sample])
        times.append(_now())
        for name, took in zip(steps, np.diff(times, axis=0), strict=True):
            steps[name].append(took * 1e3)
    for name, took in steps.items():
        (clock, processor), (clock_95, processor_95) = np.median(took, axis=0), np.percentile(took, 95, axis=0)
        print(f"| {name} | {clock:.1f} | {clock_95:.1f} | {processor:.1f} | {processor_95:.1f} |")
    loader = FrameBatches(config, batch_size=1, seed=0, workers=1)
    for _ in loader.epoch(0):  # the worker has started, the files are in the page cache
        pass
    epoch = loader.epoch(1)
    next(epoch)
    begin = time.perf_counter()
    count = sum(batch.batch_size for batch in epoch)
    print(f"\none worker: {count / (time.perf_counter() - begin):.1f} frames a second")


if __name__ == "__main__":
    main()
