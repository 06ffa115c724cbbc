"""Making, checking, describing data; what a teacher sees in it."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from picture3d.cli.prepare import XyzStep
from picture3d.cli.prepare import app as prepare_app
from picture3d.cli.shell import Device, Threads, show, told

_PANEL = "Data"  # of `picture3d --help`
app = typer.Typer()
data_app = typer.Typer(no_args_is_help=True, help="Look at prepared frames.")
app.add_typer(prepare_app, name="prepare", rich_help_panel=_PANEL)
app.add_typer(data_app, name="data", rich_help_panel=_PANEL)


class TargetCodec(StrEnum):
    """How features are stored."""

    AUTO = "auto"
    PCA = "pca"
    PRODUCT = "product"
    INT8 = "int8"
    FLOAT16 = "float16"


class TeacherName(StrEnum):
    """Teachers by name; ema lives within pre-training only, and whoever asks for it here is told so."""

    TOWN = "town"
    HANDCRAFTED = "handcrafted"
    MINKUNET = "minkunet"
    ENCODER = "encoder"
    EMA = "ema"


@app.command(rich_help_panel=_PANEL)
def synth(
    out: Annotated[Path, typer.Argument(help="Folder to write the raw dataset into.")],
    scenes: Annotated[int, typer.Option(min=1, help="Scenes; each drives through a town of its own.")] = 10,
    keyframes: Annotated[int, typer.Option(min=1, help="Keyframes per scene: nuScenes at 2 Hz, Waymo frames at 10 Hz.")] = 40,
    sweeps_per_keyframe: Annotated[
        int | None, typer.Option(min=0, max=9, help="nuScenes: sweeps kept between two keyframes, 9 by default.")
    ] = None,
    val_scenes: Annotated[int, typer.Option(min=0, help="How many of the last scenes form the validation split.")] = 2,
    seed: Annotated[int, typer.Option(help="The same seed writes the same bytes.")] = 0,
    version: Annotated[str | None, typer.Option(help="nuScenes: name of the table folder, v1.0-mini by default.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Scenes written side by side; the bytes do not depend on it.")] = 1,
    layout: Annotated[
        str, typer.Option("--format", help="Raw format: nuscenes, waymo (v1.x tfrecords), waymo-v2 (Parquet).")
    ] = "nuscenes",
    occupancy: Annotated[bool, typer.Option("--occupancy", help="nuScenes: label the occupied space, too.")] = False,
) -> None:
    """Write a raw dataset of a procedural town: nuScenes v1.0 seen by 32 beams, or Waymo seen by five LiDARs."""
    from picture3d.commands.data import synth as command

    show(
        command(
            out,
            scenes=scenes,
            keyframes=keyframes,
            sweeps_per_keyframe=sweeps_per_keyframe,
            val_scenes=val_scenes,
            seed=seed,
            version=version,
            processes=processes,
            layout=layout,
            occupancy=occupancy,
        )
    )


@app.command(rich_help_panel=_PANEL)
def check(
    folder: Annotated[
        Path,
        typer.Argument(
            help="Prepared frames, or the root of raw nuScenes, Waymo, SemanticKITTI, ONCE, Argoverse 2, or your own sweeps."
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of lines.")] = False,
    layout: Annotated[str, typer.Option(help="Own sweeps: columns of .bin and .npy files.")] = "x,y,z,intensity",
) -> None:
    """Look for trouble before a long run: missing, cut or damaged files, NaN, impossible boxes, jumps in time and place.

    Exit status 1 if the data is not sound.
    """
    from picture3d.commands.inspect import check as command

    told(command(folder, as_json=as_json, layout=layout))


@data_app.command("objects")
def data_objects(
    prepared: Annotated[Path, typer.Argument(help="Folder of prepared frames with boxes.")],
    sweeps: Annotated[int, typer.Option(min=1, help="Sweeps merged into a frame, the keyframe included.")] = 1,
    split: Annotated[str, typer.Option(help="Whose objects are taken.")] = "train",
    name: Annotated[str | None, typer.Option(help="Name of the database; SPLIT-<N>sweeps if not given.")] = None,
    classes: Annotated[str, typer.Option(help="Keep these classes: nuscenes, waymo, once, or all categories.")] = "all",
    every: Annotated[
        list[str] | None,
        typer.Option(metavar="CLASS=N", help="Take a class from every N-th keyframe only. Repeatable."),
    ] = None,
    min_points: Annotated[int, typer.Option(min=1, help="Leave out objects with fewer points.")] = 1,
    processes: Annotated[int, typer.Option(min=1, help="Logs done at the same time.")] = 1,
) -> None:
    """Cut all annotated objects out of prepared frames, to be pasted into other frames in training."""
    from picture3d.commands.objects import objects as command

    said = command(
        prepared,
        name=name,
        split=split,
        sweeps=sweeps,
        classes=classes,
        every=every or [],
        min_points=min_points,
        processes=processes,
    )
    show(said)


@data_app.command("intensity")
def data_intensity(
    prepared: Annotated[Path, typer.Argument(help="Folder of prepared frames.")],
    split: Annotated[str, typer.Option(help="Whose keyframes are measured; 'all' takes every log.")] = "train",
    frames: Annotated[int, typer.Option(min=1, help="At most so many keyframes, evenly spread.")] = 512,
) -> None:
    """Measure how each sensor spreads its intensities, for data.intensity_scale=sensor_scale or sensor_quantile."""
    from picture3d.commands.intensity import intensity as command

    show(command(prepared, split=None if split == "all" else split, frames=frames))


@data_app.command("projection")
def data_projection(
    folder: Annotated[
        Path, typer.Argument(help="Raw Waymo (v1 or v2) or raw nuScenes, a few files will do; or prepared frames.")
    ],
    frames: Annotated[int, typer.Option(min=1, help="Frames that are prepared and timed.")] = 40,
    sweeps: Annotated[int, typer.Option(min=0, help="nuScenes: earlier sweeps kept for each keyframe.")] = 9,
    xyz_step: XyzStep = 0.0,
    processes: Annotated[int, typer.Option(min=1, help="How many logs will be prepared side by side.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of lines.")] = False,
) -> None:
    """What preparing the full dataset will take: hours, bytes and memory, from a sample that is measured now.

    Waymo: 158,081 training and 39,987 validation frames. nuScenes: 28,130 and 6,019 keyframes, with their sweeps.
    """
    from picture3d.commands.projection import data_projection as command

    show(command(folder, frames=frames, sweeps=sweeps, xyz_step=xyz_step, processes=processes, as_json=as_json))


@data_app.command("info")
def data_info(
    folder: Annotated[Path, typer.Argument(help="Folder of prepared frames.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of lines.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Draw one keyframe into this PNG.")] = None,
    frame: Annotated[int, typer.Option(min=0, help="Which keyframe is drawn, counted over all logs.")] = 0,
) -> None:
    """What a prepared dataset holds: logs, frames, points, boxes, bytes, attached targets."""
    from picture3d.commands.inspect import data_info as command

    show(command(folder, as_json=as_json, picture=picture, frame=frame))


@app.command(rich_help_panel=_PANEL)
def targets(
    prepared: Annotated[Path, typer.Argument(help="Folder of prepared frames.")],
    teacher: Annotated[TeacherName, typer.Option(help="Which teacher looks at the sweeps.")] = TeacherName.TOWN,
    weights: Annotated[
        Path | None, typer.Option(help="minkunet: checkpoint in Seal's or SLidR's layout; encoder: run or checkpoint.")
    ] = None,
    superclasses: Annotated[int, typer.Option(min=1, max=255, help="Superclasses per sweep (k of k-means).")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the clustering.")] = 0,
    codec: Annotated[
        TargetCodec, typer.Option(help="How features are stored; auto: the smallest that keeps a mean cosine of 0.995.")
    ] = TargetCodec.AUTO,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Run a teacher over the keyframes and store its features and superclasses beside them."""
    from picture3d.commands.data import targets as command

    show(
        command(
            prepared,
            teacher=teacher.value,
            weights=weights,
            superclasses=superclasses,
            seed=seed,
            codec=codec.value,
            device=device,
            threads=threads,
        )
    )
