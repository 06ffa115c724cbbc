"""Frames that the processes of a job look at together before the first log."""

from __future__ import annotations

import numpy as np
import pytest

from picture3d.errors import DataError
from picture3d.teachers.feature_basis import FrameMoments
from picture3d.teachers.shared_fit import forget_moments, moments_of_job

COUNT = 7


def moments(number: int) -> FrameMoments:
    rng = np.random.default_rng(number)
    kept = rng.normal(size=(number, 2)).astype(np.float32)
    return FrameMoments(np.array(number), kept.sum(0, np.float64), kept.T.astype(np.float64) @ kept, kept)


def same(found: list[FrameMoments] | None) -> bool:
    assert found is not None
    assert len(found) == COUNT
    return all(
        np.array_equal(getattr(one, name), getattr(moments(number), name))
        for number, one in enumerate(found)
        for name in ("rows", "sum", "products", "kept")
    )


def test_one_process_computes_every_frame_and_leaves_nothing(tmp_path):
    assert same(moments_of_job(tmp_path, "m", COUNT, moments, lambda: False, (0, 1)))
    assert not list(tmp_path.iterdir())


def test_two_processes_side_by_side_compute_each_frame_once(tmp_path):
    made: list[tuple[int, int]] = []

    def other(number: int) -> FrameMoments:
        made.append((1, number))
        return moments(number)

    def first(number: int) -> FrameMoments:
        if number == 2:  # while this one is at work the other does all of its part, and goes round
            assert same(moments_of_job(tmp_path, "m", COUNT, other, lambda: False, (1, 2)))
        made.append((0, number))
        return moments(number)

    assert same(moments_of_job(tmp_path, "m", COUNT, first, lambda: False, (0, 2)))
    assert made == [(0, 0), (0, 1), (1, 3), (1, 4), (1, 5), (1, 6), (1, 2), (0, 2)], "only the one in progress is done twice"
    forget_moments(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_process_that_comes_too_late_says_so_and_other_settings_do_not_mix(tmp_path):
    moments_of_job(tmp_path, "m", COUNT, moments, lambda: False, (0, 2))
    made: list[int] = []

    def make(number: int) -> FrameMoments:
        made.append(number)
        return moments(number)

    assert moments_of_job(tmp_path, "m", COUNT, make, lambda: True, (1, 2)) is None
    assert made == []
    moments_of_job(tmp_path, "n", COUNT, make, lambda: False, (1, 2))
    assert made == [3, 4, 5, 6, 0, 1, 2]


@pytest.mark.parametrize("somebody_is_at_the_end", [True, False])
def test_a_half_written_file_that_is_swept_away_matters_only_while_nobody_is_at_the_end(
    tmp_path, monkeypatch, somebody_is_at_the_end
):
    write, over = np.savez, tmp_path / "over"

    def write_and_lose(file, **arrays):
        write(file, **arrays)
        if somebody_is_at_the_end:
            over.touch()
        forget_moments(tmp_path)

    monkeypatch.setattr(np, "savez", write_and_lose)
    if somebody_is_at_the_end:
        assert moments_of_job(tmp_path, "m", COUNT, moments, over.exists, (1, 2)) is None
        over.unlink()
    else:
        with pytest.raises(DataError, match=r"\.fit-m-3\.npz: cannot be written"):
            moments_of_job(tmp_path, "m", COUNT, moments, over.exists, (1, 2))
    assert not list(tmp_path.iterdir())
