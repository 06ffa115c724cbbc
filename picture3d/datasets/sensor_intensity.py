"""How each sensor of a prepared dataset spreads its intensities, and maps that make those of different sensors alike.

The same wall gives every model of LiDAR other numbers. A table of quantiles per sensor, taken once from the stored frames by
`picture3d data intensity` and kept as ``ROOT/intensity.json``, allows two corrections: ``sensor_scale`` divides by the sensor's
99 % quantile, which keeps the shape of the distribution; ``sensor_quantile`` replaces a value by its rank among the sensor's
values, after which every sensor's intensities are spread alike over 0..1.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from picture3d.datasets.source_config import IntensityScale
from picture3d.errors import DataError
from picture3d.files import write_text
from picture3d.structures.points import IntensityUnit, PointCloud

if TYPE_CHECKING:
    from picture3d.datasets.prepared import PreparedDataset

TABLE_NAME = "intensity.json"
MAX_TABLE_BYTES = 1 << 24
SensorMap = Literal["sensor_scale", "sensor_quantile"]

_FORMAT = "picture3d-intensity"
_VERSION = 1
_LEVELS = np.linspace(0.0, 1.0, 257)
_FULL = 0.99  # the quantile that `sensor_scale` maps to 1
_VALUES_PER_SENSOR = 1 << 21


@dataclass(frozen=True, slots=True, eq=False)
class IntensityTable:
    """Quantiles of the stored intensities, per sensor; sensor 0 stands for data that names none."""

    unit: IntensityUnit
    quantiles: dict[int, NDArray[np.float64]]  # sensor -> (257,) ascending, at levels 0, 1/256 ... 1
    points: dict[int, int]  # sensor -> values that the quantiles were taken from
    frames: int
    where: str = "intensity table"  # for messages
    crc32c: str = ""  # of the file

    def mapped(self, points: PointCloud, kind: SensorMap) -> NDArray[np.float32]:
        """(N,) float32 in 0..1: the intensities of a sweep, each by the map of its sensor.

        ``sensor_scale``: value / 99 % quantile of the sensor, at most 1, at least 0; 0 for a sensor that gives nothing but 0.
        ``sensor_quantile``: share of the sensor's values below, interpolated; equal values get the middle of their ranks.

        Raises:
            DataError: if the sweep's unit is another than the table's, or a sensor does not occur in it.
        """
        if points.intensity_unit != self.unit:
            raise DataError(
                f"{self.where}: was taken from intensities in unit '{self.unit}', this frame's are in "
                f"'{points.intensity_unit}'. Prepare the logs alike, then run `picture3d data intensity` again."
            )
        if points.sensor is None:
            return self._map(0, points.intensity, kind)
        out = np.zeros(len(points), np.float32)
        for sensor in np.unique(points.sensor):
            rows = points.sensor == sensor
            out[rows] = self._map(int(sensor), points.intensity[rows], kind)
        return out

    def _map(self, sensor: int, values: NDArray[np.float32], kind: SensorMap) -> NDArray[np.float32]:
        if len(values) == 0:
            return np.zeros(0, np.float32)
        quantiles = self.quantiles.get(sensor)
        if quantiles is None:
            known = ", ".join(map(str, sorted(self.quantiles))) or "none"
            raise DataError(
                f"{self.where}: sensor {sensor} does not occur in it (it has {known}). Run `picture3d data intensity` over "
                "a split and a number of frames in which every sensor occurs."
            )
        if kind == "sensor_scale":
            full = float(np.interp(_FULL, _LEVELS, quantiles))
            return np.zeros(len(values), np.float32) if full <= 0 else np.clip(values / full, 0, 1).astype(np.float32)
        # Ties become one knot in the middle of their levels, so that the map is a function.
        knots, inverse, counts = np.unique(quantiles, return_inverse=True, return_counts=True)
        ranks = np.bincount(inverse, weights=_LEVELS) / counts
        return np.interp(values, knots, ranks).astype(np.float32)

    def to_json(self) -> dict[str, Any]:
        """As it is stored."""
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "unit": str(self.unit),
            "frames": self.frames,
            "sensors": {
                str(sensor): {"points": self.points[sensor], "quantiles": [float(value) for value in self.quantiles[sensor]]}
                for sensor in sorted(self.quantiles)
            },
        }

    @staticmethod
    def from_bytes(data: bytes, where: str) -> IntensityTable:
        """The table that `data` holds; `where` names it in messages.

        Raises:
            DataError: if it holds none.
        """
        try:
            tree = json.loads(data)
            if tree["format"] != _FORMAT or tree["version"] != _VERSION:
                raise ValueError(f"format {tree['format']!r} version {tree['version']!r}")
            quantiles = {int(name): np.array(entry["quantiles"], np.float64) for name, entry in tree["sensors"].items()}
            for sensor, levels in quantiles.items():
                if levels.shape != _LEVELS.shape or not np.isfinite(levels).all() or (np.diff(levels) < 0).any():
                    raise ValueError(f"the quantiles of sensor {sensor} are not {len(_LEVELS)} ascending numbers")
            return IntensityTable(
                unit=IntensityUnit(tree["unit"]),
                quantiles=quantiles,
                points={int(name): int(entry["points"]) for name, entry in tree["sensors"].items()},
                frames=int(tree["frames"]),
                where=where,
                crc32c=f"{google_crc32c.value(data):08x}",
            )
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise DataError(f"{where}: not a table of intensities ({error}). Run `picture3d data intensity` again.") from None


def measure_intensity(
    dataset: PreparedDataset,
    *,
    split: str | None = "train",
    frames: int = 512,
    progress: Callable[[int, int], None] | None = None,
) -> IntensityTable:
    """Takes the table from keyframes spread evenly over a split. The same frames give the same table.

    Of every frame at most so many points are taken, evenly over its rows, that 2**21 values per sensor are never exceeded:
    memory does not grow with the number of frames, and no sensor with the length of a log.

    Args:
        dataset: prepared frames.
        split: whose keyframes; None takes all.
        frames: at most so many keyframes.
        progress: called with (done, in all).

    Raises:
        DataError: if a frame cannot be read, frames differ in their unit of intensity, or there is no point.
    """
    keys = dataset.keyframes(split)
    if len(keys) > frames:
        keys = [keys[i] for i in np.linspace(0, len(keys) - 1, frames).round().astype(int)]
    share = max(1, _VALUES_PER_SENSOR // max(1, len(keys)))
    found: dict[int, list[NDArray[np.float32]]] = {}
    unit: IntensityUnit | None = None
    for done, key in enumerate(keys, start=1):
        points = dataset.frame(key, {"sensor"}).points
        if unit is not None and points.intensity_unit != unit:
            raise DataError(
                f"{dataset.root}: {key} has intensities in unit '{points.intensity_unit}', earlier frames in '{unit}'. "
                "Prepare the logs alike."
            )
        unit = points.intensity_unit
        sensors = np.zeros(len(points), np.uint8) if points.sensor is None else points.sensor
        for sensor in np.unique(sensors):
            values = points.intensity[sensors == sensor]
            found.setdefault(int(sensor), []).append(values[:: -(-len(values) // share)])
        if progress is not None:
            progress(done, len(keys))
    if unit is None or not found:
        raise DataError(
            f"{dataset.root}: split '{split}' holds no point, so there are no intensities to measure. Choose another --split, "
            "or --split all."
        )
    values = {sensor: np.concatenate(parts).astype(np.float64) for sensor, parts in found.items()}
    return IntensityTable(
        unit=unit,
        quantiles={sensor: np.quantile(column, _LEVELS) for sensor, column in values.items()},
        points={sensor: len(column) for sensor, column in values.items()},
        frames=len(keys),
    )


def write_table(path: Path, table: IntensityTable) -> None:
    """Writes ``intensity.json``, whole or not at all.

    Raises:
        DataError: if it cannot be written.
    """
    write_text(path, json.dumps(table.to_json(), separators=(",", ":"), allow_nan=False) + "\n")


def scale_intensity(points: PointCloud, scale: IntensityScale, table: IntensityTable | None = None) -> NDArray[np.float32]:
    """(N,) float32 intensity as network input; see `DataConfig.intensity_scale`. `table` is needed for ``sensor_...``.

    Raises:
        DataError: if a scale other than ``raw`` is asked for and the unit is unknown, or the sensor is.
    """
    if scale == "raw":
        return points.intensity
    if scale == "sensor_scale" or scale == "sensor_quantile":
        if table is None:
            raise DataError(
                f"intensity_scale={scale} needs the table of the sensor, which only prepared frames have beside them. Prepare "
                "these sweeps and run `picture3d data intensity`."
            )
        return table.mapped(points, scale)
    match points.intensity_unit:
        case IntensityUnit.RAW_255:
            unit = points.intensity * np.float32(1 / 255)
        case IntensityUnit.UNIT:
            unit = points.intensity
        case IntensityUnit.TANH:
            return points.intensity  # already in 0..1 and already a tanh
        case IntensityUnit.RAW_UNBOUNDED:
            return np.tanh(points.intensity)  # its only reading in 0..1
        case IntensityUnit.UNKNOWN:
            raise DataError(
                "the unit of this data's intensity is unknown, so it cannot be scaled. "
                "Prepare it with --intensity 0-255, 0-1 or tanh, set intensity_scale=raw, or let fill name intensity for 0."
            )
    return np.tanh(unit) if scale == "tanh" else unit
