from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from picture3d.errors import ConfigError
from picture3d.models.dsvt import DsvtConfig
from picture3d.models.dsvt_config import nuscenes_voxel_256, waymo_voxel_192
from picture3d.ops.voxelize import assign_voxels
from picture3d.pretrain.losses import LossConfig
from picture3d.pretrain.masking import MaskConfig
from picture3d.pretrain.picture import Picture, PretrainStep, PretrainTask, pretrain_step
from picture3d.structures.batch import PointBatch
from picture3d.structures.voxels import VoxelGrid
from picture3d.training.loop import fit
from picture3d.training.plan import Task, TrainingConfig
from picture3d.training.runlog import RunFolder
from tests.golden_weights import golden_weight_seed, openpcdet_state
from tests.sample_data import golden_dir, golden_files

GRID = VoxelGrid((-4.0, -4.0, -1.0), (4.0, 4.0, 3.0), (0.5, 0.5, 0.5))
BACKBONE = DsvtConfig(
    channels=16, ffn_channels=32, heads=2, blocks=(1, 1), set_sizes=(8, 8), windows=((4, 4, 8), (4, 4, 1)),
    shifts=((0, 0, 0), (2, 2, 0)), strides=((1, 1, 8),),
)  # fmt: skip
RANDOM = MaskConfig(kind="random", random_ratio=0.6)
POINTS_ONLY = LossConfig(features_weight=0.0)
WAYMO_GRID = VoxelGrid((-74.88, -74.88, -2.0), (74.88, 74.88, 4.0), (0.32, 0.32, 0.1875))
NUSCENES_GRID = VoxelGrid((-51.2, -51.2, -5.0), (51.2, 51.2, 3.0), (0.2, 0.2, 0.2))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_picture(teacher_channels: int | None = 12, decoder: str = "voxel", seed: int = 0) -> Picture:
    torch.manual_seed(seed)
    kind = "voxel" if decoder == "voxel" else "light"
    return Picture(GRID, 1, BACKBONE, teacher_channels=teacher_channels, decoder=kind, num_predicted_points=4)


def batch_of(xyz: Tensor, sample: Tensor, batch_size: int, *, seed: int = 0, teacher: bool = True) -> PointBatch:
    """Teacher features are a smooth function of the position, eight superclasses are slabs along x."""
    g = generator(seed)
    bare = PointBatch(xyz, torch.rand(len(xyz), 1, generator=g), sample, batch_size, tuple(f"a/{i}" for i in range(batch_size)))
    if not teacher:
        return bare
    features = torch.nn.functional.normalize(torch.cos(xyz @ torch.randn(3, 12, generator=g)), dim=1)
    superclass = (xyz[:, 0] + 4).clamp(0, 7).long()
    return replace(bare, cell_features=features.half(), cell_superclass=superclass, point_cell=torch.arange(len(xyz)))


def random_batch(points: int = 900, batch_size: int = 3, *, seed: int = 0, teacher: bool = True) -> PointBatch:
    g = generator(seed)
    xyz = torch.rand(points, 3, generator=g) * torch.tensor([8.4, 8.4, 4.2]) - torch.tensor([4.2, 4.2, 1.1])
    sample = torch.randint(0, max(1, batch_size - 1), (points,), generator=g).sort().values * 2 % max(1, batch_size)
    return batch_of(xyz, sample.sort().values, batch_size, seed=seed, teacher=teacher)


def finite(step: PretrainStep) -> bool:
    return all(bool(value.isfinite()) for value in step.losses.values())


# --- the step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", ["voxel", "light"])
@pytest.mark.parametrize("mask", [MaskConfig(), MaskConfig(superclasses="kmeans"), RANDOM], ids=["stored", "kmeans", "random"])
def test_one_step_hides_and_reconstructs_and_every_part_learns(decoder: str, mask: MaskConfig):
    model, batch = small_picture(decoder=decoder), random_batch()
    step = pretrain_step(model, batch, mask, LossConfig(), generator())
    assert step.hidden.any()
    assert (~step.hidden).any()
    torch.testing.assert_close(step.losses["total"], step.losses["coordinates"] + 3 * step.losses["features"])
    step.losses["total"].backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []


def test_a_few_steps_on_one_batch_bring_both_losses_down():
    task, batch = PretrainTask(small_picture(), MaskConfig(), LossConfig()), random_batch()
    optimizer = torch.optim.AdamW(task.module.parameters(), lr=3e-3)
    history = []
    for _ in range(40):
        terms = task.loss(batch, generator(1))
        optimizer.zero_grad()
        terms["total"].backward()
        optimizer.step()
        history.append((terms["coordinates"].item(), terms["features"].item()))
    assert history[-1][0] < 0.5 * history[0][0]
    assert history[-1][1] < 0.7 * history[0][1]


class _ThreeBatches:
    steps_per_epoch = 3

    def epoch(self, epoch: int, start_step: int) -> Iterator[PointBatch]:
        return iter([random_batch(200, seed=seed) for seed in range(3)][start_step:])


def test_the_training_loop_trains_it_and_logs_the_share_hidden(tmp_path: Path):
    task: Task = PretrainTask(small_picture(), MaskConfig(target_ratio=0.5), LossConfig())
    config = TrainingConfig(epochs=1, batch_size=3, threads=1)
    fit(task, _ThreeBatches(), config, RunFolder(tmp_path / "run"), progress=lambda done, total, note: None)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    assert all(0.3 < line["losses"]["hidden_share"] <= 0.5 for line in lines)


def test_the_same_generator_gives_the_same_step_and_another_a_different_mask():
    batch = random_batch()
    steps = [pretrain_step(small_picture(), batch, MaskConfig(), LossConfig(), generator(seed)) for seed in (5, 5, 6)]
    assert torch.equal(steps[0].hidden, steps[1].hidden)
    assert torch.equal(steps[0].losses["total"], steps[1].losses["total"])
    assert not torch.equal(steps[0].hidden, steps[2].hidden)


def test_the_encoder_never_sees_hidden_voxels():
    model, batch = small_picture().eval(), random_batch()
    before = pretrain_step(model, batch, MaskConfig(), LossConfig(), generator())
    assignment = assign_voxels(batch.xyz, batch.sample, batch.batch_size, GRID)
    moved = batch.xyz.clone()
    inside_hidden = assignment.point_index[before.hidden[assignment.voxel_of_point]]
    center = (moved[inside_hidden] / 0.5).floor() * 0.5 + 0.25
    moved[inside_hidden] = center + 0.5 * (moved[inside_hidden] - center)  # towards the centre, in the same voxel
    after = pretrain_step(model, replace(batch, xyz=moved), MaskConfig(), LossConfig(), generator())
    assert torch.equal(before.hidden, after.hidden)
    assert before.predicted_points_m is not None
    assert after.predicted_points_m is not None
    assert torch.equal(before.predicted_points_m, after.predicted_points_m)
    assert not torch.equal(before.losses["coordinates"], after.losses["coordinates"])


def test_a_weight_of_zero_leaves_its_predictor_out():
    for weights, name in (
        ({"features_weight": 0.0}, "decoder_seal"),
        ({"coordinates_weight": 0.0}, "decoder_pred"),
    ):
        model = small_picture()
        step = pretrain_step(model, random_batch(), MaskConfig(), LossConfig.from_tree(weights), generator())
        step.losses["total"].backward()
        assert getattr(model.dense_head, name).weight.grad is None
        assert (step.predicted_features is None) == (name == "decoder_seal")
        assert (step.predicted_points_m is None) == (name == "decoder_pred")
        assert len(step.losses) == 2


def test_coordinates_alone_need_no_teacher():
    step = pretrain_step(small_picture(None), random_batch(teacher=False), RANDOM, POINTS_ONLY, generator())
    step.losses["total"].backward()
    assert step.hidden.float().mean() == pytest.approx(0.6, abs=0.02)


class _LargestTensor(TorchDispatchMode):
    """Watches every operation, those of the backward too."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.operation = 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor) and value.untyped_storage().nbytes() // value.element_size() > self.elements:
                self.elements, self.operation = value.untyped_storage().nbytes() // value.element_size(), str(func)
        return out


@pytest.mark.parametrize("attention", ["bucketed", "padded"])
@pytest.mark.parametrize("mask", [MaskConfig(superclasses="kmeans"), RANDOM], ids=["kmeans", "random"])
def test_no_operation_of_a_step_makes_a_tensor_of_the_size_of_the_grid(mask: MaskConfig, attention: str):
    """Neither a volume nor a map: 300 points on 4,096 x 4,096 x 8 cells."""
    torch.manual_seed(0)
    grid = VoxelGrid((-1024.0, -1024.0, -1.0), (1024.0, 1024.0, 3.0), (0.5, 0.5, 0.5))
    backbone = BACKBONE.model_copy(update={"attention": attention})
    network = Picture(grid, 1, backbone, teacher_channels=12, num_predicted_points=4).train()
    batch = random_batch(300, 1)
    batch = replace(batch, xyz=batch.xyz * torch.tensor([200.0, 200.0, 1.0]))
    with _LargestTensor() as largest:
        pretrain_step(network, batch, mask, LossConfig(num_target_points=8), generator()).losses["total"].backward()
    assert 300 * 16 <= largest.elements < 4096 * 4096 // 64, largest.operation


def test_the_logged_share_is_what_was_hidden():
    task, batch = PretrainTask(small_picture(), MaskConfig(target_ratio=0.5), LossConfig()), random_batch()
    terms = task.loss(batch, generator())
    step = pretrain_step(small_picture(), batch, task.mask, LossConfig(), generator())
    assert terms["hidden_voxels"] == step.hidden.sum()
    assert terms["hidden_share"].item() == pytest.approx(step.hidden.float().mean().item())
    assert terms["hidden_share"].item() == pytest.approx(0.5, abs=0.05)
    assert terms["voxels_without_target"] == 0


def test_voxels_without_a_target_stay_visible_and_are_counted():
    batch = random_batch()
    assert batch.point_cell is not None
    batch = replace(batch, point_cell=torch.where(batch.xyz[:, 1] > 0, -1, batch.point_cell))
    for mask in (MaskConfig(), RANDOM):
        step = pretrain_step(small_picture(), batch, mask, LossConfig(), generator())
        assert (step.coords[step.hidden][:, 2] < 8).all()
        assert (~step.targets.has_features).sum() > 100


def test_a_step_runs_in_bfloat16_autocast_with_losses_in_single_precision():
    model, batch = small_picture(), random_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step = pretrain_step(model, batch, MaskConfig(), LossConfig(), generator())
    assert {value.dtype for value in step.losses.values()} == {torch.float32}
    step.losses["total"].backward()
    plain = pretrain_step(small_picture(), batch, MaskConfig(), LossConfig(), generator())
    assert step.losses["total"].item() == pytest.approx(plain.losses["total"].item(), rel=0.05)


def test_pillars_can_be_pretrained():
    grid = VoxelGrid((-4.0, -4.0, -1.0), (4.0, 4.0, 3.0), (0.5, 0.5, 4.0))
    backbone = DsvtConfig(
        channels=16, ffn_channels=32, heads=2, blocks=(2,), set_sizes=(8,), windows=((4, 4, 1),), strides=()
    )  # fmt: skip
    model = Picture(grid, 1, backbone, teacher_channels=12, pillars=True)
    step = pretrain_step(model, random_batch(), MaskConfig(), LossConfig(), generator())
    step.losses["total"].backward()
    assert finite(step)


# --- edges ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", ["voxel", "light"])
@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_nothing_or_everything_hidden_gives_finite_losses_and_gradients(decoder: str, ratio: float):
    model = small_picture(decoder=decoder)
    mask = MaskConfig(kind="random", random_ratio=ratio)
    step = pretrain_step(model, random_batch(), mask, LossConfig(), generator())
    step.losses["total"].backward()
    assert finite(step)
    assert step.hidden.float().mean() == ratio
    if ratio == 0:
        assert step.losses["total"] == 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


def one_point(x: float, y: float, z: float) -> PointBatch:
    return batch_of(torch.tensor([[x, y, z]]), torch.zeros(1, dtype=torch.int64), 1)


EDGES = {
    "no points": batch_of(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), 2),
    "all points out of range": batch_of(torch.full((5, 3), 99.0), torch.zeros(5, dtype=torch.int64), 1),
    "one voxel": one_point(0.1, 0.1, 0.1),
    "on the last cell": one_point(3.99, 3.99, 2.99),
    "on the first corner": one_point(-4.0, -4.0, -1.0),
    "an empty sample between two others": batch_of(
        torch.rand(80, 3, generator=generator()) * 4 - 1, torch.arange(80) // 40 * 2, 4
    ),
    "fewer voxels than superclasses": batch_of(torch.rand(5, 3, generator=generator()), torch.arange(5) // 3, 2),
    "a large and a tiny sample": batch_of(
        torch.rand(400, 3, generator=generator()) * 6 - 3, (torch.arange(400) == 399).long(), 2
    ),
    "not a number": batch_of(torch.tensor([[torch.nan, 0, 0], [1, 1, 1], [2, 2, 2]]), torch.zeros(3, dtype=torch.int64), 1),
}  # fmt: skip


@pytest.mark.parametrize("decoder", ["voxel", "light"])
@pytest.mark.parametrize(
    "mask",
    [MaskConfig(), MaskConfig(superclasses="kmeans"), MaskConfig(target_ratio=0.75), MaskConfig(kind="random", random_ratio=1)],
    ids=["stored", "kmeans", "target ratio", "everything"],
)
@pytest.mark.parametrize("edge", EDGES)
def test_edges_give_finite_losses_and_gradients(edge: str, mask: MaskConfig, decoder: str):
    batch = EDGES[edge]
    if edge == "not a number":  # its cell has no finite feature: no target, as a store would say
        batch = replace(batch, point_cell=torch.tensor([-1, 1, 2]))
    model = small_picture(decoder=decoder)
    step = pretrain_step(model, batch, mask, LossConfig(), generator())
    assert finite(step)
    step.losses["total"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


def test_all_teacher_features_equal_hide_the_base_ratio():
    batch = random_batch()
    assert batch.cell_features is not None
    batch = replace(batch, cell_features=torch.ones_like(batch.cell_features), cell_superclass=None)
    step = pretrain_step(small_picture(), batch, MaskConfig(superclasses="kmeans"), LossConfig(), generator())
    assert finite(step)
    assert 0.85 < step.hidden.float().mean() <= 0.9


# --- what is said when something is missing ---------------------------------------------------------------------------


def test_losses_that_need_a_teacher_say_so():
    with pytest.raises(ConfigError, match="picture3d targets"):
        pretrain_step(small_picture(), random_batch(teacher=False), RANDOM, LossConfig(), generator())
    with pytest.raises(ConfigError, match="teacher_channels"):
        pretrain_step(small_picture(None), random_batch(), RANDOM, LossConfig(), generator())
    with pytest.raises(ConfigError, match="teacher_channels=12"):
        pretrain_step(small_picture(64), random_batch(), RANDOM, LossConfig(), generator())


# --- looking at it ----------------------------------------------------------------------------------------------------


def test_a_reconstruction_is_placed_in_the_lidar_frame():
    task, batch = PretrainTask(small_picture().train(), MaskConfig(), LossConfig()), random_batch()
    found = task.reconstruct(batch, generator())
    assert task.module.training
    assert found.predicted_points_m is not None
    assert found.target_points_m is not None
    assert found.predicted_features is not None
    hidden = int(found.hidden.sum())
    assert found.predicted_points_m.shape == (hidden, 4, 3)
    assert found.predicted_features.shape == (hidden, 12)
    low, size = torch.tensor(GRID.range_min), torch.tensor(GRID.voxel_size)
    cell = ((found.target_points_m - low) / size).floor().int()
    assert torch.equal(cell, found.voxel_coords[found.hidden][:, None, 1:].expand_as(cell))
    nearest = torch.cdist(found.target_points_m.flatten(0, 1), batch.xyz, compute_mode="donot_use_mm_for_euclid_dist").amin(1)
    assert nearest.max() < 1e-5
    assert not found.predicted_points_m.requires_grad


def test_features_of_whole_sweeps_cover_every_voxel_and_join_two_resolutions():
    model, batch = small_picture().eval(), random_batch()
    found = model.features(batch)
    assert torch.equal(found.coords, assign_voxels(batch.xyz, batch.sample, batch.batch_size, GRID).coords)
    assert found.feats.shape == (len(found.coords), 32)


# --- names and numbers of the reference -------------------------------------------------------------------------------


def load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as stored:
        return dict(stored)


@pytest.mark.parametrize("path", golden_files("openpcdet", "pretrain_waymo"))
def test_golden_encoder_on_visible_voxels(path: Path):
    golden, seed = load(path), golden_weight_seed(path.parent)
    model = Picture(WAYMO_GRID, 2, waymo_voxel_192()).eval()
    for name in ("vfe", "backbone_3d"):
        module = model.get_submodule(name)
        module.load_state_dict(openpcdet_state(module, f"{name}.", seed))
    rows = torch.from_numpy(golden["points"])
    batch = PointBatch(rows[:, 1:4], rows[:, 4:], rows[:, 0].long(), int(rows[:, 0].max()) + 1, ())
    with torch.no_grad():
        voxels = model.embed(batch).voxels
        latent = model.encode(voxels.select(torch.from_numpy(golden["mask"]) == 0))
    assert torch.equal(latent.output.coords, torch.from_numpy(golden["encoder_out_coords"][:, [0, 3, 2, 1]]))
    found = latent.output.feats[torch.from_numpy(golden["encoder_rows"]).long()]
    np.testing.assert_allclose(found, golden["encoder_out_rows"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "grid", "backbone", "repaired"),
    [
        ("waymo", WAYMO_GRID, waymo_voxel_192(), 0),
        # One pooling table and one position layer of four (two layers, two entries) change shape in the repaired encoder.
        ("nuscenes", NUSCENES_GRID, nuscenes_voxel_256(), 3),
    ],
)
def test_golden_key_names_and_shapes(name: str, grid: VoxelGrid, backbone: DsvtConfig, repaired: int):
    folder = golden_dir() / "openpcdet" / "keys"
    if not (folder / f"pretrain_{name}.json").exists():
        pytest.skip(f"pretrain_{name}.json is absent (looked in {folder})")
    published = json.loads((folder / f"pretrain_{name}.json").read_text())["state_dict"]
    decoder = json.loads((folder / f"pretrain_{name}_decoder_repaired.json").read_text())["state_dict"]
    expected = {k: v for k, v in published.items() if not k.startswith("backbone_2d.")} | decoder
    del expected["global_step"]
    model = Picture(grid, 2, backbone, decoder="light")
    found = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert found.keys() == expected.keys()
    assert sum(found[key] != expected[key] for key in expected) == repaired
