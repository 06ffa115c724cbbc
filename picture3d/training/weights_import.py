"""Weights in OpenPCDet's layout (PICTURE, GPICTURE, DSVT and whatever else is trained there): read, compared, written back.

Such a file is a dict saved by PyTorch with the network under ``model_state``, beside the optimiser's state, the epoch and a
version. Our modules carry the same names, so no table of names is needed; what differs is the wrapping. Files are opened as
plain tensors only: no object of a class that the file names is ever made. We write the same names as safetensors, because no
pickle is written here; `docs/pretrained_weights.md` says how another program wraps them again.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from picture3d.errors import CheckpointError
from picture3d.files import replacing
from picture3d.training.checkpoint import Checkpoint, load_weights

# Where the network lies in a file: OpenPCDet, Lightning and mmdetection, plain scripts.
_CONTAINERS = ("model_state", "state_dict", "model")
# What a wrapper puts before every name: data-parallel training, then a Lightning module.
_WRAPPERS = ("module.", "model.")
_STEP = "global_step"  # a counter that OpenPCDet's detectors keep among their buffers; no network of ours has it
_MAGIC = (b"PK\x03\x04", b"\x80\x02")  # PyTorch's container since 1.6, and the one before
# Schedules that compute with numpy leave numpy numbers in the optimiser's state. They hold bytes, no code.
_NUMPY_SCALARS: list[Any] = [
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),  # pyright: ignore[reportAttributeAccessIssue]
    (np._core.multiarray.scalar, "numpy._core.multiarray.scalar"),  # pyright: ignore[reportAttributeAccessIssue]
    (codecs.encode, "_codecs.encode"),
    np.dtype,
    *(type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.int32, np.bool_)),
]


@dataclass(frozen=True, slots=True, eq=False)
class ForeignCheckpoint:
    """A network's weights as another program left them, and what that program said of them."""

    tensors: dict[str, Tensor]  # on the CPU, under the network's names, wrappers taken off
    global_step: int | None  # optimiser steps, where the file tells
    epoch: int | None
    version: str | None  # of the program that wrote it
    ignored: tuple[str, ...]  # other top-level entries: optimizer_state, it, ...

    def meta(self) -> dict[str, Any]:
        """The same as plain JSON, for the checkpoint this becomes."""
        said = {"global_step": self.global_step, "epoch": self.epoch, "version": self.version}
        return {"layout": "openpcdet", **{name: value for name, value in said.items() if value is not None}}


def read_openpcdet(path: Path) -> ForeignCheckpoint:
    """Reads a checkpoint that PyTorch wrote (``model_state``, ``state_dict``, ``model`` or bare), or a safetensors file.

    Args:
        path: the file; what it is is told by its first bytes, not by its name.

    Raises:
        CheckpointError: if it is absent or damaged, holds no named tensors, holds two tensors for one name, or if reading it
            would mean making objects of arbitrary classes.
    """
    content = _content(path)
    container = next((name for name in _CONTAINERS if isinstance(content.get(name), Mapping)), None)
    network = content if container is None else content[container]
    tensors = {str(name): value for name, value in network.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(
            f"{path}: holds no named tensors (its entries: {_listed(content)}). A checkpoint of OpenPCDet keeps them under "
            f"'model_state'; name the file that holds the network."
        )
    tensors = _unwrapped(tensors, path)
    counter = tensors.pop(_STEP, None)
    step = int(counter.reshape(-1)[0]) if counter is not None and counter.numel() else None
    outside = {} if container is None else {name: value for name, value in content.items() if name != container}
    return ForeignCheckpoint(
        tensors=tensors,
        global_step=step,
        epoch=_whole(outside.get("epoch")),
        version=str(outside["version"]) if "version" in outside else None,
        ignored=tuple(str(name) for name in outside if name not in {"epoch", "version"}),
    )


def export_openpcdet(source: nn.Module | Mapping[str, Tensor], path: Path, *, global_step: int = 0) -> tuple[str, ...]:
    """Writes a network under OpenPCDet's names to a safetensors file, with the step counter that its loader demands.

    The names are those of our modules below ``vfe.``, ``backbone_3d.``, ``backbone_2d.`` and ``dense_head.``.

    Args:
        source: a network, or its tensors by name.
        path: a ``.safetensors`` file.
        global_step: the counter's value.

    Returns:
        The names written.

    Raises:
        CheckpointError: if there is nothing to write or the name ends in something else than ``.safetensors``.
        DataError: if the file cannot be written; what stood at `path` before is untouched.
    """
    tensors = source.state_dict() if isinstance(source, nn.Module) else source
    if not tensors:
        raise CheckpointError(
            f"{path}: the network has no tensors, so there is nothing to export. Name a run folder that has been trained."
        )
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"{path}: weights are exported as safetensors, no pickle is written. Name it "
            f"{path.with_suffix('.safetensors').name}; docs/pretrained_weights.md says how to wrap it for OpenPCDet."
        )
    # A clone each: the format refuses tensors that share memory.
    stored = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
    stored[_STEP] = torch.tensor([global_step], dtype=torch.int64)
    with replacing(path) as temporary:
        try:
            save_file(stored, temporary, metadata={"layout": "openpcdet"})
        except SafetensorError as error:  # the library's own wrapping of a full disk
            raise OSError(str(error)) from error
    return tuple(sorted(stored))


def load_any_weights(path: Path) -> Checkpoint:
    """The network's tensors of one of our runs or checkpoints, or of a file in OpenPCDet's layout.

    Raises:
        CheckpointError: if there is none, it is damaged, or it cannot be read as plain tensors.
    """
    if path.is_file() and _is_pytorch(path):
        foreign = read_openpcdet(path)
        return Checkpoint(foreign.tensors, foreign.meta())
    checkpoint = load_weights(path)
    return Checkpoint({name: value for name, value in checkpoint.tensors.items() if name != _STEP}, checkpoint.meta)


def _content(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file. Check the name.")
    if not _is_pytorch(path):
        try:
            return dict(load_file(path))
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"{path}: neither a PyTorch nor a safetensors file, or damaged ({error}). Download or copy it again."
            ) from None
    try:
        with torch.serialization.safe_globals(_NUMPY_SCALARS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a foreign file makes torch raise
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        if "Weights only load failed" in str(error) or "Unsupported" in str(error):
            raise CheckpointError(
                f"{path}: holds more than plain tensors, numbers and text: {_offender(str(error))}. Such a file runs code of "
                f"its writer's choosing when opened, so it stays closed. Ask for one with the state dict alone, or strip it "
                f"where you trust it: torch.save({{'model_state': model.state_dict()}}, ...)."
            ) from None
        raise CheckpointError(f"{path}: damaged or cut off ({type(error).__name__}: {first}). Fetch it again.") from None
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path}: holds a {type(content).__name__}, not named tensors. Take the file with the network's weights."
        )
    return {str(name): value for name, value in content.items()}


def _is_pytorch(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4).startswith(_MAGIC)


def _unwrapped(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Takes off a wrapper that stands before every name (the step counter apart)."""
    for wrapper in _WRAPPERS:
        names = [name for name in tensors if name != _STEP]
        if names and all(name.startswith(wrapper) for name in names):
            bare = {name.removeprefix(wrapper): value for name, value in tensors.items()}
            if len(bare) < len(tensors):
                raise CheckpointError(
                    f"{path}: two tensors have the same name once '{wrapper}' is taken off. Remove one of them, or export the "
                    "checkpoint without that wrapper."
                )
            tensors = bare
    return tensors


def _offender(message: str) -> str:
    """The class a refused file wanted made, out of PyTorch's message."""
    for line in message.splitlines():
        for mark in ("Unsupported global: GLOBAL ", "Unsupported class ", "Unsupported operand "):
            if mark in line:
                return line.split(mark, 1)[1].split(" ", 1)[0].rstrip(".,")
    return "an object"


def _whole(value: object) -> int | None:
    return int(value) if isinstance(value, int | np.integer) else None


def _listed(content: Mapping[str, Any]) -> str:
    names = list(content)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "none"
