"""Between boxes in the LiDAR frame and the columns of the nuScenes detection challenge in the global frame.

Centres and sizes are exact. A heading and a velocity in the LiDAR's xy plane are taken as those of things on level ground: at a
tilt of 2 degrees a heading is right to 1e-3 rad, a velocity to the tilt times the speed upwards.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from picture3d.errors import DataError
from picture3d.formats.nuscenes_results import (
    ATTRIBUTES,
    BICYCLE_RACK,
    CLASS_OF_CATEGORY,
    CLASSES,
    MAX_BOXES,
    RACK,
    DetectionColumns,
    rotation_of_yaw,
)
from picture3d.structures.detections import DetectedBoxes
from picture3d.structures.frame import Frame
from picture3d.structures.poses import Pose

# Faster than this, a thing is said to move (m/s); what it is said to do otherwise is the most common attribute of its class.
MOVING_SPEED = 0.2
_AT_REST = {
    "car": "vehicle.parked",
    "truck": "vehicle.parked",
    "construction_vehicle": "vehicle.parked",
    "trailer": "vehicle.parked",
    "bus": "vehicle.stopped",
    "motorcycle": "cycle.without_rider",
    "bicycle": "cycle.without_rider",
    "pedestrian": "pedestrian.standing",
    "barrier": "",
    "traffic_cone": "",
}
_MOVING = {
    **dict.fromkeys(("car", "truck", "construction_vehicle", "trailer", "bus"), "vehicle.moving"),
    **dict.fromkeys(("motorcycle", "bicycle"), "cycle.with_rider"),
    "pedestrian": "pedestrian.moving",
    "barrier": "",
    "traffic_cone": "",
}

Float64Array = NDArray[np.float64]


def labels_of_frame(frame: Frame, token: str) -> DetectionColumns:
    """The labels of a keyframe of nuScenes: the boxes of the ten classes and the bicycle racks.

    Args:
        frame: with boxes and poses.
        token: of its sample.

    Raises:
        DataError: if the frame has no pose or no boxes, or was prepared without attributes and radar counts.
    """
    place = f"{frame.log}/{frame.index}"
    boxes, ego = frame.boxes, frame.global_from_ego
    if boxes is None or ego is None:
        raise DataError(
            f"frame {place} has no {'boxes' if boxes is None else 'pose'}, so nothing can be scored on it. Prepare the data "
            "with boxes and poses, or score another split."
        )
    if len(boxes) and (boxes.attribute is None or boxes.num_radar_points is None):
        raise DataError(f"frame {place} has no attributes and radar counts. Run `picture3d prepare nuscenes` again.")
    index = {name: CLASSES.index(target) for name, target in CLASS_OF_CATEGORY.items()} | {BICYCLE_RACK: RACK}
    boxes = boxes.select(np.array([name in index for name in boxes.category], dtype=bool))
    attributes = boxes.attribute or ()
    unknown = set(attributes).difference(ATTRIBUTES, [""])
    if unknown:
        raise DataError(
            f"frame {place} has the attribute {min(unknown)!r} (known: {', '.join(ATTRIBUTES)}). Run `picture3d prepare "
            "nuscenes` again on the official tables."
        )
    radar = np.zeros(len(boxes), np.int32) if boxes.num_radar_points is None else boxes.num_radar_points
    return DetectionColumns(
        samples=(token,),
        sample=np.zeros(len(boxes), np.int64),
        **_global(boxes.center, boxes.yaw, boxes.velocity, ego @ frame.ego_from_lidar),
        size=boxes.size,
        label=np.array([index[name] for name in boxes.category], dtype=np.int64),
        score=np.full(len(boxes), -1.0),
        attribute=_attributes(attributes),
        num_points=np.where(boxes.num_points < 0, -1, boxes.num_points + radar).astype(np.int64),
        ego=ego.translation[None],
    )


def detections_of_frame(frame: Frame, token: str, found: DetectedBoxes, classes: tuple[str, ...]) -> DetectionColumns:
    """What a detector found in a frame, as a submission holds it: the `MAX_BOXES` best boxes, an attribute for each.

    Args:
        frame: with its poses.
        token: of its sample.
        found: boxes in the LiDAR frame; velocities are NaN if the detector knows none.
        classes: names of the classes 1, 2, ... of `found`; each one of the ten.

    Raises:
        DataError: if the frame has no pose, a class is not one of the ten, or a number is not finite.
    """
    place = f"{frame.log}/{frame.index}"
    pose = frame.global_from_lidar
    if pose is None:
        raise DataError(f"frame {place} has no pose; nuScenes' boxes are in the global frame. Prepare the data with poses.")
    if unknown := set(classes).difference(CLASSES):
        raise DataError(
            f"{', '.join(sorted(unknown))}: not a class of the nuScenes challenge, which has {', '.join(CLASSES)}. Train the "
            "detector on these, or write --format json."
        )
    best = np.sort(np.argsort(-found.scores.cpu().numpy(), kind="stable")[:MAX_BOXES])
    boxes = found.boxes.double().cpu().numpy()[best]
    scores = found.scores.double().cpu().numpy()[best]
    if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
        raise DataError(f"frame {place}: the detector gave a box or score that is not finite. Look at the run's training log.")
    names = [classes[int(label) - 1] for label in found.labels.cpu().numpy()[best]]
    velocity = boxes[:, 7:9] if boxes.shape[1] >= 9 else np.full((len(boxes), 2), np.nan)
    moves = np.hypot(velocity[:, 0], velocity[:, 1]) > MOVING_SPEED
    attributes = [(_MOVING if fast else _AT_REST)[name] for name, fast in zip(names, moves, strict=True)]
    return DetectionColumns(
        samples=(token,),
        sample=np.zeros(len(boxes), np.int64),
        **_global(boxes[:, :3], boxes[:, 6], velocity, pose),
        size=boxes[:, 3:6],
        label=np.array([CLASSES.index(name) for name in names], dtype=np.int64),
        score=scores,
        attribute=_attributes(tuple(attributes)),
        num_points=np.full(len(boxes), -1, np.int64),
        ego=np.full((1, 3), np.nan),
    )


def _global(center: Float64Array, yaw: Float64Array, velocity: Float64Array, pose: Pose) -> dict[str, Float64Array]:
    upward = -velocity @ pose.rotation[2, :2] / pose.rotation[2, 2]
    forward = np.column_stack([np.cos(yaw), np.sin(yaw), np.zeros(len(yaw))]) @ pose.rotation.T
    return {
        "translation": center @ pose.rotation.T + pose.translation,
        "rotation": rotation_of_yaw(np.arctan2(forward[:, 1], forward[:, 0])),
        "velocity": (np.column_stack([velocity, upward]) @ pose.rotation.T)[:, :2],
    }


def _attributes(names: tuple[str, ...]) -> NDArray[np.int64]:
    return np.array([ATTRIBUTES.index(name) if name else -1 for name in names], dtype=np.int64)
