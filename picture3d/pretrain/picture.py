"""PICTURE pre-training, whole. Read `pretrain_step` first: one line per box of the paper's figure.

Source: "Point Cloud Reconstruction Is Insufficient to Learn 3D Representations" (PICTURE), ACM Multimedia 2024. What differs
from the published code, and why: `docs/paper_to_code.md`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from picture3d.errors import ConfigError
from picture3d.models.cylinder_encoder import point_encoder
from picture3d.models.dsvt import Dsvt, DsvtConfig, DsvtOutput
from picture3d.models.layer_trace import LayerTrace, num_layers, trace_layers
from picture3d.models.mae_decoder import LightDecoder, VoxelDecoder
from picture3d.models.voxel_encoder import EncodedVoxels
from picture3d.pretrain.ema import EmaConfig, SelfTeacher
from picture3d.pretrain.gate import Gate, GateConfig
from picture3d.pretrain.hierarchy import Hierarchy, HierarchyConfig, LayerReader, Neighbourhoods, neighbourhoods
from picture3d.pretrain.losses import LossConfig, coordinates_loss, features_loss, target_points_m, voxel_centers_m
from picture3d.pretrain.mask_lab import voxel_places
from picture3d.pretrain.masking import MaskConfig, choose_hidden
from picture3d.pretrain.predictors import Predictors
from picture3d.pretrain.targets import VoxelTargets, voxel_targets
from picture3d.pretrain.whitening import FeatureWhitening
from picture3d.structures.batch import PointBatch
from picture3d.structures.voxels import SparseVoxels, VoxelGrid


@dataclass(frozen=True, slots=True, eq=False)
class PretrainStep:
    """What one step computed. M voxels, V of them hidden; P points predicted, T true points, D teacher features."""

    coords: Tensor  # (M, 4) int32: batch, x, y, z
    hidden: Tensor  # (M,) bool
    targets: VoxelTargets  # M rows
    predicted_points_m: Tensor | None  # (V, P, 3) relative to the voxel centre; None where their loss has weight 0
    target_points_m: Tensor | None  # (V, T, 3) relative to the voxel centre
    predicted_features: Tensor | None  # (V, D), whitened if the network has that; None where their loss has weight 0
    # Scalars: "total" and, not yet weighted, "coordinates", "features" (of layers: "_0"...) and "visible_features".
    losses: dict[str, Tensor]


def pretrain_step(
    model: Picture, batch: PointBatch, mask: MaskConfig, loss: LossConfig, generator: torch.Generator
) -> PretrainStep:
    """One forward pass of PICTURE, losses included.

    Args:
        model: the network.
        batch: points on the network's device, with teacher targets where mask or losses need them.
        mask: what to hide.
        loss: what to reconstruct.
        generator: source of the mask, on the network's device.

    Raises:
        ConfigError: if the mask or a loss needs what the batch or the network does not have.
    """
    embedded = model.embed(batch)  # points -> voxels, all of them
    coords = embedded.voxels.coords
    own = None if model.self_teacher is None else model.self_teacher(batch)  # a self-teacher sees the whole sweep now
    targets = voxel_targets(batch, embedded.assignment, mask, generator, own)  # what the teacher says of each voxel
    places, sample = voxel_places(coords, model.grid), coords[:, 0].long()
    if model.whitening is not None and model.training and targets.features is not None:
        model.whitening.see(targets.features, targets.has_features)
    hidden = choose_hidden(targets.features, targets.superclass, sample, batch.batch_size, mask, generator, places)
    latent, layers = model.encode_traced(embedded.voxels.select(~hidden))  # the encoder never sees a hidden voxel
    tokens = model.decode(latent, coords, hidden)  # (V, C): hidden voxels, from visible tokens and mask tokens

    rows = hidden.nonzero().squeeze(1)
    losses: dict[str, Tensor] = {}
    points = true_points = features = wanted = None
    if loss.coordinates_weight > 0:
        points = model.dense_head.points_m(tokens)
        true_points = target_points_m(batch.xyz, embedded.assignment, model.grid, rows, loss.num_target_points)
        losses["coordinates"] = coordinates_loss(points, true_points)
    if loss.features_weight > 0:
        features = model.dense_head.teacher_features(tokens)
        wanted = model.scaled(_wanted_features(targets, features))
        losses["features"] = features_loss(features, wanted[rows], targets.has_features[rows])
    if loss.visible_features_weight > 0:  # not in the paper: no decoder stands between this loss and the encoder
        seen, visible = model.features_of_visible(latent), ~hidden
        wanted_seen = model.scaled(_wanted_features(targets, seen)[visible])
        losses["visible_features"] = features_loss(seen, wanted_seen, targets.has_features[visible])
    weights = {
        "coordinates": loss.coordinates_weight,
        "features": loss.features_weight,
        "visible_features": loss.visible_features_weight,
    }
    if model.gate is not None:
        weights["features"] *= float(model.gate.weight)
        weights["visible_features"] *= float(model.gate.weight)
    if model.hierarchy is None or layers is None:
        terms = [weights[name] * value for name, value in losses.items()]
    else:
        alpha = model.hierarchy.alpha
        terms = [weights[name] * share_of(name, alpha[-1]) * value for name, value in losses.items()]
        chosen = model.hierarchy.chosen(len(rows), rows.device)
        around = neighbourhoods(coords[~hidden], coords[rows[chosen]], model.hierarchy.grid_shape, model.hierarchy.sizes)
        for layer in range(len(alpha) - 1):
            of_layer = layer_losses(model.hierarchy, layers, layer, around, chosen, rows, true_points, wanted, targets)
            terms += [weights[name] * share_of(name, alpha[layer]) * value for name, value in of_layer.items()]
            losses |= {f"{name}_{layer}": value for name, value in of_layer.items()}
    total = sum(terms, start=tokens.new_zeros((), dtype=torch.float32))
    return PretrainStep(coords, hidden, targets, points, true_points, features, {"total": total, **losses})


def share_of(name: str, alpha: float) -> float:
    """What a loss counts in a layer whose points count `alpha`."""
    return alpha if name == "coordinates" else 1.0 - alpha


def layer_losses(
    hierarchy: Hierarchy,
    layers: LayerTrace,
    layer: int,
    around: Neighbourhoods,
    chosen: Tensor,
    rows: Tensor,
    true_points_m: Tensor | None,
    wanted: Tensor | None,
    targets: VoxelTargets,
) -> dict[str, Tensor]:
    """The reconstruction of one layer before the last: "coordinates" and "features", where they are wanted.

    Args:
        hierarchy: readers and predictors.
        layers: what the encoder's layers said of the visible voxels.
        layer: which of them.
        around: visible voxels around the chosen hidden ones.
        chosen: (W,) int64, which of the hidden voxels.
        rows: (V,) int64, which of all voxels are hidden.
        true_points_m: (V, T, 3) of the hidden voxels; None if points are not wanted.
        wanted: (M, D) what is to be told of the teacher's features of all voxels; None if they are not wanted.
        targets: which voxels have them.
    """
    tokens = cast(LayerReader, hierarchy.readers[layer])(layers.at_voxels(layer), around)
    predictors = cast(Predictors, hierarchy.predictors[layer])
    losses: dict[str, Tensor] = {}
    if true_points_m is not None:
        losses["coordinates"] = coordinates_loss(predictors.points_m(tokens), true_points_m[chosen])
    if wanted is not None:
        of = rows[chosen]
        losses["features"] = features_loss(predictors.teacher_features(tokens), wanted[of], targets.has_features[of])
    return losses


class Picture(nn.Module):
    """The network of pre-training: point encoder, encoder on visible voxels, decoder, two predictors.

    State-dict keys are the reference's: the encoder that fine-tuning loads is below ``vfe.`` and ``backbone_3d.``, the decoder
    below ``backbone_2d.``, the predictors below ``dense_head.``.

    Args:
        grid: range and voxel size.
        in_features: point features used beside x, y, z.
        backbone: the encoder; its width is the width of everything.
        teacher_channels: D, length of the teacher's features; None for a network that does not predict those of hidden voxels.
        visible_channels: the same for visible voxels, read from the encoder's output by one linear layer.
        decoder: voxel: one token per voxel; light: the published one, one token per pillar.
        decoder_blocks: blocks of the voxel decoder.
        num_predicted_points: P, points predicted per hidden voxel.
        pillars: encode pillars instead of voxels.
        self_teacher: keep a slowly following copy of the encoder, whose features are the targets instead of the batch's.
        hierarchy: GPICTURE: every layer of the encoder reconstructs.
        gate: GPICTURE: features count when the shallow layers have settled.
        whitening: predict features whitened; see `pretrain.whitening`.

    Raises:
        ConfigError: if grid, windows and strides do not fit each other.
    """

    def __init__(
        self,
        grid: VoxelGrid,
        in_features: int,
        backbone: DsvtConfig,
        *,
        teacher_channels: int | None = 64,
        visible_channels: int | None = None,
        decoder: Literal["voxel", "light"] = "voxel",
        decoder_blocks: int = 2,
        num_predicted_points: int = 16,
        pillars: bool = False,
        self_teacher: EmaConfig | None = None,
        hierarchy: HierarchyConfig | None = None,
        gate: GateConfig | None = None,
        whitening: FeatureWhitening | None = None,
    ) -> None:
        super().__init__()
        self.grid = grid
        point_options = {"momentum": backbone.point_norm_momentum, "unit_inputs": backbone.point_inputs == "unit"}
        self.vfe = point_encoder(in_features, backbone.channels, grid, pillars, **point_options)
        shape = self.vfe.grid_shape
        self.backbone_3d = Dsvt(backbone, shape)
        self.backbone_2d = (
            VoxelDecoder(backbone, shape, decoder_blocks)
            if decoder == "voxel"
            else LightDecoder(
                backbone.channels,
                shape,
                ffn_channels=backbone.ffn_channels,
                heads=backbone.heads,
                set_size=backbone.set_sizes[0],
                window=backbone.windows[0][:2],
                shift=backbone.shifts[1][:2],
            )
        )
        self.dense_head = Predictors(backbone.channels, num_predicted_points, teacher_channels)
        self.self_teacher = None if self_teacher is None else SelfTeacher(self.vfe, self.backbone_3d, self_teacher)
        layers, width = num_layers(backbone), backbone.channels
        # Built last: the other weights are then drawn as without it.
        self.hierarchy = (
            Hierarchy(hierarchy, layers, width, shape, backbone.windows[0], num_predicted_points, teacher_channels)
            if hierarchy is not None and hierarchy.enabled
            else None
        )
        self.gate = Gate(gate, layers, width) if gate is not None and gate.enabled else None
        self.whitening = whitening
        self.visible_head = None if visible_channels is None else nn.Linear(2 * width, visible_channels)

    def embed(self, batch: PointBatch) -> EncodedVoxels:
        """Points to voxel features, hidden and visible ones alike."""
        return self.vfe(batch)

    def encode(self, visible: SparseVoxels) -> DsvtOutput:
        """The encoder on visible voxels; there may be none."""
        return self.backbone_3d(visible)

    def encode_traced(self, visible: SparseVoxels) -> tuple[DsvtOutput, LayerTrace | None]:
        """The same, with what every layer said if they all have to reconstruct."""
        if self.hierarchy is None:
            return self.encode(visible), None
        with trace_layers(self.backbone_3d) as layers:
            latent = self.encode(visible)
        return latent, layers

    def decode(self, latent: DsvtOutput, coords: Tensor, hidden: Tensor) -> Tensor:
        """(V, C) features of the hidden voxels among those at (M, 4) `coords`, in their order."""
        return self.backbone_2d(latent, coords, hidden, hidden.nonzero().squeeze(1))

    def features(self, batch: PointBatch) -> SparseVoxels:
        """The encoder's view of whole sweeps, nothing hidden: each voxel's pillar token joined with its first-stage feature.

        Returns:
            (M, 2 C) features at all occupied voxels.
        """
        voxels = self.embed(batch).voxels
        return voxels.with_feats(self.encode(voxels).joined)

    def scaled(self, features: Tensor) -> Tensor:
        """(V, D) teacher features as the predictors are to tell them."""
        return features if self.whitening is None else self.whitening(features)

    def features_of_visible(self, latent: DsvtOutput) -> Tensor:
        """(U, D) what the encoder itself tells of the teacher's features of the U voxels it saw; computed in float32.

        Raises:
            ConfigError: if the network was built without this predictor.
        """
        if self.visible_head is None:
            raise ConfigError(
                "loss.visible_features_weight is above 0, but the network has no predictor for visible voxels: set it to 0, or "
                "set visible_channels to the length of the teacher's features"
            )
        joined = latent.joined
        with torch.autocast(joined.device.type, enabled=False):
            return self.visible_head(joined.float())


def _wanted_features(targets: VoxelTargets, predicted: Tensor) -> Tensor:
    if targets.features is None:
        raise ConfigError(
            "a loss on teacher features has a weight above 0 and the batch has none. Run `picture3d targets` first and name "
            "the store in the data settings, or set loss.features_weight=0 and loss.visible_features_weight=0 to reconstruct "
            "points alone."
        )
    if targets.features.shape[1] != predicted.shape[1]:
        raise ConfigError(
            f"the teacher's features have {targets.features.shape[1]} columns, the network predicts {predicted.shape[1]}: set "
            f"teacher_channels={targets.features.shape[1]}"
        )
    return targets.features


class PretrainTask:
    """PICTURE as the training loop sees it.

    Args:
        module: the network.
        mask: what to hide.
        loss: what to reconstruct.
        gate_sample: sweeps by which the gate judges the encoder, on the network's device; needed if it has a gate.
        epoch_batches: batches of an epoch, for the gate.
    """

    def __init__(
        self,
        module: Picture,
        mask: MaskConfig,
        loss: LossConfig,
        *,
        gate_sample: PointBatch | None = None,
        epoch_batches: int | None = None,
    ) -> None:
        self._module, self.mask, self.loss_config = module, mask, loss
        self.gate_sample, self.epoch_batches = gate_sample, epoch_batches

    @property
    def module(self) -> Picture:
        """The network."""
        return self._module

    def loss(self, batch: PointBatch, generator: torch.Generator) -> dict[str, Tensor]:
        """Scalars by name; "total" is minimised.

        "coordinates" (square metres), "features" and "visible_features" are not weighted and are there if their weight is
        above 0;
        "hidden_share" is the share of all voxels that was really hidden; "hidden_voxels" and "voxels_without_target" are counts
        over the batch. With a self-teacher, which follows the encoder here, also what its `watch` measures; with a gate, the
        CKA of its last look and the weight it gives the features ("gate_agreement", "gate_beta").

        Raises:
            TrainingError: if the self-teacher has collapsed.
        """
        teacher = self.module.self_teacher
        if teacher is not None and self.module.training:
            teacher.follow(self.module.vfe, self.module.backbone_3d)
        gated = self._gated() if self.module.training else {}
        step = pretrain_step(self.module, batch, self.mask, self.loss_config, generator)
        hidden = step.hidden.sum().float()
        watched: dict[str, Tensor] = {}
        if teacher is not None and step.targets.features is not None and self.module.training:
            watched = teacher.watch(step.targets.features)
        return {
            **step.losses,
            "hidden_share": hidden / max(1, len(step.hidden)),
            "hidden_voxels": hidden,
            "voxels_without_target": (~step.targets.has_features).sum().float(),
            **watched,
            **gated,
        }

    def _gated(self) -> dict[str, Tensor]:
        """Counts a batch and, where an epoch has ended, looks at the sample; what is to be logged of the gate."""
        gate, network = self.module.gate, self.module
        if gate is None:
            return {}
        interval = gate.config.interval or self.epoch_batches
        if self.gate_sample is None or interval is None:
            raise ConfigError("the network has a gate: give its task gate_sample, and epoch_batches or gate.interval")
        if gate.count(interval):
            network.eval()
            try:
                # Whole sweeps and full precision: what is compared is the encoder, not its rounding.
                with torch.no_grad(), torch.autocast(gate.before.device.type, enabled=False):
                    with trace_layers(network.backbone_3d) as layers:
                        network.encode(network.embed(self.gate_sample).voxels)
                    gate.look([layers.at_voxels(layer) for layer in range(gate.layers)])
            finally:
                network.train()
        return {"gate_agreement": gate.agreement.float(), "gate_beta": gate.weight.float()}

    def reconstruct(self, batch: PointBatch, generator: torch.Generator) -> Reconstruction:
        """Hides and reconstructs a batch for looking at: no gradients, running statistics in the norms."""
        training = self.module.training
        self.module.eval()
        try:
            with torch.no_grad():
                step = pretrain_step(self.module, batch, self.mask, self.loss_config, generator)
        finally:
            self.module.train(training)
        centers = voxel_centers_m(step.coords, self.module.grid)
        rows = step.hidden.nonzero().squeeze(1)

        def placed(points_m: Tensor | None) -> Tensor | None:
            return None if points_m is None else points_m + centers[rows, None]

        return Reconstruction(
            voxel_coords=step.coords,
            voxel_centers_m=centers,
            hidden=step.hidden,
            superclass=step.targets.superclass,
            target_features=step.targets.features,
            has_features=step.targets.has_features,
            predicted_points_m=placed(step.predicted_points_m),
            target_points_m=placed(step.target_points_m),
            predicted_features=step.predicted_features,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Reconstruction:
    """Hidden voxels and what was made of them, in the LiDAR frame. M voxels of a batch, V of them hidden."""

    voxel_coords: Tensor  # (M, 4) int32: batch, x, y, z
    voxel_centers_m: Tensor  # (M, 3) float32
    hidden: Tensor  # (M,) bool
    superclass: Tensor  # (M,) int64; -1 where a voxel has no target
    target_features: Tensor | None  # (M, D) float32: the teacher's
    has_features: Tensor  # (M,) bool: the teacher knows this voxel
    predicted_points_m: Tensor | None  # (V, P, 3) float32; row i is the i-th hidden voxel; None if not predicted
    target_points_m: Tensor | None  # (V, T, 3) float32: true points, repeated cyclically
    predicted_features: Tensor | None  # (V, D) float32; None if not predicted
