"""A finished encoder as a teacher: it says what the encoder says, and goes through the same store as any teacher."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from picture3d.commands.build import build_picture, build_targets, build_teacher
from picture3d.datasets.prepared import PreparedDataset
from picture3d.errors import ConfigError
from picture3d.recipes.catalogue import pretraining_recipe, tiny
from picture3d.recipes.configs import PretrainConfig, TargetsConfig
from picture3d.structures.batch import PointBatch
from picture3d.structures.points import IntensityUnit, PointCloud
from picture3d.teachers.store import FeatureStore
from picture3d.teachers.targets import compute_targets
from picture3d.training.checkpoint import save_checkpoint
from picture3d.training.state import model_tensors
from tests.datasets.made_frames import made_frame, write_made_dataset

CPU = torch.device("cpu")


def _config(prepared: Path) -> PretrainConfig:
    return tiny(pretraining_recipe("town-coordinates", prepared))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as training leaves it."""
    path = tmp_path_factory.mktemp("run") / "model.safetensors"
    config = _config(Path("prepared"))
    module = build_picture(config, CPU).module
    save_checkpoint(path, model_tensors(module), {"format": 1, "step": 1, "config": config.model_dump(mode="json")})
    return path


def _sweep(count: int = 500) -> PointCloud:
    rng = np.random.default_rng(0)
    xyz = rng.uniform((-20, -20, -2), (20, 20, 2), (count, 3)).astype(np.float32)
    return PointCloud(xyz, rng.uniform(0, 255, count).astype(np.float32), IntensityUnit.RAW_255)


def test_it_says_what_the_encoder_says_of_the_whole_sweep(run: Path):
    teacher, points = build_teacher("encoder", run, CPU), _sweep()
    model = build_picture(_config(Path("prepared")), CPU).module.eval()  # the same seed, hence the same weights
    intensity = torch.from_numpy(points.intensity / 255)[:, None]
    batch = PointBatch(torch.from_numpy(points.xyz), intensity, torch.zeros(500, dtype=torch.int64), 1, ("a/0",))
    with torch.no_grad():
        encoded = model.embed(batch)
        joined = model.features(batch).feats
    halves = [(h - h.mean(1, keepdim=True)) / (h.var(1, correction=0, keepdim=True) + 1e-5).sqrt() for h in joined.chunk(2, 1)]
    expected = torch.cat(halves, 1) / math.sqrt(joined.shape[1])
    inside, voxel = encoded.assignment.point_index, encoded.assignment.voxel_of_point
    found = teacher.cell_features(points).of_points()
    assert found.shape == (500, teacher.dimension)
    torch.testing.assert_close(found[inside], expected[voxel], atol=1e-5, rtol=1e-5)


def test_points_outside_the_range_or_not_finite_have_zeros_and_no_points_have_no_cells(run: Path):
    teacher, points = build_teacher("encoder", run, CPU), _sweep()
    points.xyz[3] = (500, 0, 0)
    points.xyz[4] = math.nan
    found = teacher.cell_features(points)
    assert int(found.point_cell[4]) == -1
    assert (found.features[found.point_cell[3]] == 0).all()
    assert (teacher.cell_features(points).of_points()[[3, 4]] == 0).all()
    assert bool(torch.isfinite(found.features).all())
    none = teacher.cell_features(points.select(np.zeros(500, bool)))
    assert (none.features.shape, none.point_cell.shape) == ((0, teacher.dimension), (0,))


def test_its_features_are_stored_and_read_back_and_given_online_alike(run: Path, tmp_path: Path):
    write_made_dataset(tmp_path, {"a": [made_frame("a", index, points=400, seed=index) for index in range(3)]})
    dataset = PreparedDataset(tmp_path)
    teacher = build_teacher("encoder", run, CPU)
    summary = compute_targets(dataset, teacher, num_superclasses=4, codec="float16")
    assert summary.frames == len(dataset.keyframes())
    store = FeatureStore(tmp_path / "targets" / "encoder")
    online = build_targets(TargetsConfig(mode="online", teacher="encoder", weights=run, superclasses=4), tmp_path, CPU)
    assert online is not None
    for key in dataset.keyframes():
        stored, now = store.targets(dataset.frame(key)), online.targets(dataset.frame(key))
        assert stored is not None
        assert now is not None
        np.testing.assert_array_equal(stored.features, now.features)
        np.testing.assert_array_equal(stored.superclass, now.superclass)
        np.testing.assert_array_equal(stored.point_cell, now.point_cell)


def test_other_weights_are_another_teacher(run: Path, tmp_path: Path):
    config = _config(Path("prepared")).with_overrides(["training.seed=1"])
    other = tmp_path / "model.safetensors"
    save_checkpoint(other, model_tensors(build_picture(config, CPU).module), {"config": config.model_dump(mode="json")})
    assert build_teacher("encoder", run, CPU).fingerprint != build_teacher("encoder", other, CPU).fingerprint


def test_what_cannot_be_a_teacher_is_refused_in_words(run: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="Name its folder or checkpoint: --weights"):
        build_teacher("encoder", None, CPU)
    with pytest.raises(ConfigError, match=r"changes with every step.*--recipe town-ema"):
        build_teacher("ema", None, CPU)
    config = _config(Path("prepared")).with_overrides(["data.sweeps=3"])
    merged = tmp_path / "merged.safetensors"
    save_checkpoint(merged, model_tensors(build_picture(config, CPU).module), {"config": config.model_dump(mode="json")})
    with pytest.raises(ConfigError, match=r"3 sweeps merged.*data\.sweeps=1"):
        build_teacher("encoder", merged, CPU)
    bare = tmp_path / "bare.safetensors"
    save_checkpoint(bare, model_tensors(build_picture(config, CPU).module), {})
    with pytest.raises(ConfigError, match="does not say how its encoder was built"):
        build_teacher("encoder", bare, CPU)
