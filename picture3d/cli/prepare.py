"""`picture3d prepare`: raw logs become prepared frames."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from picture3d.cli.shell import told

app = typer.Typer(no_args_is_help=True, help="Turn raw logs into prepared frames: one checksummed file per log.")

PreparedOut = Annotated[Path, typer.Argument(help="Folder for the prepared frames.")]
SkipMissing = Annotated[bool, typer.Option("--skip-missing", help="Leave out files that are not on disk, and say how many.")]
XyzStep = Annotated[float, typer.Option(min=0, help="Round coordinates to this many metres; 0 stores them exactly.")]
LogProcesses = Annotated[int, typer.Option(min=1, help="Logs prepared side by side; the bytes do not depend on it.")]


@app.command("nuscenes")
def prepare_nuscenes(
    raw: Annotated[Path, typer.Argument(help="Raw nuScenes root: samples/, sweeps/, v1.0-*/, lidarseg/, panoptic/.")],
    out: PreparedOut,
    version: Annotated[str, typer.Option(help="Table folder: v1.0-mini, v1.0-trainval, v1.0-test.")] = "v1.0-mini",
    sweeps: Annotated[int, typer.Option(min=0, help="Earlier sweeps linked to each keyframe.")] = 9,
    skip_missing: SkipMissing = False,
    xyz_step: XyzStep = 0.0,
    processes: LogProcesses = 1,
) -> None:
    """Prepare raw nuScenes tables and sweeps: points, poses, boxes with velocity, lidarseg and panoptic labels.

    Exit status 1 if a scene with a damaged file was set aside; the others are prepared.
    """
    from picture3d.commands.prepare import prepare_nuscenes as command

    told(command(raw, out, version=version, sweeps=sweeps, skip_missing=skip_missing, xyz_step=xyz_step, processes=processes))


@app.command("points")
def prepare_points(
    folder: Annotated[Path, typer.Argument(help="Sweeps in name order (.bin .pcd .npy .ply), or one sub-folder per log.")],
    out: PreparedOut,
    layout: Annotated[
        str, typer.Option(help="Columns of .bin and .npy files, '-' skips one: x,y,z,intensity,ring.")
    ] = "x,y,z,intensity",
    intensity: Annotated[str, typer.Option(help="Unit of the intensity column: 0-255, 0-1, tanh, unknown.")] = "unknown",
    labels: Annotated[Path | None, typer.Option(help="Folder with one label file per sweep (.npy .label .bin .txt).")] = None,
    label_set: Annotated[str | None, typer.Option(help="What the labels mean: nuscenes-32, nuscenes-16.")] = None,
    poses: Annotated[Path | None, typer.Option(help="Text file, 12 numbers a line: global_from_lidar, row by row.")] = None,
    val: Annotated[int, typer.Option(min=0, help="How many of the last sweeps (or logs) form the validation split.")] = 0,
    name: Annotated[str, typer.Option(help="Name of the dataset.")] = "points",
    xyz_step: XyzStep = 0.0,
    processes: LogProcesses = 1,
) -> None:
    """Prepare a folder of your own sweeps. Labels and poses are optional: pre-training needs neither.

    Exit status 1 if a log with a damaged sweep was set aside; the others are prepared.
    """
    from picture3d.commands.prepare import prepare_points as command

    told(
        command(
            folder,
            out,
            layout=layout,
            intensity=intensity,
            labels=labels,
            label_set=label_set,
            poses=poses,
            val=val,
            name=name,
            xyz_step=xyz_step,
            processes=processes,
        )
    )


@app.command("semantickitti")
def prepare_semantickitti(
    raw: Annotated[Path, typer.Argument(help="Folder that holds sequences/NN/velodyne, labels, poses.txt, calib.txt.")],
    out: PreparedOut,
    sweeps: Annotated[int, typer.Option(min=0, help="Earlier scans linked to each, where there are poses.")] = 9,
    skip_missing: SkipMissing = False,
    xyz_step: XyzStep = 0.0,
    processes: LogProcesses = 1,
) -> None:
    """Prepare SemanticKITTI: scans, poses of the LiDAR, labels and instances; official split.

    Exit status 1 if a sequence with a damaged file was set aside; the others are prepared.
    """
    from picture3d.commands.prepare import prepare_semantickitti as command

    told(command(raw, out, sweeps=sweeps, skip_missing=skip_missing, xyz_step=xyz_step, processes=processes))


@app.command("argoverse2")
def prepare_argoverse2(
    raw: Annotated[Path, typer.Argument(help="Folder that holds train/, val/, test/ with the logs, or one log.")],
    out: PreparedOut,
    sweeps: Annotated[int, typer.Option(min=0, help="Earlier sweeps linked to each.")] = 9,
    skip_missing: SkipMissing = False,
    xyz_step: XyzStep = 0.0,
    processes: LogProcesses = 1,
) -> None:
    """Prepare Argoverse 2 sensor logs: both LiDARs, poses, tracked boxes with velocities. Needs the extra `arrow`.

    Exit status 1 if a log with a damaged file was set aside; the others are prepared.
    """
    from picture3d.commands.prepare import prepare_argoverse2 as command

    told(command(raw, out, sweeps=sweeps, skip_missing=skip_missing, xyz_step=xyz_step, processes=processes))


@app.command("once")
def prepare_once(
    raw: Annotated[Path, typer.Argument(help="Folder that holds data/<sequence>/ and ImageSets/.")],
    out: PreparedOut,
    sweeps: Annotated[int, typer.Option(min=0, help="Earlier sweeps linked to each, where there are poses.")] = 4,
    skip_missing: SkipMissing = False,
    xyz_step: XyzStep = 0.0,
    processes: LogProcesses = 1,
) -> None:
    """Prepare ONCE: sweeps, poses, boxes of the annotated frames; the lists of ImageSets are the splits.

    Exit status 1 if a sequence with a damaged file was set aside; the others are prepared.
    """
    from picture3d.commands.prepare import prepare_once as command

    told(command(raw, out, sweeps=sweeps, skip_missing=skip_missing, xyz_step=xyz_step, processes=processes))


@app.command("waymo")
def prepare_waymo(
    raw: Annotated[
        Path,
        typer.Argument(
            help="Folder of training/, validation/, testing/ with tfrecords or v2 components; or of raw_data/ and ImageSets/."
        ),
    ],
    out: PreparedOut,
    sweeps: Annotated[int, typer.Option(min=0, help="Earlier frames linked to each; fewer can be used when loading.")] = 9,
    skip_missing: SkipMissing = False,
    xyz_step: XyzStep = 0.0,
    processes: LogProcesses = 1,
) -> None:
    """Prepare the Waymo Open Dataset, v1.x or v2: five LiDARs, both returns, poses, boxes, classes. No TensorFlow.

    Which version lies in the folder is seen from its files; v2 (Parquet) needs the extra `arrow`.
    Exit status 1 if a damaged segment was set aside; the others are prepared.
    """
    from picture3d.commands.prepare import prepare_waymo as command

    told(command(raw, out, sweeps=sweeps, skip_missing=skip_missing, xyz_step=xyz_step, processes=processes))


@app.command("occupancy")
def prepare_occupancy(
    labels: Annotated[Path, typer.Argument(help="nuScenes-Occupancy-v0.1, with scene_<token>/occupancy/*.npy.")],
    prepared: Annotated[Path, typer.Argument(help="Frames that `prepare nuscenes` made; labels are stored beside them.")],
) -> None:
    """Attach nuScenes-Occupancy (OpenOccupancy) labels to prepared nuScenes keyframes.

    Exit status 1 if a damaged label file set a log aside; the others are attached.
    """
    from picture3d.commands.prepare import prepare_occupancy as command

    told(command(labels, prepared))
