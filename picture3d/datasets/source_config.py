"""A further dataset of a training that mixes several; `samples.DataConfig.also` lists them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from picture3d.config import FrozenConfig

IntensityScale = Literal["unit", "raw", "tanh", "sensor_scale", "sensor_quantile"]
# Columns that not every sensor tells, and what `fill` may put in their place: 0.
Fillable = Literal["intensity", "elongation"]


class SourceConfig(FrozenConfig):
    """Which frames of another dataset are mixed in. What is not said here is as in the `DataConfig` around it."""

    root: Path = Field(description="Folder of prepared frames.")
    name: str | None = Field(default=None, description="How messages and frame names call it; null: the folder's name.")
    weight: float | None = Field(
        default=None,
        gt=0,
        description="Frames of it for each frame of data.root: 1 as many, 0.25 one in five of all; null: each of its frames "
        "once an epoch.",
    )
    split: str | None = Field(default="train", description="Name of a split; null takes every log.")
    every: int = Field(default=1, ge=1, description="Take every n-th keyframe of the list; 1 takes all.")
    max_frames: int | None = Field(default=None, ge=1, description="At most so many keyframes, evenly spread over the list.")
    intensity_scale: IntensityScale | None = Field(default=None, description="null: as data.intensity_scale.")
    fill: tuple[Fillable, ...] = Field(default=(), description="Features that this dataset lacks and that are set to 0.")
