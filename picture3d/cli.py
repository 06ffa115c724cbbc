"""The command line. Every command is a thin shell around one function in `picture3d.commands`, imported when it is called."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from picture3d.errors import Picture3dError

_INTERRUPTED = 130

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="From raw LiDAR logs to a pre-trained encoder (PICTURE), and from the encoder to fine-tuned, scored networks.",
    epilog="Start with: picture3d demo",
)
prepare_app = typer.Typer(no_args_is_help=True, help="Turn raw logs into prepared frames: one checksummed file per log.")
finetune_app = typer.Typer(no_args_is_help=True, help="Train a task network from an encoder, or from scratch.")
app.add_typer(prepare_app, name="prepare")
app.add_typer(finetune_app, name="finetune")
data_app = typer.Typer(no_args_is_help=True, help="Look at prepared frames.")
app.add_typer(data_app, name="data")
score_app = typer.Typer(no_args_is_help=True, help="Score prediction files of any program by the official metrics.")
app.add_typer(score_app, name="score")
experiment_app = typer.Typer(no_args_is_help=True, help="Compare ways of pre-training, cell by cell, over seeds.")
app.add_typer(experiment_app, name="experiment")


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


_Number = TypeVar("_Number", int, float)

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one setting, for example training.batch_size=4. Repeatable."),
]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="Start from a saved config.json instead of a recipe.")]
RunFolderOption = Annotated[Path, typer.Option("--out", help="Run folder: config, metrics, checkpoints, summary.")]
DataOption = Annotated[Path | None, typer.Option("--data", help="Folder of prepared frames.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, or auto.")]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads; 0 uses every core.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in the run folder.")]


@app.command()
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

    _show(
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


PreparedOut = Annotated[Path, typer.Argument(help="Folder for the prepared frames.")]
SkipMissing = Annotated[bool, typer.Option("--skip-missing", help="Leave out files that are not on disk, and say how many.")]
XyzStep = Annotated[float, typer.Option(min=0, help="Round coordinates to this many metres; 0 stores them exactly.")]
LogProcesses = Annotated[int, typer.Option(min=1, help="Logs prepared side by side; the bytes do not depend on it.")]


def _told(outcome: tuple[str, bool]) -> None:
    """Shows what a command has to say; exit status 1 if not everything was well."""
    text, well = outcome
    _show(text)
    if not well:
        raise typer.Exit(1)


@prepare_app.command("nuscenes")
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

    _told(command(raw, out, version=version, sweeps=sweeps, skip_missing=skip_missing, xyz_step=xyz_step, processes=processes))


@prepare_app.command("points")
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

    _told(
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


@prepare_app.command("semantickitti")
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

    _told(command(raw, out, sweeps=sweeps, skip_missing=skip_missing, xyz_step=xyz_step, processes=processes))


@prepare_app.command("argoverse2")
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

    _told(command(raw, out, sweeps=sweeps, skip_missing=skip_missing, xyz_step=xyz_step, processes=processes))


@prepare_app.command("once")
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

    _told(command(raw, out, sweeps=sweeps, skip_missing=skip_missing, xyz_step=xyz_step, processes=processes))


@prepare_app.command("waymo")
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

    _told(command(raw, out, sweeps=sweeps, skip_missing=skip_missing, xyz_step=xyz_step, processes=processes))


@prepare_app.command("occupancy")
def prepare_occupancy(
    labels: Annotated[Path, typer.Argument(help="nuScenes-Occupancy-v0.1, with scene_<token>/occupancy/*.npy.")],
    prepared: Annotated[Path, typer.Argument(help="Frames that `prepare nuscenes` made; labels are stored beside them.")],
) -> None:
    """Attach nuScenes-Occupancy (OpenOccupancy) labels to prepared nuScenes keyframes.

    Exit status 1 if a damaged label file set a log aside; the others are attached.
    """
    from picture3d.commands.prepare import prepare_occupancy as command

    _told(command(labels, prepared))


@app.command()
def doctor(
    folder: Annotated[Path, typer.Option(help="Where data is to be written; its disk is looked at.")] = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of lines.")] = False,
    threads: Threads = 0,
) -> None:
    """Versions, devices, threads, a small speed test, free disk, and which optional parts are missing."""
    from picture3d.commands.doctor import doctor as command

    _show(command(folder=folder, threads=threads, as_json=as_json))


@app.command()
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

    _told(command(folder, as_json=as_json, layout=layout))


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
    _show(said)


@data_app.command("intensity")
def data_intensity(
    prepared: Annotated[Path, typer.Argument(help="Folder of prepared frames.")],
    split: Annotated[str, typer.Option(help="Whose keyframes are measured; 'all' takes every log.")] = "train",
    frames: Annotated[int, typer.Option(min=1, help="At most so many keyframes, evenly spread.")] = 512,
) -> None:
    """Measure how each sensor spreads its intensities, for data.intensity_scale=sensor_scale or sensor_quantile."""
    from picture3d.commands.intensity import intensity as command

    _show(command(prepared, split=None if split == "all" else split, frames=frames))


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

    _show(command(folder, frames=frames, sweeps=sweeps, xyz_step=xyz_step, processes=processes, as_json=as_json))


@data_app.command("info")
def data_info(
    folder: Annotated[Path, typer.Argument(help="Folder of prepared frames.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of lines.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Draw one keyframe into this PNG.")] = None,
    frame: Annotated[int, typer.Option(min=0, help="Which keyframe is drawn, counted over all logs.")] = 0,
) -> None:
    """What a prepared dataset holds: logs, frames, points, boxes, bytes, attached targets."""
    from picture3d.commands.inspect import data_info as command

    _show(command(folder, as_json=as_json, picture=picture, frame=frame))


@app.command()
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

    _show(
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


@app.command()
def pretrain(
    out: RunFolderOption,
    data: DataOption = None,
    recipe: Annotated[str, typer.Option(help="Which recipe to run; `picture3d recipes` lists them.")] = "town-picture",
    config: ConfigFile = None,
    set_: Overrides = None,
    resume: Resume = False,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Stop after so many steps (the schedule is shortened).")] = None,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Pre-train an encoder with PICTURE: hide voxels, rebuild their points and the teacher's features.

    No label and no box is ever read. Coordinates only: --set loss.features_weight=0. Features only:
    --set loss.coordinates_weight=0.
    """
    from picture3d.commands.train import pretrain as command

    _show(
        command(
            out,
            data=data,
            recipe=recipe,
            config=config,
            overrides=set_ or [],
            resume=resume,
            max_steps=max_steps,
            device=device,
            threads=threads,
        )
    )


Encoder = Annotated[
    Path | None, typer.Option("--encoder", help="Run folder or checkpoint of a pre-training; left out: from scratch.")
]
LabelShare = Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Share of the labelled scenes to train on.")]
AllowPartial = Annotated[bool, typer.Option("--allow-partial", help="Accept an encoder that fits only in part.")]
FinetuneRecipe = Annotated[str, typer.Option("--recipe", help="Which recipe to run; `picture3d recipes` lists them.")]


@finetune_app.command("segmentation")
def finetune_segmentation(
    out: RunFolderOption,
    data: DataOption = None,
    recipe: FinetuneRecipe = "town-segmentation",
    encoder: Encoder = None,
    label_share: LabelShare = None,
    allow_partial: AllowPartial = False,
    config: ConfigFile = None,
    set_: Overrides = None,
    resume: Resume = False,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Train LiDAR semantic segmentation on labelled keyframes."""
    from picture3d.commands.train import finetune as command

    _show(
        command(
            out,
            task="segmentation",
            data=data,
            recipe=recipe,
            encoder=encoder,
            label_share=label_share,
            allow_partial=allow_partial,
            config=config,
            overrides=set_ or [],
            resume=resume,
            device=device,
            threads=threads,
        )
    )


@finetune_app.command("detection")
def finetune_detection(
    out: RunFolderOption,
    data: DataOption = None,
    recipe: FinetuneRecipe = "town-detection",
    encoder: Encoder = None,
    label_share: LabelShare = None,
    allow_partial: AllowPartial = False,
    config: ConfigFile = None,
    set_: Overrides = None,
    resume: Resume = False,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Train a 3-D object detector on annotated keyframes."""
    from picture3d.commands.train import finetune as command

    _show(
        command(
            out,
            task="detection",
            data=data,
            recipe=recipe,
            encoder=encoder,
            label_share=label_share,
            allow_partial=allow_partial,
            config=config,
            overrides=set_ or [],
            resume=resume,
            device=device,
            threads=threads,
        )
    )


@finetune_app.command("occupancy")
def finetune_occupancy(
    out: RunFolderOption,
    data: DataOption = None,
    recipe: FinetuneRecipe = "town-occupancy",
    encoder: Encoder = None,
    label_share: LabelShare = None,
    allow_partial: AllowPartial = False,
    config: ConfigFile = None,
    set_: Overrides = None,
    resume: Resume = False,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Train semantic occupancy on keyframes with occupancy labels."""
    from picture3d.commands.train import finetune as command

    _show(
        command(
            out,
            task="occupancy",
            data=data,
            recipe=recipe,
            encoder=encoder,
            label_share=label_share,
            allow_partial=allow_partial,
            config=config,
            overrides=set_ or [],
            resume=resume,
            device=device,
            threads=threads,
        )
    )


@app.command()
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

    _show(command(run, data=data, split=split, as_json=as_json, device=device, threads=threads))


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

    _show(command(results, labels=labels, split=split, bike_racks=bike_racks, as_json=as_json))


@score_app.command("waymo-detection")
def score_waymo_detection(
    predictions: Annotated[Path, typer.Argument(help="Predictions: an Objects binary.")],
    labels: Annotated[Path, typer.Argument(help="Labels: an Objects binary with difficulty and points per box.")],
    iou: Annotated[list[str] | None, typer.Option(help="CLASS=THRESHOLD, for example vehicle=0.7. Repeatable.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON by the official names instead of a table.")] = False,
) -> None:
    """Score Waymo detections: AP and APH per class, range and level, as the official metric does."""
    from picture3d.commands.score_waymo import score_waymo_detection as command

    _show(command(predictions, labels, iou=iou or [], as_json=as_json))


@score_app.command("occupancy")
def score_occupancy(
    predictions: Annotated[Path, typer.Argument(help="Folder scene_<token>/occupancy/<token>.npy: rows z, y, x, class.")],
    labels: Annotated[Path, typer.Option(help="Prepared frames with occupancy labels attached.")],
    split: Annotated[str, typer.Option(help="Which split of them.")] = "val",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Score occupancy predictions as OpenOccupancy does: geometric IoU, IoU per class and its mean over 16 classes."""
    from picture3d.commands.score_occupancy import score_occupancy as command

    _show(command(predictions, labels, split=split, as_json=as_json))


@app.command()
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

    _show(
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


@app.command()
def probe(
    run: Annotated[Path, typer.Argument(help="Run folder of a pre-training or fine-tuning.")],
    data: DataOption = None,
    label_share: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the labelled scenes to train on.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampled voxels.")] = 0,
    split: Annotated[str, typer.Option("--split", help="Scored split.")] = "val",
    knn: Annotated[int, typer.Option("--knn", min=0, help="Nearest labelled voxels that vote; 0 leaves them out.")] = 20,
    teacher: Annotated[
        bool, typer.Option("--teacher", help="Look at the teacher of a pre-training instead of its encoder.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Read a frozen encoder's features out: linear classifier, nearest neighbours, effective rank; class by class."""
    from picture3d.commands.probe import probe as command

    told = command(
        run,
        data=data,
        label_share=label_share,
        seed=seed,
        as_json=as_json,
        device=device,
        threads=threads,
        split=split,
        neighbours=knn,
        teacher=teacher,
    )
    _show(told)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="Run folder or checkpoint of a pre-training or fine-tuning.")],
    others: Annotated[list[Path], typer.Argument(help="One or several more; each is compared with the first.")],
    data: DataOption = None,
    split: Annotated[str | None, typer.Option("--split", help="Default: val if there is one.")] = None,
    frames: Annotated[int, typer.Option("--frames", min=1, help="Sweeps they look at, evenly spread.")] = 4,
    out: Annotated[Path | None, typer.Option("--out", help="Leave JSON and heat maps here; `report` shows them.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Compare encoders layer by layer: linear CKA of all layers, disparity of the weights."""
    from picture3d.commands.compare import compare as command

    told = command(
        first, others, data=data, split=split, frames=frames, out=out, as_json=as_json, device=device, threads=threads
    )
    _show(told)


@experiment_app.command("label-efficiency")
def experiment_label_efficiency(
    out: Annotated[Path, typer.Option("--out", help="Folder of the experiment; what is finished there is not done again.")],
    data: Annotated[Path, typer.Option("--data", help="Folder of prepared frames, with stored targets for their recipes.")],
    methods: Annotated[
        str, typer.Option(help="scratch, or names of pre-training recipes, by comma; gains are over the first.")
    ] = "scratch,town-coordinates,town-picture,town-picture-visible",
    shares: Annotated[str, typer.Option(help="Shares of the labelled scenes, by comma.")] = "0.0625,0.25,1",
    seeds: Annotated[str, typer.Option(help="Seeds, by comma.")] = "0,1,2",
    recipe: Annotated[str, typer.Option("--recipe", help="Segmentation recipe of all cells.")] = "town-segmentation",
    pretrain_set: Annotated[
        list[str] | None, typer.Option("--pretrain-set", metavar="KEY=VALUE", help="Change every pre-training. Repeatable.")
    ] = None,
    finetune_set: Annotated[
        list[str] | None, typer.Option("--finetune-set", metavar="KEY=VALUE", help="Change every fine-tuning. Repeatable.")
    ] = None,
    split: Annotated[str, typer.Option("--split", help="Scored split.")] = "val",
    probe_share: Annotated[
        float | None, typer.Option("--probe", help="Also probe each frozen encoder on this share of the labelled scenes.")
    ] = None,
    encoders: Annotated[
        int | None,
        typer.Option(help="Pre-train so many per method; seed s begins from number s modulo this. Default: one per seed."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Fine-tune from several encoders at several shares of the labels; table with mean, spread and confidence interval."""
    from picture3d.commands.experiment import Plan, label_efficiency_experiment

    plan = Plan(
        data=data,
        methods=tuple(methods.split(",")),
        shares=tuple(_numbers(shares, float, "--shares")),
        seeds=tuple(_numbers(seeds, int, "--seeds")),
        finetuning=recipe,
        pretrain_set=tuple(pretrain_set or ()),
        finetune_set=tuple(finetune_set or ()),
        split=split,
        probe_share=probe_share,
        encoders=encoders,
    )
    _show(label_efficiency_experiment(plan, out, device=device, threads=threads, as_json=as_json))


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder that holds run folders (as `demo` leaves it), or an experiment.")],
    data: DataOption = None,
    out: Annotated[Path | None, typer.Option("--out", help="The page; default FOLDER/report.html.")] = None,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Write one self-contained page: what was run, curves, scores and pictures."""
    from picture3d.commands.report import report as command

    _show(command(folder, data=data, out=out, device=device, threads=threads))


@app.command()
def tensorboard(
    run: Annotated[Path, typer.Argument(help="Run folder of a training.")],
    out: Annotated[Path | None, typer.Option("--out", help="Event folder; default RUN/tensorboard.")] = None,
) -> None:
    """Replay a run's metrics into TensorBoard event files (extra: track)."""
    from picture3d.commands.train import tensorboard as command

    _show(command(run, out))


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe's whole config as JSON.")] = None,
) -> None:
    """List the recipes, or print one."""
    from picture3d.commands.train import describe_recipes as command

    _show(command(name))


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder of the demo; a second run goes on from what is finished.")] = Path(
        "demo"
    ),
    tiny: Annotated[bool, typer.Option("--tiny", help="The same steps on a handful of frames, in under a minute.")] = False,
    threads: Threads = 0,
) -> None:
    """See the whole of PICTURE work on a built-in town: data, teacher, pre-training, fine-tuning, scores, report."""
    from picture3d.commands.demo import demo as command

    _show(command(out, tiny=tiny, threads=threads))


weights_app = typer.Typer(no_args_is_help=True, help="Look into checkpoints; exchange them with OpenPCDet's layout.")
app.add_typer(weights_app, name="weights")
WeightsRecipe = Annotated[str | None, typer.Option("--recipe", help="Compare with the network of this recipe.")]


@weights_app.command("show")
def weights_show(
    file: Annotated[Path, typer.Argument(help="Run folder, .safetensors, or a .pth of OpenPCDet.")],
    recipe: WeightsRecipe = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor with its shape.")] = False,
) -> None:
    """List what a checkpoint holds and how it fits a recipe's network."""
    from picture3d.commands.weights import show as command

    _show(command(file, recipe=recipe, tensors=tensors))


@weights_app.command("import")
def weights_import(
    file: Annotated[Path, typer.Argument(help="A .pth of OpenPCDet (PICTURE, GPICTURE, DSVT), or a .safetensors.")],
    out: Annotated[Path, typer.Argument(help="The .safetensors to write.")],
    recipe: WeightsRecipe = None,
    encoder_only: Annotated[bool, typer.Option("--encoder-only", help="Take vfe and backbone_3d alone.")] = False,
    allow_partial: Annotated[bool, typer.Option("--allow-partial", help="Accept a file that fits only in part.")] = False,
) -> None:
    """Turn a checkpoint of OpenPCDet into one of ours."""
    from picture3d.commands.weights import import_weights as command

    _show(command(file, out, recipe=recipe, encoder_only=encoder_only, allow_partial=allow_partial))


@weights_app.command("export")
def weights_export(
    source: Annotated[Path, typer.Argument(help="Run folder or checkpoint.")],
    out: Annotated[Path, typer.Argument(help="The .safetensors to write, under OpenPCDet's names.")],
) -> None:
    """Write a run's network under OpenPCDet's names."""
    from picture3d.commands.weights import export_weights as command

    _show(command(source, out))


def _numbers(text: str, kind: type[_Number], option: str) -> list[_Number]:
    """Comma-separated numbers of an option."""
    try:
        return [kind(word) for word in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"expected numbers by comma, got '{text}'", param_hint=option) from None


def _show(text: str) -> None:
    if text:  # of several processes that work as one, the first speaks
        typer.echo(text)


def _version(value: bool) -> None:
    if value:
        from picture3d import __version__

        typer.echo(f"picture3d {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


def main() -> None:
    """Entry point: our own errors, and the system's, become one line on standard error and status 2; Ctrl-C status 130."""
    try:
        app()
    except Picture3dError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except OSError as error:  # what no reader or writer of ours has put into words: a disk that failed, a folder without rights
        place = f"{error.filename}: " if error.filename else ""
        typer.echo(
            f"error: {place}{error.strerror or error}. Check the path, its rights and the space on its disk; "
            "what is finished is kept, the same command goes on from it",
            err=True,
        )
        sys.exit(2)
    except (KeyboardInterrupt, SystemExit) as end:
        # The library beneath turns Ctrl-C into a silent exit of status 130 before it gets here.
        if isinstance(end, SystemExit) and end.code != _INTERRUPTED:
            raise
        typer.echo("interrupted; the same command goes on from what is finished (training: add --resume)", err=True)
        sys.exit(_INTERRUPTED)


if __name__ == "__main__":
    main()
