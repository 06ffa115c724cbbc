"""What pre-training is worth on the synthetic town, in runs of a minute or two: labels, masks, targets, encoders.

    python benchmarks/evidence.py labels|labels-random|labels-detection|labels-occupancy|masks|targets|probes --work FOLDER
        [--budget SECONDS] [--seeds 0,1,2] [--only TEXT]
    python benchmarks/evidence.py bounds|hidden --work FOLDER
    python benchmarks/evidence.py show

Everything goes through the commands a user types. A finished row is a JSON file below `benchmarks/evidence/`, named after what
it is; what is there is not done again, so the tables grow over days and machines. Data, run folders and checkpoints lie in
FOLDER and may be thrown away. No new row is begun after `--budget` seconds.

    labels   mIoU of fine-tuning from scratch, coordinates, features, PICTURE, GPICTURE, PICTURE with visible voxels told, and
             those told alone, at 1/16, 1/4 and all labels; probes
    labels-random  the same of the two PICTUREs with random masks of 60 %, at 1/16
    labels-detection  mAP of detectors from the encoders of `labels`, at 1/16 of the labels
    labels-occupancy  mIoU of occupancy networks from them, at 1/16
    masks    probes of PICTURE with random, block and I2Mask masks (literal, default) at 20, 40, 60, 75 % hidden
    targets  probes of PICTURE with the town teacher at loss weights 1:0, 1:1, 1:3, 0:1, hand-crafted features, self-teacher;
             and with features whitened, told of visible voxels, both, and nothing hidden
    probes   probes of the teacher and of an encoder that was never trained
    bounds   the loss on hidden features of predictions that know the mean, the height, or the nearest visible voxels
    hidden   what masks hide: of each class, and how many superclasses of a sweep wholly or not at all

Seconds of a row are by the clock; `cpu_seconds` is what the process computed, which other work on the machine changes less.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from picture3d.commands import data as data_commands
from picture3d.commands.build import build_targets, training_batches
from picture3d.commands.experiment import Plan, label_efficiency_experiment
from picture3d.commands.experiment_page import SCRATCH, read_cells
from picture3d.commands.prepare import prepare_nuscenes, prepare_occupancy
from picture3d.commands.probe import probe
from picture3d.commands.score import aligned
from picture3d.commands.train import run_pretraining
from picture3d.datasets.detection_classes import NUSCENES_DETECTION
from picture3d.datasets.label_sets import NUSCENES_16
from picture3d.datasets.object_building import build_object_database
from picture3d.evaluation.label_efficiency import CellScore, label_efficiency, markdown_table
from picture3d.files import read_json_object, write_json
from picture3d.ops.scatter import segment_mean
from picture3d.ops.voxelize import assign_voxels
from picture3d.pretrain.mask_lab import voxel_places
from picture3d.pretrain.masking import MaskConfig, choose_hidden
from picture3d.pretrain.targets import voxel_targets
from picture3d.recipes.catalogue import pretraining_recipe
from picture3d.recipes.configs import PretrainConfig
from picture3d.recipes.town import SMALL_TOWN
from picture3d.tasks.probe import voxel_labels
from picture3d.training.runlog import describe_environment

ROWS = Path(__file__).parent / "evidence"

# Towns 70000 to 70039; the teacher's begin at 1,000,000.
TOWNS = {"scenes": 40, "keyframes": 6, "sweeps_per_keyframe": 0, "val_scenes": 8, "seed": 7}

NETWORK = (*SMALL_TOWN, "encoder.point_inputs=unit", "training.batch_size=1", "training.checkpoint_every=500")
PRETRAIN = (*NETWORK, "training.max_steps=1500", "training.optim.peak_lr=3e-3")
FINETUNE = (*NETWORK, "task.head_channels=32", "training.max_steps=1000", "training.optim.peak_lr=5e-3")
# A single sweep, as the encoders saw them, and cells of 0.8 m in the map.
DETECT = (
    *NETWORK,
    "data.sweeps=1",
    'data.features=["intensity"]',
    "data.objects.database=train-1sweeps",
    "task.bev.strides=[1,2]",
    "training.max_steps=1000",
)
OCCUPY = (*NETWORK, "task.strides=[1,2]", "task.channels=[32,32]", "training.max_steps=400")
# Parts that only choose by the probe take half the steps.
PROBED = (*NETWORK, "training.max_steps=750", "training.optim.peak_lr=3e-3")
METHODS = (
    SCRATCH,
    "town-coordinates",
    "town-features",
    "town-picture",
    "town-gpicture",
    "town-picture-visible",
    "town-distillation",
)
OTHER_TASKS = (SCRATCH, "town-coordinates", "town-picture", "town-picture-visible")
REAL_METHODS = (SCRATCH, "coordinates", "picture", "picture-visible")  # of real_keyframes.py: town-* recipes
LABELS = "labels"  # the folder of the main table; others, of earlier settings, begin with the same word
SHARES = (0.0625, 0.25, 1.0)
PROBE_SHARE = 0.25
ENCODERS = 3  # pre-trained per method; further seeds draw other labels for the same ones

# What one "3" of the published weights 1:3 is in the town recipes, whose voxels make the Chamfer loss larger.
_THIRD = 20.0 / 3.0
_MASKS = {
    "random": ("mask.kind=random",),
    "block": ("mask.kind=block", "mask.block_cells=8"),
    "literal": ("mask.intra_class=literal", "mask.min_ratio=0"),
    "default": (),
}
_WHITENED_VISIBLE = ("loss.features_scale=whitened", "loss.features_weight=10", "loss.visible_features_weight=10")
_NOTHING_HIDDEN = ("mask.kind=random", "mask.target_ratio=0", "loss.features_weight=0", "loss.coordinates_weight=0")
_RANDOM_60 = ("mask.kind=random", "mask.target_ratio=0.6")
_TARGETS = {
    "town 1:0": ("town-picture", ("loss.features_weight=0",)),
    "town 1:1": ("town-picture", (f"loss.features_weight={_THIRD}",)),
    "town 1:3": ("town-picture", ()),
    "town 0:1": ("town-picture", ("loss.coordinates_weight=0",)),
    "town whitened": ("town-picture", ("loss.features_scale=whitened", "loss.features_weight=10")),
    "town visible": ("town-picture", ("loss.visible_features_weight=20",)),
    "town whitened visible": ("town-picture-visible", ()),
    "town nothing hidden": ("town-distillation", ()),
    "town 1:0 random 60": ("town-picture", ("loss.features_weight=0", *_RANDOM_60)),
    "town whitened visible random 60": ("town-picture-visible", _RANDOM_60),
    "handcrafted": ("town-handcrafted", ()),
    "handcrafted whitened visible": ("town-handcrafted", _WHITENED_VISIBLE),
    "handcrafted nothing hidden": ("town-handcrafted", (*_WHITENED_VISIBLE, *_NOTHING_HIDDEN)),
    "ema": ("town-ema", ("targets.ema.ramp_steps=750",)),
}


@dataclass(frozen=True, slots=True)
class ProbedRow:
    """One pre-training that is judged by probes."""

    part: str
    name: str
    recipe: str
    settings: tuple[str, ...]


def probed_rows(part: str) -> list[ProbedRow]:
    """The rows of a part that is judged by probes, the most telling first."""
    if part == "masks":
        return [
            ProbedRow(part, f"{kind} {ratio}", "town-picture", (*settings, f"mask.target_ratio={ratio}"))
            for ratio in (0.6, 0.75, 0.4, 0.2)
            for kind, settings in _MASKS.items()
        ]
    return [ProbedRow(part, name, recipe, settings) for name, (recipe, settings) in _TARGETS.items()]


def make_data(work: Path, teachers: tuple[str, ...], part: str) -> Path:
    """Towns, prepared frames, what teachers say of them and what the part needs besides; what is there stays."""
    raw, prepared = work / "raw", work / "prepared"
    if not (prepared / "dataset.json").is_file():
        data_commands.synth(raw, version="v1.0-mini", processes=1, **TOWNS)  # pyright: ignore[reportArgumentType]
        prepare_nuscenes(raw, prepared, version="v1.0-mini", sweeps=0, skip_missing=False)
    for teacher in teachers:
        if not (prepared / "targets" / teacher / "teacher.json").is_file():
            settings: dict[str, Any] = {"weights": None, "superclasses": 8, "seed": 0, "device": "cpu", "threads": 1}
            data_commands.targets(prepared, teacher=teacher, **settings)
    if part == "labels-detection" and not (prepared / "objects" / "train-1sweeps.objects").is_file():
        build_object_database(prepared, sweeps=1, classes=NUSCENES_DETECTION)
    if part == "labels-occupancy" and not (prepared / "occupancy" / "occupancy.json").is_file():
        data_commands.synth(raw, version="v1.0-mini", processes=1, occupancy=True, **TOWNS)  # pyright: ignore[reportArgumentType]
        prepare_occupancy(raw, prepared)
    return prepared


@contextmanager
def measured(row: dict[str, Any]) -> Iterator[None]:
    """Puts seconds by the clock and of the processor, and the peak of memory where Linux tells it, into a row."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    clock, cpu = time.perf_counter(), time.process_time()
    yield
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    row |= {
        "seconds": round(time.perf_counter() - clock, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "peak_mib": round(int(peak.split()[1]) / 1024),
    }


@dataclass(frozen=True, slots=True)
class LabelTable:
    """A label-efficiency experiment: the folder of its rows, and what is compared in it."""

    folder: str
    methods: tuple[str, ...] = METHODS
    shares: tuple[float, ...] = SHARES
    pretrain_set: tuple[str, ...] = PRETRAIN
    finetuning: str = "town-segmentation"
    finetune_set: tuple[str, ...] = FINETUNE
    probe_share: float | None = None


LABEL_TABLES = {
    "labels": LabelTable(LABELS, probe_share=PROBE_SHARE),
    "labels-random": LabelTable(
        f"{LABELS}_random_0.6",
        ("town-picture", "town-picture-visible"),
        SHARES[:1],
        (*PRETRAIN, *_RANDOM_60),
        probe_share=PROBE_SHARE,
    ),
    "labels-detection": LabelTable(
        f"{LABELS}_detection", OTHER_TASKS, SHARES[:1], finetuning="town-detection", finetune_set=DETECT
    ),
    "labels-occupancy": LabelTable(
        f"{LABELS}_occupancy", OTHER_TASKS, SHARES[:1], finetuning="town-occupancy", finetune_set=OCCUPY
    ),
}


def label_rows(table: LabelTable, data: Path, work: Path, seeds: tuple[int, ...]) -> Iterator[tuple[str, Callable[[], object]]]:
    """Missing cells of a label-efficiency experiment, each with what makes it; the fewest labels first, seed by seed."""
    kept, folder = ROWS / table.folder, work / table.folder
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    for path in [*kept.glob("cells/*.json"), *kept.glob("experiment.json")]:
        shutil.copy(path, folder / path.relative_to(kept))
    common: dict[str, Any] = {"data": data, "encoders": ENCODERS, "probe_share": table.probe_share}
    common |= {"finetuning": table.finetuning, "finetune_set": table.finetune_set, "pretrain_set": table.pretrain_set}
    if table.pretrain_set == PRETRAIN:  # one encoder serves all tasks
        (folder / "runs").mkdir(exist_ok=True)
        for run in (work / LABELS).glob("runs/pretrain-*"):
            if not (folder / "runs" / run.name).exists():
                (folder / "runs" / run.name).symlink_to(run.resolve())

    def do(plan: Plan) -> None:
        label_efficiency_experiment(plan, folder, device="cpu", threads=1, as_json=True)
        (kept / "cells").mkdir(parents=True, exist_ok=True)
        for path in [*folder.glob("cells/*.json"), *folder.glob("experiment.json")]:
            shutil.copy(path, kept / path.relative_to(folder))

    for share, seed in itertools.product(table.shares, seeds):
        for method in table.methods:
            if (kept / "cells" / f"{method}_{share:g}_{seed}.json").is_file():
                continue
            plan = Plan(methods=(method,), shares=(share,), seeds=(seed,), **common)
            first = plan.encoder_seed(seed)
            run = folder / "runs" / f"pretrain-{method}-seed{first}"
            if method != SCRATCH and not (run / "model.safetensors").is_file():
                # By itself: it is the longest piece of work, and the cell then finds it done.
                config = plan.pretraining(method, first)
                path = ROWS / table.folder.replace(LABELS, "costs") / f"{method}_{first}.json"
                yield f"pretrain {method} {first}", lambda c=config, r=run, m=method, p=path: pretrain_cost(c, r, m, p)
            yield f"{method} {share:g} {seed}", lambda p=plan: do(p)


def pretrain_cost(config: PretrainConfig, run: Path, method: str, path: Path) -> None:
    """Pre-trains; what it took is a row of its own."""
    row = {**run_and_measure(config, run, method), "part": "costs", "steps": config.training.max_steps}
    write_row(path, row | {"seed": config.training.seed, "model_bytes": (run / "model.safetensors").stat().st_size})


def run_and_measure(config: PretrainConfig, run: Path, name: str) -> dict[str, Any]:
    """Pre-trains; returns what it took."""
    row: dict[str, Any] = {"name": name}
    with measured(row):
        run_pretraining(config, run, True, "cpu", 1)
    return row


def probe_rows(part: str, data: Path, work: Path, seeds: tuple[int, ...]) -> Iterator[tuple[str, Callable[[], object]]]:
    """Missing pre-trainings of a part, each with what makes and probes it."""
    for seed in seeds:
        for one in probed_rows(part):
            path = ROWS / part / f"{one.name.replace(' ', '_').replace(':', '-')}_{seed}.json"
            if path.is_file():
                continue

            def do(one: ProbedRow = one, path: Path = path, seed: int = seed) -> None:
                settings = [*PROBED, *one.settings, f"training.seed={seed}"]
                config = pretraining_recipe(one.recipe, data).with_overrides(settings)
                run = work / part / path.stem
                cost = run_and_measure(config, run, one.name)
                losses = json.loads((run / "summary.json").read_text())["losses"]
                row = {"part": part, "name": one.name, "recipe": one.recipe, "settings": settings, "seed": seed, **cost}
                row |= {"hidden_share": losses["hidden_share"], "model_bytes": (run / "model.safetensors").stat().st_size}
                write_row(path, row | probed(run, seed))

            yield f"{part} {one.name} {seed}", do


def frozen_rows(data: Path, work: Path, seeds: tuple[int, ...]) -> Iterator[tuple[str, Callable[[], object]]]:
    """The teacher, and an encoder whose one step has a learning rate of nearly 0: as its weights were drawn."""
    for seed in seeds:
        for name in ("untrained", "teacher"):
            path = ROWS / "probes" / f"{name}_{seed}.json"
            if path.is_file() or (name == "teacher" and seed > 0):
                continue

            def do(name: str = name, path: Path = path, seed: int = seed) -> None:
                settings = [*NETWORK, "training.max_steps=1", "training.optim.peak_lr=1e-12", f"training.seed={seed}"]
                run = work / "probes" / path.stem
                run_pretraining(pretraining_recipe("town-picture", data).with_overrides(settings), run, True, "cpu", 1)
                row = {"part": "probes", "name": name, "settings": settings, "seed": seed}
                write_row(path, row | probed(run, seed, teacher=name == "teacher"))

            yield f"probe {name} {seed}", do


def probed(run: Path, seed: int, *, teacher: bool = False) -> dict[str, Any]:
    """What a row keeps of the probe of a run."""
    options: dict[str, Any] = {"data": None, "label_share": PROBE_SHARE, "seed": seed, "as_json": True, "device": "cpu"}
    tree = json.loads(probe(run, threads=1, teacher=teacher, **options))
    return {
        "probe_share": PROBE_SHARE,
        "probe_miou": tree["miou"],
        "knn_miou": tree["knn"]["miou"],
        "rank": tree["effective_rank"]["overall"],
        "iou": tree["iou"],
    }


def write_row(path: Path, row: dict[str, Any]) -> None:
    """A finished row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**row, "environment": describe_environment("cpu")})


def bounds(data: Path, frames: int = 6) -> dict[str, float]:
    """Smooth-L1 on the hidden voxels' teacher features, 60 % hidden at random, of four simple predictions."""
    config = pretraining_recipe("town-picture", data).with_overrides(list(NETWORK))
    batches = training_batches(config, build_targets(config.targets, data, torch.device("cpu")))
    generator, sweeps = torch.Generator().manual_seed(0), []
    for batch in itertools.islice(batches.epoch(0, 0), frames):
        assignment = assign_voxels(batch.xyz, batch.sample, 1, config.grid.grid)
        told = voxel_targets(batch, assignment, config.mask, generator).features
        assert told is not None
        sweeps.append((assignment.coords[:, 1:], told, torch.rand(len(told), generator=generator) < 0.6))
    height = torch.cat([coords[:, 2] for coords, _, _ in sweeps]).long()
    features = torch.cat([told for _, told, _ in sweeps])
    levels = config.grid.grid.shape[2]
    by_height = segment_mean(features, height, levels)
    found: dict[str, list[float]] = {}
    for coords, told, hidden in sweeps:
        near = torch.cdist(coords[hidden].float(), coords[~hidden].float()).topk(5, largest=False).indices
        visible = told[~hidden]
        predictions = {
            "mean of all": features.mean(0).expand(int(hidden.sum()), -1),
            "mean of the height": by_height[coords[hidden][:, 2].long()],
            "nearest visible voxel's own": visible[near[:, 0]],
            "mean of the five nearest's own": visible[near].mean(1),
        }
        for name, predicted in predictions.items():
            found.setdefault(name, []).append(float(F.smooth_l1_loss(predicted, told[hidden])))
    return {name: sum(values) / len(values) for name, values in found.items()}


def hidden(data: Path, frames: int = 16) -> str:
    """Per cent of each class's voxels that masks hide at 20 and 60 %, and of superclasses that they hide wholly or never."""
    names = NUSCENES_16.train_names[1:]
    rows: list[tuple[str, ...]] = [("mask", "wholly", "never", *names)]
    for kind, settings in _MASKS.items():
        for ratio in (0.2, 0.6):
            changes = [*NETWORK, *settings, f"mask.target_ratio={ratio}", "data.labels=true"]
            config = pretraining_recipe("town-picture", data).with_overrides(changes)
            batches = training_batches(config, build_targets(config.targets, data, torch.device("cpu")))
            generator = torch.Generator().manual_seed(0)
            lost, there, shares = torch.zeros(17), torch.zeros(17), []
            for batch in itertools.islice(batches.epoch(0, 0), frames):
                assignment = assign_voxels(batch.xyz, batch.sample, 1, config.grid.grid)
                coords, stored = assignment.coords, MaskConfig()
                told = voxel_targets(batch, assignment, config.mask, generator)
                places, sample = voxel_places(coords, config.grid.grid), coords[:, 0].long()
                gone = choose_hidden(told.features, told.superclass, sample, 1, config.mask, generator, places)
                superclass = voxel_targets(batch, assignment, stored, generator).superclass
                shares += [float(gone[superclass == found].float().mean()) for found in superclass.unique() if found >= 0]
                assert batch.labels is not None
                label = voxel_labels(batch.labels, assignment)
                lost, there = lost + label[gone].bincount(minlength=17), there + label.bincount(minlength=17)
            by_class = [f"{100 * float(share):.0f}" for share in (lost / there.clamp(min=1))[1:]]
            extremes = [
                f"{100 * sum(map(test, shares)) / len(shares):.0f}" for test in (lambda x: x > 0.99, lambda x: x < 0.01)
            ]
            rows.append((f"{kind} {100 * ratio:.0f}", *extremes, *by_class))
    return "\n".join(aligned(list(zip(*rows, strict=True))))


def real_table(folder: Path) -> str:
    """The rows that `real_keyframes.py` left in a folder, as a table; share of labels is that of five keyframes."""
    rows = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    cells = [CellScore(row["method"], row["labelled"] / 5, row["seed"], row["miou"]) for row in rows]
    return markdown_table(label_efficiency(cells, REAL_METHODS), measure="mIoU")


def show() -> None:
    """All rows as tables."""
    for folder in sorted(ROWS.glob(f"{LABELS}*")):
        methods, cells = read_cells(folder, METHODS)
        common = read_json_object(folder / "experiment.json", max_bytes=1 << 20)
        print(f"\n{folder.name}: pre-training {common['pretrain_set'][-2:]}, fine-tuning {common['finetune_set'][-2:]}")
        print(markdown_table(label_efficiency([cell for cell, _ in cells], methods), measure=cells[0][1]["measure"]))
    for folder in sorted(ROWS.glob("real*")):
        print(f"\n{folder.name}\n{real_table(folder)}")
    for part in ("probes", "masks", "targets"):
        rows = [json.loads(path.read_text()) for path in sorted((ROWS / part).glob("*.json"))]
        print(f"\n{part}: seed, hidden %, linear, kNN, rank, seconds, processor seconds, MiB")
        for row in rows:
            shares = [f"{100 * row[name]:.1f}" for name in ("hidden_share", "probe_miou", "knn_miou") if name in row]
            cost = [row.get(name, "-") for name in ("seconds", "cpu_seconds", "peak_mib")]
            print(
                f"| {row['name']} | {row['seed']} | {' | '.join(shares)} | {row['rank']:.1f} | {' | '.join(map(str, cost))} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=(*LABEL_TABLES, "masks", "targets", "probes", "bounds", "hidden", "show"))
    parser.add_argument("--work", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--budget", type=float, default=1e9)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", default="", help="rows whose name holds one of these, separated by commas")
    args = parser.parse_args()
    if args.part == "show":
        show()
        return
    begin = time.monotonic()
    data = make_data(args.work, ("town", "handcrafted") if args.part == "targets" else ("town",), args.part)
    seeds = tuple(int(seed) for seed in args.seeds.split(","))
    match args.part:
        case "bounds":
            print("\n".join(f"{name:32s}{value:.5f}" for name, value in bounds(data).items()))
            return
        case "hidden":
            print(hidden(data))
            return
        case part if part in LABEL_TABLES:
            rows = label_rows(LABEL_TABLES[part], data, args.work, seeds)
        case "probes":
            rows = frozen_rows(data, args.work, seeds)
        case part:
            rows = probe_rows(part, data, args.work, seeds)
    for name, do in rows:
        if not any(text in name for text in args.only.split(",")):
            continue
        if time.monotonic() - begin > args.budget:
            print("budget spent; the same command goes on")
            return
        do()
        print(f"{name}: done, {time.monotonic() - begin:.0f} s since the start", flush=True)
    print("all rows are there")


if __name__ == "__main__":
    main()
