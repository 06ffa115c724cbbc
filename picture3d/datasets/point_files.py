"""A folder of the user's own sweeps -> prepared frames. Labels and poses are optional."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from picture3d.datasets.label_sets import label_set as find_label_set
from picture3d.datasets.prepared import LogHeader, PreparedSummary
from picture3d.datasets.preparing import (
    LogPlan,
    Progress,
    checksum,
    file_size,
    finite_points,
    keep_points,
    previous_sweeps,
    write_logs,
)
from picture3d.datasets.sweep_files import LABEL_SUFFIXES, SWEEP_SUFFIXES, read_labels, read_points, read_poses
from picture3d.errors import DataError
from picture3d.formats.columns import PLANES, Codec
from picture3d.formats.point_tables import parse_layout
from picture3d.structures.frame import Frame
from picture3d.structures.points import IntensityUnit
from picture3d.structures.poses import Pose

_PREPARER = "points/1"  # raise when the same files would give other prepared frames


@dataclass(frozen=True, slots=True)
class SweepFile:
    """A sweep and what belongs to it."""

    path: Path
    label: Path | None
    pose: Pose | None


def prepare_points(
    folder: Path,
    out: Path,
    *,
    layout: str = "x,y,z,intensity",
    intensity_unit: IntensityUnit | str = IntensityUnit.UNKNOWN,
    label_dir: Path | None = None,
    label_set: str | None = None,
    poses: Path | None = None,
    rate_hz: float = 10.0,
    sweeps: int = 9,
    val: int | Sequence[str] = 0,
    name: str = "points",
    xyz_codec: Codec = PLANES,
    processes: int = 1,
    progress: Progress | None = None,
) -> PreparedSummary:
    """Prepares sweeps in the order of their names (numbers in names count as numbers); a rerun makes only what is missing.

    Sweeps directly in `folder` form one log; otherwise every sub-folder with sweeps is a log. All frames are keyframes.
    Points with NaN or infinite values are left out, with their labels, and counted. An empty sweep is a frame. A log with a
    damaged sweep, or with labels that do not fit, is set aside.

    Args:
        folder: the sweeps: ``.bin`` (float32), ``.npy``, ``.pcd``, ``.ply``, mixed as you like.
        out: folder for the prepared frames.
        layout: columns of ``.bin`` and ``.npy`` files in their order; ``-`` leaves one out. Known: x y z intensity ring
            elongation time_s. ``.pcd``, ``.ply`` and structured ``.npy`` name their columns themselves.
            Without intensity it is 0 everywhere.
        intensity_unit: what the intensity column holds.
        label_dir: folder of label files named as the sweeps (in sub-folders named as the logs, if there are several): ``.npy``
            or ``.txt`` integers, ``.bin`` bytes, ``.label`` uint32 (class in the low 16 bits, instance in the high ones).
        label_set: what the labels mean, see ``label_sets``; ``plain`` takes them as training classes, 0 ignored.
        poses: text file with 12 numbers per sweep and line, ``global_from_lidar`` row by row (KITTI); with several logs a
            folder of ``<log>.txt``. Without poses every sweep stands alone.
        rate_hz: sweeps per second, for the timestamps.
        sweeps: how many earlier sweeps each frame is linked to, if there are poses.
        val: the validation split: how many of the last sweeps (of one log) or logs, or their names without suffix. The
            held-out sweeps of a single log become a log of their own, ``<log>-val``.
        name: name of the dataset.
        xyz_codec: how coordinates are stored; the default is lossless.
        processes: logs made side by side. The bytes do not depend on it.
        progress: called with (frames done, frames in all).

    Raises:
        DataError: if there is nothing to read, settings or poses do not fit the sweeps, or no log could be read.
    """
    columns = parse_layout(layout)
    unit = _unit(intensity_unit)
    if label_dir is None and label_set is not None:
        raise DataError(
            f"label set '{label_set}' was given without a folder of labels (--labels). Give the folder too, or leave "
            "--label-set out."
        )
    meaning = None if label_dir is None else find_label_set(label_set or "plain").name
    source = {"preparer": _PREPARER, "layout": layout, "intensity": str(unit), "rate_hz": rate_hz, "sweeps": sweeps}
    source["xyz_codec"] = str(xyz_codec)
    plans, splits = _split(point_logs(folder, label_dir, poses), val, folder)
    if label_dir is not None and not any(sweep.label for sweeps in plans.values() for sweep in sweeps):
        raise DataError(
            f"{label_dir}: no label file has the name of a sweep. Rename them, for example to {_expected_label(plans)}."
        )
    logs: list[LogPlan] = []
    for log, files in plans.items():
        header = LogHeader(log, name, meaning, {**source, "files_crc32c": _fingerprint(files)})
        frames = partial(_frames, log, files, columns, unit, rate_hz, sweeps)
        logs.append(LogPlan(header, len(files), frames))
    return write_logs(
        out,
        logs,
        name=name,
        label_set_name=meaning,
        splits=splits,
        xyz_codec=xyz_codec,
        processes=processes,
        progress=progress,
    )


def _frames(
    log: str, files: Sequence[SweepFile], layout: tuple[str, ...], unit: IntensityUnit, rate_hz: float, sweeps: int
) -> Iterator[tuple[Frame, int]]:
    for index, file in enumerate(files):
        previous = previous_sweeps(index, sweeps) if file.pose is not None else ()
        yield frame_of_file(log, index, file, layout, unit, rate_hz=rate_hz, previous=previous)


def frame_of_file(
    log: str,
    index: int,
    file: SweepFile,
    layout: tuple[str, ...],
    unit: IntensityUnit,
    *,
    rate_hz: float = 10.0,
    previous: tuple[int, ...] = (),
) -> tuple[Frame, int]:
    """A frame, and how many points it lost because they were not finite.

    Raises:
        DataError: if a file is damaged, or labels and points are not as many.
    """
    points = read_points(file.path, layout, unit)
    labels = instances = None
    if file.label is not None:
        labels, instances = read_labels(file.label)
        if len(labels) != len(points):
            raise DataError(
                f"{file.label}: {len(labels)} labels for the {len(points)} points of {file.path.name}. Copy both again, or "
                "make the labels anew from this sweep."
            )
    points, labels, instances, lost = keep_points(finite_points(points), points, labels, instances)
    frame = Frame(
        log=log,
        index=index,
        token=file.path.name,
        timestamp_us=round(index * 1e6 / rate_hz),
        points=points,
        global_from_ego=file.pose,
        ego_from_lidar=Pose.identity(),
        labels=labels,
        instances=instances,
        previous=previous,
    )
    return frame, lost


def point_logs(folder: Path, label_dir: Path | None = None, poses: Path | None = None) -> dict[str, list[SweepFile]]:
    """Log -> its sweeps in order; see :func:`prepare_points`.

    Raises:
        DataError: if there are none, or poses do not fit them.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of sweeps. Check the path.")
    if label_dir is not None and (not label_dir.is_dir() or label_dir.resolve() == folder.resolve()):
        raise DataError(
            f"{label_dir}: labels need a folder of their own, beside the sweeps. Move them into one and name it with --labels."
        )
    sweeps = _sweep_files(folder)
    if sweeps:
        trajectory = None if poses is None else poses
        return {folder.resolve().name: _joined(sweeps, label_dir, trajectory)}
    logs = {}
    for sub in sorted((path for path in folder.iterdir() if path.is_dir()), key=lambda path: _natural(path.name)):
        sweeps = _sweep_files(sub)
        if sweeps:
            labels = None if label_dir is None else label_dir / sub.name
            logs[sub.name] = _joined(sweeps, labels, None if poses is None else poses / f"{sub.name}.txt")
    if not logs:
        raise DataError(
            f"{folder}: neither it nor its sub-folders hold sweeps ({', '.join(SWEEP_SUFFIXES)}). Name the folder that holds "
            "them."
        )
    return logs


def _sweep_files(folder: Path) -> list[Path]:
    found = (p for p in folder.iterdir() if p.suffix.lower() in SWEEP_SUFFIXES and not p.name.startswith(".") and p.is_file())
    return sorted(found, key=lambda path: _natural(path.name))


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key under which ``sweep2`` comes before ``sweep10``."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if i % 2 else (0, part) for i, part in enumerate(parts)] + [(0, name)]


def _stem(path: Path) -> str:
    return path.name[: -len(path.suffix)].removesuffix(".pcd")


def _joined(sweeps: list[Path], label_dir: Path | None, poses: Path | None) -> list[SweepFile]:
    """Sweep files with their label files and poses."""
    trajectory: Sequence[Pose | None] = [None] * len(sweeps) if poses is None else read_poses(poses)
    if len(trajectory) != len(sweeps):
        raise DataError(
            f"{poses}: {len(trajectory)} poses for the {len(sweeps)} sweeps in {sweeps[0].parent}. Write one pose for each "
            "sweep, in the order of their names."
        )
    labels: dict[str, Path] = {}
    if label_dir is not None and label_dir.is_dir():
        for suffix in reversed(LABEL_SUFFIXES):
            labels |= {_stem(path): path for path in sorted(label_dir.glob(f"*{suffix}"))}
    return [SweepFile(path, labels.get(_stem(path)), pose) for path, pose in zip(sweeps, trajectory, strict=True)]


def _split(
    logs: dict[str, list[SweepFile]], val: int | Sequence[str], folder: Path
) -> tuple[dict[str, list[SweepFile]], dict[str, list[str]]]:
    """Logs and splits; of a single log the held-out sweeps become a log of their own."""
    single = len(logs) == 1
    log, sweeps = next(iter(logs.items()))
    names = [_stem(sweep.path) for sweep in sweeps] if single else list(logs)
    wanted = set(names[max(0, len(names) - val) :]) if isinstance(val, int) else set(val)
    unknown = wanted - set(names)
    if unknown:
        kind = "sweep" if single else "log"
        raise DataError(
            f"{folder}: no {kind} is called {', '.join(sorted(unknown))}, which the validation split names. Correct the split."
        )
    if wanted and len(wanted) == len(set(names)):
        raise DataError(
            f"{folder}: the validation split takes all {len(names)} sweeps or logs, nothing is left to train on. Lower --val."
        )
    if not single:
        return logs, {
            "train": [name for name in names if name not in wanted],
            "val": [name for name in names if name in wanted],
        }
    held_out = [sweep for sweep in sweeps if _stem(sweep.path) in wanted]
    if not held_out:
        return logs, {"train": [log], "val": []}
    kept = [sweep for sweep in sweeps if _stem(sweep.path) not in wanted]
    return {log: kept, f"{log}-val": held_out}, {"train": [log], "val": [f"{log}-val"]}


def _unit(unit: IntensityUnit | str) -> IntensityUnit:
    try:
        return IntensityUnit(unit)
    except ValueError:
        raise DataError(f"intensity unit '{unit}' is none of {', '.join(IntensityUnit)}. Choose one of these.") from None


def _fingerprint(files: list[SweepFile]) -> int:
    """A checksum of what a log is made from: file names and sizes, poses."""

    def line(file: SweepFile) -> list[object]:
        pose = None if file.pose is None else file.pose.matrix[:3].ravel().tolist()
        label = None if file.label is None else [file.label.name, file_size(file.label)]
        return [file.path.name, file_size(file.path), label, pose]

    return checksum(line(file) for file in files)


def _expected_label(plans: dict[str, list[SweepFile]]) -> str:
    log, sweeps = next(iter(plans.items()))
    return f"{_stem(sweeps[0].path)}.npy" if len(plans) == 1 else f"{log}/{_stem(sweeps[0].path)}.npy"
