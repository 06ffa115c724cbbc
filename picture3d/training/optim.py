"""One-cycle AdamW: the optimiser and schedule of the paper's configurations.

The learning rate rises along a half cosine from LR / divisor to LR during the warm-up, then falls along another to
LR / divisor / 1e4; beta1 moves oppositely. Both are pure functions of the step, so a resumed run follows the same curve.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import nn

from picture3d.config import FrozenConfig
from picture3d.errors import ConfigError


class OptimConfig(FrozenConfig):
    """One-cycle Adam with decoupled weight decay."""

    peak_lr: float = Field(default=1e-3, gt=0, description="learning rate at the top of the cycle")
    weight_decay: float = Field(default=0.05, ge=0, description="decoupled: each step takes lr * weight_decay of a weight away")
    decay_norms: bool = Field(default=True, description="decay biases and the scales of norms too, as published")
    warmup_share: float = Field(default=0.1, ge=0, lt=1, description="share of all steps during which the learning rate rises")
    start_divisor: float = Field(default=100.0, ge=1, description="the first learning rate is peak_lr / start_divisor")
    end_divisor: float = Field(default=1e4, ge=1, description="the last learning rate is peak_lr / start_divisor / end_divisor")
    beta1_high: float = Field(default=0.95, ge=0, lt=1, description="beta1 where the learning rate is lowest")
    beta1_low: float = Field(default=0.85, ge=0, lt=1, description="beta1 where the learning rate is highest")
    beta2: float = Field(default=0.99, ge=0, lt=1)
    epsilon: float = Field(default=1e-8, gt=0)
    grad_clip: float | None = Field(default=10.0, gt=0, description="largest norm of all gradients together; null: no clipping")
    lr_scale: dict[str, float] = Field(
        default_factory=dict,
        description="part of the network -> times the learning rate, for example backbone_3d=0.3; of nested parts the inner "
        "one counts; 0 leaves a part as it is",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        negative = [part for part, scale in self.lr_scale.items() if not (0 <= scale < math.inf)]
        if negative:
            raise ValueError(f"lr_scale of {', '.join(negative)} must be 0 or more, and finite")
        if self.beta1_low > self.beta1_high:
            raise ValueError(f"beta1_low {self.beta1_low} is above beta1_high {self.beta1_high}")
        return self


def learning_rate(step: int, total_steps: int, config: OptimConfig) -> float:
    """Learning rate of optimiser step `step` (0 is the first) of `total_steps`."""
    start = config.peak_lr / config.start_divisor
    rising, share = _phase(step, total_steps, config.warmup_share)
    if rising:
        return _cosine(start, config.peak_lr, share)
    return _cosine(config.peak_lr, start / config.end_divisor, share)


def beta1(step: int, total_steps: int, config: OptimConfig) -> float:
    """Adam's first momentum at `step`: low where the learning rate is high."""
    rising, share = _phase(step, total_steps, config.warmup_share)
    if rising:
        return _cosine(config.beta1_high, config.beta1_low, share)
    return _cosine(config.beta1_low, config.beta1_high, share)


def build_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of `module`; learning rate and beta1 are set by `set_schedule` at each step.

    Raises:
        ConfigError: if `lr_scale` names a part that the module does not have.
    """
    trainable = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    absent = [part for part in config.lr_scale if not any(_inside(name, part) for name in trainable)]
    if absent:
        parts = ", ".join(dict.fromkeys(name.split(".", 1)[0] for name in trainable))
        raise ConfigError(
            f"optim.lr_scale names {', '.join(absent)}, which this network does not train. Choose among its parts: {parts}."
        )
    grouped: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in trainable.items():
        # One-dimensional parameters are the biases and the scales and shifts of norms.
        decay = config.weight_decay if config.decay_norms or parameter.ndim > 1 else 0.0
        grouped.setdefault((_scale(name, config.lr_scale), decay), []).append(parameter)
    groups = [
        {"params": parameters, "weight_decay": decay, "lr_scale": scale} for (scale, decay), parameters in grouped.items()
    ]
    fused = all(parameter.device.type in {"cpu", "cuda"} for parameter in trainable.values())
    return torch.optim.AdamW(
        groups, lr=config.peak_lr, betas=(config.beta1_high, config.beta2), eps=config.epsilon, fused=fused or None
    )


def set_schedule(optimizer: torch.optim.Optimizer, step: int, total_steps: int, config: OptimConfig) -> float:
    """Sets learning rate and beta1 for `step` and returns the learning rate, that of parts without a scale of their own."""
    rate = learning_rate(step, total_steps, config)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
        group["betas"] = (beta1(step, total_steps, config), config.beta2)
    return rate


def _inside(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")


def _scale(name: str, scales: Mapping[str, float]) -> float:
    """The scale of the innermost part that `name` belongs to; 1 if it belongs to none."""
    return scales[max(parts, key=len)] if (parts := [part for part in scales if _inside(name, part)]) else 1.0


def _phase(step: int, total_steps: int, warmup_share: float) -> tuple[bool, float]:
    """Whether the learning rate still rises at `step`, and the share of that phase that has passed."""
    warmup = int(total_steps * warmup_share)
    if step < warmup:
        return True, step / warmup
    return False, min(1.0, (step - warmup) / max(1, total_steps - warmup))


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
