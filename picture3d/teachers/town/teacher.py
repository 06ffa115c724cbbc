"""The town teacher: a small MinkUNet that has learnt its features on synthetic towns, labels included. See MODEL_CARD.md."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from picture3d.models.minkunet import MinkUNet
from picture3d.ops.quantize import Quantisation
from picture3d.teachers.minkunet import MinkUNetTeacher, fingerprint, load_whole

WEIGHTS = Path(__file__).with_name("weights.safetensors")
QUANTISATION = Quantisation("cartesian", (0.2, 0.2, 0.2))


def town_network() -> MinkUNet:
    """The network, untrained: under a million parameters, 64 outputs of length one."""
    return MinkUNet(stem_width=16, widths=(16, 32, 48, 56, 56, 48, 32, 32), blocks=(1,) * 8)


def load_town_teacher(device: torch.device | str = "cpu") -> MinkUNetTeacher:
    """The teacher that comes with the package; needs no download.

    Raises:
        CheckpointError: if the shipped weights do not belong to this version of the network.
    """
    stored = load_file(WEIGHTS)
    network = town_network()
    load_whole(network, {name: _full(value) for name, value in stored.items()}, source=str(WEIGHTS.name))
    return MinkUNetTeacher(
        name="town",
        licence="Apache-2.0",
        fingerprint=fingerprint(stored),
        quantisation=QUANTISATION,
        network=network.to(device).folded(),
        intensity_scale="unit",
    )


def _full(value: Tensor) -> Tensor:
    """Weights are shipped in half precision to stay small, and used in single."""
    return value.float() if value.is_floating_point() else value
