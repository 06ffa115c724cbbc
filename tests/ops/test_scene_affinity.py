from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from picture3d.ops.lovasz import lovasz_softmax
from picture3d.ops.scene_affinity import geometric_affinity, semantic_affinity
from picture3d.structures.occupancy import IGNORED
from tests.sample_data import golden_files

LOSSES = (semantic_affinity, geometric_affinity)


@pytest.mark.parametrize("path", golden_files("openpcdet", "occ_losses"))
def test_the_losses_are_the_references(path: Path):
    reference = np.load(path)
    logits = torch.from_numpy(reference["logits"]).permute(0, 2, 3, 4, 1).reshape(-1, 17)
    labels = torch.from_numpy(reference["labels"]).flatten().long()
    kept = labels != IGNORED
    logits, labels = logits[kept], labels[kept]
    found = {
        "loss_ce": F.cross_entropy(logits, labels, torch.from_numpy(reference["class_weight"])),
        "loss_sem_scal": semantic_affinity(logits, labels),
        "loss_geo_scal": geometric_affinity(logits, labels),
        "loss_lovasz": lovasz_softmax(logits, labels, ignored=None),
    }
    for name, value in found.items():
        assert value.item() == pytest.approx(float(reference[name]), rel=1e-5), name


def test_two_cells_by_hand():
    """A free cell and a car; both are said to be a car with 0.8."""
    logits = torch.tensor([[0.2, 0.8], [0.2, 0.8]], dtype=torch.float64).log()
    labels = torch.tensor([0, 1])
    of_free = math.log(0.2 / 0.4) + math.log(0.2) + math.log(0.8)
    of_car = math.log(0.8 / 1.6) + math.log(0.8) + math.log(0.2)
    assert semantic_affinity(logits, labels).item() == pytest.approx(-(of_free + of_car) / 2)
    assert geometric_affinity(logits, labels).item() == pytest.approx(-of_car, abs=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
def test_what_is_certain_and_right_costs_nothing(loss):
    labels = torch.tensor([0, 1, 2, 2])
    assert loss(F.one_hot(labels, 3) * 50.0, labels).item() == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("labels", [[], [0, 0], [1, 1]], ids=["no cell", "all free", "all occupied"])
def test_edges_are_finite_with_finite_gradients(loss, labels: list[int]):
    logits = torch.randn(len(labels), 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    value = loss(logits, torch.tensor(labels, dtype=torch.int64))
    value.backward()
    assert math.isfinite(value.item())
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())
    assert value.item() >= 0
    assert labels or value.item() == 0


@pytest.mark.parametrize("loss", LOSSES)
def test_certain_and_wrong_stays_finite(loss):
    logits = torch.tensor([[200.0, 0.0], [0.0, 200.0]], requires_grad=True)
    value = loss(logits, torch.tensor([1, 0]))
    value.backward()
    assert 10 < value.item() <= 300
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_those_of_differences(loss):
    logits = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    labels = torch.tensor([0, 0, 1, 2, 2, 0])
    assert torch.autograd.gradcheck(lambda rows: loss(rows, labels), (logits,))
