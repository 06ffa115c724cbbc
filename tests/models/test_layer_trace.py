from __future__ import annotations

import pytest
import torch

from picture3d.errors import ConfigError
from picture3d.models.dsvt import Dsvt, DsvtConfig
from picture3d.models.dsvt_config import waymo_voxel_192
from picture3d.models.layer_trace import layer_names, layer_of_parameter, num_layers, trace_layers
from picture3d.structures.voxels import SparseVoxels

CONFIG = DsvtConfig(
    channels=16, ffn_channels=32, heads=2, blocks=(2, 1), set_sizes=(8, 8), windows=((4, 4, 4), (4, 4, 1)),
    shifts=((0, 0, 0), (2, 2, 0)), strides=((1, 1, 4),),
)  # fmt: skip
SHAPE = (8, 8, 4)


def voxels_of(share: float = 0.4) -> SparseVoxels:
    generator = torch.Generator().manual_seed(0)
    coords = (torch.rand(1, *SHAPE, generator=generator) < share).nonzero().int()
    return SparseVoxels(coords, torch.randn(len(coords), 16, generator=generator), SHAPE, 1)


def encoder(config: DsvtConfig = CONFIG) -> Dsvt:
    torch.manual_seed(0)
    return Dsvt(config, SHAPE).eval()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_last_layer_of_each_stage_is_what_the_encoder_gives_out(checkpointing: bool):
    network, voxels = encoder(CONFIG.model_copy(update={"activation_checkpointing": checkpointing})).train(), voxels_of()
    with trace_layers(network) as trace:
        result = network(voxels)
    assert len(trace) == num_layers(CONFIG) == 6
    assert torch.equal(trace.at_voxels(3), result.stages[0].feats)
    assert torch.equal(trace.at_voxels(5), result.output.feats[result.token_of_voxel])
    assert all(trace.at_voxels(layer).shape == voxels.feats.shape for layer in range(6))
    sum(trace.at_voxels(layer).square().sum() for layer in range(6)).backward()  # pyright: ignore[reportAttributeAccessIssue]
    assert all(p.grad is not None for name, p in network.named_parameters() if layer_of_parameter(name, CONFIG) is not None)


def test_every_layer_lies_in_the_order_of_the_voxels_however_attention_is_computed():
    voxels, seen = voxels_of(), []
    for attention in ("padded", "bucketed"):
        network = encoder(CONFIG.model_copy(update={"attention": attention}))
        with trace_layers(network) as trace, torch.no_grad():
            network(voxels)
        seen.append([trace.at_voxels(layer) for layer in range(6)])
    for layer, (padded, bucketed) in enumerate(zip(*seen, strict=True)):
        torch.testing.assert_close(bucketed, padded, rtol=1e-4, atol=1e-5, msg=f"layer {layer}")


def test_watching_changes_nothing_and_ends():
    network, voxels = encoder(), voxels_of()
    before = network(voxels).output.feats
    with trace_layers(network) as trace:
        assert torch.equal(network(voxels).output.feats, before)
    seen = trace.at_voxels(0).clone()
    network(voxels.with_feats(voxels.feats + 1))
    assert torch.equal(trace.at_voxels(0), seen)


def test_an_encoder_that_did_not_run_has_no_layers():
    with trace_layers(encoder()) as trace, pytest.raises(ConfigError, match="Run the encoder"):
        trace.at_voxels(0)


def test_parameters_are_found_in_the_layer_they_shape():
    """Changing a parameter of layer l leaves the layers before l as they are and changes layer l."""
    voxels, network = voxels_of(), encoder()
    with trace_layers(network) as trace, torch.no_grad():
        network(voxels)
        before = [trace.at_voxels(layer) for layer in range(6)]
        for name, parameter in network.named_parameters():
            layer = layer_of_parameter(name, CONFIG)
            if layer is None or not name.endswith("bias") or ("linear2" not in name and "norm_stage" not in name):
                continue
            kept = parameter.clone()
            parameter += torch.linspace(-1, 1, parameter.numel()).view_as(parameter)
            network(voxels)
            same = [torch.equal(trace.at_voxels(other), before[other]) for other in range(6)]
            assert same[: layer + 1] == [True] * layer + [False], name
            parameter.copy_(kept)


def test_the_published_encoder_has_eight_layers():
    assert num_layers(waymo_voxel_192()) == 8
    assert layer_names(waymo_voxel_192())[:3] == ("0.0a", "0.0b", "1.0a")
