from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from picture3d.errors import DataError
from picture3d.formats.parquet_footer import ColumnSize, column_sizes

pa = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402


def write(path: Path, rows: int = 100, **options: Any) -> Path:
    table = pa.table(
        {
            "key.time": np.arange(rows),
            "text": pa.array([None if i % 3 else "x" * i for i in range(rows)]),
            "values.of": pa.array([list(range(i % 5)) for i in range(rows)], pa.list_(pa.float32())),
            "flag": np.arange(rows) % 2 == 0,
        },
        metadata={"note": "y" * 300},
    ) if rows else pa.table({"a": pa.array([], pa.int64())})  # fmt: skip
    parquet.write_table(table, path, **options)
    return path


@pytest.mark.parametrize("options", [{}, {"version": "1.0"}, {"write_page_checksum": True, "write_page_index": True}])
def test_sizes_are_those_that_pyarrow_tells(tmp_path, options):
    path = write(tmp_path / "a.parquet", row_group_size=37, **options)
    told = parquet.read_metadata(path)
    expected = [
        ColumnSize(g, column.path_in_schema, told.row_group(g).num_rows, column.num_values)
        for g in range(told.num_row_groups)
        for column in (told.row_group(g).column(i) for i in range(told.num_columns))
    ]
    assert told.num_row_groups == 3
    assert column_sizes(path) == expected
    assert sum(size.values for size in expected if size.column.startswith("values.of")) > 200


def test_a_table_without_rows_has_no_sizes_but_is_whole(tmp_path):
    found = column_sizes(write(tmp_path / "a.parquet", rows=0))
    assert all(size.values == 0 for size in found)


def test_many_row_groups_are_counted_beyond_the_short_form_of_lists(tmp_path):
    assert max(size.row_group for size in column_sizes(write(tmp_path / "a.parquet", row_group_size=2))) == 49


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PAR1",
        b"PAR1PAR1",
        b"PAR1" + bytes(8) + b"PAR1",
        b"x" * 40 + b"\xff\xff\xff\x7fPAR1",
        b"PAR1" + b"\xff" * 20 + b"\x14\0\0\0PAR1",
    ],
)
def test_what_is_no_footer_is_our_error(tmp_path, data):
    path = tmp_path / "a.parquet"
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.parquet"):
        column_sizes(path)


def test_lists_in_lists_without_end_are_refused(tmp_path):
    path = tmp_path / "a.parquet"
    for body in (b"\x19" + b"\x19" * 5000, b"\x1c" * 5000, b"\x19\xfc\xff\xff\xff\x7f" + bytes(90)):
        path.write_bytes(b"PAR1" + body + len(body).to_bytes(4, "little") + b"PAR1")
        with pytest.raises(DataError, match="footer is damaged"):
            column_sizes(path)


@pytest.mark.parametrize("seed", range(60))
def test_any_damage_gives_sizes_or_our_error(tmp_path, seed):
    rng = np.random.default_rng(seed)
    path = write(tmp_path / "a.parquet", row_group_size=37)
    data = bytearray(path.read_bytes())
    for at in rng.integers(len(data) // 3, len(data), 4):
        data[at] = rng.integers(256)
    path.write_bytes(data)
    try:
        found = column_sizes(path)
    except DataError:
        return
    assert len(found) <= len(data)


def test_a_missing_file_is_our_error(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        column_sizes(tmp_path / "none.parquet")
