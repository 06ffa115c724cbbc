"""What a detector is trained to find: the category a dataset gives a box -> the class of a head."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from picture3d.formats.nuscenes_results import CLASS_OF_CATEGORY

_MERGED = {"Car": "Vehicle", "Truck": "Vehicle", "Bus": "Vehicle"}


@dataclass(frozen=True, slots=True)
class DetectionClasses:
    """The classes of a head, in order; class 0 is everything else.

    A box belongs to a class if its category is the name of the class, in capitals or not, or a category of nuScenes that the
    detection challenge counts as that class. Where there is no class of its own for it, a Car, Truck or Bus of ONCE is a
    Vehicle, as the ONCE benchmark merges them.
    """

    names: tuple[str, ...]

    def of(self, categories: Iterable[str]) -> NDArray[np.int64]:
        """(B,) int64: 1-based class of each category, 0 for what no class stands for."""
        index = {name.lower(): i for i, name in enumerate(self.names, start=1)}
        found: list[int] = []
        for category in categories:
            own = index.get(CLASS_OF_CATEGORY.get(category, category).lower(), 0)
            found.append(own or index.get(_MERGED.get(category, "").lower(), 0))
        return np.array(found, np.int64)


# In the order of the published detectors' outputs.
NUSCENES_DETECTION = DetectionClasses(
    (
        "car",
        "truck",
        "construction_vehicle",
        "bus",
        "trailer",
        "barrier",
        "motorcycle",
        "bicycle",
        "pedestrian",
        "traffic_cone",
    )
)
WAYMO_DETECTION = DetectionClasses(("Vehicle", "Pedestrian", "Cyclist"))
ONCE_DETECTION = DetectionClasses(("Vehicle", "Pedestrian", "Cyclist"))
