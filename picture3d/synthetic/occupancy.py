"""Occupancy labels of a town in the layout of nuScenes-Occupancy, made from the known geometry and not from sweeps.

What is marked: the cell in which the ground's surface lies in the middle of its column, and every cell whose middle is inside
a primitive grown by half a cell (so that poles and plates leave no gaps), but not deeper than `SHELL_M` below the surface of
what a laser does not enter. Classes are those of the label bytes: noise is 0. Things stand over scenery over ground. Nothing
is hidden: the back of a house is marked too, which no sweep has seen; the official labels were gathered from sweeps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from picture3d.errors import DataError
from picture3d.files import read_json_object
from picture3d.formats.lidarseg_categories import LIDARSEG_CLASSES
from picture3d.formats.openoccupancy import (
    GRID_ORIGIN,
    GRID_SHAPE,
    IGNORED,
    VOXEL_SIZE,
    OccupiedVoxels,
    write_openoccupancy,
)
from picture3d.structures.occupancy import Occupancy, OccupancyGrid
from picture3d.structures.poses import Pose
from picture3d.synthetic.drive import EGO_FROM_LIDAR, DriveConfig
from picture3d.synthetic.ground import COVER_LABEL
from picture3d.synthetic.lidar import Scenery
from picture3d.synthetic.nuscenes_rows import SceneJob, town_seed
from picture3d.synthetic.primitives import BOX, CYLINDER, Primitives
from picture3d.synthetic.scene_jobs import SPLITS_FILE, Progress, run_jobs
from picture3d.synthetic.world import build_town

OCCUPANCY_FOLDER = "nuScenes-Occupancy-v0.1"
SHELL_M = 0.3
_CLASS = np.full(256, IGNORED, np.uint8)
_CLASS[list(LIDARSEG_CLASSES)] = list(LIDARSEG_CLASSES.values())


def write_occupancy(root: Path, *, processes: int = 1, progress: Progress | None = None) -> int:
    """Writes `nuScenes-Occupancy-v0.1/scene_<token>/occupancy/<lidar token>.npy` for every keyframe of a town's dataset.

    A file that is there is kept: it is a function of the town alone. Returns how many keyframes there are.

    Args:
        root: a finished dataset of `write_nuscenes`.
        processes: scenes written at the same time; the bytes do not depend on it.
        progress: called with (keyframes done, keyframes in all).

    Raises:
        DataError: if `root` is no such dataset, or a file cannot be written.
    """
    settings = read_json_object(root / SPLITS_FILE, max_bytes=1 << 24)
    try:
        config = DriveConfig.model_validate(settings["drive"])
        version, seed = str(settings["version"]), int(settings["seed"])
        scenes = sum(len(members) for members in settings["splits"].values())
    except (KeyError, TypeError, ValueError, AttributeError):
        raise DataError(f"{root / SPLITS_FILE}: is not the one of a town in nuScenes' layout. Write it by `synth`.") from None
    jobs = [SceneJob(root, version, seed, scene, config) for scene in range(1, scenes + 1)]
    total, done = scenes * config.keyframes, 0
    report = progress or (lambda done, total: None)
    report(done, total)
    for written in run_jobs(_write_scene, jobs, processes):
        done += written
        report(done, total)
    return total


def occupancy_path(job: SceneJob, index: int) -> Path:
    """Where the labels of sweep number `index` of a scene lie."""
    return job.root / OCCUPANCY_FOLDER / f"scene_{job.token('scene')}" / "occupancy" / f"{job.token('sample_data', index)}.npy"


def _write_scene(job: SceneJob) -> Iterator[int]:
    town = None
    for keyframe in range(job.config.keyframes):
        index = keyframe * (job.config.sweeps_per_keyframe + 1)
        path = occupancy_path(job, index)
        if not path.exists():
            town = town or build_town(town_seed(job.seed, job.scene), job.config.town)
            time_s = round(keyframe * job.config.keyframe_gap_s * 1e6) / 1e6
            found = occupancy_of(town, town.ego_pose(time_s) @ EGO_FROM_LIDAR, time_s)
            write_openoccupancy(path, OccupiedVoxels(found.index, found.label))
        yield 1


def occupancy_of(
    scenery: Scenery,
    global_from_lidar: Pose,
    time_s: float,
    grid: OccupancyGrid = OccupancyGrid(GRID_SHAPE, GRID_ORIGIN, VOXEL_SIZE),  # noqa: B008 - frozen
) -> Occupancy:
    """What stands where around a LiDAR at a time; labels are the classes 1..16 of lidarseg, or IGNORED."""
    dense = np.zeros(grid.shape, np.uint8)
    _mark_ground(dense, scenery, global_from_lidar, grid)
    corners = np.array([grid.origin, grid.end])
    reach = float(np.linalg.norm(np.abs(corners).max(axis=0)))
    here_x, here_y = (float(value) for value in global_from_lidar.translation[:2])
    near = scenery.primitives_near(here_x, here_y, reach, time_s)
    here = near.seen_from(global_from_lidar.rotation, global_from_lidar.translation)
    for row in np.argsort(here.instance > 0, kind="stable"):
        _mark(dense, _Shape.of(here, int(row)), grid)
    return Occupancy.of_dense(dense, grid)


def _mark_ground(dense: NDArray[np.uint8], scenery: Scenery, global_from_lidar: Pose, grid: OccupancyGrid) -> None:
    """One cell per column: where the middle line of the column meets the surface, found by Newton's method."""
    x, y = (grid.origin[axis] + (np.arange(grid.shape[axis]) + 0.5) * grid.cell_m for axis in (0, 1))
    column = np.stack([*(side.ravel() for side in np.meshgrid(x, y, indexing="ij")), np.full(len(x) * len(y), 0.0)], axis=1)
    above = global_from_lidar.translation[2] - float(scenery.ground.surface(*global_from_lidar.translation[:2, None])[0])
    column[:, 2] = -above
    for _ in range(4):
        place = global_from_lidar.apply(column)
        surface = scenery.ground.surface(place[:, 0], place[:, 1])
        column[:, 2] -= (place[:, 2] - surface) / global_from_lidar.rotation[2, 2]
    place = global_from_lidar.apply(column)
    cells, inside = grid.locate(column)
    label = _CLASS[COVER_LABEL[scenery.ground.code(place[inside, 0], place[inside, 1])]]
    dense[tuple(cells.T)] = label


@dataclass(frozen=True, slots=True, eq=False)
class _Shape:
    """One primitive in the frame of the LiDAR."""

    kind: int
    center: NDArray[np.float64]
    half: NDArray[np.float64]
    rotation: NDArray[np.float64]
    label: int
    solid: bool

    @staticmethod
    def of(rows: Primitives, i: int) -> _Shape:
        solid = float(rows.free_path[i]) == 0.0
        return _Shape(int(rows.kind[i]), rows.center[i], rows.half[i], rows.rotation[i], int(_CLASS[rows.label[i]]), solid)

    def grown(self, cell_m: float) -> NDArray[np.float64]:
        """Half sides (3,) grown by half a cell, and no thinner than leaves a pole without gaps between cells' middles."""
        return np.maximum(self.half + cell_m / 2, cell_m * (np.sqrt(0.5) + 1e-6))

    def holds(self, local: NDArray[np.float64], half: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Which of (N, 3) points, along the primitive's own axes, lie in its kind of shape of these half sides (3,)."""
        if (half <= 0).any():
            return np.zeros(len(local), np.bool_)
        share = np.abs(local) / half
        if self.kind == BOX:
            return np.all(share <= 1, axis=1)
        if self.kind == CYLINDER:
            return (share[:, 0] ** 2 + share[:, 1] ** 2 <= 1) & (share[:, 2] <= 1)
        return (share**2).sum(axis=1) <= 1


def _mark(dense: NDArray[np.uint8], shape: _Shape, grid: OccupancyGrid) -> None:
    half = shape.grown(grid.cell_m)
    reach = np.abs(shape.rotation) @ half
    origin = np.asarray(grid.origin)
    low = np.clip(np.floor((shape.center - reach - origin) / grid.cell_m), 0, grid.shape).astype(int)
    high = np.clip(np.floor((shape.center + reach - origin) / grid.cell_m) + 1, 0, grid.shape).astype(int)
    if (low >= high).any():
        return
    axes = [origin[a] + (np.arange(low[a], high[a]) + 0.5) * grid.cell_m - shape.center[a] for a in range(3)]
    local = np.stack([side.ravel() for side in np.meshgrid(*axes, indexing="ij")], axis=1) @ shape.rotation
    marked = shape.holds(local, half)
    if shape.solid:
        marked &= ~shape.holds(local, shape.half - SHELL_M)
    window = dense[low[0] : high[0], low[1] : high[1], low[2] : high[2]]
    window[marked.reshape(window.shape)] = shape.label
