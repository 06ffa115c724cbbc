"""The hand-crafted teacher measures what a ruler would: planes, lines, balls, heights, and a float64 twin without any cells."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from picture3d.commands.build import build_teacher
from picture3d.datasets.prepared import PreparedDataset
from picture3d.errors import ConfigError, DataError
from picture3d.structures.points import IntensityUnit, PointCloud
from picture3d.teachers.handcrafted import CELL_M, COLUMNS, HandcraftedTeacher
from picture3d.teachers.store import FeatureStore
from picture3d.teachers.targets import OnlineTeacherSource, compute_targets
from tests.datasets.made_frames import made_frame, write_made_dataset

NAMES = [name for name, *_ in COLUMNS]


def _cloud(xyz: NDArray[np.floating], intensity: NDArray[np.floating] | None = None) -> PointCloud:
    xyz = np.asarray(xyz, np.float32).reshape(-1, 3)
    echo = np.full(len(xyz), 0.5, np.float32) if intensity is None else np.asarray(intensity, np.float32)
    return PointCloud(xyz, echo, IntensityUnit.UNIT)


def _measured(points: PointCloud) -> dict[str, NDArray[np.float64]]:
    """Columns by name, one row per point."""
    measured, point_cell = HandcraftedTeacher().measure(points)
    return dict(zip(NAMES, measured[point_cell].numpy().T, strict=True))


def _square(half_m: float = 6.0, step_m: float = 0.125) -> NDArray[np.float64]:
    """Points of a square grid, none of them on the edge of a cell."""
    line = np.arange(-half_m + step_m / 2, half_m, step_m)
    return np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2)


def test_a_level_plane_is_planar_flat_and_at_height_zero():
    flat = _square()
    found = _measured(_cloud(np.column_stack([flat, np.full(len(flat), -1.75)])))
    inner = np.abs(flat).max(1) < 2  # the cubes of these lie whole on the plane
    for scale in ("near", "far"):
        np.testing.assert_allclose(found[f"sphericity_{scale}"][inner], 0, atol=1e-9)
        np.testing.assert_allclose(found[f"flat_{scale}"], found[f"planarity_{scale}"], atol=1e-9)
        np.testing.assert_allclose(found[f"planarity_{scale}"][inner], 1, atol=1e-9)
        np.testing.assert_allclose(found[f"linearity_{scale}"][inner], 0, atol=1e-9)
        np.testing.assert_allclose(found[f"height_spread_m_{scale}"], 0, atol=1e-9)
    np.testing.assert_allclose(found["height_m"], 0, atol=1e-3)
    np.testing.assert_allclose(found["near_ground"], 1, atol=1e-3)
    np.testing.assert_allclose(found["column_top_m"], 0, atol=1e-3)


def test_an_upright_wall_is_planar_and_not_flat():
    flat = _square()
    found = _measured(_cloud(np.column_stack([flat[:, 0], np.full(len(flat), 3.0), flat[:, 1]])))
    inner = np.abs(flat).max(1) < 2
    np.testing.assert_allclose(found["planarity_near"][inner], 1, atol=1e-9)
    np.testing.assert_allclose(found["flat_near"], 0, atol=1e-9)


def test_a_pole_is_linear_and_upright_and_a_kerb_is_linear_and_not():
    along = np.linspace(0, 4, 400)
    pole = _measured(_cloud(np.column_stack([np.full(400, 5.1), np.full(400, 2.1), along])))
    np.testing.assert_allclose(pole["linearity_near"], 1, atol=1e-9)
    np.testing.assert_allclose(pole["upright_near"], 1, atol=1e-9)
    np.testing.assert_allclose(pole["column_top_m"], 4 - 0.05 * 4, atol=0.02)  # above the 5 % quantile
    kerb = _measured(_cloud(np.column_stack([5 + along, np.full(400, 2.1), np.full(400, 0.1)])))
    np.testing.assert_allclose(kerb["linearity_near"], 1, atol=1e-9)
    np.testing.assert_allclose(kerb["upright_near"], 0, atol=1e-9)


def test_a_filled_cube_has_no_preferred_direction():
    line = np.arange(-4.5 + 0.125, 4.5, 0.25)
    cloud = np.stack(np.meshgrid(line, line, line), axis=-1).reshape(-1, 3)
    found = _measured(_cloud(cloud))
    inner = np.abs(cloud).max(1) < 3
    np.testing.assert_allclose(found["sphericity_far"][inner], 1, atol=1e-9)
    np.testing.assert_allclose(found["variation_far"][inner], 1 / 3, atol=1e-9)
    np.testing.assert_allclose(found["linearity_far"][inner], 0, atol=1e-9)
    # 18 grid lines within 4.5 m: a discrete uniform distribution.
    np.testing.assert_allclose(found["height_spread_m_far"][inner], 0.25 * np.sqrt((18**2 - 1) / 12), atol=1e-9)


def test_the_covariance_is_that_of_the_points_in_the_cube():
    rng = np.random.default_rng(2)
    cloud = np.concatenate([rng.normal(0, [3, 1, 0.4], (900, 3)), rng.normal((40, -30, 2), 1.0, (300, 3))]).astype(np.float32)
    echo = rng.uniform(0, 1, len(cloud)).astype(np.float32)
    found = _measured(_cloud(cloud, echo))
    for scale, size in (("near", 2 * CELL_M), ("far", 6 * CELL_M)):
        block = np.floor(cloud / size)
        for i in range(0, len(cloud), 37):
            near = (np.abs(block - block[i]) <= 1).all(1)
            members = cloud[near].astype(np.float64)
            cell = (np.floor(cloud / CELL_M) == np.floor(cloud[i] / CELL_M)).all(1)
            centre = cloud[cell].astype(np.float64).mean(0)
            distance = max(1.0, math.hypot(centre[0], centre[1]))
            expected = math.log(len(members)) + 2 * math.log(distance)
            assert found[f"density_{scale}"][i] == pytest.approx(expected, abs=1e-4)
            if scale == "near":
                assert found["intensity_mean"][i] == pytest.approx(echo[near].mean(), abs=3e-4)
                assert found["intensity_spread"][i] == pytest.approx(echo[near].std(), abs=3e-4)
                assert found["intensity"][i] == pytest.approx(echo[cell].mean(), abs=3e-4)
            if len(members) < 3:
                assert math.isnan(found[f"linearity_{scale}"][i])
                continue
            value, direction = np.linalg.eigh(np.cov(members.T, bias=True))
            l3, l2, l1 = value
            assert found[f"linearity_{scale}"][i] == pytest.approx((l1 - l2) / l1, abs=2e-3)
            assert found[f"planarity_{scale}"][i] == pytest.approx((l2 - l3) / l1, abs=2e-3)
            assert found[f"variation_{scale}"][i] == pytest.approx(l3 / value.sum(), abs=2e-3)
            assert found[f"flat_{scale}"][i] == pytest.approx((l2 - l3) / l1 * direction[2, 0] ** 2, abs=2e-3)
            assert found[f"upright_{scale}"][i] == pytest.approx((l1 - l2) / l1 * direction[2, 2] ** 2, abs=2e-3)
            assert found[f"height_spread_m_{scale}"][i] == pytest.approx(members[:, 2].std(), abs=1e-3)


def test_a_box_on_a_street_stands_above_the_street_and_echoes_from_below_do_not_lower_it():
    street = np.column_stack([_square(10.0, 0.25), np.full(6400, -1.8)])
    roof = np.column_stack([np.random.default_rng(3).uniform(1.6, 2.8, (200, 2)), np.full(200, -0.3)])
    below = np.array([[1.0, 1.0, -4.0], [-5.0, 4.0, -3.0]])
    found = _measured(_cloud(np.concatenate([street, roof, below])))
    np.testing.assert_allclose(found["height_m"][:6400], 0, atol=0.02)
    np.testing.assert_allclose(found["height_m"][6400:6600], 1.5, atol=0.02)
    assert found["column_top_m"][6400:6600].min() == pytest.approx(1.5, abs=0.02)
    assert found["height_m"][6600] == -1  # held at the lowest height


def test_three_points_give_the_eigenvalues_worked_out_by_hand():
    # Variances: x 2/9, y 2/9, covariance -1/9 (in square metres of a triangle with legs of 0.125 m): eigenvalues 3/9 and 1/9.
    found = _measured(_cloud(np.array([[0, 0, 0], [0.125, 0, 0], [0, 0.125, 0]]) + 0.03125))
    assert found["linearity_near"][0] == pytest.approx(2 / 3, abs=1e-12)
    assert found["planarity_near"][0] == pytest.approx(1 / 3, abs=1e-12)
    assert found["flat_near"][0] == pytest.approx(1 / 3, abs=1e-12)


def test_an_empty_sweep_and_a_single_point_are_described_too():
    teacher = HandcraftedTeacher()
    none = teacher.cell_features(_cloud(np.zeros((0, 3))))
    assert (none.features.shape, none.point_cell.shape) == ((0, len(COLUMNS)), (0,))
    one = teacher.cell_features(_cloud(np.array([[3.0, 4.0, 1.0]])))
    assert one.features.shape == (1, len(COLUMNS))
    assert bool(torch.isfinite(one.features).all())
    shapes = [i for i, name in enumerate(NAMES) if name.startswith(("linearity", "planarity", "flat", "height_spread"))]
    assert (one.features[0, shapes] == 0).all()
    assert _measured(_cloud(np.array([[3.0, 4.0, 1.0]])))["density_near"][0] == pytest.approx(2 * math.log(5), abs=1e-9)
    together = teacher.cell_features(_cloud(np.ones((50, 3))))  # all in one place
    assert together.features.shape[0] == 1
    assert bool(torch.isfinite(together.features).all())


def test_points_that_are_not_finite_are_in_no_cell_and_an_intensity_that_is_not_is_refused():
    cloud = np.array([[1, 2, 0], [math.nan, 0, 0], [1, 2.1, 0], [0, math.inf, 0]], np.float32)
    teacher = HandcraftedTeacher()
    found = teacher.cell_features(_cloud(cloud))
    assert (found.point_cell >= 0).tolist() == [True, False, True, False]
    torch.testing.assert_close(found.features, teacher.cell_features(_cloud(cloud[[0, 2]])).features, rtol=0, atol=0)
    assert (teacher.cell_features(_cloud(cloud)).of_points()[1] == 0).all()
    with pytest.raises(DataError, match="intensity of 1 points is not finite"):
        teacher.cell_features(_cloud(cloud, np.array([0, 0, math.nan, 0])))
    with pytest.raises(DataError, match="handcrafted: needs the intensity"):
        teacher.cell_features(PointCloud(cloud, np.zeros(4, np.float32), IntensityUnit.UNKNOWN))


def test_the_order_of_the_points_changes_not_one_bit():
    rng = np.random.default_rng(4)
    cloud, echo = rng.normal(0, 6, (3000, 3)).astype(np.float32), rng.uniform(0, 1, 3000).astype(np.float32)
    order = rng.permutation(3000)
    one = HandcraftedTeacher().cell_features(_cloud(cloud, echo)).of_points()
    other = HandcraftedTeacher().cell_features(_cloud(cloud[order], echo[order])).of_points()
    assert torch.equal(one[torch.from_numpy(order)], other)


def test_a_quarter_turn_changes_nothing():
    rng = np.random.default_rng(5)
    # In the middle of the steps, so that turning maps steps onto steps.
    cloud = (np.floor(rng.normal(0, 6, (2000, 3)) * 1024) + 0.5) / 1024
    turned = np.column_stack([-cloud[:, 1], cloud[:, 0], cloud[:, 2]])
    one, other = (
        HandcraftedTeacher().cell_features(_cloud(cloud)).of_points(),
        HandcraftedTeacher().cell_features(_cloud(turned)).of_points(),
    )
    torch.testing.assert_close(one, other, rtol=0, atol=2e-3)


def test_far_points_do_not_disturb_the_others():
    rng = np.random.default_rng(6)
    cloud = rng.normal(0, 6, (500, 3)).astype(np.float32)
    far = np.array([[3e5, 0, 0], [0, -2e6, 0]], np.float32)
    one = HandcraftedTeacher().cell_features(_cloud(cloud)).of_points()
    other = HandcraftedTeacher().cell_features(_cloud(np.concatenate([far, cloud]))).of_points()
    assert torch.equal(one, other[2:])
    assert bool(torch.isfinite(other).all())


def test_rows_are_about_as_long_as_those_of_a_learnt_teacher():
    rng = np.random.default_rng(7)
    features = HandcraftedTeacher().cell_features(_cloud(rng.normal(0, [15, 15, 1], (5000, 3)))).of_points()
    assert features.dtype == torch.float32
    assert 0.3 < float(features.norm(dim=1).median()) < 2
    assert float(features.abs().max()) <= 3 / math.sqrt(len(COLUMNS)) + 1e-6


def test_its_features_are_stored_and_read_back_and_given_online_alike(tmp_path: Path):
    write_made_dataset(tmp_path, {"a": [made_frame("a", index, points=400, seed=index) for index in range(2)]})
    dataset, teacher = PreparedDataset(tmp_path), HandcraftedTeacher()
    summary = compute_targets(dataset, teacher, num_superclasses=4, codec="int8")
    assert summary.frames == len(dataset.keyframes()) > 0
    assert summary.mean_cosine > 0.995
    store, online = FeatureStore(tmp_path / "targets" / "handcrafted"), OnlineTeacherSource(teacher, num_superclasses=4)
    for key in dataset.keyframes():
        stored, now = store.targets(dataset.frame(key)), online.targets(dataset.frame(key))
        assert stored is not None
        np.testing.assert_allclose(stored.features, now.features, atol=0.01)  # int8: half a step of the largest value
        np.testing.assert_array_equal(stored.superclass, now.superclass)
        np.testing.assert_array_equal(stored.point_cell, now.point_cell)


def test_it_is_built_by_name_and_takes_no_weights():
    teacher = build_teacher("handcrafted", None, torch.device("cpu"))
    assert (teacher.name, teacher.dimension, len(teacher.fingerprint)) == ("handcrafted", len(COLUMNS), 16)
    with pytest.raises(ConfigError, match="has no weights"):
        build_teacher("handcrafted", Path("x.pt"), torch.device("cpu"))
