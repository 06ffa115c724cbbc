"""How teacher features are stored: (M, D) rows <-> bytes. What a codec costs in cosine is measured when it is used."""

from __future__ import annotations

from enum import StrEnum

import numpy as np
import torch
from numpy.typing import NDArray

from picture3d.errors import DataError

# Mean cosine to the teacher's own features below which a smaller codec is not used.
MIN_COSINE = 0.995


class FeatureCodec(StrEnum):
    """How a row of D features is stored."""

    FLOAT16 = "float16"  # 2 D bytes per cell
    INT8 = "int8"  # D bytes per cell, and 4 D bytes per frame: one scale per channel


def encode_features(features: NDArray[np.float32], codec: FeatureCodec) -> bytes:
    """The bytes of (M, D) features, little-endian, row by row.

    Raises:
        DataError: if a feature is not finite, or too large for the codec.
    """
    if not np.isfinite(features).all():
        raise DataError("a feature is not finite")
    match codec:
        case FeatureCodec.FLOAT16:
            if features.size and np.abs(features).max() > np.finfo(np.float16).max:
                raise DataError("a feature is too large for float16")
            return features.astype("<f2").tobytes()
        case FeatureCodec.INT8:
            scale = _channel_scales(features)
            steps = np.divide(features, scale, out=np.zeros_like(features), where=scale > 0)
            return np.rint(steps).astype(np.int8).tobytes() + scale.astype("<f4").tobytes()


def decode_features(data: NDArray[np.uint8], codec: FeatureCodec, cells: int, dimension: int) -> NDArray[np.float16]:
    """(cells, dimension) float16 from the bytes that `encode_features` made; may share memory with `data`.

    Raises:
        DataError: if the bytes are not exactly those of so many features.
    """
    expected = encoded_size(codec, cells, dimension)
    if len(data) != expected:
        raise DataError(f"{len(data)} bytes are not {cells} {codec} features of length {dimension} ({expected} bytes)")
    match codec:
        case FeatureCodec.FLOAT16:
            return data.view("<f2").reshape(cells, dimension)
        case FeatureCodec.INT8:
            steps = torch.from_numpy(data[: cells * dimension].view(np.int8).reshape(cells, dimension))
            scale = torch.from_numpy(data[cells * dimension :].copy().view("<f4"))
            return torch.mul(steps, scale).to(torch.float16).numpy()


def encoded_size(codec: FeatureCodec, cells: int, dimension: int) -> int:
    """Bytes of so many features under a codec."""
    match codec:
        case FeatureCodec.FLOAT16:
            return 2 * cells * dimension
        case FeatureCodec.INT8:
            return cells * dimension + 4 * dimension


def smallest_codec(features: NDArray[np.float32]) -> tuple[FeatureCodec, bytes, float]:
    """The smaller codec that keeps a mean cosine of `MIN_COSINE`, the encoded features, and that cosine."""
    encoded = encode_features(features, FeatureCodec.INT8)
    cosine = stored_cosine(features, encoded, FeatureCodec.INT8)
    if cosine >= MIN_COSINE:
        return FeatureCodec.INT8, encoded, cosine
    encoded = encode_features(features, FeatureCodec.FLOAT16)
    return FeatureCodec.FLOAT16, encoded, stored_cosine(features, encoded, FeatureCodec.FLOAT16)


def stored_cosine(features: NDArray[np.float32], encoded: bytes, codec: FeatureCodec) -> float:
    """Mean cosine between features and what will be read back; 1 without cells, and for a row of zeros kept as zeros."""
    if not features.size:
        return 1.0
    read = decode_features(np.frombuffer(bytearray(encoded), np.uint8), codec, *features.shape).astype(np.float32)
    norms = np.linalg.norm(features, axis=1) * np.linalg.norm(read, axis=1)
    cosine = np.divide((features * read).sum(1), norms, out=np.zeros(len(features), np.float32), where=norms > 0)
    unchanged = (norms == 0) & (features == read).all(1)
    return float(np.where(unchanged, 1.0, cosine).mean())


def _channel_scales(features: NDArray[np.float32]) -> NDArray[np.float32]:
    """(D,) size of one step of each channel, so that its largest value is step 127."""
    if not len(features):
        return np.zeros(features.shape[1], np.float32)
    return (np.abs(features).max(0) / 127).astype(np.float32)
