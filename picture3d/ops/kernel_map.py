"""Which input row meets which output row under which kernel offset: the whole of a sparse convolution but its arithmetic.

Conventions are MinkowskiEngine's, so that checkpoints in its layout mean the same here: the first axis of the kernel is the
fastest, ``k = ix + kx * (iy + ky * iz)``; odd sizes are centred (offset ``i - size // 2``), even sizes start at 0 (offset
``i``); offsets count in steps of dilation times tensor stride; ``out[o] = sum_k in[i] @ kernel[k]``, ``c_i = c_o + offset_k``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

Triple = tuple[int, int, int]
_KEY_LIMIT = 2**62


@dataclass(frozen=True, eq=False)
class KernelMap:
    """Pairs of rows, grouped by kernel offset in ascending order; within an offset each output row occurs at most once."""

    in_rows: Tensor  # (P,) int64
    out_rows: Tensor  # (P,) int64
    starts: tuple[int, ...]  # K + 1 entries: the pairs of offset k are starts[k] .. starts[k + 1]
    num_in: int
    num_out: int
    identity: int | None  # the offset under which row i meets row i, for every i; None where there is none

    @property
    def num_offsets(self) -> int:
        """K, the number of kernel offsets."""
        return len(self.starts) - 1

    @property
    def num_pairs(self) -> int:
        """P, the number of (input row, output row, offset) triples."""
        return self.starts[-1]

    def pairs(self, offset: int) -> tuple[Tensor, Tensor]:
        """Input rows and output rows that meet under one offset."""
        rows = slice(self.starts[offset], self.starts[offset + 1])
        return self.in_rows[rows], self.out_rows[rows]

    @cached_property
    def transposed(self) -> KernelMap:
        """The same pairs with input and output exchanged and the same offsets: the map of the transposed convolution."""
        return KernelMap(self.out_rows, self.in_rows, self.starts, self.num_out, self.num_in, self.identity)


def kernel_offsets(kernel_size: Triple, dilation: Triple = (1, 1, 1)) -> list[Triple]:
    """The K offsets in kernel order, in steps of the tensor stride."""
    kx, ky, kz = kernel_size
    low = [0 if size % 2 == 0 else -(size // 2) for size in kernel_size]
    return [
        ((ix + low[0]) * dilation[0], (iy + low[1]) * dilation[1], (iz + low[2]) * dilation[2])
        for iz in range(kz)
        for iy in range(ky)
        for ix in range(kx)
    ]


def submanifold_map(
    coords: Tensor, kernel_size: Triple = (3, 3, 3), *, tensor_stride: Triple = (1, 1, 1), dilation: Triple = (1, 1, 1)
) -> KernelMap:
    """Map of a stride-1 convolution: outputs are the inputs.

    Args:
        coords: (N, 4) integer batch, x, y, z; unique rows in any order, multiples of `tensor_stride`.
        kernel_size: cells along x, y, z, odd or even.
        tensor_stride: spacing of the coordinates.
        dilation: spacing of the kernel, in tensor strides.

    Raises:
        ValueError: for wrong shapes or sizes, or coordinates too far apart for 62-bit keys.
    """
    _check(coords, kernel_size, dilation)
    lattice = _Lattice(coords, coords, tensor_stride, kernel_size, dilation)
    offsets = kernel_offsets(kernel_size, dilation)
    count = len(coords)
    every = torch.arange(count, device=coords.device)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    place = {offset: k for k, offset in enumerate(offsets)}
    for k, offset in enumerate(offsets):
        if k in found:
            continue
        if offset == (0, 0, 0):
            found[k] = (every, every)
            continue
        found[k] = lattice.meet(offset)
        # If i lies at offset d from o, then o lies at offset -d from i: half of the searches are enough.
        mirrored = place.get((-offset[0], -offset[1], -offset[2]))
        if mirrored is not None:
            rows_in, rows_out = found[k]
            order = rows_in.argsort()
            found[mirrored] = (rows_out[order], rows_in[order])
    return _collect([found[k] for k in range(len(offsets))], count, count, place.get((0, 0, 0)))


def strided_map(
    coords: Tensor,
    kernel_size: Triple = (2, 2, 2),
    stride: Triple = (2, 2, 2),
    *,
    tensor_stride: Triple = (1, 1, 1),
    dilation: Triple = (1, 1, 1),
) -> tuple[Tensor, KernelMap]:
    """Output coordinates and map of a strided convolution.

    Args:
        coords: (N, 4) integer batch, x, y, z; unique rows, multiples of `tensor_stride`.
        kernel_size: cells along x, y, z.
        stride: steps along x, y, z, in tensor strides.
        tensor_stride: spacing of the input coordinates.
        dilation: spacing of the kernel, in tensor strides.

    Returns:
        (M, 4) int32 output coordinates: unique ``floor(c / (tensor_stride * stride)) * (tensor_stride * stride)``, floored
        towards minus infinity, sorted by (batch, x, y, z); and the map.
    """
    _check(coords, kernel_size, dilation)
    if min(stride) < 1:
        raise ValueError(f"stride must be at least 1 along each axis, got {stride}")
    step = torch.tensor([t * s for t, s in zip(tensor_stride, stride, strict=True)], device=coords.device)
    wide = coords.to(torch.int64)
    coarse = torch.cat([wide[:, :1], torch.div(wide[:, 1:], step, rounding_mode="floor") * step], dim=1)
    keys = _Packing(coarse, coarse, (0, 0, 0)).keys(coarse)
    unique_keys, parent = torch.unique(keys, return_inverse=True)
    count = len(unique_keys)
    out = wide.new_zeros((count, 4))
    out[parent] = coarse
    if kernel_size == stride and dilation == (1, 1, 1) and all(size % 2 == 0 or size == 1 for size in kernel_size):
        # Every input has exactly one parent, and its place below the parent is the kernel offset.
        spacing = torch.tensor(tensor_stride, device=coords.device)
        ix, iy, iz = torch.div(wide[:, 1:] - coarse[:, 1:], spacing, rounding_mode="floor").unbind(1)
        offset = ix + kernel_size[0] * (iy + kernel_size[1] * iz)
        order = torch.argsort(offset * count + parent)
        sizes = torch.bincount(offset, minlength=kernel_size[0] * kernel_size[1] * kernel_size[2]).tolist()
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + size)
        kmap = KernelMap(order, parent[order], tuple(starts), len(coords), count, None)
    else:
        lattice = _Lattice(coords, out, tensor_stride, kernel_size, dilation)
        pairs = [lattice.meet(offset) for offset in kernel_offsets(kernel_size, dilation)]
        kmap = _collect(pairs, len(coords), count, None)
    return out.to(torch.int32), kmap


class _Packing:
    """Coordinates as int64 keys, with room for neighbours on every side so that no key wraps into the next row."""

    def __init__(self, a: Tensor, b: Tensor, reach: Triple) -> None:
        both = [t[:, 1:] for t in (a, b) if len(t)]
        pad = torch.tensor(reach, dtype=torch.int64)
        if both:
            low = torch.stack([t.amin(0) for t in both]).amin(0).cpu()
            high = torch.stack([t.amax(0) for t in both]).amax(0).cpu()
            samples = max(int(t[:, 0].max()) for t in (a, b) if len(t)) + 1
        else:
            low, high, samples = torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), 1
        self.low = (low - pad).tolist()
        self.extent = (high - low + 2 * pad + 1).tolist()
        cells = samples * self.extent[0] * self.extent[1] * self.extent[2]
        if cells >= _KEY_LIMIT:
            raise ValueError(f"coords span {self.extent} cells in {samples} samples: more than a 62-bit key can tell apart")

    def keys(self, coords: Tensor) -> Tensor:
        b, x, y, z = coords.unbind(1)
        ex, ey, ez = self.extent
        return ((b * ex + (x - self.low[0])) * ey + (y - self.low[1])) * ez + (z - self.low[2])

    def shift(self, offset: Triple) -> int:
        return (offset[0] * self.extent[1] + offset[1]) * self.extent[2] + offset[2]


class _Lattice:
    """Input and output coordinates in units of the input's tensor stride, as sorted keys that can be searched."""

    def __init__(
        self, coords_in: Tensor, coords_out: Tensor, tensor_stride: Triple, kernel_size: Triple, dilation: Triple
    ) -> None:
        spacing = torch.tensor([1, *tensor_stride], device=coords_in.device)
        a = torch.div(coords_in.to(torch.int64), spacing, rounding_mode="floor")
        b = a if coords_out is coords_in else torch.div(coords_out.to(torch.int64), spacing, rounding_mode="floor")
        reach = (kernel_size[0] * dilation[0], kernel_size[1] * dilation[1], kernel_size[2] * dilation[2])
        self.packing = _Packing(a, b, reach)
        self.sorted_in, self.order_in = torch.sort(self.packing.keys(a))
        if b is a:
            self.targets, self.order_out = self.sorted_in, self.order_in
        else:
            self.targets, self.order_out = torch.sort(self.packing.keys(b))
        # A last entry that nothing equals, so that a search past the end needs no special case.
        self.padded = torch.cat([self.sorted_in, self.sorted_in.new_full((1,), torch.iinfo(torch.int64).max)])

    def meet(self, offset: Triple) -> tuple[Tensor, Tensor]:
        """Rows (in, out) of all pairs with ``c_in = c_out + offset``; in ascending order of the output's key."""
        target = self.targets + self.packing.shift(offset)
        # Queries are sorted, so the search walks forward through cache.
        position = torch.searchsorted(self.sorted_in, target)
        hit = (self.padded[position] == target).nonzero().squeeze(1)
        return self.order_in[position[hit]], self.order_out[hit]


def _collect(pairs: list[tuple[Tensor, Tensor]], num_in: int, num_out: int, identity: int | None) -> KernelMap:
    starts = [0]
    for rows, _ in pairs:
        starts.append(starts[-1] + len(rows))
    in_rows = torch.cat([rows for rows, _ in pairs])
    out_rows = torch.cat([rows for _, rows in pairs])
    return KernelMap(in_rows, out_rows, tuple(starts), num_in, num_out, identity)


def _check(coords: Tensor, kernel_size: Triple, dilation: Triple) -> None:
    if coords.ndim != 2 or coords.shape[1] != 4:
        raise ValueError(f"coords must be (N, 4) batch, x, y, z, got {tuple(coords.shape)}")
    if coords.is_floating_point():
        raise ValueError(f"coords must be integers, got {coords.dtype}")
    if min(kernel_size) < 1 or min(dilation) < 1:
        raise ValueError(f"kernel_size and dilation must be at least 1 along each axis, got {kernel_size} and {dilation}")
