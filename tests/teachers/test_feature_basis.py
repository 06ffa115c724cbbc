from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from picture3d.errors import ConfigError, DataError
from picture3d.teachers.feature_basis import (
    AIMED_COSINE,
    BasisFit,
    CodeBooks,
    FeatureBasis,
    PrincipalBasis,
    basis_digest,
    basis_of_tree,
    basis_tree,
    nearest_centres,
)
from picture3d.teachers.feature_codecs import (
    FeatureCodec,
    codec_of,
    decode_features,
    encode_features,
    row_cosines,
    smallest_codec,
    stored_cosine,
)
from picture3d.teachers.store import FeatureStore, StoreSettings, target_path
from picture3d.teachers.targets import compute_targets
from tests.teachers.made_teachers import FourierTeacher, Key, MadeDataset


def made_features(rows: int, seed: int = 0, dimension: int = 20, rank: int = 6) -> NDArray[np.float32]:
    """Features in a plane of `rank` dimensions, of falling variance, off the origin."""
    rng = np.random.default_rng(seed)
    plane = np.random.default_rng(99).normal(size=(rank, dimension)) * 0.6 ** np.arange(rank)[:, None]
    return (rng.normal(size=(rows, rank)) @ plane + np.linspace(-0.5, 0.5, dimension)).astype(np.float32)


def fitted(frames: list[NDArray[np.float32]]) -> BasisFit:
    fit = BasisFit(frames[0].shape[1], len(frames), seed=0)
    for number, features in enumerate(frames):
        fit.add(fit.moments(number, features))
    return fit


def read_back(features: NDArray[np.float32], basis: FeatureBasis) -> NDArray[np.float16]:
    encoded = encode_features(features, codec_of(basis), basis)
    return decode_features(
        np.frombuffer(bytearray(encoded), np.uint8), codec_of(basis), features.shape[0], features.shape[1], basis
    )


def test_principal_components_fitted_frame_by_frame_are_those_of_all_rows_at_once():
    frames = [made_features(rows, seed) for seed, rows in enumerate((50, 1, 0, 300))]
    basis = fitted(frames).principal(rank=6)
    rows = np.concatenate(frames).astype(np.float64)
    _, _, expected = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    assert np.allclose(basis.mean, rows.mean(0), atol=1e-6)
    assert np.allclose(np.abs((basis.axes * expected[:6]).sum(1)), 1, atol=1e-5)
    assert np.allclose(basis.axes @ basis.axes.T, np.eye(6), atol=1e-6)


def test_the_same_frames_give_the_same_basis_bit_for_bit():
    frames = [made_features(100, seed) for seed in range(4)]
    first, again = (fitted(frames) for _ in range(2))
    assert basis_digest(first.principal()) == basis_digest(again.principal())
    books = [fit.code_books(torch.Generator().manual_seed(3), books=5) for fit in (first, again)]
    assert basis_digest(books[0]) == basis_digest(books[1])
    assert basis_digest(books[0]) != basis_digest(first.code_books(torch.Generator().manual_seed(4), books=5))


@pytest.mark.parametrize(("wide", "rank"), [(6, 6), (2, 6), (0, 6), (0, 5), (0, 0)])
def test_a_row_of_zeros_stays_zeros_and_no_other_row_becomes_one(wide: int, rank: int):
    features = made_features(200)
    basis = fitted([features]).principal(rank, wide)
    features[[0, 7, 199]] = 0
    read = read_back(features, basis)
    # Without a component there is nothing to tell rows apart by: all are the mean.
    assert np.flatnonzero(~read.any(1)).tolist() == ([0, 7, 199] if rank else [])
    if rank:
        cosines = row_cosines(features, encode_features(features, codec_of(basis), basis), codec_of(basis), basis)
        assert (cosines[[0, 7, 199]] == 1).all()


def test_rows_that_are_not_finite_do_not_enter_the_fit():
    good = made_features(100)
    spoiled = np.concatenate([good, np.full((1, 20), np.nan, np.float32), np.full((1, 20), np.inf, np.float32)])
    assert np.allclose(fitted([spoiled]).principal(4).axes, fitted([good]).principal(4).axes)


def test_the_chosen_size_reaches_the_cosine_and_a_byte_less_does_not():
    features = made_features(2000)
    fit = fitted([features])
    basis = fit.principal()
    assert (
        row_cosines(features, encode_features(features, FeatureCodec.PCA, basis), FeatureCodec.PCA, basis).mean()
        >= AIMED_COSINE
    )
    size = basis.bytes_per_cell
    assert size < 6  # a plane of 6 dimensions: eight bits for each would do
    for wide in range(size):
        smaller = fit.principal(rank=wide + 2 * (size - 1 - wide), wide=wide)
        assert smaller.bytes_per_cell == size - 1
        encoded = encode_features(features, FeatureCodec.PCA, smaller)
        assert stored_cosine(features, encoded, FeatureCodec.PCA, smaller) < AIMED_COSINE


@pytest.mark.parametrize(("rank", "wide"), [(6, 6), (6, 0), (6, 3), (5, 0), (0, 0), (20, 7)])
def test_coefficients_are_off_by_at_most_half_a_step_where_nothing_is_cut_off(rank: int, wide: int):
    features = made_features(40)
    basis = fitted([features]).principal(rank=rank, wide=wide)
    encoded = encode_features(features, FeatureCodec.PCA, basis)
    assert len(encoded) == 40 * basis.bytes_per_cell + 4 * rank
    exact = (features.astype(np.float64) - basis.mean) @ basis.axes.T.astype(np.float64)
    stored = (read_back(features, basis).astype(np.float64) - basis.mean) @ basis.axes.T.astype(np.float64)
    steps = np.frombuffer(encoded[-4 * rank :] if rank else b"", "<f4")
    limits = np.where(np.arange(rank) < wide, 127, 7) * steps
    inside = np.abs(exact) <= limits + 1e-6
    assert inside[:, :wide].all()
    # Half a step, and the rounding of up to 20 channels to float16.
    assert np.all((np.abs(stored - exact) <= steps / 2 + 0.01)[inside])


def test_code_books_give_the_nearest_centre_of_every_run():
    features = made_features(600, dimension=11)
    books = fitted([features]).code_books(torch.Generator().manual_seed(0), books=4)  # 11 channels in runs of 3
    assert books.centres.shape == (4, 256, 3)
    codes, read = nearest_centres(features, books)
    padded = np.zeros((600, 12))
    padded[:, :11] = features
    for book in range(4):
        run = padded[:, 3 * book : 3 * book + 3]
        distance = np.square(run[:, None] - books.centres[book][None]).sum(2)
        assert np.allclose(distance[np.arange(600), codes[:, book]], distance.min(1), atol=1e-6)
    assert np.allclose(read_back(features, books), read, atol=2e-3)
    assert np.abs(read - features).max() < np.abs(features).max()


def test_books_with_fewer_rows_than_codes_and_none_at_all():
    few = made_features(5)
    books = fitted([few]).code_books(torch.Generator(), books=20)
    assert np.allclose(read_back(few, books), few, atol=1e-3)
    none = fitted([few[:0]])
    assert read_back(few[:0], none.code_books(torch.Generator())).shape == (0, 20)
    # Without a row nothing is known: the basis is there, and what it spoils is stored otherwise.
    assert smallest_codec(few, none.principal(rank=1))[0] is FeatureCodec.INT8


def test_a_basis_comes_back_from_text_and_a_garbled_one_is_refused():
    fit = fitted([made_features(50)])
    for basis in (fit.principal(), fit.principal(5, 2), fit.code_books(torch.Generator(), books=4)):
        tree = json.loads(json.dumps(basis_tree(basis)))
        back = basis_of_tree(tree)
        assert type(back) is type(basis)
        assert basis_digest(back) == basis_digest(basis)
    tree = basis_tree(fit.principal(5, 2))
    for broken in (
        {**tree, "rank": 4},
        {**tree, "wide": 6},
        {**tree, "dimension": -1},
        {**tree, "axes": "?"},
        {**tree, "axes": None},
        {**tree, "kind": "zip"},
        {key: value for key, value in tree.items() if key != "mean"},
        "pca",
        {**basis_tree(fit.code_books(torch.Generator(), books=4)), "books": 0},
    ):
        with pytest.raises(ValueError, match=r"basis|wide|components|books|array"):
            basis_of_tree(broken)


def test_features_too_wide_for_a_basis_are_refused_and_auto_does_without(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"5000 channels.*int8 or float16"):
        BasisFit(5000, 1, seed=0)


def test_a_wrong_or_missing_basis_is_refused_in_words():
    features = made_features(10)
    fit = fitted([features])
    principal, books = fit.principal(), fit.code_books(torch.Generator(), books=4)
    for codec, basis in ((FeatureCodec.PCA, None), (FeatureCodec.PCA, books), (FeatureCodec.PRODUCT, principal)):
        with pytest.raises(DataError, match=r"need the basis for 20 channels.*picture3d targets"):
            encode_features(features, codec, basis)
    other = PrincipalBasis(np.zeros(3, np.float32), np.eye(3, dtype=np.float32), 3)
    with pytest.raises(DataError, match="need the basis for 20 channels"):
        encode_features(features, FeatureCodec.PCA, other)
    with pytest.raises(ValueError, match="expected centres"):
        CodeBooks(np.zeros((2, 7, 3), np.float32), 6)


# In a store --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path: Path) -> MadeDataset:
    return MadeDataset(tmp_path, {"log-a": 5, "log-b": 3})


@pytest.mark.parametrize("codec", ["pca", "product", "auto"])
def test_a_store_with_a_basis_gives_the_teachers_features_nearly(dataset: MadeDataset, codec: str):
    summary = compute_targets(dataset, FourierTeacher(dimension=16), codec=codec)
    assert summary.codecs["pca" if codec == "auto" else codec] >= 3
    store = FeatureStore(summary.folder)
    for key in dataset.keyframes():
        frame = dataset.frame(key)
        read, own = store.targets(frame), FourierTeacher(dimension=16).cell_features(frame.points)
        assert read is not None
        if len(own.features):
            cosine = torch.cosine_similarity(torch.from_numpy(read.features.astype(np.float32)), own.features)
            entry = store.file(key.log).entries[key.index]
            assert cosine.mean() >= 0.995
            assert entry.cosine == pytest.approx(cosine.mean().item(), abs=1e-5)
            assert entry.length < 17 * entry.cells  # less than int8 takes


def test_a_basis_of_other_frames_stays_and_serves_the_logs_that_come_later(dataset: MadeDataset):
    early = MadeDataset(dataset.root, {"log-b": 3})
    folder = compute_targets(early, FourierTeacher()).folder
    description = (folder / "teacher.json").read_bytes()
    first = target_path(folder, "log-b").read_bytes()
    assert compute_targets(dataset, FourierTeacher()).logs_made == 1
    assert (folder / "teacher.json").read_bytes() == description
    assert target_path(folder, "log-b").read_bytes() == first
    # The other way round the log comes out the same, as long as the basis is the same.
    target_path(folder, "log-b").unlink()
    compute_targets(dataset, FourierTeacher())
    assert target_path(folder, "log-b").read_bytes() == first


def test_a_store_without_a_basis_from_an_earlier_version_is_read_and_gone_on_with(dataset: MadeDataset):
    folder = dataset.root / "targets" / "fourier"
    StoreSettings.of(FourierTeacher(), num_superclasses=8, seed=0, codec="auto").save(folder)
    assert "basis" not in json.loads((folder / "teacher.json").read_text())
    summary = compute_targets(dataset, FourierTeacher())
    assert set(summary.codecs) == {"int8"}
    assert FeatureStore(folder).targets(dataset.frame(Key("log-a", 2))) is not None


def test_a_store_whose_basis_was_lost_or_changed_is_refused_in_words(dataset: MadeDataset):
    folder = compute_targets(dataset, FourierTeacher()).folder
    path = folder / "teacher.json"
    tree = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in tree.items() if key != "basis"}))
    with pytest.raises(
        DataError, match=r"log-a\.targets: was stored with basis \w+, teacher\.json holds none.*picture3d targets"
    ):
        FeatureStore(folder).targets(dataset.frame(Key("log-a", 2)))
    settings = StoreSettings.load(folder)
    path.write_text(json.dumps({**tree, "codec": "pca", "basis": None}))
    with pytest.raises(DataError, match=r"teacher\.json: lacks the basis.*picture3d targets"):
        FeatureStore(folder)
    other = fitted([made_features(30, dimension=8)]).principal(4)
    path.unlink()
    replace(settings, basis=other).save(folder)
    with pytest.raises(DataError, match=r"was stored with basis \w+, teacher\.json holds \w+"):
        FeatureStore(folder).targets(dataset.frame(Key("log-a", 2)))
    # The next run makes the logs anew with the basis that is there.
    assert compute_targets(dataset, FourierTeacher()).logs_made == 2


def test_of_two_processes_that_begin_together_the_basis_of_the_first_holds(dataset: MadeDataset):
    folder = dataset.root / "targets" / "fourier"
    settings = StoreSettings.of(FourierTeacher(), num_superclasses=8, seed=0, codec="auto")
    first, second = (fitted([made_features(30, seed, dimension=8)]).principal(4) for seed in (1, 2))
    replace(settings, basis=first).save(folder)
    replace(settings, basis=second).save(folder)
    found = StoreSettings.load(folder).basis
    assert found is not None
    assert basis_digest(found) == basis_digest(first)
    assert [path.name for path in folder.iterdir()] == ["teacher.json"]
