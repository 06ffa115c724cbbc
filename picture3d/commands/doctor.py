"""`doctor`: what this installation and this machine can do, and what is missing."""

from __future__ import annotations

import importlib.metadata
import json
import multiprocessing
import platform
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from picture3d import __version__
from picture3d.ops.kernel_map import build_kernel_map
from picture3d.ops.sparse_conv import sparse_conv
from picture3d.training.host_memory import SWITCH, can_keep_freed_memory, keep_freed_memory
from picture3d.training.threads import set_threads
from picture3d.workers import usable_cores

REQUIRED = ("torch", "numpy", "pydantic", "typer", "rich", "safetensors", "google-crc32c", "pillow", "scipy")
# package -> what it is for, how to get it
OPTIONAL = {
    "tensorboard": ("replaying metrics into TensorBoard", "pip install 'picture3d[track]'"),
}
# A second thread may bring little, but if it costs this much, something is wrong with the process or the machine.
_SLOWER_WITH_THREADS = 1.5
_REPEATS = 5
_KEPT = f"what is freed stays with a process that computes ({SWITCH}=0 returns it to the system)"
_RETURNED = "what is freed goes back to the system: steps on large sweeps are slower"


def doctor(*, folder: Path, threads: int, as_json: bool) -> str:
    """Looks at versions, devices, threads, speed and disk; returns what to tell the user.

    Args:
        folder: where data is to be written; its disk is looked at.
        threads: CPU threads to test; 0: as many as a command would use.
        as_json: one JSON object instead of lines.
    """
    report = examine(folder, threads)
    return json.dumps(report) if as_json else _text(report)


def examine(folder: Path, threads: int) -> dict[str, Any]:
    """Everything `doctor` says, as a tree. Speeds are taken in fresh processes: thread counts must not change in one."""
    wanted = threads or torch.get_num_threads()
    speeds = {str(count): _in_fresh_process(count) for count in dict.fromkeys((1, wanted))}
    disk = shutil.disk_usage(_existing(folder))
    missing = [name for name in OPTIONAL if _version(name) is None]
    return {
        "picture3d": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: _version(name) for name in REQUIRED},
        "optional": {name: _version(name) for name in OPTIONAL},
        "missing": {name: {"for": OPTIONAL[name][0], "get": OPTIONAL[name][1]} for name in missing},
        "cores": usable_cores(),
        "threads": wanted,
        "keeps_freed_memory": can_keep_freed_memory(),
        "devices": _devices(),
        "free_gb": round(disk.free / 1e9, 1),
        "disk_of": str(folder),
        "speed": speeds,
        "warnings": _warnings(speeds, wanted),
    }


def speed_test(threads: int) -> dict[str, float]:
    """GFLOP/s of float32 and bf16 matrix products; milliseconds of a kernel map and a sparse convolution of 16k cells."""
    keep_freed_memory()
    set_threads(threads)
    torch.manual_seed(0)
    matrix = torch.randn(1024, 1024)
    half = matrix.to(torch.bfloat16)
    # Cells as a sweep leaves them: on surfaces, some three filled neighbours of 27.
    plane = torch.randint(0, 400, (16_000, 2), dtype=torch.int32)
    height = (20 + 8 * torch.sin(plane[:, 0] / 30)).to(torch.int32) + torch.randint(0, 2, (16_000,), dtype=torch.int32)
    coords = torch.unique(torch.stack([torch.zeros_like(height), plane[:, 0], plane[:, 1], height], 1), dim=0)
    kmap = build_kernel_map(coords, 3)
    feats, kernel = torch.randn(len(coords), 64), torch.randn(27, 64, 64)
    flop = 2 * 1024**3
    with torch.inference_mode():
        return {
            "matmul_float32_gflops": round(flop / _seconds(lambda: matrix @ matrix) / 1e9, 1),
            "matmul_bf16_gflops": round(flop / _seconds(lambda: half @ half) / 1e9, 1),
            "kernel_map_ms": round(1e3 * _seconds(lambda: build_kernel_map(coords, 3)), 2),
            "sparse_conv_ms": round(1e3 * _seconds(lambda: sparse_conv(feats, kernel, kmap)), 2),
        }


def _seconds(work: Callable[[], object]) -> float:
    work()
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _in_fresh_process(threads: int) -> dict[str, float]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(speed_test, (threads,))


def _warnings(speeds: dict[str, dict[str, float]], threads: int) -> list[str]:
    one, many = speeds["1"], speeds[str(threads)]
    slower = [
        f"{name[:-3].replace('_', ' ')} takes {many[name]:g} ms on {threads} threads and {one[name]:g} ms on one"
        for name in ("kernel_map_ms", "sparse_conv_ms")
        if many[name] > _SLOWER_WITH_THREADS * one[name]
    ]
    return [f"{line}: use --threads 1, or look for other load on this machine" for line in slower]


def _devices() -> list[str]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = [torch.cuda.get_device_properties(index) for index in range(count)]
    return ["cpu", *(f"cuda:{i} {p.name}, {p.total_memory / 1e9:.0f} GB" for i, p in enumerate(found))]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def _text(report: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {version or 'MISSING'}" for name, version in report["packages"].items())
    lines = [
        f"picture3d {report['picture3d']}, Python {report['python']}, {report['system']}",
        f"packages   {packages}",
        f"devices    {', '.join(report['devices'])}",
        f"cores      {report['cores']}; commands use {report['threads']} threads",
        f"memory     {_KEPT if report['keeps_freed_memory'] else _RETURNED}",
        f"free disk  {report['free_gb']:g} GB at {report['disk_of']}",
    ]
    for count, speed in report["speed"].items():
        lines.append(
            f"speed      {count} thread{'s' if count != '1' else ''}: {speed['matmul_float32_gflops']:g} GFLOP/s float32, "
            f"{speed['matmul_bf16_gflops']:g} bf16, kernel map {speed['kernel_map_ms']:g} ms, "
            f"sparse convolution {speed['sparse_conv_ms']:g} ms"
        )
    lines += [f"missing    {name}: {entry['for']}. {entry['get']}" for name, entry in report["missing"].items()]
    lines += [f"warning    {line}" for line in report["warnings"]]
    return "\n".join(lines)
