"""What pasted objects and balanced classes cost: making the database, pasting into a frame, counting classes.

    python benchmarks/object_sampling.py [--frames 20] [--logs 4] [--points 34720] [--boxes 40] [--sweeps 10]

Frames are made on the spot: a ground of `points` returns per sweep, thinning out with the distance as a LiDAR's do, and boxes
of the sizes of the nuScenes classes, filled with returns. One thread. Pasting uses the published numbers for nuScenes.
"""

from __future__ import annotations

import argparse
import platform
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from picture3d.datasets.class_balance import class_counts
from picture3d.datasets.detection_classes import CLASS_OF_CATEGORY, NUSCENES_DETECTION
from picture3d.datasets.object_building import build_object_database
from picture3d.datasets.object_database import ObjectDatabase
from picture3d.datasets.object_sampling import open_sampler
from picture3d.datasets.object_sampling_config import ObjectSamplingConfig
from picture3d.datasets.prepared import FrameKey, LogHeader, LogWriter, PreparedDataset, log_path, write_dataset
from picture3d.datasets.samples import DataConfig, read_sample
from picture3d.structures.boxes import Boxes
from picture3d.structures.frame import Frame
from picture3d.structures.points import IntensityUnit, PointCloud
from picture3d.structures.poses import Pose


def made_frame(log: str, index: int, points: int, boxes: int, keyframe: bool, rng: np.random.Generator) -> Frame:
    distance, angle = 2 + 50 * rng.random(points) ** 2, rng.uniform(-np.pi, np.pi, points)
    ground = np.column_stack([distance * np.cos(angle), distance * np.sin(angle), rng.normal(-1.8, 0.02, points)])
    center = np.column_stack([rng.uniform(-50, 50, (boxes, 2)), rng.uniform(-1.2, -0.8, boxes)])
    size = np.column_stack([rng.uniform(0.5, 5, boxes), rng.uniform(0.5, 2, boxes), rng.uniform(1, 2, boxes)])
    counts = np.minimum(300, (2000 / (1 + (center[:, :2] ** 2).sum(1) / 20))).astype(int)
    owner = np.repeat(np.arange(boxes), counts)
    inside = center[owner] + rng.uniform(-0.3, 0.3, (len(owner), 3)) * size[owner].min(axis=1, keepdims=True)
    xyz = np.concatenate([ground, inside])[:points].astype(np.float32)
    categories = list(CLASS_OF_CATEGORY)
    found = Boxes(
        center=center,
        size=size,
        yaw=rng.uniform(-np.pi, np.pi, boxes),
        velocity=np.zeros((boxes, 2)),
        category=tuple(categories[k] for k in rng.integers(0, len(categories), boxes)),
        track_id=tuple(str(k) for k in range(boxes)),
        num_points=counts.astype(np.int32),
    )
    xyz[-len(inside) :] = inside[-len(xyz) :]
    return Frame(
        log=log,
        index=index,
        token=str(index),
        timestamp_us=50_000 * index,
        points=PointCloud(xyz, rng.integers(0, 256, len(xyz)).astype(np.float32), IntensityUnit.RAW_255),
        global_from_ego=Pose.from_yaw(0.001 * index, [0.5 * index, 0, 0]),
        ego_from_lidar=Pose.identity(),
        is_keyframe=keyframe,
        boxes=found if keyframe else None,
        previous=tuple(range(index - 1, max(-1, index - 10), -1)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logs", type=int, default=4)
    parser.add_argument("--frames", type=int, default=20, help="keyframes in all")
    parser.add_argument("--points", type=int, default=34_720)
    parser.add_argument("--boxes", type=int, default=40)
    parser.add_argument("--sweeps", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{platform.machine()}, 1 thread, python {platform.python_version()}, numpy {np.__version__}, torch {torch.__version__}"
    )
    print(
        f"{args.frames} keyframes in {args.logs} logs, {args.sweeps} sweeps of {args.points:,} points, {args.boxes} boxes each"
    )
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        root, summaries = Path(folder), {}
        for n in range(args.logs):
            log = f"log-{n}"
            with LogWriter(log_path(root, log), LogHeader(log, "benchmark")) as writer:
                # The sweeps before the first keyframe are there, and all keyframes follow each other, so each has its past.
                for i in range(args.sweeps - 1 + args.frames // args.logs):
                    writer.add(made_frame(log, i, args.points, args.boxes, i >= args.sweeps - 1, rng))
            summaries[log] = writer.finished
        write_dataset(root, name="benchmark", label_set_name=None, splits={"train": list(summaries)}, logs=summaries)

        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peaks = []
        start = time.perf_counter()
        made = build_object_database(
            root,
            sweeps=args.sweeps,
            classes=NUSCENES_DETECTION,
            progress=lambda done, total: peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss),
        )
        seconds = time.perf_counter() - start
        print(f"database: {made.frames / seconds:.1f} keyframes/s, {made.objects} objects, "
              f"{made.points / made.objects:.0f} points and {made.bytes / made.objects:.0f} bytes per object")  # fmt: skip
        print(f"  peak memory above the start: {(peaks[0] - before) / 1024:.0f} MiB after one log, "
              f"{(peaks[-1] - before) / 1024:.0f} MiB after {args.logs}")  # fmt: skip

        dataset = PreparedDataset(root)
        config = DataConfig(
            root=root, sweeps=args.sweeps, features=("intensity", "time_lag"), box_classes=NUSCENES_DETECTION.names
        )
        start = time.perf_counter()
        database = ObjectDatabase(made.path)
        print(f"opening it: {(time.perf_counter() - start) * 1e3:.1f} ms, {len(database)} objects")
        config_of_objects = ObjectSamplingConfig.nuscenes(f"train-{args.sweeps}sweeps")
        sampler = open_sampler(config_of_objects, NUSCENES_DETECTION, config, dataset)
        keys = dataset.keyframes("train")
        reading, pasting, came, points = [], [], [], 0
        for i, key in enumerate(keys[:10]):
            start = time.perf_counter()
            sample = read_sample(dataset, key, config)
            reading.append(time.perf_counter() - start)
            points = len(sample.xyz)
            start = time.perf_counter()
            found = sampler.paste(sample, NUSCENES_DETECTION, np.random.default_rng([0, i]))
            pasting.append(time.perf_counter() - start)
            came.append(len(found.boxes or ()) - len(sample.boxes or ()))
        print(f"reading a sample of {points:,} points: median {np.median(reading) * 1e3:.0f} ms; pasting "
              f"{np.mean(came):.1f} objects into it: median {np.median(pasting) * 1e3:.0f} ms")  # fmt: skip

        many = [FrameKey(key.log, key.index) for key in keys]
        start = time.perf_counter()
        class_counts(dataset, many, NUSCENES_DETECTION)
        first = time.perf_counter() - start
        start = time.perf_counter()
        class_counts(dataset, many * (28_130 // len(many)), NUSCENES_DETECTION)
        print(f"counting classes: {first / len(many) * 1e3:.2f} ms per keyframe the first time; "
              f"{(time.perf_counter() - start) * 1e3:.0f} ms for 28,130 keys from the kept counts")  # fmt: skip


if __name__ == "__main__":
    main()
