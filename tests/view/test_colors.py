import numpy as np
import pytest

from picture3d.view import colors
from picture3d.view.report_data import LIDARSEG_CLASSES


def blobs(seed: int = 0, dimension: int = 12) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.normal(size=dimension) * 3 + rng.normal(size=(200, dimension)) * 0.2 for _ in range(4)])


def test_every_lidarseg_class_has_a_colour_of_its_own_and_class_0_is_grey():
    table = colors.class_colors(LIDARSEG_CLASSES)
    assert len(np.unique(table, axis=0)) == 17
    assert tuple(table[0]) == colors.GREY


def test_unknown_class_names_and_numbers_still_get_colours():
    table = colors.class_colors(["none", "rock", "river", "car"])
    assert len(np.unique(table[1:], axis=0)) == 3
    shown = colors.label_colors(np.array([2, 9, -1]), ["none", "rock", "river"])
    assert tuple(shown[1]) == tuple(shown[2]) == colors.GREY != tuple(shown[0])
    assert colors.class_colors([]).shape == (0, 3)


def test_the_ramp_grows_lighter_all_the_way():
    lightness = colors.ramp_table().astype(float) @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(lightness) >= -0.5).all()
    assert lightness[-1] > lightness[0] + 100


def test_ramp_colours_keep_the_order_of_values_and_grey_out_nan():
    shown = colors.ramp_colors(np.array([0.0, 5.0, 10.0, np.nan]), limits=(0, 10))
    assert tuple(shown[0]) == tuple(colors.ramp_table()[0])
    assert tuple(shown[2]) == tuple(colors.ramp_table()[-1])
    assert tuple(shown[3]) == colors.GREY
    assert colors.ramp_colors(np.zeros(0)).shape == (0, 3)
    assert len(np.unique(colors.ramp_colors(np.full(5, 3.0)), axis=0)) == 1


def test_pca_directions_are_those_of_the_singular_value_decomposition_with_their_sign_fixed():
    features = blobs()
    basis = colors.pca_basis(features)
    oracle = np.linalg.svd(features - features.mean(0), full_matrices=False)[2][:3]
    np.testing.assert_allclose(np.abs(np.sum(basis.directions * oracle, 1)), 1, atol=1e-9)
    assert (basis.directions[np.arange(3), np.abs(basis.directions).argmax(1)] > 0).all()


def test_pca_colours_do_not_depend_on_the_order_of_points_and_part_the_blobs():
    features = blobs()
    shown = colors.pca_colors(features)
    order = np.random.default_rng(1).permutation(len(features))
    moved = colors.pca_colors(features[order]).astype(int)
    assert np.abs(moved - shown[order]).max() <= 1  # sums in another order may round differently
    centres = shown.reshape(4, 200, 3).astype(float).mean(1)
    apart = np.linalg.norm(centres[:, None] - centres[None], axis=-1)
    assert apart[np.triu_indices(4, 1)].min() > 30


def test_a_shared_basis_gives_the_same_features_the_same_colours():
    features = blobs()
    basis = colors.pca_basis(features)
    np.testing.assert_array_equal(colors.pca_colors(features[:50], basis), colors.pca_colors(features, basis)[:50])
    assert not np.array_equal(colors.pca_colors(features[:50]), colors.pca_colors(features, basis)[:50])


@pytest.mark.parametrize("shape", [(0, 5), (1, 5), (2, 5), (6, 1), (6, 2)])
def test_pca_colours_of_too_few_points_or_columns(shape: tuple[int, int]):
    shown = colors.pca_colors(np.random.default_rng(0).normal(size=shape))
    assert shown.shape == (shape[0], 3)
    assert shown.dtype == np.uint8


def test_features_that_are_not_finite_are_grey_and_do_not_move_the_rest():
    features = blobs()
    broken = np.concatenate([features, [[np.nan] * 12], [[np.inf] * 12]])
    shown = colors.pca_colors(broken)
    np.testing.assert_array_equal(shown[:-2], colors.pca_colors(features))
    assert tuple(shown[-1]) == tuple(shown[-2]) == colors.GREY


def test_features_must_be_a_table():
    with pytest.raises(ValueError, match=r"\(N, D\)"):
        colors.pca_basis(np.zeros(5))


def test_masks_and_mistakes_have_two_colours_and_ignored_points_a_third():
    shown = colors.mask_colors(np.array([True, False]))
    assert tuple(shown[0]) == colors.HIDDEN
    assert tuple(shown[1]) == colors.VISIBLE
    shown = colors.mistake_colors(np.array([1, 1, 0]), np.array([1, 2, 5]))
    assert tuple(shown[0]) == colors.RIGHT
    assert tuple(shown[1]) == colors.WRONG
    assert tuple(shown[2]) not in {colors.RIGHT, colors.WRONG}


def test_groups_without_a_number_are_grey():
    shown = colors.group_colors(np.array([-1, 0, 1, 0]))
    assert tuple(shown[0]) == colors.GREY
    assert tuple(shown[1]) == tuple(shown[3]) != tuple(shown[2])
