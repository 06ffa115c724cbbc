"""A range image and its calibration -> points in the vehicle frame, as the public conversion of the Waymo Open Dataset does.

Row r is beam H - 1 - r of the calibration (inclinations count from below). Column c looks at azimuth
``((W - c - 0.5) / W * 2 - 1) * pi`` less the yaw of ``vehicle_from_laser``, in the LiDAR's own frame; the point is
``range * (cos(azimuth) cos(inclination), sin(azimuth) cos(inclination), sin(inclination))``. The TOP LiDAR turns while the car
drives: its points go to the global frame by the pose of the vehicle at their pixel, and back by the pose of the frame
(source: ``range_image_utils.py`` of waymo-open-dataset). Only pixels that hold a return are computed, in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from picture3d.errors import FETCH_AGAIN, DataError
from picture3d.structures.poses import Pose

# Points at a time: what is computed in between stays in the cache, which halves the time.
_BLOCK = 8192


@dataclass(frozen=True, slots=True, eq=False)
class RangeImagePoints:
    """N returns of one range image, row by row."""

    pixel: NDArray[np.int64]  # (N,) row * W + column
    xyz: NDArray[np.float64]  # (N, 3) metres, vehicle frame of the frame's own time
    intensity: NDArray[np.float32]  # (N,) raw
    elongation: NDArray[np.float32]  # (N,)
    no_label_zone: NDArray[np.bool_]  # (N,)


# An infinite range or pose gives a point that is not finite; it is for the caller to drop.
@np.errstate(invalid="ignore", over="ignore")
def points_of_range_image(
    image: NDArray[np.float32],
    inclinations: NDArray[np.float64],
    vehicle_from_laser: Pose,
    *,
    pixel_poses: NDArray[np.float32] | None = None,
    global_from_vehicle: Pose | None = None,
    where: str = "range image",
) -> RangeImagePoints:
    """The points of every pixel whose range is above 0.

    Args:
        image: (H, W, 4) range, intensity, elongation, no-label zone: ``waymo_frame.read_range_image``.
        inclinations: (H,) radians, bottom row first.
        vehicle_from_laser: the extrinsic.
        pixel_poses: (H, W, 6) roll, pitch, yaw, x, y, z of the vehicle in the global frame at each pixel's time; None where
            the LiDAR is taken to measure all at the frame's own time.
        global_from_vehicle: pose of the frame; needed with `pixel_poses`.
        where: what errors call the image.

    Raises:
        DataError: if the shapes do not belong together.
    """
    if image.ndim != 3 or image.shape[2] != 4 or inclinations.shape != image.shape[:1]:
        raise DataError(
            f"{where}: shape {image.shape} and {len(inclinations)} inclinations do not make a range image. {FETCH_AGAIN}"
        )
    height, width = image.shape[:2]
    poses = None
    if pixel_poses is not None:
        if global_from_vehicle is None:
            raise ValueError("pixel_poses need global_from_vehicle")
        if pixel_poses.shape != (height, width, 6):
            raise DataError(
                f"{where}: the poses of its pixels have shape {pixel_poses.shape}, expected {(height, width, 6)}. {FETCH_AGAIN}"
            )
        poses = pixel_poses.reshape(-1, 6)
    values = image.reshape(-1, 4)
    pixel = np.flatnonzero(values[:, 0] > 0)
    hits = values[pixel]
    azimuths = ((width - np.arange(width) - 0.5) / width * 2 - 1) * np.pi - vehicle_from_laser.yaw
    upward = inclinations[::-1]
    (cos_up, sin_up), (cos_azimuth, sin_azimuth) = ((np.cos(angle), np.sin(angle)) for angle in (upward, azimuths))
    xyz = np.empty((len(pixel), 3))
    for begin in range(0, len(pixel), _BLOCK):
        block = pixel[begin : begin + _BLOCK]
        row, column = np.divmod(block, width)
        away = hits[begin : begin + _BLOCK, 0].astype(np.float64)
        flat = away * cos_up[row]
        local = np.stack([flat * cos_azimuth[column], flat * sin_azimuth[column], away * sin_up[row]], 1)
        points = local @ vehicle_from_laser.rotation.T + vehicle_from_laser.translation
        if poses is not None and global_from_vehicle is not None:
            points = _moved_by_pixel(points, poses[block], global_from_vehicle)
        xyz[begin : begin + _BLOCK] = points
    return RangeImagePoints(pixel, xyz, hits[:, 1], hits[:, 2], hits[:, 3] > 0)


def _moved_by_pixel(xyz: NDArray[np.float64], poses: NDArray[np.float32], global_from_vehicle: Pose) -> NDArray[np.float64]:
    """(N, 3) points of the vehicle at their pixel's time -> the vehicle at the frame's time; poses (N, 6)."""
    x, y, z = xyz.T
    angles, place = np.split(np.ascontiguousarray(poses.T, dtype=np.float64), 2)
    (cr, cp, cy), (sr, sp, sy) = np.cos(angles), np.sin(angles)
    # About x, then y, then z.
    y, z = cr * y - sr * z, sr * y + cr * z
    x, z = cp * x + sp * z, cp * z - sp * x
    x, y = cy * x - sy * y, sy * x + cy * y
    # Tens of kilometres from the origin: the difference of the two places first, so that nothing is lost.
    moved = np.stack([x, y, z], 1) + (place.T - global_from_vehicle.translation)
    return moved @ global_from_vehicle.rotation
