"""Between boxes in the LiDAR frame and Waymo's ``Objects`` in the vehicle frame.

Prepared Waymo data keep all five LiDARs in one frame, the vehicle's.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from picture3d.errors import DataError
from picture3d.formats.waymo_objects import CYCLIST, PEDESTRIAN, SIGN, VEHICLE, WaymoObjects, make_objects
from picture3d.structures.detections import DetectedBoxes
from picture3d.structures.frame import Frame
from picture3d.structures.poses import Pose

KIND_OF_CLASS = {"vehicle": VEHICLE, "pedestrian": PEDESTRIAN, "cyclist": CYCLIST, "sign": SIGN}


def labels_of_frame(frame: Frame) -> WaymoObjects:
    """The labels of a frame: the boxes whose category is one of Waymo's, with difficulty and counted points.

    Raises:
        DataError: if the frame has no boxes.
    """
    if frame.boxes is None:
        raise DataError(
            f"frame {frame.log}/{frame.index} has no boxes, so nothing can be scored on it. Prepare the data with its boxes, "
            "or score another split."
        )
    boxes = frame.boxes.select(np.array([name.lower() in KIND_OF_CLASS for name in frame.boxes.category], dtype=bool))
    # Where nobody counted, a box is taken to hold points: it would not count otherwise.
    points = np.where(boxes.num_points < 0, 1, boxes.num_points)
    return make_objects(
        _in_vehicle(np.column_stack([boxes.center, boxes.size, boxes.yaw]), frame.ego_from_lidar),
        np.array([KIND_OF_CLASS[name.lower()] for name in boxes.category], np.int8),
        frame.log,
        frame.timestamp_us,
        num_points=points,
        difficulty=boxes.difficulty,
    )


def detections_of_frame(frame: Frame, found: DetectedBoxes, classes: tuple[str, ...]) -> WaymoObjects:
    """What a detector found in a frame, as a submission holds it.

    Args:
        frame: names the segment and the time.
        found: boxes in the LiDAR frame.
        classes: names of the classes 1, 2, ... of `found`; each one of Waymo's.

    Raises:
        DataError: if a class is not one of Waymo's, or a number is not finite.
    """
    if unknown := [name for name in classes if name.lower() not in KIND_OF_CLASS]:
        raise DataError(
            f"{', '.join(unknown)}: not a class of the Waymo challenge, which has {', '.join(KIND_OF_CLASS)}. Train the "
            "detector on these, or write --format json."
        )
    boxes, scores = found.boxes.double().cpu().numpy()[:, :7], found.scores.double().cpu().numpy()
    if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
        raise DataError(
            f"frame {frame.log}/{frame.index}: the detector gave a box or score that is not finite. Look at its training log."
        )
    kinds = np.array([KIND_OF_CLASS[name.lower()] for name in classes], np.int8)
    return make_objects(
        _in_vehicle(boxes, frame.ego_from_lidar),
        kinds[found.labels.cpu().numpy() - 1],
        frame.log,
        frame.timestamp_us,
        score=scores,
    )


def _in_vehicle(boxes: NDArray[np.float64], ego_from_lidar: Pose) -> NDArray[np.float64]:
    """(N, 7) boxes of the LiDAR frame in the vehicle frame; headings as those of things on level ground."""
    center = boxes[:, :3] @ ego_from_lidar.rotation.T + ego_from_lidar.translation
    yaw = boxes[:, 6]
    forward = np.column_stack([np.cos(yaw), np.sin(yaw), np.zeros(len(yaw))]) @ ego_from_lidar.rotation.T
    return np.column_stack([center, boxes[:, 3:6], np.arctan2(forward[:, 1], forward[:, 0])])
