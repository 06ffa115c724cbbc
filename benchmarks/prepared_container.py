"""What the container of prepared frames costs: bytes, and milliseconds to write and to read a frame, codec by codec.

    python benchmarks/prepared_container.py SWEEP_FOLDER ... [--layout x,y,z,intensity]

Every folder holds sweeps of one sensor (.bin .npy .pcd .ply). For each codec of the coordinates the other columns are stored
as the package does. A frame counts as read when all its columns are decoded and checked against their checksums; the
files are in the page cache. The coordinates are compared with what was put in before anything is timed.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from picture3d.datasets.prepared import LogHeader, LogReader, LogWriter
from picture3d.datasets.sweep_files import SWEEP_SUFFIXES, read_points
from picture3d.formats.columns import PLANES, RAW, Codec, CodecKind
from picture3d.formats.point_tables import parse_layout
from picture3d.structures.frame import Frame
from picture3d.structures.points import IntensityUnit, PointCloud
from picture3d.structures.poses import Pose

CODECS = (RAW, PLANES, Codec(CodecKind.GRID, 0.001), Codec(CodecKind.GRID, 0.002))
REPEATS = 5
MAX_SWEEPS = 7


def best_ms(action: Callable[[], object], count: int) -> float:
    """Best of `REPEATS`, per frame."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times) / count * 1e3


def measure(name: str, sweeps: list[PointCloud], codec: Codec, folder: Path) -> str:
    """One row of the table."""
    path = folder / "log.p3d"
    frames = [Frame("log", i, str(i), i, points, None, Pose.identity()) for i, points in enumerate(sweeps)]

    def write() -> None:
        with LogWriter(path, LogHeader("log", "benchmark"), xyz_codec=codec) as log:
            for frame in frames:
                log.add(frame)

    write_ms = best_ms(write, len(frames))
    reader = LogReader(path)
    worst = max(float(np.abs(reader.frame(i).points.xyz - p.xyz).max(initial=0)) for i, p in enumerate(sweeps))
    if codec.lossless and worst > 0:
        raise SystemExit(f"{codec} is not lossless: {worst} m")
    read_ms = best_ms(lambda: [reader.frame(i) for i in range(len(frames))], len(frames))
    values = sum(len(p) * (3 + len(p.columns()) - 1) for p in sweeps) * 4  # every stored column as float32
    size = reader.summary.bytes
    points = sum(map(len, sweeps)) / len(sweeps)
    return (
        f"| {name} | {points:.0f} | {codec} | {size / values:.0%} | {size / len(sweeps) / 1e6:.2f} | {worst * 1e3:.2f} | "
        f"{write_ms:.1f} | {read_ms:.1f} |"
    )


def variants(name: str, sweeps: list[PointCloud]) -> list[str]:
    """Ways to store the coordinates that were tried and not taken: share of float32, ms to encode."""
    rows = []
    for label, transform in {
        "zlib 1, rows as they are": lambda x: x.tobytes(),
        "byte planes, zlib 1 (taken)": lambda x: x.view(np.uint8).reshape(len(x), -1).T.tobytes(),
        "differences of the float bits, byte planes, zlib 1": lambda x: (
            np.diff(x.view(np.int32), axis=0, prepend=np.zeros((1, 3), np.int32)).view(np.uint8).reshape(len(x), -1).T.tobytes()
        ),
    }.items():
        plain = [np.ascontiguousarray(p.xyz) for p in sweeps]
        size = sum(len(zlib.compress(transform(x), 1)) for x in plain) / sum(x.nbytes for x in plain)
        spent = best_ms(lambda t=transform, ps=plain: [zlib.compress(t(x), 1) for x in ps], len(sweeps))
        rows.append(f"| {name} | {label} | {size:.1%} | {spent:.1f} |")
    plain = [np.ascontiguousarray(p.xyz).view(np.uint8).reshape(len(p), -1).T.tobytes() for p in sweeps]
    size = sum(len(zlib.compress(x, 6)) for x in plain) / sum(map(len, plain))
    spent = best_ms(lambda: [zlib.compress(x, 6) for x in plain], len(sweeps))
    return [*rows, f"| {name} | byte planes, zlib 6 | {size:.1%} | {spent:.1f} |"]


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--layout", action="append", default=[], help="one per folder; default x,y,z,intensity")
    arguments = parser.parse_args()
    layouts = [*arguments.layout, *["x,y,z,intensity"] * len(arguments.folders)]
    machine = f"{platform.system()} {platform.processor() or platform.machine()}, {os.cpu_count()} cores, one thread used"
    versions = f"Python {platform.python_version()}, numpy {np.__version__}, zlib {zlib.ZLIB_RUNTIME_VERSION}"
    print(f"{machine}; {versions}; best of {REPEATS}, load {os.getloadavg()[0]:.1f}\n")
    sensors: dict[str, list[PointCloud]] = {}
    for folder, layout in zip(arguments.folders, layouts, strict=False):
        files = sorted(p for p in folder.iterdir() if p.suffix in SWEEP_SUFFIXES)[:MAX_SWEEPS]
        sensors[f"{folder.parent.name}/{folder.name}"] = [
            read_points(file, parse_layout(layout), IntensityUnit.UNKNOWN) for file in files
        ]
    print("| sweeps | points | codec of xyz | of float32 | MB a frame | error mm | write ms | read ms |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, sweeps in sensors.items():
            for codec in CODECS:
                print(measure(name, sweeps, codec, Path(folder)))
    print("\n| sweeps | xyz stored as | of float32 | encode ms |")
    print("|---|---|---|---|")
    for name, sweeps in sensors.items():
        print("\n".join(variants(name, sweeps)))


if __name__ == "__main__":
    main()
