"""Memory and time to read Waymo v2 range images: one row group, as long as the published ones or shorter.

    python benchmarks/waymo_v2_reading.py [--rows 20 80]

Makes a component `lidar` whose rows, 64 x 2650 pixels of both returns (30 % of them noise, which nothing compresses), lie in
one row group of Brotli, as in the published files, and reads it frame by frame in a process of its own. The peak of a process
that only opens the file is printed beside it, because most of it is the program itself and pyarrow.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from picture3d.datasets.projection import peak_memory
from picture3d.formats.waymo_frame import LASER_NAMES
from picture3d.formats.waymo_v2 import LIDAR, ImageRows
from picture3d.synthetic.waymo_v2_writer import component_schemas

SHAPE = (64, 2650, 4)


def write(path: Path, rows: int) -> None:
    """A component of `rows` rows in one row group."""
    schema = component_schemas()[LIDAR]
    rng = np.random.default_rng(0)
    tables = []
    for row in range(rows):
        image = np.where(rng.random(SHAPE) < 0.3, rng.random(SHAPE), -1).astype(np.float32).ravel()
        cells = {"key.segment_context_name": "s", "key.frame_timestamp_micros": row // 5, "key.laser_name": row % 5 + 1}
        for name in schema.names[3:]:
            cells[name] = image if name.endswith("values") else list(SHAPE)
        tables.append(pa.table([pa.array([cells[name]], schema.field(name).type) for name in schema.names], schema=schema))
    parquet.write_table(pa.concat_tables(tables), path, row_group_size=rows, compression="brotli", use_dictionary=False)


def read(path: Path, most: int) -> None:
    """Prints seconds, images and the peak of this process, in MB."""
    start, images = time.perf_counter(), 0
    component = ImageRows(path, LIDAR)
    for frame in range(most):
        images += len(component.take(frame))
    peak = (peak_memory() or 0) / 1e6
    print(time.perf_counter() - start, images, peak)


def main() -> None:
    """Prints one line per length."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[20, 80])
    parser.add_argument("--read", type=Path)
    parser.add_argument("--frames", type=int, default=0)
    args = parser.parse_args()
    if args.read is not None:
        read(args.read, args.frames)
        return
    print(f"{platform.platform()}, {os.cpu_count()} cores, pyarrow {pa.__version__}, numpy {np.__version__}, one thread")
    for rows in args.rows:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "s.parquet"
            write(path, rows)
            told = []
            for frames in (0, rows // len(LASER_NAMES)):
                words = [sys.executable, __file__, "--read", str(path), "--frames", str(frames)]
                told.append(subprocess.run(words, check=True, capture_output=True, text=True).stdout.split())
            (_, _, opened), (seconds, images, peak) = told
            whole = rows * 2 * np.prod(SHAPE) * 4 / 1e6
            each = 1e3 * float(seconds) / int(images)
            print(
                f"{rows} rows, {whole:.0f} MB decoded, {path.stat().st_size / 1e6:.0f} MB on disk: "
                f"peak {float(peak):.0f} MB (only opened: {float(opened):.0f} MB), {each:.0f} ms a row"
            )


if __name__ == "__main__":
    main()
