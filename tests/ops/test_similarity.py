from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from picture3d.ops.similarity import CrossMoments, effective_rank, linear_cka, weight_disparity


def normal(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram_cka(x: Tensor, y: Tensor) -> float:
    """The published n x n form, in float64."""
    n = len(x)
    centring = torch.eye(n, dtype=torch.float64) - torch.full((n, n), 1 / n, dtype=torch.float64)
    k = centring @ (x.double() @ x.double().mT) @ centring
    m = centring @ (y.double() @ y.double().mT) @ centring
    return float((k * m).sum() / (k.norm() * m.norm()))


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 40), st.integers(1, 8), st.integers(1, 8), st.integers(0, 1000), st.floats(-100, 100))
def test_the_feature_form_is_the_gram_form(rows: int, d: int, e: int, seed: int, offset: float):
    x = normal(rows, d, seed) + offset
    y = x[:, :1] * normal(1, e, seed + 1) + 0.3 * normal(rows, e, seed + 2)
    assert linear_cka(x, y) == pytest.approx(gram_cka(x, y), abs=1e-9)


def test_rows_given_piece_by_piece_count_as_rows_given_at_once():
    x, y, z = normal(700, 6) + 5, normal(700, 4, 1), normal(700, 3, 2)
    y[:, 0] += x[:, 1]
    pieces = CrossMoments([6, 4], [3, 4])
    for part in range(0, 700, 90):
        chunk = slice(part, part + 90)
        pieces.add([x[chunk], y[chunk]], [z[chunk], y[chunk]])
    expected = [[gram_cka(a, b) for b in (z, y)] for a in (x, y)]
    torch.testing.assert_close(pieces.cka(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-10)
    assert pieces.rows == 700


def test_rotation_scale_and_shift_change_nothing():
    x, y = normal(200, 5), normal(200, 7, 1)
    y[:, :2] += x[:, :2]
    rotation, _ = torch.linalg.qr(normal(5, 5, 3))
    assert linear_cka(3.7 * (x @ rotation) + 12.0, y) == pytest.approx(linear_cka(x, y), abs=1e-12)


def test_a_feature_agrees_wholly_with_itself_and_not_at_all_with_an_orthogonal_one():
    x = normal(300, 5)
    assert linear_cka(x, x) == pytest.approx(1.0, abs=1e-12)
    centred = normal(300, 6)
    centred = centred - centred.mean(0)
    basis, _ = torch.linalg.qr(centred)
    assert linear_cka(basis[:, :3], basis[:, 3:]) == pytest.approx(0.0, abs=1e-20)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6])
def test_a_constant_feature_agrees_with_nothing_and_says_so(value: float):
    x, constant = normal(50, 4), torch.full((50, 3), value)
    moments = CrossMoments([4, 3], [4])
    moments.add([x, constant], [x])
    found = moments.cka()
    assert found[0, 0] == pytest.approx(1.0)
    assert math.isnan(float(found[1, 0]))


def test_one_row_or_none_says_nothing():
    assert math.isnan(linear_cka(normal(1, 3), normal(1, 3)))
    assert math.isnan(linear_cka(normal(0, 3), normal(0, 3)))


def test_what_is_not_finite_or_does_not_fit_is_refused():
    bad = normal(5, 2)
    bad[3, 1] = math.nan
    with pytest.raises(ValueError, match="finite"):
        linear_cka(bad, normal(5, 2))
    moments = CrossMoments([2], [3])
    with pytest.raises(ValueError, match="columns"):
        moments.add([normal(5, 3)], [normal(5, 3)])
    with pytest.raises(ValueError, match="rows"):
        moments.add([normal(5, 2)], [normal(4, 3)])


def test_weight_disparity_is_mean_and_variance_over_all_numbers():
    before = [torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([0.0])]
    after = [torch.tensor([[2.0, 2.0], [3.0, 4.0]]), torch.tensor([-4.0])]
    # Differences 1, 0, 0, 0, -4: mean -0.6; mean of squares 17 / 5 = 3.4, less 0.36.
    assert weight_disparity(before, after) == pytest.approx((-0.6, 3.04))
    assert weight_disparity(before, before) == (0.0, 0.0)
    assert all(math.isnan(value) for value in weight_disparity([], []))
    with pytest.raises(ValueError, match="shapes"):
        weight_disparity(before, after[:1])


def test_the_effective_rank_is_the_number_of_equal_directions():
    axes = torch.cat([torch.eye(5), -torch.eye(5)])  # five directions of equal variance among eight columns
    assert float(effective_rank(torch.nn.functional.pad(axes, (0, 3)))) == pytest.approx(5, abs=1e-5)
    line = torch.linspace(-1, 1, 50, dtype=torch.float64)[:, None] * normal(1, 8)
    assert float(effective_rank(line)) == pytest.approx(1, abs=1e-4)
    assert float(effective_rank(torch.ones(50, 8))) == 0
    assert float(effective_rank(torch.ones(1, 8))) == 0
    features = normal(200, 8)
    singular = torch.linalg.svdvals(features - features.mean(0))
    share = singular.square() / singular.square().sum()
    assert float(effective_rank(features)) == pytest.approx(math.exp(-float((share * share.log()).sum())), rel=1e-6)


def test_a_row_of_weight_two_counts_as_two_rows_in_the_effective_rank():
    features, times = normal(40, 6), torch.arange(40) % 3
    repeated = features.repeat_interleave(times, 0)
    assert float(effective_rank(features, times.float())) == pytest.approx(float(effective_rank(repeated)), rel=1e-6)


def test_rounding_of_a_constant_feature_has_no_rank():
    assert float(effective_rank(torch.full((7, 3), 0.1), torch.full((7,), 0.3))) == 0
