"""Decoders of masked pre-training: visible tokens and one mask token per hidden voxel, to a feature per voxel.

`VoxelDecoder` is the default; `LightDecoder` is the published one, for its checkpoints and for comparison. Both take the
encoder's output for the visible voxels and the coordinates of all voxels. M is the number of voxels, of which some are hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from picture3d.models.dsvt import Dsvt, DsvtConfig, DsvtOutput
from picture3d.models.dsvt_config import Triple
from picture3d.ops.scatter import gather_rows, select_unique_rows
from picture3d.structures.voxels import SparseVoxels, voxel_keys


def voxel_decoder_config(encoder: DsvtConfig, blocks: int) -> DsvtConfig:
    """`blocks` blocks without pooling, in the windows and sets of the encoder's first stage."""
    return encoder.model_copy(
        update={
            "blocks": (blocks,),
            "set_sizes": encoder.set_sizes[:1],
            "windows": encoder.windows[:1],
            "strides": (),
        }
    )


class VoxelDecoder(nn.Module):
    """One token per voxel at its own place, so that predictions differ along z.

    A visible voxel starts as the encoder's final token of its pillar joined with its own feature after the encoder's first
    stage; a hidden voxel starts as the mask token plus an embedding of its position in the window. (The position embeddings of
    DSVT steer only who attends to whom: in a set of hidden voxels alone, all would stay equal without it.)

    Args:
        encoder: config of the encoder whose output is decoded.
        grid_shape: cells of the voxel grid along x, y, z.
        blocks: DSVT blocks; with two both window shifts are used.
    """

    def __init__(self, encoder: DsvtConfig, grid_shape: Triple, blocks: int = 2) -> None:
        super().__init__()
        self.channels = encoder.channels
        self.mask_token = nn.Parameter(torch.zeros(1, encoder.channels))
        self.mask_position = nn.Sequential(
            nn.Linear(3, encoder.channels), nn.GELU(), nn.Linear(encoder.channels, encoder.channels)
        )
        self.join = nn.Linear(2 * encoder.channels, encoder.channels)
        self.transformer = Dsvt(voxel_decoder_config(encoder, blocks), grid_shape)

    def forward(self, latent: DsvtOutput, coords: Tensor, hidden: Tensor, rows: Tensor | None = None) -> Tensor:
        """Decodes all voxels.

        Args:
            latent: the encoder's output for the visible voxels, in the order of `coords`.
            coords: (M, 4) int32 batch, x, y, z of all voxels, sorted.
            hidden: (M,) bool.
            rows: (R,) int64 different voxels whose features are wanted; None: all.

        Returns:
            (M, C) feature of every voxel, or (R, C).
        """
        visible = self.join(latent.joined)
        masked = self.mask_token + self.mask_position(self._position(coords[hidden]))
        tokens = torch.cat([visible, masked.to(visible.dtype)])
        # Visible rows come first in `tokens`; back to the order of `coords`.
        place = torch.where(hidden, hidden.cumsum(0) - 1 + len(visible), (~hidden).cumsum(0) - 1)
        tokens = select_unique_rows(tokens, place)
        voxels = SparseVoxels(coords, tokens, latent.stages[0].shape, latent.output.batch_size)
        return self.transformer(voxels).output.feats if rows is None else self.transformer.features_at(voxels, rows)

    def _position(self, coords: Tensor) -> Tensor:
        """(V, 3) position in the window of shift 0, from -1 to 1 along each axis."""
        windows, _ = self.transformer.stage_windows(0, coords)
        size = torch.tensor(windows.size, dtype=torch.float32, device=coords.device)
        return (2 * windows.position.float() + 1) / size - 1


class LightDecoder(Dsvt):
    """The published decoder with the least repair that runs: one pooling over the full height between its two stages.

    Visible tokens are pillars at z = 0, mask tokens sit at their voxels; after pooling every voxel reads its pillar. All voxels
    of a pillar therefore get the same feature, and a visible pillar token gives way to a mask token at z = 0 of its pillar.

    State-dict keys are those of the reference below ``backbone_2d.``.

    Args:
        channels: width of the encoder and of the decoder.
        grid_shape: cells of the voxel grid along x, y, z.
    """

    def __init__(
        self,
        channels: int,
        grid_shape: Triple,
        *,
        ffn_channels: int = 384,
        heads: int = 8,
        set_size: int = 48,
        window: tuple[int, int] = (12, 12),
        shift: tuple[int, int] = (6, 6),
    ) -> None:
        height = grid_shape[2]
        config = DsvtConfig(
            channels=channels,
            ffn_channels=ffn_channels,
            heads=heads,
            blocks=(1, 1),
            set_sizes=(set_size, set_size),
            windows=((*window, min(height, 32)), (*window, 1)),
            shifts=((0, 0, 0), (*shift, 0)),
            strides=((1, 1, height),),
        )
        super().__init__(config, grid_shape)
        self.channels = channels
        self.mask_token = nn.Parameter(torch.zeros(1, channels))

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, latent: DsvtOutput, coords: Tensor, hidden: Tensor, rows: Tensor | None = None
    ) -> Tensor:
        """Decodes all voxels; arguments and result as :meth:`VoxelDecoder.forward`."""
        feats = self.decode(latent.output, coords, hidden)
        return feats if rows is None else select_unique_rows(feats, rows)

    def decode(self, pillars: SparseVoxels, coords: Tensor, hidden: Tensor) -> Tensor:
        """The same from the encoder's pillars alone: (P, C) features at (P, 4) coordinates with z = 0.

        Args:
            pillars: visible tokens.
            coords: (M, 4) int32 of all voxels.
            hidden: (M,) bool.

        Returns:
            (M, C); voxels of one pillar share one row's values.
        """
        shape, column_shape = self.stage_shapes
        mask_coords = coords[hidden]
        tokens = torch.cat([pillars.feats, self.mask_token.to(pillars.feats.dtype).expand(len(mask_coords), -1)])
        token_coords = torch.cat([pillars.coords, mask_coords])
        tokens = self._run_stage(0, 0, SparseVoxels(token_coords, tokens, shape, pillars.batch_size))
        # Two tokens in one slot: the later one, a mask token, stays.
        taken = torch.isin(voxel_keys(pillars.coords, shape), voxel_keys(mask_coords, shape))
        kept = torch.cat([~taken, taken.new_ones(len(mask_coords))]).nonzero().squeeze(1)
        slots = SparseVoxels(token_coords[kept], select_unique_rows(tokens, kept), shape, pillars.batch_size)
        columns, _ = self.get_submodule("stage_0_reduction")(slots)
        feats = self._run_stage(1, 1, columns)
        column_of_voxel = torch.cat([coords[:, :3], torch.zeros_like(coords[:, :1])], dim=1)
        row = torch.searchsorted(voxel_keys(columns.coords, column_shape), voxel_keys(column_of_voxel, column_shape))
        return gather_rows(feats, row)
