"""`compare`: how far two encoders agree, layer by layer, on the same sweeps, and how far their weights are apart."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from picture3d.commands.build import run_config_of, sample_frames
from picture3d.commands.machine import start
from picture3d.datasets.prepared import PreparedDataset
from picture3d.datasets.samples import DataConfig
from picture3d.errors import CheckpointError, ConfigError, DataError
from picture3d.files import read_json_object, whole_file, write_json, write_text
from picture3d.models.layer_trace import layer_names, layer_of_parameter, trace_layers
from picture3d.ops.similarity import CrossMoments, weight_disparity
from picture3d.recipes.catalogue import RunConfig
from picture3d.structures.batch import PointBatch
from picture3d.tasks.encoder import TaskEncoder, load_encoder
from picture3d.training.runlog import Progress
from picture3d.training.weights_import import load_any_weights
from picture3d.view.heat_map import HeatMap, heat_map_of, heat_map_picture, heat_map_svg
from picture3d.view.pictures import png_bytes

_MAX_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """How far the weights of a layer are apart."""

    layer: str
    numbers: int
    mean: float | None  # of second - first; None where shapes differ
    variance: float | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two encoders on the same voxels."""

    first: str
    second: str
    data: str
    frames: int
    voxels: int
    first_layers: tuple[str, ...]
    second_layers: tuple[str, ...]
    cka: tuple[tuple[float | None, ...], ...]  # (first's layers, second's layers); None where a layer does not vary
    weights: tuple[LayerWeights, ...]  # empty if the encoders have other layers

    @property
    def diagonal(self) -> tuple[float | None, ...]:
        """CKA of each layer with the same layer; empty if the numbers of layers differ."""
        same = len(self.first_layers) == len(self.second_layers)
        return tuple(self.cka[i][i] for i in range(len(self.first_layers))) if same else ()

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "kind": "comparison",
            "first": self.first,
            "second": self.second,
            "data": self.data,
            "frames": self.frames,
            "voxels": self.voxels,
            "first_layers": list(self.first_layers),
            "second_layers": list(self.second_layers),
            "cka": [list(row) for row in self.cka],
            "diagonal": list(self.diagonal),
            "weights": [{"layer": w.layer, "numbers": w.numbers, "mean": w.mean, "variance": w.variance} for w in self.weights],
        }

    def heat_map(self) -> HeatMap:
        """All layers against all layers."""
        title = f"Linear CKA of {_name(self.first)} and {_name(self.second)}"
        heat = heat_map_of(title, self.cka, self.first_layers, self.second_layers)
        return replace(heat, row_label=f"layers of {_name(self.first)}", column_label=f"layers of {_name(self.second)}")


def compare(
    first: Path,
    others: list[Path],
    *,
    data: Path | None,
    split: str | None,
    frames: int,
    out: Path | None,
    as_json: bool,
    device: str,
    threads: int,
) -> str:
    """Compares an encoder with one or several others; returns the tables, or JSON.

    With `out`, every comparison is left there as ``compare_<first>_<other>.json``, ``.svg`` and ``.png``.
    """
    machine = start(device, threads)
    found = []
    with Progress("compare", unit="frames") as progress:
        for other in others:
            found.append(
                compare_encoders(first, other, data=data, split=split, frames=frames, device=machine, progress=progress)
            )
    written = [_write(comparison, out) for comparison in found] if out is not None else []
    alpha = alpha_of(found)
    if as_json:
        return json.dumps({"comparisons": [c.to_json() for c in found], "alpha": alpha})
    text = [_table(comparison) for comparison in found]
    if alpha is not None:
        values = ",".join(f"{value:.3f}" for value in alpha)
        text.append(f"As shares of the points in hierarchical reconstruction: --set 'hierarchy.alpha=[{values}]'")
    return "\n\n".join([*text, *(f"written: {path}" for path in written)])


def read_comparison(path: Path) -> Comparison:
    """What `compare --out` left in a JSON file.

    Raises:
        DataError: if it is not such a file.
    """
    tree = read_json_object(path, max_bytes=_MAX_BYTES)
    try:
        comparison = Comparison(
            **{name: tree[name] for name in ("first", "second", "data", "frames", "voxels")},
            first_layers=tuple(tree["first_layers"]),
            second_layers=tuple(tree["second_layers"]),
            cka=tuple(tuple(row) for row in tree["cka"]),
            weights=tuple(LayerWeights(**entry) for entry in tree["weights"]),
        )
        comparison.heat_map()
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: not what `compare` writes ({error}). Make it again, or take it away.") from None
    return comparison


def alpha_of(comparisons: list[Comparison]) -> list[float] | None:
    """GPICTURE's alpha: the mean over comparisons of each layer's CKA with the same layer; None if it is not known of all."""
    rows = [comparison.diagonal for comparison in comparisons]
    if not rows or not rows[0] or any(len(row) != len(rows[0]) or None in row for row in rows):
        return None
    return [sum(value or 0.0 for value in column) / len(rows) for column in zip(*rows, strict=True)]


def compare_encoders(
    first: Path,
    second: Path,
    *,
    data: Path | None,
    split: str | None,
    frames: int,
    device: torch.device,
    progress: Progress | None = None,
) -> Comparison:
    """Runs two encoders over the same whole sweeps, nothing hidden, norms with their running statistics.

    Args:
        first: run folder or checkpoint of a pre-training or fine-tuning.
        second: the same.
        data: prepared frames; by default those of the first run.
        split: of these; by default "val" if there is one, else the first run's.
        frames: sweeps, evenly spread.
        device: where to compute.
        progress: told of every sweep.

    Raises:
        ConfigError: if the two see other voxels, so that there is nothing to compare row by row.
        CheckpointError: if a checkpoint cannot be read or does not say how its encoder was built.
    """
    a, b = _read(first), _read(second)
    _same_voxels(first, second, a, b)
    networks = (_network(first, a, device), _network(second, b, device))
    names = (layer_names(a.encoder), layer_names(b.encoder))
    moments = CrossMoments([a.encoder.channels] * len(names[0]), [b.encoder.channels] * len(names[1]))
    root = data or a.data.root
    wanted = {"root": root, "split": split or _default_split(root, a.data)}
    inputs = {name: getattr(b.data, name) for name in ("features", "intensity_scale")}
    sweeps = (sample_frames(a.data, frames, **wanted), sample_frames(a.data.model_copy(update=inputs), frames, **wanted))
    for index in range(sweeps[0].steps_per_epoch):
        seen = [sweep.batch(0, index).to(device) for sweep in sweeps]
        layers = [_layers(network, batch) for network, batch in zip(networks, seen, strict=True)]
        try:
            moments.add(*layers)
        except ValueError as error:
            raise CheckpointError(
                f"{first} and {second} cannot be compared on {', '.join(seen[0].frame_names)}: {error}. Look into their "
                "metrics.jsonl: has one of the runs diverged?"
            ) from None
        if progress is not None:
            progress(index + 1, sweeps[0].steps_per_epoch)
    cka = tuple(tuple(value if math.isfinite(value) else None for value in row) for row in moments.cka().tolist())
    weights = _weights(networks, a, b)
    return Comparison(str(first), str(second), str(root), sweeps[0].steps_per_epoch, moments.rows, *names, cka, weights)


def _read(source: Path) -> RunConfig:
    tree = load_any_weights(source).meta.get("config")
    if not isinstance(tree, dict):
        raise CheckpointError(
            f"{source}: does not say how its encoder was built; name a run folder of this package or one of its checkpoints"
        )
    return run_config_of(tree, str(source))


def _same_voxels(first: Path, second: Path, a: RunConfig, b: RunConfig) -> None:
    """Refuses two encoders that see other voxels: their rows have no partners."""
    here, there = a.grid.model_dump(mode="json"), b.grid.model_dump(mode="json")
    here, there = here | {"sweeps": a.data.sweeps}, there | {"sweeps": b.data.sweeps}
    other = [f"{key} is {here[key]} in {first} and {there[key]} in {second}" for key in here if here[key] != there[key]]
    if other:
        raise ConfigError(f"these encoders see other voxels: {'; '.join(other)}. Compare two of the same grid and sweeps.")


def _network(source: Path, config: RunConfig, device: torch.device) -> TaskEncoder:
    network = TaskEncoder(config.grid.grid, config.in_features, config.encoder, pillars=config.grid.pillars)
    load_encoder(network, source)
    return network.to(device).eval()


def _default_split(root: Path, data: DataConfig) -> str | None:
    dataset = PreparedDataset(root)
    return "val" if "val" in dataset.splits and dataset.keyframes("val") else data.split


@torch.no_grad()
def _layers(network: TaskEncoder, batch: PointBatch) -> list[Tensor]:
    """(M, C) of every layer, of the M voxels of a batch."""
    with trace_layers(network.backbone_3d) as layers:
        network.backbone_3d(network.vfe(batch).voxels)
    return [layers.at_voxels(layer) for layer in range(len(layers))]


def _weights(networks: tuple[TaskEncoder, TaskEncoder], a: RunConfig, b: RunConfig) -> tuple[LayerWeights, ...]:
    """Disparity of each layer's weights; of the point encoder, and of position embeddings and poolings, beside them."""
    if a.encoder.blocks != b.encoder.blocks:
        return ()
    names = layer_names(a.encoder)
    groups: dict[str, list[list[Tensor]]] = {name: [[], []] for name in ("points", *names, "positions, poolings")}
    for side, network in enumerate(networks):
        for parameter in network.vfe.parameters():
            groups["points"][side].append(parameter.detach())
        for name, parameter in network.backbone_3d.named_parameters():
            layer = layer_of_parameter(name, a.encoder)
            groups["positions, poolings" if layer is None else names[layer]][side].append(parameter.detach())
    found = []
    for name, (mine, theirs) in groups.items():
        numbers = sum(p.numel() for p in mine)
        try:
            mean, variance = weight_disparity(mine, theirs)
        except ValueError:  # another width, or other inputs: these two have no difference
            mean = variance = math.nan
        known = math.isfinite(mean)
        found.append(LayerWeights(name, numbers, mean if known else None, variance if known else None))
    return tuple(found)


def _write(comparison: Comparison, out: Path) -> Path:
    base = out / f"compare_{_name(comparison.first)}_{_name(comparison.second)}"
    heat = comparison.heat_map()
    out.mkdir(parents=True, exist_ok=True)
    write_json(base.with_name(base.name + ".json"), comparison.to_json())
    write_text(base.with_name(base.name + ".svg"), heat_map_svg(heat))
    with whole_file(base.with_name(base.name + ".png")) as file:
        file.write(png_bytes(heat_map_picture(heat)))
    return base.with_name(base.name + ".json")


def _table(c: Comparison) -> str:
    lines = [f"{c.first} against {c.second}: {c.frames} sweeps of {c.data}, {c.voxels:,} voxels", ""]
    wide = max(len(name) for name in (*c.first_layers, *(w.layer for w in c.weights)))
    lines.append("linear CKA (rows: first, columns: second; a: first layer of a block, b: the whole block)")
    lines.append(f"{'':{wide}s}  " + "  ".join(f"{name:>5s}" for name in c.second_layers))
    for name, row in zip(c.first_layers, c.cka, strict=True):
        lines.append(f"{name:{wide}s}  " + "  ".join("    -" if value is None else f"{value:5.3f}" for value in row))
    lines.append("")
    if not c.weights:
        lines.append("weights: other numbers of blocks, so none belongs to another")
        return "\n".join(lines)
    lines.append("weights, second less first")
    lines.append(f"{'':{wide}s}  {'numbers':>10s}  {'mean':>10s}  {'variance':>10s}")
    for w in c.weights:
        values = [f"{'-':>10s}" if value is None else f"{value:10.3e}" for value in (w.mean, w.variance)]
        lines.append(f"{w.layer:{wide}s}  {w.numbers:>10,d}  " + "  ".join(values))
    return "\n".join(lines)


def _name(source: str) -> str:
    """What a run is called: its folder, or the folder of its checkpoint and the checkpoint's name."""
    path = Path(source)
    return path.stem if path.suffix != ".safetensors" or path.stem != "model" else path.resolve().parent.name
