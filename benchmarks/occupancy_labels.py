"""What attached occupancy labels cost: bytes a keyframe, and milliseconds to read the official file, to store and to load.

    python benchmarks/occupancy_labels.py [--labels nuScenes-Occupancy-v0.1] [--frames 4]

Without `--labels` the labels are those of synthetic towns, as they are and with only a part of the voxels kept at random,
which is the worst that can happen to a code of differences. What comes back is compared before anything is timed.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from picture3d.datasets.occupancy_store import KIND, add_occupancy, read_occupancy
from picture3d.datasets.openoccupancy import NUSCENES_OCCUPANCY
from picture3d.formats.block_file import BlockFile, BlockWriter
from picture3d.formats.openoccupancy import OccupiedVoxels, read_openoccupancy, write_openoccupancy
from picture3d.structures.occupancy import Occupancy
from picture3d.synthetic.drive import EGO_FROM_LIDAR
from picture3d.synthetic.occupancy import occupancy_of
from picture3d.synthetic.world import build_town

REPEATS = 5


def best_ms(action: Callable[[], object]) -> float:
    """Best of `REPEATS`."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times) * 1e3


def measure(found: Occupancy, folder: Path) -> dict[str, float]:
    """Bytes and milliseconds of one frame."""
    official, stored = folder / "labels.npy", folder / "log.occ"
    write_openoccupancy(official, OccupiedVoxels(found.index, found.label))

    def store() -> None:
        with BlockWriter(stored, KIND, {}) as out:
            add_occupancy(out, 0, "token", found)

    store()
    file = BlockFile(stored, KIND)
    back = read_occupancy(file, 0, found.grid)
    if not (np.array_equal(back.index, found.index) and np.array_equal(back.label, found.label)):
        raise SystemExit("what was stored is not what came back")
    return {
        "voxels": len(found),
        ".npy": official.stat().st_size,
        ".npy zlib 6": len(zlib.compress(official.read_bytes(), 6)),
        "stored": stored.stat().st_size,
        "read .npy ms": best_ms(lambda: read_openoccupancy(official)),
        "store ms": best_ms(store),
        "load ms": best_ms(lambda: read_occupancy(file, 0, found.grid)),
        "dense ms": best_ms(found.dense),
    }


def thinned(found: Occupancy, share: float) -> Occupancy:
    """A random part of the voxels."""
    kept = np.random.default_rng(0).random(len(found)) < share
    return Occupancy(found.index[kept], found.label[kept], found.grid)


def main() -> None:
    """Prints the table and its circumstances."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=Path, help="official labels; towns if left out")
    parser.add_argument("--frames", type=int, default=4)
    args = parser.parse_args()
    groups: dict[str, list[Occupancy]] = {}
    if args.labels is not None:
        paths = sorted(args.labels.glob("scene_*/occupancy/*.npy"))[: args.frames]
        files = [read_openoccupancy(path) for path in paths]
        groups[args.labels.name] = [Occupancy(file.index, file.label, NUSCENES_OCCUPANCY) for file in files]
    else:
        towns = [build_town(seed) for seed in range(args.frames)]
        frames = [occupancy_of(town, town.ego_pose(5.0) @ EGO_FROM_LIDAR, 5.0) for town in towns]
        groups["town"] = frames
        for share in (0.7, 0.4):
            groups[f"town, {share:.0%} of the voxels"] = [thinned(frame, share) for frame in frames]
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, group) in enumerate(groups.items()):
            rows = [measure(frame, Path(folder)) for frame in group]
            if number == 0:
                print("| labels | " + " | ".join(rows[0]) + " |\n|---|" + "---|" * len(rows[0]))
            means = {key: np.mean([row[key] for row in rows]) for key in rows[0]}
            print(
                f"| {name} | "
                + " | ".join(f"{v:.1f}" if key.endswith("ms") else f"{v:,.0f}" for key, v in means.items())
                + " |"
            )
    print(
        f"\nmeans of {args.frames} keyframes, best of {REPEATS}; {platform.system()} {platform.machine()}, "
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}, numpy {np.__version__}, "
        f"zlib {zlib.ZLIB_VERSION}"
    )


if __name__ == "__main__":
    main()
