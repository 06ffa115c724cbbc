"""Parquet tables: small ones as numpy columns, large ones row by row in flat memory. Needs the extra `arrow`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from picture3d.errors import FETCH_AGAIN, DataError
from picture3d.formats.feather import need_pyarrow, numpy_column
from picture3d.formats.parquet_footer import column_sizes

_MAX_ROWS = 1 << 22
_MAX_VALUES = 1 << 26  # of one column of a table that is read whole


@contextmanager
def open_parquet(path: Path, columns: Sequence[str]) -> Iterator[Any]:
    """Yields a ``pyarrow.parquet.ParquetFile`` that has the named columns; what pyarrow raises in the block becomes ours.

    Checksums of pages are verified where the file has them.

    Raises:
        ConfigError: if pyarrow is not installed.
        DataError: if the file is missing or damaged, or lacks a column.
    """
    need_pyarrow(f"{path}: reading Parquet files")
    import pyarrow as pa
    from pyarrow import parquet

    if not path.is_file():
        raise DataError(f"{path}: no such file. Download the component whole.")
    try:
        # Buffered: a column of a row group is decoded page by page, never held whole.
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 16, page_checksum_verification=True) as file:
            names = file.schema_arrow.names
            absent = [name for name in columns if name not in names]
            if absent:
                raise DataError(
                    f"{path}: has no column {', '.join(absent)} (its columns: {', '.join(names) or 'none'}). {FETCH_AGAIN}"
                )
            yield file
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        text = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise DataError(f"{path}: not a whole Parquet file ({text}). Download it again.") from None


def rows_of(path: Path) -> int:
    """Rows of a table, by its footer.

    Raises:
        ConfigError, DataError: as :func:`open_parquet`.
    """
    with open_parquet(path, ()) as file:
        return int(file.metadata.num_rows)


def refuse_absurd(path: Path, columns: Sequence[str], most: int) -> None:
    """Refuses a file whose footer tells of more than `most` values per row in one of the columns, before they are decoded.

    Raises:
        DataError: naming the row group and the column.
    """
    for size in column_sizes(path):
        # A list column is called by the path of its items.
        asked = any(size.column == name or size.column.startswith(f"{name}.") for name in columns)
        if asked and not 0 <= size.values <= max(size.rows, 1) * most:
            raise DataError(
                f"{path}: row group {size.row_group} claims {size.values} values of {size.column} in {size.rows} rows, more "
                f"than {most} in each. {FETCH_AGAIN}"
            )


def read_parquet(path: Path, columns: Mapping[str, str]) -> dict[str, NDArray[Any]]:
    """The named columns of a table that is small enough to be held.

    Args:
        path: the file.
        columns: name -> kind: ``i`` int64, ``f`` float64, ``s`` text (an object array of str), as Feather files; ``f?`` and
            ``i?`` the same with NaN and 0 for values that are absent; ``m`` (N, 16) float64, a list of 16 numbers in each row;
            ``l`` an object array of float64 arrays, None where absent.

    Raises:
        ConfigError: if pyarrow is not installed.
        DataError: if the file is missing, damaged or too large, lacks a column, or a value is absent or of another kind.
    """
    with open_parquet(path, list(columns)) as file:
        if file.metadata.num_rows > _MAX_ROWS:
            raise DataError(
                f"{path}: {file.metadata.num_rows} rows, more than the {_MAX_ROWS} such a table may have. Check that this is "
                "the right file."
            )
        refuse_absurd(path, list(columns), max(64, _MAX_VALUES // max(1, file.metadata.num_rows)))
        table = file.read(columns=list(columns), use_threads=False)
        table.validate(full=True)
        return {name: _column(table.column(name), kind, f"{path}, column {name}") for name, kind in columns.items()}


def _column(column: Any, kind: str, place: str) -> NDArray[Any]:
    import pyarrow as pa
    import pyarrow.types as types

    if types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if kind in ("f?", "i?"):
        empty = pa.scalar(float("nan") if kind == "f?" else 0, column.type) if _is_number(column.type) else None
        return numpy_column(column if empty is None else column.fill_null(empty), kind[0], place)
    if kind not in ("m", "l"):
        return numpy_column(column, kind, place)
    if not (types.is_list(column.type) or types.is_fixed_size_list(column.type)) or not _is_number(column.type.value_type):
        raise DataError(f"{place}: holds {column.type}, expected lists of numbers. {FETCH_AGAIN}")
    lists = np.empty(len(column), object)
    lists[:] = [None if item is None else np.array(item, np.float64) for item in column.to_pylist()]
    if kind == "l":
        return lists
    wrong = [row for row, item in enumerate(lists) if item is None or item.shape != (16,)]
    if wrong:
        raise DataError(f"{place}: row {wrong[0]} does not hold the 16 numbers of a 4 x 4 matrix. {FETCH_AGAIN}")
    return np.stack([np.zeros(16), *lists])[1:]


def _is_number(kind: Any) -> bool:
    import pyarrow.types as types

    return types.is_integer(kind) or types.is_floating(kind)
