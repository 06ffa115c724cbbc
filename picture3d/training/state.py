"""What a run carries from step to step, as tensors and JSON: everything that an exact resume needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from picture3d.errors import CheckpointError, TrainingError
from picture3d.training.checkpoint import load_into

_MODEL = "model."
_OPTIMIZER = "optimizer."
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass(slots=True)
class RunState:
    """The numbers of a run; its tensors are those of the module and the optimiser."""

    step: int = 0  # optimiser steps done
    seconds: float = 0.0  # spent in training, over all resumed parts
    data_seconds: float = 0.0  # of these, waiting for batches
    window: dict[str, float] = field(default_factory=dict)  # sums since the last line of metrics
    window_steps: int = 0
    losses: dict[str, float] = field(default_factory=dict)  # of the last line of metrics
    recent_loss: float = 0.0  # sum of "total" since the last judged checkpoint
    recent_steps: int = 0
    best_step: int | None = None  # of the judged checkpoint with the least mean loss since the one before
    best_loss: float | None = None

    def meta(self) -> dict[str, Any]:
        """As JSON values. Numbers keep every bit: JSON writes the shortest decimals that read back the same."""
        values = asdict(self)
        return {"format": 1, "step": values.pop("step"), "progress": values}

    @staticmethod
    def from_meta(meta: Mapping[str, Any]) -> RunState:
        """The state that `meta` describes.

        Raises:
            CheckpointError: if it describes none.
        """
        try:
            return RunState(step=int(meta["step"]), **meta["progress"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"this checkpoint cannot be resumed: its description lacks the run's state ({error}). Go on from an older one, "
                "or start anew in another folder."
            ) from None


def check_plan(path: Path, meta: Mapping[str, Any], plan: Mapping[str, int]) -> None:
    """Refuses a checkpoint of a run of other length.

    Raises:
        TrainingError: naming both lengths.
    """
    found = {key: meta.get(key) for key in plan}
    if found != plan:
        raise TrainingError(
            f"{path}: the length of the schedule has changed. This run was planned for {found['total_steps']} steps, "
            f"{found['steps_per_epoch']} per epoch; now it would be {plan['total_steps']} and {plan['steps_per_epoch']}, "
            f"and the learning rate would follow another curve. Use the same data and length, or another folder."
        )


def check_data(path: Path, meta: Mapping[str, Any], data: Sequence[Mapping[str, Any]] | None) -> None:
    """Refuses a checkpoint of a run on other data: `data` describes each dataset by name and what must stay the same.

    Raises:
        TrainingError: naming the dataset and what changed.
    """
    if data is None or "data" not in meta:  # nobody knows
        return
    then, now = ({str(one["name"]): dict(one) for one in some} for some in (meta["data"], data))
    if list(then) != list(now):
        different = f"then {', '.join(then)}; now {', '.join(now)}"
    else:
        changed = [
            f"'{name}' {key.removesuffix('_crc32c')} (then {then[name].get(key)}, now {now[name].get(key)})"
            for name in now
            for key in now[name]
            if then[name].get(key) != now[name].get(key)
        ]
        if not changed:
            return
        different = ", ".join(changed)
    raise TrainingError(
        f"{path}: this run was trained on other data: {different}. Going on would mix the two; use the same data, or start a "
        "run in another folder."
    )


def model_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of the module, named ``model.*``."""
    return {f"{_MODEL}{name}": value for name, value in module.state_dict().items()}


def training_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """`model_tensors` and the optimiser's moments, named ``optimizer.<moment>.<parameter>``."""
    tensors = model_tensors(module)
    for name, parameter in module.named_parameters():
        # A parameter that never had a gradient has no moments.
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{_OPTIMIZER}{key}.{name}"] = value
    return tensors


def restore_tensors(tensors: Mapping[str, Tensor], module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Puts `training_tensors` back.

    Raises:
        CheckpointError: if the module is not of the same build.
    """
    load_into(module, {n.removeprefix(_MODEL): t for n, t in tensors.items() if n.startswith(_MODEL)})
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    state: dict[int, dict[str, Tensor]] = {}
    # The optimiser itself numbers its parameters, group after group.
    for number, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        stored = {key: f"{_OPTIMIZER}{key}.{names[id(parameter)]}" for key in _MOMENTS}
        if stored["step"] in tensors:
            state[number] = {key: tensors[name] for key, name in stored.items()}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
