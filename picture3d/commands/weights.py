"""`weights show`, `weights import`, `weights export`: between our checkpoints and files in OpenPCDet's layout."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from picture3d.commands.build import build_network
from picture3d.errors import CheckpointError
from picture3d.models.voxel_encoder import unit_input_size
from picture3d.recipes.catalogue import any_recipe
from picture3d.tasks.encoder import ENCODER_PARTS
from picture3d.training.checkpoint import LoadReport, compare, load_into, save_checkpoint
from picture3d.training.weights_import import export_openpcdet, load_any_weights

# Settings that say what the encoder's numbers mean; a run that takes the encoder over is compared with them.
_DATA_SETTINGS = ("features", "intensity_scale")
_FIRST_LAYER = "vfe.pfn_layers.0.linear.weight"


def show(file: Path, *, recipe: str | None, tensors: bool) -> str:
    """What a checkpoint holds, part by part, and how it fits the network of a recipe.

    Args:
        file: run folder, our checkpoint, or one of OpenPCDet.
        recipe: compare with this recipe's network; None only lists.
        tensors: list every tensor with its shape and type.

    Raises:
        CheckpointError: if the file cannot be read as plain tensors.
        ConfigError: for an unknown recipe.
    """
    checkpoint = load_any_weights(file)
    lines = [f"{file}: {_size(checkpoint.tensors)}"]
    said = {key: value for key, value in checkpoint.meta.items() if isinstance(value, str | int | float)}
    if said:
        lines.append("  " + ", ".join(f"{key} {value}" for key, value in said.items()))
    for part, group in _parts(checkpoint.tensors).items():
        lines.append(f"  {part:14s}{_size(group)}")
        if tensors:
            lines += [f"    {name}  {tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for name, t in group.items()]
    if recipe is not None:
        network = _network(recipe)
        lines.append(f"against the network of {recipe}: {compare(network, checkpoint.tensors).summary()}")
        lines.append(f"against its encoder alone: {_encoder_report(network, checkpoint.tensors).summary()}")
    return "\n".join(lines)


def import_weights(file: Path, out: Path, *, recipe: str | None, encoder_only: bool, allow_partial: bool) -> str:
    """Writes a foreign checkpoint as one of ours, checked against the network of a recipe if one is named.

    With a recipe the file also says which settings its encoder belongs to, so that a run with others is refused.

    Raises:
        CheckpointError: if the file cannot be read, or fits the recipe's network not at all or, without `allow_partial`, only
            in part. Nothing is written then.
    """
    checkpoint = load_any_weights(file)
    chosen = {n: t for n, t in checkpoint.tensors.items() if not encoder_only or n.split(".", 1)[0] in ENCODER_PARTS}
    if not chosen:
        raise CheckpointError(
            f"{file}: holds no encoder (no tensor below {' or '.join(ENCODER_PARTS)}). Leave --encoder-only out, or name a "
            "file of the whole network."
        )
    meta: dict[str, Any] = {**checkpoint.meta, "imported_from": file.name}
    lines: list[str] = []
    if recipe is not None:
        network = _network(recipe)
        place = nn.ModuleDict({p: network.get_submodule(p) for p in ENCODER_PARTS}) if encoder_only else network
        try:
            report = load_into(place, chosen, allow_partial=allow_partial)
        except CheckpointError as error:
            raise CheckpointError(f"{file} for {recipe}: {error}") from None
        lines.append(f"{recipe}: {report.summary()}")
        chosen = {name: chosen[name] for name in report.matched}
        settings = _settings(recipe)
        if "config" not in checkpoint.meta:  # of another program, whose inputs are metres
            chosen = _first_layer_in(chosen, settings, metres=False)
        meta["config"] = settings
    save_checkpoint(out, chosen, meta)
    return "\n".join([*lines, f"{out}: {_size(chosen)}"])


def export_weights(source: Path, out: Path) -> str:
    """Writes the network of a run folder or checkpoint under OpenPCDet's names; returns what to tell the user."""
    checkpoint = load_any_weights(source)
    step = checkpoint.meta.get("global_step", checkpoint.meta.get("step", 0))
    tensors = _first_layer_in(checkpoint.tensors, checkpoint.meta.get("config"), metres=True)
    names = export_openpcdet(tensors, out, global_step=int(step))
    return f"{out}: {len(names)} tensors under OpenPCDet's names, global_step {int(step)} among them"


def _first_layer_in(tensors: Mapping[str, Tensor], config: Any, *, metres: bool) -> dict[str, Tensor]:
    """The tensors; the first layer of an encoder that `config` says has unit inputs is made one for metres, or the reverse."""
    found = dict(tensors)
    if not isinstance(config, dict) or config.get("encoder", {}).get("point_inputs") != "unit" or _FIRST_LAYER not in found:
        return found
    weight = found[_FIRST_LAYER]
    size = unit_input_size(tuple(config["grid"]["voxel_size"]), weight.shape[1] - 9)
    found[_FIRST_LAYER] = weight / size if metres else weight * size
    return found


def _network(recipe: str) -> nn.Module:
    return build_network(any_recipe(recipe, Path("prepared")), torch.device("cpu"))


def _settings(recipe: str) -> dict[str, Any]:
    tree = any_recipe(recipe, Path("prepared")).model_dump(mode="json")
    data = {name: tree["data"][name] for name in _DATA_SETTINGS}
    return {"encoder": tree["encoder"], "grid": tree["grid"], "data": data}


def _encoder_report(network: nn.Module, tensors: Mapping[str, Tensor]) -> LoadReport:
    encoder = nn.ModuleDict({part: network.get_submodule(part) for part in ENCODER_PARTS})
    return compare(encoder, {n: t for n, t in tensors.items() if n.split(".", 1)[0] in ENCODER_PARTS})


def _parts(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        parts[name.split(".", 1)[0]][name] = tensor
    return parts


def _size(tensors: Mapping[str, Tensor]) -> str:
    return f"{len(tensors)} tensors, {sum(t.numel() for t in tensors.values()):,} numbers"
