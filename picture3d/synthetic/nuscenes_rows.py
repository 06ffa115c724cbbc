"""The rows of nuScenes tables that describe drives through towns. Tokens depend on seed, scene and name only."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from picture3d.formats.lidarseg_categories import LIDARSEG_CATEGORIES
from picture3d.structures.poses import Pose
from picture3d.synthetic.drive import EGO_FROM_LIDAR, DriveConfig, DriveStep
from picture3d.synthetic.world import Town

Row = dict[str, Any]
SCENE_TABLES = ("log", "map", "scene", "sample", "sample_data", "ego_pose", "instance", "sample_annotation", "lidarseg")
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
class SceneJob:
    """All that a worker needs to write one scene."""

    root: Path
    version: str
    seed: int
    scene: int  # from 1
    config: DriveConfig

    @property
    def name(self) -> str:
        """The scene's name, `scene-0001` for the first."""
        return f"scene-{self.scene:04d}"

    def token(self, *parts: object) -> str:
        """A token of something that belongs to this scene."""
        return token_of(self.seed, self.name, *parts)


def map_filename(job: SceneJob) -> str:
    """Where the map of a scene's town lies, relative to the root."""
    return f"maps/{job.token('map')}.png"


def shared_tables(seed: int) -> dict[str, list[Row]]:
    """The tables that do not grow with the scenes, by name."""
    sensor = token_of(seed, "sensor")
    return {
        "category": [
            {"token": token_of(seed, "category", name), "name": name, "description": "", "index": index}
            for index, name in enumerate(LIDARSEG_CATEGORIES)
        ],
        "attribute": [{"token": token_of(seed, "attribute", name), "name": name, "description": ""} for name in _ATTRIBUTES],
        "visibility": [{"token": token, "level": level, "description": ""} for token, level, _ in _VISIBILITY],
        "sensor": [{"token": sensor, "channel": "LIDAR_TOP", "modality": "lidar"}],
        "calibrated_sensor": [
            {
                "token": token_of(seed, "calibrated_sensor"),
                "sensor_token": sensor,
                **_rigid(EGO_FROM_LIDAR),
                "camera_intrinsic": [],
            }
        ],
    }


class SceneRows:
    """The rows of one scene's tables, collected sweep by sweep."""

    def __init__(self, job: SceneJob, town: Town) -> None:
        self.job = job
        self.town = town
        self.log = f"town-{town.seed}"
        self.rows: dict[str, list[Row]] = {name: [] for name in SCENE_TABLES}
        self.last_annotation: dict[str, Row] = {}
        self.instances: dict[str, Row] = {}

    def timestamp(self, step: DriveStep) -> int:
        """Microseconds; scenes lie hours apart, as if recorded one after the other."""
        return step.timestamp_us + self.job.scene * _SCENE_GAP_US

    def filename(self, step: DriveStep) -> str:
        """Where the points of a sweep lie, relative to the root."""
        folder = "samples" if step.is_keyframe else "sweeps"
        return f"{folder}/LIDAR_TOP/{self.log}__LIDAR_TOP__{self.timestamp(step)}.pcd.bin"

    def lidarseg_filename(self, step: DriveStep) -> str:
        """Where the labels of a keyframe lie, relative to the root."""
        return f"lidarseg/{self.job.version}/{self._data_token(step.index)}_lidarseg.bin"

    def _data_token(self, index: int) -> str:
        return self.job.token("sample_data", index)

    def _sample_token(self, index: int) -> str:
        """Of the keyframe at this sweep or the next one after it, as nuScenes does."""
        per_keyframe = self.job.config.sweeps_per_keyframe + 1
        return self.job.token("sample", -(-index // per_keyframe))

    def add(self, step: DriveStep) -> None:
        """Adds the rows of the next sweep."""
        token, timestamp = self._data_token(step.index), self.timestamp(step)
        self.rows["ego_pose"].append({"token": token, "timestamp": timestamp, **_rigid(step.global_from_ego)})
        last = self.job.config.sweeps - 1
        self.rows["sample_data"].append(
            {
                "token": token,
                "sample_token": self._sample_token(step.index),
                "ego_pose_token": token,
                "calibrated_sensor_token": token_of(self.job.seed, "calibrated_sensor"),
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
            "attribute_tokens": [token_of(self.job.seed, "attribute", attribute)] if attribute else [],
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
                "category_token": token_of(self.job.seed, "category", boxes.category[i]),
                "nbr_annotations": 0,
                "first_annotation_token": token,
                "last_annotation_token": token,
            },
        )
        record["nbr_annotations"] += 1
        record["last_annotation_token"] = token

    def tables(self) -> dict[str, list[Row]]:
        """All rows, by table, once the last sweep was added."""
        job, log = self.job, self.job.token("log")
        samples = self.rows["sample"]
        self.rows["instance"] = list(self.instances.values())
        self.rows["log"] = [
            {"token": log, "logfile": self.log, "vehicle": "town-car", "date_captured": "2020-09-13", "location": self.log}
        ]
        self.rows["map"] = [
            {"token": job.token("map"), "category": "semantic_prior", "filename": map_filename(job), "log_tokens": [log]}
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


def _rigid(pose: Pose) -> Row:
    return {"translation": [float(v) for v in pose.translation], "rotation": [float(v) for v in pose.quaternion_wxyz]}


def token_of(*parts: object) -> str:
    """32 hexadecimal digits that depend on nothing but the parts."""
    return hashlib.sha256("/".join(str(part) for part in parts).encode()).hexdigest()[:32]
