from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from picture3d.errors import DataError
from picture3d.formats import protobuf_wire as wire


@pytest.mark.parametrize(("value", "encoded"), [(0, b"\x00"), (1, b"\x01"), (127, b"\x7f"), (300, b"\xac\x02")])
def test_varints_are_those_of_the_format_document(value, encoded):
    assert wire.write_varint(value) == encoded
    assert wire.unpack_varints(encoded).tolist() == [value]


def test_a_message_written_by_hand_is_read_field_by_field():
    message = b"\x08\x96\x01" + b"\x12\x07testing" + b"\x19" + struct.pack("<d", -2.5) + b"\x25" + struct.pack("<f", 0.5)
    reader = wire.Reader(message)
    number, text, double, single = reader.fields()
    assert [f.number for f in (number, text, double, single)] == [1, 2, 3, 4]
    assert (reader.unsigned(number), reader.text(text), reader.double(double), reader.float(single)) == (
        150,
        "testing",
        -2.5,
        0.5,
    )


def test_a_negative_number_takes_ten_bytes_and_comes_back():
    data = wire.write_integer(1, -5)
    reader = wire.Reader(data)
    (field,) = reader.fields()
    assert len(data) == 11
    assert reader.signed(field) == -5


def test_repeated_numbers_are_read_packed_and_one_by_one():
    reader = wire.Reader(wire.write_packed_integers(3, [1, 300, -2]))
    (field,) = reader.fields()
    assert reader.integers(field).tolist() == [1, 300, -2]
    doubles = np.array([1.5, -2.0])
    reader = wire.Reader(wire.write_data(4, doubles.tobytes()) + wire.write_double(4, 7.0))
    packed, single = reader.fields()
    assert reader.doubles(packed).tolist() + reader.doubles(single).tolist() == [1.5, -2.0, 7.0]


@given(st.lists(st.integers(0, 2**64 - 1), max_size=40))
@settings(max_examples=50, deadline=None)
def test_varints_come_back(values):
    encoded = b"".join(wire.write_varint(value) for value in values)
    assert wire.unpack_varints(encoded).tolist() == values


@given(st.binary(max_size=80))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_read_or_refused_in_our_own_words(data):
    reader, said = wire.Reader(data, "noise"), "noise"
    try:
        for field in reader.fields():
            if field.wire_type == 2:
                list(reader.message(field))
    except DataError as error:
        said = str(error)
    assert "noise" in said


@given(st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 300), max_size=40))
def test_many_numbers_are_packed_as_one_after_the_other(values: list[int]):
    assert wire.pack_varints(np.array(values, dtype=np.int64)) == b"".join(wire.write_varint(value) for value in values)


def test_packing_takes_images_row_by_row():
    image = np.array([[1, 300], [0, 127]], dtype=np.int32)
    assert wire.pack_varints(image) == bytes([1, 0xAC, 2, 0, 127])
    assert wire.pack_varints(np.asfortranarray(image)) == bytes([1, 0xAC, 2, 0, 127])
    assert wire.pack_varints(np.zeros((0, 2), np.int32)) == b""
