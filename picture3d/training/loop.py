"""How any task is trained: epochs, metrics, checkpoints, exact resume. A single step is in `step`, what is trained in `plan`.

A run is a pure function of its config and data: the randomness of a batch comes from (seed, epoch, position in the epoch), and
everything that a step changes is in the checkpoint. On a CPU a resumed run therefore ends with the bytes of an unbroken one.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from picture3d.errors import TrainingError
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
from picture3d.training.plan import BatchSource, Task, TrainingConfig
from picture3d.training.runlog import Progress, RunFolder, duration
from picture3d.training.state import RunState, check_data, check_plan, model_tensors, restore_tensors, training_tensors
from picture3d.training.step import StepNumbers, Stepper, StepPlace

ProgressCallback = Callable[[int, int, str], None]


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
        self.batches, self.config, self.run = batches, config, run
        self.total_steps, self.groups_per_epoch = total_steps, groups_per_epoch
        self.plan = {"total_steps": total_steps, "steps_per_epoch": groups_per_epoch}
        self.data = getattr(batches, "identity", None)  # what `FrameBatches` says of its datasets; others may be silent
        self.module = task.module
        self.team = team
        self.stepper = Stepper(task, config, team)
        self.state = RunState()
        self.saved_step = -1

    def start(self, resume: bool) -> None:
        """Begins at step 0, or where the newest whole checkpoint was taken."""
        found = self.team.first_does("looking for a checkpoint", lambda: self._newest(resume))
        if found:
            self._restore(self.run.checkpoints / found)
        self.run.cut_metrics(self.state.step)
        device, precision = self.stepper.device, self.stepper.precision
        self.run.write_environment(str(device))
        together = "" if self.team.alone else f" in {self.team.place.world} processes"
        self.run.log(f"training from step {self.state.step} to {self.total_steps} on {device} in {precision}{together}")

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
            if self.saved_step != self.state.step:
                self._judge()
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
                place = StepPlace(state.step, self.total_steps, epoch, position, size, self.batches.steps_per_epoch)
                try:
                    numbers = self.stepper.take(source, place, signals)
                except TrainingError as error:
                    self.run.log(str(error))
                    raise
                self._note_step(numbers)
                state.seconds += time.perf_counter() - begin
                group += 1
                if state.step % config.log_every == 0 or state.step == self.total_steps:
                    self._log_line(epoch)
                if state.step % config.checkpoint_every == 0 and state.step < self.total_steps:
                    self._judge()
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

    def _note_step(self, numbers: StepNumbers) -> None:
        """Takes a finished step into the state; until then the step counts as begun."""
        state = self.state
        state.step += 1
        state.data_seconds += numbers.waited_s
        state.window_steps += 1
        for name, value in {**numbers.losses, "grad_norm": numbers.grad_norm, "lr": numbers.learning_rate}.items():
            state.window[name] = state.window.get(name, 0.0) + value
        state.recent_steps += 1
        state.recent_loss += numbers.losses["total"]
        self.stepper.mid_step = False

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

    def _judge(self) -> None:
        """Whether the checkpoint that is due is the best so far: by the mean loss of the steps since the one before it.

        One that a signal asks for is not judged, so that an interrupted run keeps the same one as an unbroken run.
        """
        state = self.state
        loss = state.recent_loss / max(1, state.recent_steps)
        if state.best_loss is None or loss < state.best_loss:
            state.best_step, state.best_loss = state.step, loss
        state.recent_loss, state.recent_steps = 0.0, 0

    def _checkpoint(self) -> None:
        """Writes everything a resumed run needs; older checkpoints beyond `keep_last` and the best are removed afterwards."""
        if self.saved_step == self.state.step:
            return
        if not self.team.writes:
            self.saved_step = self.state.step
            return
        tensors = training_tensors(self.module, self.stepper.optimizer)
        save_checkpoint(checkpoint_path(self.run.checkpoints, self.state.step), tensors, self._meta())
        prune_checkpoints(self.run.checkpoints, self.config.keep_last, best=self.state.best_step)
        self.saved_step = self.state.step

    def _restore(self, path: Path) -> None:
        checkpoint = load_checkpoint(path)
        check_data(path, checkpoint.meta, self.data)
        check_plan(path, checkpoint.meta, self.plan)
        restore_tensors(checkpoint.tensors, self.module, self.stepper.optimizer)
        self.state = RunState.from_meta(checkpoint.meta)
        self.saved_step = self.state.step
        self.run.log(f"resumed from {path.name}")

    def _meta(self) -> dict[str, Any]:
        data = {} if self.data is None else {"data": self.data}
        return {**self.plan, **self.state.meta(), **data, "config": self.run.config_tree()}

    def _stop(self) -> None:
        """After a signal: keeps what is done. A step cut in its middle is not: running statistics may have moved already."""
        if self.stepper.mid_step:
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
                "best_step": state.best_step,
                "best_loss": state.best_loss,
            }
        )
        self.run.log(f"finished {state.step} steps in {duration(state.seconds)}")
        return FitResult(state.step, state.seconds, state.losses)


def _claim(run: RunFolder, config: TrainingConfig) -> str:
    run.claim(config)
    return ""


def _schedule(batches: BatchSource, config: TrainingConfig) -> tuple[int, int]:
    """Optimiser steps in all, and per epoch."""
    if batches.steps_per_epoch < 1:
        raise TrainingError(
            "there is no batch to train on: the split, label share or frame limit leaves no frame. Choose another split, or "
            "raise the share or the limit."
        )
    return config.planned_steps(batches.steps_per_epoch), math.ceil(batches.steps_per_epoch / config.accumulate)
