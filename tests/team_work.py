"""What the processes of a team do in tests, each result written by its rank; and the same work in one process.

Started as ``torchrun -m tests.team_work WORK OUT [DATA]``. What it is given in DATA it may write to.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from picture3d.commands.build import build_detection, build_occupancy, build_picture, build_segmentation, training_batches
from picture3d.commands.score import evaluate_together
from picture3d.datasets.openoccupancy import NUSCENES_OCCUPANCY, attach_occupancy
from picture3d.datasets.prepared import PreparedDataset
from picture3d.errors import TrainingError
from picture3d.models.row_norm import MapBatchNorm, RowBatchNorm, SequenceBatchNorm, shared_batch_norm
from picture3d.ops.processes import computing_together, mean_count, rand_rows
from picture3d.recipes.catalogue import detection_recipe, occupancy_recipe, pretraining_recipe, segmentation_recipe, tiny
from picture3d.structures.frame import Frame
from picture3d.structures.poses import Pose
from picture3d.structures.targets import FrameTargets
from picture3d.training.distributed import Team, joined_team
from picture3d.training.loop import FitResult, fit
from picture3d.training.runlog import RunFolder
from tests.datasets.made_frames import made_frame, write_made_dataset

FRAMES = 5
ROWS = {"even": (6, 6), "uneven": (1, 8), "one-sided": (0, 7), "lonely": (1, 0), "none": (0, 0)}
RUNS: dict[str, dict[str, Any]] = {
    "pretraining": {},
    "accumulated": {"accumulate": 2},
    "visible": {},
    "segmentation": {},
    "occupancy": {},
}
MORE: dict[str, dict[str, Any]] = {"bf16": {"precision": "bf16"}}
DETECTORS: dict[str, dict[str, Any]] = {"center": {}, "transfusion": {}}
# In float32 weights whose gradients are rounding errors take steps of Adam's full size; whitened targets have more of them.
IN_DOUBLE = {*DETECTORS, "visible", "occupancy"}


def launch(work: str, *paths: Path, processes: int = 2, timeout_s: float = 120, **environment: str) -> Any:
    """Runs `work` in several processes of this machine under torchrun; the finished process with its output."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", "tests.team_work", work, *map(str, paths)]
    given = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, env=given, capture_output=True, text=True, timeout=timeout_s, check=False)


def made_data(root: Path) -> Path:
    """One log of keyframes with everything that any recipe asks for, of different sizes."""

    def sweeps() -> Iterator[Frame]:
        for index in range(FRAMES):
            pose = Pose.from_yaw(0.02 * index, (0.5 * index, 0.0, 0.0))
            frame = made_frame("log", index, points=300 + 150 * index, seed=index, global_from_ego=pose, is_keyframe=True)
            assert frame.boxes is not None
            yield replace(frame, boxes=replace(frame.boxes, category=("vehicle.car", "pedestrian", "Vehicle")))

    frames = list(sweeps())
    write_made_dataset(root, {"log": frames}, splits={"train": ["log"]}, source={"scene": "log"})
    for frame in frames:
        cells, _ = NUSCENES_OCCUPANCY.locate(frame.points.xyz)
        cells = np.unique(cells, axis=0)
        path = root / "labels" / "scene_log" / "occupancy" / f"{frame.token}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, np.column_stack([cells[:, ::-1], 1 + np.arange(len(cells)) % 16]))
    attach_occupancy(root / "labels", PreparedDataset(root))
    return root


def made_runs(root: Path) -> Path:
    """Untrained networks of three kinds, as run folders, and three logs of unequal length to score them on."""
    prepared = root / "prepared"
    kinds = ("vehicle.car", "human.pedestrian.adult", "Vehicle")
    frames: dict[str, list[Frame]] = {}
    for number, log in enumerate(("b", "a", "c")):
        made = (
            made_frame(log, index, points=200 + 50 * index, seed=number, global_from_ego=Pose.identity())
            for index in range(3 - number)
        )
        frames[log] = [replace(frame, boxes=replace(frame.boxes, category=kinds)) for frame in made]  # pyright: ignore[reportArgumentType]
    write_made_dataset(prepared, frames, splits={"val": ["b", "a", "c"]})
    cpu = torch.device("cpu")
    segment = tiny(segmentation_recipe("town-segmentation", prepared))
    runs: dict[str, tuple[Any, Any]] = {"segment": (segment, build_segmentation(segment, cpu))}
    for name in ("town-detection", "waymo-detection"):
        config = tiny(detection_recipe(name, prepared))
        head = config.task.head.model_copy(update={"score_threshold": 0.0})
        config = config.model_copy(update={"task": config.task.model_copy(update={"head": head})})
        runs[name] = config, build_detection(config, cpu)
    for name, (config, task) in runs.items():
        RunFolder(root / name).claim(config)
        save_file(task.module.state_dict(), root / name / "model.safetensors")
    return root


RUNS_TO_SCORE = ("segment", "town-detection", "waymo-detection")


def evaluate_runs(root: Path, team: Team) -> dict[str, str]:
    """What `evaluate` says of each of `made_runs`, as JSON."""
    given: dict[str, Any] = {"data": None, "split": "val", "as_json": True, "machine": torch.device("cpu"), "team": team}
    return {name: evaluate_together(root / name, **given) for name in RUNS_TO_SCORE}


class Octants:
    """A teacher with one cell per octant and 4 m ring around the sensor."""

    def __init__(self, channels: int) -> None:
        self.channels = channels

    def targets(self, frame: Frame) -> FrameTargets:
        octant = (frame.points.xyz > 0) @ np.array([1, 2, 4])
        ring = (np.linalg.norm(frame.points.xyz, axis=1) // 4).astype(np.int64)
        keys, cell = np.unique(ring * 8 + octant, return_inverse=True)
        features = np.cos(np.arange(1, self.channels + 1) * keys[:, None] / 10).astype(np.float16)
        return FrameTargets(features, (keys % 8).astype(np.uint8), cell.astype(np.int64))


@contextmanager
def in_double(task: Any) -> Iterator[None]:
    """The task's network and losses in float64, also where they ask for float32."""
    narrow, loss = Tensor.float, task.loss

    def wide_loss(batch: Any, generator: torch.Generator) -> Any:
        columns = {name: getattr(batch, name) for name in ("xyz", "features", "boxes")}
        wide = {name: column.double() for name, column in columns.items() if column is not None}
        return loss(replace(batch, **wide), generator)

    task.module.double()
    task.loss, Tensor.float = wide_loss, Tensor.double
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        task.loss, Tensor.float = loss, narrow


def train(name: str, data: Path, out: Path, team: Team, *, batch_size: int, resume: bool = False, **changes: Any) -> FitResult:
    """Two epochs of a shrunk recipe in the run folder `out`; the last batch of each epoch is incomplete.

    Detectors and whitened targets compute in float64: see the test that compares them.
    """
    cpu = torch.device("cpu")
    own = {**RUNS, **MORE, **DETECTORS}[name]
    updates = {"epochs": 2, "max_steps": None, "batch_size": batch_size, "keep_last": 9, **own, **changes}

    def shrunk(config: Any) -> Any:
        small = tiny(config)
        also = {"training": small.training.model_copy(update=updates)}
        if name in {"segmentation", "occupancy"}:  # the one loss that is neither a sum over rows nor a function of sums
            also["task"] = small.task.model_copy(update={"lovasz_weight": 0.0})
        return small.model_copy(
            update={**also, "data": small.data.model_copy(update={"every": 1, "drop_last": False, "cache_bytes": 2**28})}
        )

    if name == "segmentation":
        config = shrunk(segmentation_recipe("town-segmentation", data))
        task, targets = build_segmentation(config, cpu), None
    elif name == "occupancy":
        config = shrunk(occupancy_recipe("town-occupancy", data))
        task, targets = build_occupancy(config, cpu), None
    elif name in DETECTORS:
        recipe = {"center": "waymo-detection", "transfusion": "nuscenes-detection"}[name]
        config = shrunk(detection_recipe(recipe, data))
        task, targets = build_detection(config, cpu), None
    else:
        config = shrunk(pretraining_recipe("town-picture-visible" if name == "visible" else "town-picture", data))
        task, targets = build_picture(config, cpu), Octants(config.targets.channels)
    batches = training_batches(config, targets, team.place)
    with in_double(task) if name in IN_DOUBLE else nullcontext():
        return fit(task, batches, config.training, RunFolder(out), resume=resume, progress=lambda *_: None, team=team)


def norm_case(kind: str, rows: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Any, Tensor | None]:
    """Rows of both ranks, the gradient that comes back, a norm in its middle age, and how often each row counts."""
    generator = torch.Generator().manual_seed(sum(rows))
    shape = {"rows": (sum(rows), 3), "counted": (sum(rows), 3), "sequence": (sum(rows), 3, 4), "map": (sum(rows), 3, 2, 4)}[
        kind
    ]
    x, gradient = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    norm = {"rows": RowBatchNorm, "counted": SequenceBatchNorm, "sequence": SequenceBatchNorm, "map": MapBatchNorm}[kind](3)
    norm = norm.to(dtype if dtype == torch.float64 else torch.float32)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, -2.0, 1.0]))
        norm.bias.copy_(torch.tensor([0.1, 0.0, -3.0]))
        norm.running_mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    counts = torch.randint(1, 5, (sum(rows),), generator=generator) if kind == "counted" else None
    return x, gradient, norm, counts


def norm_results(norm: Any, x: Tensor, gradient: Tensor, counts: Tensor | None, group: Any) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    with computing_together(group):
        y = norm(x) if counts is None else shared_batch_norm(norm, x, group, counts)
    y.backward(gradient)
    assert x.grad is not None
    kept = {"y": y.detach(), "x": x.grad, "weight": norm.weight.grad, "bias": norm.bias.grad}
    kept |= {"mean": norm.running_mean, "var": norm.running_var, "tracked": norm.num_batches_tracked}
    return {name: value.contiguous().clone() for name, value in kept.items()}


def _norms(team: Team, out: Path) -> None:
    rank = team.place.rank
    results: dict[str, Tensor] = {}
    for name, rows in ROWS.items():
        for kind in ("rows", "counted", "sequence", "map"):
            for dtype in (torch.float64, torch.float32, torch.bfloat16):
                x, gradient, norm, counts = norm_case(kind, rows, dtype)
                own = slice(0, rows[0]) if rank == 0 else slice(rows[0], None)
                found = norm_results(norm, x[own], gradient[own], None if counts is None else counts[own], team.norms)
                results |= {f"{name}/{kind}/{dtype}/{key}": value for key, value in found.items()}
    with computing_together(team.norms):
        generator = torch.Generator().manual_seed(4)
        results["draw"] = rand_rows(3 + 2 * rank, generator)
        results["draw columns"] = rand_rows(2 - rank, generator, (4,))
        results["after"] = torch.rand(3, generator=generator)
        here = torch.zeros(())
        for key, count in {"int": 3 * rank, "tensor": torch.tensor(4 + rank), "mass": torch.tensor(0.25), "none": 0}.items():
            results[f"count {key}"] = torch.as_tensor(mean_count(count, here))
    assert torch.equal(torch.as_tensor(mean_count(7, torch.zeros(()))), torch.tensor(7))  # outside of a step: alone
    save_file(results, out / f"norms-{rank}.safetensors")


def _runs(team: Team, out: Path, data: Path) -> None:
    for name in RUNS:
        train(name, data, out / name, team, batch_size=1)
    # Cut after its first epoch, then taken up again.
    train("pretraining", data, out / "resumed", team, batch_size=1, checkpoint_every=2)
    for path in (out / "resumed").glob("**/*"):
        if team.writes and (path.name in {"summary.json", "model.safetensors"} or "0000006" in path.name):
            path.unlink()
    team.any(False)
    train("pretraining", data, out / "resumed", team, batch_size=1, checkpoint_every=2, resume=True)


class _Trouble:
    """A task that goes wrong in one rank at one step."""

    def __init__(self, kind: str, rank: int) -> None:
        self.kind, self.rank, self.calls = kind, rank, 0
        self.module = torch.nn.Linear(3, 1)

    def loss(self, batch: Any, generator: torch.Generator) -> dict[str, Tensor]:
        self.calls += 1
        total = self.module(batch.xyz).square().mean()
        if self.rank == 1 and self.calls == 3:
            match self.kind:
                case "nan":
                    return {"total": total * float("nan")}
                case "die":
                    os._exit(9)
                case "hang":
                    time.sleep(600)
                case "signal":
                    os.kill(os.getpid(), 15)
        return {"total": total}


def _trouble(team: Team, out: Path, kind: str) -> None:
    from picture3d.training.plan import TrainingConfig
    from tests.training.tiny_task import Batches

    try:
        fit(_Trouble(kind, team.place.rank), Batches(), TrainingConfig(epochs=2), RunFolder(out / kind), team=team)
    except (TrainingError, KeyboardInterrupt) as error:
        (out / f"{kind}-{team.place.rank}.txt").write_text(f"{type(error).__name__}: {error}")
        raise


def main() -> None:
    work, out = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    with joined_team(torch.device("cpu")) as team:
        if work == "runs":
            _norms(team, out)
            _runs(team, out, Path(sys.argv[3]))
        elif work == "more":
            for name in (*MORE, *DETECTORS):
                train(name, Path(sys.argv[3]), out / name, team, batch_size=1)
        elif work == "evaluate":
            for name, said in evaluate_runs(Path(sys.argv[3]), team).items():
                (out / f"{name}-{team.place.rank}.txt").write_text(said)
        else:
            _trouble(team, out, work)


def weights(run: Path) -> dict[str, Tensor]:
    """The finished weights of a run."""
    return load_file(run / "model.safetensors")


if __name__ == "__main__":
    main()
