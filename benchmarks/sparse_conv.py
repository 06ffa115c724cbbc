"""Sparse convolution: the whole Res16UNet34C on one sweep against its own matrix products, its kernel maps, single layers.

    python benchmarks/sparse_conv.py [--sweep FILE.pcd.bin] [--threads 1] [--repeats 7] [--device cpu]

The sweep is the sample data's nuScenes one where that folder is present, a synthetic town's otherwise. First checks that the
network with folded norms gives the numbers of the plain one. Rounds take every row in turn, so that other load meets all of
them; the least and the median are printed, in processor seconds at one thread and in wall seconds otherwise.

Where `spconv` can be imported, its submanifold layer is compared with ours and timed beside it: native algorithm, without
gradients. Its CPU wheel goes into a folder by ``pip install --target FOLDER --no-deps spconv cumm pccm ccimport pybind11 fire
termcolor portalocker lark ninja``; then ``PYTHONPATH=FOLDER``. The forward's peak of memory is what torch had
allocated at most at one time, input and weights not counted.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from picture3d.models.minkunet import MinkUNet, UNetMaps, build_unet_maps
from picture3d.models.sparse_layers import ResidualBlock, SparseConv
from picture3d.ops.kernel_map import KernelMap, build_kernel_map
from picture3d.ops.quantize import Quantisation, quantise_points
from picture3d.ops.sparse_conv import sparse_conv
from picture3d.synthetic.drive import DriveConfig, drive
from picture3d.teachers.town.teacher import load_town_teacher

SAMPLE = "nuscenes/sample_ca9a282c"
CYLINDRICAL = Quantisation()
CARTESIAN = {0.1: Quantisation("cartesian", (0.1, 0.1, 0.1)), 0.05: Quantisation("cartesian", (0.05, 0.05, 0.05))}


def main() -> None:
    """Checks, times and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", type=Path, help="float32 rows x, y, z, intensity, ring")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device(options.device)
    xyz, intensity, source = load_sweep(options.sweep)

    coords, feats = cells(xyz, intensity, CYLINDRICAL, device)
    maps = build_unet_maps(coords)
    plain = MinkUNet().to(device).eval()
    network = plain.folded()
    half, half_feats = plain.folded().to(torch.bfloat16), feats.to(torch.bfloat16)
    with torch.inference_mode():
        difference = (network(feats, maps) - plain(feats, maps)).abs().max().item()
        cosine = torch.cosine_similarity(half(half_feats, maps).float(), network(feats, maps))
    assert difference < 1e-4, f"folded and plain network differ by {difference}"
    products = list(network_products(network, maps))
    work = sum(rows * weight.shape[0] * weight.shape[1] for rows, weight in products) / 1e9
    print(f"{source}: {len(xyz):,} points, {len(coords):,} cylindrical cells, {work:.1f} GMAC")
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, {options.threads} in use, torch {torch.__version__}, {device}, float32"
    )
    print(f"folded against plain network: largest difference {difference:.1e}")
    print(f"bfloat16 against float32, cosine of the output rows: mean {cosine.mean():.5f}, least {cosine.min():.5f}")

    rows: dict[str, Callable[[], object]] = {
        "network, maps rebuilt": lambda: network(feats, build_unet_maps(coords)),
        "network, maps given": lambda: network(feats, maps),
        "its matrix products alone": multiplier(products, device),
        "its nine kernel maps": lambda: build_unet_maps(coords),
    }
    rows["network in bfloat16, maps given"] = lambda: half(half_feats, maps)
    town = load_town_teacher(device)
    town_coords, town_feats = cells(xyz, intensity / 255, town.quantisation, device)
    rows["town network, maps rebuilt"] = lambda: town.network(town_feats, build_unet_maps(town_coords))
    for size, quantisation in CARTESIAN.items():
        rows |= layer_rows(size, cells(xyz, intensity, quantisation, device)[0])
    times = timed(rows, options.repeats, device, processor=options.threads == 1)
    print(f"{'':44s}{'least ms':>10s}{'median ms':>11s}")
    for name, found in times.items():
        print(f"{name:44s}{1000 * min(found):10.1f}{1000 * statistics.median(found):11.1f}")
    pairs = zip(times["network, maps rebuilt"], times["its matrix products alone"], strict=True)
    ratio = statistics.median(whole / alone for whole, alone in pairs)
    share = min(times["its nine kernel maps"]) / min(times["network, maps rebuilt"])
    largest, name = largest_layer(network, maps)
    peak = peak_bytes(lambda: network(feats, maps), device)
    with_maps = peak_bytes(rows["network, maps rebuilt"], device)
    print(
        f"peak memory of the forward, maps given: {peak / 1e6:.1f} MB, {peak / largest:.2f} times input + output + map "
        f"of the largest layer ({name}, {largest / 1e6:.1f} MB); with its maps {with_maps / 1e6:.1f} MB"
    )
    print(f"whole call / its matrix products, median over rounds: {ratio:.2f}; kernel maps: {100 * share:.1f} % of the call")


def largest_layer(network: MinkUNet, maps: UNetMaps) -> tuple[int, str]:
    """Bytes of input, output and kernel map of the convolution where they are most, and its name."""
    stages = {"conv0p1s1": maps.stem}
    for level in range(4):
        stages[f"conv{level + 1}p{2**level}s2"] = maps.down[level]
        stages[f"block{level + 1}"] = maps.same[level + 1]
        stages[f"convtr{7 - level}p{2 ** (level + 1)}s2"] = maps.down[level].transposed()
        stages[f"block{8 - level}"] = maps.same[level]
    found = []
    for stage, kmap in stages.items():
        tables = (kmap.in_rows, kmap.out_rows, kmap.in_coords, kmap.out_coords)
        size = sum(table.untyped_storage().nbytes() for table in {table.data_ptr(): table for table in tables}.values())
        for name, layer in network.get_submodule(stage).named_modules():
            if isinstance(layer, SparseConv) and not layer.pointwise:
                _, wide, out = layer.kernel.shape
                values = kmap.num_in * wide + kmap.num_out * out
                found.append((size + values * layer.kernel.element_size(), f"{stage}.{name}".rstrip(".")))
    return max(found)


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Most bytes that were allocated at one time during a call, beyond those before it."""
    with torch.inference_mode():
        call()
        if device.type == "cuda":
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            call()
            return torch.cuda.max_memory_allocated(device) - before
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            result = call()
    del result
    results = recorded.profiler.kineto_results if recorded.profiler is not None else None
    assert results is not None
    now = most = 0
    for event in sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
        most = max(most, now)
    return most


def load_sweep(path: Path | None) -> tuple[Tensor, Tensor, str]:
    """(N, 3) metres and (N,) intensity 0..255 of a sweep, and where it is from."""
    if path is None:
        folder = Path(os.environ.get("PICTURE3D_DATA", "../shared/data")) / SAMPLE
        path = next(iter(sorted(folder.glob("*LIDAR_TOP*.bin"))), None)
    if path is None:
        points = next(drive(7, DriveConfig(keyframes=1))).sweep.points
        return torch.from_numpy(points.xyz), torch.from_numpy(points.intensity), "town 7"
    table = torch.from_numpy(np.fromfile(path, dtype=np.float32).reshape(-1, 5))
    return table[:, :3].contiguous(), table[:, 3].contiguous(), "real nuScenes sweep"


def cells(xyz: Tensor, intensity: Tensor, quantisation: Quantisation, device: torch.device) -> tuple[Tensor, Tensor]:
    """(M, 4) voxels of one sample and (M, 1) features."""
    found = quantise_points(xyz.to(device), quantisation)
    coords = torch.cat([torch.zeros_like(found.cells[:, :1]), found.cells], 1)
    return coords, intensity.to(device)[found.representative, None]


def network_products(network: MinkUNet, maps: UNetMaps) -> Iterator[tuple[int, Tensor]]:
    """(rows, (C_in, C_out) matrix) of every matrix product in one forward call of the folded network."""
    yield from layer_products(network.conv0p1s1, maps.stem)
    for level in range(4):
        yield from layer_products(network.get_submodule(f"conv{level + 1}p{2**level}s2"), maps.down[level])
        yield from stage_products(network.get_submodule(f"block{level + 1}"), maps.same[level + 1])
    for level in reversed(range(4)):
        yield from layer_products(network.get_submodule(f"convtr{7 - level}p{2 ** (level + 1)}s2"), maps.down[level])
        yield from stage_products(network.get_submodule(f"block{8 - level}"), maps.same[level])
    yield maps.same[0].num_out, network.final.kernel


def stage_products(blocks: torch.nn.Module, kmap: KernelMap) -> Iterator[tuple[int, Tensor]]:
    """Of the residual blocks of a stage."""
    for block in blocks.children():
        assert isinstance(block, ResidualBlock)
        yield from layer_products(block.conv1, kmap)
        yield from layer_products(block.conv2, kmap)
        if block.downsample is not None:
            yield kmap.num_out, block.downsample[0].get_parameter("kernel")


def layer_products(conv: torch.nn.Module, kmap: KernelMap) -> Iterator[tuple[int, Tensor]]:
    """One per kernel offset that joins any voxels."""
    assert isinstance(conv, SparseConv)
    for k in range(kmap.volume):
        count = len(kmap.pairs(k)[0])
        if count:
            yield count, conv.kernel[k]


def multiplier(products: list[tuple[int, Tensor]], device: torch.device) -> Callable[[], None]:
    """Runs the products one after the other on rows that lie ready, results into memory that lies ready."""
    rows = torch.randn(max(count * matrix.shape[0] for count, matrix in products), device=device)
    results = torch.empty(max(count * matrix.shape[1] for count, matrix in products), device=device)
    calls = [
        (rows[: n * m.shape[0]].view(n, -1), m.detach(), results[: n * m.shape[1]].view(n, m.shape[1])) for n, m in products
    ]

    def run() -> None:
        for left, right, out in calls:
            torch.mm(left, right, out=out)

    return run


def layer_rows(size: float, coords: Tensor) -> dict[str, Callable[[], object]]:
    """One submanifold layer at 32 and 96 channels, and its map."""
    kmap = build_kernel_map(coords, 3)
    rows: dict[str, Callable[[], object]] = {f"map 3x3x3, {size} m, {len(coords):,} cells": lambda: build_kernel_map(coords, 3)}
    for channels in (32, 96):
        feats = torch.randn(len(coords), channels, device=coords.device, requires_grad=True)
        kernel = torch.randn(27, channels, channels, device=coords.device, requires_grad=True)
        grad = torch.randn_like(feats)

        def forward(feats: Tensor = feats, kernel: Tensor = kernel) -> Tensor:
            with torch.no_grad():
                return sparse_conv(feats, kernel, kmap)

        def both(feats: Tensor = feats, kernel: Tensor = kernel, grad: Tensor = grad) -> None:
            feats.grad = kernel.grad = None
            sparse_conv(feats, kernel, kmap).backward(grad)

        rows[f"layer 3x3x3, {size} m, {channels} channels, forward"] = forward
        rows[f"layer 3x3x3, {size} m, {channels} channels, with backward"] = both
        if coords.device.type == "cpu" and importlib.util.find_spec("spconv") is not None:
            rows |= peer_rows(size, coords, feats.detach(), kernel.detach(), forward)
    return rows


def peer_rows(
    size: float, coords: Tensor, feats: Tensor, kernel: Tensor, ours: Callable[[], Tensor]
) -> dict[str, Callable[[], object]]:
    """The same layer of spconv, whose numbers are first compared with ours."""
    import spconv.pytorch as spconv  # pyright: ignore[reportMissingImports]

    channels = feats.shape[1]
    layer = spconv.SubMConv3d(channels, channels, 3, bias=False, indice_key="map", algo=spconv.ConvAlgo.Native)
    with torch.no_grad():  # its weight is (out, x, y, z, in)
        layer.weight.copy_(kernel.view(3, 3, 3, channels, channels).permute(4, 2, 1, 0, 3))
    indices = (coords - coords.amin(0)).int().contiguous()
    shape = (indices.amax(0)[1:] + 1).tolist()

    def forward(known: dict[str, object] | None = None) -> Any:
        tensor = spconv.SparseConvTensor(feats, indices, shape, 1)
        tensor.indice_dict = known or {}
        with torch.no_grad():
            return layer(tensor)

    first = forward()
    difference = (first.features - ours()).abs().max().item() / first.features.abs().max().item()
    assert difference < 1e-5, f"spconv and ours differ by {difference} of the largest value"
    return {
        f"  spconv, {size} m, {channels} channels, map given": lambda: forward(first.indice_dict),
        f"  spconv, {size} m, {channels} channels, map built": forward,
    }


def timed(
    rows: dict[str, Callable[[], object]], repeats: int, device: torch.device, *, processor: bool
) -> dict[str, list[float]]:
    """Seconds of every row in every round, after one round to warm up."""
    clock = time.process_time if processor and device.type == "cpu" else time.perf_counter

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    found: dict[str, list[float]] = {name: [] for name in rows}
    for turn in range(repeats + 1):
        for name, call in rows.items():
            finish()
            start = clock()
            call()
            finish()
            if turn:
                found[name].append(clock() - start)
    return found


if __name__ == "__main__":
    main()
