"""Set attention: the bucketed form against the published padded one, on the whole Waymo-size encoder.

    python benchmarks/set_attention.py [--golden ../shared/golden] [--threads 2] [--repeats 5] [--device cpu]

Takes the voxels of the reference's nuScenes sweep where the golden folder is present, random ones otherwise. First checks
that both forms give the same numbers, then times them in turn, so that other load on the machine meets both.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from picture3d.models.dsvt import Dsvt, make_set_layout
from picture3d.models.dsvt_config import waymo_voxel_192
from picture3d.structures.voxels import SparseVoxels

GRID = (468, 468, 32)
FORMS = ("padded", "bucketed")


def main() -> None:
    """Checks, times and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--golden", type=Path, default=Path(os.environ.get("PICTURE3D_GOLDEN", "../shared/golden")))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    coords, source = sweep_coords(options.golden)
    coords = coords.to(options.device)
    config = waymo_voxel_192()
    encoders = {form: Dsvt(config.with_overrides([f"attention={form}"]), GRID).to(options.device).train() for form in FORMS}
    encoders["padded"].load_state_dict(encoders["bucketed"].state_dict())
    feats = torch.randn(len(coords), config.channels, device=options.device)
    voxels = SparseVoxels(coords, feats, GRID, 1)

    def step(form: str) -> Tensor:
        encoders[form].zero_grad()
        out = encoders[form](voxels).output.feats
        out.square().sum().backward()
        return out.detach()

    difference = (step("padded") - step("bucketed")).abs().max().item()
    assert difference < 1e-4, f"the two forms differ by {difference}"

    with torch.no_grad():
        stages = [(s, stage.coords) for s, stage in enumerate(encoders["bucketed"](voxels).stages)]

    def partition(form: str) -> None:
        for stage, stage_coords in stages:
            windows = encoders[form].stage_windows(stage, stage_coords)
            # The published code lays out both shifts; a stage with one block needs one of them.
            for shift in (0, 1) if form == "padded" else (stage % 2,):
                make_set_layout(windows[shift], config.set_sizes[stage], form)

    step_s = timed({form: lambda form=form: step(form) for form in FORMS}, options)
    partition_s = timed({form: lambda form=form: partition(form) for form in FORMS}, options)
    rate = matrix_product_rate(config.channels, len(coords), options)
    print(
        f"{time.strftime('%Y-%m-%d')} | {machine(options)} | Waymo encoder, {len(coords)} voxels ({source}), width 192, float32"
    )
    print(f"largest difference of the two forms' outputs: {difference:.1e}")
    print(f"matrix product ({len(coords)} x 192 x 384): {rate / 1e9:.1f} GFLOP/s")
    for form in FORMS:
        counter = FlopCounterMode(display=False)
        with counter:
            step(form)
        share = counter.get_total_flops() / step_s[form] / rate
        print(
            f"{form:>9}: set partition {partition_s[form] * 1e3:7.1f} ms | forward + backward {step_s[form] * 1e3:8.1f} ms | "
            f"{counter.get_total_flops() / 1e9:.1f} GFLOP, {share:.0%} of the matrix-product rate"
        )
    print(
        f"  quotient: set partition {partition_s['padded'] / partition_s['bucketed']:.2f} | "
        f"forward + backward {step_s['padded'] / step_s['bucketed']:.2f}"
    )


def sweep_coords(golden: Path) -> tuple[Tensor, str]:
    """(N, 4) int32 coordinates: batch, x, y, z."""
    path = golden / "openpcdet" / "set_partition_voxel_waymo_full.npz"
    if path.exists():
        rows = np.load(path)["coords_stage0"].astype(np.int32)[:, [0, 3, 2, 1]]
        return torch.from_numpy(rows), "golden nuScenes sweep"
    rng = np.random.default_rng(0)
    radius, angle = rng.exponential(60, 9000), rng.uniform(0, 2 * np.pi, 9000)
    x, y = 234 + radius * np.cos(angle), 234 + radius * np.sin(angle)
    rows = np.unique(np.stack([0 * x, x, y, rng.integers(4, 12, 9000)], 1).astype(np.int32), axis=0)
    inside = ((rows[:, 1:3] >= 0) & (rows[:, 1:3] < 468)).all(1)
    return torch.from_numpy(rows[inside]), "random, denser near the sensor"


def timed(variants: dict[str, Callable[[], object]], options: argparse.Namespace) -> dict[str, float]:
    """Least seconds of each variant, run in turn: other load only ever adds."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(options.repeats + 1):
        for name, run in variants.items():
            _synchronise(options.device)
            start = time.perf_counter()
            run()
            _synchronise(options.device)
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return {name: min(values) for name, values in seconds.items()}


def matrix_product_rate(channels: int, rows: int, options: argparse.Namespace) -> float:
    """Operations per second of the plain product that the encoder's layers consist of."""
    a = torch.randn(rows, channels, device=options.device)
    b = torch.randn(channels, 2 * channels, device=options.device)

    def ten() -> None:
        for _ in range(10):
            torch.mm(a, b)

    return 10 * 2 * rows * channels * 2 * channels / timed({"product": ten}, options)["product"]


def machine(options: argparse.Namespace) -> str:
    """The circumstances, in words."""
    if torch.device(options.device).type == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{platform.machine()}, {options.threads} threads of {os.cpu_count()}, torch {torch.__version__}"


def _synchronise(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
