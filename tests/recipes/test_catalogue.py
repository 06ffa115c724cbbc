"""Shipped recipes must not rot: each is valid, survives JSON, builds, and trains when shrunk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from picture3d.commands.build import (
    build_detection,
    build_network,
    build_occupancy,
    build_picture,
    build_segmentation,
    training_batches,
)
from picture3d.errors import ConfigError
from picture3d.recipes.catalogue import (
    DETECTION,
    OCCUPANCY,
    PRETRAINING,
    SEGMENTATION,
    any_recipe,
    detection_recipe,
    occupancy_recipe,
    pretraining_recipe,
    segmentation_recipe,
    tiny,
)
from picture3d.recipes.configs import PretrainConfig, SegmentationConfig
from picture3d.structures.frame import Frame
from picture3d.structures.poses import Pose
from picture3d.structures.targets import FrameTargets
from picture3d.tasks.encoder import load_encoder
from picture3d.training.checkpoint import save_checkpoint
from picture3d.training.loop import fit
from picture3d.training.runlog import RunFolder
from tests.datasets.made_frames import made_frame, write_made_dataset

NAMES = [*PRETRAINING, *SEGMENTATION, *DETECTION, *OCCUPANCY]


class OctantTeacher:
    """One cell per octant and 4 m ring around the sensor; features that differ from cell to cell."""

    def __init__(self, channels: int) -> None:
        self.channels = channels

    def targets(self, frame: Frame) -> FrameTargets:
        xyz = frame.points.xyz
        octant = (xyz > 0) @ np.array([1, 2, 4])
        ring = (np.linalg.norm(xyz, axis=1) // 4).astype(np.int64)
        keys, cell = np.unique(ring * 8 + octant, return_inverse=True)
        features = np.cos(np.arange(1, self.channels + 1) * keys[:, None] / 10).astype(np.float16)
        return FrameTargets(features, (keys % 8).astype(np.uint8), cell.astype(np.int64))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two logs of a slowly moving car: four sweeps each, of which every second is a keyframe."""

    def sweeps(log: str, seed: int) -> Iterator[Frame]:
        for index in range(4):
            pose = Pose.from_yaw(0.02 * index, (0.5 * index, 0.0, 0.0))
            last = index % 2 == 1
            changes = {"global_from_ego": pose, "is_keyframe": last}
            frame = made_frame(log, index, points=600, seed=seed, **(changes if last else {**changes, "labels": None}))
            assert frame.boxes is not None
            categories = ("vehicle.car", "pedestrian", "Vehicle")  # classes of both detectors
            yield replace(frame, boxes=replace(frame.boxes, category=categories) if last else None)

    root = tmp_path_factory.mktemp("recipes") / "prepared"
    logs = {log: list(sweeps(log, seed)) for seed, log in enumerate(["log-a", "log-b", "log-c"])}
    return write_made_dataset(root, logs, splits={"train": ["log-a", "log-b"], "val": ["log-c"]})


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_survives_json(name, tmp_path):
    config = any_recipe(name, Path("prepared"))
    config.save(tmp_path / "config.json")
    assert type(config).load(tmp_path / "config.json") == config
    assert config.recipe == name
    assert config.with_overrides(["training.batch_size=3"]).training.batch_size == 3


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_passes_its_own_checks(name):
    # Recipes are changed by copies, which check nothing.
    config = any_recipe(name, Path("prepared"))
    assert type(config).from_tree(config.model_dump(mode="json")) == config


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_builds_at_full_size(name):
    config = any_recipe(name, Path("prepared"))
    with torch.device("meta"):
        module = build_network(config, torch.device("meta"))
    assert sum(p.numel() for p in module.parameters()) > 50_000
    assert all(p.is_meta for p in module.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_a_shrunk_recipe_is_valid_and_stays_itself(name):
    config = any_recipe(name, Path("prepared"))
    small = tiny(config)  # pyright: ignore[reportArgumentType]
    assert type(small).from_tree(small.model_dump(mode="json")) == small
    assert (small.recipe, small.data.features, small.data.sweeps) == (name, config.data.features, config.data.sweeps)
    assert small.grid.pillars == config.grid.pillars


@pytest.mark.parametrize("name", PRETRAINING)
def test_a_shrunk_pretraining_recipe_trains(name, prepared, tmp_path):
    config = tiny(pretraining_recipe(name, prepared))
    config = config.model_copy(update={"data": config.data.model_copy(update={"every": 1})})
    batches = training_batches(config, OctantTeacher(config.targets.channels))
    task = build_picture(config, torch.device("cpu"), epoch_batches=batches.steps_per_epoch)
    rebuilt = config.loss.coordinates_weight > 0 or config.loss.features_weight > 0
    idle = () if rebuilt else ("backbone_2d.", "dense_head.")
    trained = {name: p for name, p in task.module.named_parameters() if not name.startswith(idle)}
    before = {name: p.detach().clone() for name, p in trained.items()}
    run = RunFolder(tmp_path / "run")
    run.claim(config)
    result = fit(task, batches, config.training, run)
    assert result.steps == 2
    assert "total" in result.losses
    assert ("coordinates" in result.losses) == (config.loss.coordinates_weight > 0)
    assert ("features" in result.losses) == (config.loss.features_weight > 0)
    assert all(np.isfinite(value) for value in result.losses.values())
    unmoved = sum(torch.equal(before[name], p) for name, p in trained.items())
    assert unmoved < len(before) / 4


@pytest.mark.parametrize("name", SEGMENTATION)
def test_a_shrunk_segmentation_recipe_trains(name, prepared, tmp_path):
    config = tiny(segmentation_recipe(name, prepared))
    task = build_segmentation(config, torch.device("cpu"))
    run = RunFolder(tmp_path / "run")
    run.claim(config)
    result = fit(task, training_batches(config, None), config.training, run)
    assert result.steps == 2
    assert {"total", "cross_entropy", "lovasz"} <= set(result.losses)
    assert all(np.isfinite(value) for value in result.losses.values())


@pytest.mark.parametrize("name", DETECTION)
def test_a_shrunk_detection_recipe_trains_and_finds(name, prepared, tmp_path):
    config = tiny(detection_recipe(name, prepared))
    task = build_detection(config, torch.device("cpu"))
    batches = training_batches(config, None)
    run = RunFolder(tmp_path / "run")
    run.claim(config)
    result = fit(task, batches, config.training, run)
    assert result.steps == 2
    assert {"total", "heatmap", "iou"} <= set(result.losses)
    assert all(np.isfinite(value) for value in result.losses.values())
    found = task.predict(batches.batch(0, 0))
    assert len(found) == 1
    assert found[0].boxes.isfinite().all()


def test_a_recipe_with_two_extra_features_feeds_them_to_the_network(prepared):
    config = tiny(pretraining_recipe("waymo-picture", prepared))
    batch = training_batches(config, None).batch(0, 0)
    assert config.in_features == 2
    assert batch.features.shape[1] == 2
    assert 0 <= batch.features.min() <= batch.features.max() <= 1


def test_ten_sweeps_are_asked_for_and_those_that_exist_are_merged(prepared):
    config = tiny(pretraining_recipe("nuscenes-picture", prepared))
    batch = training_batches(config, OctantTeacher(64)).batch(0, 0)
    assert config.data.sweeps == 10
    assert batch.features[:, 1].min() == 0
    assert batch.features[:, 1].max() > 0
    assert batch.point_cell is not None
    assert (batch.point_cell[batch.features[:, 1] > 0] == -1).all(), "targets exist for the keyframe alone"


def test_the_town_runs_differ_in_their_loss_alone():
    picture, coordinates = (pretraining_recipe(f"town-{kind}", Path("p")).model_dump() for kind in ("picture", "coordinates"))
    assert {key for key in picture if picture[key] != coordinates[key]} == {"recipe", "loss"}


def test_a_pretrained_encoder_fits_the_recipes_of_its_family():
    families = (
        ("town-picture", "town-segmentation"),
        ("nuscenes-picture", "nuscenes-segmentation"),
        ("nuscenes-cylinder-picture", "nuscenes-cylinder-segmentation"),
        ("town-sweeps-picture", "town-detection"),
        ("waymo-picture", "waymo-detection"),
        ("waymo-picture-20", "waymo-detection"),
        ("nuscenes-pillar-picture", "nuscenes-detection"),
        ("nuscenes-picture", "nuscenes-occupancy"),
    )
    for pre, task in families:
        a, b = any_recipe(pre, Path("p")), any_recipe(task, Path("p"))
        assert (a.encoder, a.grid, a.data.features, a.data.sweeps, a.data.intensity_scale) == (
            b.encoder,
            b.grid,
            b.data.features,
            b.data.sweeps,
            b.data.intensity_scale,
        )


def test_a_town_encoder_fits_the_occupancy_of_a_wider_town(tmp_path):
    pretraining, occupancy = pretraining_recipe("town-picture", Path("p")), occupancy_recipe("town-occupancy", Path("p"))
    tensors, meta = build_picture(pretraining, torch.device("cpu")).module.state_dict(), pretraining.model_dump(mode="json")
    save_checkpoint(tmp_path / "model.safetensors", tensors, {"config": meta})
    network = build_occupancy(occupancy, torch.device("cpu")).module
    report = load_encoder(network, tmp_path / "model.safetensors")
    assert report.differences == ()


def test_occupancy_needs_its_labels():
    with pytest.raises(ConfigError, match=r"data\.occupancy=false leaves nothing to learn from"):
        occupancy_recipe("town-occupancy", Path("p")).with_overrides(["data.occupancy=false"])


def test_an_unknown_recipe_names_the_nearest_of_its_kind():
    with pytest.raises(ConfigError, match="no pre-training recipe is called 'town-segmentation'"):
        pretraining_recipe("town-segmentation", Path("p"))
    with pytest.raises(ConfigError, match="Did you mean 'town-segmentation'"):
        segmentation_recipe("town-segment", Path("p"))
    with pytest.raises(ConfigError, match=r"no recipe is called 'zzz'\. Choose one of "):
        any_recipe("zzz", Path("p"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("grid.pillars=true", "pillars need one cell along z: set voxel_size z to 8"),
        ("targets.mode=none", "leaves nothing for loss.features_weight"),
        ("targets.mode=ema", r"set mask\.superclasses=kmeans"),
        ("mask.kind=nothing", r"mask\.kind"),
        ("encoder.channels=65", "65"),
        ("grid.range_max=[48, 48, 3.1]", "not a whole number"),
        ("training.max_steps=null", "training: give epochs or max_steps"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_in_words(change, words):
    with pytest.raises(ConfigError, match=words) as caught:
        pretraining_recipe("town-picture", Path("p")).with_overrides([change])
    assert len(str(caught.value)) < 500


def test_a_run_without_a_teacher_needs_random_masks():
    base = pretraining_recipe("town-picture", Path("p"))
    changes = ["targets.mode=none", "loss.features_weight=0"]
    with pytest.raises(ConfigError, match=r"set mask\.kind=random"):
        base.with_overrides(changes)
    assert base.with_overrides([*changes, "mask.kind=random"]).targets.mode == "none"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (("loss.features_weight=0", "loss.coordinates_weight=0"), "all loss weights are 0"),
        (
            ("targets.mode=none", "loss.features_weight=0", "loss.visible_features_weight=1"),
            r"loss\.visible_features_weight > 0",
        ),
        (("targets.mode=ema", "mask.superclasses=kmeans", "loss.features_scale=whitened"), r"set loss\.features_scale=teacher"),
    ],
)
def test_losses_that_cannot_be_are_refused_in_words(changes, words):
    with pytest.raises(ConfigError, match=words):
        pretraining_recipe("town-picture", Path("p")).with_overrides([*changes])


def test_visible_voxels_alone_may_be_what_is_learnt():
    changes = ["loss.features_weight=0", "loss.coordinates_weight=0", "loss.visible_features_weight=1"]
    config = pretraining_recipe("town-picture", Path("p")).with_overrides(changes)
    assert (config.teacher_channels, config.visible_channels) == (None, 64)
    assert build_picture(config, torch.device("cpu")).module.dense_head.decoder_seal is None


def test_a_segmentation_config_is_not_read_as_a_pretraining(tmp_path):
    segmentation_recipe("town-segmentation", Path("p")).save(tmp_path / "config.json")
    with pytest.raises(ConfigError, match="kind: "):
        PretrainConfig.load(tmp_path / "config.json")
    assert SegmentationConfig.load(tmp_path / "config.json").kind == "segmentation"
