from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest

from picture3d.errors import DataError
from picture3d.formats.waymo_objects import make_objects, parse_objects, read_objects, write_objects
from tests.sample_data import sample_path


def some_objects(count: int = 5):
    rng = np.random.default_rng(0)
    return make_objects(
        rng.normal(size=(count, 7)) + np.array([0.0, 0.0, 0.0, 4.0, 2.0, 2.0, 0.0]),
        rng.integers(1, 5, count),
        "segment-α",
        1_553_735_853_462_203,
        score=rng.random(count).astype(np.float32),
        num_points=rng.integers(0, 900, count),
        difficulty=rng.integers(0, 3, count),
    )


def assert_same(found, expected) -> None:
    for field in fields(expected):
        left, right = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(right, np.ndarray):
            np.testing.assert_array_equal(left, right, err_msg=field.name)
            assert left.dtype == right.dtype
        else:
            assert left == right, field.name


@pytest.mark.parametrize("count", [0, 1, 5])
def test_what_is_written_is_read_back_to_the_last_bit(tmp_path, count):
    objects = some_objects(count)
    write_objects(tmp_path / "boxes.bin", objects)
    assert_same(read_objects(tmp_path / "boxes.bin"), objects)
    assert [path.name for path in tmp_path.iterdir()] == ["boxes.bin"]


def test_a_file_cut_anywhere_inside_of_an_object_is_refused_by_name(tmp_path):
    path = tmp_path / "boxes.bin"
    write_objects(path, some_objects(2))
    whole = path.read_bytes()
    said = []
    for cut in range(1, len(whole)):
        try:
            found = parse_objects(whole[:cut], "cut.bin")
        except DataError as error:
            said.append(str(error))
        else:
            assert len(found) == 1, cut  # exactly after the first object nothing shows that there was another
    assert len(said) == len(whole) - 2
    assert all("cut.bin" in line for line in said)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"absent\.bin"):
        read_objects(tmp_path / "absent.bin")


def test_the_official_fixtures_hold_what_their_description_says():
    truth = read_objects(sample_path("waymo/metrics/fake_ground_truths.bin"))
    guess = read_objects(sample_path("waymo/metrics/fake_predictions.bin"))
    assert (len(truth), int((truth.num_points > 0).sum()), len(guess)) == (1010, 905, 2263)
    for objects in (truth, guess):
        assert len(set(zip(objects.context, objects.timestamp.tolist(), strict=True))) == 20
        assert set(objects.kind.tolist()) == {1, 2, 3}
        assert np.isfinite(objects.box).all()
        assert (objects.box[:, 3:6] > 0).all()
