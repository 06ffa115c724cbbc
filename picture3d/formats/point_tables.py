"""Point files without a header of their own: ``.bin`` (float32 rows) and ``.npy``. A layout names their columns.

A point table is a dict: column name -> (N,) array. Names are as in the file or the layout; what they mean is the caller's.
"""

from __future__ import annotations

import tokenize
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from picture3d.errors import DataError
from picture3d.files import read_bounded, unreadable

PointTable = dict[str, NDArray[np.generic]]

MAX_POINTS = 1 << 26
MAX_FILE_BYTES = 1 << 31
MAX_TEXT_BYTES = 1 << 28  # numbers written as text take some 16 times as much while they are read
IGNORED = "-"


def parse_layout(layout: str) -> tuple[str, ...]:
    """The column names of a layout such as ``x,y,z,intensity,-``; ``-`` stands for a column that is not used.

    Raises:
        DataError: if x, y or z is missing or a name is used twice.
    """
    names = tuple(name.strip() for name in layout.split(","))
    used = [name for name in names if name != IGNORED]
    if not {"x", "y", "z"} <= set(used) or len(set(used)) != len(used) or "" in used:
        raise DataError(
            f"layout '{layout}': give the columns in their order, x, y and z among them and none twice, "
            f"'{IGNORED}' for one to leave out. Example: x,y,z,intensity,ring"
        )
    return names


def read_bin(path: Path, layout: tuple[str, ...]) -> PointTable:
    """A file of little-endian float32 rows, as KITTI, nuScenes and ONCE use.

    Raises:
        DataError: if the size is no whole number of rows of this layout.
    """
    data = read_bounded(path, max_bytes=MAX_FILE_BYTES)
    row = 4 * len(layout)
    if len(data) % row:
        raise DataError(
            f"{path}: {len(data)} bytes are no whole number of rows of {len(layout)} float32 ({','.join(layout)}). Copy the "
            "file again if it is cut off, or state its columns with --layout."
        )
    return _named(np.frombuffer(data, "<f4").reshape(-1, len(layout)), layout)


def read_npy(path: Path, layout: tuple[str, ...]) -> PointTable:
    """A numpy file: (N, C) numbers with C columns as in the layout, or a structured array with names of its own.

    Raises:
        DataError: if the file is no such array; one that needs pickle is never opened.
    """
    array = read_npy_array(path)
    if array.dtype.names:
        if array.ndim != 1 or any(array.dtype[name].kind not in "fiu" or array.dtype[name].shape for name in array.dtype.names):
            raise DataError(
                f"{path}: a structured array of points needs one number per name, found {array.dtype}. Save it with a number "
                "per name."
            )
        return {name: np.ascontiguousarray(array[name]) for name in array.dtype.names}
    if array.ndim != 2 or array.shape[1] != len(layout) or array.dtype.kind not in "fiu":
        raise DataError(
            f"{path}: holds {array.dtype} {array.shape}, the layout {','.join(layout)} needs (points, {len(layout)}) numbers. "
            "State its columns with --layout."
        )
    return _named(array, layout)


def read_npy_array(path: Path) -> NDArray[Any]:
    """The array in a ``.npy`` file, read into memory.

    Raises:
        DataError: if the file is not one, is cut off, needs pickle, or is larger than `MAX_FILE_BYTES`.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise DataError(f"{path}: more than the {MAX_FILE_BYTES} bytes such a file may have. Check that it is one sweep.")
        # Mapped, not read: numpy would allocate whatever size the header claims before it finds the file shorter.
        mapped = np.lib.format.open_memmap(path, mode="r")
        return np.array(mapped)
    except FileNotFoundError as error:
        raise unreadable(path, error) from None
    except (
        OSError, ValueError, TypeError, SyntaxError, EOFError, OverflowError, MemoryError, RecursionError, tokenize.TokenError
    ) as error:  # fmt: skip
        raise DataError(f"{path}: not a plain numpy array file ({error}). Save it with numpy.save, without objects.") from None


def _named(rows: NDArray[np.generic], layout: tuple[str, ...]) -> PointTable:
    return {name: np.ascontiguousarray(rows[:, i]) for i, name in enumerate(layout) if name != IGNORED}
