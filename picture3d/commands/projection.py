"""`data projection`: what preparing a full dataset will take on this machine."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np

from picture3d.commands.prepare import codec_of_step
from picture3d.datasets.projection import Measured, Projection, measure_prepared, measure_raw, project
from picture3d.workers import worker_pool


def data_projection(folder: Path, *, frames: int, sweeps: int, xyz_step: float, processes: int, as_json: bool) -> str:
    """Measures a sample of raw frames, or a prepared folder, and projects it to the full datasets; returns what to tell.

    Raises:
        ConfigError: if pyarrow is needed and not installed.
        DataError: if the folder is neither, or what it holds is damaged.
    """
    if (folder / "dataset.json").exists():
        work = partial(measure_prepared, folder, frames)
    else:
        codec = codec_of_step(xyz_step)
        work = partial(measure_raw, folder, frames, xyz_codec=codec, sweeps=sweeps)
    # In a process of its own, as a worker of `prepare` is: its memory is that of the work.
    with worker_pool(1) as pool:
        measured = pool.submit(work).result()
    projections = project(measured)
    if as_json:
        machine = {"cores": os.cpu_count(), "machine": platform.machine(), "system": platform.system(), "numpy": np.__version__}
        tree = {
            "measured": asdict(measured),
            "projections": [asdict(projection) for projection in projections],
            "processes": processes,
            "circumstances": machine,
        }
        return json.dumps(tree)
    return _text(folder, measured, projections, processes)


def _text(folder: Path, measured: Measured, projections: list[Projection], processes: int) -> str:
    each, cores = measured.points / measured.frames, os.cpu_count()
    lines = [
        f"{folder}: {measured.frames:,} frames of {measured.kind} ({measured.keyframes:,} keyframes), {each:,.0f} points each",
        f"measured on one core of {cores} ({platform.machine()}), numpy {np.__version__}, files in the page cache:",
    ]
    if measured.frame_seconds is None:
        lines.append("  time to prepare      not told by prepared frames; name the raw folder to have it measured")
    else:
        lines.append(f"  time to prepare      {measured.frame_seconds / measured.keyframes:.3f} s a keyframe")
    lines.append(f"  time to read again   {1e3 * measured.read_seconds / measured.keyframes:.1f} ms a keyframe")
    lines.append(f"  prepared             {measured.bytes / measured.keyframes / 1e6:.3f} MB a keyframe")
    if measured.peak_bytes is not None:
        lines.append(f"  peak memory          {measured.peak_bytes / 1e9:.2f} GB")
    if measured.table_scenes:
        lines.append(f"  tables               {measured.table_seconds:.2f} s, {measured.table_scenes} scenes")
    rows = [("", "keyframes", "core hours", f"hours, {processes} at once", "bytes", "peak memory", "one epoch")]
    for projection in projections:
        hours, peak, full = projection.hours, projection.memory(processes), projection.full
        rows.append(
            (
                f"{full.dataset} {full.split}",
                f"{full.keyframes:,}",
                "" if hours is None else f"{hours:.2f} h",
                "" if hours is None else f"{hours / processes:.2f} h",
                f"{projection.bytes / 1e9:,.1f} GB",
                "" if peak is None else f"{peak / 1e9:.2f} GB",
                f"{projection.epoch_hours:.2f} h",
            )
        )
    lines.append("projected, the rest taken to be like this sample (one epoch: reading every frame once, on one core):")
    return "\n".join([*lines, *("  " + "".join(f"{cell:>18}" for cell in row) for row in rows)])
