"""The TransFusion head at full size: 384 x 180 x 180 map, width 256, 200 proposals that look at 41 x 41 cells each.

    python benchmarks/transfusion_head.py [--threads 2] [--repeats 5] [--device cpu]

Timed in the same run, without gradients: the three convolutions alone; the whole head with decoding; and the part without
dense convolutions, from proposals to decoded boxes, with the decoder as published (every key of every proposal in memory) and
as used. The two are compared before anything is timed. Times are medians. Peaks are of tensors that the run adds to what it
was given, as PyTorch's profiler counts them on a CPU and its allocator on a GPU.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from picture3d.models.transfusion_decoder import LocalDecoder, published_decoder
from picture3d.models.transfusion_head import TransFusionHead


@contextmanager
def as_published() -> Iterator[None]:
    """The head with the decoder that copies keys."""
    with mock.patch.object(LocalDecoder, "forward", published_decoder):
        yield


def median_ms(action: Callable[[], object], repeats: int, device: torch.device) -> float:
    action()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def peak_mib(action: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        action()
    held = most = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()  # type: ignore[attr-defined]
            most = max(most, held)
    return most / 2**20


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"{name}, {arguments.threads} threads, torch {torch.__version__}, Python {platform.python_version()}, float32")

    torch.manual_seed(0)
    head = TransFusionHead(384, (0.6, 0.6), (-54.0, -54.0)).eval().to(device)
    bev = torch.randn(1, 384, 180, 180).to(device)
    with torch.inference_mode():
        cells, dense = head.convolutions(bev)

        def convolutions() -> tuple[Tensor, Tensor]:
            shared, block, last = head.shared_conv, head.heatmap_head[0], head.heatmap_head[1]
            first = shared(bev)
            return first, last(block.conv(first))  # type: ignore[operator]

        def rest() -> object:
            return head.decode(head.proposals(cells, dense))

        def whole() -> object:
            return head.decode(head(bev))

        ours = head.proposals(cells, dense)
        with as_published():
            theirs = head.proposals(cells, dense)
        print(f"largest difference of the encoded boxes: {(ours.code - theirs.code).abs().max().item():.1e}")

        alone = median_ms(convolutions, arguments.repeats, device)
        used = median_ms(rest, arguments.repeats, device)
        total = median_ms(whole, arguments.repeats, device)
        used_peak = peak_mib(rest, device)
        with as_published():
            published = median_ms(rest, max(1, arguments.repeats // 2), device)
            published_peak = peak_mib(rest, device)
    print(f"{'convolutions alone':<44}{alone:9.1f} ms")
    print(f"{'whole head with decoding':<44}{total:9.1f} ms   {total / alone:5.2f} times its convolutions")
    print(f"{'proposals to boxes, as published':<44}{published:9.1f} ms   peak {published_peak:7.1f} MiB")
    print(f"{'proposals to boxes':<44}{used:9.1f} ms   peak {used_peak:7.1f} MiB   {published / used:5.1f} times faster")


if __name__ == "__main__":
    main()
