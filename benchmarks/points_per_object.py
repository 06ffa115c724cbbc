"""How many points objects of a class have, by distance and by the number of sweeps that are merged.

    python benchmarks/points_per_object.py PREPARED [--split val] [--category car] [--sweeps 1 3 5 10] [--every 2]

Counts do not depend on the machine. Objects of the keyframe that have at least one point in it, as detectors are scored; bands
of distance as seen from the sensor.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from picture3d.datasets.detection_classes import NUSCENES_DETECTION
from picture3d.datasets.prepared import PreparedDataset
from picture3d.datasets.samples import DataConfig, read_sample
from picture3d.synthetic.drive import count_points

BANDS_M = ((0, 20), (20, 35), (35, 50))
FEW = 5


def main() -> None:
    """Counts and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prepared", type=Path)
    parser.add_argument("--split", default="val")
    parser.add_argument("--category", default="car", choices=NUSCENES_DETECTION.names)
    parser.add_argument("--sweeps", type=int, nargs="+", default=[1, 3, 5, 10])
    parser.add_argument("--every", type=int, default=2, help="look at every n-th keyframe")
    options = parser.parse_args()
    dataset = PreparedDataset(options.prepared)
    keys = dataset.keyframes(options.split)[:: options.every]
    distance: list[np.ndarray] = []
    counts: dict[int, list[np.ndarray]] = {sweeps: [] for sweeps in options.sweeps}
    for key in keys:
        for sweeps, found in counts.items():
            config = DataConfig(root=options.prepared, sweeps=sweeps, labels=False, box_classes=(options.category,))
            sample = read_sample(dataset, key, config)
            assert sample.boxes is not None
            found.append(count_points(sample.boxes, sample.xyz.astype(np.float64)))
            if sweeps == options.sweeps[0]:
                distance.append(np.hypot(sample.boxes.center[:, 0], sample.boxes.center[:, 1]))
    metres = np.concatenate(distance)
    print(f"{options.category} of {len(keys)} keyframes, {len(metres)} in all; median points, share with fewer than {FEW}")
    for low, high in BANDS_M:
        band = (metres >= low) & (metres < high)
        cells = []
        for sweeps, found in counts.items():
            inside = np.concatenate(found)[band]
            cells.append(
                f"{sweeps} sweeps {np.median(inside):4.0f}, {100 * (inside < FEW).mean():3.0f} %" if band.any() else "-"
            )
        print(f"{low:2d} to {high} m ({band.sum()}):  {'   '.join(cells)}")


if __name__ == "__main__":
    main()
