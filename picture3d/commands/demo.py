"""`demo`: the whole of PICTURE on a built-in town. Each step is a command of its own; what is finished is not done again."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from picture3d.commands import data as data_commands
from picture3d.commands.prepare import prepare_nuscenes
from picture3d.commands.report import write_report
from picture3d.commands.score import run_evaluation
from picture3d.commands.train import run_finetuning, run_pretraining
from picture3d.errors import ConfigError
from picture3d.files import read_json_object, write_text
from picture3d.recipes.catalogue import pretraining_recipe, segmentation_recipe
from picture3d.recipes.configs import PretrainConfig, SegmentationConfig
from picture3d.recipes.town import SMALL_TOWN
from picture3d.training.runlog import duration
from picture3d.view.report_data import Step

RUNS = ("scratch", "coordinates", "picture", "picture-visible")
_PRETRAIN = (*SMALL_TOWN, "training.batch_size=1", "training.optim.peak_lr=3e-3")
_FINETUNE = (*SMALL_TOWN, "task.head_channels=32", "training.batch_size=1", "training.optim.peak_lr=5e-3")
_MAX_BYTES = 1 << 24
_SUMMARY = (
    "A simulated 32-beam LiDAR drives through procedural towns. Three encoders are pre-trained on sweeps without any label: "
    "one rebuilds the points of hidden voxels (coordinates), one also the features that a teacher network sees there (picture, "
    "the paper's PICTURE), one tells besides what the teacher sees in the voxels that were not hidden (picture-visible, ours). "
    "Then four segmentation networks are fine-tuned with the same budget on a few labelled scenes, from scratch and from each "
    "encoder, and scored on towns that none of them has seen.\n\n"
    "The bars say what pre-training is worth here; the pictures say what the networks see."
)
_NOTES = (
    "One seed, minutes of training and a dozen labelled sweeps: two or three points between two rows are within what "
    "another seed changes. What pre-training is worth, over several seeds, stands in docs/experiments.md.",
    "The teacher is the small network that comes with the package. It was trained on other synthetic towns with their labels "
    "and stands in for a vision foundation model, so that the demo needs no download.",
    "Intersection over union of a class that is rare in the validation towns moves by several points from seed to seed.",
)


@dataclass(frozen=True, slots=True)
class Size:
    """How much the demo does."""

    scenes: int = 20
    val_scenes: int = 4
    keyframes: int = 6
    sweeps_per_keyframe: int = 1
    pretrain_steps: int = 500
    finetune_steps: int = 300
    label_share: float = 0.15


TINY = Size(scenes=3, val_scenes=1, keyframes=2, pretrain_steps=2, finetune_steps=2, label_share=0.5)


class _Steps:
    """Runs steps in order and remembers, on disk, what each took."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = read_json_object(path, max_bytes=_MAX_BYTES) if path.is_file() else {}
        self.rows: list[Step] = []

    def run(self, name: str, command: str, work: Callable[[], object]) -> None:
        """Does `work`, which skips by itself what an earlier demo finished; seconds of interrupted attempts add up."""
        begin = time.monotonic()
        try:
            work()
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - begin, 2)
            write_text(self.path, json.dumps(self.seconds, indent=2) + "\n")
        self.rows.append(Step(name, command, self.seconds[name]))


def demo(out: Path, *, tiny: bool, threads: int) -> str:
    """Runs every step and returns the table and the path of the report."""
    size = TINY if tiny else Size()
    raw, prepared, runs = out / "raw", out / "prepared", out / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    done = read_json_object(out / "summary.json", max_bytes=_MAX_BYTES) if (out / "summary.json").is_file() else None
    if done is not None:
        if done["tiny"] != tiny:
            raise ConfigError(f"{out}: holds a demo of the other size (--tiny or not). Remove it, or choose another --out.")
        return f"{_table(done)}\n\nThis demo was already finished; remove {out} to run it again.\nreport: {done['report']}"
    steps = _Steps(out / "steps.json")
    steps.run(
        "synth",
        f"picture3d synth {raw} --scenes {size.scenes} --val-scenes {size.val_scenes} --keyframes {size.keyframes} "
        f"--sweeps-per-keyframe {size.sweeps_per_keyframe} --processes 2",
        lambda: data_commands.synth(
            raw,
            scenes=size.scenes,
            keyframes=size.keyframes,
            sweeps_per_keyframe=size.sweeps_per_keyframe,
            val_scenes=size.val_scenes,
            seed=0,
            version="v1.0-mini",
            processes=2,
        ),
    )
    steps.run(
        "prepare",
        f"picture3d prepare nuscenes {raw} {prepared}",
        lambda: prepare_nuscenes(raw, prepared, version="v1.0-mini", sweeps=9, skip_missing=False)[0],
    )
    steps.run(
        "targets",
        f"picture3d targets {prepared} --teacher town",
        lambda: data_commands.targets(
            prepared, teacher="town", weights=None, superclasses=8, seed=0, device="cpu", threads=threads
        ),
    )
    for name in RUNS[1:]:
        config = _pretraining(name, prepared, size)
        steps.run(
            f"pretrain {name}",
            f"picture3d pretrain --recipe {config.recipe} --data {prepared} --out {runs / name}{_sets(_PRETRAIN)} "
            f"--max-steps {size.pretrain_steps}",
            lambda config=config, name=name: run_pretraining(config, runs / name, True, "cpu", threads),
        )
    for name in RUNS:
        settings = _segmentation(prepared, size, runs / name if name != "scratch" else None)
        encoder = "" if name == "scratch" else f"--encoder {runs / name} "
        folder = runs / f"segment-{name}"
        steps.run(
            f"finetune {name}",
            f"picture3d finetune segmentation --recipe town-segmentation --data {prepared} {encoder}--out {folder} "
            f"--label-share {size.label_share}{_sets(_FINETUNE)} --set training.max_steps={size.finetune_steps}",
            lambda settings=settings, folder=folder: run_finetuning(settings, folder, True, "cpu", threads),
        )
    scores: dict[str, dict[str, object]] = {}
    for name in RUNS:
        folder = runs / f"segment-{name}"

        def score(name: str = name, folder: Path = folder) -> None:
            found = run_evaluation(folder, data=None, split="val", device="cpu", threads=threads)
            scores[name] = {"miou": found.score, "iou": dict(found.by_class)}

        steps.run(f"evaluate {name}", f"picture3d evaluate {folder}", score)
    page = out / "report.html"
    rows = tuple(steps.rows)
    steps.run(
        "report",
        f"picture3d report {out}",
        lambda: write_report(
            out, device="cpu", threads=threads, title="PICTURE in eight minutes", summary=_SUMMARY, steps=rows, notes=_NOTES
        ),
    )
    summary = {
        "seconds": round(sum(steps.seconds.values()), 1),
        "scores": scores,
        "report": str(page),
        "steps": steps.seconds,
        "tiny": tiny,
    }
    write_text(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    return f"{_table(summary)}\nreport: {page}"


def _pretraining(name: str, prepared: Path, size: Size) -> PretrainConfig:
    changes = [*_PRETRAIN, f"training.max_steps={size.pretrain_steps}"]
    return pretraining_recipe(f"town-{name}", prepared).with_overrides(changes)


def _segmentation(prepared: Path, size: Size, encoder: Path | None) -> SegmentationConfig:
    changes = [*_FINETUNE, f"data.label_share={size.label_share}", f"training.max_steps={size.finetune_steps}"]
    config = segmentation_recipe("town-segmentation", prepared).with_overrides(changes)
    return config.model_copy(update={"pretrained": encoder})


def _sets(settings: Sequence[str]) -> str:
    """The settings as options of a command."""
    return "".join(f" --set {shlex.quote(setting)}" for setting in settings)


def _table(summary: dict[str, object]) -> str:
    scores = summary["scores"]
    assert isinstance(scores, dict)
    names = list(scores)
    classes = list(scores[names[0]]["iou"])
    lines = [f"{'IoU %':22s}" + "".join(f"{name:>17s}" for name in names)]
    for label in classes:
        cells = [scores[name]["iou"][label] for name in names]
        lines.append(f"{label:22s}" + "".join(f"{'-' if v is None else f'{100 * v:.1f}':>17s}" for v in cells))
    lines.append(f"{'mIoU':22s}" + "".join(f"{100 * (scores[name]['miou'] or 0):>17.1f}" for name in names))
    seconds = summary["seconds"]
    assert isinstance(seconds, float | int)
    lines.append(f"{duration(seconds)} in all")
    return "\n".join(lines)
