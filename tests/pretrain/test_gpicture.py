"""GPICTURE's two extensions: the reconstruction of every layer, and the gate."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from picture3d.errors import ConfigError, TrainingError
from picture3d.pretrain.gate import Gate, GateConfig
from picture3d.pretrain.hierarchy import (
    PUBLISHED_ALPHA,
    HierarchyConfig,
    LayerReader,
    interpolated_alpha,
    neighbourhoods,
)
from picture3d.pretrain.losses import LossConfig
from picture3d.pretrain.masking import MaskConfig
from picture3d.pretrain.picture import Picture, PretrainTask, pretrain_step
from picture3d.structures.batch import PointBatch
from picture3d.training.loop import fit
from picture3d.training.plan import TrainingConfig
from picture3d.training.runlog import RunFolder
from tests.ops.test_similarity import gram_cka
from tests.pretrain.test_picture import BACKBONE, GRID, generator, random_batch, small_picture

LAYERS = 4
ALL_LAYERS = HierarchyConfig(enabled=True)


def small_gpicture(
    hierarchy: HierarchyConfig | None = ALL_LAYERS, gate: GateConfig | None = None, decoder: str = "voxel", seed: int = 0
) -> Picture:
    torch.manual_seed(seed)
    kind = "voxel" if decoder == "voxel" else "light"
    return Picture(GRID, 1, BACKBONE, teacher_channels=12, decoder=kind, num_predicted_points=4, hierarchy=hierarchy, gate=gate)


# --- alpha ------------------------------------------------------------------------------------------------------------


def test_eight_layers_have_the_published_shares_and_others_those_of_the_same_depth():
    assert interpolated_alpha(8) == pytest.approx(PUBLISHED_ALPHA, abs=1e-15)
    # Depths 0, 7/3, 14/3 and 7 of the published eight.
    assert interpolated_alpha(4) == pytest.approx((0.97, 0.78 - 0.14 / 3, 0.55 - 0.11 * 2 / 3, 0.31))
    for layers in (2, 6, 12):
        values = interpolated_alpha(layers)
        assert (values[0], values[-1]) == pytest.approx((0.97, 0.31))
        assert all(a > b for a, b in pairwise(values))


def test_alpha_of_another_length_or_outside_zero_to_one_is_refused():
    with pytest.raises(ConfigError, match="3 values, the encoder 4 layers"):
        small_gpicture(HierarchyConfig(enabled=True, alpha=(0.9, 0.5, 0.1)))
    with pytest.raises(ValueError, match="between 0 and 1"):
        HierarchyConfig(alpha=(1.2,))


# --- reconstruction of every layer ------------------------------------------------------------------------------------


def test_without_the_extensions_the_network_is_picture_to_the_last_bit():
    plain, off = small_picture(), small_gpicture(HierarchyConfig(), GateConfig())
    assert {n: t.tolist() for n, t in plain.state_dict().items()} == {n: t.tolist() for n, t in off.state_dict().items()}
    with_all = small_gpicture().state_dict()
    assert all(torch.equal(tensor, with_all[name]) for name, tensor in plain.state_dict().items())
    batch = random_batch()
    a, b = (pretrain_step(m, batch, MaskConfig(), LossConfig(), generator()) for m in (plain, off))
    assert torch.equal(a.losses["total"], b.losses["total"])
    assert torch.equal(a.losses["total"], a.losses["coordinates"] + 3 * a.losses["features"])


@pytest.mark.parametrize("decoder", ["voxel", "light"])
@pytest.mark.parametrize("beta", [None, 0.0, 0.4])
def test_the_loss_is_the_sum_over_layers_of_points_and_gated_features(decoder: str, beta: float | None):
    gate = None if beta is None else GateConfig(enabled=True, voxels=8)
    model = small_gpicture(gate=gate, decoder=decoder)
    if model.gate is not None and beta is not None:
        model.gate.weight.fill_(beta)
    step = pretrain_step(model, random_batch(), MaskConfig(), LossConfig(coordinates_weight=2, features_weight=5), generator())
    alpha = interpolated_alpha(LAYERS)
    expected = 0.0
    for layer in range(LAYERS):
        suffix = "" if layer == LAYERS - 1 else f"_{layer}"
        points, features = (float(step.losses[name + suffix].detach()) for name in ("coordinates", "features"))
        assert points > 0
        assert features > 0
        expected += alpha[layer] * 2 * points + (1 - alpha[layer]) * 5 * (1.0 if beta is None else beta) * features
    assert float(step.losses["total"].detach()) == pytest.approx(expected, rel=1e-5)
    step.losses["total"].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_the_decoder_and_the_mask_are_those_of_plain_picture():
    batch = random_batch()
    plain, every = (
        pretrain_step(m, batch, MaskConfig(), LossConfig(), generator()) for m in (small_picture(), small_gpicture())
    )
    assert torch.equal(plain.hidden, every.hidden)
    for name in ("coordinates", "features"):
        assert torch.equal(plain.losses[name], every.losses[name])


def test_alpha_decides_what_a_layer_learns_from():
    model = small_gpicture(HierarchyConfig(enabled=True, alpha=(0.0, 1.0, 0.0, 1.0)))
    step = pretrain_step(model, random_batch(), MaskConfig(), LossConfig(features_weight=1.0), generator())
    wanted = sum(step.losses[name] for name in ("features_0", "coordinates_1", "features_2", "coordinates"))
    torch.testing.assert_close(step.losses["total"], wanted)


def test_a_step_of_all_layers_brings_every_loss_down():
    task, batch = PretrainTask(small_gpicture(), MaskConfig(), LossConfig()), random_batch()
    optimizer = torch.optim.AdamW(task.module.parameters(), lr=3e-3)
    history: list[dict[str, Tensor]] = []
    for _ in range(40):
        terms = task.loss(batch, generator(1))
        optimizer.zero_grad()
        terms["total"].backward()
        optimizer.step()
        history.append({name: value.detach() for name, value in terms.items()})
    names = [f"{kind}{layer}" for kind in ("coordinates", "features") for layer in ("", "_0", "_1", "_2")]
    assert all(history[-1][name] < 0.8 * history[0][name] for name in names)


@pytest.mark.parametrize("points", [0, 1])
def test_a_batch_with_nothing_to_hide_still_has_a_loss_and_a_gradient(points: int):
    model = small_gpicture().eval()
    step = pretrain_step(model, random_batch(points, 2), MaskConfig(), LossConfig(), generator())
    assert step.losses["total"].isfinite()
    step.losses["total"].backward()


def test_more_hidden_voxels_than_asked_for_are_thinned_out_evenly():
    model = small_gpicture(HierarchyConfig(enabled=True, voxels=10))
    assert model.hierarchy is not None
    assert model.hierarchy.chosen(7, torch.device("cpu")).tolist() == list(range(7))
    assert model.hierarchy.chosen(25, torch.device("cpu")).tolist() == [0, 2, 5, 7, 10, 12, 15, 17, 20, 22]
    step = pretrain_step(model, random_batch(), MaskConfig(), LossConfig(), generator())
    assert step.losses["coordinates_0"] > 0


def test_a_reader_sees_the_means_around_a_hidden_voxel_and_nothing_else():
    """Plain loops over voxels: mean of the visible tokens in each cell, 0 where there are none."""
    g = generator(3)
    shape, sizes = (6, 6, 4), ((2, 2, 2), (4, 4, 4))
    coords = (torch.rand(2, *shape, generator=g) < 0.3).nonzero().int()
    hidden = torch.rand(len(coords), generator=g) < 0.5
    tokens = torch.randn(int((~hidden).sum()), 5, generator=g)
    around = neighbourhoods(coords[~hidden], coords[hidden], shape, sizes)
    torch.manual_seed(0)
    reader = LayerReader(5, 2)
    found = reader(tokens, around)
    seen, places = coords[~hidden].tolist(), coords[hidden].tolist()
    for row, (b, *place) in enumerate(places):
        total, position = torch.zeros(5), []
        for linear, size in zip(reader.around, sizes, strict=True):
            cell = [p // s for p, s in zip(place, size, strict=True)]
            inside = [
                i
                for i, (other, *at) in enumerate(seen)
                if other == b and [p // s for p, s in zip(at, size, strict=True)] == cell
            ]
            mean = tokens[inside].mean(0) if inside else torch.zeros(5)
            total = total + linear(mean)
            position += [(2 * (p % s) + 1) / s - 1 for p, s in zip(place, size, strict=True)]
        expected = nn.functional.gelu(total + reader.position(torch.tensor(position)))
        torch.testing.assert_close(found[row], expected, rtol=1e-5, atol=1e-5)


# --- the gate ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("agreement", "beta"), [(0.1, 0.0), (0.2, 0.0), (0.3, 0.63212), (0.5, 0.95021), (0.9, 0.99909)])
def test_beta_has_the_published_values(agreement: float, beta: float):
    assert GateConfig().beta(agreement) == pytest.approx(beta, abs=1e-5)


def test_beta_of_an_agreement_that_is_not_known_is_zero():
    assert GateConfig().beta(math.nan) == 0.0


def test_the_gate_is_shut_for_two_epochs_and_then_follows_the_layers():
    gate = Gate(GateConfig(enabled=True, voxels=50, layers=4), LAYERS, 6)
    first = [torch.randn(80, 6, generator=generator(seed)) for seed in range(4)]
    second = [layer + 0.9 * torch.randn(80, 6, generator=generator(9 + seed)) for seed, layer in enumerate(first)]
    gate.look(first)
    assert (float(gate.weight), float(gate.agreement)) == (0.0, 0.0)
    gate.look(second)
    chosen = torch.arange(50) * 80 // 50
    expected = sum(gram_cka(a[chosen], b[chosen]) for a, b in zip(first, second, strict=True)) / 4
    assert float(gate.agreement) == pytest.approx(expected, abs=1e-9)
    assert float(gate.weight) == pytest.approx(1 - math.exp(-10 * (expected - 0.2)), abs=1e-9)
    gate.look([torch.randn(80, 6, generator=generator(100 + seed)) for seed in range(4)])
    assert float(gate.agreement) < 0.2
    assert float(gate.weight) == 0.0


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_layers_that_say_nothing_keep_the_gate_shut(rows: int):
    gate = Gate(GateConfig(enabled=True, voxels=50), LAYERS, 6)
    for _ in range(2):
        gate.look([torch.ones(rows, 6)] * 4)
    assert (float(gate.weight), float(gate.agreement)) == (0.0, 0.0)


def test_an_encoder_that_has_run_away_is_named():
    with pytest.raises(TrainingError, match="not finite"):
        Gate(GateConfig(enabled=True), LAYERS, 6).look([torch.full((5, 6), math.nan)] * 4)


def test_a_gate_without_a_sample_is_refused():
    task = PretrainTask(small_gpicture(gate=GateConfig(enabled=True)), MaskConfig(), LossConfig())
    with pytest.raises(ConfigError, match="gate_sample"):
        task.loss(random_batch(), generator())


class _FourBatches:
    steps_per_epoch = 4

    def epoch(self, epoch: int, start_step: int) -> Iterator[PointBatch]:
        return iter([random_batch(200, seed=10 * epoch + seed) for seed in range(4)][start_step:])


def gated_task(interval: int | None) -> PretrainTask:
    model = small_gpicture(gate=GateConfig(enabled=True, interval=interval, voxels=64))
    sample = random_batch(300, 1, seed=77, teacher=False)
    return PretrainTask(model, MaskConfig(), LossConfig(), gate_sample=sample, epoch_batches=4)


def run_of(folder: Path, config: TrainingConfig, interval: int | None, *, stop_at: int | None = None) -> Picture:
    """Trains to the end, stopped on the way by a signal (as the loop sees it) and resumed if asked to."""

    def stop(done: int, total: int, note: str) -> None:
        if done == stop_at:
            raise KeyboardInterrupt

    task = gated_task(interval)
    if stop_at is not None:
        with pytest.raises(KeyboardInterrupt):
            fit(task, _FourBatches(), config, RunFolder(folder), progress=stop)
        task = gated_task(interval)
    fit(task, _FourBatches(), config, RunFolder(folder), resume=stop_at is not None, progress=lambda *_: None)
    return task.module


@pytest.mark.parametrize("interval", [None, 3])
@pytest.mark.parametrize("stop_at", [4, 7, 9])
def test_a_resumed_run_ends_with_the_bytes_of_an_unbroken_one(tmp_path: Path, interval: int | None, stop_at: int):
    config = TrainingConfig(epochs=4, batch_size=3, threads=1, checkpoint_every=100)
    whole = run_of(tmp_path / "whole", config, interval)
    resumed = run_of(tmp_path / "resumed", config, interval, stop_at=stop_at)
    assert whole.gate is not None
    assert int(whole.gate.measured) == (3 if interval is None else 5)
    assert float(whole.gate.weight) > 0
    ours, theirs = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_the_gate_is_logged_and_opens_after_two_epochs(tmp_path: Path):
    run_of(tmp_path / "run", TrainingConfig(epochs=4, batch_size=3, threads=1), None)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    beta = [line["losses"]["gate_beta"] for line in lines]
    agreement = [line["losses"]["gate_agreement"] for line in lines]
    assert beta[:8] == [0.0] * 8
    assert beta[8:12] == [beta[8]] * 4
    assert beta[8] == pytest.approx(GateConfig().beta(agreement[8]), abs=1e-6)
    assert beta[12] == pytest.approx(GateConfig().beta(agreement[12]), abs=1e-6)


def test_looking_at_the_sample_changes_neither_the_mask_nor_the_running_statistics():
    batch = random_batch()
    terms = []
    for interval in (1, 100):
        task = gated_task(interval)
        found = [task.loss(batch, generator(seed)) for seed in range(3)]
        terms.append([value["coordinates"].detach() for value in found])
        assert task.module.training
        terms[-1] += [buffer for name, buffer in task.module.named_buffers() if not name.startswith("gate.")]
    assert all(torch.equal(a, b) for a, b in zip(*terms, strict=True))
