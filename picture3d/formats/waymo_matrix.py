"""The zlib streams of a Waymo v1.x frame: range images, poses of pixels, classes of pixels, each a matrix message.

Source: MatrixFloat and MatrixInt32 (numbers 1, shape 2) of waymo-open-dataset's dataset.proto. A stream is never inflated
beyond the largest range image that is believed.
"""

from __future__ import annotations

import math
import zlib

import numpy as np
from numpy.typing import NDArray

from picture3d.errors import FETCH_AGAIN, DataError
from picture3d.formats.protobuf_wire import Field, Reader

RANGE_CHANNELS, POSE_CHANNELS, SEGMENTATION_CHANNELS = 4, 6, 2
# The real ones are 64 x 2650 and 200 x 600; a range image that claims more is not inflated.
MAX_PIXELS = 1 << 19
_MAX_VARINT_BYTES = 10
_MATRIX_SLACK = 64  # keys, lengths and the shape beside the numbers of a matrix


def read_range_image(stream: memoryview, where: str) -> NDArray[np.float32]:
    """(H, W, 4) float32: range in metres, intensity, elongation, 1 in a no-label zone; range <= 0 where nothing returned.

    Raises:
        DataError: (naming `where`) if it is not such a matrix, or larger than is believed.
    """
    return _float_matrix(stream, RANGE_CHANNELS, where)


def read_pixel_poses(stream: memoryview, where: str) -> NDArray[np.float32]:
    """(H, W, 6) float32: roll, pitch, yaw in radians and x, y, z in metres of the vehicle in the global frame, per pixel.

    Raises:
        DataError: as :func:`read_range_image`.
    """
    return _float_matrix(stream, POSE_CHANNELS, where)


def read_segmentation(stream: memoryview, where: str) -> NDArray[np.int64]:
    """(H, W, 2) int64: instance id and class of segmentation.proto, per pixel.

    Raises:
        DataError: as :func:`read_range_image`.
    """
    message = inflate(stream, MAX_PIXELS * SEGMENTATION_CHANNELS * _MAX_VARINT_BYTES + _MATRIX_SLACK, where)
    reader = Reader(message, where)
    pieces, shape = _matrix(reader, SEGMENTATION_CHANNELS)
    return _joined([reader.integers(piece) for piece in pieces], np.dtype(np.int64), shape, where)


def inflate(stream: memoryview, max_bytes: int, where: str) -> bytes:
    """The content of a zlib stream, if it has at most `max_bytes`; no more than that is ever inflated.

    Raises:
        DataError: (naming `where`) if it has more, is cut off, is followed by something, or is no zlib stream.
    """
    inflator = zlib.decompressobj()
    try:
        content = inflator.decompress(stream, max_bytes + 1)
    except zlib.error as error:
        raise DataError(f"{where}: is not a zlib stream ({error}). {FETCH_AGAIN}") from None
    if len(content) > max_bytes:
        raise DataError(
            f"{where}: inflates to more than the {max_bytes} bytes it may have and was not read. Download it again, from the "
            "official place."
        )
    if not inflator.eof or inflator.unused_data:
        raise DataError(f"{where}: the zlib stream of {len(stream)} bytes does not end where it should; fetch the file again.")
    return content


def _float_matrix(stream: memoryview, channels: int, where: str) -> NDArray[np.float32]:
    reader = Reader(inflate(stream, MAX_PIXELS * channels * 5 + _MATRIX_SLACK, where), where)
    pieces, shape = _matrix(reader, channels)
    return _joined([reader.floats(piece) for piece in pieces], np.dtype(np.float32), shape, where)


def _matrix(reader: Reader, channels: int) -> tuple[list[Field], tuple[int, int, int]]:
    """The fields that hold the numbers of a matrix, and its shape."""
    pieces: list[Field] = []
    dims: list[int] = []
    for field in reader.fields():
        if field.number == 1:
            pieces.append(field)
        elif field.number == 2:
            for inner in reader.message(field):
                if inner.number == 1:
                    # A shape has three sides; a message full of them is refused below without being joined.
                    dims += reader.integers(inner)[:4].tolist() if len(dims) < 4 else []
    if len(dims) != 3 or dims[2] != channels or min(dims) < 1 or dims[0] * dims[1] > MAX_PIXELS:
        raise DataError(
            f"{reader.where}: has shape {tuple(dims)}, expected (rows, columns, {channels}) of at most {MAX_PIXELS} pixels. "
            f"{FETCH_AGAIN}"
        )
    return pieces, (dims[0], dims[1], dims[2])


def _joined(pieces: list[NDArray], dtype: np.dtype, shape: tuple[int, int, int], where: str) -> NDArray:
    # Packed data are one piece and are not copied.
    values = pieces[0] if len(pieces) == 1 else np.concatenate([np.zeros(0, dtype), *pieces])
    if values.size != math.prod(shape):
        raise DataError(f"{where}: holds {values.size} numbers, its shape {shape} needs {math.prod(shape)}. {FETCH_AGAIN}")
    return values.reshape(shape)
