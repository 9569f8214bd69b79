"""CVAA: tokens of one view compensated by the tokens of the other view where both overlap."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from agssd_core.models.blocks import CrossAttention
from agssd_core.models.precision import full
from agssd_core.models.tokens import Grid

GeomBias = Literal["soft", "none", "hard"]
# Reach of a head in token pitches; the last is so wide that it is flat on any grid we use.
_INITIAL_SIGMA = (1.0, 2.0, 4.0, 64.0)


class ChannelGate(nn.Module):
    """Per-channel factor that starts at 0, so what it gates starts absent."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., E) -> (..., E)."""
        return self.weight * tokens


class GeometryBias(nn.Module):
    """Attention bias -d^2 / (2 sigma_h^2) with a learnable reach sigma_h of each head.

    The precision 1 / (2 sigma^2) is kept positive by a softplus, so a head can widen for ever.
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        sigma = torch.tensor([_INITIAL_SIGMA[h % len(_INITIAL_SIGMA)] for h in range(heads)])
        precision = 1 / (2 * sigma**2)
        self.weight = nn.Parameter(torch.log(torch.expm1(precision)))

    def forward(self, queries: Tensor) -> Tensor:
        """Query factors of the bias, whose product with ``key_factors`` it is.

        -w |q - k|^2 = 2 w q.k - w |k|^2 - w |q|^2, and the softmax ignores the last term, which
        is the same for all keys. So the bias joins the dot product of attention as four more
        channels, and no (N, S) array is ever written.

        Args:
            queries: (B, N, 3) places in token pitches, from the grid's midpoint.

        Returns:
            (B, h, N, 4).
        """
        weight = F.softplus(self.weight)[None, :, None, None]
        ones = torch.ones_like(queries[..., :1])
        return weight * torch.cat([2 * queries, -ones], dim=-1)[:, None]


def key_factors(grid: Grid, like: Tensor) -> Tensor:
    """Key factors of the bias: place in token pitches from the midpoint, its square, (S, 4)."""
    places = _key_places(grid, like)
    return torch.cat([places, places.square().sum(dim=-1, keepdim=True)], dim=-1)


def query_places(coords: Tensor, grid: Grid) -> Tensor:
    """Query centres (B, N, 3) in the other view's [-1, 1] frame, in its token pitches."""
    return coords * torch.tensor(grid, dtype=coords.dtype, device=coords.device) / 2


def token_offsets(coords: Tensor, grid: Grid) -> Tensor:
    """Distance from each query to each token of the other view along each axis.

    Args:
        coords: (B, N, 3) query centres in the other view's [-1, 1] frame.
        grid: the other view's token grid, S tokens.

    Returns:
        (B, N, S, 3) in token pitches of the other view.
    """
    return query_places(coords, grid)[:, :, None] - _key_places(grid, coords)


def _key_places(grid: Grid, like: Tensor) -> Tensor:
    axes = [
        torch.arange(side, dtype=like.dtype, device=like.device) - (side - 1) / 2 for side in grid
    ]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)


class CrossViewAttention(nn.Module):
    """Pre-norm cross-attention between views with a geometric bias and a gate that starts at 0.

    ``z + 1[centre_in] * gate * W_o(softmax(q k^T / sqrt(d) + bias) v)``. At the start this is the
    identity, bit for bit; tokens outside the overlap are never altered.

    Args:
        width: E. heads: attention heads.
        geom_bias: ``soft`` adds the learnable distance bias, ``hard`` hides keys further than
            one pitch along any axis, ``none`` leaves attention to the content.

    Source:
        After Yu & Dai 2026, doi 10.1109/TMI.2026.3680920 (abstract); the form is ours.
    """

    def __init__(self, width: int, heads: int, *, geom_bias: GeomBias = "soft") -> None:
        super().__init__()
        self.geom_bias = geom_bias
        self.norm_query = nn.LayerNorm(width)
        self.norm_context = nn.LayerNorm(width)
        self.attention = CrossAttention(width, heads)
        self.gate = ChannelGate(width)
        self.geometry = GeometryBias(heads) if geom_bias == "soft" else None

    def forward(
        self,
        tokens: Tensor,
        other: Tensor,
        coords: Tensor,
        centre_in: Tensor,
        key_mask: Tensor,
        grid: Grid,
    ) -> Tensor:
        """Fuse the tokens of one view with those of the other.

        Args:
            tokens: (B, N, E) of this view.
            other: (B, S, E) of the other view.
            coords: (B, N, 3) this view's token centres in the other's [-1, 1] frame.
            centre_in: (B, N) bool, centre inside the other view.
            key_mask: (B, S) bool, tokens of the other view that may be looked at.
            grid: token grid of the other view.

        Returns:
            (B, N, E); rows without any key come back unchanged.
        """
        mask, empty = self._mask(coords, key_mask, grid)
        mixed = self.attention(
            self.norm_query(tokens),
            self.norm_context(other),
            mask,
            self._factors(coords, grid),
        )
        return self._gated(tokens, mixed, centre_in & ~empty)

    def forward_with_rows(
        self,
        tokens: Tensor,
        other: Tensor,
        coords: Tensor,
        centre_in: Tensor,
        key_mask: Tensor,
        grid: Grid,
    ) -> tuple[Tensor, Tensor]:
        """As ``forward``, and the attention rows (B, h, N, S) in float32."""
        mask, empty = self._mask(coords, key_mask, grid)
        mixed, rows = self.attention.with_rows(
            self.norm_query(tokens),
            self.norm_context(other),
            mask,
            self._factors(coords, grid),
        )
        return self._gated(tokens, mixed, centre_in & ~empty), rows

    def _gated(self, tokens: Tensor, mixed: Tensor, active: Tensor) -> Tensor:
        return torch.where(active[..., None], tokens + self.gate(mixed), tokens)

    def _factors(self, coords: Tensor, grid: Grid) -> tuple[Tensor, Tensor] | None:
        if self.geometry is None:
            return None
        places = query_places(full(coords), grid)
        return self.geometry(places), key_factors(grid, places)

    def _mask(self, coords: Tensor, key_mask: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Additive mask (B, 1, 1 or N, S) of 0 and -inf, and which rows (B, 1 or N) see no key."""
        allowed = key_mask[:, None, :]
        if self.geom_bias == "hard":
            allowed = allowed & (token_offsets(full(coords), grid).abs().amax(dim=-1) <= 1)
        empty = ~allowed.any(dim=-1)
        # A row of -inf alone would be NaN: it sees everything, and its result is dropped.
        visible = (allowed | empty[..., None])[:, None]
        none = torch.zeros((), dtype=full(coords).dtype, device=coords.device)
        return torch.where(visible, none, float("-inf")), empty
