"""Oracle: scores by hand, scipy-free: quantiles as printed (t of 2 degrees of freedom is 4.303)."""

from __future__ import annotations

import math

import pytest

from picture3d.evaluation.label_efficiency import CellScore, estimate, label_efficiency, markdown_table


def test_mean_spread_and_interval_are_those_computed_by_hand():
    found = estimate([0.1, 0.2, 0.6])
    assert found.mean == pytest.approx(0.3)
    assert found.spread == pytest.approx(math.sqrt((0.04 + 0.01 + 0.09) / 2))
    assert found.spread is not None
    assert found.interval == pytest.approx(4.303 * found.spread / math.sqrt(3))


def test_one_seed_has_no_spread_and_none_is_refused():
    assert (estimate([0.4]).spread, estimate([0.4]).interval) == (None, None)
    with pytest.raises(ValueError, match="no value"):
        estimate([])


def test_equal_scores_have_no_spread_and_an_interval_of_zero():
    assert estimate([0.25] * 40).spread == 0.0
    assert estimate([0.25] * 40).interval == 0.0


def test_gains_are_over_the_seeds_that_both_methods_have():
    cells = [CellScore("scratch", 0.25, seed, score) for seed, score in ((0, 0.10), (1, 0.20), (2, 0.90))]
    cells += [CellScore("picture", 0.25, seed, score) for seed, score in ((0, 0.15), (1, 0.23))]
    rows = label_efficiency(cells, ["scratch", "picture"])
    assert [(row.method, row.score.seeds) for row in rows] == [("scratch", 3), ("picture", 2)]
    assert rows[0].gain is None
    gain = rows[1].gain
    assert gain is not None
    assert gain.seeds == 2
    assert gain.mean == pytest.approx(0.04)
    assert gain.interval == pytest.approx(12.706 * 0.01, rel=1e-6)  # differences 0.05 and 0.03: spread 0.0141, over root two


def test_what_a_seed_does_to_both_methods_widens_the_scores_and_not_the_gain():
    cells = [CellScore(method, 1.0, seed, 0.1 * seed + plus) for seed in range(4) for method, plus in (("a", 0.0), ("b", 0.05))]
    rows = label_efficiency(cells, ["a", "b"])
    gain = rows[1].gain
    assert gain is not None
    assert gain.interval == pytest.approx(0.0, abs=1e-9)
    assert rows[1].score.interval is not None
    assert rows[1].score.interval > 0.1


def test_rows_go_by_share_and_then_in_the_order_of_the_methods_and_missing_cells_have_none():
    cells = [CellScore("b", 1.0, 0, 0.5), CellScore("a", 0.5, 0, 0.3), CellScore("b", 0.5, 1, 0.4)]
    rows = label_efficiency(cells, ["a", "b", "never"])
    assert [(row.share, row.method) for row in rows] == [(0.5, "a"), (0.5, "b"), (1.0, "b")]
    assert rows[1].gain is None
    assert rows[2].gain is None


def test_a_cell_that_is_there_twice_is_refused():
    with pytest.raises(ValueError, match="twice"):
        label_efficiency([CellScore("a", 1.0, 0, 0.1), CellScore("a", 1.0, 0, 0.2)], ["a"])


def test_the_table_is_in_per_cent():
    rows = label_efficiency([CellScore("a", 0.25, 0, 0.123), CellScore("b", 0.25, 0, 0.1)], ["a", "b"])
    assert markdown_table(rows, measure="mIoU").splitlines()[2:] == [
        "| 0.25 | a | 1 | 12.3 | - | - | - | - |",
        "| 0.25 | b | 1 | 10.0 | - | - | -2.3 | - |",
    ]
