"""Distillation heads; they compute in float32 whatever the encoder's precision."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from agssd_core.models.precision import full


class NormLinear(nn.Module):
    """Linear layer without bias whose rows have norm 1.

    Explicit, in place of ``weight_norm``, which per-sample gradients cannot pass through.

    Source:
        Salimans & Kingma 2016, arXiv:1602.07868, Eq. 2 with g fixed to 1.
    """

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, width))
        nn.init.normal_(self.weight, std=width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., outputs)."""
        return F.linear(x, F.normalize(self.weight, dim=-1))


class DistillationHead(nn.Module):
    """MLP, L2 norm, then cosine with K prototypes.

    Args:
        width: E of the tokens. hidden: H. bottleneck: d_b. prototypes: K.

    Source:
        Caron et al. 2021, arXiv:2104.14294, appendix C, with a GELU MLP of three layers.
    """

    def __init__(self, width: int, *, hidden: int, bottleneck: int, prototypes: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )
        self.prototypes = NormLinear(bottleneck, prototypes)

    def embed(self, x: Tensor) -> Tensor:
        """(..., E) standardised tokens -> (..., d_b), unit vectors in float32."""
        with torch.autocast(x.device.type, enabled=False):
            return F.normalize(self.mlp(full(x)), dim=-1)

    def score(self, embedded: Tensor) -> Tensor:
        """(..., d_b) -> (..., K) logits in float32.

        Linear, so the mean logit of many tokens is the score of their mean embedding: centres
        need no (tokens, K) array.
        """
        with torch.autocast(embedded.device.type, enabled=False):
            logits: Tensor = self.prototypes(full(embedded))
            return logits

    def forward(self, x: Tensor) -> Tensor:
        """(..., E) standardised tokens -> (..., K) logits in [-1, 1], float32."""
        return self.score(self.embed(x))


class AlignPredictor(nn.Module):
    """Two-layer MLP that predicts the other view's teacher token (``cvaa.mode = align``)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., E) -> (..., E) float32."""
        with torch.autocast(tokens.device.type, enabled=False):
            predicted: Tensor = self.mlp(full(tokens))
            return predicted
