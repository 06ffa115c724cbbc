"""Checkpoints: tensors and their JSON description in one safetensors file, written whole or not at all, checked when read."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from picture3d.errors import CheckpointError
from picture3d.files import PARTIAL_SUFFIX, replacing

_META_KEY = "picture3d"
_STEP_NAME = re.compile(r"step_(\d+)\.safetensors")
_MODEL_PREFIX = "model."
_LISTED = 5


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """What a checkpoint file holds."""

    tensors: dict[str, Tensor]  # on the CPU
    meta: dict[str, Any]  # plain JSON: step, config, ...


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What became of the tensors of a checkpoint and of the network they were offered to. Names are the network's."""

    matched: tuple[str, ...]  # same name, same shape: loaded
    missing: tuple[str, ...]  # in the network only: kept their initial values
    unexpected: tuple[str, ...]  # in the checkpoint only: ignored
    wrong_shape: tuple[str, ...]  # in both, of different shapes: kept their initial values

    @property
    def complete(self) -> bool:
        """Every tensor found its place and every place its tensor."""
        return not (self.missing or self.unexpected or self.wrong_shape)

    def summary(self) -> str:
        """One line: how many tensors were loaded, missing, unexpected, of the wrong shape, and the first names of each."""
        total = len(self.matched) + len(self.missing) + len(self.wrong_shape)
        parts = [f"{len(self.matched)} of {total} tensors loaded"]
        for label, names in (
            ("missing", self.missing),
            ("unexpected", self.unexpected),
            ("of the wrong shape", self.wrong_shape),
        ):
            if names:
                more = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
                parts.append(f"{len(names)} {label} ({', '.join(names[:_LISTED])}{more})")
        return "; ".join(parts)


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Writes tensors and JSON-able `meta` to `path`, atomically and synced.

    Raises:
        DataError: if the file cannot be written; what stood at `path` before is untouched.
    """
    stored: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu").contiguous()
        # Tensors that share memory are stored twice: the format knows no aliases.
        if tensor.numel() and tensor.data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.data_ptr())
        stored[name] = tensor
    header = {"meta": dict(meta), "crc32c": _checksum(stored)}
    with replacing(path) as temporary:
        try:
            save_file(stored, temporary, metadata={_META_KEY: json.dumps(header)})
        except SafetensorError as error:  # the library's own wrapping of a full disk
            raise OSError(str(error)) from error


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads and checks a file written by `save_checkpoint`.

    A safetensors file of other origin is read too; its `meta` is empty.

    Raises:
        CheckpointError: if the file is missing, torn, damaged or not a safetensors file.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file. Give a .safetensors file, or a run folder that holds one.")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
            header_text = (file.metadata() or {}).get(_META_KEY)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error}). Use another checkpoint.") from None
    if header_text is None:
        return Checkpoint(tensors, {})
    try:
        header = json.loads(header_text)
        meta, checksum = dict(header["meta"]), int(header["crc32c"])
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the description inside is damaged ({error}). Use another checkpoint.") from None
    if _checksum(tensors) != checksum:
        raise CheckpointError(f"{path}: the tensors do not match their checksum. Use another checkpoint.")
    return Checkpoint(tensors, meta)


def compare(module: nn.Module, tensors: Mapping[str, Tensor], *, prefix: str = "") -> LoadReport:
    """What `load_into` with the same arguments would load and leave; nothing is changed, nothing refused."""
    offered, places = _below(tensors, prefix), module.state_dict(keep_vars=True)
    return LoadReport(
        matched=tuple(n for n in places if n in offered and offered[n].shape == places[n].shape),
        missing=tuple(n for n in places if n not in offered),
        unexpected=tuple(n for n in offered if n not in places),
        wrong_shape=tuple(n for n in places if n in offered and offered[n].shape != places[n].shape),
    )


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], *, prefix: str = "", allow_partial: bool = False) -> LoadReport:
    """Copies tensors into the parameters and buffers of `module` that have the same name and shape.

    Args:
        module: receives the values, on its own device and in its own dtypes.
        tensors: by name; those that do not start with `prefix` are left aside, the others are matched without it.
        prefix: for example ``"encoder."``, to take the encoder out of a larger network.
        allow_partial: accept that some tensors find no place or some places no tensor. Nothing at all is never accepted.

    Returns:
        What was loaded and what was not; show its `summary()` to the user.

    Raises:
        CheckpointError: if the transfer is void, or partial without `allow_partial`. The module is then unchanged.
    """
    report = compare(module, tensors, prefix=prefix)
    offered = _below(tensors, prefix)
    places = module.state_dict(keep_vars=True)
    if places and not report.matched:
        under = f" below '{prefix}'" if prefix else ""
        raise CheckpointError(
            f"nothing in this checkpoint fits the network: {report.summary()}. It holds {len(tensors)} tensors, {len(offered)} "
            f"of them{under}. Use a checkpoint of the same encoder, or train from scratch."
        )
    if not (report.complete or allow_partial):
        shapes = [f"{n} is {tuple(offered[n].shape)}, needs {tuple(places[n].shape)}" for n in report.wrong_shape[:_LISTED]]
        raise CheckpointError(
            f"this checkpoint fits the network only in part: {report.summary()}."
            + (f" First shapes: {'; '.join(shapes)}." if shapes else "")
            + " Use the config it was trained with, or allow a partial transfer (--allow-partial)."
        )
    with torch.no_grad():
        for name in report.matched:
            places[name].copy_(offered[name])
    return report


def load_weights(path: Path) -> Checkpoint:
    """The network's tensors of a run folder or of one checkpoint file, under the names of the trained module.

    A run folder gives its finished weights, or else its newest whole checkpoint.

    Raises:
        CheckpointError: if there is none, or it is damaged.
    """
    if path.is_dir():
        finished, newest = path / "model.safetensors", latest_checkpoint(path / "checkpoints")
        if not finished.is_file() and newest is None:
            raise CheckpointError(
                f"{path}: no model.safetensors and no whole checkpoint in this folder. Wait until training has written one, or "
                "name another folder."
            )
        path = finished if finished.is_file() else newest or finished
    checkpoint = load_checkpoint(path)
    if not any(name.startswith(_MODEL_PREFIX) for name in checkpoint.tensors):
        return checkpoint
    weights = {n.removeprefix(_MODEL_PREFIX): t for n, t in checkpoint.tensors.items() if n.startswith(_MODEL_PREFIX)}
    return Checkpoint(weights, checkpoint.meta)


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint taken after `step` optimiser steps lies."""
    return folder / f"step_{step:08d}.safetensors"


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps that have a checkpoint file in `folder`, oldest first; whether the files are whole is not looked at."""
    if not folder.is_dir():
        return []
    return sorted(int(found[1]) for entry in folder.iterdir() if (found := _STEP_NAME.fullmatch(entry.name)))


def latest_checkpoint(folder: Path, *, log: Callable[[str], None] | None = None) -> Path | None:
    """The newest whole checkpoint in `folder`, or None. Torn ones are passed over, each with a line to `log`."""
    log = log or logging.getLogger(__name__).warning
    for step in reversed(checkpoint_steps(folder)):
        path = checkpoint_path(folder, step)
        try:
            load_checkpoint(path)
        except CheckpointError as error:
            log(f"passed over a checkpoint: {error}")
        else:
            return path
    return None


def prune_checkpoints(folder: Path, keep_last: int, *, best: int | None = None) -> None:
    """Removes all checkpoints but the newest `keep_last` and the `best` step's, and what a killed process left half-written."""
    for leftover in folder.glob(f"step_*{PARTIAL_SUFFIX}"):
        leftover.unlink(missing_ok=True)
    for step in checkpoint_steps(folder)[:-keep_last]:
        if step == best:
            continue
        checkpoint_path(folder, step).unlink(missing_ok=True)


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    """CRC-32C over names and bytes, in order of the names."""
    checksum = google_crc32c.Checksum()
    for name in sorted(tensors):
        checksum.update(name.encode())
        flat = tensors[name].reshape(-1)
        if flat.numel():
            checksum.update(flat.view(torch.uint8).numpy().tobytes())
    return int.from_bytes(checksum.digest(), "big")
