"""The 2-D network of both detectors against the arithmetic of its convolutions.

The least work is the multiply-adds of the convolutions. What the machine reaches is measured on one convolution of the same
kind (3 x 3, 128 channels, the map's size, the better of two layouts in memory); the whole network is to take at most 1.2 times
its arithmetic at that rate.

    python benchmarks/bev_backbone.py [--threads 2] [--repeats 3] [--small]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from picture3d.models.bev_backbone import BevBackbone, nuscenes_bev


def macs_of(network: nn.Module, x: Tensor) -> int:
    """Multiply-adds of all convolutions of one forward pass."""
    with FlopCounterMode(display=False) as counter:
        network(x)
    return counter.get_total_flops() // 2


def median_s(run: Callable[[], object], repeats: int) -> float:
    run()
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="a quarter of each side")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(
        f"torch {torch.__version__}, {platform.machine()}, {args.threads} threads, float32, batch 1, median of {args.repeats}"
    )
    divide = 4 if args.small else 1
    with torch.inference_mode():
        for name, network, channels, side in (
            ("waymo", BevBackbone(192), 192, 468 // divide),
            ("nuscenes", BevBackbone(256, nuscenes_bev()), 256, 360 // divide),
        ):
            side -= side % 4
            network.eval()
            x = torch.randn(1, channels, side, side).to(memory_format=torch.channels_last)  # as scattered
            macs = macs_of(network, x)
            one, y = nn.Conv2d(128, 128, 3, padding=1, bias=False), torch.randn(1, 128, side, side)
            last = y.to(memory_format=torch.channels_last)
            quickest = min(median_s(lambda one=one, y=y: one(y), args.repeats) for y in (y, last))
            rate = 9 * 128 * 128 * side * side / quickest
            least = macs / rate
            taken = median_s(lambda network=network, x=x: network(x), args.repeats)
            print(
                f"{name}: {channels} x {side} x {side}, {macs / 1e9:.1f} GMAC; one 3x3 convolution {2e-9 * rate:.0f} GFLOP/s, "
                f"so {least:.2f} s at least; whole network {taken:.2f} s = {taken / least:.2f} x"
            )


if __name__ == "__main__":
    main()
