"""What the teachers without a download take per sweep: processor and wall seconds, cells, columns, bytes as stored.

    python benchmarks/own_teachers.py PREPARED [--encoder RUN] [--sweeps 8]

Each teacher looks at every sweep once to warm up; the best of three repeats counts.
"""

from __future__ import annotations

import argparse
import platform
import time
from pathlib import Path

import numpy as np
import torch

from picture3d.commands.build import build_teacher
from picture3d.datasets.prepared import PreparedDataset
from picture3d.teachers.feature_codecs import smallest_codec
from picture3d.teachers.protocol import Teacher

REPEATS = 3


def row(teacher: Teacher, dataset: PreparedDataset, sweeps: int) -> str:
    """One row of the table."""
    keys = dataset.keyframes(None)
    points = [dataset.frame(key, ()).points for key in keys[:: max(1, len(keys) // sweeps)][:sweeps]]
    found = [teacher.cell_features(sweep).features for sweep in points]
    processor, wall = [], []
    for _ in range(REPEATS):
        begin, begin_processor = time.perf_counter(), time.process_time()
        for sweep in points:
            teacher.cell_features(sweep)
        wall.append((time.perf_counter() - begin) / len(points))
        processor.append((time.process_time() - begin_processor) / len(points))
    encoded = [smallest_codec(features.cpu().numpy()) for features in found]
    cells = sum(map(len, found))
    stored = sum(len(data) for _, data, _ in encoded) / cells
    return (
        f"| {teacher.name} | {np.mean([len(sweep) for sweep in points]):,.0f} | {cells / len(points):,.0f} | "
        f"{teacher.dimension} | {min(processor):.3f} | {min(wall):.3f} | {stored:.0f} | "
        f"{np.mean([cosine for *_, cosine in encoded]):.4f} |"
    )


def main() -> None:
    """Prints the circumstances and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prepared", type=Path)
    parser.add_argument("--encoder", type=Path, help="run folder of a finished pre-training")
    parser.add_argument("--sweeps", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    print(f"{platform.machine()}, torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, {options.prepared}")
    print("| teacher | points | cells | columns | processor s | wall s | bytes per cell | mean cosine |")
    print("|---|---|---|---|---|---|---|---|")
    dataset = PreparedDataset(options.prepared)
    names = ["town", "handcrafted", *(["encoder"] if options.encoder else [])]
    for name in names:
        print(row(build_teacher(name, options.encoder if name == "encoder" else None, device), dataset, options.sweeps))


if __name__ == "__main__":
    main()
