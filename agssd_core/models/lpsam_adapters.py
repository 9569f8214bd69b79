"""What LP-SAM adds to SAM's image encoder: a CNN branch, adapters, smaller positions.

Source:
    SAMUS, Lin et al. 2023, arXiv:2309.06824, as the ANAUS code uses it. Up-projections start at
    0 here, so that a fresh adapter changes nothing of SAM's own blocks.
"""

from itertools import pairwise
from typing import Any

from torch import Tensor, nn


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of (B, C, H, W) maps."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, maps: Tensor) -> Tensor:
        """Normalise every pixel's channels."""
        normed: Tensor = self.norm(maps.permute(0, 2, 3, 1))
        return normed.permute(0, 3, 1, 2)


def convolution(before: int, after: int) -> nn.Sequential:
    """A 3x3 convolution, ChannelNorm and GELU; the size stays."""
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1), ChannelNorm(after), nn.GELU())


class Stem(nn.Module):
    """CNN branch: (B, 3, S, S) to (B, C, S / 8, S / 8), widths w, 2w, 4w, C."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        widths = (width, 2 * width, 4 * width, channels)
        parts: list[nn.Module] = [convolution(3, width)]
        for before, after in pairwise(widths):
            parts += [nn.MaxPool2d(2), convolution(before, after)]
        self.parts = nn.Sequential(*parts)

    def forward(self, images: Tensor) -> Tensor:
        """Local features on the token grid."""
        maps: Tensor = self.parts(images)
        return maps


class PositionDown(nn.Module):
    """SAM's position table at half its size, learned: (1, 2G, 2G, E) to (1, G, G, E)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.parts = nn.Sequential(nn.MaxPool2d(2), convolution(width, width))

    def forward(self, table: Tensor) -> Tensor:
        """Shrink the table."""
        small: Tensor = self.parts(table.permute(0, 3, 1, 2))
        return small.permute(0, 2, 3, 1)


class Bottleneck(nn.Module):
    """Linear to a quarter, GELU, linear back; ``(..., E)``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, max(width // 4, 1))
        self.act = nn.GELU()
        self.up = nn.Linear(max(width // 4, 1), width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """The change alone; the caller adds it."""
        change: Tensor = self.up(self.act(self.down(tokens)))
        return change


class GlobalAdapter(nn.Module):
    """A global block's additions: cross attention to the CNN branch, MLP adapter, refinement."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.cross = nn.MultiheadAttention(width, heads, batch_first=True)
        nn.init.zeros_(self.cross.out_proj.weight)
        nn.init.zeros_(self.cross.out_proj.bias)
        self.mlp = Bottleneck(width)
        self.refine = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, layer: Any, tokens: Tensor, local: Tensor) -> tuple[Tensor, Tensor]:
        """One of SAM's global blocks with the additions in place.

        Args:
            layer: a ``SamVisionLayer`` without windows.
            tokens: (B, G, G, E).
            local: (B, E, G, G), the CNN branch.

        Returns:
            Both, of the same shapes.
        """
        normed = layer.layer_norm1(tokens)
        keys = local.flatten(2).transpose(1, 2)
        seen, _ = self.cross(normed.flatten(1, 2), keys, keys, need_weights=False)
        attended, _ = layer.attn(normed + seen.view_as(normed))
        tokens = tokens + attended
        normed = layer.layer_norm2(tokens)
        tokens = tokens + layer.mlp(normed) + 0.5 * self.mlp(normed)
        return tokens, self.refine(local)
