"""A whole pre-training step against its padded twin: processor seconds, share of the matrix-product rate, peak memory.

    python benchmarks/pretrain_step.py --data FOLDER [--sweep nuscenes|waymo] [--threads 1] [--steps 3]
        [--checkpointing] [--memory kept|ours|returned]

FOLDER holds `nuscenes/keyframe_sequence/pc/pc*.npy` (float32 x y z intensity 0..255) or `waymo/lidar_frames/*.bin` (float32
x y z tanh(intensity) elongation); the first sweep is taken, as the Waymo recipe sees it (width 192). A step is: targets of the
voxels with k-means, mask, encode, decode, losses, backward, optimiser; the town teacher's features of the points are made once
beforehand. The twin is the published form: padded sets in encoder and decoder, scikit-learn's k-means on the host. `--memory`
says which of the two run as commands do, keeping the memory they free (`training.host_memory`): both, ours alone, or neither.

Each form runs in a process of its own, so that its peak is its own; the memory before the first step is subtracted. Processor
seconds of all threads are least affected by other load; the seconds on the clock are given too.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from picture3d.commands.build import build_picture
from picture3d.pretrain import picture, targets
from picture3d.recipes.catalogue import pretraining_recipe
from picture3d.recipes.configs import TargetsConfig
from picture3d.structures.batch import PointBatch
from picture3d.structures.points import IntensityUnit, PointCloud
from picture3d.teachers.town.teacher import load_town_teacher
from picture3d.training.host_memory import keep_freed_memory
from picture3d.training.optim import build_optimizer
from picture3d.training.runlog import describe_environment

FORMS = ("padded", "bucketed")
PARTS = ("embed", "targets", "mask", "encode", "decode", "backward", "optimiser")


def read_sweep(folder: Path, kind: str) -> PointCloud:
    """The first real sweep of a kind."""
    pattern = {"nuscenes": "nuscenes/keyframe_sequence/pc/pc*.npy", "waymo": "waymo/lidar_frames/*.bin"}[kind]
    path = sorted(folder.glob(pattern))[0]
    if kind == "nuscenes":
        rows = np.load(path, allow_pickle=False).astype(np.float32)
        return PointCloud(rows[:, :3].copy(), rows[:, 3].copy(), IntensityUnit.RAW_255)
    rows = np.fromfile(path, np.float32).reshape(-1, 5)
    return PointCloud(rows[:, :3].copy(), rows[:, 3].copy(), IntensityUnit.TANH)


def batch_of(points: PointCloud) -> PointBatch:
    """The sweep with the town teacher's features."""
    with torch.no_grad():
        seen = load_town_teacher().cell_features(points)
    features = np.stack([points.intensity, np.zeros_like(points.intensity)], 1)
    xyz = torch.from_numpy(points.xyz)
    return PointBatch(
        *(xyz, torch.from_numpy(features), torch.zeros(len(xyz), dtype=torch.int64), 1, ("sweep",)),
        cell_features=seen.features.float(),
        point_cell=seen.point_cell,
    )  # fmt: skip


def published_kmeans(features: Tensor, k: int, generator: torch.Generator, max_iterations: int = 25) -> tuple[Tensor, Tensor]:
    """scikit-learn's k-means as the reference calls it (version 1.4 and later: one start)."""
    from sklearn.cluster import KMeans

    found = KMeans(n_clusters=min(k, len(features)), random_state=0).fit(features.numpy())
    return torch.from_numpy(found.labels_).long(), torch.from_numpy(found.cluster_centers_)


def one(form: str, args: argparse.Namespace) -> dict[str, Any]:
    """Times one form; shares of parts, and the peak above what was held before the first step."""
    if args.memory == "kept" or (args.memory == "ours" and form != "padded"):
        assert keep_freed_memory()
    torch.set_num_threads(args.threads)
    base = pretraining_recipe("waymo-picture", args.data)
    encoder = base.encoder.model_copy(update={"attention": form, "activation_checkpointing": args.checkpointing})
    mask = base.mask.model_copy(update={"superclasses": "kmeans"})
    training = base.training.model_copy(update={"batch_size": 1, "precision": "float32"})
    config = base.model_copy(
        update={"encoder": encoder, "mask": mask, "training": training, "targets": TargetsConfig(mode="online")}
    )
    if form == "padded":
        targets.kmeans = published_kmeans  # what the twin differs in, besides the form of its sets
    task = build_picture(config, torch.device("cpu"))
    network = task.module
    optimizer = build_optimizer(network, config.training.optim)
    batch = batch_of(read_sweep(args.data, args.sweep))
    seconds: dict[str, float] = defaultdict(float)
    operations: dict[str, float] = defaultdict(float)
    counter: FlopCounterMode | None = None

    def measured(part: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*values: Any, **named: Any) -> Any:
            before = counter.get_total_flops() if counter else 0
            begin = time.process_time()
            result = run(*values, **named)
            seconds[part] += time.process_time() - begin
            operations[part] += counter.get_total_flops() - before if counter else 0
            return result

        return wrapped

    for part, holder, name in (
        ("embed", network, "embed"),
        ("encode", network, "encode"),
        ("decode", network, "decode"),
        ("targets", picture, "voxel_targets"),
        ("mask", picture, "choose_hidden"),
    ):
        setattr(holder, name, measured(part, getattr(holder, name)))
    step_backward, step_optimizer = measured("backward", Tensor.backward), measured("optimiser", optimizer.step)

    def step() -> dict[str, Tensor]:
        optimizer.zero_grad()
        losses = task.loss(batch, torch.Generator().manual_seed(0))
        step_backward(losses["total"])
        step_optimizer()
        return losses

    held_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    losses = step()
    best: dict[str, float] = {}
    for _ in range(args.steps):
        seconds.clear()
        begin, clock = time.process_time(), time.perf_counter()
        step()
        took = {"processor": time.process_time() - begin, "clock": time.perf_counter() - clock, **seconds}
        best = {name: min(value, best.get(name, value)) for name, value in took.items()}
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    counter = FlopCounterMode(display=False)  # last: counting changes what a step keeps
    with counter:
        step()
    total_operations = counter.get_total_flops()
    counter = None
    a, b = torch.randn(7000, 192), torch.randn(192, 384)
    rates = []
    for _ in range(20):
        begin = time.process_time()
        for _ in range(10):
            torch.mm(a, b)
        rates.append(10 * 2 * 7000 * 192 * 384 / (time.process_time() - begin))
    return {
        "seconds": best,
        "operations": {**operations, "processor": total_operations},
        "rate": max(rates),
        "peak_mib": peak_mib - held_mib,
        "points": len(batch.xyz),
        "losses": {name: float(value.detach()) for name, value in losses.items()},
    }


def main() -> None:
    """Runs both forms one after the other and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("PICTURE3D_DATA", "../shared/data")))
    parser.add_argument("--sweep", choices=("nuscenes", "waymo"), default="nuscenes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--checkpointing", action="store_true", help="recompute blocks in the backward, in our form only")
    parser.add_argument("--memory", choices=("kept", "ours", "returned"), default="kept")
    parser.add_argument("--one", choices=FORMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        print(json.dumps(one(args.one, args)))
        return
    found: dict[str, dict[str, Any]] = {}
    for form in FORMS:
        words = [sys.executable, __file__, "--one", form, "--data", str(args.data), "--sweep", args.sweep]
        words += ["--threads", str(args.threads), "--steps", str(args.steps), "--memory", args.memory]
        words += ["--checkpointing"] if args.checkpointing and form == "bucketed" else []
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
        found[form] = json.loads(done.stdout.splitlines()[-1])
        result = found[form]
        voxels = {name: round(value, 4) for name, value in result["losses"].items()}
        print(f"{form}: {result['points']} points, {voxels}", flush=True)
        for name in ("processor", *PARTS):
            seconds, operations = result["seconds"][name], result["operations"].get(name, 0)
            share = f"{operations / seconds / result['rate']:5.0%} of the matrix-product rate" if operations else ""
            print(
                f"  {'whole step' if name == 'processor' else name:>10}: {seconds:8.3f} s, "
                f"{operations / 1e9:7.1f} GFLOP {share}"
            )
        print(
            f"  on the clock {result['seconds']['clock']:.3f} s, "
            f"{result['rate'] / 1e9:.0f} GFLOP/s, {result['peak_mib']:.0f} MiB"
        )
    padded, ours = found["padded"], found["bucketed"]
    print(
        f"quotients: processor {padded['seconds']['processor'] / ours['seconds']['processor']:.2f}, "
        f"peak memory {padded['peak_mib'] / ours['peak_mib']:.2f}"
    )
    print(
        json.dumps(
            {"load": os.getloadavg(), "checkpointing": args.checkpointing, "memory": args.memory, **describe_environment("cpu")}
        )
    )


if __name__ == "__main__":
    main()
