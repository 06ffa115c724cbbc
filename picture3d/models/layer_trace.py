"""What every layer of a DSVT encoder makes of every voxel, seen from outside: for losses on layers and for comparing networks.

Use::

    with trace_layers(encoder) as trace:
        encoder(voxels)
    trace.at_voxels(layer)      # (M, C), pooled tokens repeated for the voxels they were pooled from

A block has two layers. The first is the output of its first attention layer; the second is the output of the whole block, its
residual norm included: that is what the next block, and at the end the task, is given.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from picture3d.errors import ConfigError
from picture3d.models.dsvt import Dsvt
from picture3d.models.dsvt_config import DsvtConfig
from picture3d.ops.scatter import gather_rows, select_unique_rows
from picture3d.ops.sets import SetRuns


def num_layers(config: DsvtConfig) -> int:
    """Layers of an encoder: two per block."""
    return 2 * sum(config.blocks)


def layer_names(config: DsvtConfig) -> tuple[str, ...]:
    """What to call the layers: stage, block and place in the block, from 0: "0.0a", "0.0b", "1.0a"..."""
    return tuple(f"{s}.{b}{part}" for s, blocks in enumerate(config.blocks) for b in range(blocks) for part in "ab")


def layer_of_parameter(name: str, config: DsvtConfig) -> int | None:
    """The layer that a parameter belongs to, by its name below ``backbone_3d.``; None for position embeddings and poolings.

    A residual norm belongs to the second layer of its block.
    """
    parts = name.split(".")
    first = [0]
    for blocks in config.blocks:
        first.append(first[-1] + 2 * blocks)
    if parts[0].startswith("residual_norm_stage_"):
        return first[int(parts[0].rsplit("_", 1)[1])] + 2 * int(parts[1]) + 1
    if parts[0].startswith("stage_") and not parts[0].endswith("_reduction") and parts[2] == "encoder_list":
        return first[int(parts[0].rsplit("_", 1)[1])] + 2 * int(parts[1]) + int(parts[3])
    return None


class LayerTrace:
    """The layers of one pass through an encoder, in order."""

    def __init__(self, config: DsvtConfig) -> None:
        self._stage_of_layer = tuple(s for s, blocks in enumerate(config.blocks) for _ in range(2 * blocks))
        self._tokens: list[Tensor | None] = [None] * num_layers(config)
        # Where a layer keeps each of its stage's voxels; None: in the order of the voxels.
        self._places: list[Tensor | None] = [None] * num_layers(config)
        self._pooled: list[Tensor | None] = [None] * (len(config.blocks) - 1)

    def __len__(self) -> int:
        return len(self._tokens)

    def at_voxels(self, layer: int) -> Tensor:
        """(M, C) output of a layer for each of the encoder's M input voxels.

        Raises:
            ConfigError: if the encoder has not run, or hides this layer.
        """
        tokens = self._tokens[layer]
        if tokens is None:
            raise ConfigError(f"layer {layer} of the encoder was not seen. Run the encoder inside `trace_layers` first")
        row: Tensor | None = None
        for pooled in self._pooled[: self._stage_of_layer[layer]]:
            assert pooled is not None  # a stage runs after the poolings before it
            row = pooled if row is None else pooled[row]
        place = self._places[layer]
        if row is None:
            return tokens if place is None else select_unique_rows(tokens, place)
        return gather_rows(tokens, row if place is None else place[row])


@contextmanager
def trace_layers(encoder: Dsvt) -> Iterator[LayerTrace]:
    """Watches the passes of an encoder; the trace holds the last one, with its graph if there is one."""
    trace = LayerTrace(encoder.config)
    handles: list[torch.utils.hooks.RemovableHandle] = []

    def watch(module: nn.Module, kept: list[Tensor | None], place: int) -> None:
        def keep(_module: nn.Module, _inputs: object, output: Tensor | tuple[object, Tensor]) -> None:
            kept[place] = output[1] if isinstance(output, tuple) else output

        handles.append(module.register_forward_hook(keep))

    def watch_order(block: nn.Module, layer: int) -> None:
        def keep(_module: nn.Module, inputs: tuple[object, ...]) -> None:
            # A block may run each of its layers in the order of its sets.
            layout = next((one for one in inputs if isinstance(one, SetRuns)), None)
            trace._places[layer] = None if layout is None else layout.place_of_voxel[0]

        handles.append(block.register_forward_pre_hook(keep))

    layer = 0
    for stage, blocks in enumerate(encoder.config.blocks):
        if stage > 0:
            watch(encoder.get_submodule(f"stage_{stage - 1}_reduction"), trace._pooled, stage - 1)
        for block in range(blocks):
            watch_order(encoder.get_submodule(f"stage_{stage}.{block}"), layer)
            watch(encoder.get_submodule(f"stage_{stage}.{block}.encoder_list.0"), trace._tokens, layer)
            watch(encoder.get_submodule(f"residual_norm_stage_{stage}.{block}"), trace._tokens, layer + 1)
            layer += 2
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()
