"""`data intensity`: how each sensor of a prepared dataset spreads its intensities."""

from __future__ import annotations

from pathlib import Path

from picture3d.datasets.prepared import PreparedDataset
from picture3d.datasets.sensor_intensity import TABLE_NAME, measure_intensity, write_table
from picture3d.training.runlog import Progress


def intensity(prepared: Path, *, split: str | None, frames: int) -> str:
    """Measures and writes the table; returns what to tell the user.

    Raises:
        DataError: if the frames cannot be read, their units differ, or the file cannot be written.
    """
    dataset = PreparedDataset(prepared)
    with Progress("intensity", unit="keyframes") as progress:
        table = measure_intensity(dataset, split=split, frames=frames, progress=progress)
    path = dataset.root / TABLE_NAME
    write_table(path, table)
    lines = [f"{path}: intensities in unit '{table.unit}' of {table.frames:,} keyframes"]
    for sensor, levels in sorted(table.quantiles.items()):
        shown = ", ".join(f"{100 * share:g} % {levels[round(256 * share)]:.4g}" for share in (0.25, 0.5, 0.75))
        lines.append(f"  sensor {sensor}: {table.points[sensor]:,} values; {shown}, largest {levels[-1]:.4g}")
    return "\n".join(lines)
