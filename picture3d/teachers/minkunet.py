"""The MinkUNet teacher: Seal's and SLidR's point network, read from their checkpoints.

Input as it was trained: one sweep, cells of the lidar frame, the intensity of the first point of each cell.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from picture3d.errors import CheckpointError, DataError
from picture3d.models.minkunet import MinkUNet, build_unet_maps
from picture3d.ops.quantize import Quantisation, quantise_points
from picture3d.structures.points import IntensityUnit, PointCloud
from picture3d.teachers.protocol import CellFeatures

# Containers and prefixes that Seal, SLidR and Lightning put around the same 374 tensors.
_CONTAINERS = ("model_points", "state_dict", "model")
_PREFIXES = ("model_points.", "model.", "module.", "encoder.")
_LISTED = 4


@dataclass(frozen=True, eq=False)
class MinkUNetTeacher:
    """A frozen MinkUNet as a teacher; see `teachers.protocol.Teacher`."""

    name: str
    licence: str
    fingerprint: str
    quantisation: Quantisation
    network: MinkUNet  # in evaluation mode
    intensity_scale: Literal["raw", "unit"]  # what the network was trained on: 0..255 or 0..1

    @property
    def dimension(self) -> int:
        """Length of a feature."""
        return self.network.out_channels

    def cell_features(self, points: PointCloud) -> CellFeatures:
        """(M, D) float32 features of the cells and the cell of every point.

        Raises:
            DataError: if the network needs the intensity and its unit is unknown.
        """
        device = next(self.network.parameters()).device
        quantised = quantise_points(torch.from_numpy(points.xyz).to(device), self.quantisation)
        unit = unit_intensity(points, self.name)
        intensity = torch.from_numpy(unit * 255 if self.intensity_scale == "raw" else unit)
        intensity = intensity.to(device)[quantised.representative, None]
        coords = torch.cat([torch.zeros_like(quantised.cells[:, :1]), quantised.cells], dim=1)
        with torch.inference_mode():
            features = self.network(intensity, build_unet_maps(coords)).float()
        return CellFeatures(features.clone(), quantised.point_cell)


def unit_intensity(points: PointCloud, teacher: str) -> NDArray[np.float32]:
    """(N,) float32 intensity of a sweep brought to 0..1.

    Raises:
        DataError: if its unit is unknown; `teacher` is named.
    """
    match points.intensity_unit:
        case IntensityUnit.RAW_255:
            unit = points.intensity / 255
        case IntensityUnit.UNIT | IntensityUnit.TANH:
            unit = points.intensity
        case IntensityUnit.RAW_UNBOUNDED:
            unit = np.tanh(points.intensity)
        case IntensityUnit.UNKNOWN:
            raise DataError(
                f"teacher {teacher}: needs the intensity, and its unit is unknown. "
                f"Prepare the data with --intensity 0-255, 0-1 or tanh."
            )
    return unit.astype(np.float32)


def load_minkunet_teacher(
    weights: Path, *, quantisation: Quantisation | None = None, device: torch.device | str = "cpu"
) -> MinkUNetTeacher:
    """Reads a Seal or SLidR checkpoint of Res16UNet34C with 64 outputs.

    Args:
        weights: the file: ``model_points``, a Lightning ``state_dict`` or plain tensors, as .pt or .safetensors.
        quantisation: cells; by default cylindrical 0.1 m, 1 degree, 0.1 m, as both were trained.
        device: where to run it.

    Raises:
        CheckpointError: if the file cannot be read without unpickling code, or any of the 374 tensors is missing, too many
            or of another shape.
    """
    tensors = read_point_network(weights)
    network = MinkUNet()
    load_whole(network, tensors, source=str(weights))
    return MinkUNetTeacher(
        name="minkunet",
        licence="as its author states; see docs/teachers.md",
        fingerprint=fingerprint(tensors),
        quantisation=quantisation or Quantisation(),
        network=network.to(device).folded(),
        intensity_scale="raw",
    )


def read_point_network(path: Path) -> dict[str, Tensor]:
    """The point network's tensors of a checkpoint file, containers and prefixes taken off."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint. Check the name; docs/teachers.md says where teachers come from.")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        content: object = load_file(path)
    else:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a foreign file makes torch raise
            raise CheckpointError(
                f"{path}: cannot be read as plain tensors ({type(error).__name__}: {error}). Take a checkpoint of Seal or "
                "SLidR, or of this package."
            ) from None
    for container in _CONTAINERS:
        if isinstance(content, dict) and isinstance(content.get(container), dict):
            content = content[container]
            break
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path}: holds a {type(content).__name__}, not named tensors. Take a checkpoint of Seal or SLidR, or of this "
            "package."
        )
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    # A Lightning file holds the image network beside the point network: only one prefix is the right one.
    for prefix in _PREFIXES:
        below = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        if "conv0p1s1.kernel" in below or (below and "conv0p1s1.kernel" not in tensors):
            tensors = below
    return tensors


def load_whole(network: torch.nn.Module, tensors: dict[str, Tensor], *, source: str) -> None:
    """Loads every tensor by name and shape, or nothing.

    Raises:
        CheckpointError: naming the first differences.
    """
    places = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    missing = [name for name in places if name not in tensors]
    unexpected = [name for name in tensors if name not in places]
    shapes = [
        f"{name} is {tuple(tensors[name].shape)}, needs {shape}"
        for name, shape in places.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    if missing or unexpected or shapes:
        parts = [
            f"{len(names)} {what} ({'; '.join(names[:_LISTED])}{', ...' if len(names) > _LISTED else ''})"
            for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
            if names
        ]
        raise CheckpointError(
            f"{source}: not this network ({len(places)} tensors). {'. '.join(parts)}. Take a checkpoint in Seal's or SLidR's "
            "layout (docs/teachers.md)."
        )
    network.load_state_dict(tensors)


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """First 16 hexadecimal digits of the SHA-256 over names, shapes and bytes, in order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        buffer = io.BytesIO()
        buffer.write(value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
        digest.update(buffer.getvalue())
    return digest.hexdigest()[:16]
