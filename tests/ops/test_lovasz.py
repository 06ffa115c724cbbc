"""Lovasz-softmax against reference numbers, a literal slow twin in float64, and answers a person can check."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from picture3d.ops.lovasz import _descending, lovasz_softmax
from tests.sample_data import golden_files


@pytest.mark.parametrize("path", golden_files("openpcdet", "seg_losses"))
def test_losses_equal_the_golden_values(path: Path):
    stored = np.load(path)
    logits, labels = torch.from_numpy(stored["logits"]), torch.from_numpy(stored["labels"]).long()
    cross_entropy = F.cross_entropy(logits, labels, ignore_index=0)
    np.testing.assert_allclose(cross_entropy.item(), stored["loss_ce_ignore0"], rtol=1e-5)
    np.testing.assert_allclose(lovasz_softmax(logits, labels).item(), stored["loss_lovasz_ignore0"], rtol=1e-5)
    np.testing.assert_allclose(lovasz_softmax(logits, labels, ignored=None).item(), stored["loss_lovasz_no_ignore"], rtol=1e-5)


def jaccard_loss(wrong: set[int], members: set[int]) -> float:
    """1 - |hit| / |union| when the rows in `wrong` are the misclassified ones."""
    return 1 - len(members - wrong) / len(members | wrong)


def slow_lovasz(logits: np.ndarray, labels: np.ndarray, ignored: int | None) -> float:
    """The definition, row by row: the Lovasz extension of the Jaccard loss, a set function, at the vector of errors."""
    kept = [i for i in range(len(labels)) if labels[i] != ignored]
    losses = []
    for c in sorted({int(labels[i]) for i in kept}):
        members = {i for i in kept if labels[i] == c}
        error = {}
        for i in kept:
            p = np.exp(logits[i] - logits[i].max())
            error[i] = abs((1.0 if i in members else 0.0) - (p / p.sum())[c])
        wrong: set[int] = set()
        total = 0.0
        for i in sorted(kept, key=lambda i: -error[i]):
            total += error[i] * (jaccard_loss(wrong | {i}, members) - jaccard_loss(wrong, members))
            wrong.add(i)
        losses.append(total)
    return float(np.mean(losses)) if losses else 0.0


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 23), classes=st.integers(2, 6), seed=st.integers(0, 10_000), ignored=st.sampled_from([0, None]))
def test_it_equals_the_lovasz_extension_of_the_jaccard_loss(rows: int, classes: int, seed: int, ignored: int | None):
    rng = np.random.default_rng(seed)
    logits, labels = 2 * rng.standard_normal((rows, classes)), rng.integers(0, classes, rows)
    found = lovasz_softmax(torch.from_numpy(logits), torch.from_numpy(labels), ignored=ignored)
    assert found.item() == pytest.approx(slow_lovasz(logits, labels, ignored), abs=1e-12)


def test_gradients_equal_finite_differences():
    rng = np.random.default_rng(3)
    logits = torch.from_numpy(rng.standard_normal((9, 4))).requires_grad_()
    labels = torch.from_numpy(rng.integers(0, 4, 9))
    assert torch.autograd.gradcheck(lambda x: lovasz_softmax(x, labels), (logits,))


@pytest.mark.parametrize(("sure", "expected"), [(50.0, 0.0), (-50.0, 1.0)])
def test_certain_answers_cost_nothing_when_right_and_one_when_wrong(sure: float, expected: float):
    labels = torch.tensor([1, 2, 1, 2, 2])
    logits = sure * F.one_hot(labels, 3).float()[:, [0, 1, 2]] * torch.tensor([0.0, 1.0, 1.0])
    assert lovasz_softmax(logits, labels).item() == pytest.approx(expected, abs=1e-6)


def test_a_hard_answer_costs_one_minus_its_mean_iou():
    truth, answer = torch.tensor([1, 1, 1, 2, 2, 3]), torch.tensor([1, 1, 2, 2, 2, 1])
    # class 1: 2 / 4, class 2: 2 / 3, class 3: 0 / 1
    loss = lovasz_softmax(100 * F.one_hot(answer, 4).float(), truth)
    assert loss.item() == pytest.approx(1 - (2 / 4 + 2 / 3 + 0) / 3, abs=1e-6)


@pytest.mark.parametrize("rows", [0, 4])
def test_without_a_valid_row_it_is_zero_and_sends_back_zeros(rows: int):
    logits = torch.randn(rows, 5, requires_grad=True)
    loss = lovasz_softmax(logits, torch.zeros(rows, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.zeros(rows, 5))


def test_what_ignored_rows_hold_does_not_matter():
    logits, labels = torch.randn(12, 5), torch.arange(12) % 5
    spoiled = torch.where((labels == 0)[:, None], torch.full_like(logits, float("nan")), logits)
    assert lovasz_softmax(spoiled, labels).item() == lovasz_softmax(logits, labels).item()


def test_half_precision_is_computed_in_float32():
    logits, labels = torch.randn(200, 5).bfloat16(), torch.arange(200) % 5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = lovasz_softmax(logits, labels)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(lovasz_softmax(logits.float(), labels).item(), abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(0, float("inf"), width=32), max_size=40),
    rows=st.integers(0, 3),
    seed=st.integers(0, 100),
)
def test_sorting_by_bits_is_the_stable_descending_order(values: list[float], rows: int, seed: int):
    table = torch.tensor([values] * rows, dtype=torch.float32).reshape(rows, len(values))
    table = table[:, torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))]
    assert torch.equal(_descending(table), torch.argsort(table, dim=1, descending=True, stable=True))
