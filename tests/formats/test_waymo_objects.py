from __future__ import annotations

import random
import re
from dataclasses import fields

import numpy as np
import pytest

from picture3d.errors import DataError
from picture3d.formats import protobuf_wire as wire
from picture3d.formats.waymo_objects import make_objects, write_objects
from picture3d.formats.waymo_objects_reading import ObjectsFile, parse_objects, read_objects
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


def one_by_one(data: bytes) -> list[dict[str, object]]:
    """The readable twin: what an object holds, field after field."""
    reader = wire.Reader(data)
    rows = []
    for whole in reader.fields():
        if whole.number != 1:
            continue
        row: dict[str, object] = {f"box{i}": 0.0 for i in range(1, 8)}
        for part in reader.message(whole):
            if part.number == 1:
                for inner in reader.message(part):
                    if inner.number == 1:
                        row.update({f"box{value.number}": reader.double(value) for value in reader.message(inner)})
                    elif inner.number == 4:
                        row["id"] = reader.text(inner)
                    elif inner.number in (3, 5, 7):
                        row[f"label{inner.number}"] = reader.signed(inner)
            elif part.number == 2:
                row["score"] = reader.float(part)
            elif part.number == 4:
                row["context"] = reader.text(part)
            elif part.number in (3, 5, 6):
                row[f"object{part.number}"] = reader.signed(part)
        rows.append(row)
    return rows


def odd_file(seed: int, count: int = 60) -> bytes:
    """Objects as no program writes them: fields in any order, absent, twice, unknown ones, numbers longer than needed."""
    rng = random.Random(seed)

    def some(parts: list[bytes]) -> bytes:
        chosen = [part for part in parts if rng.random() < 0.8] + rng.choices(parts, k=rng.randint(0, 2))
        rng.shuffle(chosen)
        return b"".join(chosen)

    data = b""
    for _ in range(count):
        unknown = [wire.write_data(90, b"?" * rng.randint(0, 200)), wire.write_double(91, 1.0), wire.write_integer(2000, -1)]
        box = some([wire.write_double(i, rng.gauss(0, 9)) for i in range(1, 8)])
        points = wire.write_varint(7 << 3) + b"\x85\x80\x80\x00"  # 5 in four bytes
        label = some(
            [
                wire.write_data(1, box),
                wire.write_integer(3, rng.randint(0, 4)),
                wire.write_data(4, f"träck {rng.randint(0, 9)}".encode()),
                wire.write_integer(5, rng.randint(0, 2)),
                rng.choice([points, wire.write_integer(7, rng.randint(0, 99999))]),
                *unknown,
            ]
        )
        rest = [
            wire.write_float(2, rng.random()),
            wire.write_integer(3, rng.randint(0, 1)),
            wire.write_data(4, f"segment {rng.randint(0, 3)}".encode()),
            wire.write_integer(5, rng.randint(-5, 2**50)),
            wire.write_integer(6, rng.randint(0, 9)),
            *unknown,
        ]
        data += wire.write_data(1, wire.write_data(1, label) + some(rest))
        if rng.random() < 0.2:
            data += wire.write_data(2, b"a box of a no-label zone")
    return data


@pytest.mark.parametrize("seed", range(8))
def test_objects_of_any_layout_are_read_as_one_by_one(seed, tmp_path):
    data = odd_file(seed)
    expected = one_by_one(data)
    (tmp_path / "odd.bin").write_bytes(data)
    parts = ObjectsFile(tmp_path / "odd.bin")
    by_segment = {name: [row for row in expected if row.get("context", "") == name] for name in parts.segments}
    assert sum(map(len, by_segment.values())) == len(expected)
    for found, rows in [(parse_objects(data), expected), *((parts.read(name), rows) for name, rows in by_segment.items())]:
        assert len(found) == len(rows)
        columns = ((1, 0), (2, 1), (3, 2), (4, 4), (5, 3), (6, 5), (7, 6))
        for i, row in enumerate(rows):
            assert [found.box[i, column] for _, column in columns] == [row[f"box{number}"] for number, _ in columns]
            assert found.track_id[i] == row.get("id", "")
            assert found.context[i] == row.get("context", "")
            assert found.score[i] == row.get("score", np.float32(1))
            assert (found.kind[i], found.difficulty[i]) == (row.get("label3", 0), row.get("label5", 0))
            assert (found.num_points[i], found.camera[i]) == (row.get("label7", 0), row.get("object6", 0))
            assert (found.overlaps_no_label_zone[i], found.timestamp[i]) == (row.get("object3", 0), row.get("object5", 0))


def test_blocks_may_end_anywhere(tmp_path, monkeypatch):
    data = odd_file(3)
    (tmp_path / "odd.bin").write_bytes(data)
    whole = parse_objects(data)
    for size in (1, 50, 333, 2000):
        monkeypatch.setattr("picture3d.formats.waymo_objects_reading._BLOCK_BYTES", size)
        assert_same(read_objects(tmp_path / "odd.bin"), whole)
        parts = ObjectsFile(tmp_path / "odd.bin")
        assert sum(len(parts.read(name)) for name in parts.segments) == len(whole)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (wire.write_data(1, wire.write_float(2, 0.5)), "no label"),
        (wire.write_integer(1, 5), "wire type 0"),
        (wire.write_data(1, wire.write_data(1, b"") + wire.write_double(2, 0.5)), "wire type 1"),
        (wire.write_data(1, wire.write_data(1, wire.write_integer(3, 300))), "holds 300"),
        (wire.write_data(1, wire.write_data(1, wire.write_data(1, b"\x09\x00")) + wire.write_float(2, 1)), "cut off"),
        (wire.write_data(1, wire.write_data(1, b"") + wire.write_data(4, b"\xff")), "not UTF-8"),
        (b"\x0a" + wire.write_varint(2**40) + b"x", "cut off"),
        (b"\x0a" + b"\xff" * 12, "longer than 10 bytes"),
        (b"\x00\x01", "field number 0"),
    ],
)
def test_what_is_wrong_is_said_with_its_byte_behind_good_objects(tmp_path, data, says):
    write_objects(tmp_path / "good.bin", some_objects(3))
    good = (tmp_path / "good.bin").read_bytes()
    path = tmp_path / "bad.bin"
    path.write_bytes(good + data)
    for read in (read_objects, ObjectsFile):
        with pytest.raises(DataError, match=says) as caught:
            read(path)
        assert "bad.bin" in str(caught.value)
        byte = int(re.findall(r"byte (\d+)", str(caught.value))[0])
        assert len(good) <= byte <= len(good) + len(data)


def test_an_unknown_segment_has_no_objects_and_an_empty_file_no_segment(tmp_path):
    write_objects(tmp_path / "boxes.bin", some_objects(2))
    assert len(ObjectsFile(tmp_path / "boxes.bin").read("another")) == 0
    (tmp_path / "empty.bin").write_bytes(b"")
    assert ObjectsFile(tmp_path / "empty.bin").segments == ()
