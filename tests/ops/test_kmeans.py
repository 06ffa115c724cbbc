"""K-means against scikit-learn and by its properties."""

from __future__ import annotations

import numpy as np
import torch

from picture3d.ops.kmeans import kmeans


def _blobs(seed: int, per_blob: int = 60) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centers = 10 * torch.randn(5, 8, generator=generator)
    return torch.cat([center + 0.3 * torch.randn(per_blob, 8, generator=generator) for center in centers])


def _inertia(rows: torch.Tensor, labels: torch.Tensor, centers: torch.Tensor) -> float:
    return float((rows - centers[labels]).square().sum())


def test_inertia_is_as_good_as_scikit_learns():
    from sklearn.cluster import KMeans

    rows = torch.randn(800, 16, generator=torch.Generator().manual_seed(1))
    found = [_inertia(rows, *kmeans(rows, 8, torch.Generator().manual_seed(seed))) for seed in range(4)]
    oracle = [
        float(KMeans(8, n_init=1, random_state=seed).fit(rows.numpy()).inertia_ or 0.0)  # pyright: ignore[reportArgumentType]
        for seed in range(4)
    ]
    assert np.mean(found) < 1.03 * np.mean(oracle)


def test_separate_blobs_are_found():
    rows = _blobs(0)
    labels, centers = kmeans(rows, 5, torch.Generator().manual_seed(0))
    assert all(len(torch.unique(labels[i * 60 : (i + 1) * 60])) == 1 for i in range(5))
    assert len(torch.unique(labels)) == 5
    for i in range(5):
        torch.testing.assert_close(centers[labels[i * 60]], rows[i * 60 : (i + 1) * 60].mean(0))


def test_every_row_is_with_its_nearest_centre_and_the_seed_decides():
    rows = _blobs(3)
    labels, centers = kmeans(rows, 7, torch.Generator().manual_seed(2), max_iterations=100)
    assert torch.equal(torch.cdist(rows, centers).argmin(1), labels)
    again, _ = kmeans(rows, 7, torch.Generator().manual_seed(2), max_iterations=100)
    assert torch.equal(labels, again)


def test_fewer_rows_than_clusters_equal_rows_and_none_at_all():
    labels, centers = kmeans(torch.eye(3), 8, torch.Generator().manual_seed(0))
    assert sorted(labels.tolist()) == [0, 1, 2]
    assert centers.shape == (3, 3)
    labels, centers = kmeans(torch.ones(10, 4), 3, torch.Generator().manual_seed(0))
    assert torch.isfinite(centers).all()
    assert labels.shape == (10,)
    labels, centers = kmeans(torch.zeros(0, 4), 8, torch.Generator().manual_seed(0))
    assert labels.shape == (0,)
    assert centers.shape == (0, 4)
