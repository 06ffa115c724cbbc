"""Segmentation: what it learns on one frame, what it answers where, its losses, and the edges of a batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from picture3d.errors import ConfigError, DataError
from picture3d.ops.lovasz import lovasz_softmax
from picture3d.structures.batch import PointBatch
from picture3d.tasks.segmentation import SegmentationTask, SegmentationTaskConfig, cross_entropy, evaluate_segmentation
from tests.tasks.small_scene import GRID, batch_of, generator, layered_batch, no_points, small_task

NAMES = tuple(f"class_{i}" for i in range(17))


def train(task: SegmentationTask, batch: PointBatch, steps: int) -> None:
    optimizer = torch.optim.AdamW(task.module.parameters(), lr=3e-3)
    task.module.train()
    for _ in range(steps):
        optimizer.zero_grad()
        task.loss(batch, generator())["total"].backward()
        optimizer.step()


def test_a_small_net_learns_one_frame_by_heart():
    task, batch = small_task(), layered_batch()
    train(task, batch, steps=60)
    scores = evaluate_segmentation(task, [batch], NAMES)
    assert scores.miou is not None
    assert scores.miou > 0.9
    assert scores.num_points == int((_labels(batch) != 0).sum())


def test_points_that_share_a_voxel_can_get_different_classes():
    low, high = torch.tensor([[0.1, 0.1, 0.1]]), torch.tensor([[0.9, 0.9, 0.9]])
    batch = batch_of(torch.cat([low, high] * 10 + [low - 3, high + 3]), labels=torch.tensor([4, 7] * 10 + [4, 7]))
    task = small_task()
    train(task, batch, steps=40)
    assert task.predict(batch)[:2].tolist() == [4, 7]


def test_class_zero_is_never_predicted_even_where_its_logit_is_largest():
    task, batch = small_task(), layered_batch(50)
    with torch.no_grad():
        task.module.seg_head.classifier.bias[0] = 1e6
    assert (task.predict(batch) > 0).all()


def test_the_losses_are_cross_entropy_and_lovasz_over_labelled_points_inside_the_grid():
    task, batch = small_task(settings={"cross_entropy_weight": 0.5, "lovasz_weight": 2.0}), layered_batch(80)
    outside = torch.tensor([[100.0, 0.0, 0.0]])
    batch = batch_of(torch.cat([batch.xyz, outside]), labels=torch.cat([_labels(batch), torch.tensor([3])]))
    task.module.eval()
    losses = task.loss(batch, generator())
    logits = task.module(batch).logits
    kept = (_labels(batch)[:-1] != 0).nonzero().squeeze(1)
    assert losses["cross_entropy"].item() == pytest.approx(F.cross_entropy(logits[kept], _labels(batch)[kept]).item(), rel=1e-5)
    assert losses["lovasz"].item() == pytest.approx(lovasz_softmax(logits[kept], _labels(batch)[kept]).item(), rel=1e-5)
    assert losses["total"].item() == pytest.approx(0.5 * losses["cross_entropy"].item() + 2 * losses["lovasz"].item(), rel=1e-5)
    assert losses["accuracy"].item() == pytest.approx((task.predict(batch)[kept] == _labels(batch)[kept]).float().mean().item())


@pytest.mark.parametrize(("setting", "left"), [("cross_entropy_weight", "lovasz"), ("lovasz_weight", "cross_entropy")])
def test_a_loss_of_weight_zero_is_not_computed(setting: str, left: str):
    losses = small_task(settings={setting: 0.0}).loss(layered_batch(60), generator())
    assert set(losses) == {"total", left, "accuracy"}
    assert losses["total"].item() == losses[left].item()


def test_weighted_cross_entropy_equals_the_library_one():
    logits, labels = torch.randn(50, 5), torch.arange(50) % 5
    weights = (9.0, 1.0, 0.5, 0.0, 3.0)
    expected = F.cross_entropy(logits, labels, weight=torch.tensor(weights), ignore_index=0)
    assert cross_entropy(logits, labels, weights).item() == pytest.approx(expected.item(), rel=1e-6)
    assert cross_entropy(logits, labels).item() == pytest.approx(
        F.cross_entropy(logits, labels, ignore_index=0).item(), rel=1e-6
    )


def test_labels_of_a_class_with_weight_zero_alone_cost_nothing():
    assert cross_entropy(torch.randn(3, 3), torch.tensor([2, 2, 0]), (1.0, 1.0, 0.0)).item() == 0


def test_two_samples_are_answered_as_each_alone():
    task = small_task()
    train(task, layered_batch(), steps=5)
    both = layered_batch(120, samples=2, seed=3)
    first, second = both.xyz[:120], both.xyz[120:]
    joint = task.predict(both)
    alone = torch.cat([task.predict(batch_of(first)), task.predict(batch_of(second))])
    assert torch.equal(joint, alone)


# Edges ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "xyz",
    [
        pytest.param(no_points(), id="no points"),
        pytest.param(torch.tensor([[100.0, 0.0, 0.0], [0.0, 0.0, 50.0]]), id="all out of range"),
        pytest.param(torch.tensor([[1.0, 1.0, 0.0]]), id="one point"),
        pytest.param(torch.full((2, 3), float("nan")), id="not finite"),
    ],
)
@pytest.mark.parametrize("label", [0, 4])
def test_awkward_frames_train_and_are_answered(xyz: torch.Tensor, label: int):
    task = small_task()
    batch = batch_of(xyz, labels=torch.full((len(xyz),), label))
    losses = task.loss(batch, generator())
    losses["total"].backward()
    assert losses["total"].isfinite()
    gradients = [p.grad for p in task.module.parameters() if p.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert all(value.isfinite().all() for value in task.module.state_dict().values())
    assert task.predict(batch).shape == (len(xyz),)


def test_without_a_valid_label_every_loss_is_zero():
    losses = small_task().loss(replace(layered_batch(40), labels=torch.zeros(40, dtype=torch.int64)), generator())
    assert {name: value.item() for name, value in losses.items()} == {
        "total": 0.0, "cross_entropy": 0.0, "lovasz": 0.0, "accuracy": 0.0,
    }  # fmt: skip


def test_an_empty_sample_between_others_is_left_empty():
    task = small_task()
    cloud = layered_batch(30).xyz
    answer = task.predict(batch_of(cloud, no_points(), cloud))
    assert torch.equal(answer[:30], answer[30:])


def test_frames_without_labels_are_refused_by_name():
    batch = batch_of(torch.zeros(3, 3))
    with pytest.raises(DataError, match="log/0: no labels"):
        small_task().loss(batch, generator())
    with pytest.raises(DataError, match="log/0: no labels"):
        evaluate_segmentation(small_task(), [batch], NAMES)


def test_a_label_beyond_the_classes_is_refused_by_name():
    batch = batch_of(torch.zeros(3, 3), labels=torch.tensor([1, 16, 31]))
    with pytest.raises(DataError, match="label 31 is not among the 17"):
        small_task().loss(batch, generator())


def test_prediction_leaves_mode_and_statistics_as_they_were():
    task, batch = small_task(), layered_batch(60)
    task.module.train()
    before = {name: value.clone() for name, value in task.module.state_dict().items()}
    task.predict(batch)
    assert task.module.training
    assert all(torch.equal(value, before[name]) for name, value in task.module.state_dict().items())


def test_scores_are_accumulated_over_batches_and_count_points_outside_the_grid():
    task = small_task()
    inside = layered_batch(60)
    far = batch_of(torch.tensor([[0.0, 0.0, 0.0], [60.0, 0.0, 0.0]]), labels=torch.tensor([4, 4]))
    scores = evaluate_segmentation(task, [inside, far], NAMES)
    assert scores.num_points == int((_labels(inside) != 0).sum()) + 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"cross_entropy_weight": 0, "lovasz_weight": 0}, "nothing to learn"),
        ({"class_weights": [1.0, 1.0]}, "17 classes"),
        ({"class_weights": [1.0] + [0.0] * 16}, "at least one class"),
        ({"lovasz_wieght": 1}, "lovasz_weight"),
    ],
)
def test_settings_that_cannot_work_are_refused_in_words(settings: dict[str, object], words: str):
    with pytest.raises(ConfigError, match=words):
        SegmentationTaskConfig.from_tree(settings)


def test_the_grid_of_the_tests_is_what_the_encoder_expects():
    assert small_task().module.vfe.grid_shape == GRID.shape


def _labels(batch: PointBatch) -> torch.Tensor:
    assert batch.labels is not None
    return batch.labels
