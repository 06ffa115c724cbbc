"""Writes drives through procedural towns as a raw nuScenes v1.0 dataset that the official devkit loads.

Layout, below the root::

    <version>/*.json                       the 13 tables and lidarseg.json
    samples/LIDAR_TOP/*.pcd.bin            keyframes: float32 x, y, z, intensity (0..255), ring
    sweeps/LIDAR_TOP/*.pcd.bin             sweeps between the keyframes
    lidarseg/<version>/<token>_lidarseg.bin   uint8 per point of a keyframe, index into category.json
    maps/<token>.png                       0.1 m per pixel, 255 where there is road or pavement
    picture3d_splits.json                  settings, and which scenes are for training and which for validation

Scene k (scene-0001, ...) is a town of its own, of seed :func:`town_seed`; the last `val_scenes` scenes are the validation
split (the names do not follow the official splits, which belong to the real data). A scene is finished when its rows lie in
`unfinished/<scene>/`, marker last; the tables are put together when all scenes are, `picture3d_splits.json` is written last,
and `unfinished/` is removed. A run that was killed goes on with the first unfinished scene and ends with the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import queue
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from picture3d.errors import ConfigError, DataError
from picture3d.files import read_json_object, whole_file, write_json
from picture3d.structures.poses import Pose
from picture3d.synthetic.categories import LIDARSEG_CATEGORIES
from picture3d.synthetic.drive import EGO_FROM_LIDAR, DriveConfig, DriveStep, drive_step
from picture3d.synthetic.ground import OTHER_FLAT, TERRAIN
from picture3d.synthetic.world import Town, build_town

SPLITS_FILE = "picture3d_splits.json"
Progress = Callable[[int, int], None]
Row = dict[str, Any]

_UNFINISHED = "unfinished"
_MARKER = "finished.json"
_SCENE_TABLES = ("log", "map", "scene", "sample", "sample_data", "ego_pose", "instance", "sample_annotation", "lidarseg")
_ATTRIBUTES = (
    "vehicle.moving",
    "vehicle.stopped",
    "vehicle.parked",
    "cycle.with_rider",
    "cycle.without_rider",
    "pedestrian.sitting_lying_down",
    "pedestrian.standing",
    "pedestrian.moving",
)
_VISIBILITY = (("1", "v0-40", 0.4), ("2", "v40-60", 0.6), ("3", "v60-80", 0.8), ("4", "v80-100", np.inf))
_STANDS_BELOW_MPS = 0.2
_SCENE_GAP_US = 3_600_000_000


def town_seed(seed: int, scene: int) -> int:
    """Seed of the town of scene number `scene` (from 1) in the dataset of `seed`."""
    return seed * 10_000 + scene


@dataclass(frozen=True, slots=True)
class _Job:
    """All that a worker needs to write one scene."""

    root: Path
    version: str
    seed: int
    scene: int  # from 1
    config: DriveConfig

    @property
    def name(self) -> str:
        return f"scene-{self.scene:04d}"

    def token(self, *parts: object) -> str:
        return _token(self.seed, self.name, *parts)


def write_nuscenes(
    root: Path,
    *,
    version: str = "v1.0-mini",
    scenes: int = 4,
    keyframes_per_scene: int = 20,
    sweeps_per_keyframe: int = 9,
    seed: int = 0,
    val_scenes: int = 1,
    config: DriveConfig = DriveConfig(),  # noqa: B008 - frozen
    processes: int = 1,
    progress: Progress | None = None,
) -> None:
    """Writes the dataset, or what is missing of it; does nothing if it is whole.

    Args:
        root: folder of the dataset; made if missing.
        version: name of the tables' folder.
        scenes: number of scenes, each in a town of its own.
        keyframes_per_scene: annotated sweeps of a scene, at 2 Hz.
        sweeps_per_keyframe: sweeps between two keyframes, evenly spaced; 9 is the sensor's 20 Hz.
        seed: of the whole dataset; the same arguments give the same bytes.
        val_scenes: how many of the last scenes are for validation.
        config: everything else about towns and sensor; its counts of frames are replaced by the arguments above.
        processes: scenes written at the same time; the bytes do not depend on it.
        progress: called with (sweeps done, sweeps in all).

    Raises:
        ConfigError: for impossible numbers, or if `root` holds a dataset of other settings.
        DataError: if a file cannot be written.
    """
    _check(scenes, keyframes_per_scene, sweeps_per_keyframe, val_scenes, processes)
    config = config.model_copy(update={"keyframes": keyframes_per_scene, "sweeps_per_keyframe": sweeps_per_keyframe})
    names = [f"scene-{k:04d}" for k in range(1, scenes + 1)]
    settings: Row = {
        "dataset": "picture3d town",
        "version": version,
        "seed": seed,
        "splits": {"train": names[: scenes - val_scenes], "val": names[scenes - val_scenes :]},
        "drive": config.model_dump(mode="json"),
    }
    total = scenes * config.sweeps
    report = progress or (lambda done, total: None)
    if (root / SPLITS_FILE).exists():
        _refuse_other(root / SPLITS_FILE, settings)
        shutil.rmtree(root / _UNFINISHED, ignore_errors=True)
        report(total, total)
        return
    plan = root / _UNFINISHED / "settings.json"
    if plan.exists():
        _refuse_other(plan, settings)
    else:
        _refuse_foreign(root, version)
        write_json(plan, settings)
    jobs = [_Job(root, version, seed, k, config) for k in range(1, scenes + 1)]
    missing = [job for job in jobs if not (_rows_folder(root, job.name) / _MARKER).exists()]
    done = (len(jobs) - len(missing)) * config.sweeps
    report(done, total)
    for written in _run(missing, processes):
        done += written
        report(done, total)
    _write_tables(root, version, seed, names)
    write_json(root / SPLITS_FILE, settings)
    shutil.rmtree(root / _UNFINISHED)


# -- running scenes ---------------------------------------------------------------------------------------------------


def _run(jobs: list[_Job], processes: int) -> Iterator[int]:
    """Writes all jobs; yields the number of sweeps finished since the last time."""
    if processes == 1 or len(jobs) < 2:
        for job in jobs:
            yield from _write_scene(job)
        return
    # "spawn" is the one way that is safe beside threads (BLAS, progress bars) and the same on every system.
    context = multiprocessing.get_context("spawn")
    ticks = context.Queue()
    with ProcessPoolExecutor(min(processes, len(jobs)), mp_context=context, initializer=_set_ticks, initargs=(ticks,)) as pool:
        futures = [pool.submit(_write_scene_in_worker, job) for job in jobs]
        left = sum(job.config.sweeps for job in jobs)
        try:
            while left:
                try:
                    written = ticks.get(timeout=0.5)
                except queue.Empty:
                    finished, open_futures = wait(futures, timeout=0, return_when=FIRST_EXCEPTION)
                    for future in finished:
                        future.result()
                    if not open_futures and ticks.empty():
                        break
                    continue
                left -= written
                yield written
            for future in futures:
                future.result()
        finally:
            for future in futures:
                future.cancel()


_ticks: Any = None


def _set_ticks(ticks: Any) -> None:
    global _ticks
    _ticks = ticks


def _write_scene_in_worker(job: _Job) -> None:
    for written in _write_scene(job):
        _ticks.put(written)


# -- one scene --------------------------------------------------------------------------------------------------------


def _write_scene(job: _Job) -> Iterator[int]:
    """Writes the files of one scene, then its rows, then its marker; yields 1 after each sweep."""
    town = build_town(town_seed(job.seed, job.scene), job.config.town)
    rows = _SceneRows(job, town)
    _write_map(job, town)
    for index in range(job.config.sweeps):
        step = drive_step(town, job.config, index)
        _write_points(job.root / rows.filename(step), step)
        if step.is_keyframe:
            path = job.root / rows.lidarseg_filename(step)
            with whole_file(path) as file:
                file.write(step.sweep.labels.tobytes())
        rows.add(step)
        yield 1
    folder = _rows_folder(job.root, job.name)
    for name, table in rows.tables().items():
        _write_rows(folder / f"{name}.json", [table])
    write_json(folder / _MARKER, {"sweeps": job.config.sweeps})


class _SceneRows:
    """The rows of one scene's tables, collected sweep by sweep."""

    def __init__(self, job: _Job, town: Town) -> None:
        self.job = job
        self.town = town
        self.log = f"town-{town.seed}"
        self.rows: dict[str, list[Row]] = {name: [] for name in _SCENE_TABLES}
        self.last_annotation: dict[str, Row] = {}
        self.instances: dict[str, Row] = {}

    def timestamp(self, step: DriveStep) -> int:
        # Scenes lie hours apart, as if recorded one after the other.
        return step.timestamp_us + self.job.scene * _SCENE_GAP_US

    def filename(self, step: DriveStep) -> str:
        folder = "samples" if step.is_keyframe else "sweeps"
        return f"{folder}/LIDAR_TOP/{self.log}__LIDAR_TOP__{self.timestamp(step)}.pcd.bin"

    def lidarseg_filename(self, step: DriveStep) -> str:
        return f"lidarseg/{self.job.version}/{self._data_token(step.index)}_lidarseg.bin"

    def _data_token(self, index: int) -> str:
        return self.job.token("sample_data", index)

    def _sample_token(self, index: int) -> str:
        """Of the keyframe at this sweep or the next one after it, as nuScenes does."""
        per_keyframe = self.job.config.sweeps_per_keyframe + 1
        return self.job.token("sample", -(-index // per_keyframe))

    def add(self, step: DriveStep) -> None:
        token, timestamp = self._data_token(step.index), self.timestamp(step)
        self.rows["ego_pose"].append({"token": token, "timestamp": timestamp, **_rigid(step.global_from_ego)})
        last = self.job.config.sweeps - 1
        self.rows["sample_data"].append(
            {
                "token": token,
                "sample_token": self._sample_token(step.index),
                "ego_pose_token": token,
                "calibrated_sensor_token": _token(self.job.seed, "calibrated_sensor"),
                "timestamp": timestamp,
                "fileformat": "pcd",
                "is_key_frame": step.is_keyframe,
                "height": 0,
                "width": 0,
                "filename": self.filename(step),
                "prev": self._data_token(step.index - 1) if step.index > 0 else "",
                "next": self._data_token(step.index + 1) if step.index < last else "",
            }
        )
        if step.is_keyframe:
            self._add_keyframe(step, token, timestamp)

    def _add_keyframe(self, step: DriveStep, token: str, timestamp: int) -> None:
        per_keyframe = self.job.config.sweeps_per_keyframe + 1
        last = self.job.config.sweeps - 1
        sample = self._sample_token(step.index)
        self.rows["sample"].append(
            {
                "token": sample,
                "timestamp": timestamp,
                "prev": self._sample_token(step.index - per_keyframe) if step.index > 0 else "",
                "next": self._sample_token(step.index + per_keyframe) if step.index < last else "",
                "scene_token": self.job.token("scene"),
            }
        )
        self.rows["lidarseg"].append({"token": token, "sample_data_token": token, "filename": self.lidarseg_filename(step)})
        boxes = step.boxes_global
        assert boxes is not None
        for i in np.flatnonzero(boxes.num_points > 0):
            self._annotate(step, sample, int(i))

    def _annotate(self, step: DriveStep, sample: str, i: int) -> None:
        boxes = step.boxes_global
        assert boxes is not None
        track = boxes.track_id[i]
        thing = self.town.things[int(track) - 1]
        instance = self.job.token("instance", track)
        token = self.job.token("annotation", track, step.index)
        attribute = thing.attribute
        if attribute == "vehicle.moving" and float(np.hypot(*boxes.velocity[i])) < _STANDS_BELOW_MPS:
            attribute = "vehicle.stopped"
        share = step.sweep.visible_share
        seen = float(share[int(track)]) if int(track) < len(share) else 0.0
        length, width, height = (float(v) for v in boxes.size[i])
        before = self.last_annotation.get(track)
        row: Row = {
            "token": token,
            "sample_token": sample,
            "instance_token": instance,
            "visibility_token": next(level for level, _, below in _VISIBILITY if seen < below),
            "attribute_tokens": [_token(self.job.seed, "attribute", attribute)] if attribute else [],
            "translation": [float(v) for v in boxes.center[i]],
            "size": [width, length, height],
            "rotation": [float(np.cos(boxes.yaw[i] / 2)), 0.0, 0.0, float(np.sin(boxes.yaw[i] / 2))],
            "prev": before["token"] if before else "",
            "next": "",
            "num_lidar_pts": int(boxes.num_points[i]),
            "num_radar_pts": 0,
        }
        if before:
            before["next"] = token
        self.rows["sample_annotation"].append(row)
        self.last_annotation[track] = row
        record = self.instances.setdefault(
            track,
            {
                "token": instance,
                "category_token": _token(self.job.seed, "category", boxes.category[i]),
                "nbr_annotations": 0,
                "first_annotation_token": token,
                "last_annotation_token": token,
            },
        )
        record["nbr_annotations"] += 1
        record["last_annotation_token"] = token

    def tables(self) -> dict[str, list[Row]]:
        job, log = self.job, self.job.token("log")
        samples = self.rows["sample"]
        self.rows["instance"] = list(self.instances.values())
        self.rows["log"] = [
            {"token": log, "logfile": self.log, "vehicle": "town-car", "date_captured": "2020-09-13", "location": self.log}
        ]
        self.rows["map"] = [
            {"token": job.token("map"), "category": "semantic_prior", "filename": _map_filename(job), "log_tokens": [log]}
        ]
        self.rows["scene"] = [
            {
                "token": job.token("scene"),
                "log_token": log,
                "nbr_samples": len(samples),
                "first_sample_token": samples[0]["token"],
                "last_sample_token": samples[-1]["token"],
                "name": job.name,
                "description": f"Procedural town {self.town.seed}: roads, parked and moving traffic, works, passers-by",
            }
        ]
        return self.rows


def _write_points(path: Path, step: DriveStep) -> None:
    cloud = step.sweep.points
    assert cloud.ring is not None
    columns = np.concatenate([cloud.xyz, cloud.intensity[:, None], cloud.ring[:, None].astype(np.float32)], 1, dtype=np.float32)
    with whole_file(path) as file:
        file.write(columns.astype("<f4", copy=False).tobytes())


def _map_filename(job: _Job) -> str:
    return f"maps/{job.token('map')}.png"


def _write_map(job: _Job, town: Town) -> None:
    """Road and pavement as a mask, north up, two pixels per cell of 0.2 m."""
    cover = town.ground.cover[::-1]
    mask = np.where((cover == TERRAIN) | (cover == OTHER_FLAT), 0, 255).astype(np.uint8)
    buffer = BytesIO()
    Image.fromarray(mask.repeat(2, 0).repeat(2, 1)).save(buffer, format="PNG")
    with whole_file(job.root / _map_filename(job)) as file:
        file.write(buffer.getvalue())


# -- tables -----------------------------------------------------------------------------------------------------------


def _write_tables(root: Path, version: str, seed: int, names: list[str]) -> None:
    sensor = _token(seed, "sensor")
    shared: dict[str, list[Row]] = {
        "category": [
            {"token": _token(seed, "category", name), "name": name, "description": "", "index": index}
            for index, name in enumerate(LIDARSEG_CATEGORIES)
        ],
        "attribute": [{"token": _token(seed, "attribute", name), "name": name, "description": ""} for name in _ATTRIBUTES],
        "visibility": [{"token": token, "level": level, "description": ""} for token, level, _ in _VISIBILITY],
        "sensor": [{"token": sensor, "channel": "LIDAR_TOP", "modality": "lidar"}],
        "calibrated_sensor": [
            {
                "token": _token(seed, "calibrated_sensor"),
                "sensor_token": sensor,
                **_rigid(EGO_FROM_LIDAR),
                "camera_intrinsic": [],
            }
        ],
    }
    for name, rows in shared.items():
        _write_rows(root / version / f"{name}.json", [rows])
    for name in _SCENE_TABLES:
        # One scene's rows at a time, so memory does not grow with their number.
        _write_rows(
            root / version / f"{name}.json", (_read_rows(_rows_folder(root, scene) / f"{name}.json") for scene in names)
        )


def _write_rows(path: Path, chunks: Iterator[list[Row]] | list[list[Row]]) -> None:
    with whole_file(path) as file:
        before = b"[\n"
        for rows in chunks:
            for row in rows:
                file.write(before + json.dumps(row, allow_nan=False).encode())
                before = b",\n"
        file.write(b"\n]\n" if before == b",\n" else b"[]\n")


def _read_rows(path: Path) -> list[Row]:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}). Remove its folder and run again: only this scene is written anew."
        ) from error


def _rows_folder(root: Path, scene: str) -> Path:
    return root / _UNFINISHED / scene


def _rigid(pose: Pose) -> Row:
    return {"translation": [float(v) for v in pose.translation], "rotation": [float(v) for v in pose.quaternion_wxyz]}


def _token(*parts: object) -> str:
    """32 hexadecimal digits that depend on nothing but the parts."""
    return hashlib.sha256("/".join(str(part) for part in parts).encode()).hexdigest()[:32]


# -- checks -----------------------------------------------------------------------------------------------------------


def _check(scenes: int, keyframes: int, between: int, val_scenes: int, processes: int) -> None:
    for name, value, least in (
        ("scenes", scenes, 1),
        ("keyframes_per_scene", keyframes, 1),
        ("sweeps_per_keyframe", between, 0),
        ("val_scenes", val_scenes, 0),
        ("processes", processes, 1),
    ):
        if value < least:
            raise ConfigError(f"{name} = {value}: at least {least} is needed.")
    if scenes > 9999:
        raise ConfigError(f"scenes = {scenes}: town seeds are told apart for up to 9999 scenes; use another seed for more.")
    if val_scenes > scenes:
        raise ConfigError(
            f"val_scenes = {val_scenes}, but there are only {scenes} scenes. Ask for fewer, or write more scenes."
        )


def _refuse_other(path: Path, settings: Row) -> None:
    found = read_json_object(path, max_bytes=1 << 24)
    different = sorted(key for key in {*found, *settings} if found.get(key) != settings.get(key))
    if different:
        raise ConfigError(
            f"{path} belongs to a dataset of other settings ({', '.join(different)} differ). "
            "Choose another folder, remove this one, or repeat the command with its settings."
        )


def _refuse_foreign(root: Path, version: str) -> None:
    if (root / version).exists():
        raise ConfigError(
            f"{root / version} holds tables that this command did not write. Choose an empty folder: "
            "real data is never mixed with a town."
        )
