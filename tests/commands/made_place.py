"""What every command reads, made once and small, and its words as a user types them: for tests that break commands."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from picture3d.recipes.catalogue import detection_recipe, pretraining_recipe, segmentation_recipe, tiny
from picture3d.synthetic.occupancy import write_occupancy
from picture3d.training.checkpoint import load_checkpoint
from tests.command_line import do

TOWN = ["--scenes", "3", "--keyframes", "3", "--sweeps-per-keyframe", "2", "--val-scenes", "1"]
WAYMO = ["--scenes", "2", "--keyframes", "2", "--val-scenes", "1"]
# Names that clocks and ways to a folder have in JSON files.
TIMES = {"seconds", "data_seconds"}
NOT_COMPARED = {"log.txt", "environment.json"}  # they tell of times, machines and interruptions

READERS = {  # commands that read prepared frames
    "targets", "objects", "intensity", "pretrain", "segmentation", "detection", "predict json", "predict lidarseg",
    "predict nuscenes", "predict pictures", "evaluate segmentation", "evaluate detection", "probe", "report", "compare",
    "experiment", "picture",
}  # fmt: skip
RAW = {"prepare", "semantickitti", "once", "argoverse2", "waymo v2", "occupancy"}
WRITERS = {"synth", "synth waymo", "synth occupancy", "weights export", "weights import"}
COMMANDS = sorted(READERS | RAW | WRITERS)


@dataclass(frozen=True)
class Place:
    """Raw datasets, prepared frames and trained runs under `root`; what costs time is made when it is first asked for."""

    root: Path

    def raw(self, name: str) -> Path:
        """The raw dataset that a `prepare` command of this name reads."""
        match name:
            case "prepare" | "occupancy":
                if name == "occupancy":
                    write_occupancy(self.root / "raw")  # the first time
                return self.root / "raw"
            case "semantickitti":
                from tests.datasets.test_semantickitti import write_sequence

                return self._made(name, lambda folder: [write_sequence(folder, sequence) for sequence in ("00", "08")])
            case "once":
                from tests.datasets import test_once as once

                splits = (("000076", "train"), ("000080", "val"))
                return self._made(name, lambda folder: [once.write_sequence(folder, log, split=split) for log, split in splits])
            case "argoverse2":
                from tests.datasets.test_argoverse2 import write_log

                logs = ("train/log-a", "val/log-b")
                return self._made(name, lambda folder: [write_log(folder / log) for log in logs])
            case "waymo v2":
                return self._made(name, lambda folder: do("synth", folder, "--format", "waymo-v2", *WAYMO))
        raise ValueError(name)

    def run(self, name: str) -> Path:
        """A finished run: pretrain, pretrain-2, segmentation or detection."""
        kind, _, seed = name.partition("-")
        command = ["pretrain"] if kind == "pretrain" else ["finetune", kind]
        settings = ["--set", "training.max_steps=2", "--set", f"training.seed={seed or 0}"]
        return self._made(
            f"runs/{name}",
            lambda folder: do(*command, "--config", self.root / f"{kind}.json", "--out", folder, *settings),
        )

    def _made(self, name: str, make: Callable[[Path], Any]) -> Path:
        folder = self.root / "made" / name
        if not folder.exists():
            make(folder)
        return folder

    def command(self, name: str, out: Path) -> list[str]:
        """The words of a command that writes below `out`, and nowhere else."""
        prepared, cpu = str(self.root / "prepared"), ["--device", "cpu"]
        match name:
            case "synth":
                words: list[Any] = ["synth", out, *TOWN]
            case "synth waymo":
                words = ["synth", out, "--format", "waymo", *WAYMO]
            case "synth occupancy":
                words = ["synth", out, *TOWN, "--occupancy"]
            case "prepare":
                words = ["prepare", "nuscenes", self.raw(name), out]
            case "occupancy":
                words = ["prepare", "occupancy", self.raw(name), out]
            case "semantickitti" | "once" | "argoverse2":
                words = ["prepare", name, self.raw(name), out]
            case "waymo v2":
                words = ["prepare", "waymo", self.raw(name), out]
            case "targets":  # they are written beside the frames: each run has frames of its own
                words = ["targets", out, *cpu]
            case "objects" | "intensity":
                words = ["data", name, out]
            case "picture":
                words = ["data", "info", prepared, "--picture", out / "frame.png"]
            case "pretrain":
                words = ["pretrain", "--config", self.root / "pretrain.json", "--out", out, "--resume", *cpu]
            case "segmentation" | "detection":
                words = ["finetune", name, "--config", self.root / f"{name}.json", "--out", out, "--resume", *cpu]
            case "predict json":
                words = ["predict", self.run("segmentation"), "--out", out / "found.json", *cpu]
            case "predict lidarseg":
                words = ["predict", self.run("segmentation"), "--out", out, "--format", "lidarseg", *cpu]
            case "predict nuscenes":
                words = ["predict", self.run("detection"), "--out", out / "found.json", "--format", "nuscenes", *cpu]
            case "predict pictures":
                words = ["predict", self.run("detection"), "--out", out, "--format", "picture", *cpu]
            case "evaluate segmentation" | "evaluate detection":
                words = ["evaluate", out, *cpu]
            case "probe":
                words = ["probe", out, *cpu]
            case "report":
                runs = [self.run(kind) for kind in ("pretrain", "segmentation", "detection")]
                words = ["report", runs[0].parent, "--data", prepared, "--out", out / "report.html", *cpu]
            case "compare":
                words = ["compare", self.run("pretrain"), self.run("pretrain-2"), "--frames", 2, "--out", out, *cpu]
            case "experiment":
                words = [
                    "experiment",
                    "label-efficiency",
                    "--data",
                    prepared,
                    "--out",
                    out,
                    "--methods",
                    "scratch,town-coordinates",
                ]
                words += ["--shares", "1", "--seeds", "0", *cpu]
                for option in ("--pretrain-set", "--finetune-set"):
                    for setting in _SMALL:
                        words += [option, setting]
                words += ["--pretrain-set", "targets.mode=none", "--pretrain-set", "mask.kind=random"]
            case "weights export":
                words = ["weights", "export", self.run("pretrain"), out / "exported.safetensors"]
            case "weights import":
                words = ["weights", "import", self.run("pretrain") / "model.safetensors", out / "imported.safetensors"]
            case _:
                raise ValueError(name)
        return [str(word) for word in words]

    def before(self, name: str, out: Path) -> None:
        """What has to be in `out` before the command runs."""
        self.command(name, out)  # what it reads
        if name in {"targets", "objects", "occupancy", "intensity"}:
            shutil.copytree(self.root / "prepared", out)
        elif name in {"evaluate segmentation", "evaluate detection", "probe"}:
            shutil.copytree(self.run({"probe": "pretrain"}.get(name, name.removeprefix("evaluate "))), out)


_SMALL = [
    "grid.voxel_size=[0.8,0.8,1.0]", "encoder.channels=32", "encoder.ffn_channels=64", "encoder.windows=[[12,12,8],[12,12,1]]",
    "encoder.strides=[[1,1,8]]", "training.max_steps=1", "training.batch_size=1",
]  # fmt: skip


def made_place(root: Path) -> Place:
    """The town, its frames and the settings of three small trainings."""
    do("synth", root / "raw", *TOWN)
    do("prepare", "nuscenes", root / "raw", root / "prepared")
    changes = ["training.max_steps=8", "training.checkpoint_every=2", "training.keep_last=1"]
    pretraining = tiny(pretraining_recipe("town-picture", root / "prepared"))
    pretraining.with_overrides([*changes, "targets.mode=online"]).save(root / "pretrain.json")
    tiny(segmentation_recipe("town-segmentation", root / "prepared")).with_overrides(changes).save(root / "segmentation.json")
    tiny(detection_recipe("town-detection", root / "prepared")).with_overrides(changes).save(root / "detection.json")
    return Place(root)


def contents(folder: Path) -> dict[str, str]:
    """Every file by its bytes; JSON, also that in checkpoints, without what clocks said and where the folder lies."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir() or path.name in NOT_COMPARED:
            continue
        data = path.read_bytes()
        if path.suffix in {".json", ".jsonl"}:
            trees = [json.loads(line) for line in (data.splitlines() if path.suffix == ".jsonl" else [data])]
            data = json.dumps([_timeless(tree, folder) for tree in trees]).encode()
        if path.suffix == ".html" and (folder / "experiment.json").exists():  # it draws what each cell took
            data = re.sub(rb'(left|width):[0-9.]+%|[0-9.]+ (s|min)\b|<td class="num">[0-9]+</td>', b"", data)
        if path.suffix == ".safetensors":
            checkpoint = load_checkpoint(path)
            data = json.dumps(_timeless(checkpoint.meta, folder)).encode()
            for key, tensor in sorted(checkpoint.tensors.items()):
                data += (
                    f"{key} {tensor.shape} {tensor.dtype} ".encode() + tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
                )
        found[str(path.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return found


def _timeless(tree: Any, folder: Path) -> Any:
    """Without what clocks said; places below `folder` are told from there."""
    if isinstance(tree, dict):
        return {key: _timeless(value, folder) for key, value in tree.items() if key not in TIMES}
    if isinstance(tree, list):
        return [_timeless(value, folder) for value in tree]
    return tree.replace(str(folder), "") if isinstance(tree, str) else tree
