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

import json
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from picture3d.errors import ConfigError, DataError
from picture3d.files import read_bounded, whole_file, write_json
from picture3d.synthetic.drive import DriveConfig, DriveStep, drive_step
from picture3d.synthetic.ground import OTHER_FLAT, TERRAIN
from picture3d.synthetic.nuscenes_rows import SCENE_TABLES, Row, SceneJob, SceneRows, map_filename, shared_tables, town_seed
from picture3d.synthetic.scene_jobs import UNFINISHED, Progress, check_counts, write_town
from picture3d.synthetic.world import Town, build_town

# Raised when the same seed gives another town, so that a dataset is never finished by a generator that did not begin it.
GENERATOR = 1

_MARKER = "finished.json"
_MAX_TABLE_BYTES = 1 << 30


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
    check_counts(scenes=scenes, frames=("keyframes_per_scene", keyframes_per_scene), val_scenes=val_scenes, processes=processes)
    if sweeps_per_keyframe < 0:
        raise ConfigError(f"sweeps_per_keyframe = {sweeps_per_keyframe}: too few. Ask for at least 0.")
    config = config.model_copy(update={"keyframes": keyframes_per_scene, "sweeps_per_keyframe": sweeps_per_keyframe})
    names = [f"scene-{k:04d}" for k in range(1, scenes + 1)]
    settings: Row = {
        "dataset": "picture3d town",
        "generator": GENERATOR,
        "version": version,
        "seed": seed,
        "splits": {"train": names[: scenes - val_scenes], "val": names[scenes - val_scenes :]},
        "drive": config.model_dump(mode="json"),
    }
    write_town(
        root,
        settings,
        [SceneJob(root, version, seed, k, config) for k in range(1, scenes + 1)],
        write=_write_scene,
        is_written=lambda job: (_rows_folder(root, job.name) / _MARKER).exists(),
        frames=config.sweeps,
        own_folders=(version,),
        finish=lambda: _write_tables(root, version, seed, names),
        processes=processes,
        progress=progress,
    )


# -- one scene --------------------------------------------------------------------------------------------------------


def _write_scene(job: SceneJob) -> Iterator[int]:
    """Writes the files of one scene, then its rows, then its marker; yields 1 after each sweep."""
    town = build_town(town_seed(job.seed, job.scene), job.config.town)
    rows = SceneRows(job, town)
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


def _write_points(path: Path, step: DriveStep) -> None:
    cloud = step.sweep.points
    assert cloud.ring is not None
    columns = np.concatenate([cloud.xyz, cloud.intensity[:, None], cloud.ring[:, None].astype(np.float32)], 1, dtype=np.float32)
    with whole_file(path) as file:
        file.write(columns.astype("<f4", copy=False).tobytes())


def _write_map(job: SceneJob, town: Town) -> None:
    """Road and pavement as a mask, north up, two pixels per cell of 0.2 m."""
    cover = town.ground.cover[::-1]
    mask = np.where((cover == TERRAIN) | (cover == OTHER_FLAT), 0, 255).astype(np.uint8)
    buffer = BytesIO()
    Image.fromarray(mask.repeat(2, 0).repeat(2, 1)).save(buffer, format="PNG")
    with whole_file(job.root / map_filename(job)) as file:
        file.write(buffer.getvalue())


# -- tables -----------------------------------------------------------------------------------------------------------


def _write_tables(root: Path, version: str, seed: int, names: list[str]) -> None:
    for name, rows in shared_tables(seed).items():
        _write_rows(root / version / f"{name}.json", [rows])
    for name in SCENE_TABLES:
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
        return json.loads(read_bounded(path, max_bytes=_MAX_TABLE_BYTES))
    except (DataError, ValueError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}). Remove its folder and run again: only this scene is written anew."
        ) from error


def _rows_folder(root: Path, scene: str) -> Path:
    return root / UNFINISHED / scene
