"""Boxes, upright cylinders and ellipsoids: what everything in the town but the ground is made of.

An object is drawn as rows of numbers ("parts") in its own frame: origin on the ground below its middle, x forward, y left,
z up. Placing objects turns the parts of all of them into one :class:`Primitives` value.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

BOX, CYLINDER, ELLIPSOID = 0, 1, 2
# Columns of a part: kind, centre (3), half size (3), yaw, pitch, reflectivity, free path.
PART_WIDTH = 11
Parts = NDArray[np.float64]  # (K, PART_WIDTH)


def part(
    kind: int,
    center: tuple[float, float, float],
    half: tuple[float, float, float],
    *,
    reflectivity: float,
    yaw: float = 0.0,
    pitch: float = 0.0,
    free_path: float = 0.0,
) -> list[float]:
    """One row of parts.

    Args:
        kind: BOX, CYLINDER (elliptic, along its own z) or ELLIPSOID.
        center: metres, in the object's frame.
        half: half lengths along the part's own axes, metres.
        reflectivity: mean intensity (0..255) of a return at normal incidence.
        yaw: about the object's z, radians.
        pitch: about the part's own y after the yaw, radians; positive lowers the front.
        free_path: mean depth in metres that a ray travels inside before it is returned; 0 for a solid surface.
    """
    return [kind, *center, *half, yaw, pitch, reflectivity, free_path]


@dataclass(frozen=True, slots=True, eq=False)
class Primitives:
    """P primitives in one frame of reference."""

    kind: NDArray[np.uint8]  # (P,) BOX, CYLINDER or ELLIPSOID
    center: NDArray[np.float64]  # (P, 3) metres
    half: NDArray[np.float64]  # (P, 3) metres, along the primitive's own axes
    rotation: NDArray[np.float64]  # (P, 3, 3), columns are the primitive's axes
    label: NDArray[np.uint8]  # (P,) lidarseg category index
    instance: NDArray[np.uint16]  # (P,) 0 for scenery
    reflectivity: NDArray[np.float32]  # (P,) mean intensity at normal incidence, 0..255
    free_path: NDArray[np.float32]  # (P,) metres, 0 = solid

    def __len__(self) -> int:
        return len(self.kind)

    @staticmethod
    def empty() -> Primitives:
        """No primitives."""
        return place([], np.zeros((0, 4)), np.zeros(0, np.uint8), np.zeros(0, np.uint16))

    def select(self, index: NDArray[np.bool_] | NDArray[np.integer]) -> Primitives:
        """The rows chosen by a mask or an index."""
        return Primitives(*(getattr(self, f.name)[index] for f in fields(self)))

    def joined(self, other: Primitives) -> Primitives:
        """These rows, then those of `other`."""
        return Primitives(*(np.concatenate([getattr(self, f.name), getattr(other, f.name)]) for f in fields(self)))

    def seen_from(self, rotation: NDArray[np.float64], translation: NDArray[np.float64]) -> Primitives:
        """All primitives in the frame b of `a_from_b` = (rotation (3, 3), translation (3,)), given in frame a."""
        center = (self.center - translation) @ rotation
        # R^T Q for every Q, as one product of long matrices.
        turned = (self.rotation.transpose(0, 2, 1).reshape(-1, 3) @ rotation).reshape(-1, 3, 3).transpose(0, 2, 1)
        return replace(self, center=center, rotation=turned)

    def moved(self, rotation: NDArray[np.float64], translation: NDArray[np.float64]) -> Primitives:
        """Each primitive moved by its own rotation (P, 3, 3) and translation (P, 3)."""
        center = np.einsum("pij,pj->pi", rotation, self.center) + translation
        turned = np.einsum("pij,pjk->pik", rotation, self.rotation)
        return replace(self, center=center, rotation=turned)


def place(
    objects: list[Parts], poses: NDArray[np.float64], labels: NDArray[np.uint8], instances: NDArray[np.uint16]
) -> Primitives:
    """Primitives of objects standing at `poses` (n, 4): x, y, z of the ground point, yaw."""
    counts = np.array([len(parts) for parts in objects], dtype=np.int64)
    rows = np.concatenate([np.zeros((0, PART_WIDTH)), *(np.asarray(parts, dtype=np.float64) for parts in objects)])
    owner = np.repeat(np.arange(len(objects)), counts)
    local = Primitives(
        rows[:, 0].astype(np.uint8),
        rows[:, 1:4],
        rows[:, 4:7],
        rotation_yaw_pitch(rows[:, 7], rows[:, 8]),
        np.asarray(labels, np.uint8)[owner],
        np.asarray(instances, np.uint16)[owner],
        rows[:, 9].astype(np.float32),
        rows[:, 10].astype(np.float32),
    )
    pose = poses[owner]
    return local.moved(rotation_yaw_pitch(pose[:, 3], np.zeros(len(pose))), pose[:, :3])


def rotation_yaw_pitch(yaw: NDArray[np.float64], pitch: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n, 3, 3) rotations: pitch about y, then yaw about z."""
    cy, sy, cp, sp = np.cos(yaw), np.sin(yaw), np.cos(pitch), np.sin(pitch)
    out = np.empty((len(yaw), 3, 3))
    out[:, 0, 0], out[:, 0, 1], out[:, 0, 2] = cy * cp, -sy, cy * sp
    out[:, 1, 0], out[:, 1, 1], out[:, 1, 2] = sy * cp, cy, sy * sp
    out[:, 2, 0], out[:, 2, 1], out[:, 2, 2] = -sp, 0.0, cp
    return out


def extent(parts: Parts) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Lowest and highest corner, (3,) each, of the axis-aligned box around all parts in the object's frame."""
    rows = np.asarray(parts, dtype=np.float64)
    reach = np.einsum("pij,pj->pi", np.abs(rotation_yaw_pitch(rows[:, 7], rows[:, 8])), rows[:, 4:7])
    return (rows[:, 1:4] - reach).min(0), (rows[:, 1:4] + reach).max(0)
