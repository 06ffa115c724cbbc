"""Label files in the layout of nuScenes-Occupancy for the made dataset of `raw_nuscenes`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from picture3d.datasets.nuscenes import prepare_nuscenes
from picture3d.formats.openoccupancy import GRID_SHAPE
from tests.datasets.raw_nuscenes import RawWorld

FOLDER = "nuScenes-Occupancy-v0.1"


def label_path(root: Path, scene: int, number: int) -> Path:
    return root / FOLDER / f"scene_s{scene}" / "occupancy" / f"s{scene}-d{number}.npy"


def label_rows(scene: int, number: int, count: int = 400) -> np.ndarray:
    """(count, 4) rows z, y, x, class of different voxels, in no order; classes 0..16."""
    rng = np.random.default_rng([scene, number, 2])
    voxel = rng.choice(np.prod(GRID_SHAPE), count, replace=False)
    x, y, z = np.unravel_index(voxel, GRID_SHAPE)
    return np.stack([z, y, x, rng.integers(0, 17, count)], axis=1).astype(np.int64)


def write_labels(world: RawWorld, root: Path, *, count: int = 400) -> None:
    """A label file for every keyframe."""
    for scene in range(world.scenes):
        for keyframe in range(world.keyframes):
            number = keyframe * (world.between + 1)
            path = label_path(root, scene, number)
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, label_rows(scene, number, count))


def prepared_world(folder: Path, **settings: int) -> tuple[RawWorld, Path]:
    """A made dataset, prepared, with label files in `folder`."""
    world = RawWorld(folder / "raw", **settings)
    world.write()
    write_labels(world, folder)
    prepare_nuscenes(world.root, folder / "prepared")
    return world, folder / "prepared"
