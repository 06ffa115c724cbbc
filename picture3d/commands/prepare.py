"""`picture3d prepare ...`: raw logs of every kind -> prepared frames; occupancy labels beside them.

Each function returns what to tell the user, and whether everything could be read: a log with a damaged file is set aside.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Protocol

from picture3d.datasets.prepared import PreparedSummary
from picture3d.datasets.preparing import Progress as ProgressCallback
from picture3d.errors import ConfigError
from picture3d.files import job_share, sole_writer
from picture3d.formats.columns import PLANES, Codec, CodecKind
from picture3d.training.ending import ending_together
from picture3d.training.runlog import Progress


def codec_of_step(xyz_step: float) -> Codec:
    """How coordinates are stored: rounded to `xyz_step` metres, 0 for exactly.

    Raises:
        ConfigError: if there can be no such step.
    """
    try:
        return Codec(CodecKind.GRID, xyz_step) if xyz_step else PLANES
    except ValueError:
        raise ConfigError(
            f"--xyz-step {xyz_step}: no step to round to. Give metres, such as 0.001, or 0 to round nothing"
        ) from None


def prepare_nuscenes(
    raw: Path, out: Path, *, version: str, sweeps: int, skip_missing: bool, xyz_step: float = 0.0, processes: int = 1
) -> tuple[str, bool]:
    """Prepares raw nuScenes."""
    from picture3d.datasets.nuscenes import prepare_nuscenes as prepare

    chosen = partial(prepare, raw, out, version=version, sweeps=sweeps, skip_missing=skip_missing)
    return _prepared(out, chosen, xyz_step, processes)


def prepare_points(
    folder: Path,
    out: Path,
    *,
    layout: str,
    intensity: str,
    labels: Path | None,
    label_set: str | None,
    poses: Path | None,
    val: int,
    name: str,
    xyz_step: float = 0.0,
    processes: int = 1,
) -> tuple[str, bool]:
    """Prepares a folder of sweeps."""
    from picture3d.datasets.point_files import prepare_points as prepare

    chosen = partial(
        prepare,
        folder,
        out,
        layout=layout,
        intensity_unit=intensity,
        label_dir=labels,
        label_set=label_set,
        poses=poses,
        val=val,
        name=name,
    )
    return _prepared(out, chosen, xyz_step, processes)


def prepare_semantickitti(
    raw: Path, out: Path, *, sweeps: int, skip_missing: bool, xyz_step: float = 0.0, processes: int = 1
) -> tuple[str, bool]:
    """Prepares SemanticKITTI."""
    from picture3d.datasets.semantickitti import prepare_semantickitti as prepare

    return _prepared(out, partial(prepare, raw, out, sweeps=sweeps, skip_missing=skip_missing), xyz_step, processes)


def prepare_argoverse2(
    raw: Path, out: Path, *, sweeps: int, skip_missing: bool, xyz_step: float = 0.0, processes: int = 1
) -> tuple[str, bool]:
    """Prepares Argoverse 2 sensor logs."""
    from picture3d.datasets.argoverse2 import prepare_argoverse2 as prepare

    return _prepared(out, partial(prepare, raw, out, sweeps=sweeps, skip_missing=skip_missing), xyz_step, processes)


def prepare_once(
    raw: Path, out: Path, *, sweeps: int, skip_missing: bool, xyz_step: float = 0.0, processes: int = 1
) -> tuple[str, bool]:
    """Prepares ONCE."""
    from picture3d.datasets.once import prepare_once as prepare

    return _prepared(out, partial(prepare, raw, out, sweeps=sweeps, skip_missing=skip_missing), xyz_step, processes)


def prepare_waymo(
    raw: Path, out: Path, *, sweeps: int, skip_missing: bool = False, xyz_step: float = 0.0, processes: int = 1
) -> tuple[str, bool]:
    """Prepares the Waymo Open Dataset, v1.x or v2, whichever lies in `raw`.

    Raises:
        ConfigError: if it is v2 and pyarrow is not installed.
        DataError: if there is nothing to read, or both versions, or nothing could be read.
    """
    from picture3d.datasets.waymo import prepare_waymo as prepare_v1
    from picture3d.datasets.waymo_v2 import prepare_waymo_v2, waymo_version

    if waymo_version(raw) == 2:  # what is missing there is a component, and its segment is set aside
        return _prepared(out, partial(prepare_waymo_v2, raw, out, sweeps=sweeps), xyz_step, processes)
    return _prepared(out, partial(prepare_v1, raw, out, sweeps=sweeps, skip_missing=skip_missing), xyz_step, processes)


class _Prepare(Protocol):
    def __call__(self, *, xyz_codec: Codec, processes: int, progress: ProgressCallback) -> PreparedSummary: ...


def _prepared(out: Path, prepare: _Prepare, xyz_step: float, processes: int) -> tuple[str, bool]:
    codec, share = codec_of_step(xyz_step), job_share()
    with ending_together(share), sole_writer(out, share=share), Progress("prepare", unit="frames") as progress:
        summary = prepare(xyz_codec=codec, processes=processes, progress=progress)
    return "\n".join([*summary.set_aside, _summary_line(summary)]), not summary.set_aside


def _summary_line(summary: PreparedSummary) -> str:
    parts = [
        f"{summary.root}: {summary.logs} logs ({summary.logs_made} made now)",
        f"{summary.frames} sweeps, {summary.keyframes} keyframes, {summary.labelled} of them labelled",
        f"{summary.points:,} points, {summary.boxes:,} boxes",
    ]
    if summary.missing_files:
        parts.append(f"{summary.missing_files} files were not on disk")
    if summary.dropped_points:
        parts.append(f"{summary.dropped_points:,} points were not finite and are left out")
    if summary.set_aside:
        parts.append(f"{len(summary.set_aside)} logs are set aside, their raw files are damaged")
    return "; ".join(parts)


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
