"""Frames of a town as protobuf messages of the Waymo Open Dataset v1.x, by field number (``dataset.proto``, ``label.proto``).

Numbers are written packed where ``dataset.proto`` says so (the matrices), one by one elsewhere, as the published files have
them. Matrices are compressed with zlib. Cameras are left out; every pixel says that no camera saw it.
"""

from __future__ import annotations

import zlib
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from picture3d.formats.protobuf_wire import pack_varints, write_data, write_double, write_integer
from picture3d.structures.poses import Pose
from picture3d.synthetic.waymo_drive import LaserImages, WaymoFrame
from picture3d.synthetic.waymo_lidar import LASERS, Laser

# Frames of 10 MB are mostly noise in the last bits: more effort saves little.
_ZLIB_LEVEL = 1
_EMPTY = np.float32(-1.0)  # all channels of a pixel without a return
_IN_ZONE, _NOT_IN_ZONE = np.float32(1.0), np.float32(-1.0)
_LEVEL_2 = 2
# The metric's own rule: objects with at most this many points are hard.
_HARD_POINTS = 5


def frame_body(frame: WaymoFrame) -> bytes:
    """All fields of ``Frame`` but the context, which is known when the whole segment is."""
    out = [write_integer(2, frame.timestamp_us), write_data(3, _transform(frame.global_from_vehicle))]
    out += [write_data(5, _laser(images)) for images in frame.lasers]
    out += [write_data(6, _label(frame, row)) for row in range(len(frame.boxes))]
    x, y = frame.zone.outline.T
    zone = [write_double(1, v) for v in x] + [write_double(2, v) for v in y] + [write_data(3, frame.zone.id.encode())]
    out.append(write_data(7, b"".join(zone)))
    return b"".join(out)


def frame_context(name: str, counts: dict[int, int]) -> bytes:
    """The field ``context`` of ``Frame``; `counts` are the different labelled objects of the segment by Label.Type."""
    stats = [write_data(1, write_integer(1, kind) + write_integer(2, count)) for kind, count in sorted(counts.items())]
    stats += [write_data(2, b"Day"), write_data(3, b"location_other"), write_data(4, b"sunny")]
    out = [write_data(1, name.encode())]
    out += [write_data(3, _calibration(laser)) for laser in LASERS]
    out.append(write_data(4, b"".join(stats)))
    return write_data(1, b"".join(out))


def _calibration(laser: Laser) -> bytes:
    out = [write_integer(1, laser.name)]
    if laser.beam_inclinations is not None:
        out += [write_double(2, beam) for beam in laser.beam_inclinations]
    out += [write_double(3, laser.inclination_min), write_double(4, laser.inclination_max)]
    out.append(write_data(5, _transform(laser.vehicle_from_laser)))
    return b"".join(out)


def _transform(pose: Pose) -> bytes:
    return b"".join(write_double(1, value) for value in pose.matrix.ravel())


def _laser(images: LaserImages) -> bytes:
    return write_integer(1, images.laser.name) + b"".join(
        write_data(2 + which, _range_image(images, which)) for which in (0, 1)
    )  # fmt: skip


def _range_image(images: LaserImages, which: int) -> bytes:
    poses, classes = pixel_poses(images), pixel_classes(images, which)
    out = [write_data(2, _floats(range_image(images, which)))]
    out.append(write_data(3, _unseen_by_cameras(images.laser.height, images.laser.width)))
    if poses is not None and which == 0:
        out.append(write_data(4, _floats(poses)))
    if classes is not None:
        out.append(write_data(6, _integers(classes)))
    return b"".join(out)


def range_image(images: LaserImages, which: int) -> NDArray[np.float32]:
    """(H, W, 4) range, intensity, elongation, no-label zone of the first (0) or second (1) return."""
    returns = images.returns[which]
    values = np.full((images.laser.height, images.laser.width, 4), _EMPTY, np.float32)
    flags = np.where(images.in_zone[which], _IN_ZONE, _NOT_IN_ZONE)
    values.reshape(-1, 4)[returns.pixel] = np.stack([returns.range_m, returns.intensity, returns.elongation, flags], 1)
    return values


def pixel_poses(images: LaserImages) -> NDArray[np.float32] | None:
    """(H, W, 6) roll, pitch, yaw, x, y, z of the vehicle at each pixel; None where one pose serves for all."""
    if images.column_pose is None:
        return None
    return np.broadcast_to(images.column_pose, (images.laser.height, images.laser.width, 6))


def pixel_classes(images: LaserImages, which: int) -> NDArray[np.int32] | None:
    """(H, W, 2) instance and class of each pixel of a return; None where the frame is not labelled."""
    if images.classes is None:
        return None
    returns = images.returns[which]
    values = np.zeros((images.laser.height, images.laser.width, 2), np.int32)
    values.reshape(-1, 2)[returns.pixel] = np.stack([returns.instance, images.classes[which]], 1)
    return values


def difficulty(num_points: NDArray[np.int32]) -> NDArray[np.int8]:
    """(B,) 2 for objects of few points, as labels have it; 0 = not set."""
    return np.where(num_points <= _HARD_POINTS, _LEVEL_2, 0).astype(np.int8)


def heading(yaw: NDArray[np.float64]) -> NDArray[np.float64]:
    """Between -pi and pi, the upper end left out."""
    return (yaw + np.pi) % (2 * np.pi) - np.pi


@lru_cache(maxsize=4)
def _unseen_by_cameras(height: int, width: int) -> bytes:
    return _integers(np.zeros((height, width, 6), np.int32))


def _floats(values: NDArray[np.float32]) -> bytes:
    data = np.ascontiguousarray(values, dtype="<f4").tobytes()
    return zlib.compress(write_data(1, data) + _shape(values.shape), _ZLIB_LEVEL)


def _integers(values: NDArray[np.int32]) -> bytes:
    return zlib.compress(write_data(1, pack_varints(values)) + _shape(values.shape), _ZLIB_LEVEL)


def _shape(dims: tuple[int, ...]) -> bytes:
    return write_data(2, b"".join(write_integer(1, dim) for dim in dims))


def _label(frame: WaymoFrame, row: int) -> bytes:
    boxes = frame.boxes
    (x, y, z), (length, width, height) = boxes.center[row], boxes.size[row]
    turned = heading(boxes.yaw[row : row + 1])[0]
    box = [(1, x), (2, y), (3, z), (4, width), (5, length), (6, height), (7, turned)]
    motion = [*frame.global_velocity[row], *frame.global_acceleration[row]]
    points, hard = int(boxes.num_points[row]), int(difficulty(boxes.num_points[row : row + 1])[0])
    out = [
        write_data(1, b"".join(write_double(number, float(value)) for number, value in box)),
        write_data(2, b"".join(write_double(number, float(value)) for number, value in enumerate(motion, 1))),
        write_integer(3, int(frame.box_type[row])),
        write_data(4, boxes.track_id[row].encode()),
    ]
    if hard:
        out += [write_integer(5, hard), write_integer(6, hard)]
    out += [write_integer(7, points), write_integer(13, int(frame.num_top_points[row]))]
    return b"".join(out)
