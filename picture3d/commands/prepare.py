"""`picture3d prepare waymo`, `prepare semantickitti`, `prepare argoverse2` and `prepare once`."""

from __future__ import annotations

from pathlib import Path

from picture3d.commands.data import prepared_line
from picture3d.files import job_share, sole_writer
from picture3d.training.runlog import Progress


def prepare_semantickitti(raw: Path, out: Path, *, sweeps: int, skip_missing: bool) -> str:
    """Prepares SemanticKITTI; returns what to tell the user."""
    from picture3d.datasets.semantickitti import prepare_semantickitti as prepare

    with sole_writer(out, share=job_share()), Progress("prepare", unit="frames") as progress:
        return prepared_line(prepare(raw, out, sweeps=sweeps, skip_missing=skip_missing, progress=progress))


def prepare_argoverse2(raw: Path, out: Path, *, sweeps: int, skip_missing: bool) -> str:
    """Prepares Argoverse 2 sensor logs; returns what to tell the user."""
    from picture3d.datasets.argoverse2 import prepare_argoverse2 as prepare

    with sole_writer(out, share=job_share()), Progress("prepare", unit="frames") as progress:
        return prepared_line(prepare(raw, out, sweeps=sweeps, skip_missing=skip_missing, progress=progress))


def prepare_once(raw: Path, out: Path, *, sweeps: int, skip_missing: bool) -> str:
    """Prepares ONCE; returns what to tell the user."""
    from picture3d.datasets.once import prepare_once as prepare

    with sole_writer(out, share=job_share()), Progress("prepare", unit="frames") as progress:
        return prepared_line(prepare(raw, out, sweeps=sweeps, skip_missing=skip_missing, progress=progress))


def prepare_waymo(raw: Path, out: Path, *, sweeps: int, xyz_step: float, processes: int) -> tuple[str, bool]:
    """Prepares the Waymo Open Dataset, v1.x or v2, whichever lies in `raw`.

    Returns:
        What to tell the user, and whether every segment could be read.

    Raises:
        ConfigError: if it is v2 and pyarrow is not installed.
        DataError: if there is nothing to read, or both versions, or nothing could be read.
    """
    from picture3d.datasets.waymo import prepare_waymo as prepare_v1
    from picture3d.datasets.waymo_v2 import prepare_waymo_v2, waymo_version
    from picture3d.formats.columns import PLANES, Codec, CodecKind

    prepare = prepare_waymo_v2 if waymo_version(raw) == 2 else prepare_v1
    codec = Codec(CodecKind.GRID, xyz_step) if xyz_step else PLANES
    with sole_writer(out, share=job_share()), Progress("prepare", unit="frames") as progress:
        summary = prepare(raw, out, sweeps=sweeps, xyz_codec=codec, processes=processes, progress=progress)
    return "\n".join([*summary.set_aside, prepared_line(summary)]), not summary.set_aside


def prepare_occupancy(labels: Path, prepared: Path) -> tuple[str, bool]:
    """Attaches nuScenes-Occupancy labels; returns what to tell the user, and whether every label file could be read.

    Raises:
        DataError: if they do not belong to these frames.
    """
    from picture3d.datasets.occupancy_store import occupancy_folder
    from picture3d.datasets.openoccupancy import attach_occupancy
    from picture3d.datasets.prepared import PreparedDataset

    dataset = PreparedDataset(prepared)
    with sole_writer(occupancy_folder(prepared)), Progress("prepare", unit="keyframes") as progress:
        done = attach_occupancy(labels, dataset, progress=progress)
    parts = [
        f"{done.folder}: {done.logs} logs ({done.logs_made} made now)",
        f"{done.labelled} of {done.keyframes} keyframes labelled, {done.voxels:,} occupied voxels",
        f"{done.bytes / 1e6:.1f} MB (the label files: {done.label_bytes / 1e6:.1f} MB)",
    ]
    if done.labelled < done.keyframes:
        parts.append(f"{done.keyframes - done.labelled} keyframes have no label file")
    if done.other_files:
        parts.append(f"{done.other_files} label files of these scenes belong to no prepared keyframe")
    return "\n".join([*done.set_aside, "; ".join(parts)]), not done.set_aside
