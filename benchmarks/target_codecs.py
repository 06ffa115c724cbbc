"""Stored teacher features: bytes against cosine for every codec, and milliseconds to read a frame back.

    python benchmarks/target_codecs.py [--data FOLDER] [--threads 1] [--repeats 7]

The town teacher looks at real sweeps (folder of the sample data), a basis is fitted on the sweeps of each dataset as `picture3d
targets` does. A row of the table is one codec over all sweeps of a dataset: the cosine between the teacher's feature and what
is read back, mean and worst per cent over teacher cells; mean over points (each has its cell's row) and over student voxels
(means over a voxel's points, of both). Kilobytes a frame: if a row were kept for each point, for each cell (as the store
does), for each voxel; one superclass byte a row included. The reference keeps 256 bytes of float32 a cell besides its inputs.
Reading a frame is timed through the store: checksums, cells derived from the points, features and superclasses.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from picture3d.ops.quantize import Quantisation
from picture3d.structures.frame import Frame
from picture3d.structures.points import IntensityUnit, PointCloud
from picture3d.structures.poses import Pose
from picture3d.teachers.feature_basis import BasisFit, FeatureBasis
from picture3d.teachers.feature_codecs import FeatureCodec, codec_of, decode_features, encode_features, row_cosines
from picture3d.teachers.store import FeatureStore, derive_cells
from picture3d.teachers.targets import compute_targets
from picture3d.teachers.town.teacher import load_town_teacher

# Student voxels of the two published recipes; SemanticKITTI takes nuScenes' here.
VOXELS = {"nuScenes": (0.2, 0.2, 0.2), "Waymo": (0.32, 0.32, 0.1875), "SemanticKITTI": (0.2, 0.2, 0.2)}
REFERENCE_BYTES = 256


@dataclass
class Sweeps:
    """Sweeps as a dataset of one log."""

    root: Path
    frames: list[Frame]

    def logs(self, split: str | None = None) -> Sequence[str]:
        """The one log."""
        return ["log"]

    def keyframes(self, split: str | None = None) -> Sequence[Frame]:
        """Every frame."""
        return self.frames

    def frame(self, key: Any, columns: Any = None) -> Frame:
        """The frame itself."""
        return key


def main() -> None:
    """Prints the table and the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("PICTURE3D_DATA", "../shared/data")))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{platform.machine()}, {os.cpu_count()} cores, {options.threads} in use, torch {torch.__version__}\n")
    print(
        "| sweeps | codec | bytes a row | of 256 | cosine, cells | worst 1 % | points | voxels "
        "| KB by point | by cell | by voxel |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    times = []
    for name, clouds in real_sweeps(options.data).items():
        for line in curve(name, clouds):
            print(line, flush=True)
        times += reading(name, clouds, options.repeats)
    print("\n| sweeps | codec | points | cells | ms to read, least | median |\n|---|---|---|---|---|---|")
    print("\n".join(times))


def real_sweeps(folder: Path) -> dict[str, list[PointCloud]]:
    """Sweeps by dataset."""
    nuscenes = [np.load(path) for path in sorted((folder / "nuscenes/keyframe_sequence/pc").glob("pc*.npy"))]
    waymo = [np.fromfile(p, np.float32).reshape(-1, 5) for p in sorted((folder / "waymo/lidar_frames").glob("*.bin"))]
    kitti = [
        np.fromfile(p, np.float32).reshape(-1, 4)
        for p in sorted((folder / "semantickitti/sequences/04/velodyne").glob("*.bin"))
    ]
    found = {
        "nuScenes": [cloud(table, IntensityUnit.RAW_255) for table in nuscenes],
        "Waymo": [cloud(table, IntensityUnit.TANH) for table in waymo],
        "SemanticKITTI": [cloud(table, IntensityUnit.UNIT) for table in kitti],
    }
    if not all(found.values()):
        raise SystemExit(f"{folder}: sweeps are missing ({', '.join(name for name, clouds in found.items() if not clouds)})")
    return found


def cloud(table: NDArray[np.float32], unit: IntensityUnit) -> PointCloud:
    """Columns x, y, z, intensity of the finite rows."""
    table = table[np.isfinite(table[:, :4]).all(1)].astype(np.float32)
    return PointCloud(np.ascontiguousarray(table[:, :3]), np.ascontiguousarray(table[:, 3]), unit)


def curve(name: str, clouds: list[PointCloud]) -> list[str]:
    """One line per codec."""
    teacher = load_town_teacher()
    features = [teacher.cell_features(points).features.numpy() for points in clouds]
    cells = [derive_cells(points.xyz, teacher.quantisation) for points in clouds]
    voxels = [derive_cells(points.xyz, Quantisation("cartesian", VOXELS[name])) for points in clouds]
    fit = BasisFit(teacher.dimension, len(clouds), seed=0)
    for number, rows in enumerate(features):
        fit.add(fit.moments(number, rows))
    generator = torch.Generator().manual_seed(0)
    chosen = fit.principal()
    bases: list[tuple[str, FeatureBasis | FeatureCodec]] = [("float16", FeatureCodec.FLOAT16), ("int8", FeatureCodec.INT8)]
    bases += [(f"pca, {rank} of 8 bits", fit.principal(rank)) for rank in (8, 12, 16, 20, 24, 31)]
    bases += [(f"pca, {rank} of 4 bits", fit.principal(rank, 0)) for rank in (16, 24, 32)]
    bases += [(f"pca as chosen: {chosen.wide} of 8 bits, {chosen.narrow} of 4", chosen)]
    bases += [(f"product, {books} books", fit.code_books(generator, books)) for books in (4, 8, 16, 32)]
    lines = []
    for label, basis in bases:
        codec, known = (basis, None) if isinstance(basis, FeatureCodec) else (codec_of(basis), basis)
        stored, by_cell, by_point, by_voxel = 0, [], [], []
        for rows, cell, voxel in zip(features, cells, voxels, strict=True):
            encoded = encode_features(rows, codec, known)
            stored += len(encoded) + len(rows)
            cosine = row_cosines(rows, encoded, codec, known)
            by_cell.append(cosine)
            by_point.append(cosine[cell])
            read = decode_features(np.frombuffer(bytearray(encoded), np.uint8), codec, rows.shape[0], rows.shape[1], known)
            by_voxel.append(voxel_cosines(rows[cell], read[cell].astype(np.float32), voxel))
        size = stored / sum(map(len, by_cell))
        cosine = np.concatenate(by_cell)
        kilobytes = (size * sum(map(len, found)) / len(clouds) / 1000 for found in (by_point, by_cell, by_voxel))
        lines.append(
            f"| {name} | {label} | {size:.1f} | 1/{REFERENCE_BYTES / size:.1f} | {cosine.mean():.5f} | "
            f"{np.quantile(cosine, 0.01):.4f} | {np.concatenate(by_point).mean():.5f} | "
            f"{np.concatenate(by_voxel).mean():.5f} | " + " | ".join(f"{value:.0f}" for value in kilobytes) + " |"
        )
    return lines


def voxel_cosines(own: NDArray[np.float32], read: NDArray[np.float32], voxel: NDArray[np.int64]) -> NDArray[np.float32]:
    """(V,) cosine between the means of both over the points of each voxel."""
    count = int(voxel.max()) + 1
    index = torch.from_numpy(voxel)
    sums = [torch.zeros(count, own.shape[1]).index_add_(0, index, torch.from_numpy(rows)) for rows in (own, read)]
    return torch.cosine_similarity(sums[0], sums[1]).numpy()


def reading(name: str, clouds: list[PointCloud], repeats: int) -> list[str]:
    """Milliseconds to read the frames of a store, codec by codec."""
    lines = []
    for codec in ("float16", "int8", "auto"):
        with tempfile.TemporaryDirectory() as folder:
            frames = [Frame("log", i, str(i), i, points, None, Pose.identity()) for i, points in enumerate(clouds)]
            summary = compute_targets(Sweeps(Path(folder), frames), load_town_teacher(), codec=codec)
            store = FeatureStore(summary.folder)
            spent = []
            for turn in range(repeats + 1):
                for frame in frames:
                    start = time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()
                    store.targets(frame)
                    end = time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()
                    if turn:
                        spent.append(1000 * (end - start))
        used = ", ".join(f"{count} as {of}" for of, count in summary.codecs.items())
        lines.append(
            f"| {name} | {codec} ({used}) | {sum(map(len, clouds)) // len(clouds)} | {summary.cells // summary.frames} | "
            f"{min(spent):.1f} | {statistics.median(spent):.1f} |"
        )
    return lines


if __name__ == "__main__":
    main()
