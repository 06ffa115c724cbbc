"""One sweep's points, as they left the sensor."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray


class IntensityUnit(StrEnum):
    """What the intensity column of a sweep holds."""

    RAW_255 = "0-255"  # nuScenes: the sensor's byte
    UNIT = "0-1"  # KITTI: reflectance
    TANH = "tanh"  # Waymo after loading: tanh of the raw, unbounded value
    RAW_UNBOUNDED = "raw"  # Waymo as recorded: 0 and up, rarely above 1 but without a bound
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, eq=False)
class PointCloud:
    """Points of one sweep in the LiDAR's own frame, in file order; every column has N rows."""

    xyz: NDArray[np.float32]  # (N, 3) float32, metres, LiDAR frame
    intensity: NDArray[np.float32]  # (N,) float32, in `intensity_unit`
    intensity_unit: IntensityUnit
    ring: NDArray[np.int16] | None = None  # (N,) int16, laser number, 0 = lowest beam in nuScenes
    elongation: NDArray[np.float32] | None = None  # (N,) float32, Waymo
    time_s: NDArray[np.float32] | None = None  # (N,) float32, seconds relative to the frame's timestamp
    sensor: NDArray[np.uint8] | None = None  # (N,) uint8, which LiDAR of several; Waymo: 1 TOP, 2 FRONT, 3, 4 SIDES, 5 REAR
    return_index: NDArray[np.uint8] | None = None  # (N,) uint8, 1 or 2: which echo of the pulse
    no_label_zone: NDArray[np.bool_] | None = None  # (N,) bool, Waymo: in a zone that was not annotated

    def __post_init__(self) -> None:
        if self.xyz.ndim != 2 or self.xyz.shape[1] != 3:
            raise ValueError(f"xyz must be (N, 3), got {self.xyz.shape}")
        for name, column in self.columns().items():
            if len(column) != len(self.xyz):
                raise ValueError(f"column {name} has {len(column)} rows, xyz has {len(self.xyz)}")

    def __len__(self) -> int:
        return len(self.xyz)

    def columns(self) -> dict[str, NDArray[np.generic]]:
        """The columns that are present, by name, `xyz` first."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "intensity_unit"}
        return {name: value for name, value in values.items() if value is not None}

    def select(self, index: NDArray[np.bool_] | NDArray[np.integer]) -> PointCloud:
        """The rows chosen by a boolean mask or an index, in that order."""
        rows = np.flatnonzero(index) if index.dtype == np.bool_ else index
        return replace(self, **{name: column.take(rows, 0) for name, column in self.columns().items()})
