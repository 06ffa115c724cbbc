"""How any task is trained: steps, schedule, checkpoints, exact resume. It knows a task only as a module and a loss.

A run is a pure function of its config and data: the randomness of a batch comes from (seed, epoch, position in the epoch), and
everything that a step changes is in the checkpoint. On a CPU a resumed run therefore ends with the bytes of an unbroken one.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from picture3d.config import FrozenConfig
from picture3d.errors import TrainingError
from picture3d.ops.processes import computing_together, with_added_terms
from picture3d.structures.batch import PointBatch
from picture3d.training.checkpoint import (
    checkpoint_path,
    latest_checkpoint,
    load_checkpoint,
    load_into,
    load_weights,
    prune_checkpoints,
    save_checkpoint,
)
from picture3d.training.distributed import Team
from picture3d.training.interrupt import StopSignals
from picture3d.training.optim import OptimConfig, build_optimizer, set_schedule
from picture3d.training.runlog import Progress, RunFolder, duration
from picture3d.training.state import RunState, check_data, check_plan, model_tensors, restore_tensors, training_tensors
from picture3d.training.threads import set_threads

ProgressCallback = Callable[[int, int, str], None]


class Task(Protocol):
    """What is trained."""

    @property
    def module(self) -> nn.Module:
        """The network, on the device it is to be trained on."""
        ...

    def loss(self, batch: PointBatch, generator: torch.Generator) -> Mapping[str, Tensor]:
        """Scalars by name: "total" is minimised, the others are logged. `generator` is on the module's device."""
        ...


class BatchSource(Protocol):
    """Where batches come from. Each is a pure function of the epoch and its position in it."""

    @property
    def steps_per_epoch(self) -> int:
        """Batches per epoch."""
        ...

    def epoch(self, epoch: int, start_step: int) -> Iterator[PointBatch]:
        """The batches of an epoch from position `start_step` on."""
        ...


class TrainingConfig(FrozenConfig):
    """How long and how to train."""

    epochs: int | None = Field(default=1, ge=1, description="passes over the data; null: only max_steps counts")
    max_steps: int | None = Field(default=None, ge=1, description="stop after so many optimiser steps; the schedule ends there")
    batch_size: int = Field(default=2, ge=1, description="frames per batch, in each process")
    accumulate: int = Field(default=1, ge=1, description="batches whose gradients are averaged into one optimiser step")
    precision: Literal["float32", "bf16"] = Field(
        default="float32", description="bf16: autocast; float32 where the GPU has none"
    )
    log_every: int = Field(default=1, ge=1, description="steps per line of metrics.jsonl; losses are means over them")
    checkpoint_every: int = Field(default=500, ge=1, description="steps between checkpoints; one is always written at the end")
    keep_last: int = Field(default=2, ge=1, description="checkpoints kept")
    seed: int = Field(default=0, ge=0, description="seed of everything random in training")
    threads: int = Field(default=0, ge=0, description="CPU threads; 0: as the process was started")
    optim: OptimConfig = OptimConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.epochs is None and self.max_steps is None:
            raise ValueError("give epochs or max_steps: training would never end")
        return self

    def planned_steps(self, batches_per_epoch: int) -> int:
        """Optimiser steps in all."""
        by_epochs = math.ceil(batches_per_epoch / self.accumulate) * self.epochs if self.epochs is not None else math.inf
        return int(min(by_epochs, self.max_steps if self.max_steps is not None else math.inf))

    def planned_epochs(self, batches_per_epoch: int) -> int:
        """Epochs that are begun in all."""
        return math.ceil(self.planned_steps(batches_per_epoch) / max(1, math.ceil(batches_per_epoch / self.accumulate)))


@dataclass(frozen=True, slots=True)
class FitResult:
    """How a run ended."""

    steps: int
    seconds: float  # spent in training, over all resumed parts
    losses: dict[str, float]  # means over the last logged steps
    already_finished: bool = False  # nothing was done: the folder held the finished run


def fit(
    task: Task,
    batches: BatchSource,
    config: TrainingConfig,
    run: RunFolder,
    *,
    resume: bool = False,
    progress: ProgressCallback | None = None,
    team: Team | None = None,
) -> FitResult:
    """Trains `task` to the end of the schedule, leaving config, metrics, checkpoints and final weights in `run`.

    A finished run of the same config is not done again: its weights are loaded and the result says so. SIGINT and SIGTERM are
    held back to the end of a step; a checkpoint is written and KeyboardInterrupt raised.

    Args:
        task: module and loss; the module is trained in place, on its own device.
        batches: see `BatchSource`; batches are moved to the module's device here.
        config: how to train. A run folder that was not claimed for a larger config holding this one is claimed for this one.
        run: where everything is kept.
        resume: go on from the newest whole checkpoint; without one, start at the beginning.
        progress: called with (steps done, steps in all, note); by default a bar or plain lines on standard error.
        team: the processes that train together, each with its part of every batch; None: this one alone. The first one alone
            writes, and the others read the run folder: it has to lie where all can see it.

    Raises:
        ConfigError: if the folder belongs to another config.
        TrainingError: if a loss or gradient is not finite (frames and terms are named), if the folder holds an unfinished run
            and `resume` is not set, or if the length of the schedule has changed.
        KeyboardInterrupt: after a signal, when the checkpoint is written.
    """
    set_threads(config.threads)
    team = team or Team()
    run.writes = team.writes
    if not run.claimed:
        team.first_does("claiming the run folder", lambda: _claim(run, config))
    total_steps, groups_per_epoch = _schedule(batches, config)
    module = task.module
    if team.first_does("looking for a finished run", lambda: "finished" if run.finished else ""):
        load_into(module, load_weights(run.model_path).tensors)
        summary = run.summary()
        run.log("already finished; nothing to do")
        return FitResult(int(summary["steps"]), float(summary["seconds"]), dict(summary["losses"]), already_finished=True)
    trainer = _Trainer(task, batches, config, run, total_steps, groups_per_epoch, team)
    trainer.start(resume)
    with contextlib.ExitStack() as stack:
        if progress is None:
            progress = stack.enter_context(Progress("training", unit="steps")) if team.writes else lambda *_: None
        return trainer.run_to_end(progress)


class _Trainer:
    """One run in progress."""

    def __init__(
        self,
        task: Task,
        batches: BatchSource,
        config: TrainingConfig,
        run: RunFolder,
        total_steps: int,
        groups_per_epoch: int,
        team: Team,
    ) -> None:
        self.task, self.batches, self.config, self.run = task, batches, config, run
        self.total_steps, self.groups_per_epoch = total_steps, groups_per_epoch
        self.plan = {"total_steps": total_steps, "steps_per_epoch": groups_per_epoch}
        self.data = getattr(batches, "identity", None)  # what `FrameBatches` says of its datasets; others may be silent
        self.module = task.module
        self.parameters = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise TrainingError("the module has no trainable parameter")
        self.device = next(iter(self.parameters.values())).device
        self.team = team
        self.loss = team.wrap(_Loss(task, self.module, team))
        self.optimizer = build_optimizer(self.module, config.optim)
        self.autocast = config.precision == "bf16" and (self.device.type != "cuda" or torch.cuda.is_bf16_supported())
        self.state = RunState()
        self.saved_step = -1
        self.mid_step = False

    def start(self, resume: bool) -> None:
        """Begins at step 0, or where the newest whole checkpoint was taken."""
        found = self.team.first_does("looking for a checkpoint", lambda: self._newest(resume))
        if found:
            self._restore(self.run.checkpoints / found)
        self.run.cut_metrics(self.state.step)
        self.run.write_environment(str(self.device))
        precision = "bf16 autocast" if self.autocast else "float32"
        if self.config.precision == "bf16" and not self.autocast:
            precision += " (this GPU has no bf16)"
        together = "" if self.team.alone else f" in {self.team.place.world} processes"
        self.run.log(f"training from step {self.state.step} to {self.total_steps} on {self.device} in {precision}{together}")

    def _newest(self, resume: bool) -> str:
        """Name of the checkpoint to go on from; empty for a new run."""
        found = latest_checkpoint(self.run.checkpoints, log=self.run.log)
        if not resume and (found is not None or next(self.run.metrics(), None) is not None):
            raise TrainingError(
                f"{self.run.path}: this folder holds an unfinished run. Go on with it (--resume), or choose another folder."
            )
        return "" if found is None else found.name

    def run_to_end(self, progress: ProgressCallback) -> FitResult:
        """All remaining steps, then the final weights and numbers."""
        self.module.train()
        progress(self.state.step, self.total_steps, "")
        with StopSignals() as signals:
            try:
                while self.state.step < self.total_steps:
                    self._run_epoch(signals, progress)
            except KeyboardInterrupt:
                self._stop()
                raise
            self._checkpoint()
        return self._finish()

    def _run_epoch(self, signals: StopSignals, progress: ProgressCallback) -> None:
        """The steps of the current epoch that remain, up to the end of the schedule."""
        config, state = self.config, self.state
        epoch, group = divmod(state.step, self.groups_per_epoch)
        source = iter(self.batches.epoch(epoch, group * config.accumulate))
        try:
            while group < self.groups_per_epoch and state.step < self.total_steps:
                begin = time.perf_counter()
                position = group * config.accumulate
                size = min(config.accumulate, self.batches.steps_per_epoch - position)
                state.data_seconds += self._step(source, epoch, position, size, signals)
                state.seconds += time.perf_counter() - begin
                group += 1
                if state.step % config.log_every == 0 or state.step == self.total_steps:
                    self._log_line(epoch)
                if state.step % config.checkpoint_every == 0 and state.step < self.total_steps:
                    self._checkpoint()
                progress(state.step, self.total_steps, self._note())
                if self.team.alone:
                    signals.check()
                elif self.team.any(signals.asked):  # all stop after the same step, or none
                    raise KeyboardInterrupt
        finally:
            # A generator is closed now, so that its workers end with the epoch and not with the garbage collection.
            if isinstance(source, Generator):
                source.close()

    def _step(self, source: Iterator[PointBatch], epoch: int, position: int, size: int, signals: StopSignals) -> float:
        """One optimiser step over `size` batches; returns the seconds spent waiting for them."""
        rate = set_schedule(self.optimizer, self.state.step, self.total_steps, self.config.optim)
        self.optimizer.zero_grad(set_to_none=True)
        terms: dict[str, Tensor] = {}
        frames: list[str] = []
        wait = 0.0
        for index in range(size):
            begin = time.perf_counter()
            # Between steps nothing is half done, so a signal need not wait for the batch.
            signals.safe = index == 0 and self.team.alone
            try:
                with self.team.at(f"loading batch {position + index} of epoch {epoch}", waits=False):
                    batch = next(source, None)
            finally:
                signals.safe = False
            if batch is None:
                raise TrainingError(
                    f"epoch {epoch} ended after {position + index} batches, {self.batches.steps_per_epoch} were promised"
                )
            self.mid_step = True
            wait += time.perf_counter() - begin
            frames += batch.frame_names
            for name, value in self._backward(batch, epoch, position + index, size, last=index == size - 1).items():
                terms[name] = terms[name] + value if name in terms else value
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients) if gradients else torch.zeros((), device=self.device)
        # One transfer per step: every number that is looked at or logged.
        names = [*terms, "grad_norm"]
        stacked = torch.stack([t.detach().to(self.device, torch.float32) for t in (*terms.values(), norm)])
        values = self.team.mean(stacked).tolist()
        losses = dict(zip(names, values, strict=True))
        if not (math.isfinite(losses["total"]) and math.isfinite(losses["grad_norm"])):
            self._refuse(losses, self._guilty(frames, stacked), epoch, rate)
        if self.config.optim.grad_clip is not None and gradients:
            nn.utils.clip_grads_with_norm_(list(self.parameters.values()), self.config.optim.grad_clip, norm)
        self.optimizer.step()
        state = self.state
        state.step += 1
        state.window_steps += 1
        for name, value in {**losses, "lr": rate}.items():
            state.window[name] = state.window.get(name, 0.0) + value
        self.mid_step = False
        return wait

    def _backward(self, batch: PointBatch, epoch: int, position: int, size: int, *, last: bool) -> dict[str, Tensor]:
        """Adds a batch's share of the gradient, at the last one that of all processes; returns its share of each loss term."""
        seed = batch_seed(self.config.seed, epoch, position)
        # Dropout draws from the process's own generator; seeding it too keeps a resumed run on the same numbers.
        rank = self.team.place.rank
        torch.manual_seed(seed if rank == 0 else batch_seed(seed, rank, 0))
        generator = torch.Generator(self.device).manual_seed(seed)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.team.at(f"forward and backward pass of batch {position} of epoch {epoch}"))
            if isinstance(self.loss, nn.parallel.DistributedDataParallel) and not last:
                stack.enter_context(self.loss.no_sync())
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast):
                terms = self.loss(batch.to(self.device), generator)
            total = terms["total"] / size
            if not total.requires_grad:
                raise TrainingError(
                    f"the loss of batch {', '.join(batch.frame_names)} does not depend on any trainable parameter"
                )
            total.backward()
        return {name: value.detach() / size for name, value in terms.items()}

    def _guilty(self, frames: list[str], values: Tensor) -> list[str]:
        """The frames of the processes whose own numbers are not finite; of all if no loss is to blame."""
        finite = bool(torch.isfinite(values[:-1]).all())
        said = self.team.texts(f"{'+' if finite else '-'}{', '.join(frames)}")
        return [text[1:] for text in said if text.startswith("-")] or [text[1:] for text in said if text[1:]]

    def _refuse(self, losses: Mapping[str, float], frames: list[str], epoch: int, rate: float) -> None:
        terms = ", ".join(f"{name} {value:.6g}" for name, value in losses.items())
        what = "gradient" if math.isfinite(losses["total"]) else "loss"
        text = (
            f"the {what} is not finite at step {self.state.step + 1} (epoch {epoch}, learning rate {rate:.3g}): {terms}. "
            f"Frames of the batch: {', '.join(frames)}. Look at these frames, or lower training.optim.peak_lr; "
            f"--resume goes on from the newest checkpoint."
        )
        self.run.log(text)
        raise TrainingError(text)

    def _log_line(self, epoch: int) -> None:
        state = self.state
        means = {name: value / state.window_steps for name, value in state.window.items()}
        rate, norm = means.pop("lr"), means.pop("grad_norm")
        state.losses = means
        self.run.append_metrics(
            {
                "step": state.step,
                "epoch": epoch,
                "lr": rate,
                "losses": means,
                "grad_norm": norm,
                "seconds": round(state.seconds, 4),
                "data_seconds": round(state.data_seconds, 4),
            }
        )
        state.window, state.window_steps = {}, 0

    def _note(self) -> str:
        state = self.state
        waiting = 100 * state.data_seconds / state.seconds if state.seconds else 0.0
        shown = state.losses.get("total")
        return (f"loss {shown:.4g}, " if shown is not None else "") + f"waiting for data {waiting:.0f} %"

    # Checkpoints ---------------------------------------------------------------------------------------------------------

    def _checkpoint(self) -> None:
        """Writes everything a resumed run needs; older checkpoints beyond `keep_last` are removed afterwards."""
        if self.saved_step == self.state.step:
            return
        if not self.team.writes:
            self.saved_step = self.state.step
            return
        tensors = training_tensors(self.module, self.optimizer)
        save_checkpoint(checkpoint_path(self.run.checkpoints, self.state.step), tensors, self._meta())
        prune_checkpoints(self.run.checkpoints, self.config.keep_last)
        self.saved_step = self.state.step

    def _restore(self, path: Path) -> None:
        checkpoint = load_checkpoint(path)
        check_data(path, checkpoint.meta, self.data)
        check_plan(path, checkpoint.meta, self.plan)
        restore_tensors(checkpoint.tensors, self.module, self.optimizer)
        self.state = RunState.from_meta(checkpoint.meta)
        self.saved_step = self.state.step
        self.run.log(f"resumed from {path.name}")

    def _meta(self) -> dict[str, Any]:
        data = {} if self.data is None else {"data": self.data}
        return {**self.plan, **self.state.meta(), **data, "config": self.run.config_tree()}

    def _stop(self) -> None:
        """After a signal: keeps what is done. A step cut in its middle is not: running statistics may have moved already."""
        if self.mid_step:
            self.run.log(f"interrupted within step {self.state.step + 1}; the newest checkpoint stands")
            return
        self._checkpoint()
        self.run.log(f"interrupted after step {self.state.step}; checkpoint written")

    def _finish(self) -> FitResult:
        state = self.state
        if not self.team.writes:
            return FitResult(state.step, state.seconds, state.losses)
        # Without the clock's readings: the same run gives the same file, to the byte.
        meta = {name: value for name, value in self._meta().items() if name != "progress"}
        save_checkpoint(self.run.model_path, model_tensors(self.module), meta)
        self.run.update_summary(
            {
                "status": "finished",
                "steps": state.step,
                "epochs": state.step / self.groups_per_epoch,
                "seconds": round(state.seconds, 3),
                "data_seconds": round(state.data_seconds, 3),
                "parameters": sum(p.numel() for p in self.module.parameters()),
                "losses": state.losses,
            }
        )
        self.run.log(f"finished {state.step} steps in {duration(state.seconds)}")
        return FitResult(state.step, state.seconds, state.losses)


class _Loss(nn.Module):
    """A task's loss as the call of a module, which is what gradients are averaged over. Only "total" has a gradient."""

    def __init__(self, task: Task, module: nn.Module, team: Team) -> None:
        super().__init__()
        self.module, self._task, self._team = module, task, team

    def forward(self, batch: PointBatch, generator: torch.Generator) -> dict[str, Tensor]:
        with computing_together(self._team.norms):
            terms = self._task.loss(batch, generator)
            total = with_added_terms(terms["total"])
        return {**{name: value.detach() for name, value in terms.items()}, "total": total}


def _claim(run: RunFolder, config: TrainingConfig) -> str:
    run.claim(config)
    return ""


def batch_seed(seed: int, epoch: int, position: int) -> int:
    """Seed of the randomness of one batch: well mixed, below 2**63, a pure function of its three arguments."""
    high, low = np.random.SeedSequence([seed, epoch, position]).generate_state(2)
    return (int(high) << 32 | int(low)) & 0x7FFF_FFFF_FFFF_FFFF


def _schedule(batches: BatchSource, config: TrainingConfig) -> tuple[int, int]:
    """Optimiser steps in all, and per epoch."""
    if batches.steps_per_epoch < 1:
        raise TrainingError("there is no batch to train on: the split, label share or frame limit leaves no frame")
    return config.planned_steps(batches.steps_per_epoch), math.ceil(batches.steps_per_epoch / config.accumulate)
