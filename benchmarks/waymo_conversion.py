"""Raw Waymo v1 frames -> prepared frames: frames a second on one core, bytes a frame, and memory for few and for many frames.

    python benchmarks/waymo_conversion.py [--sweeps FOLDER | --raw FOLDER] [--many 200] [--keep FOLDER]

Frames have five LiDARs (64 x 2650 and four times 200 x 600 pixels), two returns, and a pose for every pixel of the TOP LiDAR.
`--sweeps` takes real sweeps (.bin, float32 x y z tanh(intensity) elongation in the vehicle frame), which are put into range
images through the calibrations of the town's car: every point goes to its nearest pixel, the TOP LiDAR first. `--raw` takes
tfrecords as they are. Without either, the town is driven through (some 213,000 points a frame). The frames are repeated, with
times that grow, to make the long segment; peak memory is that of a process of its own, which does nothing else. `--keep`
leaves the long segment, prepared without loss, for `loading.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from picture3d.datasets.prepared import PreparedDataset
from picture3d.datasets.waymo import frame_of_waymo, segment_files
from picture3d.formats.columns import PLANES, Codec, CodecKind
from picture3d.formats.protobuf_wire import write_integer
from picture3d.formats.tfrecord import RecordWriter, read_records
from picture3d.formats.waymo_frame import read_frame
from picture3d.structures.boxes import Boxes
from picture3d.synthetic.waymo_drive import LaserImages, WaymoFrame
from picture3d.synthetic.waymo_lidar import LASERS, TOP, Laser, Returns, euler_of, pose_of
from picture3d.synthetic.waymo_messages import frame_body, frame_context
from picture3d.synthetic.waymo_truth import NoLabelZone
from picture3d.synthetic.waymo_writer import write_waymo

FEW = 10
_CODECS = (PLANES, Codec(CodecKind.GRID, 0.001))


def frame_of_sweep(sweep: np.ndarray) -> bytes:
    """A frame whose range images hold the points (N, 5) of a real sweep that find a free pixel."""
    # The car turns and drives on while the TOP LiDAR turns: 1 m and 0.03 rad, from column to column.
    first = np.array([0.01, 0.02, 0.5, 1000.0, 2000.0, 30.0])
    left = np.arange(len(sweep))
    images: list[LaserImages] = []
    middle = pose_of(first.astype(np.float32))
    for laser in LASERS:
        pixel = _pixels(laser, sweep[left, :3])
        away = np.linalg.norm(sweep[left, :3] - laser.vehicle_from_laser.translation, axis=1)
        inside = np.flatnonzero((pixel >= 0) & (away < (75 if laser.name == TOP else 25)))
        _, unique = np.unique(pixel[inside], return_index=True)
        chosen = inside[unique]
        # A second point of the same pixel becomes its second return.
        rest = np.setdiff1d(inside, chosen)
        _, again = np.unique(pixel[rest], return_index=True)
        second = rest[again]
        column_pose = None
        if laser.name == TOP:
            share = np.linspace(-0.5, 0.5, laser.width)[:, None]
            column_pose = (first + share * np.array([0, 0, 0.03, 0.9, 0.5, 0])).astype(np.float32)
        returns = (
            _returns(pixel[chosen], away[chosen], sweep[left[chosen]]),
            _returns(pixel[second], away[second], sweep[left[second]]),
        )
        zones = (np.zeros(len(chosen), bool), np.zeros(len(second), bool))
        images.append(LaserImages(laser, returns, zones, column_pose, None))
        left = np.delete(left, np.concatenate([chosen, second]))
    frame = WaymoFrame(
        index=0, timestamp_us=1, global_from_vehicle=pose_of(euler_of(middle)), lasers=tuple(images), boxes=Boxes.empty(),
        box_type=np.zeros(0, np.int64), global_velocity=np.zeros((0, 2)), global_acceleration=np.zeros((0, 2)),
        num_top_points=np.zeros(0, np.int32), zone=NoLabelZone("none", np.zeros((0, 2))),
    )  # fmt: skip
    return frame_context("many", {}) + frame_body(frame)


def _pixels(laser: Laser, points: np.ndarray) -> np.ndarray:
    local = laser.vehicle_from_laser.inverse().apply(points)
    up = np.arcsin(local[:, 2] / np.linalg.norm(local, axis=1))
    azimuth = np.arctan2(local[:, 1], local[:, 0]) + laser.vehicle_from_laser.yaw
    column = np.floor((np.pi - azimuth) / (2 * np.pi) * laser.width).astype(int) % laser.width
    beams = laser.inclinations
    ring = np.searchsorted((beams[1:] + beams[:-1]) / 2, up)
    inside = (up > 2 * beams[0] - beams[1]) & (up < 2 * beams[-1] - beams[-2])
    return np.where(inside, (laser.height - 1 - ring) * laser.width + column, -1)


def _returns(pixel: np.ndarray, away: np.ndarray, rows: np.ndarray) -> Returns:
    count = len(pixel)
    return Returns(
        pixel=pixel, range_m=away.astype(np.float32), xyz_global=rows[:, :3],
        intensity=np.arctanh(np.minimum(rows[:, 3], np.tanh(9))).astype(np.float32), elongation=rows[:, 4].astype(np.float32),
        label=np.zeros(count, np.uint8), primitive=np.full(count, -1, np.int32), cover=np.zeros(count, np.uint8),
        instance=np.zeros(count, np.uint16),
    )  # fmt: skip


def frames_of(arguments: argparse.Namespace, folder: Path) -> list[bytes]:
    """The payloads of a few different frames."""
    if arguments.sweeps is not None:
        files = sorted(arguments.sweeps.glob("*.bin"))[:6]
        return [frame_of_sweep(np.fromfile(file, "<f4").reshape(-1, 5).astype(np.float64)) for file in files]
    if arguments.raw is None:
        write_waymo(folder / "town", scenes=1, frames_per_scene=5, val_scenes=0)
    raw = folder / "town" if arguments.raw is None else arguments.raw
    path = next(path for split in ("training", "validation", "testing") for path in segment_files(raw / split))
    payloads = []
    for _, payload in read_records(path):
        payloads.append(payload)
        if len(payloads) == 6:
            break
    return payloads


def write_long(root: Path, payloads: list[bytes], count: int) -> None:
    """A segment of `count` frames: the payloads again and again, with a later name and time, which win over the earlier."""
    path = root / "training" / "many.tfrecord"
    path.parent.mkdir(parents=True, exist_ok=True)
    with RecordWriter(path) as writer:
        for index in range(count):
            writer.write(payloads[index % len(payloads)] + write_integer(2, 1 + index * 100_000))


def stages(payloads: list[bytes]) -> Iterator[tuple[str, float]]:
    """Milliseconds a frame of each step alone, best of 5."""
    frames = [read_frame(payload) for payload in payloads]

    def inflate() -> None:
        for frame in frames:
            for returns in frame.lasers.values():
                for one in returns:
                    for read in (one.read_range_image, one.read_pixel_poses, one.read_segmentation):
                        read("")

    def convert() -> None:
        for frame in frames:
            frame_of_waymo(frame, "many", 0, "")

    steps = (("parse", lambda: [read_frame(p) for p in payloads]), ("inflate", inflate), ("inflate, to points, boxes", convert))
    for name, action in steps:
        best = min(_seconds(action) for _ in range(5))
        yield name, best / len(payloads) * 1e3


def _seconds(action: object) -> float:
    begin = time.process_time()
    action()  # type: ignore[operator]
    return time.process_time() - begin


def alone(raw: Path, out: Path, codec: str) -> dict[str, float]:
    """Prepares `raw` in a process of its own: frames, seconds of processor and of the clock, peak memory in bytes."""
    script = (
        "import json, resource, sys, time\nfrom pathlib import Path\n"
        "from picture3d.datasets.waymo import prepare_waymo\nfrom picture3d.formats.columns import Codec\n"
        "clock, processor = time.perf_counter(), time.process_time()\n"
        "s = prepare_waymo(Path(sys.argv[1]), Path(sys.argv[2]), xyz_codec=Codec.parse(sys.argv[3]))\n"
        "print(json.dumps({'frames': s.frames, 'points': s.points, 'clock': time.perf_counter() - clock,\n"
        "    'processor': time.process_time() - processor,\n"
        "    'peak': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, raw, out, codec], capture_output=True, text=True, check=True, env=environment
    )
    return json.loads(done.stdout)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweeps", type=Path)
    parser.add_argument("--raw", type=Path)
    parser.add_argument("--many", type=int, default=200, help="frames of the long segment; some 10 MB of disk each")
    parser.add_argument("--keep", type=Path, help="where the long segment is prepared to; it stays there")
    arguments = parser.parse_args()
    machine = f"{platform.system()} {platform.processor() or platform.machine()}, {os.cpu_count()} cores, one thread used"
    versions = f"Python {platform.python_version()}, numpy {np.__version__}, zlib {zlib.ZLIB_RUNTIME_VERSION}"
    print(f"{machine}; {versions}; load {os.getloadavg()[0]:.1f}\n")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        payloads = frames_of(arguments, folder)
        size = sum(map(len, payloads)) / len(payloads) / 1e6
        print(f"{len(payloads)} different frames, {size:.1f} MB each\n\n| step | processor ms a frame |\n|---|---|")
        for name, ms in stages(payloads):
            print(f"| {name} | {ms:.1f} |")
        print("\n| codec of xyz | frames | points a frame | frames a processor second | by the clock | peak MB | ", end="")
        print("MB a frame | of float32 | read, ms a frame |\n|---|---|---|---|---|---|---|---|---|")
        for count in (FEW, arguments.many):
            write_long(folder / str(count), payloads, count)
        for codec in _CODECS:
            for count in (FEW, arguments.many):
                out: Path = folder / f"out-{codec.kind}-{count}"
                if arguments.keep is not None and codec is PLANES and count == arguments.many:
                    out = arguments.keep
                found = alone(folder / str(count), out, str(codec))
                dataset = PreparedDataset(out)
                (log,) = dataset.logs()
                keys = dataset.keyframes()[:FEW]
                columns = sum(1 if c.ndim == 1 else c.shape[1] for c in dataset.frame(keys[0]).points.columns().values())
                read_ms = _seconds(lambda d=dataset, ks=keys: [d.frame(key) for key in ks]) / len(keys) * 1e3
                stored = dataset.summary(log).bytes
                print(
                    f"| {codec} | {found['frames']:.0f} | {found['points'] / count:.0f} | {count / found['processor']:.1f} | "
                    f"{count / found['clock']:.1f} | {found['peak'] / 1e6:.0f} | {stored / count / 1e6:.2f} | "
                    f"{stored / (4 * columns * found['points']):.0%} | {read_ms:.1f} |"
                )


if __name__ == "__main__":
    main()
