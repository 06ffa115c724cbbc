"""Chamfer distance between small point sets, many pairs of sets at once: every voxel has its own prediction and target."""

from __future__ import annotations

import torch
from torch import Tensor

# Pairs of points whose distances are looked at together: bounds the scratch memory whatever the number of voxels.
_PAIRS_PER_CHUNK = 1_000_000


def chamfer(predicted: Tensor, target: Tensor) -> Tensor:
    """Symmetric Chamfer distance of every pair of sets, with squared Euclidean distances.

    The mean over predicted points of the squared distance to the nearest target point, plus the mean over target points of the
    squared distance to the nearest predicted point. A target point that is repeated weighs as often as it occurs.

    Only the nearest pairs are kept for the backward pass, so memory grows with P + T per set and not with P * T.

    Args:
        predicted: (V, P, 3) points, any float dtype; gradients flow into it.
        target: (V, T, 3) points.

    Returns:
        (V,) float32 (float64 for float64 input), in squared units of the input. V may be 0.

    Raises:
        ValueError: if the shapes do not fit each other, or a set has no points.
    """
    _check_shapes(predicted, target)
    # Squared distances of centimetres vanish in half precision, so mixed-precision regions do not reach in here.
    with torch.autocast(predicted.device.type, enabled=False):
        dtype = torch.float64 if predicted.dtype == torch.float64 else torch.float32
        predicted, target = predicted.to(dtype), target.to(dtype)
        nearest_target, nearest_predicted = _nearest_of_each(predicted.detach(), target.detach())
        to_target = (predicted - _rows(target, nearest_target)).square().sum(-1).mean(-1)
        to_predicted = (target - _rows(predicted, nearest_predicted)).square().sum(-1).mean(-1)
        return to_target + to_predicted


def chamfer_plain(predicted: Tensor, target: Tensor) -> Tensor:
    """The same by the full table of distances: the readable twin of `chamfer`, with its shapes and results."""
    _check_shapes(predicted, target)
    dtype = torch.float64 if predicted.dtype == torch.float64 else torch.float32
    squared = (predicted.to(dtype)[:, :, None] - target.to(dtype)[:, None]).square().sum(-1)  # (V, P, T)
    return squared.amin(2).mean(1) + squared.amin(1).mean(1)


def _check_shapes(predicted: Tensor, target: Tensor) -> None:
    for name, points in (("predicted", predicted), ("target", target)):
        if points.ndim != 3 or points.shape[2] != 3 or points.shape[1] == 0:
            raise ValueError(f"{name} must be (V, points, 3) with at least one point per set, got {tuple(points.shape)}")
    if predicted.shape[0] != target.shape[0]:
        raise ValueError(f"predicted must hold a set for each of target, got {predicted.shape[0]} for {target.shape[0]}")


@torch.no_grad()
def _nearest_of_each(predicted: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(V, P) index of the target nearest to each prediction and (V, T) index of the prediction nearest to each target."""
    sets_per_chunk = max(1, _PAIRS_PER_CHUNK // (predicted.shape[1] * target.shape[1]))
    nearest_target, nearest_predicted = [], []
    for p, t in zip(predicted.split(sets_per_chunk), target.split(sets_per_chunk), strict=True):
        squared = (p[..., None, 0] - t[:, None, :, 0]).square()
        for axis in (1, 2):
            squared += (p[..., None, axis] - t[:, None, :, axis]).square()
        # `min` finds the index three times faster than `argmin` on a CPU.
        nearest_target.append(squared.min(2).indices)
        nearest_predicted.append(squared.min(1).indices)
    return torch.cat(nearest_target), torch.cat(nearest_predicted)


def _rows(points: Tensor, index: Tensor) -> Tensor:
    """`points[v, index[v, i]]` as (V, I, 3)."""
    return points.gather(1, index[..., None].expand(-1, -1, 3))
