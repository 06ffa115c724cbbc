"""Asks the official nuScenes devkit about a written town. Run by the interpreter of `.venv-oracles`, never imported.

    .venv-oracles/bin/python tests/oracles/nuscenes_devkit_check.py ROOT VERSION

Prints one JSON object with what the devkit found; every assertion that fails ends the program with its traceback.
"""

import json
import sys

import numpy as np
from nuscenes import NuScenes
from nuscenes.utils.data_classes import LidarPointCloud
from nuscenes.utils.geometry_utils import points_in_box
from nuscenes.utils.splits import create_splits_scenes
from pyquaternion import Quaternion


def chain(nusc: NuScenes, table: str, first: str) -> list:
    """Records from `first` along `next`, each pointing back to the one before."""
    records, before, token = [], "", first
    while token:
        record = nusc.get(table, token)
        assert record["prev"] == before, f"{table} {token} does not point back"
        records.append(record)
        before, token = token, record["next"]
    return records


def check_chains(nusc: NuScenes) -> None:
    """Samples, sweeps and annotations hang together and nothing is left over."""
    seen = {"sample": 0, "sample_data": 0, "sample_annotation": 0}
    for scene in nusc.scene:
        samples = chain(nusc, "sample", scene["first_sample_token"])
        assert len(samples) == scene["nbr_samples"]
        assert samples[-1]["token"] == scene["last_sample_token"]
        seen["sample"] += len(samples)
        sweeps = chain(nusc, "sample_data", samples[0]["data"]["LIDAR_TOP"])
        times = [sweep["timestamp"] for sweep in sweeps]
        assert times == sorted(set(times)), "sweeps are not in order of time"
        keyframes = [sweep["sample_token"] for sweep in sweeps if sweep["is_key_frame"]]
        assert keyframes == [sample["token"] for sample in samples]
        seen["sample_data"] += len(sweeps)
    for instance in nusc.instance:
        annotations = chain(nusc, "sample_annotation", instance["first_annotation_token"])
        assert len(annotations) == instance["nbr_annotations"]
        assert annotations[-1]["token"] == instance["last_annotation_token"]
        assert {a["instance_token"] for a in annotations} == {instance["token"]}
        seen["sample_annotation"] += len(annotations)
    for table, count in seen.items():
        assert count == len(getattr(nusc, table)), f"{table}: {count} in chains of {len(getattr(nusc, table))}"


def check_boxes(nusc: NuScenes) -> dict:
    """Points inside the devkit's boxes have the box's class and are as many as the table says."""
    index_of = nusc.lidarseg_name2idx_mapping
    inside_all = agree_all = 0
    worst = 0
    for sample in nusc.sample:
        token = sample["data"]["LIDAR_TOP"]
        path, boxes, _ = nusc.get_sample_data(token)
        cloud = LidarPointCloud.from_file(path)
        labels = np.fromfile(f"{nusc.dataroot}/{nusc.get('lidarseg', token)['filename']}", np.uint8)
        assert len(labels) == cloud.points.shape[1]
        for box in boxes:
            annotation = nusc.get("sample_annotation", box.token)
            inside = points_in_box(box, cloud.points[:3])
            worst = max(worst, abs(int(inside.sum()) - annotation["num_lidar_pts"]))
            inside_all += int(inside.sum())
            agree_all += int((labels[inside] == index_of[box.name]).sum())
        # The same boxes in the global frame, through the other door of the devkit.
        assert {b.token for b in nusc.get_boxes(token)} == {b.token for b in boxes}
    return {"inside": inside_all, "agree": agree_all, "worst_count": worst}


def check_sweeps(nusc: NuScenes) -> float:
    """Keyframe and the sweep before it agree in the global frame; returns the share of half-metre cells that both fill."""
    record = nusc.get("sample_data", nusc.sample[-1]["data"]["LIDAR_TOP"])
    clouds = []
    for data in (record, nusc.get("sample_data", record["prev"])):
        cloud = LidarPointCloud.from_file(f"{nusc.dataroot}/{data['filename']}")
        for pose in (
            nusc.get("calibrated_sensor", data["calibrated_sensor_token"]),
            nusc.get("ego_pose", data["ego_pose_token"]),
        ):
            cloud.rotate(Quaternion(pose["rotation"]).rotation_matrix)
            cloud.translate(np.array(pose["translation"]))
        clouds.append(cloud.points[:3].T)
    cells = [set(map(tuple, np.unique(np.floor(points / 0.5).astype(int), axis=0))) for points in clouds]
    return len(cells[0] & cells[1]) / len(cells[0])


def main() -> None:
    """Loads the tables, asks, prints."""
    root, version = sys.argv[1:]
    nusc = NuScenes(version=version, dataroot=root, verbose=False)
    check_chains(nusc)
    points = lidarseg_points = 0
    classes: set = set()
    for sample in nusc.sample:
        token = sample["data"]["LIDAR_TOP"]
        path, _, _ = nusc.get_sample_data(token)
        points += LidarPointCloud.from_file(path).points.shape[1]
        labels = np.fromfile(f"{root}/{nusc.get('lidarseg', token)['filename']}", np.uint8)
        lidarseg_points += len(labels)
        classes |= {nusc.lidarseg_idx2name_mapping[int(label)] for label in np.unique(labels)}
    nusc.list_lidarseg_categories(sort_by="count")
    nusc.get_sample_lidarseg_stats(nusc.sample[0]["token"], sort_by="index")
    velocity = [float(np.linalg.norm(nusc.box_velocity(a["token"])[:2])) for a in nusc.sample_annotation]
    masks = {}
    for record in nusc.map:
        mask = record["mask"].mask()
        assert set(np.unique(mask)) <= {0, 255}
        log = nusc.get("log", record["log_tokens"][0])
        # The car is always on road that the map knows.
        scene = next(s for s in nusc.scene if s["log_token"] == log["token"])
        start = nusc.get("sample_data", nusc.get("sample", scene["first_sample_token"])["data"]["LIDAR_TOP"])
        x, y, _ = nusc.get("ego_pose", start["ego_pose_token"])["translation"]
        assert bool(record["mask"].is_on_mask(x, y)[0])
        masks[log["location"]] = list(mask.shape)
    answer = {
        "scenes": [scene["name"] for scene in nusc.scene],
        "categories": [record["name"] for record in sorted(nusc.category, key=lambda r: r["index"])],
        "points": points,
        "lidarseg_points": lidarseg_points,
        "classes": sorted(classes),
        "moving": sum(v > 0.5 for v in velocity if np.isfinite(v)),
        "standing": sum(v < 0.2 for v in velocity if np.isfinite(v)),
        "maps": masks,
        "shared_cells": check_sweeps(nusc),
        "splits": create_splits_scenes(),
        **check_boxes(nusc),
    }
    sys.stdout.write("\nANSWER " + json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
