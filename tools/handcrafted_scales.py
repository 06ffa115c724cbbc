"""Prints mean and standard deviation of every measured column of the hand-crafted teacher, for its table of constants.

    python tools/handcrafted_scales.py PREPARED [PREPARED ...] [--sweeps 24]

Every cell of a sweep counts alike, and every folder as much as any other, however many cells it has.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from picture3d.datasets.prepared import PreparedDataset
from picture3d.teachers.handcrafted import COLUMNS, HandcraftedTeacher


def moments(folder: Path, sweeps: int) -> torch.Tensor:
    """(2, D) float64 mean and mean square over the cells of evenly spaced keyframes; NaN is left out."""
    dataset, teacher = PreparedDataset(folder), HandcraftedTeacher()
    keys = dataset.keyframes(None)
    chosen = keys[:: max(1, len(keys) // sweeps)][:sweeps]
    measured = torch.cat([teacher.measure(dataset.frame(key, ()).points)[0] for key in chosen])
    return torch.stack([measured.nanmean(0), measured.square().nanmean(0)])


def main() -> None:
    """The table, ready to be put into `teachers/handcrafted.py`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prepared", nargs="+", type=Path)
    parser.add_argument("--sweeps", type=int, default=24, help="keyframes taken of each folder at most")
    options = parser.parse_args()
    mean, square = torch.stack([moments(folder, options.sweeps) for folder in options.prepared]).mean(0)
    deviation = (square - mean.square()).sqrt()
    for (name, *_), m, d in zip(COLUMNS, mean.tolist(), deviation.tolist(), strict=True):
        print(f'("{name}", {m:.3g}, {d:.3g}),')


if __name__ == "__main__":
    main()
