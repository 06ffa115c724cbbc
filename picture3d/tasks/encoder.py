"""The encoder that a task takes over from pre-training, how it is loaded, and the joined feature it gives each voxel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from picture3d.errors import CheckpointError
from picture3d.models.cylinder_encoder import point_encoder
from picture3d.models.dsvt import Dsvt, DsvtConfig, DsvtOutput
from picture3d.ops.voxelize import VoxelAssignment
from picture3d.structures.batch import PointBatch
from picture3d.structures.cylinder import CylinderGrid
from picture3d.structures.voxels import VoxelGrid
from picture3d.training.checkpoint import LoadReport, load_into
from picture3d.training.weights_import import load_any_weights

ENCODER_PARTS = ("vfe", "backbone_3d")  # the names under which pre-training, and published checkpoints, keep the encoder
# Settings that change how fast the same function is computed, in how much memory, or how it is trained, and not the function.
_SAME_FUNCTION = {"attention", "activation_checkpointing", "point_norm_momentum"}


@dataclass(frozen=True, slots=True, eq=False)
class JoinedFeatures:
    """What the encoder says of M occupied voxels and of the K points inside them."""

    feats: Tensor  # (M, 2 C): final token of the voxel's pillar, then the voxel's own feature after stage 0
    assignment: VoxelAssignment  # the M voxels, and which of the N points are inside which
    point_features: Tensor  # (K, C) of the point encoder, before the maximum over each voxel


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No gradients, running statistics in the norms; the module's mode is restored."""
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(training)


class TaskEncoder(nn.Module):
    """Point encoder and DSVT under their pre-training names, ``vfe`` and ``backbone_3d``: what every task begins with.

    Args:
        grid: range and voxel size, of x, y, z or of a cylinder.
        in_features: point features used beside x, y, z.
        backbone: the DSVT encoder; its width is C.
        pillars: encode pillars instead of voxels.

    Raises:
        ConfigError: if grid, windows and strides do not fit each other.
    """

    def __init__(self, grid: VoxelGrid, in_features: int, backbone: DsvtConfig, *, pillars: bool = False) -> None:
        super().__init__()
        self.grid = grid
        point_options = {"momentum": backbone.point_norm_momentum, "unit_inputs": backbone.point_inputs == "unit"}
        self.vfe = point_encoder(in_features, backbone.channels, grid, pillars, **point_options)
        self.backbone_3d = Dsvt(backbone, self.vfe.grid_shape)


class JoinedEncoder(TaskEncoder):
    """An encoder whose voxels keep their height.

    The last stage of DSVT has one token per pillar: what is on the ground and what is above it share one. The feature after
    stage 0 still belongs to one voxel. Both together are what the segmentation head and the linear probe look at.
    """

    @property
    def joined_channels(self) -> int:
        """Width of the joined feature, 2 C."""
        return 2 * self.backbone_3d.config.channels

    def joined_features(self, batch: PointBatch) -> JoinedFeatures:
        """Encodes a batch; 0 points, or none inside the grid, give 0 voxels."""
        encoded = self.vfe(batch)
        output: DsvtOutput = self.backbone_3d(encoded.voxels)
        return JoinedFeatures(output.joined, encoded.assignment, encoded.point_features)


@dataclass(frozen=True, slots=True)
class EncoderReport:
    """What became of a checkpoint that a network took its encoder from."""

    encoder: LoadReport  # the tensors below `ENCODER_PARTS`
    skipped: tuple[str, ...]  # in the checkpoint, not part of an encoder: pre-training's decoder, another task's head
    fresh: tuple[str, ...]  # in the network, not part of an encoder: its head, which starts from new weights
    differences: tuple[str, ...]  # settings that differ although asked for: "backbone_3d.windows: ... there, ... here"

    def summary(self) -> str:
        """One line for the run log."""
        parts = [f"encoder: {self.encoder.summary()}"]
        if self.skipped:
            parts.append(f"skipped from the checkpoint: {_by_part(self.skipped)}")
        if self.fresh:
            parts.append(f"new in this network: {_by_part(self.fresh)}")
        if self.differences:
            parts.append(f"settings that differ: {'; '.join(self.differences)}")
        return ". ".join(parts)


def load_encoder(
    network: TaskEncoder, source: Path, *, allow_partial: bool = False, inputs: Mapping[str, Any] | None = None
) -> EncoderReport:
    """Takes over the encoder of a pre-training (or of another task) by name; everything else in `network` stays as it is.

    A checkpoint that says which settings it was trained with is compared with `network` first: windows, set sizes or voxel
    size can differ without any tensor having another shape, and the encoder would then compute something it never learned.

    Args:
        network: receives the weights of `vfe` and `backbone_3d`.
        source: run folder, a safetensors file with the same names, or a checkpoint of OpenPCDet.
        allow_partial: accept tensors without a place, places without a tensor, and other settings.
        inputs: settings of the data, by name, that decide what a point feature means (``features``, ``intensity_scale``) and
            therefore have to agree too.

    Returns:
        What was loaded, skipped and left new; show its `summary()` to the user.

    Raises:
        CheckpointError: if there is no checkpoint, it is damaged, nothing in it fits, or it fits only in part and
            `allow_partial` is not set. The network is then unchanged.
    """
    checkpoint = load_any_weights(source)
    differences = _differences(network, checkpoint.meta.get("config"), inputs or {})
    if differences and not allow_partial:
        raise CheckpointError(
            f"{source}: this encoder was trained with other settings: {'; '.join(differences)}. Use the same "
            f"settings, or allow a partial transfer (--allow-partial)."
        )
    offered = {name: tensor for name, tensor in checkpoint.tensors.items() if _is_encoder(name)}
    encoder = nn.ModuleDict({part: network.get_submodule(part) for part in ENCODER_PARTS})
    try:
        report = load_into(encoder, offered, allow_partial=allow_partial)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from None
    return EncoderReport(
        encoder=report,
        skipped=tuple(name for name in checkpoint.tensors if not _is_encoder(name)),
        fresh=tuple(name for name in network.state_dict() if not _is_encoder(name)),
        differences=differences,
    )


def _is_encoder(name: str) -> bool:
    return name.split(".", 1)[0] in ENCODER_PARTS


def _by_part(names: Iterable[str]) -> str:
    counts = Counter(name.split(".", 1)[0] for name in names)
    return ", ".join(f"{count} of {part}" for part, count in counts.items())


def _differences(network: TaskEncoder, config: Any, inputs: Mapping[str, Any]) -> tuple[str, ...]:
    """Settings of the encoder in a saved config that differ from the network's; none if the config does not tell."""
    config = config if isinstance(config, dict) else {}
    here: dict[str, Any] = {
        f"encoder.{key}": value
        for key, value in network.backbone_3d.config.model_dump(mode="json").items()
        if key not in _SAME_FUNCTION
    }
    grid = network.grid
    # Range in x and y only says where the world ends; height and cell size decide what a voxel sees.
    here |= {
        "grid.voxel_size": list(grid.voxel_size),
        "grid.z": [grid.range_min[2], grid.range_max[2]],
        "grid.pillars": network.vfe.pillars,
        "grid.cylinder": isinstance(grid, CylinderGrid),
    }
    here |= {f"data.{key}": value for key, value in inputs.items()}
    there = {f"{part}.{key}": value for part in ("encoder", "data") for key, value in _tree(config, part).items()}
    there.setdefault("encoder.point_inputs", "metres")  # of encoders from before there was a choice, and of other programs
    saved = _tree(config, "grid")
    there |= {f"grid.{key}": value for key, value in saved.items()}
    if "range_min" in saved and "range_max" in saved:
        there["grid.z"] = [saved["range_min"][2], saved["range_max"][2]]
    return tuple(
        f"{key} is {there[key]} there, {value} here" for key, value in here.items() if key in there and there[key] != value
    )


def _tree(config: dict[str, Any], key: str) -> dict[str, Any]:
    value = config.get(key)
    return value if isinstance(value, dict) else {}
