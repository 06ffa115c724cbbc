"""What a fine-tuned network is worth, and what it finds; scores of prediction files of any program."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from picture3d.cli.shell import DataOption, Device, Threads, show

_PANEL = "Scores and predictions"  # of `picture3d --help`
app = typer.Typer()
score_app = typer.Typer(no_args_is_help=True, help="Score prediction files of any program by the official metrics.")
app.add_typer(score_app, name="score", rich_help_panel=_PANEL)


@app.command(rich_help_panel=_PANEL)
def evaluate(
    run: Annotated[Path, typer.Argument(help="Run folder of a fine-tuning.")],
    data: DataOption = None,
    split: Annotated[str, typer.Option(help="Which split to score.")] = "val",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Score a fine-tuned network: IoU per class and mIoU, of points or of space, or the official detection metric."""
    from picture3d.commands.score import evaluate as command

    show(command(run, data=data, split=split, as_json=as_json, device=device, threads=threads))


@app.command(rich_help_panel=_PANEL)
def predict(
    run: Annotated[Path, typer.Argument(help="Run folder of a fine-tuning.")],
    out: Annotated[Path, typer.Option("--out", help="File to write; a folder for lidarseg, occupancy and several pictures.")],
    format_: Annotated[
        str | None,
        typer.Option(
            "--format", help="json, nuscenes, waymo, lidarseg, occupancy, picture; left out: by the suffix .json .bin .png."
        ),
    ] = None,
    data: DataOption = None,
    split: Annotated[str, typer.Option(help="Which split to predict.")] = "val",
    frame: Annotated[list[str] | None, typer.Option(help="LOG/INDEX of one frame instead of a split. Repeatable.")] = None,
    points: Annotated[Path | None, typer.Option(help="A sweep file (.bin .pcd .npy .ply) instead of prepared frames.")] = None,
    layout: Annotated[str, typer.Option(help="Columns of a .bin or .npy sweep, '-' skips one.")] = "x,y,z,intensity",
    intensity: Annotated[str, typer.Option(help="Unit of its intensity: 0-255, 0-1, tanh, raw, unknown.")] = "unknown",
    min_score: Annotated[float | None, typer.Option(help="Leave out boxes below; default 0.3 for pictures, else 0.")] = None,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Write what a fine-tuned network finds: boxes, classes of points, or occupied cells."""
    from picture3d.commands.predict import predict as command

    show(
        command(
            run,
            out=out,
            wanted=format_,
            data=data,
            split=split,
            frames=frame or [],
            points=points,
            layout=layout,
            intensity=intensity,
            min_score=min_score,
            device=device,
            threads=threads,
        )
    )


@score_app.command("nuscenes-detection")
def score_nuscenes_detection(
    results: Annotated[Path, typer.Argument(help="Submission: results_nusc.json.")],
    labels: Annotated[
        Path, typer.Option(help="Prepared frames, or a JSON in the submission's layout with num_lidar_pts per box.")
    ],
    split: Annotated[str, typer.Option(help="Which split of prepared frames to score.")] = "val",
    bike_racks: Annotated[
        bool, typer.Option("--bike-racks/--no-bike-racks", help="Leave out bicycles and motorcycles in bicycle racks.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the official metrics summary instead of a table.")] = False,
) -> None:
    """Score nuScenes detections: mAP, NDS and the five errors, as the devkit does."""
    from picture3d.commands.score_nuscenes import score_nuscenes_detection as command

    show(command(results, labels=labels, split=split, bike_racks=bike_racks, as_json=as_json))


@score_app.command("waymo-detection")
def score_waymo_detection(
    predictions: Annotated[Path, typer.Argument(help="Predictions: an Objects binary.")],
    labels: Annotated[Path, typer.Argument(help="Labels: an Objects binary with difficulty and points per box.")],
    iou: Annotated[list[str] | None, typer.Option(help="CLASS=THRESHOLD, for example vehicle=0.7. Repeatable.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON by the official names instead of a table.")] = False,
) -> None:
    """Score Waymo detections: AP and APH per class, range and level, as the official metric does."""
    from picture3d.commands.score_waymo import score_waymo_detection as command

    show(command(predictions, labels, iou=iou or [], as_json=as_json))


@score_app.command("occupancy")
def score_occupancy(
    predictions: Annotated[Path, typer.Argument(help="Folder scene_<token>/occupancy/<token>.npy: rows z, y, x, class.")],
    labels: Annotated[Path, typer.Option(help="Prepared frames with occupancy labels attached.")],
    split: Annotated[str, typer.Option(help="Which split of them.")] = "val",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Score occupancy predictions as OpenOccupancy does: geometric IoU, IoU per class and its mean over 16 classes."""
    from picture3d.commands.score_occupancy import score_occupancy as command

    show(command(predictions, labels, split=split, as_json=as_json))
