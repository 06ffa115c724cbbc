"""What the size of the classified cells leaves of an occupancy score: perfect answers on larger cells, scored on small ones.

    python benchmarks/occupancy_bound.py --data FOLDER [--frames 4] [--split val]

FOLDER holds prepared frames with occupancy labels (`picture3d prepare occupancy`). Larger cells get the labels that training
would give them (`ops.coarse_labels`), are interpolated to the labels' cells as an answer is, and scored.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch.nn import functional as F

from picture3d.commands.build import scoring_batches
from picture3d.commands.score_occupancy import CLASS_NAMES, truth_of
from picture3d.evaluation.occupancy import OccupancyMatrix
from picture3d.ops.coarse_labels import coarse_labels
from picture3d.recipes.catalogue import occupancy_recipe
from picture3d.structures.occupancy import IGNORED
from picture3d.tasks.occupancy import occupancy_of_logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--frames", type=int, default=4)
    parser.add_argument("--split", default="val")
    args = parser.parse_args()
    config = occupancy_recipe("town-occupancy", args.data)
    batches = scoring_batches(config.data, root=None, split=args.split, labels=False)
    count = min(args.frames, len(batches.keys))
    for ratio in (4, 2):
        task = config.task.model_copy(update={"cell_ratio": ratio})
        matrix = OccupancyMatrix(CLASS_NAMES)
        for index in range(count):
            batch = batches.batch(0, index * len(batches.keys) // count)
            assert batch.occupancy_cell is not None
            assert batch.occupancy_class is not None
            perfect = coarse_labels(batch.occupancy_cell, batch.occupancy_class, 1, task.shape, ratio)
            perfect[perfect == IGNORED] = 0
            logits = 10 * F.one_hot(perfect.long(), task.num_classes).permute(0, 4, 1, 2, 3).float()
            with torch.no_grad():
                matrix.add(truth_of(batch), occupancy_of_logits(logits, task))
        scores = matrix.scores()
        print(
            f"cells of {ratio * task.cell_m:g} m: mIoU {100 * (scores.miou or 0):.1f}, geometric IoU "
            f"{100 * (scores.geometric_iou or 0):.1f}, precision {100 * (scores.precision or 0):.1f}, recall "
            f"{100 * (scores.recall or 0):.1f} ({count} frames)"
        )


if __name__ == "__main__":
    main()
