"""What the smaller codecs know of a teacher beforehand: principal components, or code books. Fitted once, kept with the store.

A fit sees a sample of frames one by one: it adds up the mean and the (D, D) second moments of all their cells, and keeps a few
rows of each frame, on which sizes are chosen and code books are trained. Its memory follows D, never the number of frames.
"""

from __future__ import annotations

import base64
import binascii
import math
from dataclasses import dataclass
from typing import Any, TypeVar

import google_crc32c
import numpy as np
import torch
from numpy.typing import NDArray

from picture3d.errors import ConfigError
from picture3d.ops.kmeans import kmeans

# What a fit aims at: a little above what is asked of every frame, since frames differ from the sample.
AIMED_COSINE = 0.9965
CODES = 256  # of a code book: a code is one byte
NARROW_STEPS = 7  # a component of four bits has steps -7 to 7
WIDE_STEPS = 127
_KEPT_VALUES = 1 << 20  # of the rows that a fit keeps, so 64-d rows: 16,384; the mean cosine is known to 5e-5 by them
_TRAINING_ROWS = 1 << 13  # of a code book
_ITERATIONS = 15
MAX_FITTED_DIMENSION = 2048  # D x D numbers are added up and stored


@dataclass(frozen=True, eq=False)
class PrincipalBasis:
    """``x ~ mean + coefficients @ axes``; the first `wide` coefficients have eight bits, the others four."""

    mean: NDArray[np.float32]  # (D,)
    axes: NDArray[np.float32]  # (R, D), orthonormal rows, the most variance first
    wide: int  # 0 to R

    def __post_init__(self) -> None:
        if self.mean.ndim != 1 or self.axes.ndim != 2 or self.axes.shape[1:] != self.mean.shape:
            raise ValueError(f"expected mean (D,) and axes (R, D), got {self.mean.shape} and {self.axes.shape}")
        if not 0 <= self.wide <= len(self.axes) <= len(self.mean):
            raise ValueError(f"{self.wide} of {len(self.axes)} components with eight bits, for {len(self.mean)} channels")

    @property
    def narrow(self) -> int:
        """Components with four bits."""
        return len(self.axes) - self.wide

    @property
    def bytes_per_cell(self) -> int:
        """Bytes of a row; two narrow components share one."""
        return self.wide + (self.narrow + 1) // 2


@dataclass(frozen=True, eq=False)
class CodeBooks:
    """Product quantisation: the channels in S runs of equal length, each run replaced by the nearest of its 256 centres."""

    centres: NDArray[np.float32]  # (S, 256, W); S * W is D, or more where D does not divide: the rest is zeros
    dimension: int  # D

    def __post_init__(self) -> None:
        if self.centres.ndim != 3 or self.centres.shape[1] != CODES:
            raise ValueError(f"expected centres (S, {CODES}, W), got {self.centres.shape}")
        books, _, width = self.centres.shape
        if not (books - 1) * width < self.dimension <= books * width:
            raise ValueError(f"{books} books of width {width} do not hold {self.dimension} channels")

    @property
    def bytes_per_cell(self) -> int:
        """Bytes of a row."""
        return len(self.centres)


_Float = TypeVar("_Float", np.float16, np.float32)

FeatureBasis = PrincipalBasis | CodeBooks


def basis_tree(basis: FeatureBasis) -> dict[str, Any]:
    """A basis as plain JSON; arrays are base64 of little-endian float32."""
    match basis:
        case PrincipalBasis():
            arrays = {"mean": _text(basis.mean), "axes": _text(basis.axes)}
            return {"kind": "pca", "rank": len(basis.axes), "wide": basis.wide, "dimension": len(basis.mean), **arrays}
        case CodeBooks():
            return {
                "kind": "product",
                "books": len(basis.centres),
                "dimension": basis.dimension,
                "centres": _text(basis.centres),
            }


def basis_of_tree(tree: Any) -> FeatureBasis:
    """Back from :func:`basis_tree`.

    Raises:
        ValueError: saying what is wrong, for anything else than a whole basis.
    """
    if not isinstance(tree, dict):
        raise ValueError("the basis is no table")
    try:
        dimension = int(tree["dimension"])
        match tree["kind"]:
            case "pca":
                axes = _array(tree["axes"], (int(tree["rank"]), dimension))
                return PrincipalBasis(_array(tree["mean"], (dimension,)), axes, int(tree["wide"]))
            case "product":
                books = int(tree["books"])
                return CodeBooks(_array(tree["centres"], (books, CODES, math.ceil(dimension / max(books, 1)))), dimension)
            case kind:
                raise ValueError(f"unknown kind of basis {kind!r}")
    except KeyError as error:
        raise ValueError(f"the basis lacks {error}") from None
    except (TypeError, OverflowError, binascii.Error) as error:
        raise ValueError(f"the basis is garbled: {error}") from None


def basis_digest(basis: FeatureBasis) -> str:
    """Short text that differs where any number differs."""
    tree = basis_tree(basis)
    return f"{google_crc32c.value(repr(sorted(tree.items())).encode()):08x}"


@dataclass(frozen=True, slots=True, eq=False)
class FrameMoments:
    """What a fit takes of one frame."""

    rows: NDArray[np.int64]  # (), cells whose features are finite
    sum: NDArray[np.float64]  # (D,) of those
    products: NDArray[np.float64]  # (D, D) of their columns
    kept: NDArray[np.float32]  # (k, D), some of them


class BasisFit:
    """Adds frames up one by one; then gives a basis. The same frames in the same order give the same basis, bit for bit."""

    def __init__(self, dimension: int, frames: int, seed: int) -> None:
        """Args:
        dimension: D.
        frames: how many will be added; each may keep its share of rows.
        seed: of the draw of those rows.

        Raises:
            ConfigError: if D is so large that a basis would not be small.
        """
        if dimension > MAX_FITTED_DIMENSION:
            raise ConfigError(
                f"features of {dimension} channels: a basis is fitted for at most {MAX_FITTED_DIMENSION}. "
                "Take the codec int8 or float16."
            )
        self._share = max(_KEPT_VALUES // max(dimension * frames, 1), 1)
        self._seed = seed
        self._rows = 0
        self._sum = np.zeros(dimension)
        self._products = np.zeros((dimension, dimension))
        self._kept: list[NDArray[np.float32]] = []

    def moments(self, number: int, features: NDArray[np.float32]) -> FrameMoments:
        """What is to be added of frame `number`, whose features are (M, D); rows that are not finite are left out."""
        features = features[np.isfinite(features).all(1)]
        wide = features.astype(np.float64)
        order = np.random.default_rng([self._seed, number]).permutation(len(features))[: self._share]
        return FrameMoments(np.array(len(wide)), wide.sum(0), wide.T @ wide, features[np.sort(order)])

    def add(self, frame: FrameMoments) -> None:
        """Adds the moments of the next frame."""
        self._rows += int(frame.rows)
        self._sum += frame.sum
        self._products += frame.products
        self._kept.append(frame.kept)

    def principal(self, rank: int | None = None, wide: int | None = None) -> PrincipalBasis:
        """The principal components.

        Args:
            rank: R; by default the number of wide and narrow components that takes the fewest bytes a cell among those whose
                mean cosine over the kept rows is at least `AIMED_COSINE`; all of them with eight bits if none is.
            wide: components with eight bits; all by default where a rank is given.
        """
        mean = self._sum / max(self._rows, 1)
        covariance = self._products / max(self._rows, 1) - np.outer(mean, mean)
        values, vectors = np.linalg.eigh(covariance)
        axes = vectors[:, np.argsort(-values, kind="stable")].T
        # An axis and its opposite are the same component: the largest entry is positive.
        largest = np.take_along_axis(axes, np.abs(axes).argmax(1)[:, None], 1)
        axes = axes * np.where(largest < 0, -1.0, 1.0)
        if rank is None:
            rank, wide = _fewest_bytes(self._sample(), mean, axes)
        wide = rank if wide is None else wide
        return PrincipalBasis(mean.astype(np.float32), np.ascontiguousarray(axes[:rank], np.float32), wide)

    def code_books(self, generator: torch.Generator, books: int | None = None) -> CodeBooks:
        """Code books by k-means over the kept rows.

        Args:
            generator: starts the clusterings.
            books: S; by default the fewest of D/16, D/8, ... D that reach `AIMED_COSINE` over the kept rows, D if none does.
        """
        rows = self._sample()
        dimension = rows.shape[1]
        training = rows[:: max(-(-len(rows) // _TRAINING_ROWS), 1)]
        tried = [books] if books is not None else sorted({math.ceil(dimension / width) for width in (16, 8, 4, 2, 1)})
        for count in tried:
            found = _train(training, count, generator)
            if count == tried[-1] or _mean_cosine(rows, nearest_centres(rows, found)[1]) >= AIMED_COSINE:
                return found
        raise AssertionError("the last count is always taken")

    def _sample(self) -> NDArray[np.float32]:
        return np.concatenate([np.zeros((0, len(self._sum)), np.float32), *self._kept])


def nearest_centres(features: NDArray[np.float32], books: CodeBooks) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """(M, S) codes of (M, D) features, and the (M, D) features that they stand for."""
    count, _, width = books.centres.shape
    padded = np.zeros((len(features), count * width), np.float32)
    padded[:, : books.dimension] = features
    codes = np.empty((len(features), count), np.uint8)
    for book, centres in enumerate(books.centres):
        table = torch.from_numpy(centres)
        half = table.square().sum(1) / 2
        for low in range(0, len(features), 1 << 14):
            rows = torch.from_numpy(padded[low : low + (1 << 14), book * width : (book + 1) * width])
            codes[low : low + (1 << 14), book] = torch.addmm(half, rows, table.T, alpha=-1).argmin(1).numpy()
    return codes, of_codes(codes, books)


def of_codes(codes: NDArray[np.uint8], books: CodeBooks, dtype: type[_Float] = np.float32) -> NDArray[_Float]:
    """(M, D) features that (M, S) codes stand for."""
    count, _, width = books.centres.shape
    row = codes + np.arange(count, dtype=np.int32) * CODES
    table = books.centres.astype(dtype).reshape(count * CODES, width)
    return table.take(row, 0).reshape(len(codes), count * width)[:, : books.dimension]


def best_steps(coefficients: NDArray[np.float32], steps: int) -> NDArray[np.float32]:
    """(R,) size of a step of each column, so that rounding to -steps..steps loses least: few steps may cut off rare values."""
    if not coefficients.size:
        return np.zeros(coefficients.shape[1], np.float32)
    top = np.abs(coefficients).max(0)
    if steps >= WIDE_STEPS:
        return (top / steps).astype(np.float32)
    tried = np.array([1.0, 0.85, 0.7, 0.6, 0.5, 0.4, 0.3])[:, None] * (top / steps)
    lost = [np.square(coefficients - rounded(coefficients, size, steps) * size).sum(0) for size in tried.astype(np.float32)]
    return np.take_along_axis(tried, np.argmin(lost, 0)[None], 0)[0].astype(np.float32)


def rounded(coefficients: NDArray[np.float32], size: NDArray[np.float32], steps: int) -> NDArray[np.float32]:
    """Coefficients (M, R) as whole numbers of steps, cut off at -steps and steps."""
    counted = np.divide(coefficients, size, out=np.zeros_like(coefficients), where=size > 0)
    return np.rint(counted).clip(-steps, steps)


def _fewest_bytes(rows: NDArray[np.float32], mean: NDArray[np.float64], axes: NDArray[np.float64]) -> tuple[int, int]:
    """Components, and how many of them with eight bits. In the basis of the axes the cosine is a sum over components, so that
    sums from the front (kept with eight or four bits) and from the back (left at the mean) give it for every choice.
    """
    dimension = rows.shape[1]
    middle = (mean @ axes.T).astype(np.float32)
    own = (rows @ axes.T.astype(np.float32)).astype(np.float32)
    moved = own - middle
    norms = np.linalg.norm(own, axis=1)
    kept: dict[int, tuple[NDArray[np.float64], NDArray[np.float64]]] = {}
    for steps in (WIDE_STEPS, NARROW_STEPS, 0):
        size = best_steps(moved, steps) if steps else np.zeros(dimension, np.float32)
        read = middle + (rounded(moved, size, steps) * size if steps else np.zeros_like(moved))
        start = np.zeros((len(rows), 1))
        kept[steps] = (
            np.concatenate([start, np.cumsum(own * read, 1, dtype=np.float64)], 1),
            np.concatenate([start, np.cumsum(read * read, 1, dtype=np.float64)], 1),
        )

    def cosine(wide: int, rank: int) -> float:
        dot, square = (
            kept[WIDE_STEPS][i][:, wide]
            + (kept[NARROW_STEPS][i][:, rank] - kept[NARROW_STEPS][i][:, wide])
            + (kept[0][i][:, -1] - kept[0][i][:, rank])
            for i in (0, 1)
        )
        lengths = norms * np.sqrt(square.clip(min=0))
        return float(np.divide(dot, lengths, out=np.ones_like(dot), where=lengths > 0).mean()) if len(dot) else 1.0

    for size in range(1, dimension + 1):
        choices = [(wide, min(wide + 2 * (size - wide), dimension)) for wide in range(size + 1)]
        found = [cosine(wide, rank) for wide, rank in choices]
        best = int(np.argmax(found))
        if found[best] >= AIMED_COSINE:
            return choices[best][1], choices[best][0]
    return dimension, dimension


def _train(rows: NDArray[np.float32], count: int, generator: torch.Generator) -> CodeBooks:
    dimension = rows.shape[1]
    width = math.ceil(dimension / count)
    count = math.ceil(dimension / width)
    padded = torch.zeros(len(rows), count * width)
    padded[:, :dimension] = torch.from_numpy(rows)
    centres = torch.zeros(count, CODES, width)
    for book in range(count):
        _, found = kmeans(padded[:, book * width : (book + 1) * width], CODES, generator, _ITERATIONS)
        centres[book, : len(found)] = found
        centres[book, len(found) :] = found[:1] if len(found) else 0
    return CodeBooks(centres.numpy(), dimension)


def _mean_cosine(features: NDArray[np.float32], read: NDArray[np.float32]) -> float:
    norms = np.linalg.norm(features, axis=1) * np.linalg.norm(read, axis=1)
    return (
        float(np.divide((features * read).sum(1), norms, out=np.ones(len(norms)), where=norms > 0).mean())
        if len(norms)
        else 1.0
    )


def _text(array: NDArray[np.float32]) -> str:
    return base64.b64encode(np.ascontiguousarray(array, "<f4").tobytes()).decode()


def _array(text: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    if min(shape) < 0 or any(side > 1 << 20 for side in shape):
        raise ValueError(f"the basis has an array of shape {shape}")
    data = base64.b64decode(text, validate=True)
    if len(data) != 4 * math.prod(shape):
        raise ValueError(f"the basis has {len(data)} bytes where {shape} numbers belong")
    array = np.frombuffer(data, "<f4").reshape(shape).astype(np.float32)
    if not np.isfinite(array).all():
        raise ValueError("the basis holds a number that is not finite")
    return array
