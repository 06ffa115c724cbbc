from __future__ import annotations

import struct
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from picture3d.formats.columns import (
    PLANES,
    RAW,
    STORED_DTYPES,
    TABLE,
    Codec,
    CodecKind,
    checked_size,
    decode,
    dtype_name,
    encode,
    lossless_codec,
)

GRID = Codec(CodecKind.GRID, 0.001)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(STORED_DTYPES).flatmap(
        lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=1, max_dims=3, min_side=0))
    ),
    st.sampled_from([RAW, PLANES]),
)
def test_lossless_codecs_give_back_every_bit(column, codec):
    stored = encode(column, codec)
    back = decode(stored, codec, dtype_name(column.dtype), column.shape)
    assert back.dtype == column.dtype
    assert back.shape == column.shape
    assert back.tobytes() == column.tobytes()
    back[...] = 0  # the caller may write into what it read


@pytest.mark.parametrize("codec", [RAW, PLANES])
def test_rows_that_are_not_contiguous_are_stored_as_seen(codec):
    table = np.arange(24, dtype=np.float32).reshape(6, 4)
    assert np.array_equal(decode(encode(table[::2, 1:3], codec), codec, "<f4", (3, 2)), table[::2, 1:3])


STRANGE = np.array([0x7FC00001, 0xFFC12345, 0x80000000, 0x00000000, 0x00000001, 0x7F800000], np.uint32)  # NaNs, -0.0, inf


@pytest.mark.parametrize("different", [1, 2, 255, 256, 257, 1 << 16])
def test_a_table_gives_back_every_bit_of_a_column_of_few_values(different):
    rng = np.random.default_rng(different)
    values = rng.integers(0, 1 << 32, different, dtype=np.uint32)
    values[: len(STRANGE)] = STRANGE[:different]
    column = np.concatenate([values, rng.choice(values, 20_000)]).view(np.float32)
    stored = encode(column, TABLE)
    back = decode(stored, TABLE, "<f4", column.shape)
    assert back.tobytes() == column.tobytes()
    back[...] = 0  # the caller may write into what it read


def test_a_table_of_intensity_steps_is_smaller_than_planes_and_is_chosen_for_them_alone():
    rng = np.random.default_rng(0)
    steps = (rng.gamma(2, 20, 50_000).astype(np.int32) / 255).astype(np.float32)
    assert lossless_codec(steps) == TABLE
    assert len(encode(steps, TABLE)) < len(encode(steps, PLANES))
    assert lossless_codec(rng.random(50_000).astype(np.float32)) == PLANES
    late = np.concatenate([np.zeros(200_000), np.arange(20_000)]).astype(np.float32)
    assert lossless_codec(late) == PLANES  # more values than its sample shows
    assert lossless_codec(steps[:100]) == PLANES
    assert lossless_codec(np.zeros((50_000, 3), np.float32)) == PLANES
    assert lossless_codec(np.zeros(50_000, np.uint8)) == PLANES


def test_a_table_refuses_what_it_cannot_hold_and_what_points_outside_of_it():
    with pytest.raises(ValueError, match="float32"):
        encode(np.zeros(5, np.int32), TABLE)
    with pytest.raises(ValueError, match="at most 65536 different values, not 65537"):
        encode(np.arange((1 << 16) + 1, dtype=np.float32), TABLE)
    places = zlib.compress(bytes([0, 1, 2]))
    good = struct.pack("<I", 3) + np.array([5, 6, 7], "<f4").tobytes() + places
    assert decode(good, TABLE, "<f4", (3,)).tolist() == [5, 6, 7]
    for bad, words in [
        (struct.pack("<I", 2) + np.array([5, 6], "<f4").tobytes() + places, "names value 2 of a table of 2"),
        (struct.pack("<I", 1 << 30) + places, "claims a table of 1073741824 values"),
        (struct.pack("<I", 0) + places, "claims a table of 0 values"),
        (b"\0\0", "too few for a table"),
        (good[:-1], "should hold"),
        (good + b"x", "should hold"),
    ]:
        with pytest.raises(ValueError, match=words):
            decode(bad, TABLE, "<f4", (3,))
    with pytest.raises(ValueError, match="holds <f4"):
        decode(good, TABLE, "<f8", (3,))


def test_columns_that_were_read_stay_as_they_are_while_others_are_read_in_many_threads():
    rng = np.random.default_rng(0)
    columns = [rng.choice(rng.random(300).astype(np.float32), 30_000 + 1000 * i) for i in range(16)]
    stored = [(encode(c, codec), codec, c) for c in columns for codec in (PLANES, TABLE)]

    def read(one: tuple[bytes, Codec, np.ndarray]) -> np.ndarray:
        return decode(one[0], one[1], "<f4", one[2].shape)

    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for back, (_, _, column) in zip(list(pool.map(read, stored)), stored, strict=True):
                assert np.array_equal(back, column)


def test_the_grid_codec_errs_by_half_a_step_at_most():
    rng = np.random.default_rng(0)
    xyz = rng.uniform(-200, 200, (5000, 3)).astype(np.float32)
    back = decode(encode(xyz, GRID), GRID, "<f4", xyz.shape)
    float32_rounding = np.spacing(np.float32(200))
    assert np.abs(back.astype(np.float64) - xyz).max() <= 0.0005 + float32_rounding


def test_the_grid_codec_is_exact_on_its_second_pass():
    xyz = np.random.default_rng(1).normal(size=(100, 3)).astype(np.float32) * 50
    once = decode(encode(xyz, GRID), GRID, "<f4", xyz.shape)
    assert np.array_equal(decode(encode(once, GRID), GRID, "<f4", xyz.shape), once)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e9])
def test_the_grid_codec_refuses_what_it_cannot_hold(bad):
    with pytest.raises(ValueError, match="zlib-grid"):
        encode(np.array([[0, 0, bad]], np.float32), GRID)


@pytest.mark.parametrize("codec", [RAW, PLANES, TABLE, GRID])
def test_an_empty_column_keeps_its_shape(codec):
    assert decode(encode(np.zeros((0, 3), np.float32), codec), codec, "<f4", (0, 3)).shape == (0, 3)


@pytest.mark.parametrize("text", ["raw", "zlib-planes", "zlib-table", "zlib-grid:0.001"])
def test_a_codec_is_found_by_the_name_it_writes(text):
    assert str(Codec.parse(text)) == text


@pytest.mark.parametrize("text", ["", "lz4", "zlib-grid", "zlib-grid:0", "zlib-grid:nan", "zlib-grid:x"])
def test_an_unknown_codec_is_refused(text):
    with pytest.raises(ValueError, match="unknown codec"):
        Codec.parse(text)


def test_a_zlib_bomb_is_refused_without_unpacking_it():
    bomb = zlib.compress(bytes(50_000_000))
    tracemalloc.start()
    with pytest.raises(ValueError, match="something else than the 1000 bytes"):
        decode(bomb, PLANES, "|u1", (1000,))
    with pytest.raises(ValueError, match="cannot hold"):
        decode(b"tiny", PLANES, "<f8", (100_000_000,))
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("more", [1, 100, 1 << 20])
def test_a_stream_that_is_longer_than_it_should_be_is_refused_by_a_thread_that_has_read_nothing_before(more):
    rng = np.random.default_rng(0)
    data = zlib.compress(rng.bytes(200_000) + bytes(more))
    with ThreadPoolExecutor(1) as fresh, pytest.raises(ValueError, match="something else than the 200000 bytes"):
        fresh.submit(decode, data, PLANES, "|u1", (200_000,)).result()


@pytest.mark.parametrize("shape", [(-1,), (), (1 << 40,), (1 << 20, 1 << 20), (2, 2, 2, 2, 2)])
def test_absurd_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="shape"):
        checked_size("<f4", shape)


@settings(max_examples=150, deadline=None)
@given(
    st.binary(max_size=60),
    st.sampled_from([RAW, PLANES, TABLE, GRID]),
    st.sampled_from([*STORED_DTYPES, "|O", "x"]),
    st.integers(0, 40),
)
def test_any_bytes_give_an_array_or_our_own_error(data, codec, dtype, rows):
    for payload in (data, zlib.compress(data)):
        try:
            found = decode(payload, codec, dtype, (rows,))
        except ValueError:
            continue
        assert found.shape == (rows,)


@pytest.mark.parametrize("rows", [0, 1, 3, 70_000, 140_000])
def test_planes_are_one_zlib_stream_whether_compressed_or_stored(rows):
    rng = np.random.default_rng(rows)
    column = np.zeros((rows, 3), np.float32)
    column[:, 0] = rng.normal(size=rows)  # mantissas that do not compress, beside exponents and zeros that do
    column[:, 1] = np.arange(rows) % 7
    data = encode(column, PLANES)
    planes = column.reshape(-1).view(np.uint8).reshape(rows, -1).T if rows else column.view(np.uint8)
    assert zlib.decompress(data) == planes.tobytes()
    if rows > 1000:
        mantissa = np.ascontiguousarray(planes[0]).tobytes()
        assert mantissa[:65535] in data, "bytes that do not compress stand in the file as they are"
        assert len(data) < 0.5 * column.nbytes
    np.testing.assert_array_equal(decode(data, PLANES, "<f4", (rows, 3)), column)
