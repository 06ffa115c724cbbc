"""Frames, logs and datasets made on the spot for tests."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from picture3d.datasets.prepared import LogHeader, LogWriter, log_path, write_dataset
from picture3d.structures.boxes import Boxes
from picture3d.structures.frame import Frame
from picture3d.structures.points import IntensityUnit, PointCloud
from picture3d.structures.poses import Pose


def made_boxes(rng: np.random.Generator, count: int) -> Boxes:
    return Boxes(
        center=rng.uniform(-20, 20, (count, 3)),
        size=rng.uniform(1, 5, (count, 3)),
        yaw=rng.uniform(-np.pi, np.pi, count),
        velocity=np.where(rng.random((count, 1)) < 0.3, np.nan, rng.normal(size=(count, 2))),
        category=tuple(f"vehicle.é{i}" for i in range(count)),
        track_id=tuple(f"track-{i}" for i in range(count)),
        num_points=rng.integers(-1, 50, count).astype(np.int32),
        num_radar_points=rng.integers(0, 9, count).astype(np.int32),
        attribute=tuple("" if i % 2 else "vehicle.moving" for i in range(count)),
        difficulty=rng.integers(0, 3, count).astype(np.int8),
        acceleration=rng.normal(size=(count, 2)),
    )


def made_frame(log: str = "log-a", index: int = 0, *, points: int = 40, seed: int = 0, **changes: Any) -> Frame:
    """A frame with every field filled."""
    rng = np.random.default_rng([seed, index])
    cloud = PointCloud(
        xyz=rng.uniform(-20, 20, (points, 3)).astype(np.float32),
        intensity=rng.integers(0, 256, points).astype(np.float32),
        intensity_unit=IntensityUnit.RAW_255,
        ring=rng.integers(0, 32, points).astype(np.int16),
        elongation=rng.random(points).astype(np.float32),
        time_s=rng.normal(size=points).astype(np.float32),
        sensor=rng.integers(1, 6, points).astype(np.uint8),
        return_index=rng.integers(1, 3, points).astype(np.uint8),
        no_label_zone=rng.random(points) < 0.2,
    )
    values: dict[str, Any] = {
        "log": log,
        "index": index,
        "token": f"{log}-{index}-ü",
        "timestamp_us": 1_500_000_000_000_000 + 50_000 * index,
        "points": cloud,
        "global_from_ego": Pose.from_quaternion([0.9, 0.1, -0.2, 0.3], [1e6 + index, np.pi, -1 / 3]),
        "ego_from_lidar": Pose.from_yaw(0.1, [0.9, 0.0, 1.8]),
        "is_keyframe": True,
        "labels": rng.integers(0, 32, points).astype(np.uint8),
        "instances": rng.integers(0, 40_000, points).astype(np.uint16),
        "boxes": made_boxes(rng, 3),
        "previous": tuple(range(index - 1, max(-1, index - 3), -1)),
    }
    return Frame(**(values | changes))


def write_log(root: Path, frames: list[Frame], *, log: str = "log-a", **header: Any) -> Path:
    path = log_path(root, log)
    with LogWriter(path, LogHeader(log, "made", "nuscenes-32", **header)) as writer:
        for frame in frames:
            writer.add(frame)
    return path


def write_made_dataset(
    root: Path,
    logs: dict[str, list[Frame]],
    *,
    splits: dict[str, list[str]] | None = None,
    label_set: str | None = "nuscenes-32",
    **header: Any,
) -> Path:
    summaries = {}
    for log, frames in logs.items():
        with LogWriter(log_path(root, log), LogHeader(log, "made", label_set, **header)) as writer:
            for frame in frames:
                writer.add(frame)
        summaries[log] = writer.finished
    write_dataset(root, name="made", label_set_name=label_set, splits=splits or {"train": list(logs)}, logs=summaries)
    return root


def assert_same(one: Any, two: Any) -> None:
    """Two values of one dataclass are equal field by field."""
    for field in fields(one):
        a, b = getattr(one, field.name), getattr(two, field.name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name
