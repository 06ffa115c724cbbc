"""Teachers made of a MinkUNet: which files they accept, and what they say of a sweep."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from picture3d.errors import CheckpointError, DataError
from picture3d.models.minkunet import MinkUNet
from picture3d.structures.points import IntensityUnit, PointCloud
from picture3d.teachers.minkunet import load_minkunet_teacher, read_point_network
from picture3d.teachers.town.teacher import WEIGHTS, load_town_teacher
from tests.minkowski_weights import minkowski_state


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return minkowski_state(MinkUNet(), 5)


def _sweep(count: int = 400, unit: IntensityUnit = IntensityUnit.RAW_255) -> PointCloud:
    rng = np.random.default_rng(0)
    xyz = rng.normal(0, 8, (count, 3)).astype(np.float32)
    return PointCloud(xyz, rng.uniform(0, 255, count).astype(np.float32), unit)


@pytest.mark.parametrize("container", ["plain", "model_points", "lightning", "safetensors"])
def test_every_published_container_gives_the_same_teacher(container: str, state: dict[str, torch.Tensor], tmp_path: Path):
    path = tmp_path / "weights.pt"
    match container:
        case "plain":
            torch.save(state, path)
        case "model_points":
            torch.save({"model_points": state, "model_images": {"w": torch.zeros(1)}, "epoch": 3}, path)
        case "lightning":
            both = {f"model_points.{k}": v for k, v in state.items()} | {"model_images.w": torch.zeros(1)}
            torch.save({"state_dict": both, "epoch": 3}, path)
        case _:
            path = tmp_path / "weights.safetensors"
            save_file(state, path)
    read = read_point_network(path)
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], state[name]) for name in state)


def test_a_file_that_is_not_this_network_is_refused_by_name(state: dict[str, torch.Tensor], tmp_path: Path):
    path = tmp_path / "weights.pt"
    wrong = {k: v for k, v in state.items() if k != "bn0.bn.bias"} | {"final.kernel": torch.zeros(96, 17)}
    torch.save(wrong, path)
    with pytest.raises(CheckpointError, match=r"1 missing \(bn0\.bn\.bias\).*final\.kernel is \(96, 17\), needs \(96, 64\)"):
        load_minkunet_teacher(path)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_minkunet_teacher(tmp_path / "absent.pt")


def test_a_pickle_with_code_in_it_is_not_opened(tmp_path: Path):
    path = tmp_path / "weights.pt"
    torch.save({"state_dict": Path("anything")}, path)
    with pytest.raises(CheckpointError, match="cannot be read as plain tensors"):
        load_minkunet_teacher(path)


def test_the_shipped_teacher_is_small_and_speaks_in_unit_vectors():
    assert WEIGHTS.stat().st_size <= 2 * 2**20
    teacher = load_town_teacher()
    assert (teacher.name, teacher.dimension, teacher.licence) == ("town", 64, "Apache-2.0")
    assert len(teacher.fingerprint) == 16
    points = _sweep()
    cells = teacher.cell_features(points)
    torch.testing.assert_close(cells.features.norm(dim=1), torch.ones(len(cells.features)), atol=1e-4, rtol=0)


def test_features_follow_the_points_whatever_their_order():
    teacher, points = load_town_teacher(), _sweep()
    # One point per cell, so that no shuffle changes which intensity speaks for a cell.
    alone = teacher.cell_features(points)
    first = np.unique(alone.point_cell.numpy(), return_index=True)[1]
    points = points.select(first)
    order = np.random.default_rng(1).permutation(len(points))
    straight, shuffled = (teacher.cell_features(p).of_points() for p in (points, points.select(order)))
    torch.testing.assert_close(shuffled, straight[order], atol=1e-5, rtol=1e-4)


def test_units_of_intensity_are_brought_to_what_the_network_saw():
    teacher, raw = load_town_teacher(), _sweep()
    unit = PointCloud(raw.xyz, raw.intensity / np.float32(255), IntensityUnit.UNIT)
    of_raw, of_unit = (teacher.cell_features(p).features for p in (raw, unit))
    torch.testing.assert_close(of_raw, of_unit, atol=1e-5, rtol=1e-4)
    with pytest.raises(DataError, match="unit is unknown"):
        teacher.cell_features(_sweep(unit=IntensityUnit.UNKNOWN))


def test_an_empty_sweep_and_points_that_are_not_finite():
    teacher = load_town_teacher()
    assert teacher.cell_features(_sweep(0)).of_points().shape == (0, 64)
    points = _sweep(3)
    points.xyz[1] = np.nan
    features = teacher.cell_features(points).of_points()
    assert torch.equal(features[1], torch.zeros(64))
    assert torch.isfinite(features).all()
