"""Feather tables (Arrow IPC files) of numbers and text as numpy columns. Needs the extra `arrow`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from picture3d.errors import FETCH_AGAIN, ConfigError, DataError
from picture3d.files import unreadable

_MAX_ROWS = 1 << 26


def read_feather(path: Path, columns: Mapping[str, str]) -> dict[str, NDArray[Any]]:
    """The named columns of a Feather file.

    Args:
        path: the file.
        columns: name -> kind: ``i`` int64, ``f`` float64, ``s`` text (an object array of str).

    Raises:
        ConfigError: if pyarrow is not installed.
        DataError: if the file is missing, damaged or too large, lacks a column, or a value is absent or of another kind.
    """
    need_pyarrow(f"{path}: reading Feather files")
    import pyarrow as pa
    from pyarrow import ipc

    try:
        with pa.memory_map(str(path)) as source:
            reader = ipc.open_file(source)
            names = reader.schema.names
            absent = [name for name in columns if name not in names]
            if absent:
                raise DataError(
                    f"{path}: has no column {', '.join(absent)} (its columns: {', '.join(names) or 'none'}). {FETCH_AGAIN}"
                )
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
            rows = sum(batch.num_rows for batch in batches)
            if rows > _MAX_ROWS:
                raise DataError(
                    f"{path}: {rows} rows, more than the {_MAX_ROWS} such a table may have. Check that this is the right file."
                )
            table = pa.Table.from_batches(batches, reader.schema).select(list(columns))
            table.validate(full=True)
            return {name: numpy_column(table.column(name), kind, f"{path}, column {name}") for name, kind in columns.items()}
    except FileNotFoundError as error:
        raise unreadable(path, error) from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        text = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise DataError(f"{path}: not a whole Feather file ({text}). Download it again.") from None


def need_pyarrow(what: str) -> None:
    """Sees to it that pyarrow can be imported.

    Raises:
        ConfigError: saying that `what` needs it, and how to get it.
    """
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise ConfigError(f"{what} needs pyarrow. Install it: pip install picture3d[arrow]") from None


def numpy_column(column: Any, kind: str, place: str) -> NDArray[Any]:
    """A column of a table as an array; `kind` as in :func:`read_feather`.

    Raises:
        DataError: (naming `place`) if a value is absent, or of another kind.
    """
    import pyarrow.types as types

    if column.null_count:
        raise DataError(f"{place}: {column.null_count} values are absent. {FETCH_AGAIN}")
    of = column.type
    if kind == "s":
        if not (types.is_string(of) or types.is_large_string(of)):
            raise DataError(f"{place}: holds {of}, expected text. {FETCH_AGAIN}")
        return np.array(column.to_pylist(), dtype=object)
    if not (types.is_integer(of) or (kind == "f" and types.is_floating(of))):
        raise DataError(f"{place}: holds {of}, expected {'numbers' if kind == 'f' else 'whole numbers'}. {FETCH_AGAIN}")
    return np.array(column.to_numpy(), dtype=np.int64 if kind == "i" else np.float64)
