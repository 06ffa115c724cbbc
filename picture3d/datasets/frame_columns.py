"""A frame as named columns and a small JSON record, and back."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from picture3d.errors import DataError
from picture3d.formats.columns import dtype_name
from picture3d.structures.boxes import Boxes
from picture3d.structures.frame import Frame
from picture3d.structures.points import IntensityUnit, PointCloud
from picture3d.structures.poses import Pose

POINT_COLUMNS: dict[str, tuple[str, int]] = {  # name -> dtype, values per point
    "xyz": ("<f4", 3),
    "intensity": ("<f4", 1),
    "ring": ("<i2", 1),
    "elongation": ("<f4", 1),
    "time_s": ("<f4", 1),
    "sensor": ("|u1", 1),
    "return_index": ("|u1", 1),
    "no_label_zone": ("|u1", 1),  # bool in memory
    "labels": ("|u1", 1),
    "instances": ("<u2", 1),
}
OPTIONAL_COLUMNS = frozenset(POINT_COLUMNS.keys() - {"xyz", "intensity"} | {"boxes"})
# The first three are always there for an annotated frame, the others where the dataset tells.
BOX_COLUMNS = (
    "box_geometry", "box_points", "box_names", "box_radar_points", "box_attributes", "box_difficulty", "box_acceleration",
)  # fmt: skip


def columns_of(frame: Frame, place: str) -> dict[str, NDArray[np.generic]]:
    """The columns to store for a frame, by name.

    Raises:
        DataError: (naming `place`) if a column has another dtype or shape than is stored, or points are not finite.
    """
    present = {**frame.points.columns(), "labels": frame.labels, "instances": frame.instances}
    columns: dict[str, NDArray[np.generic]] = {name: column for name, column in present.items() if column is not None}
    if frame.points.no_label_zone is not None:
        columns["no_label_zone"] = frame.points.no_label_zone.view(np.uint8)
    for name, column in columns.items():
        dtype, width = POINT_COLUMNS[name]
        shape = (len(frame.points),) if width == 1 else (len(frame.points), width)
        if dtype_name(column.dtype) != dtype or column.shape != shape:
            raise DataError(
                f"{place}, column {name}: {column.dtype} {column.shape}, expected {np.dtype(dtype).name} {shape}. Correct the "
                "reader that made this frame."
            )
    for name in ("xyz", "intensity"):
        if not np.isfinite(columns[name]).all():
            raise DataError(
                f"{place}, column {name}: holds NaN or infinity; drop such points (and their labels) before storing"
            )
    if frame.boxes is not None:
        boxes = frame.boxes
        names = json.dumps([list(boxes.category), list(boxes.track_id)], separators=(",", ":")).encode()
        geometry = [boxes.center, boxes.size, boxes.yaw[:, None], boxes.velocity]
        columns["box_geometry"] = np.concatenate(geometry, axis=1).astype("<f8")
        columns["box_points"] = boxes.num_points.astype("<i4")
        columns["box_names"] = np.frombuffer(names, np.uint8)
        if boxes.num_radar_points is not None:
            columns["box_radar_points"] = boxes.num_radar_points.astype("<i4")
        if boxes.attribute is not None:
            columns["box_attributes"] = np.frombuffer(json.dumps(boxes.attribute, separators=(",", ":")).encode(), np.uint8)
        if boxes.difficulty is not None:
            columns["box_difficulty"] = boxes.difficulty.astype("<i2")
        if boxes.acceleration is not None:
            columns["box_acceleration"] = boxes.acceleration.astype("<f8")
    return columns


def record_of(frame: Frame, chunks: dict[str, Any]) -> dict[str, Any]:
    """What is stored of a frame besides its columns, as JSON; `chunks` says where the columns are."""
    return {
        "token": frame.token,
        "timestamp_us": int(frame.timestamp_us),
        "intensity_unit": str(frame.points.intensity_unit),
        "global_from_ego": _pose_tree(frame.global_from_ego),
        "ego_from_lidar": _pose_tree(frame.ego_from_lidar),
        "previous": [int(earlier) for earlier in frame.previous],
        "columns": chunks,
    }


def frame_of(
    log: str,
    index: int,
    record: dict[str, Any],
    arrays: dict[str, Any],
    *,
    num_points: int,
    is_keyframe: bool,
    with_boxes: bool,
) -> Frame:
    """The frame that a record and its columns describe.

    Raises:
        KeyError, TypeError, ValueError: if they do not describe one.
    """
    for name in arrays.keys() & POINT_COLUMNS.keys():
        dtype, width = POINT_COLUMNS[name]
        shape = (num_points,) if width == 1 else (num_points, width)
        if arrays[name].shape != shape or dtype_name(arrays[name].dtype) != dtype:
            raise ValueError(f"column {name} is {arrays[name].dtype} {arrays[name].shape}, expected {dtype} {shape}")
    points = PointCloud(
        xyz=arrays["xyz"],
        intensity=arrays["intensity"],
        intensity_unit=IntensityUnit(record["intensity_unit"]),
        ring=arrays.get("ring"),
        elongation=arrays.get("elongation"),
        time_s=arrays.get("time_s"),
        sensor=arrays.get("sensor"),
        return_index=arrays.get("return_index"),
        no_label_zone=None if "no_label_zone" not in arrays else arrays["no_label_zone"].astype(np.bool_),
    )
    ego_from_lidar = _pose_of(record["ego_from_lidar"])
    if ego_from_lidar is None:
        raise ValueError("ego_from_lidar is missing")
    previous = tuple(int(earlier) for earlier in record["previous"])
    if any(not 0 <= earlier < index for earlier in previous):
        raise ValueError(f"previous {previous} are not earlier sweeps")
    return Frame(
        log=log,
        index=index,
        token=str(record["token"]),
        timestamp_us=int(record["timestamp_us"]),
        points=points,
        global_from_ego=_pose_of(record["global_from_ego"]),
        ego_from_lidar=ego_from_lidar,
        is_keyframe=is_keyframe,
        labels=arrays.get("labels"),
        instances=arrays.get("instances"),
        boxes=boxes_of(arrays) if with_boxes else None,
        previous=previous,
    )


def boxes_of(arrays: dict[str, Any]) -> Boxes:
    """The boxes that their columns describe.

    Raises:
        KeyError, TypeError, ValueError: if they do not describe any.
    """
    geometry = arrays["box_geometry"]
    if geometry.ndim != 2 or geometry.shape[1] != 9:
        raise ValueError(f"box_geometry has shape {geometry.shape}, expected (boxes, 9)")
    category, track_id = json.loads(arrays["box_names"].tobytes())
    attributes, difficulty = arrays.get("box_attributes"), arrays.get("box_difficulty")
    return Boxes(
        center=geometry[:, 0:3],
        size=geometry[:, 3:6],
        yaw=geometry[:, 6],
        velocity=geometry[:, 7:9],
        category=tuple(str(name) for name in category),
        track_id=tuple(str(name) for name in track_id),
        num_points=arrays["box_points"],
        num_radar_points=arrays.get("box_radar_points"),
        attribute=None if attributes is None else tuple(str(name) for name in json.loads(attributes.tobytes())),
        difficulty=None if difficulty is None else difficulty.astype(np.int8),
        acceleration=arrays.get("box_acceleration"),
    )


def _pose_tree(pose: Pose | None) -> list[float] | None:
    """Twelve float64 numbers, [rotation | translation] row by row; JSON keeps each to the last bit."""
    return None if pose is None else [float(v) for v in pose.matrix[:3].ravel()]


def _pose_of(tree: Any) -> Pose | None:
    if tree is None:
        return None
    matrix = np.array(tree, dtype=np.float64).reshape(3, 4)
    if not np.isfinite(matrix).all():
        raise ValueError("a pose is not finite")
    return Pose(matrix[:, :3], matrix[:, 3])
