"""`picture3d prepare waymo`, `prepare semantickitti`, `prepare argoverse2` and `prepare once`."""

from __future__ import annotations

from pathlib import Path

from picture3d.commands.data import prepared_line
from picture3d.files import sole_writer
from picture3d.training.runlog import Progress


def prepare_semantickitti(raw: Path, out: Path, *, sweeps: int, skip_missing: bool) -> str:
    """Prepares SemanticKITTI; returns what to tell the user."""
    from picture3d.datasets.semantickitti import prepare_semantickitti as prepare

    with sole_writer(out), Progress("prepare", unit="frames") as progress:
        return prepared_line(prepare(raw, out, sweeps=sweeps, skip_missing=skip_missing, progress=progress))


def prepare_argoverse2(raw: Path, out: Path, *, sweeps: int, skip_missing: bool) -> str:
    """Prepares Argoverse 2 sensor logs; returns what to tell the user."""
    from picture3d.datasets.argoverse2 import prepare_argoverse2 as prepare

    with sole_writer(out), Progress("prepare", unit="frames") as progress:
        return prepared_line(prepare(raw, out, sweeps=sweeps, skip_missing=skip_missing, progress=progress))


def prepare_once(raw: Path, out: Path, *, sweeps: int, skip_missing: bool) -> str:
    """Prepares ONCE; returns what to tell the user."""
    from picture3d.datasets.once import prepare_once as prepare

    with sole_writer(out), Progress("prepare", unit="frames") as progress:
        return prepared_line(prepare(raw, out, sweeps=sweeps, skip_missing=skip_missing, progress=progress))


def prepare_waymo(raw: Path, out: Path, *, sweeps: int, xyz_step: float, processes: int) -> tuple[str, bool]:
    """Prepares the Waymo Open Dataset v1.x; returns what to tell the user, and whether every segment could be read.

    Raises:
        DataError: if there is nothing to read, or nothing could be read.
    """
    from picture3d.datasets.waymo import prepare_waymo as prepare
    from picture3d.formats.columns import PLANES, Codec, CodecKind

    codec = Codec(CodecKind.GRID, xyz_step) if xyz_step else PLANES
    with sole_writer(out), Progress("prepare", unit="frames") as progress:
        summary = prepare(raw, out, sweeps=sweeps, xyz_codec=codec, processes=processes, progress=progress)
    return "\n".join([*summary.set_aside, prepared_line(summary)]), not summary.set_aside
