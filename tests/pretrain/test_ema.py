"""The self-teacher follows as the formula says, is never trained, resumes to the byte and notices when it collapses."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from picture3d.errors import ConfigError, TrainingError
from picture3d.pretrain.ema import EmaConfig, SelfTeacher, feature_spread
from picture3d.pretrain.losses import LossConfig
from picture3d.pretrain.masking import MaskConfig
from picture3d.pretrain.picture import Picture, PretrainTask, pretrain_step
from picture3d.structures.batch import PointBatch
from picture3d.training.loop import fit
from picture3d.training.plan import TrainingConfig
from picture3d.training.runlog import RunFolder
from tests.pretrain.test_picture import BACKBONE, GRID, generator, random_batch

KMEANS = MaskConfig(superclasses="kmeans", target_ratio=0.6)
QUICK = EmaConfig(momentum_start=0.5, momentum_end=0.9, ramp_steps=4)


def own_picture(config: EmaConfig = QUICK, seed: int = 0) -> Picture:
    torch.manual_seed(seed)
    return Picture(GRID, 1, BACKBONE, teacher_channels=32, num_predicted_points=4, self_teacher=config)


def teacher_of(model: Picture) -> SelfTeacher:
    assert model.self_teacher is not None
    return model.self_teacher


def sweeps(seed: int = 0) -> PointBatch:
    return random_batch(seed=seed, teacher=False)


def test_the_momentum_rises_along_half_a_cosine_and_stays():
    config = EmaConfig(momentum_start=0.9, momentum_end=0.98, ramp_steps=100)
    assert config.momentum(0) == pytest.approx(0.9, abs=1e-12)
    assert config.momentum(50) == pytest.approx(0.94, abs=1e-12)
    assert config.momentum(100) == config.momentum(10**6) == pytest.approx(0.98, abs=1e-12)
    with pytest.raises(ValidationError, match="above momentum_end"):
        EmaConfig(momentum_start=0.99, momentum_end=0.9)


def test_it_begins_as_the_encoder_and_does_not_change_what_is_drawn_for_the_rest():
    model = own_picture()
    torch.manual_seed(0)
    plain = Picture(GRID, 1, BACKBONE, teacher_channels=32, num_predicted_points=4).state_dict()
    with_teacher = model.state_dict()
    assert all(torch.equal(with_teacher[name], value) for name, value in plain.items())
    encoder = {name for name in plain if name.startswith(("vfe.", "backbone_3d."))}
    assert all(torch.equal(with_teacher[f"self_teacher.{name}"], plain[name]) for name in encoder)
    assert set(with_teacher) - set(plain) == {f"self_teacher.{name}" for name in [*encoder, "updates", "low_steps"]}


def test_it_follows_by_the_formula_and_takes_running_statistics_over():
    model = own_picture()
    teacher, student = teacher_of(model), model.backbone_3d
    expected = {name: value.double() for name, value in teacher.backbone_3d.named_parameters()}
    for step in range(6):
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator(step)))
            for buffer in model.vfe.buffers():
                buffer.add_(1)
        keep = 0.9 - 0.4 * (1 + math.cos(math.pi * min(1.0, step / 4))) / 2
        for name, value in student.named_parameters():
            expected[name] = keep * expected[name] + (1 - keep) * value.double()
        teacher.follow(model.vfe, student)
    for name, value in teacher.backbone_3d.named_parameters():
        torch.testing.assert_close(value.double(), expected[name], atol=1e-5, rtol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(teacher.vfe.buffers(), model.vfe.buffers(), strict=True))
    assert int(teacher.updates) == 6


def test_targets_are_the_teachers_rows_of_length_one_at_all_voxels_and_only_hidden_ones_are_predicted():
    model = own_picture()
    step = pretrain_step(model, sweeps(), KMEANS, LossConfig(), generator())
    assert step.targets.features is not None
    assert step.targets.features.shape == (len(step.coords), 32)
    torch.testing.assert_close(step.targets.features.norm(dim=1), torch.ones(len(step.coords)), atol=1e-3, rtol=0)
    assert bool(step.targets.has_features.all())
    assert step.predicted_features is not None
    assert len(step.predicted_features) == int(step.hidden.sum())
    for half in step.targets.features.chunk(2, dim=1):
        torch.testing.assert_close(half.mean(1), torch.zeros(len(half)), atol=1e-6, rtol=0)
    share = step.hidden.float().mean()
    assert float(share) == pytest.approx(0.6, abs=0.01)


def test_what_it_says_of_a_sweep_depends_on_nothing_else_in_the_batch():
    teacher = teacher_of(own_picture().train())
    both = sweeps()
    first = both.sample == 0
    alone = PointBatch(both.xyz[first], both.features[first], both.sample[first], 1, ("a/0",))
    said = teacher(alone)
    torch.testing.assert_close(teacher(both)[: len(said)], said, atol=1e-5, rtol=1e-5)
    with_others = random_batch(teacher=True)
    torch.testing.assert_close(teacher(with_others), teacher(replace(with_others, cell_features=None)), atol=0, rtol=0)


def test_no_gradient_reaches_it_and_looking_does_not_move_it():
    model = own_picture()
    task = PretrainTask(model, KMEANS, LossConfig())
    task.loss(sweeps(), generator())["total"].backward()
    assert all(p.grad is None and not p.requires_grad for p in teacher_of(model).parameters())
    assert any(p.grad is not None for p in model.backbone_3d.parameters())
    before = {name: value.clone() for name, value in teacher_of(model).state_dict().items()}
    task.reconstruct(sweeps(1), generator())
    model.eval()
    scalars = task.loss(sweeps(1), generator())
    assert "target_rank" not in scalars
    assert all(torch.equal(value, before[name]) for name, value in teacher_of(model).state_dict().items())


def test_stored_superclasses_and_a_self_teacher_do_not_go_together():
    with pytest.raises(ConfigError, match=r"mask\.superclasses=kmeans"):
        pretrain_step(own_picture(), sweeps(), MaskConfig(), LossConfig(), generator())


def test_an_empty_batch_passes_through():
    task = PretrainTask(own_picture(EmaConfig(collapse_patience=1)), KMEANS, LossConfig())
    nothing = PointBatch(torch.zeros(0, 3), torch.zeros(0, 1), torch.zeros(0, dtype=torch.int64), 1, ("a/0",))
    scalars = task.loss(nothing, generator())
    assert all(bool(value.isfinite()) for value in scalars.values())
    assert float(scalars["target_spread"]) == float(scalars["target_rank"]) == 0


# --- the alarm --------------------------------------------------------------------------------------------------------


def test_the_spread_of_unit_rows_runs_from_zero_to_one():
    assert float(feature_spread(torch.ones(9, 4) / 2)) == pytest.approx(0, abs=1e-6)
    assert float(feature_spread(torch.cat([torch.eye(4), -torch.eye(4)]))) == pytest.approx(1, abs=1e-6)


def test_a_collapse_is_counted_step_by_step_and_stops_the_run():
    teacher = teacher_of(own_picture(EmaConfig(collapse_patience=3)))
    same, alive = torch.ones(20, 32) / math.sqrt(32), torch.nn.functional.normalize(torch.randn(20, 32, generator=generator()))
    teacher.watch(same)
    teacher.watch(same)
    assert int(teacher.low_steps) == 2
    assert float(teacher.watch(alive)["target_spread"]) > 0.9
    assert int(teacher.low_steps) == 0
    teacher.watch(same)
    teacher.watch(same[:1])  # one voxel says nothing
    teacher.watch(same)
    with pytest.raises(TrainingError, match=r"self-teacher has collapsed: over 3 steps.*momentum_start"):
        teacher.watch(same)
    silent = teacher_of(own_picture(EmaConfig(collapse_patience=0)))
    for _ in range(30):
        silent.watch(same)


def test_features_along_one_line_are_a_collapse_too():
    teacher = teacher_of(own_picture(EmaConfig(collapse_patience=1)))
    line = torch.linspace(-1, 1, 50)[:, None] * torch.nn.functional.normalize(torch.randn(1, 32, generator=generator()))
    with pytest.raises(TrainingError, match="effective rank below 2"):
        teacher.watch(line)


def test_a_run_whose_teacher_collapses_ends_with_the_reason(tmp_path: Path):
    model = own_picture(EmaConfig(collapse_patience=3, collapse_spread=1.0))  # nothing spreads that far
    task = PretrainTask(model, KMEANS, LossConfig())
    with pytest.raises(TrainingError, match="over 3 steps in a row"):
        fit(task, Batches(6), TrainingConfig(epochs=1), RunFolder(tmp_path), progress=lambda *_: None)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    assert {"target_spread", "target_rank", "target_momentum"} <= lines[0]["losses"].keys()


# --- training ---------------------------------------------------------------------------------------------------------


class Batches:
    """The same few batches in every epoch; raises KeyboardInterrupt before a chosen one, once."""

    def __init__(self, steps: int, interrupt_at: int | None = None) -> None:
        self.steps_per_epoch, self.interrupt_at = steps, interrupt_at

    def epoch(self, epoch: int, start_step: int) -> Iterator[PointBatch]:
        for step in range(start_step, self.steps_per_epoch):
            if step == self.interrupt_at:
                self.interrupt_at = None
                raise KeyboardInterrupt
            yield sweeps(step)


def final(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_a_resumed_run_ends_with_the_bytes_of_an_unbroken_one(tmp_path: Path):
    config = TrainingConfig(epochs=1, checkpoint_every=100)

    def run(folder: Path, batches: Batches, resume: bool = False) -> None:
        task = PretrainTask(own_picture(), KMEANS, LossConfig())
        fit(task, batches, config, RunFolder(folder), resume=resume, progress=lambda *_: None)

    run(tmp_path / "whole", Batches(6))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", Batches(6, interrupt_at=3))
    run(tmp_path / "broken", Batches(6), resume=True)
    names = ("whole", "broken")
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in names)
    assert one == other
    logs = [[json.loads(x)["losses"] for x in (tmp_path / n / "metrics.jsonl").read_text().splitlines()] for n in names]
    assert logs[0] == logs[1]
    weights = final(tmp_path / "whole")
    assert int(weights["model.self_teacher.updates"]) == 6
    name = next(n for n in weights if n.startswith("model.backbone_3d.") and n.endswith("weight"))
    assert not torch.equal(weights[name], weights[name.replace("model.", "model.self_teacher.", 1)])
