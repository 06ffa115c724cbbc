"""Gaussian bumps on maps seen from above: the targets of heat-map heads (Law and Deng, CornerNet, ECCV 2018)."""

from __future__ import annotations

import torch
from torch import Tensor


def gaussian_radius(length: Tensor, width: Tensor, overlap: float) -> Tensor:
    """(G,) float: how far a corner may move so that a box of `length` x `width` cells keeps `overlap` IoU with itself.

    The smallest of CornerNet's three cases, with its well-known division by 2 instead of 2 a, which trained weights rely on.
    """
    total, area = length + width, length * width
    c1 = area * (1 - overlap) / (1 + overlap)
    r1 = (total + (total.square() - 4 * c1).clamp(min=0).sqrt()) / 2
    r2 = (2 * total + (4 * total.square() - 16 * (1 - overlap) * area).clamp(min=0).sqrt()) / 2
    b3 = -2 * overlap * total
    r3 = (b3 + (b3.square() - 16 * overlap * (overlap - 1) * area).clamp(min=0).sqrt()) / 2
    return torch.minimum(torch.minimum(r1, r2), r3)


def draw_gaussians(rows: Tensor, columns: Tensor, radii: Tensor, planes: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """(P, H, W) float32 maps: at each place the largest of the Gaussians drawn there, exactly 1 at their centres.

    Args:
        rows: (G,) int64 centre along H, inside of the map.
        columns: (G,) int64 centre along W, inside of the map.
        radii: (G,) int64; sigma is (2 r + 1) / 6 and nothing is drawn further than r.
        planes: (G,) int64, which of the P maps.
        shape: P, H, W.
    """
    number, height, width = shape
    maps = torch.zeros(number * height * width, device=rows.device)
    if not len(rows):
        return maps.view(shape)
    reach = int(radii.max())
    step = torch.arange(-reach, reach + 1, device=rows.device)
    dy, dx = (offset.reshape(-1) for offset in torch.meshgrid(step, step, indexing="ij"))
    y, x = rows[:, None] + dy, columns[:, None] + dx
    drawn = (dy.abs() <= radii[:, None]) & (dx.abs() <= radii[:, None]) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    sigma = (2 * radii[:, None].double() + 1) / 6
    value = torch.exp(-(dy.square() + dx.square()) / (2 * sigma.square())).float()
    place = (planes[:, None] * height + y) * width + x
    return maps.scatter_reduce(0, place[drawn], value[drawn], "amax").view(shape)
