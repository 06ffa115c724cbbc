from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from picture3d.errors import ConfigError, TrainingError
from picture3d.structures.batch import PointBatch
from picture3d.training.checkpoint import checkpoint_path, checkpoint_steps, load_checkpoint
from picture3d.training.loop import FitResult, fit
from picture3d.training.optim import OptimConfig, learning_rate
from picture3d.training.plan import Task, TrainingConfig
from picture3d.training.runlog import RunFolder
from picture3d.training.step import batch_seed
from tests.training.tiny_task import Batches, MeanTask, TinyTask, batch

CONFIG = TrainingConfig(epochs=3, max_steps=10, checkpoint_every=3, log_every=3, seed=7)


def train(task: Task, folder: Path, config: TrainingConfig = CONFIG, *, resume: bool = False, batches: Any = None) -> FitResult:
    return fit(task, batches or Batches(), config, RunFolder(folder), resume=resume, progress=lambda *_: None)


def final_tensors(folder: Path, step: int = 10) -> dict[str, bytes]:
    tensors = load_checkpoint(checkpoint_path(folder / "checkpoints", step)).tensors
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Lines of metrics without their times."""
    return [{k: v for k, v in record.items() if "seconds" not in k} for record in RunFolder(folder).metrics()]


class InterruptedTask(TinyTask):
    """Sends this process a signal in the middle of a step."""

    def __init__(self, at_call: int, number: int = signal.SIGINT) -> None:
        super().__init__()
        self.at_call, self.number, self.calls = at_call, number, 0

    def loss(self, batch: PointBatch, generator: torch.Generator) -> Mapping[str, Tensor]:
        self.calls += 1
        if self.calls == self.at_call:
            os.kill(os.getpid(), self.number)
        return super().loss(batch, generator)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("interrupted_step", [1, 5, 9])
def test_a_resumed_run_ends_with_the_bytes_of_an_unbroken_one(tmp_path: Path, accumulate: int, interrupted_step: int):
    config = CONFIG.model_copy(update={"accumulate": accumulate, "epochs": 6})
    whole = train(TinyTask(), tmp_path / "whole", config)
    assert whole.steps == 10
    batches = Batches()
    groups = math.ceil(4 / accumulate)
    # The call in the middle of that step: a full epoch has 4 calls in `groups` steps.
    call = (interrupted_step - 1) // groups * 4 + ((interrupted_step - 1) % groups) * accumulate + 1
    with pytest.raises(KeyboardInterrupt):
        train(InterruptedTask(call), tmp_path / "broken", config, batches=batches)
    assert checkpoint_steps(tmp_path / "broken" / "checkpoints")[-1] == interrupted_step
    resumed = train(TinyTask(seed=99), tmp_path / "broken", config, resume=True)
    assert final_tensors(tmp_path / "broken") == final_tensors(tmp_path / "whole")
    assert metrics(tmp_path / "broken") == metrics(tmp_path / "whole")
    assert resumed.losses == whole.losses
    assert sorted(p.name for p in (tmp_path / "broken").rglob("*")) == sorted(p.name for p in (tmp_path / "whole").rglob("*"))


def test_sigterm_saves_like_ctrl_c_and_the_old_handlers_come_back(tmp_path: Path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(InterruptedTask(2, signal.SIGTERM), tmp_path)
    assert checkpoint_steps(tmp_path / "checkpoints") == [2]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_ctrl_c_while_waiting_for_data_does_not_wait_for_it(tmp_path: Path):
    class Stuck(Batches):
        def epoch(self, epoch: int, start_step: int) -> Iterator[PointBatch]:
            yield batch(0)
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("the batch was awaited")

    with pytest.raises(KeyboardInterrupt):
        train(TinyTask(), tmp_path, batches=Stuck())
    assert checkpoint_steps(tmp_path / "checkpoints") == [1]


def test_a_second_ctrl_c_stops_at_once_and_keeps_the_last_whole_checkpoint(tmp_path: Path):
    class Impatient(TinyTask):
        def loss(self, batch: PointBatch, generator: torch.Generator) -> Mapping[str, Tensor]:
            if len(self.seen) == 4:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
            return super().loss(batch, generator)

    train(TinyTask(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(Impatient(), tmp_path / "broken")
    assert checkpoint_steps(tmp_path / "broken" / "checkpoints") == [3]
    train(TinyTask(), tmp_path / "broken", resume=True)
    assert final_tensors(tmp_path / "broken") == final_tensors(tmp_path / "whole")


class _Numbers(Dataset[PointBatch]):
    def __init__(self, first: int) -> None:
        self.first = first

    def __len__(self) -> int:
        return 4 - self.first

    def __getitem__(self, item: int) -> PointBatch:
        return batch(self.first + item)


def test_ctrl_c_in_a_terminal_reaches_loader_processes_too_and_the_step_is_still_saved(tmp_path: Path):
    class Forked(Batches):
        def epoch(self, epoch: int, start_step: int) -> Iterator[PointBatch]:
            yield from DataLoader(_Numbers(start_step), batch_size=None, num_workers=1, multiprocessing_context="fork")

    class Terminal(TinyTask):
        def loss(self, batch: PointBatch, generator: torch.Generator) -> Mapping[str, Tensor]:
            if len(self.seen) == 1:
                for child in multiprocessing.active_children():
                    os.kill(child.pid or 0, signal.SIGINT)
                time.sleep(0.2)  # a loader process that dies would be noticed here
                os.kill(os.getpid(), signal.SIGINT)
            return super().loss(batch, generator)

    with pytest.raises(KeyboardInterrupt):
        train(Terminal(), tmp_path, batches=Forked())
    assert checkpoint_steps(tmp_path / "checkpoints") == [2]
    assert multiprocessing.active_children() == []


_KILLED = """
import os, signal, sys
from pathlib import Path
from tests.training.test_loop import InterruptedTask, train
train(InterruptedTask(9, signal.SIGKILL), Path(sys.argv[1]))
"""


def test_a_run_killed_outright_is_resumed_to_the_same_bytes(tmp_path: Path):
    train(TinyTask(), tmp_path / "whole")
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.run([sys.executable, "-c", _KILLED, str(tmp_path / "broken")], cwd=root, env=environment, check=False)
    assert process.returncode == -signal.SIGKILL
    assert checkpoint_steps(tmp_path / "broken" / "checkpoints") == [3, 6]
    train(TinyTask(), tmp_path / "broken", resume=True)
    assert final_tensors(tmp_path / "broken") == final_tensors(tmp_path / "whole")
    assert metrics(tmp_path / "broken") == metrics(tmp_path / "whole")


def test_a_torn_checkpoint_is_passed_over_with_a_line_in_the_log(tmp_path: Path):
    train(TinyTask(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(InterruptedTask(8), tmp_path / "broken")
    newest = checkpoint_path(tmp_path / "broken" / "checkpoints", 8)
    newest.write_bytes(newest.read_bytes()[:-100])
    train(TinyTask(), tmp_path / "broken", resume=True)
    assert final_tensors(tmp_path / "broken") == final_tensors(tmp_path / "whole")
    log = (tmp_path / "broken" / "log.txt").read_text()
    assert "passed over a checkpoint" in log
    assert newest.name in log
    assert "resumed from step_00000006" in log


class MoodyTask(TinyTask):
    """Its loss is least in steps 4 to 6 of 10."""

    def loss(self, batch: PointBatch, generator: torch.Generator) -> Mapping[str, Tensor]:
        number = int(batch.frame_names[0].removeprefix("log/"))
        step = number // 1000 * 4 + number % 1000 + 1
        return {"total": (0.01 if 4 <= step <= 6 else 1.0) * super().loss(batch, generator)["total"]}


@pytest.mark.parametrize("interrupted", [False, True])
def test_the_best_checkpoint_is_kept_besides_the_last_also_by_a_resumed_run(tmp_path: Path, interrupted: bool):
    config = CONFIG.model_copy(update={"keep_last": 1})
    if interrupted:
        task = MoodyTask()
        plain, calls = task.loss, iter(range(1, 99))

        def loss(batch: PointBatch, generator: torch.Generator) -> Mapping[str, Tensor]:
            if next(calls) == 8:
                os.kill(os.getpid(), signal.SIGINT)
            return plain(batch, generator)

        task.loss = loss
        with pytest.raises(KeyboardInterrupt):
            train(task, tmp_path, config)
        assert checkpoint_steps(tmp_path / "checkpoints") == [6, 8]
    train(MoodyTask(), tmp_path, config, resume=True)
    assert checkpoint_steps(tmp_path / "checkpoints") == [6, 10]
    rows = metrics(tmp_path)
    summary = RunFolder(tmp_path).summary()
    assert summary["best_step"] == 6
    assert summary["best_loss"] == pytest.approx(rows[1]["losses"]["total"])  # logged every three steps, too


def test_an_unfinished_run_is_not_overwritten_unless_resumed(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        train(InterruptedTask(4), tmp_path)
    with pytest.raises(TrainingError, match="--resume"):
        train(TinyTask(), tmp_path)


def test_resume_without_a_checkpoint_starts_at_the_beginning(tmp_path: Path):
    train(TinyTask(), tmp_path / "whole")
    train(TinyTask(), tmp_path / "fresh", resume=True)
    assert final_tensors(tmp_path / "fresh") == final_tensors(tmp_path / "whole")


@pytest.mark.parametrize("resume", [False, True])
def test_a_finished_run_is_not_done_again_and_gives_its_weights(tmp_path: Path, resume: bool):
    first = TinyTask()
    done = train(first, tmp_path)
    again = TinyTask(seed=5)
    result = train(again, tmp_path, resume=resume)
    assert result.already_finished
    assert not done.already_finished
    assert (result.steps, result.losses) == (done.steps, done.losses)
    assert again.seen == []
    assert all(torch.equal(a, b) for a, b in zip(again.module.parameters(), first.module.parameters(), strict=True))


def test_another_config_in_the_same_folder_is_refused_naming_the_keys(tmp_path: Path):
    train(TinyTask(), tmp_path)
    with pytest.raises(ConfigError, match=r"optim\.peak_lr.*Choose another folder"):
        train(TinyTask(), tmp_path, CONFIG.with_overrides(["optim.peak_lr=0.5"]), resume=True)


def test_a_changed_length_of_the_data_is_refused_in_words(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        train(InterruptedTask(4), tmp_path)
    with pytest.raises(TrainingError, match="planned for 10 steps, 4 per epoch; now it would be 10 and 5"):
        train(TinyTask(), tmp_path, resume=True, batches=Batches(5))


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        train(InterruptedTask(4), tmp_path)
    with pytest.raises(Exception, match="fits"):
        train(MeanTask(), tmp_path, resume=True)


class BrokenTask(TinyTask):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def loss(self, batch: PointBatch, generator: torch.Generator) -> Mapping[str, Tensor]:
        terms = dict(super().loss(batch, generator))
        if len(self.seen) == 6:
            if self.what == "loss":
                terms["total"] = terms["total"] * float("nan")
            else:  # finite, with a gradient that is not
                terms["total"] = terms["total"] + torch.sqrt(next(self.module.parameters()).sum() * 0)
        return terms


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run_and_names_frames_and_terms(tmp_path: Path, what: str):
    with pytest.raises(TrainingError, match=rf"the {what} is not finite at step 6 \(epoch 1") as caught:
        train(BrokenTask(what), tmp_path)
    assert "log/1001" in str(caught.value)  # epoch 1, position 1
    assert "mean " in str(caught.value)
    assert "grad_norm" in str(caught.value)
    assert str(caught.value) in (tmp_path / "log.txt").read_text()
    assert checkpoint_steps(tmp_path / "checkpoints") == [3]
    train(TinyTask(), tmp_path, resume=True)


def test_a_loss_that_trains_nothing_names_the_batch(tmp_path: Path):
    class Detached(TinyTask):
        def loss(self, batch: PointBatch, generator: torch.Generator) -> Mapping[str, Tensor]:
            return {"total": torch.zeros(())}

    with pytest.raises(TrainingError, match="log/0 does not depend on any trainable parameter"):
        train(Detached(), tmp_path)


def test_accumulated_gradients_are_the_mean_over_batches_also_in_the_short_last_group(tmp_path: Path):
    config = TrainingConfig(epochs=1, accumulate=3, optim=OptimConfig(weight_decay=0, grad_clip=None))
    task = MeanTask(start=2.0)
    train(task, tmp_path, config)
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2]
    means = [batch(number).xyz.mean().item() for number in range(4)]
    first = [2 * (2.0 - mean) for mean in means[:3]]
    assert lines[0]["grad_norm"] == pytest.approx(abs(sum(first) / 3), rel=1e-5)
    assert lines[0]["losses"]["total"] == pytest.approx(sum((2.0 - mean) ** 2 for mean in means[:3]) / 3, rel=1e-5)
    # Adam's first step is the learning rate, whatever the size of the gradient.
    moved = 2.0 - lines[0]["lr"] * math.copysign(1, sum(first))
    assert lines[1]["grad_norm"] == pytest.approx(abs(2 * (moved - means[3])), rel=1e-4)


def test_the_gradient_is_clipped_to_its_largest_norm(tmp_path: Path):
    config = TrainingConfig(max_steps=1, optim=OptimConfig(grad_clip=0.5, warmup_share=0))
    train(MeanTask(start=100.0), tmp_path, config)
    moment = load_checkpoint(checkpoint_path(tmp_path / "checkpoints", 1)).tensors["optimizer.exp_avg.w"]
    # beta1 is at its lowest where the learning rate is highest: 0.15 of the clipped gradient enters.
    assert moment.item() == pytest.approx(0.15 * 0.5, rel=1e-4)
    assert metrics(tmp_path)[0]["grad_norm"] > 100


def test_metrics_are_means_over_the_logged_steps_and_name_the_learning_rate(tmp_path: Path):
    every = train(TinyTask(), tmp_path / "every", CONFIG.model_copy(update={"log_every": 1}))
    train(TinyTask(), tmp_path / "third", CONFIG)
    single, third = metrics(tmp_path / "every"), metrics(tmp_path / "third")
    assert [line["step"] for line in third] == [3, 6, 9, 10]
    assert [line["epoch"] for line in third] == [0, 1, 2, 2]
    assert third[1]["losses"]["total"] == pytest.approx(sum(line["losses"]["total"] for line in single[3:6]) / 3)
    assert single[4]["lr"] == pytest.approx(learning_rate(4, 10, CONFIG.optim))
    assert every.losses == single[-1]["losses"]


def test_the_run_folder_tells_the_whole_story(tmp_path: Path):
    train(TinyTask(), tmp_path)
    run = RunFolder(tmp_path)
    summary = run.summary()
    assert (summary["status"], summary["steps"], summary["epochs"]) == ("finished", 10, 2.5)
    assert summary["parameters"] == 3 * 8 + 8 + 8 + 8 + 8 + 1
    assert TrainingConfig.load(run.config_path) == CONFIG
    assert json.loads(run.environment_path.read_text())["device"] == "cpu"
    meta = load_checkpoint(run.model_path).meta
    assert meta["config"] == CONFIG.model_dump(mode="json")
    assert meta["step"] == 10
    assert all(name.startswith("model.") for name in load_checkpoint(run.model_path).tensors)
    assert checkpoint_steps(run.checkpoints) == [9, 10]


def test_randomness_of_a_batch_depends_on_its_place_alone(tmp_path: Path):
    class Recorder(TinyTask):
        def loss(self, batch: PointBatch, generator: torch.Generator) -> Mapping[str, Tensor]:
            drawn[batch.frame_names[0]] = (torch.rand((), generator=generator).item(), torch.rand(()).item())
            return super().loss(batch, generator)

    drawn: dict[str, tuple[float, float]] = {}
    train(Recorder(), tmp_path / "a")
    first = dict(drawn)
    assert len({value for pair in first.values() for value in pair}) >= 10
    drawn.clear()
    train(Recorder(), tmp_path / "b", CONFIG.model_copy(update={"max_steps": 5}))
    assert all(first[name] == pair for name, pair in drawn.items())
    assert len({batch_seed(s, e, p) for s in range(5) for e in range(5) for p in range(5)}) == 125


def test_sources_are_closed_when_their_epoch_ends(tmp_path: Path):
    batches = Batches()
    train(TinyTask(), tmp_path, batches=batches)
    assert batches.closed == 3


def test_too_few_batches_and_none_at_all_are_told(tmp_path: Path):
    class Short(Batches):
        def epoch(self, epoch: int, start_step: int) -> Iterator[PointBatch]:
            yield batch(0)

    with pytest.raises(TrainingError, match="ended after 1 batches, 4 were promised"):
        train(TinyTask(), tmp_path / "a", batches=Short())
    with pytest.raises(TrainingError, match="no batch to train on"):
        train(TinyTask(), tmp_path / "b", batches=Batches(0))


def test_a_module_without_trainable_parameters_is_refused(tmp_path: Path):
    task = TinyTask()
    task.module.requires_grad_(False)
    with pytest.raises(TrainingError, match="no trainable parameter"):
        train(task, tmp_path)


def test_frozen_parts_stay_as_they_are_and_resume_works(tmp_path: Path):
    def frozen(task: TinyTask) -> TinyTask:
        task.module[0].requires_grad_(False)
        return task

    task = frozen(TinyTask())
    before = task.module.state_dict()["0.weight"].clone()
    train(task, tmp_path / "whole")
    assert torch.equal(task.module.state_dict()["0.weight"], before)
    with pytest.raises(KeyboardInterrupt):
        train(frozen(InterruptedTask(5)), tmp_path / "broken")
    train(frozen(TinyTask()), tmp_path / "broken", resume=True)
    assert final_tensors(tmp_path / "broken") == final_tensors(tmp_path / "whole")


def test_bf16_runs_the_loss_under_autocast_and_keeps_weights_in_float32(tmp_path: Path):
    seen: list[torch.dtype] = []

    class Watching(TinyTask):
        def loss(self, batch: PointBatch, generator: torch.Generator) -> Mapping[str, Tensor]:
            seen.append(nn.functional.linear(batch.xyz, torch.ones(2, 3)).dtype)
            return super().loss(batch, generator)

    task = Watching()
    train(task, tmp_path, CONFIG.model_copy(update={"precision": "bf16", "max_steps": 2}))
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in task.module.parameters()} == {torch.float32}


def test_in_another_thread_training_works_without_signals(tmp_path: Path):
    thread = threading.Thread(target=train, args=(TinyTask(), tmp_path))
    thread.start()
    thread.join()
    assert RunFolder(tmp_path).finished


def test_a_length_must_be_given_and_the_shorter_one_counts(tmp_path: Path):
    with pytest.raises(ConfigError, match="never end"):
        TrainingConfig.from_tree({"epochs": None})
    assert train(TinyTask(), tmp_path / "a", TrainingConfig(epochs=2)).steps == 8
    assert train(TinyTask(), tmp_path / "b", TrainingConfig(epochs=2, max_steps=3)).steps == 3
    assert train(TinyTask(), tmp_path / "c", TrainingConfig(epochs=None, max_steps=9)).steps == 9
