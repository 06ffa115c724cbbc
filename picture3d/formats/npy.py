"""numpy's `.npy` files from bytes of strangers: no pickle, and no memory for what a header merely claims."""

from __future__ import annotations

import io
from tokenize import TokenError
from typing import Any

import numpy as np
from numpy.typing import NDArray

# All that numpy's reader of headers, a small parser of Python, is known to raise for damaged bytes.
_UNREADABLE = (
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    EOFError,
    OSError,
    SyntaxError,
    TokenError,
    RecursionError,
    MemoryError,
)


def array_of_npy(data: bytes) -> NDArray[Any]:
    """The array in the bytes of a whole `.npy` file (formats 1.0 and 2.0).

    Raises:
        ValueError: if they are none, are cut off, or hold objects.
    """
    stream = io.BytesIO(data)
    try:
        _refuse_absurd_header(stream)
        return np.load(stream, allow_pickle=False)
    except _UNREADABLE as error:
        raise ValueError(str(error) or type(error).__name__) from None


def _refuse_absurd_header(data: io.BytesIO) -> None:
    """The header is believed only if the bytes it promises are there: numpy would allocate first."""
    version = np.lib.format.read_magic(data)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(data)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(data)
    else:
        raise ValueError(f"version {version} of the format")
    count = 1
    for length in shape:
        if length < 0:
            raise ValueError(f"shape {shape}")
        count *= length
    left = data.getbuffer().nbytes - data.tell()
    if count * dtype.itemsize != left:
        raise ValueError(f"the header promises {count * dtype.itemsize} bytes, {left} follow")
    data.seek(0)
