"""The two losses that the paper does not have: features of visible voxels, and features compared whitened."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from picture3d.errors import ConfigError
from picture3d.models.dsvt import DsvtOutput
from picture3d.pretrain.gate import GateConfig
from picture3d.pretrain.hierarchy import HierarchyConfig
from picture3d.pretrain.losses import LossConfig
from picture3d.pretrain.masking import MaskConfig
from picture3d.pretrain.picture import Picture, pretrain_step
from picture3d.pretrain.whitening import FeatureWhitening
from tests.pretrain.test_picture import BACKBONE, GRID, RANDOM, finite, generator, random_batch, small_picture

VISIBLE = LossConfig(visible_features_weight=5.0)


def visible_picture(*, teacher_channels: int | None = 12, **options: Any) -> Picture:
    torch.manual_seed(0)
    return Picture(GRID, 1, BACKBONE, teacher_channels=teacher_channels, visible_channels=12, num_predicted_points=4, **options)


def test_visible_voxels_are_told_from_the_encoder_that_did_not_see_the_hidden_ones():
    model, batch = visible_picture(), random_batch()
    seen: list[DsvtOutput] = []
    model.backbone_3d.register_forward_hook(lambda *given: seen.append(given[-1]))
    step = pretrain_step(model, batch, MaskConfig(), VISIBLE, generator())
    assert step.targets.features is not None
    assert model.visible_head is not None
    latent = seen[0]
    pillar = latent.stages[-1].feats[latent.token_of_voxel]
    told = torch.cat([pillar, latent.stages[0].feats], 1) @ model.visible_head.weight.T + model.visible_head.bias
    expected = F.smooth_l1_loss(told, step.targets.features[~step.hidden])
    torch.testing.assert_close(step.losses["visible_features"], expected)
    total = step.losses["coordinates"] + 3 * step.losses["features"] + 5 * step.losses["visible_features"]
    torch.testing.assert_close(step.losses["total"], total)
    step.losses["total"].backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_it_can_be_asked_alone_and_the_decoder_then_learns_nothing():
    model = visible_picture(teacher_channels=None)
    loss = LossConfig(coordinates_weight=0.0, features_weight=0.0, visible_features_weight=2.0)
    step = pretrain_step(model, random_batch(), RANDOM, loss, generator())
    assert list(step.losses) == ["total", "visible_features"]
    torch.testing.assert_close(step.losses["total"], 2 * step.losses["visible_features"])
    step.losses["total"].backward()
    learnt = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learnt == {"vfe", "backbone_3d", "visible_head"}


def test_the_other_weights_are_drawn_as_without_it():
    plain, model = small_picture().state_dict(), visible_picture(whitening=FeatureWhitening(12, 0.06)).state_dict()
    new = {"visible_head.weight", "visible_head.bias"} | {
        f"whitening.{name}" for name in FeatureWhitening(12, 0.06).state_dict()
    }
    assert set(model) - set(plain) == new
    assert all(torch.equal(model[name], value) for name, value in plain.items())


@pytest.mark.parametrize("hidden", [0.0, 1.0])
def test_everything_or_nothing_hidden_leaves_finite_losses(hidden: float):
    model, mask = visible_picture(whitening=FeatureWhitening(12, 0.06)), MaskConfig(kind="random", random_ratio=hidden)
    step = pretrain_step(model, random_batch(), mask, VISIBLE, generator())
    step.losses["total"].backward()
    assert finite(step)
    assert (step.losses["visible_features"].item() == 0) == (hidden == 1)


def test_a_network_without_the_predictor_says_what_to_set():
    with pytest.raises(ConfigError, match=r"set it to 0, or set visible_channels"):
        pretrain_step(small_picture(), random_batch(), MaskConfig(), VISIBLE, generator())


def test_without_a_teacher_it_says_what_to_set():
    with pytest.raises(ConfigError, match=r"loss\.visible_features_weight=0"):
        pretrain_step(visible_picture(), random_batch(teacher=False), RANDOM, replace_weights(features=0.0), generator())


def replace_weights(*, features: float) -> LossConfig:
    return VISIBLE.model_copy(update={"features_weight": features})


def test_whitened_features_are_those_of_what_was_seen_so_far():
    model, batch = visible_picture(whitening=FeatureWhitening(12, 0.06)), random_batch()
    seen: list[DsvtOutput] = []
    model.backbone_3d.register_forward_hook(lambda *given: seen.append(given[-1]))
    step = pretrain_step(model, batch, MaskConfig(), VISIBLE, generator())
    assert step.predicted_features is not None
    assert step.targets.features is not None
    twin = FeatureWhitening(12, 0.06)
    twin.see(step.targets.features, step.targets.has_features)
    expected = F.smooth_l1_loss(step.predicted_features, twin(step.targets.features[step.hidden]))
    torch.testing.assert_close(step.losses["features"], expected, rtol=1e-4, atol=1e-5)
    expected = F.smooth_l1_loss(model.features_of_visible(seen[0]), twin(step.targets.features[~step.hidden]))
    torch.testing.assert_close(step.losses["visible_features"], expected, rtol=1e-4, atol=1e-5)
    plain = pretrain_step(visible_picture(), batch, MaskConfig(), VISIBLE, generator())
    assert step.losses["features"] > 2 * plain.losses["features"]
    torch.testing.assert_close(step.losses["coordinates"], plain.losses["coordinates"])


def test_nothing_is_seen_outside_of_training():
    model, batch = visible_picture(whitening=FeatureWhitening(12, 0.06)), random_batch()
    pretrain_step(model.eval(), batch, MaskConfig(), VISIBLE, generator())
    assert model.whitening is not None
    assert int(model.whitening.rows) == 0
    pretrain_step(model.train(), batch, MaskConfig(), VISIBLE, generator())
    assert int(model.whitening.rows) > 0


def test_a_voxel_without_a_target_counts_neither_in_the_loss_nor_in_the_whitening():
    batch = random_batch()
    assert batch.point_cell is not None
    batch = replace(batch, point_cell=torch.where(batch.xyz[:, 1] > 0, -1, batch.point_cell))
    model = visible_picture(whitening=FeatureWhitening(12, 0.06))
    step = pretrain_step(model, batch, MaskConfig(), VISIBLE, generator())
    assert model.whitening is not None
    assert int(model.whitening.rows) == int(step.targets.has_features.sum()) < len(step.hidden)
    assert finite(step)


def test_with_a_gate_and_every_layer_it_waits_and_weighs_like_the_features_of_the_last_layer():
    model = visible_picture(
        hierarchy=HierarchyConfig(enabled=True), gate=GateConfig(enabled=True), whitening=FeatureWhitening(12, 0.06)
    )
    assert model.gate is not None
    assert model.hierarchy is not None
    closed = pretrain_step(model, random_batch(), MaskConfig(), VISIBLE, generator()).losses
    model.gate.weight.fill_(0.5)
    opened = pretrain_step(model, random_batch(), MaskConfig(), VISIBLE, generator()).losses
    last = 1 - model.hierarchy.alpha[-1]
    added = sum((1 - a) * 1.5 * opened[f"features_{i}"] for i, a in enumerate(model.hierarchy.alpha[:-1]))
    added = added + last * (1.5 * opened["features"] + 2.5 * opened["visible_features"])
    torch.testing.assert_close(opened["total"] - closed["total"], added, rtol=1e-3, atol=1e-4)
