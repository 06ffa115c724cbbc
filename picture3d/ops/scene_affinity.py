"""Losses of a whole scene: soft precision, recall and specificity of every class, and of being occupied at all.

Cross-entropy judges cell by cell, and in a scene that is 97 % free it is nearly content with "free". These look at sums over
the scene, in which every class counts alike; where several processes compute a step, over the scenes of all.

Source: the scene-class affinity losses of "MonoScene", CVPR 2022, as OpenOccupancy uses them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from picture3d.ops.processes import total_of_processes

FREE = 0
_LEAST = 1e-30
_GEOMETRIC_EPSILON = 1e-5  # as published, in the denominators of the geometric loss alone


def semantic_affinity(logits: Tensor, labels: Tensor) -> Tensor:
    """Minus the logs of precision, recall and specificity of each class that occurs, summed; the mean over those classes.

    Args:
        logits: (N, C) float of N cells; computed in float32 at least.
        labels: (N,) int64, 0..C-1; cells that are not to be judged are left out beforehand.

    Returns:
        A scalar, 0 or more; 0, still joined to `logits`, if there is no cell.
    """
    probability = _probability(logits)
    rows = F.one_hot(labels, logits.shape[1]).to(probability.dtype)
    hit, said, there = total_of_processes(torch.stack([(rows * probability).sum(0), probability.sum(0), rows.sum(0)]))
    present = there.nonzero().squeeze(1)
    if not len(present):
        return said.sum()
    cells, hit, said, there = there.sum(), hit[present], said[present], there[present]
    elsewhere = cells - there
    losses = _minus_log(hit / said.clamp(min=_LEAST)) + _minus_log(hit / there)
    # A class that is everywhere has no "elsewhere" to be wrong in.
    specificity = (elsewhere - (said - hit)) / elsewhere.clamp(min=1)
    return (losses + torch.where(elsewhere > 0, _minus_log(specificity), 0.0)).mean()


def geometric_affinity(logits: Tensor, labels: Tensor) -> Tensor:
    """The same of one question: is a cell occupied, whatever by? Arguments and result as :func:`semantic_affinity`.

    Without an occupied cell there is no precision and no recall, without a free one no specificity; what is not there counts 0.
    """
    free = _probability(logits)[:, FREE]
    occupied = (labels != FREE).to(free.dtype)
    sums = (occupied * (1 - free), 1 - free, occupied, (1 - occupied) * free, 1 - occupied)
    hit, said, there, kept_free, elsewhere = total_of_processes(torch.stack([values.sum() for values in sums]))
    precision = hit / (said + _GEOMETRIC_EPSILON)
    recall = hit / (there + _GEOMETRIC_EPSILON)
    specificity = kept_free / (elsewhere + _GEOMETRIC_EPSILON)
    where_occupied = torch.where(there > 0, _minus_log(precision) + _minus_log(recall), 0.0)
    return where_occupied + torch.where(elsewhere > 0, _minus_log(specificity), 0.0)


def _probability(logits: Tensor) -> Tensor:
    with torch.autocast(logits.device.type, enabled=False):
        return (logits if logits.dtype == torch.float64 else logits.float()).softmax(1)


def _minus_log(share: Tensor) -> Tensor:
    """Minus the log, at most 69, so that a class nobody predicts does not end the run; beyond that without a gradient."""
    return -share.clamp(min=_LEAST).log()
