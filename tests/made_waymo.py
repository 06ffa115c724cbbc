"""Small Waymo v1 frames put together byte by byte, right or wrong in a chosen place."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from picture3d.formats.protobuf_wire import pack_varints, write_data, write_double, write_integer
from picture3d.formats.waymo_frame import CompressedReturn, WaymoFrame
from picture3d.structures.poses import Pose


def transform(matrix: np.ndarray) -> bytes:
    return b"".join(write_double(1, float(value)) for value in np.asarray(matrix).ravel())


def shape_message(dims: Sequence[int]) -> bytes:
    return write_data(2, b"".join(write_integer(1, int(dim)) for dim in dims))


def floats(values: np.ndarray, dims: Sequence[int] | None = None) -> bytes:
    """A zlib stream of a MatrixFloat; `dims` overrides what it says of its shape."""
    data = np.ascontiguousarray(values, "<f4").tobytes()
    return zlib.compress(write_data(1, data) + shape_message(values.shape if dims is None else dims), 1)


def integers(values: np.ndarray, dims: Sequence[int] | None = None) -> bytes:
    return zlib.compress(write_data(1, pack_varints(values)) + shape_message(values.shape if dims is None else dims), 1)


def calibration(
    name: int, extrinsic: np.ndarray | None = None, *, beams: Iterable[float] = (), low: float = -0.3, high: float = 0.1
) -> bytes:
    matrix = np.eye(4) if extrinsic is None else extrinsic
    out = [write_integer(1, name), *(write_double(2, beam) for beam in beams)]
    return b"".join([*out, write_double(3, low), write_double(4, high), write_data(5, transform(matrix))])


def echo(image: bytes = b"", pose: bytes = b"", segmentation: bytes = b"", camera: bytes = b"") -> bytes:
    parts = ((2, image), (3, camera), (4, pose), (6, segmentation))
    return b"".join(write_data(number, stream) for number, stream in parts if stream)


def laser(name: int, first: bytes = b"", second: bytes = b"") -> bytes:
    return write_integer(1, name) + b"".join(write_data(2 + i, part) for i, part in enumerate((first, second)) if part)


def label(
    *, kind: int = 1, id: str = "a", box: Sequence[float] = (10, 2, 1, 2, 4, 1.5, 0.3), motion: Sequence[float] = (3, 4, 0, 0),
    difficulty: int = 0, points: int | None = 7,
) -> bytes:  # fmt: skip
    out = [
        write_data(1, b"".join(write_double(i, v) for i, v in enumerate(box, 1))),
        write_data(2, b"".join(write_double(i, v) for i, v in enumerate(motion, 1))),
        write_integer(3, kind),
        write_data(4, id.encode()),
    ]
    if difficulty:
        out.append(write_integer(5, difficulty))
    if points is not None:
        out += [write_integer(7, points), write_integer(13, points - 1)]
    return b"".join(out)


@dataclass
class Made:
    """The parts of a frame; change one and ask for the bytes."""

    name: str | None = "segment"
    timestamp_us: int | None = 1_000_000
    pose: np.ndarray | None = field(default_factory=lambda: np.eye(4))
    calibrations: list[bytes] = field(default_factory=list)
    lasers: list[bytes] = field(default_factory=list)
    labels: list[bytes] = field(default_factory=list)
    extra: bytes = b""  # put before everything else

    def bytes(self) -> bytes:
        context = b"" if self.name is None else write_data(1, self.name.encode())
        context += b"".join(write_data(3, c) for c in self.calibrations)
        out = [self.extra, write_data(1, context)]
        if self.timestamp_us is not None:
            out.append(write_integer(2, self.timestamp_us))
        if self.pose is not None:
            out.append(write_data(3, transform(self.pose)))
        out += [write_data(5, part) for part in self.lasers] + [write_data(6, part) for part in self.labels]
        return b"".join(out)


def image_of(rng: np.random.Generator, height: int, width: int, share: float = 0.2) -> np.ndarray:
    """A range image in which that share of pixels holds a return."""
    image = np.full((height, width, 4), -1, np.float32)
    hit = rng.random((height, width)) < share
    count = int(hit.sum())
    image[hit, 0] = rng.uniform(0.5, 75, count)
    image[hit, 1] = rng.exponential(0.3, count)
    image[hit, 2] = rng.uniform(0, 1.5, count)
    image[hit, 3] = rng.choice([-1, 1], count)
    return image


def random_pose(rng: np.random.Generator, reach: float) -> Pose:
    """Any rotation, and a place within `reach` metres along each axis."""
    return Pose.from_quaternion(rng.normal(size=4), rng.uniform(-reach, reach, 3))


def small_frame(rng: np.random.Generator, **changes: object) -> Made:
    """TOP (4 x 6, beams given, poses, classes) and FRONT (3 x 5, a range of inclinations); both returns; two labels."""
    top, front = image_of(rng, 4, 6, 0.7), image_of(rng, 3, 5, 0.7)
    poses = np.zeros((4, 6, 6), np.float32)
    classes = rng.integers(0, 23, (4, 6, 2))
    made = Made(
        calibrations=[calibration(1, beams=[-0.3, -0.1, 0.0, 0.1]), calibration(2)],
        lasers=[
            laser(1, echo(floats(top), floats(poses), integers(classes), camera=b"not read"), echo(floats(top))),
            laser(2, echo(floats(front)), echo(floats(front))),
        ],
        labels=[label(), label(kind=2, id="b", difficulty=2)],
    )
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def streams_of(frame: WaymoFrame) -> dict[int, list[CompressedReturn]]:
    """The zlib streams of every return of a frame of v1, by LiDAR."""
    found = {name: [part for part in returns if isinstance(part, CompressedReturn)] for name, returns in frame.lasers.items()}
    assert all(len(parts) == 2 for parts in found.values())
    return found
