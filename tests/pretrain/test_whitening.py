from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from picture3d.pretrain.whitening import FeatureWhitening

EVERY = 1e-9  # a floor that changes nothing


def features(rows: int = 400, dimension: int = 6, seed: int = 0) -> Tensor:
    """Directions of very different spread, turned, around a mean."""
    g = torch.Generator().manual_seed(seed)
    turned = torch.linalg.qr(torch.randn(dimension, dimension, generator=g, dtype=torch.float64)).Q
    spread = 10.0 ** -torch.arange(dimension, dtype=torch.float64).div(2)
    found = torch.randn(rows, dimension, generator=g, dtype=torch.float64) * spread @ turned + 3.0
    return found.float()


def whitened(rows: Tensor, floor: float = EVERY) -> FeatureWhitening:
    module = FeatureWhitening(rows.shape[1], floor)
    module.see(rows, torch.ones(len(rows), dtype=torch.bool))
    return module


def test_without_a_floor_every_direction_has_variance_one():
    rows = features()
    found = whitened(rows)(rows).double().numpy()
    np.testing.assert_allclose(np.cov(found, rowvar=False, ddof=0), np.eye(6), atol=2e-3)
    np.testing.assert_allclose(found.mean(0), 0, atol=2e-3)


def test_the_matrix_is_that_of_numpy_with_the_floor_as_a_share_of_all_spread():
    rows = features()
    cov = np.cov(rows.double().numpy(), rowvar=False, ddof=0)
    variance, axes = np.linalg.eigh(cov)
    expected = axes @ np.diag(1 / (np.sqrt(variance) + 0.06 * np.sqrt(variance.sum()))) @ axes.T
    np.testing.assert_allclose(whitened(rows, 0.06).matrix.numpy(), expected, rtol=1e-4, atol=1e-4)


def test_turning_the_features_turns_what_comes_out():
    rows, g = features(), torch.Generator().manual_seed(9)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=g, dtype=torch.float64)).Q.float()
    plain, turned = whitened(rows, 0.06)(rows), whitened(rows @ turn, 0.06)(rows @ turn)
    torch.testing.assert_close(turned, plain @ turn, rtol=1e-3, atol=1e-3)


def test_batches_add_up_to_the_whole():
    rows = features()
    one, many = whitened(rows, 0.06), FeatureWhitening(6, 0.06)
    for part in rows.split(37):
        many.see(part, torch.ones(len(part), dtype=torch.bool))
    assert int(many.rows) == int(one.rows) == 400
    torch.testing.assert_close(many.products, one.products)
    # Made anew when a tenth has come to it: the matrix is of at least 400 / 1.1 rows.
    assert 400 / 1.1 <= int(many.fitted_rows) <= 400
    torch.testing.assert_close(many.matrix, one.matrix, rtol=0.1, atol=0.5)


def test_only_features_that_are_known_and_finite_count():
    rows = features()
    broken = torch.cat([rows, torch.full((3, 6), torch.nan), torch.full((2, 6), torch.inf), torch.full((5, 6), 1e6)])
    known = torch.ones(len(broken), dtype=torch.bool)
    known[-5:] = False
    module = FeatureWhitening(6, 0.06)
    module.see(broken, known)
    assert int(module.rows) == 400
    assert torch.equal(module.matrix, whitened(rows, 0.06).matrix)


@pytest.mark.parametrize("rows", [torch.zeros(0, 6), torch.zeros(5, 6), torch.full((1, 6), 2.0)], ids=["none", "zeros", "one"])
def test_features_without_spread_stay_as_they_are(rows):
    module = whitened(rows)
    assert torch.equal(module.matrix, torch.eye(6))
    assert torch.equal(module(features()), features() - module.mean)
    assert bool(module.mean.isfinite().all())


def test_a_direction_without_any_spread_is_not_blown_up_beyond_the_floor():
    rows = features()
    rows = torch.cat([rows, torch.full((len(rows), 1), 5.0)], dim=1)
    module = whitened(rows, 0.06)
    total = float(torch.cov(rows.T, correction=0).diagonal().sum().sqrt())
    assert float(module.matrix[6, 6]) == pytest.approx(1 / (0.06 * total), rel=1e-3)


def test_a_module_taken_from_its_state_goes_on_to_the_same_bytes():
    rows, known = features(), torch.ones(100, dtype=torch.bool)
    unbroken, broken = FeatureWhitening(6, 0.06), FeatureWhitening(6, 0.06)
    for part in rows.split(100):
        unbroken.see(part, known)
        resumed = FeatureWhitening(6, 0.06)
        resumed.load_state_dict(broken.state_dict())
        resumed.see(part, known)
        broken = resumed
    for name, value in unbroken.state_dict().items():
        assert torch.equal(value, broken.state_dict()[name]), name
