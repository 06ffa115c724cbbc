"""PICTURE on seven real nuScenes keyframes: pre-train on 0-4, fine-tune lidarseg on some of them, score on 5-6.

    python benchmarks/real_keyframes.py --data FOLDER --work FOLDER [--pretrain-steps 120] [--finetune-steps 100] [--seeds 0]
        [--labelled 2] [--others FOLDER] [--small] [--rows FOLDER]

FOLDER holds `pc/pc*.npy` (x y z intensity), `pc_seman/pc_seman_*.npy` (x y z label) and poses, as the public SurroundOcc demo
lays them out. Everything goes through the commands that a user types. Two scored keyframes, 2.5 s after the labelled ones, on
the same street: the numbers say that the chain works on real sweeps, and little about streets elsewhere. With `--rows` every
finished seed of a row is kept there as JSON and not done again.

`--others` names the folder of all sample data: pre-training then also takes the sweeps of other sensors that lie there
(nuScenes elsewhere, Waymo, SemanticKITTI, ONCE, Argoverse 2), as many in an epoch as keyframes. Their intensity is brought
to 0..1 and the ground to where the nuScenes sensor sees it, 1.84 m below.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.evidence import NETWORK, REAL_METHODS, real_table
from picture3d.files import write_json
from picture3d.formats.feather import read_feather
from picture3d.structures.poses import Pose
from picture3d.training.runlog import describe_environment


def lay_out(source: Path, work: Path) -> None:
    """One sub-folder of sweeps, one of labels and a pose file, as `prepare points` reads them."""
    sweeps, labels = work / "sweeps", work / "labels"
    sweeps.mkdir(parents=True, exist_ok=True)
    labels.mkdir(exist_ok=True)
    lines = []
    for i in range(7):
        np.load(source / f"pc/pc{i}.npy").astype(np.float32).tofile(sweeps / f"{i:06d}.bin")
        labels_i = np.load(source / f"pc_seman/pc_seman_{i}.npy")[:, 3]
        np.save(labels / f"{i:06d}.npy", labels_i.astype(np.uint8))
        names = f"pose/lidar_ego_pose{i}.npy", f"calib/lidar_calibrated_sensor{i}.npy"
        ego, lidar = (pose_of(source / name) for name in names)
        lines.append(" ".join(f"{v:.12g}" for v in (ego @ lidar).matrix[:3].ravel()))
    (work / "poses.txt").write_text("\n".join(lines) + "\n")


def lay_out_others(samples: Path, folder: Path) -> None:
    """One sub-folder per sensor, x y z intensity, intensity 0..1, the ground at -1.84 m."""
    kinds = {
        "nuscenes": ("nuscenes/sample_ca9a282c/*LIDAR_TOP*.bin", 5, 255.0),
        "waymo": ("waymo/lidar_frames/*.bin", 5, 1.0),
        "semantickitti": ("semantickitti/sequences/*/velodyne/*.bin", 4, 1.0),
        "once": ("once/*/lidar_roof/*.bin", 4, 255.0),
        "argoverse2": ("argoverse2/*/sensors/lidar/*.feather", 0, 255.0),
    }
    for name, (pattern, columns, brightest) in kinds.items():
        for path in sorted(samples.glob(pattern)):
            if columns:
                table = np.fromfile(path, dtype=np.float32).reshape(-1, columns)[:, :4]
            else:
                found = read_feather(path, dict.fromkeys(("x", "y", "z", "intensity"), "f"))
                table = np.stack([found[column].astype(np.float32) for column in ("x", "y", "z", "intensity")], 1)
            table[:, 3] /= brightest
            range_m = np.hypot(table[:, 0], table[:, 1])
            table[:, 2] -= np.percentile(table[(range_m > 5) & (range_m < 15), 2], 20) + 1.84
            (folder / name).mkdir(parents=True, exist_ok=True)
            table.tofile(folder / name / f"{path.name.split('.')[0]}.bin")


def pose_of(path: Path) -> Pose:
    """A pose file of the demo."""
    from tests.sample_data import load_numpy_pickle

    tree = load_numpy_pickle(path)
    tree = tree.item() if isinstance(tree, np.ndarray) else tree
    return Pose.from_quaternion(tree["rotation"], tree["translation"])


def picture3d(*words: object) -> str:
    """Runs one command and returns what it printed."""
    command = [sys.executable, "-m", "picture3d.cli", *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/nuscenes/keyframe_sequence"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--pretrain-steps", type=int, default=120)
    parser.add_argument("--finetune-steps", type=int, default=100)
    parser.add_argument("--seeds", default="0", help="numbers by comma")
    parser.add_argument("--labelled", type=int, default=5, help="of keyframes 0-4, evenly spread")
    parser.add_argument(
        "--small", action="store_true", help="the small network of benchmarks/evidence.py and its learning rates"
    )
    parser.add_argument("--others", type=Path, help="folder of sample data whose other sweeps are pre-trained on too")
    parser.add_argument("--rows", type=Path, help="keep finished rows here")
    parser.add_argument("--budget", type=float, default=1e9, help="begin no row after so many seconds")
    args = parser.parse_args()
    if not (args.data / "pc/pc0.npy").exists():
        sys.exit(f"{args.data}: the keyframe sequence is not there; name its folder with --data")
    work: Path = args.work
    lay_out(args.data, work)
    prepared = work / "prepared"
    print(
        picture3d(
            *("prepare", "points", work / "sweeps", prepared, "--layout", "x,y,z,intensity", "--intensity", "0-255"),
            *("--labels", work / "labels", "--label-set", "nuscenes-16", "--poses", work / "poses.txt", "--val", 2),
        )
    )
    print(picture3d("targets", prepared))
    mixed = ()
    if args.others:
        lay_out_others(args.others, work / "others")
        also = work / "prepared_others"
        print(picture3d("prepare", "points", work / "others", also, "--layout", "x,y,z,intensity", "--intensity", "0-1"))
        print(picture3d("targets", also))
        mixed = ("--set", "data.also=" + json.dumps([{"root": str(also), "weight": 1}]))
    first, then = (), ()
    if args.small:
        first = [word for setting in (*NETWORK, "training.optim.peak_lr=3e-3") for word in ("--set", setting)]
        tuned = (*NETWORK, "training.optim.peak_lr=5e-3", "task.head_channels=32")
        then = [word for setting in tuned for word in ("--set", setting)]
    kept: Path = args.rows or work / "rows"
    kept.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    for seed in (int(word) for word in args.seeds.split(",")):
        for name in REAL_METHODS:
            path = kept / f"{name}_{args.labelled}_{seed}.json"
            if path.is_file() or time.monotonic() - start > args.budget:
                continue
            begin = time.time()
            run, segment = work / f"runs/{name}-{seed}", work / f"runs/segment-{name}-{args.labelled}-{seed}"
            if name != "scratch":
                steps, chosen = ("--max-steps", args.pretrain_steps), ("--recipe", f"town-{name}")
                seeded = ("--set", f"training.seed={seed}", "--resume", *first, *mixed)
                print(picture3d("pretrain", *chosen, "--data", prepared, "--out", run, *steps, *seeded))
            encoder = () if name == "scratch" else ("--encoder", run)
            settings = (
                "--set",
                f"training.seed={seed}",
                "--set",
                f"data.max_frames={args.labelled}",
                "--resume",
                *then,
            )
            length = ("--set", f"training.max_steps={args.finetune_steps}")
            print(picture3d("finetune", "segmentation", "--data", prepared, "--out", segment, *encoder, *settings, *length))
            scores = json.loads(picture3d("evaluate", segment, "--json"))
            row = {"method": name, "labelled": args.labelled, "seed": seed, "miou": scores["miou"], "iou": scores["iou"]}
            row |= {"pretrain_steps": args.pretrain_steps, "finetune_steps": args.finetune_steps, "small": args.small}
            row["others"] = args.others is not None
            write_json(path, {**row, "seconds": round(time.time() - begin, 1), "environment": describe_environment("cpu")})
    print(real_table(kept))


if __name__ == "__main__":
    main()
