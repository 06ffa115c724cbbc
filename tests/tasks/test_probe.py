"""The probe: against scikit-learn, on features whose answer is known, its sampling, and a teacher in an encoder's place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from picture3d.errors import DataError
from picture3d.ops.voxelize import assign_voxels
from picture3d.structures.batch import PointBatch
from picture3d.tasks.encoder import JoinedEncoder, JoinedFeatures
from picture3d.tasks.probe import TeacherVoxels, evaluate_probe, fit_probe, sample_voxels, voxel_labels
from picture3d.tasks.readouts import ProbeConfig, VoxelSample, feature_rank, fit_linear, fit_neighbours
from tests.tasks.small_scene import ENCODER, GRID, batch_of, layered_batch, no_points

NAMES = tuple(f"class_{i}" for i in range(17))


class HeightEncoder:
    """Its feature is the voxel's place: x, y, z in cells, and a constant."""

    grid = GRID

    def joined_features(self, batch: PointBatch) -> JoinedFeatures:
        assignment = assign_voxels(batch.xyz, batch.sample, batch.batch_size, GRID)
        feats = torch.cat([assignment.coords[:, 1:].float(), torch.ones(assignment.num_voxels, 1)], dim=1)
        return JoinedFeatures(feats, assignment, feats[assignment.voxel_of_point])


def frozen_encoder() -> JoinedEncoder:
    torch.manual_seed(0)
    return JoinedEncoder(GRID, 1, ENCODER)


def test_what_is_linear_in_the_features_is_read_out_whole():
    batch = layered_batch(3000)
    assert batch.labels is not None
    high = batch_of(batch.xyz, labels=torch.where(batch.xyz[:, 2] < 0, 11, 16))
    scores = evaluate_probe(fit_probe(HeightEncoder(), [high]), [high], NAMES)
    for found in (scores.linear, scores.neighbours):
        assert found is not None
        assert found.miou == 1.0
    assert scores.linear.absent == tuple(name for i, name in enumerate(NAMES) if i not in {0, 11, 16})


def test_the_classifier_is_the_one_scikit_learn_finds():
    rng = np.random.default_rng(0)
    labels = np.repeat([2, 5, 9], 60)
    feats = (rng.standard_normal((180, 4)) * [1, 5, 0.1, 1] + labels[:, None] * [0.3, 0, 0.03, -0.2]).astype(np.float32)
    sample = VoxelSample(torch.from_numpy(feats), torch.from_numpy(labels), {2: 60, 5: 60, 9: 60})
    config = ProbeConfig(weight_penalty=0.05, max_iterations=300)
    found = fit_linear(sample, config)
    mean, deviation = feats.mean(0), feats.std(0)
    oracle = LogisticRegression(C=1 / (0.05 * 180), max_iter=5000, tol=1e-10).fit((feats - mean) / deviation, labels)
    np.testing.assert_allclose(found.weight.numpy() * deviation, oracle.coef_, atol=2e-3)
    assert found.classes.tolist() == [2, 5, 9]
    np.testing.assert_array_equal(found.classify(torch.from_numpy(feats)).numpy(), oracle.predict((feats - mean) / deviation))


def test_the_neighbours_are_those_scikit_learn_finds_and_vote_by_the_exponential_of_their_cosine():
    rng = np.random.default_rng(1)
    labels = np.repeat([2, 5, 9], 50)
    feats = (rng.standard_normal((150, 4)) + labels[:, None] * [0.3, 0, 0.2, -0.2]).astype(np.float32)
    queries = rng.standard_normal((40, 4)).astype(np.float32) + 1
    config = ProbeConfig(neighbours=7, temperature=0.2)
    found = fit_neighbours(VoxelSample(torch.from_numpy(feats), torch.from_numpy(labels), {2: 50, 5: 50, 9: 50}), config)
    mean, deviation = feats.mean(0), feats.std(0)
    by_cosine: Any = lambda distance: np.exp(-distance / 0.2)  # noqa: E731 - the stubs know of names only
    oracle = KNeighborsClassifier(7, metric="cosine", weights=by_cosine)
    oracle.fit((feats - mean) / deviation, labels)
    expected = oracle.predict((queries - mean) / deviation)
    np.testing.assert_array_equal(found.classify(torch.from_numpy(queries)).numpy(), expected)


def test_votes_of_a_class_of_which_few_were_kept_count_for_those_left_out():
    sample = VoxelSample(torch.eye(2).repeat(10, 1), torch.tensor([3] * 10 + [7] * 10), {3: 10, 7: 1000})
    everyone = {"neighbours": 20, "temperature": 10.0}  # all rows vote, nearly alike
    assert fit_neighbours(sample, ProbeConfig(balance=0.0, **everyone)).classify(torch.eye(2)).tolist() == [7, 7]
    alike = fit_neighbours(sample, ProbeConfig(balance=1.0, neighbours_per_class=4, **everyone))
    assert len(alike.bank) == 8
    assert alike.vote.sum(0).tolist() == pytest.approx([0.5, 0.5])


def test_more_neighbours_than_voxels_are_all_of_them():
    sample = VoxelSample(torch.eye(3), torch.tensor([1, 2, 4]), {1: 1, 2: 1, 4: 1})
    found = fit_neighbours(sample, ProbeConfig(neighbours=20))
    assert found.classify(torch.eye(3)).tolist() == [1, 2, 4]
    assert found.classify(torch.zeros(0, 3)).tolist() == []


def test_the_rank_weighs_classes_as_they_occur_and_is_told_for_each():
    axes = torch.cat([torch.eye(4), -torch.eye(4)])
    first, second = torch.nn.functional.pad(axes, (0, 2)), torch.zeros(8, 6)
    sample = VoxelSample(torch.cat([first, second]), torch.tensor([1] * 8 + [2] * 8), {1: 8, 2: 10**9})
    rank = feature_rank(sample)
    assert rank.columns == 6
    assert rank.by_class == pytest.approx({1: 4.0, 2: 0.0}, abs=1e-4)
    assert rank.overall == pytest.approx(4.0, abs=1e-3)  # a constant class moves no direction


def test_a_teacher_stands_in_the_place_of_an_encoder_by_the_mean_of_its_features():
    here, there, far = [0.5, 0.5, 0.5], [3.5, 0.5, 0.5], [6.5, 0.5, 0.5]
    batch = batch_of(torch.tensor([here, here, there, far]), labels=torch.tensor([4, 4, 7, 9]))
    told = replace(
        batch,
        cell_features=torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]),
        point_cell=torch.tensor([0, 1, 2, -1]),
        cell_superclass=torch.zeros(3, dtype=torch.int64),
    )
    joined = TeacherVoxels(GRID).joined_features(told)
    assert joined.feats.tolist() == [[0.5, 0.5], [1.0, 1.0], [0.0, 0.0]]
    assert joined.point_features.tolist() == [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]]
    assert evaluate_probe(fit_probe(TeacherVoxels(GRID), [told]), [told], NAMES).linear.miou == 1.0
    with pytest.raises(DataError, match="no features of a teacher"):
        TeacherVoxels(GRID).joined_features(batch)


def test_without_neighbours_there_is_no_such_classifier():
    batch = layered_batch(100)
    scores = evaluate_probe(fit_probe(HeightEncoder(), [batch], ProbeConfig(neighbours=0)), [batch], NAMES)
    assert scores.neighbours is None


@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
def test_balance_decides_how_much_a_frequent_class_weighs_where_features_say_nothing(balance: float):
    sample = VoxelSample(torch.zeros(20, 2), torch.tensor([3] * 10 + [7] * 10), {3: 10, 7: 1000})
    found = fit_linear(sample, ProbeConfig(balance=balance))
    wanted = torch.tensor([10.0, 1000.0]) ** (1 - balance)
    np.testing.assert_allclose(found.bias.softmax(0).numpy(), (wanted / wanted.sum()).numpy(), atol=1e-3)


def test_a_voxel_has_the_label_of_most_of_its_points_and_the_smallest_of_equals():
    here, there, noise = [0.5, 0.5, 0.5], [3.5, 0.5, 0.5], [6.5, 0.5, 0.5]
    xyz = torch.tensor([here] * 3 + [there] * 4 + [noise] * 2 + [[100.0, 0.0, 0.0]])
    labels = torch.tensor([4, 7, 7, 9, 9, 3, 3, 0, 0, 5])
    batch = batch_of(xyz)
    assert voxel_labels(labels, assign_voxels(xyz, batch.sample, 1, GRID)).tolist() == [7, 3, 0]


def test_noise_does_not_outvote_a_label():
    xyz = torch.zeros(5, 3)
    assert voxel_labels(
        torch.tensor([0, 0, 0, 0, 6]), assign_voxels(xyz, torch.zeros(5, dtype=torch.int64), 1, GRID)
    ).tolist() == [6]


def test_no_voxel_has_no_label():
    batch = batch_of(no_points())
    assert voxel_labels(torch.zeros(0, dtype=torch.int64), assign_voxels(batch.xyz, batch.sample, 1, GRID)).shape == (0,)


def test_the_sample_is_bounded_and_counts_what_it_has_seen():
    def frames() -> Iterator[PointBatch]:
        for seed in range(6):
            yield layered_batch(300, seed=seed)

    full = sample_voxels(HeightEncoder(), frames(), ProbeConfig(voxels_per_class=10_000))
    small = sample_voxels(HeightEncoder(), frames(), ProbeConfig(voxels_per_class=20))
    assert full.seen == small.seen
    assert {c: int((full.labels == c).sum()) for c in full.seen} == full.seen
    assert all(int((small.labels == c).sum()) == 20 for c in small.seen)


def test_every_frame_is_as_likely_as_the_others_to_be_sampled():
    class FrameEncoder(HeightEncoder):
        def joined_features(self, batch: PointBatch) -> JoinedFeatures:
            joined = super().joined_features(batch)
            number = float(batch.frame_names[0].split("/")[1])
            return JoinedFeatures(torch.full_like(joined.feats, number), joined.assignment, joined.point_features)

    def frames() -> Iterator[PointBatch]:
        for number in range(10):
            batch = layered_batch(400, seed=1)
            names = (f"log/{number}",)
            yield PointBatch(batch.xyz, batch.features, batch.sample, 1, names, batch.labels)

    sample = sample_voxels(FrameEncoder(), frames(), ProbeConfig(voxels_per_class=200))
    counts = torch.bincount(sample.feats[:, 0].long(), minlength=10)
    # 600 draws over 10 equal frames: 60 each, standard deviation 7.
    assert counts.min() > 60 - 5 * 7
    assert counts.max() < 60 + 5 * 7


def test_a_probe_repeats_to_the_same_numbers_and_leaves_the_encoder_alone():
    encoder, batches = frozen_encoder(), [layered_batch(300, samples=2, seed=s) for s in range(2)]
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    first, second = (fit_probe(encoder, batches, ProbeConfig(voxels_per_class=50, seed=3)) for _ in range(2))
    assert torch.equal(first.linear.weight, second.linear.weight)
    assert first.sample_size == 150
    assert encoder.training
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_even_an_untrained_encoder_lets_the_probe_tell_ground_from_trees():
    encoder = frozen_encoder()
    probe = fit_probe(encoder, [layered_batch(600, seed=s) for s in range(3)])
    scores = evaluate_probe(probe, [layered_batch(600, seed=9)], NAMES)
    assert scores.linear.miou is not None
    assert scores.linear.miou > 0.6


def test_points_outside_the_grid_are_scored():
    batch = batch_of(torch.tensor([[0.5, 0.5, 0.5], [60.0, 0.0, 0.0]]), labels=torch.tensor([4, 4]))
    scores = evaluate_probe(fit_probe(HeightEncoder(), [batch]), [batch], NAMES)
    assert scores.linear.num_points == 2
    assert scores.linear.miou == 1.0


def test_frames_without_a_labelled_voxel_are_refused_in_words():
    with pytest.raises(DataError, match="none of the 2 frames"):
        fit_probe(HeightEncoder(), [batch_of(torch.zeros(2, 3), no_points(), labels=torch.zeros(2, dtype=torch.int64))])
    with pytest.raises(DataError, match="no labels"):
        fit_probe(HeightEncoder(), [batch_of(torch.zeros(2, 3))])


@pytest.mark.parametrize("xyz", [no_points(), torch.tensor([[70.0, 0.0, 0.0]]), torch.zeros(1, 3)])
def test_awkward_frames_are_answered(xyz: torch.Tensor):
    probe = fit_probe(frozen_encoder(), [layered_batch(100), batch_of(xyz, labels=torch.full((len(xyz),), 4))])
    by_linear, by_neighbours = probe.predict(batch_of(xyz))
    assert by_neighbours is not None
    assert by_linear.shape == by_neighbours.shape == (len(xyz),)
