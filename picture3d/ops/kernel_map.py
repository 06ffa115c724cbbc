"""Kernel maps: which input voxel meets which output voxel under which kernel offset, found by sorted search.

A voxel set is a table of integer rows (batch, x, y, z), unique and sorted. A map is a value: inspect it, reuse it for
every layer that works on the same sets, turn it round for the transposed layer.

Conventions, those of MinkowskiEngine: the kernel index runs fastest along x, ``k = ix + kx * (iy + ky * iz)``; odd
sizes are centred, even sizes start at zero; an offset counts in units of ``dilation * tensor_stride`` of the finer set;
``c_in = c_out + offset``; strided sets are ``floor(c / stride) * stride``, towards minus infinity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Triple = tuple[int, int, int]
_KEY_LIMIT = 2**63 - 1


@dataclass(frozen=True, slots=True, eq=False)
class KernelMap:
    """Pairs of voxels that meet in a convolution, grouped by kernel index, within a group in ascending order of both rows."""

    in_rows: Tensor  # (P,) int64: rows of the input; the identity's pairs are not listed
    out_rows: Tensor  # (P,) int64: rows of the output
    counts: tuple[int, ...]  # listed pairs of each of the K offsets; 0 for the identity
    kernel_size: Triple  # K = the product
    in_coords: Tensor  # (M_in, 4) integer
    out_coords: Tensor  # (M_out, 4) integer
    identity: int | None = None  # kernel index that joins every row with itself (the centre, on one and the same set)
    out_once: bool = False  # every output row is in exactly one pair
    in_once: bool = False  # every input row is in exactly one pair

    @property
    def volume(self) -> int:
        """K, the number of kernel offsets."""
        return len(self.counts)

    @property
    def num_in(self) -> int:
        """Rows of the input."""
        return self.in_coords.shape[0]

    @property
    def num_out(self) -> int:
        """Rows of the output."""
        return self.out_coords.shape[0]

    @property
    def num_pairs(self) -> int:
        """Products of a row with a kernel slice, the identity's included."""
        return sum(self.counts) + (self.num_out if self.identity is not None else 0)

    def pairs(self, k: int) -> tuple[Tensor, Tensor]:
        """Input rows and output rows that meet under kernel index `k`, the identity's written out."""
        if k == self.identity:
            rows = torch.arange(self.num_out, device=self.in_rows.device)
            return rows, rows
        start = sum(self.counts[:k])
        return self.in_rows[start : start + self.counts[k]], self.out_rows[start : start + self.counts[k]]

    def transposed(self) -> KernelMap:
        """The map of the transposed layer: the same pairs and kernel indices, input and output exchanged."""
        return replace(
            self,
            in_rows=self.out_rows,
            out_rows=self.in_rows,
            in_coords=self.out_coords,
            out_coords=self.in_coords,
            out_once=self.in_once,
            in_once=self.out_once,
        )

    def to(self, device: torch.device | str) -> KernelMap:
        """The same map on another device."""
        moved = {name: getattr(self, name).to(device) for name in ("in_rows", "out_rows", "in_coords", "out_coords")}
        return replace(self, **moved)


def build_kernel_map(
    coords: Tensor,
    kernel_size: int | Triple,
    *,
    stride: int | Triple = 1,
    dilation: int | Triple = 1,
    tensor_stride: int | Triple = 1,
    out_coords: Tensor | None = None,
) -> KernelMap:
    """The map of a submanifold (`stride` 1) or strided convolution; its `transposed()` serves the layer that goes back.

    Args:
        coords: (M, 4) int32 or int64 rows (batch, x, y, z) of the input, unique and sorted; negative values are fine.
        kernel_size: any size from 1 on, odd or even, one for all axes or one per axis.
        stride: of the layer; 1 keeps the set of voxels.
        dilation: spacing of the kernel's taps.
        tensor_stride: spacing of `coords`; every coordinate is a multiple of it.
        out_coords: (M', 4) output set, sorted like `coords`, where it exists already; by default `coords` itself for
            stride 1 and the set of ``floor(c / s) * s`` otherwise, s being ``tensor_stride * stride``.

    Returns:
        The map, on the device of `coords`.

    Raises:
        ValueError: naming the argument, for rows that are not unique and sorted, coordinates that are not multiples of the
            tensor stride, sizes below 1, or voxels so far apart that a 64-bit key cannot number the cells between them.
    """
    size, step = _triple("kernel_size", kernel_size), _triple("stride", stride)
    spread, unit = _triple("dilation", dilation), _triple("tensor_stride", tensor_stride)
    _check_table("coords", coords)
    if out_coords is None and step != (1, 1, 1) and size == step and spread == (1, 1, 1):
        return _tiled(coords, size, unit)
    same_set = out_coords is None and step == (1, 1, 1)
    if out_coords is not None:
        _check_table("out_coords", out_coords)
        if out_coords.device != coords.device:
            raise ValueError(f"out_coords are on {out_coords.device}, coords on {coords.device}: move one of them")
        targets = out_coords
    else:
        targets = coords if same_set else stride_coords(coords, step, tensor_stride=unit)
    low = [-(s // 2) * d if s % 2 else 0 for s, d in zip(size, spread, strict=True)]
    high = [(s // 2) * d if s % 2 else (s - 1) * d for s, d in zip(size, spread, strict=True)]
    inside, outside = _units("coords", coords, unit), _units("out_coords", targets, unit)
    numbers = _Numbering.around([(inside, (0, 0, 0), (0, 0, 0)), (outside, low, high)])
    keys = numbers.keys(inside)
    _check_sorted("coords", keys)
    if same_set:
        out_keys = keys
    else:
        out_keys = numbers.keys(outside)
        _check_sorted("out_coords", out_keys)
    symmetric = same_set and all(s % 2 for s in size)
    ins, outs = _search(keys, out_keys, size, spread, low, numbers, symmetric=symmetric)
    return KernelMap(
        in_rows=torch.cat(ins),
        out_rows=torch.cat(outs),
        counts=tuple(len(rows) for rows in ins),
        kernel_size=size,
        in_coords=coords,
        out_coords=targets,
        identity=math.prod(size) // 2 if symmetric else None,
    )


def stride_coords(coords: Tensor, stride: int | Triple, *, tensor_stride: int | Triple = 1) -> Tensor:
    """The coarser set: unique, sorted ``floor(c / s) * s`` with ``s = tensor_stride * stride``, in the dtype of `coords`.

    Args:
        coords: (M, 4) integer rows (batch, x, y, z), in any order.
        stride: of the layer.
        tensor_stride: spacing of `coords`.

    Returns:
        (M', 4) rows, unique and sorted.

    Raises:
        ValueError: as :func:`build_kernel_map`.
    """
    step, unit = _triple("stride", stride), _triple("tensor_stride", tensor_stride)
    _check_table("coords", coords)
    parents, _ = _unique_units(_units("coords", coords, _times(unit, step), exact=False))
    return _scaled(parents, _times(unit, step)).to(coords.dtype)


def unique_coords(coords: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Makes a voxel set of rows that may repeat: sorted, and of equal rows the first one stands for all.

    Args:
        coords: (N, 4) integer rows (batch, x, y, z).

    Returns:
        The set (M, 4) in the dtype of `coords`; first (M,) int64, the first row of each voxel; inverse (N,) int64, the
        voxel of each row.

    Raises:
        ValueError: as :func:`build_kernel_map`.
    """
    _check_table("coords", coords)
    values, inverse = _unique_units(coords.long())
    first = torch.full((len(values),), len(coords), dtype=torch.int64, device=coords.device)
    first.scatter_reduce_(0, inverse, torch.arange(len(coords), device=coords.device), "amin")
    return values.to(coords.dtype), first, inverse


def kernel_offsets(kernel_size: int | Triple, dilation: int | Triple = 1) -> tuple[Triple, ...]:
    """The K offsets (x, y, z) in the order of the kernel index, in units of the finer set's tensor stride."""
    size, spread = _triple("kernel_size", kernel_size), _triple("dilation", dilation)
    first = [-(s // 2) if s % 2 else 0 for s in size]
    return tuple(
        ((first[0] + ix) * spread[0], (first[1] + iy) * spread[1], (first[2] + iz) * spread[2])
        for iz in range(size[2])
        for iy in range(size[1])
        for ix in range(size[0])
    )


@dataclass(frozen=True, slots=True)
class _Numbering:
    """Numbers the cells of a box of (batch, x, y, z) in order, so that sums of keys are sums of coordinates."""

    low: tuple[int, int, int, int]
    cells: tuple[int, int, int, int]

    @staticmethod
    def around(tables: list[tuple[Tensor, list[int] | Triple, list[int] | Triple]]) -> _Numbering:
        """A box around every table, each grown by the offsets that its voxels will be moved by."""
        lows, highs = [], []
        for table, below, above in tables:
            if len(table):
                low, high = torch.stack(torch.aminmax(table, dim=0)).tolist()
                lows.append([a + b for a, b in zip(low, (0, *below), strict=True)])
                highs.append([a + b for a, b in zip(high, (0, *above), strict=True)])
        if not lows:
            return _Numbering((0, 0, 0, 0), (1, 1, 1, 1))
        b, x, y, z = (min(column) for column in zip(*lows, strict=True))
        nb, nx, ny, nz = (max(column) - low + 1 for column, low in zip(zip(*highs, strict=True), (b, x, y, z), strict=True))
        if nb * nx * ny * nz > _KEY_LIMIT:
            raise ValueError(
                f"coords span {nb} x {nx} x {ny} x {nz} cells (batch, x, y, z): more than a 64-bit key can number. "
                "Crop the points to a range first."
            )
        return _Numbering((b, x, y, z), (nb, nx, ny, nz))

    def keys(self, table: Tensor) -> Tensor:
        """(M,) int64."""
        (b0, x0, y0, z0), (_, nx, ny, nz) = self.low, self.cells
        b, x, y, z = table.unbind(1)
        return (((b - b0) * nx + (x - x0)) * ny + (y - y0)) * nz + (z - z0)

    def table(self, keys: Tensor) -> Tensor:
        """(M, 4) int64, back from keys."""
        (b0, x0, y0, z0), (_, nx, ny, nz) = self.low, self.cells
        rest, z = keys // nz, keys % nz
        rest, y = rest // ny, rest % ny
        return torch.stack([rest // nx + b0, rest % nx + x0, y + y0, z + z0], 1)

    def offset(self, x: int, y: int, z: int) -> int:
        """What a step adds to a key."""
        return (x * self.cells[2] + y) * self.cells[3] + z


def _search(
    keys: Tensor, out_keys: Tensor, size: Triple, spread: Triple, low: list[int], numbers: _Numbering, *, symmetric: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Rows of both sides per kernel index. One binary search finds a whole z column of the kernel: its taps are neighbours
    in the sorted keys. On one set, with a centred kernel, half of the columns are the other half turned round.
    """
    kx, ky, kz = size
    volume = kx * ky * kz
    nothing = keys.new_empty(0)
    ins, outs = [nothing] * volume, [nothing] * volume
    padded = torch.cat([keys, keys.new_full((1,), torch.iinfo(torch.int64).max)])
    middle = (kx // 2, ky // 2, kz // 2)
    for ix in range(kx):
        for iy in range(ky):
            first = 0
            if symmetric:
                if (ix, iy) < middle[:2]:
                    continue
                if (ix, iy) == middle[:2]:
                    first = middle[2] + 1  # above the voxel itself; the centre is the identity and is not listed
            if first == kz:
                continue
            step = numbers.offset(low[0] + ix * spread[0], low[1] + iy * spread[1], low[2] + first * spread[2])
            target = out_keys + step
            position = torch.searchsorted(keys, target)
            for iz in range(first, kz):
                found = padded[position] == target
                rows = found.nonzero().squeeze(1)
                k = ix + kx * (iy + ky * iz)
                ins[k], outs[k] = position[rows], rows
                if symmetric:
                    ins[volume - 1 - k], outs[volume - 1 - k] = rows, ins[k]
                if iz + 1 < kz:
                    target = target + spread[2]
                    position = position + found if spread[2] == 1 else torch.searchsorted(keys, target)
    return ins, outs


def _tiled(coords: Tensor, size: Triple, unit: Triple) -> KernelMap:
    """Kernel and stride of one size: every input lies in the tile of exactly one output, at a known tap."""
    inside = _units("coords", coords, unit)
    _check_sorted("coords", _Numbering.around([(inside, (0, 0, 0), (0, 0, 0))]).keys(inside))
    step = torch.tensor((1, *size), device=coords.device)
    parents = torch.div(inside, step, rounding_mode="floor")
    tap = inside - parents * step
    index = tap[:, 1] + size[0] * (tap[:, 2] + size[1] * tap[:, 3])
    outputs, parent_row = _unique_units(parents)
    order = torch.argsort(index, stable=True)
    return KernelMap(
        in_rows=order,
        out_rows=parent_row[order],
        counts=tuple(torch.bincount(index, minlength=math.prod(size)).tolist()),
        kernel_size=size,
        in_coords=coords,
        out_coords=_scaled(outputs, _times(unit, size)).to(coords.dtype),
        in_once=True,
    )


def _unique_units(table: Tensor) -> tuple[Tensor, Tensor]:
    """Unique sorted rows (M', 4) int64 and the row of each input row."""
    numbers = _Numbering.around([(table, (0, 0, 0), (0, 0, 0))])
    keys, inverse = torch.unique(numbers.keys(table), return_inverse=True)
    return numbers.table(keys), inverse


def _units(argument: str, coords: Tensor, unit: Triple, *, exact: bool = True) -> Tensor:
    """(M, 4) int64 coordinates counted in units of the tensor stride."""
    table = coords.long()
    if unit == (1, 1, 1):
        return table
    divisor = torch.tensor((1, *unit), device=coords.device)
    counted = torch.div(table, divisor, rounding_mode="floor")
    if exact and not torch.equal(counted * divisor, table):
        raise ValueError(f"{argument} must be multiples of the tensor stride {unit}")
    return counted


def _scaled(table: Tensor, unit: Triple) -> Tensor:
    return table * torch.tensor((1, *unit), device=table.device)


def _times(a: Triple, b: Triple) -> Triple:
    return a[0] * b[0], a[1] * b[1], a[2] * b[2]


def _triple(argument: str, value: int | Triple) -> Triple:
    x, y, z = (value, value, value) if isinstance(value, int) else (int(v) for v in value)
    if min(x, y, z) < 1:
        raise ValueError(f"{argument} must be at least 1 along every axis, got {value}")
    return x, y, z


def _check_table(argument: str, coords: Tensor) -> None:
    if coords.ndim != 2 or coords.shape[1] != 4 or coords.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{argument} must be (M, 4) int32 or int64 rows (batch, x, y, z), got {tuple(coords.shape)} {coords.dtype}"
        )


def _check_sorted(argument: str, keys: Tensor) -> None:
    if not bool((keys[1:] > keys[:-1]).all()):
        raise ValueError(f"{argument} must be unique and sorted by (batch, x, y, z): unique_coords makes them so")
