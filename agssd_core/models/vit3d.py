"""The 3D vision transformer; its weights load into a plain MONAI ViT (evaluation.export)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from agssd_core.errors import ShapeError
from agssd_core.models.blocks import Block, draw_keep
from agssd_core.models.precision import recompute_contexts
from agssd_core.models.tokens import ClsToken, Grid, MaskToken, PosEmbed


@dataclass(frozen=True)
class VitShape:
    """Everything that fixes the encoder's arrays, and two options that do not.

    Attributes:
        image_size: (depth, height, width) of a global crop in voxels: the native grid.
        patch_size: edge of one token's cube in voxels.
        width: E. depth: blocks. heads: attention heads.
        drop_path: stochastic depth of the last block; the first has none, linear between.
        plain_attention: einsum in place of torch's fused attention.
        activation_checkpointing: recompute blocks in the backward pass.
    """

    image_size: Grid
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    pos_embed: Literal["learnable", "sincos"] = "learnable"
    drop_path: float = 0.0
    plain_attention: bool = False
    activation_checkpointing: bool = False

    @property
    def grid(self) -> Grid:
        """Native token grid."""
        return token_grid(self.image_size, self.patch_size)

    @property
    def mlp_width(self) -> int:
        """Hidden units of a block's MLP."""
        return int(self.width * self.mlp_ratio)


def token_grid(size: Grid | torch.Size, patch_size: int) -> Grid:
    """Tokens along each axis of a crop.

    Raises:
        ShapeError: a side is not a multiple of the patch size.
    """
    if any(side < patch_size or side % patch_size for side in size):
        raise ShapeError(
            f"a crop of {tuple(size)} voxels is not a multiple of the patch size {patch_size} on "
            "every side. Choose a crop size that is."
        )
    depth, height, breadth = (side // patch_size for side in size)
    return depth, height, breadth


class VisionTransformer3d(nn.Module):
    """ViT for one-channel volumes, with MONAI's arithmetic and our own tokens.

    Source:
        Dosovitskiy et al. 2021, arXiv:2010.11929; attention and MLP are MONAI's.
    """

    def __init__(self, shape: VitShape) -> None:
        super().__init__()
        self.shape = shape
        width = shape.width
        self.patch_embed = nn.Conv3d(1, width, shape.patch_size, stride=shape.patch_size)
        self.mask_token = MaskToken(width)
        self.pos_embed = PosEmbed(shape.grid, width, learnable=shape.pos_embed == "learnable")
        self.cls_token = ClsToken(width)
        self.blocks = nn.ModuleList(
            Block(
                width,
                shape.heads,
                mlp_width=shape.mlp_width,
                qkv_bias=shape.qkv_bias,
                plain_attention=shape.plain_attention,
            )
            for _ in range(shape.depth)
        )
        self.norm = nn.LayerNorm(width)
        self._rates = torch.linspace(0, shape.drop_path, shape.depth)

    def grid_of(self, crops: Tensor) -> Grid:
        """Token grid of (M, 1, D, H, W) crops."""
        return token_grid(crops.shape[2:], self.shape.patch_size)

    def forward_features(
        self,
        crops: Tensor,
        mask: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Encode crops, with hidden tokens replaced by the mask token.

        Args:
            crops: (M, 1, D, H, W) in [0, 1]; sides are multiples of the patch size.
            mask: (M, N) bool, True where hidden; None hides nothing.
            generator: CPU generator of stochastic depth, used only in training mode.

        Returns:
            cls token (M, E) and patch tokens (M, N, E), both after the last norm; tokens are in
            C order of (depth, height, width).

        Raises:
            ShapeError: the crop does not divide into patches, or the mask does not fit it.
        """
        tokens, grid = self._embed(crops)
        if mask is not None:
            _require_mask(mask, tokens)
            tokens = self.mask_token(tokens, mask)
        return self._encode(self.pos_embed(tokens, grid=grid), generator)

    def forward_visible(
        self, crops: Tensor, mask: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Encode only the visible tokens (``masking = drop``).

        Args:
            crops: (M, 1, D, H, W).
            mask: (M, N) bool with equally many True in every row.
            generator: CPU generator of stochastic depth.

        Returns:
            cls token (M, E) and the visible patch tokens (M, N_visible, E) in grid order.

        Raises:
            ShapeError: rows hide different numbers of tokens, or all of them.
        """
        tokens, grid = self._embed(crops)
        _require_mask(mask, tokens)
        return self._encode(take_rows(self.pos_embed(tokens, grid=grid), ~mask), generator)

    def mask_queries(self, mask: Tensor, grid: Grid) -> Tensor:
        """Mask token plus position at each hidden token, (M, N_hidden, E)."""
        blank = self.mask_token.weight.new_zeros(*mask.shape, self.shape.width)
        everywhere = torch.ones_like(mask)
        return take_rows(self.pos_embed(self.mask_token(blank, everywhere), grid=grid), mask)

    def forward(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        """``forward_features`` of unmasked crops."""
        return self.forward_features(crops)

    def _embed(self, crops: Tensor) -> tuple[Tensor, Grid]:
        grid = self.grid_of(crops)
        tokens: Tensor = self.patch_embed(crops)
        return tokens.flatten(2).transpose(1, 2), grid

    def _encode(self, tokens: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        tokens = self.cls_token(tokens)
        keep = self._draw_keep(tokens, generator)
        recompute = self.shape.activation_checkpointing and torch.is_grad_enabled()
        for number, block in enumerate(self.blocks):
            factors = None if keep is None else keep[number]
            if recompute:
                tokens = checkpoint(
                    block,
                    tokens,
                    factors,
                    use_reentrant=False,
                    preserve_rng_state=False,
                    context_fn=recompute_contexts,
                )
            else:
                tokens = block(tokens, factors)
        tokens = self.norm(tokens)
        return tokens[:, 0], tokens[:, 1:]

    def _draw_keep(self, tokens: Tensor, generator: torch.Generator | None) -> Tensor | None:
        if not self.training or self.shape.drop_path == 0:
            return None
        keep = draw_keep(self._rates, tokens.shape[0], generator=generator)
        return keep.to(tokens.device, non_blocking=True)


def take_rows(tokens: Tensor, chosen: Tensor) -> Tensor:
    """The chosen tokens of every row, (M, N, E) and (M, N) bool -> (M, n, E).

    Raises:
        ShapeError: rows choose different numbers, or none.
    """
    counts = chosen.sum(dim=1).tolist() or [1]
    least, most, total = min(counts), max(counts), chosen.shape[1]
    if least != most or most == 0:
        raise ShapeError(
            f"between {least} and {most} of {total} tokens are chosen in a crop; masking = drop "
            "needs the same number in every crop, and at least one. Use one mask ratio per batch."
        )
    return tokens[chosen].reshape(len(tokens), most, tokens.shape[-1])


def _require_mask(mask: Tensor, tokens: Tensor) -> None:
    if mask.shape != tokens.shape[:2]:
        raise ShapeError(
            f"a mask of shape {tuple(mask.shape)} does not fit {tuple(tokens.shape[:2])} crops x "
            "tokens. Draw masks on the token grid of these crops."
        )
