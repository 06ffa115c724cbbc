"""Damaged files of every kind: nothing but our own errors comes out, and memory stays near the size of the file."""

from __future__ import annotations

import tracemalloc
import warnings
import zlib

import numpy as np
import pytest

from picture3d.errors import Picture3dError
from tests.fuzzing.readers import READERS, mutated

PEAK_BYTES = 48 << 20  # the files have some kilobytes; a reader may hold a few blocks of fixed size


def fuzz(name: str, path, count: int, seed: int) -> int:
    """How many of `count` damaged files were refused; any other error, and a file that takes much memory, is raised."""
    reader = READERS[name]
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    refused = 0
    for number in range(count):
        data = mutated(reader.files[number % len(reader.files)], rng)
        path.write_bytes(data)
        tracemalloc.start()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", RuntimeWarning)
                reader.read(path)
        except Picture3dError:
            refused += 1
        except Exception as error:
            raise AssertionError(f"{name}, seed {seed}, file {number}: {data[:2000]!r}") from error
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < PEAK_BYTES, f"{name}, seed {seed}, file {number}: {peak} bytes"
    return refused


@pytest.mark.parametrize("name", READERS)
def test_the_files_that_fuzzing_starts_from_are_read(name, tmp_path):
    for data in READERS[name].files:
        path = tmp_path / f"whole{READERS[name].suffix}"
        path.write_bytes(data)
        READERS[name].read(path)


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_give_nothing_but_our_own_errors(name, tmp_path):
    assert fuzz(name, tmp_path / f"damaged{READERS[name].suffix}", 60, seed=0) > 5


@pytest.mark.long
@pytest.mark.parametrize("name", READERS)
def test_many_damaged_files_give_nothing_but_our_own_errors(name, tmp_path):
    fuzz(name, tmp_path / f"damaged{READERS[name].suffix}", 800, seed=1)
