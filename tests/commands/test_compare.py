"""`picture3d compare`, as a user types it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from picture3d.commands.build import run_config_of, sample_frames
from picture3d.commands.compare import alpha_of, compare_encoders, read_comparison
from picture3d.errors import CheckpointError, ConfigError, DataError
from picture3d.models.layer_trace import trace_layers
from picture3d.recipes.catalogue import pretraining_recipe, segmentation_recipe, tiny
from picture3d.tasks.encoder import TaskEncoder, load_encoder
from picture3d.training.checkpoint import load_weights, save_checkpoint
from tests.command_line import do
from tests.ops.test_similarity import gram_cka

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A town of two scenes; two pre-trainings of a small grid and what was fine-tuned from the first."""
    root = tmp_path_factory.mktemp("compare")
    do("synth", root / "raw", "--scenes", 2, "--keyframes", 2, "--sweeps-per-keyframe", 0, "--val-scenes", 1)
    do("prepare", "nuscenes", root / "raw", root / "prepared", "--sweeps", 0)
    base = tiny(pretraining_recipe("town-coordinates", root / "prepared"))
    base = base.with_overrides(["mask.kind=random", "targets.mode=none"])
    for name, seed in (("one", 0), ("two", 1)):
        base.with_overrides([f"training.seed={seed}"]).save(root / "c.json")
        do("pretrain", "--config", root / "c.json", "--out", root / name)
    tiny(segmentation_recipe("town-segmentation", root / "prepared")).save(root / "c.json")
    do("finetune", "segmentation", "--config", root / "c.json", "--encoder", root / "one", "--out", root / "tuned")
    return root


def test_the_command_is_the_gram_form_of_every_layer_on_the_named_sweeps(place: Path):
    said = json.loads(do("compare", place / "one", place / "two", "--frames", 2, "--json"))
    found = said["comparisons"][0]
    config = run_config_of(load_weights(place / "one").meta["config"], "one")
    layers: list[list[torch.Tensor]] = []
    for name in ("one", "two"):
        network = TaskEncoder(config.grid.grid, config.in_features, config.encoder)
        load_encoder(network, place / name)
        network.eval()
        rows: list[list[torch.Tensor]] = [[], [], [], []]
        sweeps = sample_frames(config.data, 2, split="val")
        for index in range(2):
            with trace_layers(network.backbone_3d) as trace, torch.no_grad():
                network.backbone_3d(network.vfe(sweeps.batch(0, index)).voxels)
            for layer in range(4):
                rows[layer].append(trace.at_voxels(layer)[::7])
        layers.append([torch.cat(parts) for parts in rows])
    # Every seventh voxel keeps the n x n form small; the command sees them all, so the two agree but for the sample.
    expected = np.array([[gram_cka(a, b) for b in layers[1]] for a in layers[0]])
    np.testing.assert_allclose(np.array(found["cka"]), expected, atol=0.05)
    assert found["frames"] == 2
    assert found["voxels"] > 5 * len(layers[0][0])
    assert said["alpha"] == found["diagonal"]


def test_an_encoder_is_wholly_like_itself_and_its_weights_do_not_differ(place: Path):
    same = compare_encoders(place / "one", place / "one", data=None, split=None, frames=1, device=CPU)
    assert same.diagonal == pytest.approx((1.0,) * 4, abs=1e-9)
    assert [(w.mean, w.variance) for w in same.weights] == [(0.0, 0.0)] * 6
    other = compare_encoders(place / "one", place / "two", data=None, split=None, frames=1, device=CPU)
    assert all(value is not None and value < 0.999 for value in other.diagonal)
    assert all(w.variance is not None and w.variance > 0 for w in other.weights)


def test_weights_and_layers_of_a_fine_tuned_network_are_compared_with_its_beginning(place: Path):
    said = do("compare", place / "one", place / "tuned", place / "two", "--frames", 1)
    assert said.count("linear CKA") == 2
    assert "hierarchy.alpha=[" in said
    tuned = compare_encoders(place / "one", place / "tuned", data=None, split=None, frames=1, device=CPU)
    one, after = (load_weights(place / name).tensors for name in ("one", "tuned"))
    difference = torch.cat(
        [
            (after[name].double() - one[name].double()).flatten()
            for name in one
            if name.startswith(("backbone_3d.stage_0.0.encoder_list.0.",))
        ]
    )
    found = next(w for w in tuned.weights if w.layer == "0.0a")
    assert found.numbers == len(difference)
    assert (found.mean, found.variance) == pytest.approx((float(difference.mean()), float(difference.var(correction=0))))
    two = compare_encoders(place / "one", place / "two", data=None, split=None, frames=1, device=CPU)
    assert all((a or 0) > (b or 0) for a, b in zip(tuned.diagonal, two.diagonal, strict=True))
    mean = [((a or 0) + (b or 0)) / 2 for a, b in zip(tuned.diagonal, two.diagonal, strict=True)]
    assert alpha_of([tuned, two]) == pytest.approx(mean)


def test_what_is_written_can_be_read_again_and_is_in_the_report(place: Path):
    said = do("compare", place / "one", place / "two", "--frames", 1, "--out", place)
    path = place / "compare_one_two.json"
    assert f"written: {path}" in said
    again = read_comparison(path)
    assert again == compare_encoders(place / "one", place / "two", data=None, split=None, frames=1, device=CPU)
    assert Image.open(path.with_suffix(".png")).size[0] > 200
    assert path.with_suffix(".svg").read_text().startswith("<svg")
    do("report", place, "--out", place / "report.html")
    assert "Linear CKA of one and two" in (place / "report.html").read_text()


def test_encoders_that_see_other_voxels_are_refused(place: Path, tmp_path: Path):
    weights = load_weights(place / "one")
    tree: dict[str, Any] = json.loads(json.dumps(weights.meta["config"]))
    tree["grid"]["voxel_size"][2] = tree["grid"]["voxel_size"][2] / 2
    tree["encoder"]["windows"] = [[12, 12, 16], [12, 12, 1]]
    tree["encoder"]["strides"] = [[1, 1, 16]]
    save_checkpoint(tmp_path / "other.safetensors", weights.tensors, {"config": tree})
    with pytest.raises(ConfigError, match="voxel_size"):
        compare_encoders(place / "one", tmp_path / "other.safetensors", data=None, split=None, frames=1, device=CPU)


def test_encoders_of_other_depth_have_layers_to_compare_and_no_weights(place: Path, tmp_path: Path):
    config = tiny(pretraining_recipe("town-coordinates", place / "prepared"))
    config = config.with_overrides(["mask.kind=random", "targets.mode=none", "encoder.blocks=[2,1]"])
    config.save(tmp_path / "c.json")
    do("pretrain", "--config", tmp_path / "c.json", "--out", tmp_path / "deep")
    found = compare_encoders(place / "one", tmp_path / "deep", data=None, split=None, frames=1, device=CPU)
    assert np.array(found.cka).shape == (4, 6)
    assert (found.diagonal, found.weights, alpha_of([found])) == ((), (), None)
    assert "none belongs to another" in do("compare", place / "one", tmp_path / "deep", "--frames", 1)


def test_a_dead_layer_is_not_known_and_a_run_that_diverged_is_named(place: Path, tmp_path: Path):
    weights = load_weights(place / "one")
    dead = {name: torch.zeros_like(t) if name.startswith("backbone_3d.residual_norm_stage_1") else t
            for name, t in weights.tensors.items()}  # fmt: skip
    save_checkpoint(tmp_path / "dead.safetensors", dead, weights.meta)
    found = compare_encoders(tmp_path / "dead.safetensors", place / "one", data=None, split=None, frames=1, device=CPU)
    assert found.cka[3] == (None,) * 4
    assert found.cka[0][0] is not None
    assert alpha_of([found]) is None
    json.dumps(found.to_json(), allow_nan=False)
    broken = {name: torch.full_like(t, torch.nan) if name.startswith("backbone_3d.residual_norm_stage_1") else t
              for name, t in weights.tensors.items()}  # fmt: skip
    save_checkpoint(tmp_path / "broken.safetensors", broken, weights.meta)
    with pytest.raises(CheckpointError, match="diverged"):
        compare_encoders(place / "one", tmp_path / "broken.safetensors", data=None, split=None, frames=1, device=CPU)


def test_a_checkpoint_of_unknown_make_and_a_damaged_comparison_are_refused(place: Path, tmp_path: Path):
    save_checkpoint(tmp_path / "bare.safetensors", load_weights(place / "one").tensors, {})
    with pytest.raises(CheckpointError, match="does not say"):
        compare_encoders(place / "one", tmp_path / "bare.safetensors", data=None, split=None, frames=1, device=CPU)
    (tmp_path / "compare_a_b.json").write_text('{"first": "a"}')
    with pytest.raises(DataError, match="not what `compare` writes"):
        read_comparison(tmp_path / "compare_a_b.json")
