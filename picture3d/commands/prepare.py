"""`picture3d prepare semantickitti`, `prepare argoverse2` and `prepare once`."""

from __future__ import annotations

from pathlib import Path

from picture3d.commands.data import prepared_line
from picture3d.training.runlog import Progress


def prepare_semantickitti(raw: Path, out: Path, *, sweeps: int, skip_missing: bool) -> str:
    """Prepares SemanticKITTI; returns what to tell the user."""
    from picture3d.datasets.semantickitti import prepare_semantickitti as prepare

    with Progress("prepare", unit="frames") as progress:
        return prepared_line(prepare(raw, out, sweeps=sweeps, skip_missing=skip_missing, progress=progress))
