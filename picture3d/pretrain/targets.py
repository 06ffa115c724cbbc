"""What the teacher says about each voxel: the mean of its points' features, and its superclass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from picture3d.errors import ConfigError
from picture3d.ops.kmeans import kmeans
from picture3d.ops.scatter import segment_mean
from picture3d.ops.voxelize import VoxelAssignment
from picture3d.pretrain.masking import MaskConfig
from picture3d.structures.batch import PointBatch


@dataclass(frozen=True, slots=True, eq=False)
class VoxelTargets:
    """Teacher targets of the M voxels of a batch."""

    features: Tensor | None  # (M, D) float32, zeros where there is no target; None: the batch has no teacher
    has_features: Tensor  # (M,) bool: at least one point of the voxel has a target
    superclass: Tensor  # (M,) int64, 0..K-1; -1 = may not be hidden


def voxel_targets(
    batch: PointBatch, assignment: VoxelAssignment, mask: MaskConfig, generator: torch.Generator, own: Tensor | None = None
) -> VoxelTargets:
    """Carries teacher features and superclasses from points to voxels.

    A voxel's feature is the plain mean over its points that have a target; its superclass is their majority (the smallest
    among equals), or comes from clustering the means, as `mask.superclasses` says. A voxel without a target stays visible.
    Without a teacher every voxel may be hidden.

    Args:
        batch: the points and what a teacher says of them.
        assignment: which point is in which voxel.
        mask: which superclasses are needed.
        generator: source of the clustering.
        own: (M, D) features of the voxels themselves, of a teacher that sees voxels; the batch's are then not looked at.

    Raises:
        ConfigError: if the superclasses that `mask` needs are not in the batch, or are more than it expects.
    """
    voxels = assignment.num_voxels
    device = assignment.coords.device
    sample = assignment.coords[:, 0]
    if own is not None:
        everywhere = torch.ones(voxels, dtype=torch.bool, device=device)
        superclass = torch.zeros(voxels, dtype=torch.int64, device=device)
        if mask.kind == "i2mask":
            if mask.superclasses != "kmeans":
                raise ConfigError("a self-teacher has no stored superclasses: use mask.superclasses=kmeans")
            superclass = clustered_superclasses(own, everywhere, sample, batch.batch_size, mask.num_clusters, generator)
        return VoxelTargets(own, everywhere, superclass)
    if batch.cell_features is None or batch.point_cell is None:
        nothing = torch.zeros(voxels, dtype=torch.bool, device=device)
        return VoxelTargets(None, nothing, torch.zeros(voxels, dtype=torch.int64, device=device))
    cell = batch.point_cell[assignment.point_index]
    known = (cell >= 0).nonzero().squeeze(1)
    cell, voxel = cell[known], assignment.voxel_of_point[known]
    features = segment_mean(batch.cell_features[cell].float(), voxel, voxels)
    has_features = torch.zeros(voxels, dtype=torch.bool, device=device)
    has_features[voxel] = True

    if mask.kind != "i2mask":
        superclass = torch.zeros(voxels, dtype=torch.int64, device=device)
    elif mask.superclasses == "kmeans":
        superclass = clustered_superclasses(features, has_features, sample, batch.batch_size, mask.num_clusters, generator)
    elif batch.cell_superclass is None:
        raise ConfigError("the batch has teacher features but no superclasses: use mask.superclasses=kmeans")
    else:
        superclass = majority_superclass(batch.cell_superclass[cell], voxel, voxels, mask.num_clusters)
    return VoxelTargets(features, has_features, torch.where(has_features, superclass, -1))


def majority_superclass(superclass: Tensor, voxel: Tensor, num_voxels: int, num_clusters: int) -> Tensor:
    """(num_voxels,) int64 most frequent superclass of each voxel's points, the smallest among equals; 0 for no points.

    Args:
        superclass: (P,) integer superclass of each point.
        voxel: (P,) int64 voxel of each point.
        num_voxels: number of voxels.
        num_clusters: number of superclasses.

    Raises:
        ConfigError: for a superclass of `num_clusters` or more (on a GPU the assertion of the device).
    """
    votes = torch.zeros(num_voxels, num_clusters, dtype=torch.int64, device=voxel.device)
    try:
        votes.index_put_((voxel, superclass.long()), torch.ones_like(voxel), accumulate=True)
    except IndexError:
        raise ConfigError(
            f"the stored superclasses go up to {int(superclass.max())}, mask.num_clusters={num_clusters} expects fewer. "
            "Set num_clusters and group_sizes to what the store was written with, or use mask.superclasses=kmeans."
        ) from None
    return votes.argmax(1)


def clustered_superclasses(
    features: Tensor, has_features: Tensor, sample: Tensor, batch_size: int, num_clusters: int, generator: torch.Generator
) -> Tensor:
    """(M,) int64 superclasses by k-means on the voxels' features, sample by sample; -1 where a voxel has none.

    Args:
        features: (M, D) float32.
        has_features: (M,) bool.
        sample: (M,) integer sample of each voxel.
        batch_size: number of samples.
        num_clusters: clusters per sample; fewer where a sample has fewer voxels.
        generator: source of the starting centres.
    """
    superclass = torch.full_like(sample, -1, dtype=torch.int64)
    for index in range(batch_size):
        rows = (has_features & (sample == index)).nonzero().squeeze(1)
        if len(rows):
            superclass[rows], _ = kmeans(features[rows], num_clusters, generator)
    return superclass
