"""The raw nuScenes v1.0 tables, as far as LiDAR needs them, and its sweep and label files.

Tables are read as streams, row by row: of `sample_data` (cameras and radars included) and `ego_pose` only the rows of the
wanted LiDAR are kept. File names in tables are relative to the dataset's root and may not leave it.
"""

from __future__ import annotations

import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from picture3d.errors import FETCH_AGAIN, DataError
from picture3d.files import read_bounded, unreadable
from picture3d.formats.npy import array_of_npy
from picture3d.structures.poses import Pose

_CHUNK = 1 << 20
_MAX_ROW = 1 << 24  # characters of one row; real rows have some hundred
_PIECE_BYTES = 1 << 20  # asked of a zip entry at once: what it claims to hold may not be there
_MAX_SWEEP_BYTES = 1 << 28
_Row = TypeVar("_Row")


@dataclass(frozen=True, slots=True)
class RawScene:
    """A row of `scene`."""

    token: str
    name: str


@dataclass(frozen=True, slots=True, eq=False)
class RawSweep:
    """A LiDAR row of `sample_data`, joined with its ego pose, calibration and label files."""

    token: str
    sample_token: str
    timestamp_us: int
    is_keyframe: bool
    filename: str  # relative to the root, as the table says
    global_from_ego: Pose
    ego_from_lidar: Pose
    lidarseg: str | None = None  # file name of the labels, relative to the root
    panoptic: str | None = None


@dataclass(frozen=True, slots=True)
class RawAnnotation:
    """A row of `sample_annotation`; everything in global coordinates."""

    token: str
    sample_token: str
    instance_token: str
    category: str
    translation: tuple[float, float, float]  # centre, metres
    size_wlh: tuple[float, float, float]  # width, length, height, metres
    rotation: tuple[float, float, float, float]  # w, x, y, z
    prev: str  # token of the same object's annotation in the sample before, or ""
    next: str
    num_lidar_pts: int
    num_radar_pts: int
    attribute: str  # its name, "" where the object has none


@dataclass(frozen=True, slots=True)
class _DataRow:
    """A LiDAR row of `sample_data`, not yet joined."""

    sample: str
    pose: str
    calibration: str
    timestamp_us: int
    is_keyframe: bool
    filename: str


@dataclass(frozen=True, slots=True)
class RawTables:
    """What the tables say about one LiDAR."""

    scenes: tuple[RawScene, ...]  # by name
    sweeps: dict[str, tuple[RawSweep, ...]]  # scene token -> sweeps in order of time
    annotations: dict[str, RawAnnotation]  # by token
    of_sample: dict[str, tuple[str, ...]]  # sample token -> its annotation tokens
    sample_time_us: dict[str, int]
    category_index: dict[str, int]  # category name -> lidarseg id, where the table has one

    def of_scene(self, scene: RawScene) -> RawTables:
        """What they say about one scene."""
        sweeps = self.sweeps[scene.token]
        samples = dict.fromkeys(sweep.sample_token for sweep in sweeps)
        of_sample = {token: self.of_sample[token] for token in samples if token in self.of_sample}
        annotations = {token: self.annotations[token] for tokens in of_sample.values() for token in tokens}
        for annotation in list(annotations.values()):  # a velocity may reach over a sample that the LiDAR did not see
            beside = (self.annotations.get(token) for token in (annotation.prev, annotation.next))
            annotations |= {other.token: other for other in beside if other is not None}
        times = {token: self.sample_time_us[token] for token in samples}
        times |= {a.sample_token: self.sample_time_us[a.sample_token] for a in annotations.values()}
        return RawTables((scene,), {scene.token: sweeps}, annotations, of_sample, times, self.category_index)


def read_tables(root: Path, version: str, *, channel: str = "LIDAR_TOP") -> RawTables:
    """Reads the tables in ``root/version``.

    Raises:
        DataError: if a table is missing or damaged, a row lacks a key, a token is used twice or points nowhere,
            or a pose is not one.
    """
    folder = root / version
    if not folder.is_dir():
        there = sorted(path.name for path in root.glob("v1.0-*")) if root.is_dir() else []
        found = (
            f"Choose --version among {', '.join(there)}."
            if there
            else "Name the folder that holds samples/, sweeps/ and v1.0-*/."
        )
        raise DataError(f"{folder}: no such table folder. {found}")

    sensors = _keyed(folder, "sensor", lambda r: _text(r, "channel"))
    calibrations = _keyed(
        folder,
        "calibrated_sensor",
        lambda r: _pose(r) if sensors.get(_text(r, "sensor_token")) == channel else None,
    )
    scenes = _keyed(folder, "scene", lambda r: RawScene(r["token"], _text(r, "name")))
    samples = _keyed(folder, "sample", lambda r: (_text(r, "scene_token"), int(r["timestamp"])))
    rows = _keyed(
        folder, "sample_data", lambda r: _data_row(r) if _text(r, "calibrated_sensor_token") in calibrations else None
    )
    wanted_poses = {row.pose for row in rows.values()}
    poses = _keyed(folder, "ego_pose", lambda r: _pose(r) if r["token"] in wanted_poses else None)
    lidarseg = _label_files(folder, "lidarseg")
    panoptic = _label_files(folder, "panoptic")

    of_scene: dict[str, list[RawSweep]] = {token: [] for token in scenes}
    for token, row in rows.items():
        sample = _follow(samples, row.sample, "sample_data", token, "sample")
        _follow(scenes, sample[0], "sample", row.sample, "scene")
        sweep = RawSweep(
            token=token,
            sample_token=row.sample,
            timestamp_us=row.timestamp_us,
            is_keyframe=row.is_keyframe,
            filename=row.filename,
            global_from_ego=_follow(poses, row.pose, "sample_data", token, "ego_pose"),
            ego_from_lidar=calibrations[row.calibration],
            lidarseg=lidarseg.get(token),
            panoptic=panoptic.get(token),
        )
        of_scene[sample[0]].append(sweep)

    categories = _keyed(folder, "category", lambda r: (_text(r, "name"), None if r.get("index") is None else int(r["index"])))
    names = {token: name for token, (name, _) in categories.items()}
    annotations: dict[str, RawAnnotation] = {}
    if (folder / "sample_annotation.json").exists():  # v1.0-test has none
        instances = _keyed(folder, "instance", lambda r: _text(r, "category_token"))
        attributes = _keyed(folder, "attribute", lambda r: _text(r, "name"))
        annotations = _keyed(folder, "sample_annotation", lambda r: _annotation(r, instances, names, attributes))
    of_sample: dict[str, list[str]] = {}
    for token, annotation in annotations.items():
        _follow(samples, annotation.sample_token, "sample_annotation", token, "sample")
        of_sample.setdefault(annotation.sample_token, []).append(token)
    return RawTables(
        scenes=tuple(sorted(scenes.values(), key=lambda scene: scene.name)),
        sweeps={token: tuple(sorted(sweeps, key=lambda s: (s.timestamp_us, s.token))) for token, sweeps in of_scene.items()},
        annotations=annotations,
        of_sample={token: tuple(tokens) for token, tokens in of_sample.items()},
        sample_time_us={token: time_us for token, (_, time_us) in samples.items()},
        category_index={name: index for name, index in categories.values() if index is not None},
    )


def iterate_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows (JSON objects) of one table file, which is one JSON array, without holding more than a row of it.

    Raises:
        DataError: if the file is missing, cut off, or not an array of objects.
    """
    decoder = json.JSONDecoder()
    try:
        with path.open(encoding="utf-8") as file:
            text, place, row = file.read(_CHUNK).lstrip(), 1, 0
            if not text.startswith("["):
                raise DataError(f"{path}: not a JSON array. Download the metadata archive again.")
            while True:
                while place < len(text) and text[place] in " \t\r\n,":
                    place += 1
                if text[place : place + 1] == "]":
                    return
                try:
                    value, place = decoder.raw_decode(text, place)
                except (ValueError, RecursionError) as error:
                    more = file.read(_CHUNK)
                    if not more or len(text) - place > _MAX_ROW:
                        raise DataError(
                            f"{path}: row {row} is cut off or not JSON ({error}). Download the metadata archive again."
                        ) from None
                    text, place = text[place:] + more, 0
                    continue
                if not isinstance(value, dict):
                    raise DataError(f"{path}: row {row} is not an object. Download the metadata archive again.")
                yield value
                row += 1
    except FileNotFoundError:
        raise DataError(f"{path}: no such table. Download and unpack the metadata archive of this version.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}). Download the metadata archive again.") from None


def path_inside(root: Path, filename: str) -> Path:
    """The file that a table names, inside of `root`.

    Links that the user made inside of `root` are followed: only the table's words are not trusted.

    Raises:
        DataError: if the name is absolute or steps out of `root`.
    """
    relative = PurePosixPath(filename)
    if relative.is_absolute() or ".." in relative.parts or "\\" in filename or "\0" in filename or not relative.parts:
        raise DataError(
            f"{root}: a table names the file {filename!r}, which would lie outside of the dataset. Correct the name, or "
            "download the tables again."
        )
    return root / relative


def read_sweep(path: Path) -> NDArray[np.float32]:
    """(N, 5) float32 of a ``.pcd.bin`` sweep: x, y, z (m, LiDAR frame), intensity (0-255), ring.

    Raises:
        DataError: if the file is missing, absurdly large, or cut off.
    """
    data = read_bounded(path, max_bytes=_MAX_SWEEP_BYTES)
    if len(data) % 20:
        raise DataError(
            f"{path}: {len(data)} bytes are no whole number of points of 20 bytes; the file is cut off. Copy it again."
        )
    return np.frombuffer(data, "<f4").reshape(-1, 5)


def read_lidarseg(path: Path) -> NDArray[np.uint8]:
    """(N,) uint8 lidarseg ids, one per point of the sweep.

    Raises:
        DataError: if the file is missing or absurdly large.
    """
    return np.frombuffer(read_bounded(path, max_bytes=_MAX_SWEEP_BYTES), np.uint8)


def read_panoptic(path: Path) -> NDArray[np.uint16]:
    """(N,) uint16 panoptic ids (category id * 1000 + instance), one per point of the sweep.

    Raises:
        DataError: if the file is missing, absurdly large, or not an npz with a uint16 array `data`.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > _MAX_SWEEP_BYTES:
                raise DataError(f"{path}: would unpack to more than {_MAX_SWEEP_BYTES} bytes. {FETCH_AGAIN}")
            with archive.open("data.npy") as entry:
                data = array_of_npy(b"".join(iter(lambda: entry.read(_PIECE_BYTES), b"")))
    except FileNotFoundError as error:
        raise unreadable(path, error) from None
    except (OSError, LookupError, ValueError, RuntimeError, EOFError, struct.error, zlib.error, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: not a panoptic label file ({error}). Download it again.") from None
    if data.ndim != 1 or data.dtype.kind not in "ui":
        raise DataError(f"{path}: holds {data.dtype} {data.shape}, expected one integer per point. Download it again.")
    return data.astype(np.uint16)


def _keyed(folder: Path, table: str, take: Callable[[dict[str, Any]], _Row | None]) -> dict[str, _Row]:
    """Token -> what `take` keeps of its row; rows of which it keeps None are left out."""
    found: dict[str, _Row] = {}
    for number, row in enumerate(iterate_rows(folder / f"{table}.json")):
        try:
            token, kept = _text(row, "token"), take(row)
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise DataError(
                f"{folder / table}.json: row {number} (token {row.get('token')!r}) lacks or garbles {error}. "
                "Download the metadata archive again."
            ) from None
        if kept is None:
            continue
        if token in found:
            raise DataError(f"{folder / table}.json: token {token!r} is used by two rows. Download the metadata archive again.")
        found[token] = kept
    return found


def _label_files(folder: Path, table: str) -> dict[str, str]:
    if not (folder / f"{table}.json").exists():
        return {}
    rows = _keyed(folder, table, lambda r: (_text(r, "sample_data_token"), _text(r, "filename")))
    return dict(rows.values())


def _follow(table: dict[str, _Row], token: str, from_table: str, from_token: str, to_table: str) -> _Row:
    try:
        return table[token]
    except KeyError:
        raise DataError(
            f"{from_table} {from_token} points to {to_table} {token!r}, which is not in {to_table}.json. "
            "The tables are of different versions, or cut off: download the metadata archive again."
        ) from None


def _text(row: dict[str, Any], key: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise TypeError(f"{key} {value!r}, which is not text")
    return value


def _data_row(row: dict[str, Any]) -> _DataRow:
    return _DataRow(
        sample=_text(row, "sample_token"),
        pose=_text(row, "ego_pose_token"),
        calibration=_text(row, "calibrated_sensor_token"),
        timestamp_us=int(row["timestamp"]),
        is_keyframe=bool(row["is_key_frame"]),
        filename=_text(row, "filename"),
    )


def _pose(row: dict[str, Any]) -> Pose:
    translation = [float(v) for v in row["translation"]]
    if len(translation) != 3 or len(row["rotation"]) != 4 or not np.isfinite(translation).all():
        raise ValueError(f"translation {row['translation']} or rotation {row['rotation']}")
    return Pose.from_quaternion(row["rotation"], translation)


def _annotation(
    row: dict[str, Any], instances: dict[str, str], categories: dict[str, str], attributes: dict[str, str]
) -> RawAnnotation:
    x, y, z = (float(v) for v in row["translation"])
    width, length, height = (float(v) for v in row["size"])
    qw, qx, qy, qz = (float(v) for v in row["rotation"])
    if not np.isfinite([x, y, z, width, length, height, qw, qx, qy, qz]).all():
        raise ValueError("a number that is not finite")
    tokens = row["attribute_tokens"]
    if len(tokens) > 1:
        raise ValueError(f"{len(tokens)} attributes, an object has one or none")
    return RawAnnotation(
        token=row["token"],
        sample_token=_text(row, "sample_token"),
        instance_token=_text(row, "instance_token"),
        category=categories[instances[_text(row, "instance_token")]],
        translation=(x, y, z),
        size_wlh=(width, length, height),
        rotation=(qw, qx, qy, qz),
        prev=_text(row, "prev"),
        next=_text(row, "next"),
        num_lidar_pts=int(row["num_lidar_pts"]),
        num_radar_pts=int(row["num_radar_pts"]),
        attribute=attributes[tokens[0]] if tokens else "",
    )
