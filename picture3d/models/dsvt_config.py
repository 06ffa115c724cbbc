"""Settings of the DSVT encoder, checked against the grid in words, and the published configurations."""

from __future__ import annotations

import itertools
from typing import Literal, Self

from pydantic import model_validator

from picture3d.config import FrozenConfig
from picture3d.errors import ConfigError

Triple = tuple[int, int, int]


class DsvtConfig(FrozenConfig):
    """The encoder but for the size of its input grid. Triples are cells along x, y, z; lists have one entry per stage."""

    channels: int = 192  # width of all stages
    ffn_channels: int = 384
    heads: int = 8
    blocks: tuple[int, ...] = (1, 1, 1, 1)
    set_sizes: tuple[int, ...] = (48, 48, 48, 48)
    windows: tuple[Triple, ...] = ((12, 12, 32), (12, 12, 8), (12, 12, 2), (12, 12, 1))
    hybrid_factor: Triple = (2, 2, 1)  # windows of shift 1 are this many times larger
    shifts: tuple[Triple, Triple] = ((0, 0, 0), (6, 6, 0))  # offsets of the two shifts, in cells of the stage
    strides: tuple[Triple, ...] = ((1, 1, 4), (1, 1, 4), (1, 1, 2))  # pooling between stages: one fewer than stages
    posembed_quirk: bool = True  # as published: layer i adds positions in the windows of shift i, whatever windows it uses
    pooling_quirk: bool = True  # as published: empty slots take part in pooling, as voxels of zeros
    attention: Literal["bucketed", "padded"] = "bucketed"  # the fast form, or the published one; same numbers
    point_norm_momentum: float = 0.01  # of the point encoder's running statistics, as published; runs of few steps need more
    point_inputs: Literal["metres", "unit"] = "metres"  # of the voxel encoder: as published, or brought to a common size
    activation_checkpointing: bool = False  # recompute blocks in the backward: less memory, about a third more time

    @property
    def num_stages(self) -> int:
        """Number of stages."""
        return len(self.blocks)

    @model_validator(mode="after")
    def _check(self) -> Self:
        stages = len(self.blocks)
        wanted = {"set_sizes": stages, "windows": stages, "strides": stages - 1}
        for name, length in wanted.items():
            if len(getattr(self, name)) != length:
                raise ConfigError(
                    f"dsvt: blocks has {stages} stages, so {name} needs {length} entries (it has {len(getattr(self, name))}). "
                    "Give one for each stage"
                )
        if stages == 0:
            raise ConfigError("dsvt: blocks is empty, but the encoder needs a stage. Give the blocks of at least one")
        positive = [self.channels, self.ffn_channels, self.heads, *self.blocks, *self.set_sizes, *self.hybrid_factor]
        if min(positive + [cells for triple in self.windows + self.strides for cells in triple]) < 1:
            raise ConfigError(
                "dsvt: a width, number of heads, blocks, set size, window, stride or hybrid factor is below 1. Set each to at "
                "least 1"
            )
        if min(cells for offset in self.shifts for cells in offset) < 0:
            raise ConfigError(f"dsvt: shifts {self.shifts} hold a negative number. Set each to 0 or more")
        if self.channels % self.heads:
            fits = sorted(heads for heads in range(1, self.channels + 1) if self.channels % heads == 0)
            near = min(fits, key=lambda heads: abs(heads - self.heads))
            raise ConfigError(
                f"dsvt: {self.channels} channels cannot be shared by {self.heads} heads. Set heads={near}, which would fit"
            )
        return self

    def stage_shapes(self, grid_shape: Triple) -> tuple[Triple, ...]:
        """Cells along x, y, z of every stage for an input grid, after checking that windows and strides fit it.

        Raises:
            ConfigError: naming the stage and values that would fit.
        """
        shapes = _pooled_shapes(grid_shape, self.strides)
        for stage, (shape, window) in enumerate(zip(shapes, self.windows, strict=True)):
            height, window_height = shape[2], window[2]
            if window_height > height:
                raise ConfigError(
                    f"dsvt: stage {stage} is {height} cells high, its window {window_height}. A window may not be higher than "
                    f"the grid. Set windows[{stage}] = {(*window[:2], height)} (stage heights: {_heights(shapes)})."
                )
            if window_height == 1 and height > 1:
                raise ConfigError(
                    f"dsvt: stage {stage} is {height} cells high, its window 1: positions would have two columns where the "
                    f"stage needs three. Stage heights are {_heights(shapes)}. {self._advice(grid_shape, stage)}"
                )
        return shapes

    def _advice(self, grid_shape: Triple, stage: int) -> str:
        shapes = _pooled_shapes(grid_shape, self.strides)
        higher = f"windows[{stage}] = {(*self.windows[stage][:2], shapes[stage][2])}"
        wanted = [window[2] for window in self.windows]
        now = [stride[2] for stride in self.strides]
        fitting = [
            option
            for option in itertools.product(range(1, 9), repeat=len(now))
            if all(w > 1 or h == 1 for w, h in zip(wanted, _stage_heights(grid_shape[2], option), strict=True))
            and all(h % s == 0 for h, s in zip(_stage_heights(grid_shape[2], option), option, strict=False))
        ]
        if not fitting:
            return f"Set {higher}, which would fit."
        best = min(fitting, key=lambda option: (sum(abs(a - b) for a, b in zip(option, now, strict=True)), option))
        heights = ", ".join(str(h) for h in _stage_heights(grid_shape[2], best))
        return f"Set strides along z of {', '.join(map(str, best))}, which give heights {heights} and fit, or {higher}."


def _pooled_shapes(grid_shape: Triple, strides: tuple[Triple, ...]) -> tuple[Triple, ...]:
    shapes = [grid_shape]
    for stride in strides:
        x, y, z = (-(-cells // step) for cells, step in zip(shapes[-1], stride, strict=True))
        shapes.append((x, y, z))
    return tuple(shapes)


def _stage_heights(height: int, strides: tuple[int, ...]) -> list[int]:
    return [height, *itertools.accumulate(strides, lambda cells, step: -(-cells // step), initial=height)][1:]


def _heights(shapes: tuple[Triple, ...]) -> str:
    return ", ".join(str(shape[2]) for shape in shapes)


def waymo_voxel_192() -> DsvtConfig:
    """PICTURE's Waymo encoder: grid 468 x 468 x 32 of 0.32 x 0.32 x 0.1875 m, +-74.88 m, -2..4 m."""
    return DsvtConfig()


def nuscenes_pillar_256() -> DsvtConfig:
    """The nuScenes detection encoder: one stage of four blocks on 360 x 360 pillars of 0.3 m, +-54 m."""
    return DsvtConfig(
        channels=256,
        ffn_channels=256,
        blocks=(4,),
        set_sizes=(90,),
        windows=((30, 30, 1),),
        hybrid_factor=(1, 1, 1),
        shifts=((0, 0, 0), (15, 15, 0)),
        strides=(),
    )


def nuscenes_voxel_256() -> DsvtConfig:
    """PICTURE's nuScenes pre-training encoder: grid 512 x 512 x 40 of 0.2 m, +-51.2 m, -5..3 m.

    The published strides 4, 4, 2 leave a last stage two cells high that its window cannot serve; strides 4, 5, 2 and
    windows 40, 10, 2, 1 high are the repair. No key changes; one pooling table and one position layer change shape.
    """
    return DsvtConfig(
        channels=256,
        windows=((12, 12, 40), (12, 12, 10), (12, 12, 2), (12, 12, 1)),
        strides=((1, 1, 4), (1, 1, 5), (1, 1, 2)),
    )


def nuscenes_cylinder_128() -> DsvtConfig:
    """The nuScenes segmentation encoder: cylinder grid of 480 x 360 x 32 cells (radius, angle, height)."""
    return DsvtConfig(channels=128)
