from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from picture3d.errors import ConfigError
from picture3d.training.optim import OptimConfig, beta1, build_optimizer, learning_rate, set_schedule

WAYMO = OptimConfig(peak_lr=1e-3, warmup_share=0.1, start_divisor=100)


def test_the_learning_rate_starts_at_the_peak_over_the_divisor_and_peaks_after_the_warm_up():
    assert learning_rate(0, 1000, WAYMO) == pytest.approx(1e-5)
    # Half way up the half cosine: the mean of 1e-5 and 1e-3.
    assert learning_rate(50, 1000, WAYMO) == pytest.approx((1e-5 + 1e-3) / 2)
    assert learning_rate(100, 1000, WAYMO) == pytest.approx(1e-3)


def test_the_learning_rate_falls_to_the_first_one_over_ten_thousand():
    # Half way down: the mean of 1e-3 and 1e-5 / 1e4.
    assert learning_rate(550, 1000, WAYMO) == pytest.approx((1e-3 + 1e-9) / 2)
    assert learning_rate(1000, 1000, WAYMO) == pytest.approx(1e-9)
    # A quarter down: cos(pi / 4).
    quarter = 1e-9 + (1e-3 - 1e-9) * (1 + math.sqrt(0.5)) / 2
    assert learning_rate(325, 1000, WAYMO) == pytest.approx(quarter)


def test_beta1_moves_oppositely():
    assert beta1(0, 1000, WAYMO) == pytest.approx(0.95)
    assert beta1(50, 1000, WAYMO) == pytest.approx(0.90)
    assert beta1(100, 1000, WAYMO) == pytest.approx(0.85)
    assert beta1(550, 1000, WAYMO) == pytest.approx(0.90)
    assert beta1(1000, 1000, WAYMO) == pytest.approx(0.95)


@pytest.mark.parametrize("total", [1, 2, 3, 10, 97])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.4, 0.99])
def test_the_schedule_is_defined_at_every_step_of_every_length(total: int, share: float):
    config = OptimConfig(warmup_share=share)
    for step in range(total):
        assert 0 < learning_rate(step, total, config) <= config.peak_lr
        assert config.beta1_low <= beta1(step, total, config) <= config.beta1_high


def test_without_a_warm_up_the_first_step_has_the_peak():
    assert learning_rate(0, 10, OptimConfig(peak_lr=0.5, warmup_share=0.0)) == 0.5


def test_one_step_equals_adam_with_decoupled_decay_computed_by_hand():
    config = OptimConfig(peak_lr=0.1, weight_decay=0.5, warmup_share=0.0, epsilon=1e-8)
    module = nn.ParameterDict({"w": nn.Parameter(torch.tensor([[2.0]], dtype=torch.float64))})
    optimizer = build_optimizer(module, config)
    module["w"].grad = torch.tensor([[3.0]], dtype=torch.float64)
    assert set_schedule(optimizer, 0, 10, config) == 0.1
    optimizer.step()
    # Bias-corrected moments of the first step are g and g^2: the update is lr * sign(g).
    assert module["w"].item() == pytest.approx(2.0 * (1 - 0.1 * 0.5) - 0.1 * 3.0 / (3.0 + 1e-8))


def test_norms_and_biases_decay_as_published_unless_told_otherwise():
    def after_a_step_without_gradient(decay_norms: bool) -> tuple[float, float]:
        config = OptimConfig(peak_lr=0.1, weight_decay=0.5, warmup_share=0.0, decay_norms=decay_norms)
        module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.fill_(1.0)
                parameter.grad = torch.zeros_like(parameter)
        optimizer = build_optimizer(module, config)
        set_schedule(optimizer, 0, 10, config)
        optimizer.step()
        weights = module.state_dict()
        return weights["0.weight"][0, 0].item(), weights["1.weight"][0].item()

    assert after_a_step_without_gradient(True) == pytest.approx((0.95, 0.95))
    assert after_a_step_without_gradient(False) == pytest.approx((0.95, 1.0))


def test_frozen_parameters_are_left_out():
    module = nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    optimizer = build_optimizer(module, OptimConfig())
    assert [p.shape for group in optimizer.param_groups for p in group["params"]] == [(2, 2)]


def test_a_part_follows_the_schedule_times_its_own_scale_and_of_nested_parts_the_inner_one_counts():
    module = nn.ModuleDict({"body": nn.ModuleDict({"stem": nn.Linear(1, 1), "top": nn.Linear(1, 1)}), "head": nn.Linear(1, 1)})
    config = OptimConfig(peak_lr=0.1, weight_decay=0.0, warmup_share=0.0, lr_scale={"body": 0.5, "body.stem": 0.0})
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer = build_optimizer(module, config)
    assert set_schedule(optimizer, 0, 10, config) == 0.1
    optimizer.step()
    moved = {name: (before[name] - tensor).item() for name, tensor in module.state_dict().items()}
    # Adam's first step is the learning rate, whatever the gradient.
    for part, expected in (("body.stem", 0.0), ("body.top", 0.05), ("head", 0.1)):
        assert [moved[f"{part}.weight"], moved[f"{part}.bias"]] == pytest.approx([expected] * 2, abs=1e-7)


def test_a_scale_for_a_part_that_is_not_there_is_refused_and_the_parts_are_named():
    with pytest.raises(ConfigError, match=r"lr_scale names bod, .* parts: body, head"):
        build_optimizer(nn.ModuleDict({"body": nn.Linear(1, 1), "head": nn.Linear(1, 1)}), OptimConfig(lr_scale={"bod": 0.5}))


def test_a_negative_scale_is_refused():
    with pytest.raises(ConfigError, match="lr_scale of head"):
        OptimConfig.from_tree({"lr_scale": {"head": -0.1}})


def test_contradicting_betas_are_refused():
    with pytest.raises(ConfigError, match="beta1_low"):
        OptimConfig.from_tree({"beta1_low": 0.97})
