from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from picture3d.ops.coarse_labels import Vote, coarse_labels
from picture3d.structures.occupancy import IGNORED
from tests.sample_data import golden_files


def of_dense(fine: Tensor, ratio: int, vote: Vote = "majority") -> Tensor:
    cells = fine.nonzero()
    shape = tuple(side // ratio for side in fine.shape[1:])
    return coarse_labels(cells, fine[tuple(cells.T)].to(torch.uint8), len(fine), shape, ratio, vote)  # pyright: ignore


@pytest.mark.parametrize("path", golden_files("openpcdet", "occ_losses"))
def test_the_published_vote_is_the_references(path: Path):
    reference = np.load(path)
    found = of_dense(torch.from_numpy(reference["labels_fine"]), 2, "published")
    assert (reference["labels_coarse_from_fine"] == IGNORED).mean() > 0.01
    np.testing.assert_array_equal(found.numpy(), reference["labels_coarse_from_fine"])


def by_hand(block: list[int], vote: Vote) -> int:
    named = Counter(label for label in block if label != 0 and (vote == "published" or label != IGNORED))
    if not named:
        return IGNORED if IGNORED in block else 0
    most = max(named.values())
    if vote == "published" and most == 1 and 0 in block:
        return IGNORED
    return min(label for label, count in named.items() if count == most)


@pytest.mark.parametrize("vote", ["majority", "published"])
@pytest.mark.parametrize("kinds", [(0, 1, 2), (0, 0, 0, 3, 255), (1, 2, 3, 255), (0, 0, 0, 0, 0, 0, 1, 2, 255)])
def test_votes_are_those_of_plain_loops(vote: Vote, kinds: tuple[int, ...]):
    fine = torch.from_numpy(np.random.default_rng(len(kinds)).choice(kinds, (2, 6, 8, 4)))
    found = of_dense(fine, 2, vote)
    for b in range(2):
        for x in range(3):
            for y in range(4):
                for z in range(2):
                    block = fine[b, 2 * x : 2 * x + 2, 2 * y : 2 * y + 2, 2 * z : 2 * z + 2].flatten().tolist()
                    assert int(found[b, x, y, z]) == by_hand(block, vote), block


def test_a_ratio_of_one_changes_nothing():
    fine = torch.from_numpy(np.random.default_rng(0).choice([0, 0, 4, 255], (1, 3, 4, 5)))
    assert torch.equal(of_dense(fine, 1), fine.to(torch.uint8))


def test_nothing_occupied_is_all_free():
    assert not of_dense(torch.zeros(2, 4, 4, 4, dtype=torch.int64), 2).any()
    assert of_dense(torch.zeros(0, 4, 4, 4, dtype=torch.int64), 2).shape == (0, 2, 2, 2)
