"""Occupancy labels of a grid whose cells hold several cells of the grid that was labelled."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from picture3d.structures.occupancy import FREE, IGNORED

Vote = Literal["majority", "published"]


def coarse_labels(
    cells: Tensor, labels: Tensor, batch_size: int, shape: tuple[int, int, int], ratio: int, vote: Vote = "majority"
) -> Tensor:
    """Labels of cells `ratio` times as long, from the occupied ones; the fine grid itself is never made.

    A coarse cell without an occupied one is free; free cells have no vote. ``majority``: the most frequent class of the others,
    the smallest among equals; IGNORED only where nothing else is. ``published``: IGNORED votes like a class, and a cell that is
    partly free and in which no label comes twice is IGNORED (how the published code tells free cells apart makes it so).

    Args:
        cells: (K, 4) integer, frame of the batch, x, y, z of the occupied fine cells, none twice.
        labels: (K,) uint8, class 1 and up, or IGNORED.
        batch_size: B.
        shape: cells of the coarse grid along x, y, z.
        ratio: fine cells along each side of a coarse one.
        vote: which rule.

    Returns:
        (B, X, Y, Z) uint8: FREE, a class, or IGNORED.

    Source of ``published``: the multi-scale supervision of OpenOccupancy, ICCV 2023.
    """
    dense = labels.new_full((batch_size, *shape), FREE)
    if not len(cells):
        return dense
    sample, place = cells[:, 0].long(), torch.div(cells[:, 1:].long(), ratio, rounding_mode="floor")
    key = ((sample * shape[0] + place[:, 0]) * shape[1] + place[:, 1]) * shape[2] + place[:, 2]
    found, group = torch.unique(key, return_inverse=True)
    kinds, kind = torch.unique(labels, return_inverse=True)  # ascending, IGNORED last
    votes = torch.zeros(len(found), len(kinds), dtype=torch.int64, device=cells.device)
    votes.index_put_((group, kind), torch.ones_like(group), accumulate=True)
    size = votes.sum(1)
    if vote == "majority" and int(kinds[-1]) == IGNORED:
        votes[:, -1] = votes[:, :-1].sum(1) == 0
    # The smallest label comes first among equals by its place in the key, not by the order in which argmax looks.
    order = torch.arange(len(kinds) - 1, -1, -1, device=cells.device)
    best = (votes * len(kinds) + order).argmax(1)
    chosen = kinds[best]
    if vote == "published":
        most = votes.gather(1, best[:, None]).squeeze(1)
        chosen = torch.where((most < 2) & (size < ratio**3), IGNORED, chosen).to(labels.dtype)
    return dense.view(-1).index_copy_(0, found, chosen).view_as(dense)
