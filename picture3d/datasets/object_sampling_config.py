"""How many objects of a database are pasted into a frame, and which."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from picture3d.config import FrozenConfig

# As the published detectors are trained.
NUSCENES_FILL_TO = {
    "car": 2,
    "truck": 3,
    "construction_vehicle": 7,
    "bus": 4,
    "trailer": 6,
    "barrier": 2,
    "motorcycle": 6,
    "bicycle": 6,
    "pedestrian": 2,
    "traffic_cone": 2,
}
WAYMO_FILL_TO = {"Vehicle": 15, "Pedestrian": 10, "Cyclist": 10}


class ObjectSamplingConfig(FrozenConfig):
    """Which objects are pasted into training frames."""

    database: str = Field(
        min_length=1, description="Name of a database in the `objects` folder of the prepared frames, or a path to one."
    )
    fill_to: dict[str, int] = Field(
        description="Class -> paste until a frame holds so many of it; a class not named is left alone."
    )
    min_points: dict[str, int] = Field(default={}, description="Class -> objects with fewer points are not pasted.")
    default_min_points: int = Field(default=5, ge=1, description="The same for classes that `min_points` does not name.")
    without_difficulties: tuple[int, ...] = Field(
        default=(), description="Objects annotated with one of these difficulties are not pasted; -1 stands for unknown."
    )
    max_time_lag_s: float | None = Field(
        default=None, ge=0, description="Leave out an object's points older than this, in seconds; null keeps all."
    )

    @model_validator(mode="after")
    def _numbers_make_sense(self) -> Self:
        for name, wanted in self.fill_to.items():
            if wanted < 0:
                raise ValueError(f"fill_to.{name} is {wanted}; it must be 0 or more")
        for name, fewest in self.min_points.items():
            if name not in self.fill_to:
                raise ValueError(f"min_points.{name}: fill_to names no such class")
            if fewest < 1:
                raise ValueError(f"min_points.{name} is {fewest}; it must be 1 or more")
        return self

    def path(self, root: Path) -> Path:
        """Where the database is, for prepared frames in `root`."""
        given = Path(self.database)
        return given if given.suffix == ".objects" else root / "objects" / f"{self.database}.objects"

    @staticmethod
    def nuscenes(database: str = "train-10sweeps") -> ObjectSamplingConfig:
        """As the published nuScenes detector is trained."""
        return ObjectSamplingConfig(database=database, fill_to=NUSCENES_FILL_TO)

    @staticmethod
    def waymo(database: str = "train-1sweeps") -> ObjectSamplingConfig:
        """As the published Waymo detector is trained."""
        return ObjectSamplingConfig(
            database=database,
            fill_to=WAYMO_FILL_TO,
            min_points={"Vehicle": 5, "Pedestrian": 10, "Cyclist": 10},
            without_difficulties=(-1,),
        )
