from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from picture3d.datasets.frame_order import interleaved, shuffled_rows, stream_rows


def open_logs(log_of_row: np.ndarray, order: np.ndarray) -> np.ndarray:
    """How many logs have begun and not ended, at each position."""
    seen = log_of_row[order]
    positions = {log: np.flatnonzero(seen == log) for log in np.unique(seen)}
    return np.array([sum(p[0] <= at <= p[-1] for p in positions.values()) for at in range(len(seen))])


def test_without_a_window_the_order_is_a_plain_permutation():
    got = shuffled_rows(np.arange(50) // 5, None, np.random.default_rng([3, 1, 0]))
    assert np.array_equal(got, np.random.default_rng([3, 1, 0]).permutation(50))


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12), window=st.integers(1, 14), seed=st.integers(0, 99))
def test_every_row_comes_once_and_only_a_window_of_logs_is_open(sizes, window, seed):
    log_of_row = np.repeat(np.arange(len(sizes)) * 7 % 13, sizes)
    order = shuffled_rows(log_of_row, window, np.random.default_rng(seed))
    assert np.array_equal(np.sort(order), np.arange(len(log_of_row)))
    assert open_logs(log_of_row, order).max() <= window
    assert np.array_equal(order, shuffled_rows(log_of_row, window, np.random.default_rng(seed)))


def test_a_window_of_one_log_goes_log_by_log_and_shuffles_within():
    log_of_row = np.repeat(np.arange(6), 20)
    order = shuffled_rows(log_of_row, 1, np.random.default_rng(0))
    runs = log_of_row[order].reshape(6, 20)
    assert (runs == runs[:, :1]).all()
    assert sorted(runs[:, 0]) == list(range(6))
    assert not np.array_equal(np.sort(order[:20]), order[:20])


def test_a_window_mixes_its_logs():
    log_of_row = np.repeat(np.arange(40), 100)
    order = shuffled_rows(log_of_row, 8, np.random.default_rng(0))
    batches = log_of_row[order].reshape(-1, 16)
    different = np.mean([len(np.unique(batch)) for batch in batches])
    # 16 draws among 8 logs hit 8 (1 - (7/8)^16) = 7.06 of them; the slots' edges give a little more or less.
    assert different == pytest.approx(7.06, abs=0.6)


def test_no_row_at_all_is_an_empty_order():
    assert len(shuffled_rows(np.zeros(0, np.int64), 3, np.random.default_rng(0))) == 0
    assert len(stream_rows(5, 3, 0, lambda number: np.arange(5))) == 0


def test_a_window_of_none_at_all_is_refused():
    with pytest.raises(ValueError, match="at least 1 log"):
        shuffled_rows(np.zeros(4, np.int64), 0, np.random.default_rng(0))


def test_a_stream_taken_in_pieces_is_one_permutation_after_the_other():
    def permutation(number: int) -> np.ndarray:
        return np.random.default_rng(number).permutation(7)

    endless = np.concatenate([permutation(number) for number in range(9)])
    for count in (1, 3, 7, 10, 20):
        pieces = [stream_rows(7, epoch * count, count, permutation) for epoch in range(3)]
        assert np.array_equal(np.concatenate(pieces), endless[: 3 * count])


@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(0, 60), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_every_share_of_the_epoch_holds_that_share_of_each_stream(counts, seed):
    which = interleaved(counts, np.random.default_rng(seed))
    assert np.array_equal(np.bincount(which, minlength=len(counts)), counts)
    for at in range(len(which)):
        had = np.bincount(which[:at], minlength=len(counts))
        # All streams are within one item of a common moment of the epoch.
        moments = [((h - 1) / c, (h + 1) / c) for h, c in zip(had, counts, strict=True) if c]
        assert max(low for low, _ in moments) <= min(high for _, high in moments) + 1e-12
