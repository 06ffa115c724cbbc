"""What share of the voxels I2Mask really hides on real sweeps, by reading of the formula and by source of features.

    python benchmarks/mask_share.py --data FOLDER [--nuscenes 7] [--waymo 3]

FOLDER holds `nuscenes/keyframe_sequence/pc/pc*.npy` (float32 x y z intensity 0..255) and `waymo/lidar_frames/*.bin` (float32
x y z tanh(intensity) elongation). Single sweeps on the published grids, k-means with 8 clusters on the voxels' features as
published, no fallback (`min_ratio` 0). Features: the town teacher's; and six of plain geometry, so that two sources as unlike
as can be are seen: linearity, planarity, scattering and verticality of the points of each metre-sized cell, height, intensity,
each standardised over the sweep, rows of length 1.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from picture3d.ops.scatter import segment_mean
from picture3d.ops.voxelize import assign_voxels
from picture3d.pretrain.mask_lab import voxel_places
from picture3d.pretrain.masking import MaskConfig, choose_hidden, class_statistics
from picture3d.pretrain.targets import voxel_targets
from picture3d.recipes.pretraining import NUSCENES_GRID, WAYMO_GRID
from picture3d.structures.batch import PointBatch
from picture3d.structures.points import IntensityUnit, PointCloud
from picture3d.structures.voxels import VoxelGrid
from picture3d.teachers.town.teacher import load_town_teacher
from picture3d.training.runlog import describe_environment

READINGS = ("literal", "per_member", "off")
SEEDS = 3


@dataclass(frozen=True)
class Sweep:
    """One real sweep and the grid it is pre-trained on."""

    dataset: str
    points: PointCloud
    grid: VoxelGrid


def real_sweeps(folder: Path, nuscenes: int, waymo: int) -> list[Sweep]:
    """The first sweeps of each kind found below `folder`."""
    sweeps = []
    for path in sorted((folder / "nuscenes/keyframe_sequence/pc").glob("pc*.npy"))[:nuscenes]:
        rows = np.load(path, allow_pickle=False).astype(np.float32)
        cloud = PointCloud(rows[:, :3].copy(), rows[:, 3].copy(), IntensityUnit.RAW_255)
        sweeps.append(Sweep("nuScenes", cloud, NUSCENES_GRID.grid))
    for path in sorted((folder / "waymo/lidar_frames").glob("*.bin"))[:waymo]:
        rows = np.fromfile(path, np.float32).reshape(-1, 5)
        cloud = PointCloud(rows[:, :3].copy(), rows[:, 3].copy(), IntensityUnit.TANH)
        sweeps.append(Sweep("Waymo", cloud, WAYMO_GRID.grid))
    return sweeps


def geometric_features(points: PointCloud, cell_m: float = 1.0) -> Tensor:
    """(N, 6) float32 rows of length 1: the shape of the points within a cell of `cell_m` metres, height, intensity."""
    xyz = torch.from_numpy(points.xyz).double()
    _, cell = torch.unique(torch.floor(xyz / cell_m).long(), dim=0, return_inverse=True)
    count = int(cell.max()) + 1
    offset = xyz - segment_mean(xyz, cell, count)[cell]
    covariance = segment_mean((offset[:, :, None] * offset[:, None, :]).flatten(1), cell, count).view(-1, 3, 3)
    spread, axes = torch.linalg.eigh(covariance)
    low, middle, high = spread.clamp(min=0).sqrt().unbind(1)
    size = high.clamp(min=1e-6)
    shape = torch.stack([(high - middle) / size, (middle - low) / size, low / size, axes[:, 2, 0].abs()], 1)
    intensity = torch.from_numpy(points.intensity).double()
    rows = torch.cat([shape[cell], xyz[:, 2:], intensity[:, None]], 1)
    rows = (rows - rows.mean(0)) / rows.std(0).clamp(min=1e-6)
    return torch.nn.functional.normalize(rows, dim=1).float()


def shares(sweep: Sweep, cells: Tensor, point_cell: Tensor) -> dict[str, list[float]]:
    """Share of the voxels with a target hidden, in per cent, under each reading; one number per k-means seed."""
    xyz = torch.from_numpy(sweep.points.xyz)
    sample = torch.zeros(len(xyz), dtype=torch.int64)
    batch = PointBatch(
        *(xyz, torch.from_numpy(sweep.points.intensity)[:, None], sample, 1, ("sweep",)),
        cell_features=cells, point_cell=point_cell,
    )  # fmt: skip
    assignment = assign_voxels(xyz, sample, 1, sweep.grid)
    found: dict[str, list[float]] = {reading: [] for reading in READINGS}
    found |= {"smallest D": [], "largest D": []}
    for seed in range(SEEDS):
        base = MaskConfig(superclasses="kmeans", min_ratio=0.0)
        targets = voxel_targets(batch, assignment, base, torch.Generator().manual_seed(seed))
        voxel_sample, places = assignment.coords[:, 0].long(), voxel_places(assignment.coords, sweep.grid)
        assert targets.features is not None
        for reading in READINGS:
            config = MaskConfig.from_tree({"superclasses": "kmeans", "min_ratio": 0.0, "intra_class": reading})
            generator = torch.Generator().manual_seed(seed)
            hidden = choose_hidden(targets.features, targets.superclass, voxel_sample, 1, config, generator, places)
            found[reading].append(100 * float(hidden.sum() / targets.has_features.sum()))
        literal = MaskConfig(intra_class="literal")
        statistics = class_statistics(targets.features, targets.superclass, voxel_sample, 1, literal)
        present = statistics.dispersion[statistics.size > 0]
        found["smallest D"].append(float(present.min()))
        found["largest D"].append(float(present.max()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--nuscenes", type=int, default=7, help="sweeps")
    parser.add_argument("--waymo", type=int, default=3, help="sweeps")
    args = parser.parse_args()
    sweeps = real_sweeps(args.data, args.nuscenes, args.waymo)
    if not sweeps:
        sys.exit(f"{args.data}: no sweeps there; name the folder with --data")
    print({key: value for key, value in describe_environment("cpu").items() if isinstance(value, str | int | float)})
    print(f"k-means seeds per sweep: {SEEDS}; per cent of the voxels with a target hidden, mean (smallest - largest)")
    teacher = load_town_teacher()
    table: dict[tuple[str, str], dict[str, list[float]]] = {}
    for sweep in sweeps:
        with torch.no_grad():
            seen = teacher.cell_features(sweep.points)
        own = geometric_features(sweep.points)
        for source, cells, point_cell in (
            ("town teacher", seen.features.float(), seen.point_cell),
            ("geometry", own, torch.arange(len(own))),
        ):
            row = table.setdefault((sweep.dataset, source), {})
            for key, values in shares(sweep, cells, point_cell).items():
                row.setdefault(key, []).extend(values)
    for (dataset, source), row in table.items():
        cells = [f"{key} {np.mean(v):.2f} ({min(v):.2f} - {max(v):.2f})" for key, v in row.items()]
        count = sum(sweep.dataset == dataset for sweep in sweeps)
        print(f"{dataset}, {count} sweeps, {source}: " + ", ".join(cells))


if __name__ == "__main__":
    main()
