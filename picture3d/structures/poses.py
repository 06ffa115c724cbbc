"""Rigid transforms. A pose named `a_from_b` takes points in frame b to frame a, so neighbours cancel when composed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float64Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Pose:
    """A rigid transform `a_from_b`: ``p_a = rotation @ p_b + translation``."""

    rotation: Float64Array  # (3, 3) float64, orthonormal, determinant +1
    translation: Float64Array  # (3,) float64, metres

    def __post_init__(self) -> None:
        rotation = np.asarray(self.rotation, dtype=np.float64)
        translation = np.asarray(self.translation, dtype=np.float64)
        if rotation.shape != (3, 3) or translation.shape != (3,):
            raise ValueError(f"a pose needs rotation (3, 3) and translation (3,), got {rotation.shape} and {translation.shape}")
        object.__setattr__(self, "rotation", rotation)
        object.__setattr__(self, "translation", translation)

    @staticmethod
    def identity() -> Pose:
        """The pose that changes nothing."""
        return Pose(np.eye(3), np.zeros(3))

    @staticmethod
    def from_quaternion(wxyz: tuple[float, float, float, float] | list[float] | Float64Array, translation: object) -> Pose:
        """From a quaternion in scalar-first order (normalised here) and a translation in metres.

        Raises:
            ValueError: if the quaternion has length zero or is not finite.
        """
        w, x, y, z = (float(v) for v in wxyz)
        norm = float(np.sqrt(w * w + x * x + y * y + z * z))
        if not np.isfinite(norm) or norm < 1e-12:
            raise ValueError(f"quaternion (w, x, y, z) = {(w, x, y, z)} has no direction")
        w, x, y, z = w / norm, x / norm, y / norm, z / norm
        rotation = np.array(
            [
                [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
                [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
                [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
            ]
        )
        return Pose(rotation, np.asarray(translation, dtype=np.float64))

    @staticmethod
    def from_yaw(yaw: float, translation: object = (0.0, 0.0, 0.0)) -> Pose:
        """A rotation about z, counter-clockwise from x, in radians."""
        c, s = np.cos(yaw), np.sin(yaw)
        return Pose(np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]]), np.asarray(translation, dtype=np.float64))

    @staticmethod
    def from_matrix(matrix: Float64Array) -> Pose:
        """From a homogeneous (4, 4) matrix."""
        matrix = np.asarray(matrix, dtype=np.float64)
        return Pose(matrix[:3, :3], matrix[:3, 3])

    @property
    def matrix(self) -> Float64Array:
        """The homogeneous (4, 4) float64 matrix."""
        out = np.eye(4)
        out[:3, :3], out[:3, 3] = self.rotation, self.translation
        return out

    @property
    def quaternion_wxyz(self) -> Float64Array:
        """(4,) float64 unit quaternion, scalar first, w >= 0."""
        r = self.rotation
        # The branch with the largest denominator keeps the division well conditioned.
        candidates = np.array(
            [1 + np.trace(r), 1 + 2 * r[0, 0] - np.trace(r), 1 + 2 * r[1, 1] - np.trace(r), 1 + 2 * r[2, 2] - np.trace(r)]
        )
        best = int(np.argmax(candidates))
        off = np.array([r[2, 1] - r[1, 2], r[0, 2] - r[2, 0], r[1, 0] - r[0, 1]])
        if best == 0:
            q = np.concatenate([[candidates[0]], off])
        else:
            i = best - 1
            j, k = (i + 1) % 3, (i + 2) % 3
            q = np.empty(4)
            q[0], q[1 + i] = off[i], candidates[best]
            q[1 + j], q[1 + k] = r[j, i] + r[i, j], r[k, i] + r[i, k]
        q = q / np.linalg.norm(q)
        return q if q[0] >= 0 else -q

    @property
    def yaw(self) -> float:
        """Heading of the x axis of b, seen in a, in radians counter-clockwise from x."""
        return float(np.arctan2(self.rotation[1, 0], self.rotation[0, 0]))

    def inverse(self) -> Pose:
        """The transform `b_from_a`."""
        return Pose(self.rotation.T, -self.rotation.T @ self.translation)

    def apply(self, points: NDArray[np.floating]) -> NDArray[np.floating]:
        """Moves (N, 3) points from frame b to frame a; computed in float64, returned in the dtype that came in."""
        moved = np.asarray(points, dtype=np.float64) @ self.rotation.T + self.translation
        return moved.astype(points.dtype, copy=False)

    def __matmul__(self, other: Pose) -> Pose:
        """``a_from_b @ b_from_c`` is ``a_from_c``."""
        return Pose(self.rotation @ other.rotation, self.rotation @ other.translation + self.translation)
