"""What the recipes for two CPU cores share: a coarse grid and a small encoder of the published kind."""

from __future__ import annotations

from picture3d.models.dsvt_config import DsvtConfig
from picture3d.recipes.configs import GridConfig

TOWN_GRID = GridConfig(range_min=(-48.0, -48.0, -5.0), range_max=(48.0, 48.0, 3.0), voxel_size=(0.4, 0.4, 0.5))
# Makes any recipe of the town a network for runs of a minute or two: larger voxels, half the width. Settings as `--set` takes.
SMALL_TOWN = (
    "grid.voxel_size=[0.8,0.8,1.0]",
    "encoder.channels=32",
    "encoder.ffn_channels=64",
    "encoder.windows=[[12,12,8],[12,12,1]]",
    "encoder.strides=[[1,1,8]]",
)
TOWN_SWEEPS = 3  # merged where objects are looked for


def town_encoder() -> DsvtConfig:
    """Two stages of one block, 64 wide: 16 cells high, then pillars."""
    return DsvtConfig(
        channels=64,
        ffn_channels=128,
        heads=4,
        blocks=(1, 1),
        set_sizes=(36, 36),
        windows=((12, 12, 16), (12, 12, 1)),
        strides=((1, 1, 16),),
        point_norm_momentum=0.1,
        point_inputs="unit",
    )
