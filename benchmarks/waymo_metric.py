"""The Waymo metric at the size of the validation set: 40,000 frames of made boxes, added segment by segment.

    python benchmarks/waymo_metric.py [--frames 40000] [--labels 50] [--predictions 150] [--files FOLDER]

Each frame has cars and pedestrians; two predictions of three lie near a label. Prints seconds and the growth of resident memory
over the second half of the frames, which a metric that kept frames could not hide. With --files the boxes are first written to
two files, which are then looked through, read and scored as `picture3d score waymo-detection` does it.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import time
from pathlib import Path

import numpy as np
import torch

from picture3d.evaluation.waymo_detection import WaymoScorer
from picture3d.formats.waymo_objects import WaymoObjects, make_objects, write_objects
from picture3d.formats.waymo_objects_reading import ObjectsFile

FRAMES_OF_A_SEGMENT = 200


def frame(rng: np.random.Generator, index: int, labels: int, predictions: int) -> tuple[WaymoObjects, WaymoObjects]:
    kind = np.where(rng.random(labels) < 0.6, 1, 2)
    size = np.where(kind[:, None] == 1, [4.6, 2.0, 1.7], [0.8, 0.8, 1.75])
    place = np.column_stack([rng.uniform(-75, 75, (labels, 2)), rng.normal(0, 0.5, labels)])
    box = np.column_stack([place, size, rng.uniform(-np.pi, np.pi, labels)])
    pick = rng.integers(0, labels, predictions)
    found = box[pick] + rng.normal(0, [0.15, 0.1, 0.05, 0.1, 0.05, 0.05, 0.2], (predictions, 7))
    far = rng.random(predictions) < 1 / 3
    found[far, :2] = rng.uniform(-75, 75, (int(far.sum()), 2))
    name = f"segment-{index // FRAMES_OF_A_SEGMENT}"
    truth = make_objects(box, kind, name, index, num_points=rng.integers(0, 400, labels))
    return truth, make_objects(found, kind[pick], name, index, score=rng.random(predictions))


def resident_mb() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def from_memory(args: argparse.Namespace) -> None:
    """Frame by frame, as they are made."""
    rng, scorer = np.random.default_rng(0), WaymoScorer()
    seconds, half = 0.0, 0.0
    for index in range(args.frames):
        labels, found = frame(rng, index, args.labels, args.predictions)
        begin = time.perf_counter()
        scorer.add(labels, found)
        seconds += time.perf_counter() - begin
        if index == args.frames // 2:
            half = resident_mb()
    report(args, scorer, seconds, half)


def from_files(args: argparse.Namespace) -> None:
    """Segment by segment, from two files."""
    paths = [args.files / f"{name}.bin" for name in ("labels", "predictions")]
    for which, path in enumerate(paths):
        rng = np.random.default_rng(0)
        write_objects(path, (frame(rng, index, args.labels, args.predictions)[which] for index in range(args.frames)))
    begin = time.perf_counter()
    labels, found = (ObjectsFile(path) for path in paths)
    print(
        f"files of {' and '.join(f'{path.stat().st_size / 1e6:.0f}' for path in paths)} MB, looked through in "
        f"{time.perf_counter() - begin:.1f} s; resident memory {resident_mb():.0f} MB"
    )
    scorer, half = WaymoScorer(), 0.0
    for index, name in enumerate(labels.segments):
        scorer.add(labels.read(name), found.read(name))
        if index == len(labels.segments) // 2:
            half = resident_mb()
    report(args, scorer, time.perf_counter() - begin, half)


def report(args: argparse.Namespace, scorer: WaymoScorer, seconds: float, half: float) -> None:
    begin = time.perf_counter()
    scores = scorer.scores()
    seconds += time.perf_counter() - begin
    ap, aph = scores.mean((1, 2))
    print(
        f"{args.frames} frames of {args.labels} labels and {args.predictions} predictions: {seconds:.1f} s "
        f"({1e3 * seconds / args.frames:.2f} ms a frame), mAP {100 * ap:.1f}, mAPH {100 * aph:.1f}; resident memory "
        f"{resident_mb():.0f} MB, {resident_mb() - half:+.1f} MB over the second half, peak "
        f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6:.0f} MB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=40_000)
    parser.add_argument("--labels", type=int, default=50)
    parser.add_argument("--predictions", type=int, default=150)
    parser.add_argument("--files", type=Path, help="an existing folder for the two files")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.machine()}, 1 thread, numpy {np.__version__}, torch {torch.__version__}")
    (from_files if args.files else from_memory)(args)


if __name__ == "__main__":
    main()
