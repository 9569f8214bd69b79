"""Student-only parts: reconstruction decoders and the predictor of dropped tokens."""

from typing import Protocol

import torch
from torch import Tensor, nn

from agssd_core.models.blocks import Block, CrossAttention
from agssd_core.models.precision import full
from agssd_core.models.tokens import Grid, PosEmbed

_DECODER_WIDTH, _DECODER_HEADS, _DECODER_DEPTH = 192, 6, 2


class Decoder(Protocol):
    """What both decoders do."""

    def __call__(self, tokens: Tensor, grid: Grid, index: Tensor | None = None) -> Tensor:
        """(M, N, E) tokens -> (M, N, p^3) voxels, or (P, p^3) of the tokens in ``index``."""
        ...


class LinearDecoder(nn.Module):
    """LayerNorm and one linear map from a token to its voxels.

    Source:
        A simple linear projection, as SMIT (Jiang et al. 2022, arXiv:2205.10342) describes it.
    """

    def __init__(self, width: int, patch_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, patch_size**3)

    def forward(self, tokens: Tensor, grid: Grid, index: Tensor | None = None) -> Tensor:  # noqa: ARG002 - same call as the other decoder
        """Reconstruct voxels.

        Args:
            tokens: (M, N, E).
            grid: token grid; not needed here.
            index: rows of the flattened (M * N) tokens to reconstruct; None is all.

        Returns:
            (M, N, p^3), or (P, p^3) with an index; float32, voxels in C order.
        """
        return _voxels(self.norm, self.out, _chosen(tokens, index))


class TransformerDecoder(nn.Module):
    """Two narrow blocks over all tokens, then a linear map to voxels.

    Source:
        He et al. 2022 (MAE), arXiv:2111.06377, section 3, "MAE decoder", smaller.
    """

    def __init__(self, width: int, patch_size: int, grid: Grid) -> None:
        super().__init__()
        narrow = _DECODER_WIDTH
        self.narrow = nn.Linear(width, narrow)
        self.pos_embed = PosEmbed(grid, narrow)
        self.blocks = nn.ModuleList(
            Block(narrow, _DECODER_HEADS, mlp_width=4 * narrow) for _ in range(_DECODER_DEPTH)
        )
        self.norm = nn.LayerNorm(narrow)
        self.out = nn.Linear(narrow, patch_size**3)

    def forward(self, tokens: Tensor, grid: Grid, index: Tensor | None = None) -> Tensor:
        """Reconstruct voxels; arguments and result as ``LinearDecoder.forward``."""
        tokens = self.pos_embed(self.narrow(tokens), grid=grid)
        for block in self.blocks:
            tokens = block(tokens)
        return _voxels(self.norm, self.out, _chosen(tokens, index))


class DroppedTokenPredictor(nn.Module):
    """Recovers hidden tokens from the visible ones by two cross-attention layers.

    Source:
        Assran et al. 2023 (I-JEPA), arXiv:2301.08243, section 3; cross-attention only, as
        Darcet et al. 2025 (CAPI), arXiv:2502.08769.
    """

    def __init__(self, width: int, heads: int, *, depth: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_CrossBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, queries: Tensor, visible: Tensor, mask: Tensor) -> Tensor:
        """Fill the grid.

        Args:
            queries: (M, N_hidden, E) mask token plus position of each hidden token.
            visible: (M, N_visible, E) encoder outputs, in grid order.
            mask: (M, N) bool, True where hidden.

        Returns:
            (M, N, E): visible tokens as given, hidden ones predicted.
        """
        for layer in self.layers:
            queries = layer(queries, visible)
        predicted = self.norm(queries)
        # Rank of each token among the hidden, or the visible, of its own row.
        order = torch.where(mask, mask.cumsum(1) - 1, (~mask).cumsum(1) - 1 + queries.shape[1])
        both = torch.cat([predicted, visible.to(predicted.dtype)], dim=1)
        return both.gather(1, order[..., None].expand(-1, -1, both.shape[-1]))


class _CrossBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm_context = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = CrossAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        queries = queries + self.attention(self.norm1(queries), self.norm_context(context))
        out: Tensor = queries + self.mlp(self.norm2(queries))
        return out


def _chosen(tokens: Tensor, index: Tensor | None) -> Tensor:
    return tokens if index is None else tokens.flatten(0, 1)[index]


def _voxels(norm: nn.Module, out: nn.Module, tokens: Tensor) -> Tensor:
    with torch.autocast(tokens.device.type, enabled=False):
        voxels: Tensor = out(norm(full(tokens)))
        return voxels
