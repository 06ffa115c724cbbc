"""How teacher features are stored: (M, D) rows <-> bytes. What a codec costs in cosine is measured when it is used."""

from __future__ import annotations

from enum import StrEnum

import numpy as np
import torch
from numpy.typing import NDArray

from picture3d.errors import DataError
from picture3d.teachers.feature_basis import (
    NARROW_STEPS,
    WIDE_STEPS,
    CodeBooks,
    FeatureBasis,
    PrincipalBasis,
    best_steps,
    nearest_centres,
    of_codes,
    rounded,
)

# Mean cosine to the teacher's own features below which a smaller codec is not used.
MIN_COSINE = 0.995


class FeatureCodec(StrEnum):
    """How a row of D features is stored."""

    FLOAT16 = "float16"  # 2 D bytes per cell
    INT8 = "int8"  # D bytes per cell, and 4 D bytes per frame: one scale per channel
    PCA = "pca"  # coefficients of principal components, of eight bits or four; 4 bytes each per frame: their scales
    PRODUCT = "product"  # a byte per code book and cell

    @property
    def needs_basis(self) -> bool:
        """Whether bytes mean something only together with the store's basis."""
        return self in (FeatureCodec.PCA, FeatureCodec.PRODUCT)


def codec_of(basis: FeatureBasis) -> FeatureCodec:
    """The codec that a basis is for."""
    return FeatureCodec.PCA if isinstance(basis, PrincipalBasis) else FeatureCodec.PRODUCT


def encode_features(features: NDArray[np.float32], codec: FeatureCodec, basis: FeatureBasis | None = None) -> bytes:
    """The bytes of (M, D) features, little-endian, row by row.

    Raises:
        DataError: if a feature is not finite, or too large for the codec, or the basis is missing or of another codec.
    """
    if not np.isfinite(features).all():
        raise DataError("a feature is not finite. Look at the teacher and the frame's points.")
    match codec:
        case FeatureCodec.FLOAT16:
            if features.size and np.abs(features).max() > np.finfo(np.float16).max:
                raise DataError("a feature is too large for float16. Choose the codec int8.")
            return features.astype("<f2").tobytes()
        case FeatureCodec.INT8:
            scale = best_steps(features, WIDE_STEPS)
            return rounded(features, scale, WIDE_STEPS).astype(np.int8).tobytes() + scale.astype("<f4").tobytes()
        case FeatureCodec.PCA:
            return _encode_principal(features, _principal(basis, features.shape[1]))
        case FeatureCodec.PRODUCT:
            return nearest_centres(features, _books(basis, features.shape[1]))[0].tobytes()


def decode_features(
    data: NDArray[np.uint8], codec: FeatureCodec, cells: int, dimension: int, basis: FeatureBasis | None = None
) -> NDArray[np.float16]:
    """(cells, dimension) float16 from the bytes that `encode_features` made; may share memory with `data`.

    Raises:
        DataError: if the bytes are not exactly those of so many features, or the basis is missing or of another codec.
    """
    expected = encoded_size(codec, cells, dimension, basis)
    if len(data) != expected:
        raise DataError(
            f"{len(data)} bytes are not {cells} {codec} features of length {dimension} ({expected} bytes). Delete the file and "
            "run `picture3d targets` again."
        )
    match codec:
        case FeatureCodec.FLOAT16:
            return data.view("<f2").reshape(cells, dimension)
        case FeatureCodec.INT8:
            steps = torch.from_numpy(data[: cells * dimension].view(np.int8).reshape(cells, dimension))
            scale = torch.from_numpy(data[cells * dimension :].copy().view("<f4"))
            return torch.mul(steps, scale).to(torch.float16).numpy()
        case FeatureCodec.PCA:
            return _decode_principal(data, cells, _principal(basis, dimension))
        case FeatureCodec.PRODUCT:
            books = _books(basis, dimension)
            return of_codes(data.reshape(cells, books.bytes_per_cell), books, np.float16)


def encoded_size(codec: FeatureCodec, cells: int, dimension: int, basis: FeatureBasis | None = None) -> int:
    """Bytes of so many features under a codec.

    Raises:
        DataError: if the basis is missing or of another codec.
    """
    match codec:
        case FeatureCodec.FLOAT16:
            return 2 * cells * dimension
        case FeatureCodec.INT8:
            return cells * dimension + 4 * dimension
        case FeatureCodec.PCA:
            principal = _principal(basis, dimension)
            return cells * principal.bytes_per_cell + 4 * len(principal.axes)
        case FeatureCodec.PRODUCT:
            return cells * _books(basis, dimension).bytes_per_cell


def smallest_codec(features: NDArray[np.float32], basis: FeatureBasis | None = None) -> tuple[FeatureCodec, bytes, float]:
    """The smallest codec that keeps a mean cosine of `MIN_COSINE` - that of the basis where there is one, int8, float16 -
    with the encoded features and that cosine.
    """
    smaller = [FeatureCodec.INT8] if basis is None else [codec_of(basis), FeatureCodec.INT8]
    for codec in smaller:
        encoded = encode_features(features, codec, basis)
        cosine = stored_cosine(features, encoded, codec, basis)
        if cosine >= MIN_COSINE:
            return codec, encoded, cosine
    encoded = encode_features(features, FeatureCodec.FLOAT16)
    return FeatureCodec.FLOAT16, encoded, stored_cosine(features, encoded, FeatureCodec.FLOAT16)


def stored_cosine(
    features: NDArray[np.float32], encoded: bytes, codec: FeatureCodec, basis: FeatureBasis | None = None
) -> float:
    """Mean cosine between features and what will be read back; 1 without cells, and for a row of zeros kept as zeros."""
    return float(row_cosines(features, encoded, codec, basis).mean()) if features.size else 1.0


def row_cosines(
    features: NDArray[np.float32], encoded: bytes, codec: FeatureCodec, basis: FeatureBasis | None = None
) -> NDArray[np.float32]:
    """(M,) cosine of each row to what will be read back; 0 where only one of the two is zeros."""
    read = decode_features(
        np.frombuffer(bytearray(encoded), np.uint8), codec, features.shape[0], features.shape[1], basis
    ).astype(np.float32)
    norms = np.linalg.norm(features, axis=1) * np.linalg.norm(read, axis=1)
    cosine = np.divide((features * read).sum(1), norms, out=np.zeros(len(features), np.float32), where=norms > 0)
    return np.where((norms == 0) & (features == read).all(1), np.float32(1), cosine)


def _encode_principal(features: NDArray[np.float32], basis: PrincipalBasis) -> bytes:
    """Wide coefficients row by row, narrow ones two to a byte (the first in the low half), then the step of each.

    A row of zeros, which a teacher gives where it saw nothing, has in its first coefficient a value that no other row takes.
    """
    coefficients = ((features - basis.mean) @ basis.axes.T).astype(np.float32)
    first, rest = coefficients[:, : basis.wide], coefficients[:, basis.wide :]
    sizes = np.concatenate([best_steps(first, WIDE_STEPS), best_steps(rest, NARROW_STEPS)])
    steps = rounded(first, sizes[: basis.wide], WIDE_STEPS).astype(np.int8)
    halves = np.zeros((len(features), basis.narrow + basis.narrow % 2), np.uint8)
    halves[:, : basis.narrow] = rounded(rest, sizes[basis.wide :], NARROW_STEPS) + _HALF_ZERO
    nothing = ~features.any(1)
    if basis.wide:
        steps[nothing, 0] = _WIDE_NOTHING
    else:
        halves[nothing, :1] = _HALF_NOTHING
    return steps.tobytes() + (halves[:, ::2] | halves[:, 1::2] << 4).tobytes() + sizes.astype("<f4").tobytes()


_HALF_ZERO = 8  # how a narrow coefficient of zero is written: 1 to 15 are taken
_HALF_NOTHING = 0  # first coefficient of a row of zeros
_WIDE_NOTHING = -128  # the same with eight bits, of which -127 to 127 are taken


def _decode_principal(data: NDArray[np.uint8], cells: int, basis: PrincipalBasis) -> NDArray[np.float16]:
    split, end = cells * basis.wide, cells * basis.bytes_per_cell
    sizes = torch.from_numpy(data[end:].copy().view("<f4"))
    coefficients = torch.empty(cells, len(basis.axes))
    coefficients[:, : basis.wide] = torch.from_numpy(data[:split].view(np.int8).reshape(cells, basis.wide))
    if basis.narrow:
        packed = torch.from_numpy(data[split:end].reshape(cells, (basis.narrow + 1) // 2))
        coefficients[:, basis.wide :: 2] = packed & 15
        coefficients[:, basis.wide + 1 :: 2] = (packed >> 4)[:, : basis.narrow // 2]
    # Steps and the zero of the halves go into the small matrix and the mean: one pass over the rows is left.
    axes = torch.from_numpy(basis.axes) * sizes[:, None]
    start = torch.from_numpy(basis.mean) - _HALF_ZERO * axes[basis.wide :].sum(0)
    features = torch.addmm(start, coefficients, axes).to(torch.float16)
    if len(basis.axes):
        # The halves lie shifted by their zero, the wide ones do not.
        features[coefficients[:, 0] == (_WIDE_NOTHING if basis.wide else _HALF_NOTHING)] = 0
    return features.numpy()


def _principal(basis: FeatureBasis | None, dimension: int) -> PrincipalBasis:
    if not isinstance(basis, PrincipalBasis) or len(basis.mean) != dimension:
        raise DataError(_wrong(FeatureCodec.PCA, basis, dimension))
    return basis


def _books(basis: FeatureBasis | None, dimension: int) -> CodeBooks:
    if not isinstance(basis, CodeBooks) or basis.dimension != dimension:
        raise DataError(_wrong(FeatureCodec.PRODUCT, basis, dimension))
    return basis


def _wrong(codec: FeatureCodec, basis: FeatureBasis | None, dimension: int) -> str:
    found = "none" if basis is None else f"one for {codec_of(basis)}"
    return (
        f"features stored as {codec} need the basis for {dimension} channels they were stored with, and there is {found}. "
        f"Bring teacher.json back as it was, or remove the folder and run `picture3d targets` again."
    )
