"""A tiny raw nuScenes dataset written straight from the format's description: tables, sweeps, labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

PERIOD_US = 50_000


class RawWorld:
    """Scenes in which the ego car drives along global x at 10 m/s and one car at 4 m/s in front of it.

    The LiDAR sits at (1, 0, 2) of the ego car, turned by +90 degrees (its x axis looks to the car's left).
    """

    def __init__(self, root: Path, *, scenes: int = 2, keyframes: int = 3, between: int = 2, points: int = 30) -> None:
        self.root, self.version = root, "v1.0-mini"
        self.scenes, self.keyframes, self.between, self.points = scenes, keyframes, between, points
        self.tables: dict[str, list[dict[str, Any]]] = {
            name: [] for name in ("scene", "sample", "sample_data", "ego_pose", "sample_annotation", "instance", "lidarseg")
        }
        self.tables["sensor"] = [
            {"token": "lidar", "channel": "LIDAR_TOP", "modality": "lidar"},
            {"token": "camera", "channel": "CAM_FRONT", "modality": "camera"},
        ]
        quarter = float(np.sqrt(0.5))
        self.tables["calibrated_sensor"] = [
            {
                "token": "cal-lidar",
                "sensor_token": "lidar",
                "translation": [1.0, 0.0, 2.0],
                "rotation": [quarter, 0, 0, quarter],
            },
            {"token": "cal-camera", "sensor_token": "camera", "translation": [1.5, 0.0, 1.5], "rotation": [1, 0, 0, 0]},
        ]
        self.tables["attribute"] = [{"token": "att-moving", "name": "vehicle.moving"}]
        self.tables["category"] = [{"token": "cat-car", "name": "vehicle.car", "index": 17}]

    def sweep_points(self, scene: int, number: int) -> np.ndarray:
        """(points, 5) float32, different for every sweep."""
        rng = np.random.default_rng([scene, number])
        xyz = rng.uniform(-20, 20, (self.points, 3))
        return np.concatenate([xyz, rng.integers(0, 256, (self.points, 1)), rng.integers(0, 32, (self.points, 1))], 1).astype(
            "<f4"
        )

    def labels(self, scene: int, number: int) -> np.ndarray:
        return np.random.default_rng([scene, number, 1]).integers(0, 32, self.points).astype(np.uint8)

    def write(self) -> None:
        for scene in range(self.scenes):
            self._scene(scene)
        folder = self.root / self.version
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in self.tables.items():
            (folder / f"{name}.json").write_text(json.dumps(rows, indent=0))

    def _scene(self, scene: int) -> None:
        t = self.tables
        start = 1_500_000_000_000_000 + scene * 1_000_000_000
        t["scene"].append({"token": f"s{scene}", "name": f"scene-{scene + 1:04d}", "nbr_samples": self.keyframes})
        t["instance"].append({"token": f"i{scene}", "category_token": "cat-car", "nbr_annotations": self.keyframes})
        stride = self.between + 1
        for number in range((self.keyframes - 1) * stride + 1):
            time_us, key = start + number * PERIOD_US, number % stride == 0
            # A sweep between two keyframes belongs to the sample that comes next.
            sample, token = f"s{scene}-k{-(-number // stride)}", f"s{scene}-d{number}"
            folder = "samples" if key else "sweeps"
            filename = f"{folder}/LIDAR_TOP/{token}.pcd.bin"
            x = 10.0 * number * PERIOD_US * 1e-6
            t["ego_pose"].append(
                {"token": f"{token}-pose", "timestamp": time_us, "translation": [x, 5.0, 0.0], "rotation": [1, 0, 0, 0]}
            )
            row = {"token": token, "sample_token": sample, "ego_pose_token": f"{token}-pose", "timestamp": time_us}
            row |= {"calibrated_sensor_token": "cal-lidar", "is_key_frame": key, "filename": filename, "prev": "", "next": ""}
            t["sample_data"].append(row)
            path = self.root / filename
            path.parent.mkdir(parents=True, exist_ok=True)
            self.sweep_points(scene, number).tofile(path)
            if not key:
                continue
            k = number // stride
            t["sample"].append({"token": sample, "timestamp": time_us, "scene_token": f"s{scene}", "prev": "", "next": ""})
            camera = {
                **row,
                "token": f"{token}-cam",
                "calibrated_sensor_token": "cal-camera",
                "filename": "samples/CAM_FRONT/a.jpg",
            }
            t["sample_data"].append(camera)
            labels = f"lidarseg/{self.version}/{token}_lidarseg.bin"
            t["lidarseg"].append({"token": token, "sample_data_token": token, "filename": labels})
            (self.root / labels).parent.mkdir(parents=True, exist_ok=True)
            self.labels(scene, number).tofile(self.root / labels)
            t["sample_annotation"].append(
                {
                    "token": f"s{scene}-a{k}",
                    "sample_token": sample,
                    "instance_token": f"i{scene}",
                    "translation": [30.0 + 4.0 * number * PERIOD_US * 1e-6, 5.0, 1.0],
                    "size": [2.0, 4.5, 1.5],
                    "rotation": [1, 0, 0, 0],
                    "prev": f"s{scene}-a{k - 1}" if k else "",
                    "next": f"s{scene}-a{k + 1}" if k + 1 < self.keyframes else "",
                    "num_lidar_pts": 11 + k,
                    "num_radar_pts": k,
                    "attribute_tokens": ["att-moving"] if k else [],
                }
            )
