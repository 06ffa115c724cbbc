"""One optimiser step: gradients of some batches, of all processes, a look at the numbers, and the optimiser."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from picture3d.errors import TrainingError
from picture3d.ops.processes import computing_together, with_added_terms
from picture3d.structures.batch import PointBatch
from picture3d.training.distributed import Team
from picture3d.training.interrupt import StopSignals
from picture3d.training.optim import build_optimizer, set_schedule
from picture3d.training.plan import Task, TrainingConfig


@dataclass(frozen=True, slots=True)
class StepPlace:
    """Where a step stands: its learning rate and its randomness follow from that."""

    step: int  # optimiser steps done before
    total_steps: int
    epoch: int
    position: int  # of its first batch in the epoch
    size: int  # batches
    batches_per_epoch: int


@dataclass(frozen=True, slots=True)
class StepNumbers:
    """What a step tells."""

    losses: dict[str, float]  # means over its batches and the processes
    grad_norm: float  # before clipping
    learning_rate: float
    waited_s: float  # for batches


class Stepper:
    """Trains a task step by step.

    Args:
        task: its module is trained in place, on its own device.
        config: precision, optimiser and seed are used.
        team: the processes that compute each step together.

    Raises:
        TrainingError: if the module has no trainable parameter.
    """

    def __init__(self, task: Task, config: TrainingConfig, team: Team) -> None:
        module = task.module
        self.config, self.team = config, team
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        if not self.parameters:
            raise TrainingError(
                "the module has no trainable parameter. Leave some of it unfrozen: look at the recipe's frozen parts."
            )
        self.device = self.parameters[0].device
        self.autocast = config.precision == "bf16" and (self.device.type != "cuda" or torch.cuda.is_bf16_supported())
        self.optimizer = build_optimizer(module, config.optim)
        self.loss = team.wrap(_Loss(task, module, team))
        self.mid_step = False  # a step has begun that whoever takes it has not noted yet; that one sets it back

    @property
    def precision(self) -> str:
        """The precision that is computed in, in words."""
        if self.config.precision == "bf16" and not self.autocast:
            return "float32 (this GPU has no bf16)"
        return "bf16 autocast" if self.autocast else "float32"

    def take(self, batches: Iterator[PointBatch], place: StepPlace, signals: StopSignals) -> StepNumbers:
        """One step over the next `place.size` batches.

        Raises:
            TrainingError: if there are fewer, if a number is not finite (nothing is changed then; frames and terms are
                named), or if nothing that is trained takes part.
        """
        rate = set_schedule(self.optimizer, place.step, place.total_steps, self.config.optim)
        self.optimizer.zero_grad(set_to_none=True)
        terms: dict[str, Tensor] = {}
        frames: list[str] = []
        waited_s = 0.0
        for index in range(place.size):
            begin = time.perf_counter()
            # Between steps nothing is half done, so a signal need not wait for the batch.
            signals.safe = index == 0 and self.team.alone
            try:
                with self.team.at(f"loading batch {place.position + index} of epoch {place.epoch}", waits=False):
                    batch = next(batches, None)
            finally:
                signals.safe = False
            if batch is None:
                raise TrainingError(
                    f"epoch {place.epoch} ended after {place.position + index} batches, {place.batches_per_epoch} were "
                    "promised. Give batches that promise what they hold."
                )
            self.mid_step = True
            waited_s += time.perf_counter() - begin
            frames += batch.frame_names
            for name, value in self._backward(batch, place, index).items():
                terms[name] = terms[name] + value if name in terms else value
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients) if gradients else torch.zeros((), device=self.device)
        # One transfer per step: every number that is looked at or logged.
        stacked = torch.stack([t.detach().to(self.device, torch.float32) for t in (*terms.values(), norm)])
        *values, norm_value = self.team.mean(stacked).tolist()
        losses = dict(zip(terms, values, strict=True))
        if not (math.isfinite(losses["total"]) and math.isfinite(norm_value)):
            self._refuse({**losses, "grad_norm": norm_value}, self._guilty(frames, stacked), place, rate)
        if self.config.optim.grad_clip is not None and gradients:
            nn.utils.clip_grads_with_norm_(self.parameters, self.config.optim.grad_clip, norm)
        self.optimizer.step()
        return StepNumbers(losses, norm_value, rate, waited_s)

    def _backward(self, batch: PointBatch, place: StepPlace, index: int) -> dict[str, Tensor]:
        """Adds a batch's share of the gradient, at the last one that of all processes; returns its share of each loss term."""
        position = place.position + index
        seed = batch_seed(self.config.seed, place.epoch, position)
        # Dropout draws from the process's own generator; seeding it too keeps a resumed run on the same numbers.
        rank = self.team.place.rank
        torch.manual_seed(seed if rank == 0 else batch_seed(seed, rank, 0))
        generator = torch.Generator(self.device).manual_seed(seed)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.team.at(f"forward and backward pass of batch {position} of epoch {place.epoch}"))
            if isinstance(self.loss, nn.parallel.DistributedDataParallel) and index < place.size - 1:
                stack.enter_context(self.loss.no_sync())
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast):
                terms = self.loss(batch.to(self.device), generator)
            total = terms["total"] / place.size
            if not total.requires_grad:
                raise TrainingError(
                    f"the loss of batch {', '.join(batch.frame_names)} does not depend on any trainable parameter. Look at the "
                    "loss weights of the config: is all that is left of them frozen?"
                )
            total.backward()
        return {name: value.detach() / place.size for name, value in terms.items()}

    def _guilty(self, frames: list[str], values: Tensor) -> list[str]:
        """The frames of the processes whose own numbers are not finite; of all if no loss is to blame."""
        finite = bool(torch.isfinite(values[:-1]).all())
        said = self.team.texts(f"{'+' if finite else '-'}{', '.join(frames)}")
        return [text[1:] for text in said if text.startswith("-")] or [text[1:] for text in said if text[1:]]

    def _refuse(self, numbers: Mapping[str, float], frames: list[str], place: StepPlace, rate: float) -> None:
        terms = ", ".join(f"{name} {value:.6g}" for name, value in numbers.items())
        what = "gradient" if math.isfinite(numbers["total"]) else "loss"
        raise TrainingError(
            f"the {what} is not finite at step {place.step + 1} (epoch {place.epoch}, learning rate {rate:.3g}): {terms}. "
            f"Frames of the batch: {', '.join(frames)}. Look at these frames, or lower training.optim.peak_lr; "
            f"--resume goes on from the newest checkpoint."
        )


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


def batch_seed(seed: int, epoch: int, position: int) -> int:
    """Seed of the randomness of one batch: well mixed, below 2**63, a pure function of its three arguments."""
    high, low = np.random.SeedSequence([seed, epoch, position]).generate_state(2)
    return (int(high) << 32 | int(low)) & 0x7FFF_FFFF_FFFF_FFFF
