"""Teacher features in which every direction counts: whitened by what all training steps so far have seen of them.

Not in the paper. Features of a teacher vary most with what is easy to tell, such as height; what separates a bicycle from a
pedestrian may have a thirtieth of that spread, and a loss on plain differences hardly notices it. Whitening divides each
principal direction by its own standard deviation, plus a floor that keeps noise from being blown up, and turns back (the
symmetric form, ZCA): the result does not depend on the signs or the order of the directions.

Predictors are to tell whitened features themselves. Telling plain ones and whitening the difference has the same optimum, but
after 1,500 steps on the synthetic town twice the loss is left: their last layer has to learn the scales.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from picture3d.ops.processes import group_of_step

_GROWTH = 1.1  # the matrix is made anew when so many times the rows have been seen


class FeatureWhitening(nn.Module):
    """Moments of the teacher's features and the matrix they give; part of the network's state and so of every checkpoint.

    Args:
        dimension: D, length of a feature.
        floor: what is added to each direction's standard deviation, as a share of the root of the variance of all directions
            together.
    """

    rows: Tensor  # () int64, features seen, those of all processes
    sums: Tensor  # (D,) float64
    products: Tensor  # (D, D) float64, their second moments
    fitted_rows: Tensor  # () int64, features that `matrix` was made of
    mean: Tensor  # (D,) float32 of those; 0 before the first feature
    matrix: Tensor  # (D, D) float32, symmetric; the identity before the first feature

    def __init__(self, dimension: int, floor: float) -> None:
        super().__init__()
        self.floor = floor
        for name in ("rows", "fitted_rows"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))
        self.register_buffer("sums", torch.zeros(dimension, dtype=torch.float64))
        self.register_buffer("products", torch.zeros(dimension, dimension, dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(dimension))
        self.register_buffer("matrix", torch.eye(dimension))

    @torch.no_grad()
    def see(self, features: Tensor, known: Tensor) -> None:
        """Adds the features of a batch up, and those of the other processes of the step.

        Args:
            features: (M, D) float.
            known: (M,) bool, rows that are features at all; one that is not finite does not count either.
        """
        chosen = features[known & features.isfinite().all(1)].double()
        # One message for everything; counts of rows are exact in float64.
        moments = torch.cat([chosen.new_tensor([len(chosen)]), chosen.sum(0), (chosen.T @ chosen).flatten()])
        if (group := group_of_step()) is not None:
            dist.all_reduce(moments, group=group)
        dimension = len(self.sums)
        self.rows += moments[0].long()
        self.sums += moments[1 : 1 + dimension]
        self.products += moments[1 + dimension :].view(dimension, dimension)
        if int(self.rows) > _GROWTH * int(self.fitted_rows):
            self._fit()

    def forward(self, features: Tensor) -> Tensor:
        """(M, D) float32 whitened features: ``(features - mean) @ matrix``."""
        with torch.autocast(features.device.type, enabled=False):
            return (features.float() - self.mean) @ self.matrix

    def _fit(self) -> None:
        mean = self.sums / self.rows
        variance, directions = torch.linalg.eigh(self.products / self.rows - torch.outer(mean, mean))
        spread = variance.clamp(min=0).sqrt()  # rounding can leave a little less than 0
        floor = self.floor * variance.clamp(min=0).sum().sqrt()
        self.mean.copy_(mean)
        if float(floor) > 0:  # else all features are the same, and any matrix will do
            self.matrix.copy_((directions / (spread + floor)) @ directions.T)
        self.fitted_rows.copy_(self.rows)
