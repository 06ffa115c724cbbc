"""Frames with hand-placed boxes and the points inside of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from picture3d.structures.boxes import Boxes
from picture3d.structures.frame import Frame
from picture3d.structures.points import IntensityUnit, PointCloud
from picture3d.structures.poses import Pose
from tests.datasets.made_frames import write_made_dataset


def boxes_of(rows: list[tuple[str, list[float]]], **columns: Any) -> Boxes:
    """Boxes from (category, [x y z l w h yaw] or with vx vy behind)."""
    table = np.array([row + [0.0] * (9 - len(row)) for _, row in rows], np.float64).reshape(-1, 9)
    return Boxes(
        center=table[:, :3],
        size=table[:, 3:6],
        yaw=table[:, 6],
        velocity=table[:, 7:9],
        category=tuple(category for category, _ in rows),
        track_id=tuple(f"track-{i}" for i in range(len(rows))),
        num_points=np.full(len(rows), -1, np.int32),
        **columns,
    )


def cloud_of(xyz: Any, *, unit: IntensityUnit = IntensityUnit.RAW_255, elongation: bool = False) -> PointCloud:
    """Points whose intensity is their row, modulo 256."""
    points = np.array(xyz, np.float32).reshape(-1, 3)
    rows = np.arange(len(points), dtype=np.float32)
    return PointCloud(points, rows % 256, unit, elongation=(rows / 8).astype(np.float32) if elongation else None)


def frame_of(points: PointCloud, boxes: Boxes | None, *, log: str = "log-a", index: int = 0, **changes: Any) -> Frame:
    values: dict[str, Any] = {
        "log": log,
        "index": index,
        "token": f"{log}-{index}",
        "timestamp_us": 1_000_000 + 50_000 * index,
        "points": points,
        "global_from_ego": Pose.identity(),
        "ego_from_lidar": Pose.identity(),
        "boxes": boxes,
    }
    return Frame(**(values | changes))


def box_points(row: list[float], count: int, rng: np.random.Generator) -> np.ndarray:
    """(count, 3) points well inside of a box."""
    x, y, z, length, width, height, yaw = row[:7]
    local = rng.uniform(-0.45, 0.45, (count, 3)) * [length, width, height]
    c, s = np.cos(yaw), np.sin(yaw)
    return local @ np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]]) + [x, y, z]


def random_frame(index: int, rng: np.random.Generator, *, log: str = "log-a", categories: tuple[str, ...], objects: int = 8):
    """Boxes at random places (they may overlap), each with 0 to 19 points, on a ground of 300 points."""
    rows = []
    for i in range(objects):
        size = [rng.uniform(1, 5), rng.uniform(0.6, 2), rng.uniform(1, 2)]
        place = [*rng.uniform(-15, 15, 2), rng.uniform(-1, 1), *size, rng.uniform(-3, 3), *rng.normal(size=2)]
        rows.append((categories[i % len(categories)], [float(v) for v in place]))
    ground = np.column_stack([rng.uniform(-20, 20, (300, 2)), rng.uniform(-2, 2, 300)])
    inside = [box_points(row, int(rng.integers(0, 20)), rng) for _, row in rows]
    return frame_of(cloud_of(np.concatenate([ground, *inside])), boxes_of(rows), log=log, index=index)


def write_scenes(root: Path, logs: dict[str, list[Frame]], **options: Any) -> Path:
    return write_made_dataset(root, logs, label_set=None, **options)
