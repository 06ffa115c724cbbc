"""A detector learns seven real nuScenes keyframes by heart: what catches mistakes of frames and axes.

    python benchmarks/overfit_keyframes.py --work FOLDER [--data FOLDER] [--steps 800] [--threads 2]

FOLDER of the data holds `pc`, `bbox`, `pose` and `calib` as the public SurroundOcc demo lays them out. The tiny recipe is
trained without augmentation and scored on the same seven frames by the nuScenes metric: boxes with points, mean over the
classes that occur. A high number says nothing about the method; a low one says that something stands in the wrong place.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.real_keyframes import pose_of
from picture3d.commands.build import scoring_batches
from picture3d.commands.machine import start
from picture3d.commands.score_detection import load_detector, score_nuscenes
from picture3d.commands.score_nuscenes import table
from picture3d.commands.train import run_finetuning
from picture3d.datasets.prepared import LogHeader
from picture3d.datasets.preparing import LogPlan, write_logs
from picture3d.ops.box_iou import points_in_boxes
from picture3d.recipes.catalogue import detection_recipe
from picture3d.structures.boxes import Boxes
from picture3d.structures.frame import Frame
from picture3d.structures.points import IntensityUnit, PointCloud
from picture3d.training.distributed import Team
from picture3d.training.runlog import describe_environment

FRAMES = 7
# In whose numbers the samples give boxes.
CLASSES = ("noise", "barrier", "bicycle", "bus", "car", "construction_vehicle", "motorcycle", "pedestrian", "traffic_cone",
           "trailer", "truck")  # fmt: skip


def frame_of(source: Path, index: int) -> Frame:
    raw = np.load(source / f"pc/pc{index}.npy")
    rows = np.load(source / f"bbox/bbox{index}.npy").astype(np.float64)  # x y, z of the bottom, l w h, yaw
    center = rows[:, :3] + rows[:, 5:6] * [0, 0, 0.5]
    boxes = np.column_stack([center, rows[:, 3:7]])
    inside = points_in_boxes(torch.from_numpy(raw[:, :3].astype(np.float64)), torch.from_numpy(boxes)).numpy()
    count = len(rows)
    return Frame(
        log="street",
        index=index,
        token=f"street-{index}",
        timestamp_us=500_000 * index,
        points=PointCloud(raw[:, :3].astype(np.float32), raw[:, 3].astype(np.float32), IntensityUnit.RAW_255),
        global_from_ego=pose_of(source / f"pose/lidar_ego_pose{index}.npy"),
        ego_from_lidar=pose_of(source / f"calib/lidar_calibrated_sensor{index}.npy"),
        boxes=Boxes(
            center=center,
            size=rows[:, 3:6],
            yaw=rows[:, 6],
            velocity=np.full((count, 2), np.nan),
            category=tuple(CATEGORIES.get(CLASSES[k], "noise") for k in np.load(source / f"bbox/object_category{index}.npy")),
            track_id=tuple(str(v) for v in np.load(source / f"bbox/boxes_token{index}.npy")),
            num_points=np.bincount(inside[inside >= 0], minlength=count).astype(np.int32),
            num_radar_points=np.zeros(count, np.int32),
            attribute=("",) * count,
        ),
    )


# A category of nuScenes for each class, as prepared nuScenes has it.
CATEGORIES = {
    "barrier": "movable_object.barrier",
    "bicycle": "vehicle.bicycle",
    "bus": "vehicle.bus.rigid",
    "car": "vehicle.car",
    "construction_vehicle": "vehicle.construction",
    "motorcycle": "vehicle.motorcycle",
    "pedestrian": "human.pedestrian.adult",
    "traffic_cone": "movable_object.trafficcone",
    "trailer": "vehicle.trailer",
    "truck": "vehicle.truck",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/nuscenes/keyframe_sequence"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    args = parser.parse_args()
    if not (args.data / "pc/pc0.npy").exists():
        sys.exit(f"{args.data}: the keyframe sequence is not there; name its folder with --data")
    device = start("cpu", args.threads)

    def frames() -> Iterator[tuple[Frame, int]]:
        yield from ((frame_of(args.data, index), 0) for index in range(FRAMES))

    plan = LogPlan(LogHeader("street", "keyframes", source={"frames": FRAMES}), FRAMES, frames)
    prepared = args.work / "prepared"
    write_logs(prepared, [plan], name="keyframes", label_set_name=None, splits={"train": ["street"]})
    config = detection_recipe("town-detection", prepared).with_overrides(
        [
            "data.augment=null",
            "data.sweeps=1",  # there are keyframes only
            "data.objects=null",
            "training.batch_size=1",
            f"training.max_steps={args.steps}",
            *args.overrides,
        ]
    )
    result = run_finetuning(config, args.work / "run", True, "cpu", args.threads)
    task = load_detector(args.work / "run", config, device)
    scores = score_nuscenes(task, scoring_batches(config.data, root=None, split="train", labels=False), Team())
    assert scores is not None
    print(describe_environment("cpu"))
    print(table(f"seven keyframes after {result.steps} steps, {result.seconds:.0f} s", scores))
    present = scores.labels > 0
    print(f"mAP over the {present.sum()} classes that occur: {scores.aps[present].mean():.3f}")


if __name__ == "__main__":
    main()
