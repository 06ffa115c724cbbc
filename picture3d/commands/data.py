"""`synth` and `targets`."""

from __future__ import annotations

from pathlib import Path

from picture3d.datasets.prepared import PreparedDataset
from picture3d.errors import ConfigError
from picture3d.files import job_share, sole_writer
from picture3d.training.ending import ending_together
from picture3d.training.runlog import Progress


def synth(
    out: Path,
    *,
    scenes: int,
    keyframes: int,
    sweeps_per_keyframe: int | None,
    val_scenes: int,
    seed: int,
    version: str | None,
    processes: int,
    layout: str = "nuscenes",
    occupancy: bool = False,
) -> str:
    """Writes the town as raw nuScenes (with labels of the occupied space, if asked) or Waymo; returns what to tell the user.

    Raises:
        ConfigError: for an unknown `layout`, or options that only nuScenes has.
        DataError: if the folder cannot be written.
    """
    if layout in ("waymo", "waymo-v2"):
        if sweeps_per_keyframe is not None or version is not None or occupancy:
            raise ConfigError(
                "--sweeps-per-keyframe, --version and --occupancy belong to nuScenes; every frame of --format waymo is "
                "annotated. Leave them out."
            )
        second = layout == "waymo-v2"
        return _synth_waymo(out, second, scenes=scenes, frames=keyframes, val_scenes=val_scenes, seed=seed, processes=processes)
    if layout != "nuscenes":
        raise ConfigError(f"--format {layout}: no such format. Choose nuscenes, waymo or waymo-v2.")
    version = "v1.0-mini" if version is None else version
    from picture3d.synthetic.nuscenes_writer import write_nuscenes

    with sole_writer(out), Progress("synth", unit="sweeps") as progress:
        write_nuscenes(
            out,
            version=version,
            scenes=scenes,
            keyframes_per_scene=keyframes,
            sweeps_per_keyframe=9 if sweeps_per_keyframe is None else sweeps_per_keyframe,
            val_scenes=val_scenes,
            seed=seed,
            processes=processes,
            progress=progress,
        )
    if occupancy:
        from picture3d.synthetic.occupancy import write_occupancy

        with sole_writer(out), Progress("occupancy", unit="keyframes") as progress:
            write_occupancy(out, processes=processes, progress=progress)
    then = f", then picture3d prepare occupancy {out} OUT" if occupancy else ""
    return (
        f"{out}: raw nuScenes {version}, {scenes} scenes of {keyframes} keyframes. "
        f"Next: picture3d prepare nuscenes {out} OUT{then}"
    )


def _synth_waymo(out: Path, second: bool, *, scenes: int, frames: int, val_scenes: int, seed: int, processes: int) -> str:
    from picture3d.synthetic.waymo_v2_writer import write_waymo_v2
    from picture3d.synthetic.waymo_writer import write_waymo

    with sole_writer(out), Progress("synth", unit="frames") as progress:
        write = write_waymo_v2 if second else write_waymo
        write(
            out,
            scenes=scenes,
            frames_per_scene=frames,
            seed=seed,
            val_scenes=val_scenes,
            processes=processes,
            progress=progress,
        )
    version = "v2" if second else "v1"
    return f"{out}: raw Waymo {version}, {scenes} segments of {frames} frames. Next: picture3d prepare waymo {out} OUT"


def targets(
    prepared: Path,
    *,
    teacher: str,
    weights: Path | None,
    superclasses: int,
    seed: int,
    device: str,
    threads: int,
    codec: str = "auto",
) -> str:
    """Runs a teacher over the keyframes; returns what to tell the user."""
    from picture3d.commands.build import build_teacher
    from picture3d.commands.machine import start
    from picture3d.teachers.store import store_folder
    from picture3d.teachers.targets import compute_targets
    from picture3d.training.distributed import launched_place

    share = job_share()
    machine = start(device, threads, launched_place())
    dataset = PreparedDataset(prepared)
    network = build_teacher(teacher, weights, machine)
    folder = store_folder(prepared, network.name)
    with ending_together(share), sole_writer(folder, share=share), Progress("targets") as progress:
        summary = compute_targets(
            dataset, network, num_superclasses=superclasses, seed=seed, codec=codec, progress=progress, share=share
        )
    return (
        f"{summary.folder}: {summary.logs} logs ({summary.logs_made} made now), {summary.frames} keyframes, "
        f"{summary.cells:,} cells, {summary.bytes / 1e6:.1f} MB, "
        f"mean cosine {summary.mean_cosine:.4f}; teacher '{network.name}', {network.dimension} columns, "
        f"licence: {network.licence}"
    )
