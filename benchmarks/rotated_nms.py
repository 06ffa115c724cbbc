"""Rotated non-maximum suppression of 4,096 boxes: 400 objects with ten jittered copies each, 96 boxes alone.

    python benchmarks/rotated_nms.py [--threads 2] [--repeats 9] [--device cpu]

The peer in the same run is the walk that the definition describes, over the IoU of every pair.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time

import torch
from torch import Tensor

from picture3d.ops.box_iou import bev_iou, rotated_nms

THRESHOLD = 0.2


def scene(device: torch.device) -> tuple[Tensor, Tensor]:
    """(4096, 7) boxes and (4096,) scores."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    def objects(count: int) -> Tensor:
        center = (drawn(count, 3) - 0.5) * torch.tensor([150.0, 150.0, 2.0])
        return torch.cat([center, 0.5 + drawn(count, 3) * torch.tensor([4.5, 1.8, 1.2]), (drawn(count, 1) - 0.5) * 6.3], 1)

    copies = objects(400).repeat_interleave(10, 0)
    jitter = (drawn(4000, 7) - 0.5) * torch.tensor([0.8, 0.8, 0.2, 0.3, 0.2, 0.1, 0.3])
    return torch.cat([copies + jitter, objects(96)]).to(device), drawn(4096).to(device)


def walk(boxes: Tensor, scores: Tensor) -> list[int]:
    """From the best box to the worst, each that stays throws out what it covers."""
    iou = bev_iou(boxes, boxes)
    gone = torch.zeros(len(boxes), dtype=torch.bool)
    kept = []
    for best in torch.argsort(scores, descending=True, stable=True).tolist():
        if not gone[best]:
            kept.append(best)
            gone |= iou[best].cpu() > THRESHOLD
    return kept


def main() -> None:
    """Checks, times and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    boxes, scores = scene(torch.device(options.device))
    kept = rotated_nms(boxes, scores, THRESHOLD)
    times = []
    for _ in range(options.repeats):
        start = time.perf_counter()
        kept = rotated_nms(boxes, scores, THRESHOLD).tolist()
        times.append(time.perf_counter() - start)
    start = time.perf_counter()
    expected = walk(boxes, scores)
    walked = time.perf_counter() - start
    assert kept == expected, "the two forms differ"
    print(
        f"{platform.processor() or platform.machine()}, {options.device}, {options.threads} threads, torch {torch.__version__}"
    )
    print(f"4,096 boxes, threshold {THRESHOLD}: {len(kept)} stay, the same as the walk over all pairs")
    print(f"rotated_nms   {1e3 * min(times):8.1f} ms least, {1e3 * statistics.median(times):8.1f} ms median")
    print(f"walk          {1e3 * walked:8.1f} ms once")


if __name__ == "__main__":
    main()
