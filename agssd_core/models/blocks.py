"""Transformer blocks made of MONAI's attention and MLP, and cross-attention."""

import torch
from monai.networks.blocks import MLPBlock, SABlock
from torch import Tensor, nn
from torch.nn import functional as F

from agssd_core.models.precision import full


class Block(nn.Module):
    """Pre-norm self-attention block with MONAI's parameter names.

    MONAI's own ``TransformerBlock`` also owns ``norm_cross_attn``, which no forward uses; without
    it every parameter gets a gradient, and the export refills it.

    Args:
        width: E. heads: attention heads. mlp_width: hidden units of the MLP.
        qkv_bias: bias on query, key and value.
        plain_attention: attention by einsum in place of torch's fused kernel.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        mlp_width: int,
        qkv_bias: bool = True,
        plain_attention: bool = False,
    ) -> None:
        super().__init__()
        self.norm1: nn.Module = nn.LayerNorm(width)
        self.attn: nn.Module = SABlock(width, heads, qkv_bias=qkv_bias)
        # MONAI's ViT has no argument for it, but its attention reads this attribute.
        self.attn.use_flash_attention = not plain_attention
        self.norm2: nn.Module = nn.LayerNorm(width)
        self.mlp: nn.Module = MLPBlock(width, mlp_width)

    def forward(self, tokens: Tensor, keep: Tensor | None = None) -> Tensor:
        """Transform (M, N, E) tokens.

        Args:
            tokens: (M, N, E).
            keep: (2, M) factors of the attention and the MLP branch (see ``draw_keep``).
        """
        attended: Tensor = self.attn(self.norm1(tokens))
        tokens = tokens + (attended if keep is None else attended * _per_sample(keep[0], attended))
        mixed: Tensor = self.mlp(self.norm2(tokens))
        return tokens + (mixed if keep is None else mixed * _per_sample(keep[1], mixed))


def _per_sample(factor: Tensor, tokens: Tensor) -> Tensor:
    return factor.to(tokens.dtype)[:, None, None]


def draw_keep(rates: Tensor, count: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Draw stochastic depth for one pass: which residual branches each sample keeps.

    Drawn in one piece on the CPU, so that a seeded generator gives the same pass on every device
    and a recomputed (checkpointed) block sees the same factors.

    Args:
        rates: (L,) drop rates of the L blocks, in [0, 1).
        count: M samples.
        generator: a CPU generator; None is torch's global one.

    Returns:
        (L, 2, M) factors, 0 or 1 / (1 - rate).

    Source:
        Huang et al. 2016, arXiv:1603.09382, Eq. 2, scaled to keep the expectation.
    """
    survival = (1 - rates)[:, None, None]
    drawn = torch.rand(len(rates), 2, count, generator=generator)
    return (drawn < survival) / survival


class CrossAttention(nn.Module):
    """Multi-head attention of one token set to another, with an optional additive bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def _split(self, query: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = self.query(query).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = self.key_value(context).unflatten(-1, (2, self.heads, -1)).unbind(2)
        return q, key.transpose(1, 2), value.transpose(1, 2)

    def forward(
        self,
        query: Tensor,
        context: Tensor,
        bias: Tensor | None = None,
        factors: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: (B, N, E).
            context: (B, S, E).
            bias: additive, broadcastable to (B, h, N, S); -inf hides a key. Every row needs
                at least one finite entry.
            factors: (B, h, N, c) and (S, c), whose product is a further additive bias. It is
                computed in full precision: the terms of a distance nearly cancel.

        Returns:
            (B, N, E).
        """
        q, key, value = self._split(query, context)
        if factors is None:
            bias = None if bias is None else bias.to(q.dtype)
            mixed = F.scaled_dot_product_attention(q, key, value, attn_mask=bias)
        else:
            q, key = self._extended(q, key, factors)
            bias = None if bias is None else bias.to(q.dtype)
            # The fused kernel wants all three equally wide.
            value = F.pad(value.to(q.dtype), (0, q.shape[-1] - value.shape[-1]))
            with torch.autocast(q.device.type, enabled=False):
                mixed = F.scaled_dot_product_attention(q, key, value, attn_mask=bias, scale=1.0)
            mixed = mixed[..., : self.query.out_features // self.heads]
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out

    def with_rows(
        self,
        query: Tensor,
        context: Tensor,
        bias: Tensor | None = None,
        factors: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As ``forward``, and the attention rows (B, h, N, S) in float32, which sum to 1."""
        q, key, value = self._split(query, context)
        scores = full(q @ key.transpose(-1, -2)) * q.shape[-1] ** -0.5
        if factors is not None:
            with torch.autocast(q.device.type, enabled=False):
                scores = scores + factors[0] @ factors[1].T
        rows = (scores if bias is None else scores + full(bias)).softmax(dim=-1)
        out: Tensor = self.out((rows.to(value.dtype) @ value).transpose(1, 2).flatten(2))
        return out, rows

    @staticmethod
    def _extended(q: Tensor, key: Tensor, factors: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Queries (already scaled) and keys with the bias as further channels."""
        q_factors, key_factors = factors
        scaled = full(q) * q.shape[-1] ** -0.5
        shared = key_factors.expand(*key.shape[:2], -1, -1)
        return (
            torch.cat([scaled, q_factors.to(scaled)], dim=-1),
            torch.cat([full(key), shared.to(scaled)], dim=-1),
        )
