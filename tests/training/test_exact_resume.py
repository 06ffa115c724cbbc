"""Every kind of training, killed outright in mid-epoch and in mid-step, goes on to the bytes of an unbroken run.

With loader processes, gradients accumulated over batches, and two datasets mixed by weight.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from picture3d.commands.build import build_detection, build_picture, build_segmentation, training_batches
from picture3d.recipes.catalogue import detection_recipe, pretraining_recipe, segmentation_recipe, tiny
from picture3d.training.checkpoint import checkpoint_steps, load_checkpoint
from picture3d.training.loop import FitResult, fit
from picture3d.training.runlog import RunFolder
from tests.datasets.made_frames import made_frame, write_made_dataset

FRAMES = {"one": 5, "two": 4}
KILLED_AT = 7  # loss calls: in the second half of step 3, behind the checkpoint of step 2, before the end of the first epoch


def made_data(root: Path) -> Path:
    for number, (name, count) in enumerate(FRAMES.items()):
        kinds = ("vehicle.car", "pedestrian", "Vehicle")
        frames = [made_frame("log", i, points=150 + 40 * i, seed=number) for i in range(count)]
        frames = [replace(frame, boxes=replace(frame.boxes, category=kinds)) for frame in frames]  # pyright: ignore
        write_made_dataset(root / name, {"log": frames})
    return root


def train(kind: str, data: Path, out: Path, *, resume: bool = False, killed_at: int | None = None) -> FitResult:
    """Three epochs of a shrunk recipe in the run folder `out`; at loss call `killed_at` the process kills itself."""
    cpu = torch.device("cpu")
    config: Any = {
        "pretraining": lambda: tiny(pretraining_recipe("town-picture", data / "one")).with_overrides(
            ["targets.mode=none", "mask.kind=random", "loss.features_weight=0"]
        ),
        "segmentation": lambda: tiny(segmentation_recipe("town-segmentation", data / "one")),
        "detection": lambda: tiny(detection_recipe("town-detection", data / "one")),
    }[kind]()
    mixed = json.dumps([{"root": str(data / "two"), "weight": 0.7, "name": "two"}])
    config = config.with_overrides(
        ["workers=2", "training.accumulate=2", "training.epochs=3", "training.max_steps=null",
         "training.checkpoint_every=2", "data.every=1", f"data.also={mixed}"]
    )  # fmt: skip
    build: Any = {"pretraining": build_picture, "segmentation": build_segmentation, "detection": build_detection}[kind]
    task = build(config, cpu)
    calls, loss = 0, task.loss

    def counted(batch: Any, generator: torch.Generator) -> Any:
        nonlocal calls
        calls += 1
        if calls == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss(batch, generator)

    task.loss = counted
    run = RunFolder(out)
    run.claim(config)
    return fit(task, training_batches(config, None), config.training, run, resume=resume, progress=lambda *_: None)


def numbers(run: Path) -> list[Any]:
    return [(row["step"], row["lr"], row["losses"], row["grad_norm"]) for row in RunFolder(run).metrics()]


LONG = [pytest.param(kind, marks=pytest.mark.long) for kind in ("segmentation", "detection")]


@pytest.mark.parametrize("kind", ["pretraining", *LONG])
def test_a_run_killed_in_mid_epoch_ends_with_the_bytes_of_an_unbroken_one(tmp_path, kind):
    data = made_data(tmp_path)
    train(kind, data, tmp_path / "whole")
    code = "import sys; from pathlib import Path; from tests.training import test_exact_resume as here\n"
    code += f"here.train(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), killed_at={KILLED_AT})"
    words = [sys.executable, "-c", code, kind, str(data), str(tmp_path / "broken")]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(words, cwd=root, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert checkpoint_steps(tmp_path / "broken" / "checkpoints") == [2]
    per_epoch = load_checkpoint(tmp_path / "whole" / "model.safetensors").meta["steps_per_epoch"]
    assert per_epoch > 3, "the run was killed, and goes on, within an epoch"
    train(kind, data, tmp_path / "broken", resume=True)
    assert numbers(tmp_path / "broken") == numbers(tmp_path / "whole")
    assert len(numbers(tmp_path / "whole")) == 3 * per_epoch
    assert "resumed from step_00000002" in (tmp_path / "broken" / "log.txt").read_text()
    newest = checkpoint_steps(tmp_path / "whole" / "checkpoints")
    assert checkpoint_steps(tmp_path / "broken" / "checkpoints") == newest
    for step in newest:  # weights, buffers and the optimiser's moments
        one, two = (load_checkpoint(tmp_path / run / f"checkpoints/step_{step:08d}.safetensors") for run in ("whole", "broken"))
        assert list(one.tensors) == list(two.tensors)
        assert all(torch.equal(two.tensors[name], value) for name, value in one.tensors.items())
