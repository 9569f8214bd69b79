"""The latent prompt engine: learned tokens that find the anatomies of a frame by themselves."""

import torch
from torch import Tensor, nn

from agssd_core.models.lpsam_adapters import Stem, convolution

HEAD_WIDTH = 32


class EngineBlock(nn.Module):
    """Image and tokens look at each other, both after looking at a CNN branch.

    ``updates_image`` is false in the last block, whose image output nobody reads.
    """

    def __init__(self, channels: int, *, updates_image: bool) -> None:
        super().__init__()
        self.local = convolution(channels, channels)
        self.fuse = nn.MultiheadAttention(channels, channels // HEAD_WIDTH, batch_first=True)
        self.to_tokens = _Update(channels)
        self.to_image = _Update(channels) if updates_image else None

    def forward(
        self, image: Tensor, tokens: Tensor, local: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Image (B, N, C), tokens (B, M, C), CNN branch (B, C, G, G), positions (1, N, C)."""
        local = self.local(local)
        keys = local.flatten(2).transpose(1, 2)
        fused, _ = self.fuse(image + positions, keys, keys, need_weights=False)
        found = self.to_tokens(tokens, fused)
        seen = image if self.to_image is None else self.to_image(fused, tokens)
        return seen, found, local


class LatentPromptEngine(nn.Module):
    """R prompts of T tokens each, from a frame and its embedding.

    Source:
        AutoPrompter of SAMUS (arXiv:2309.06824) as released with ANAUS, which has R = 1 and T = 2.
        The image update of its last block, computed there and dropped, is left out.
    """

    def __init__(self, channels: int, *, stem: int, regions: int, tokens: int, blocks: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(regions, tokens, channels))
        self.stem = Stem(stem, channels)
        self.blocks = nn.ModuleList(
            EngineBlock(channels, updates_image=index < blocks - 1) for index in range(blocks)
        )

    def forward(self, images: Tensor, embedding: Tensor, positions: Tensor) -> Tensor:
        """Prompts of every frame.

        Args:
            images: (B, 3, S, S), normalised.
            embedding: (B, C, G, G) of the image encoder.
            positions: (1, C, G, G).

        Returns:
            (B, R, T, C).
        """
        regions, count, channels = self.tokens.shape
        found = self.tokens.flatten(0, 1).expand(len(images), -1, -1)
        image = embedding.flatten(2).transpose(1, 2)
        places = positions.flatten(2).transpose(1, 2)
        local = self.stem(images)
        for block in self.blocks:
            image, found, local = block(image, found, local, places)
        return found.reshape(-1, regions, count, channels)


class _Update(nn.Module):
    """Attention with a residual, LayerNorm and a linear layer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(channels, channels // HEAD_WIDTH, batch_first=True)
        self.norm = nn.LayerNorm(channels)
        self.linear = nn.Linear(channels, channels)

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        changed, _ = self.attention(queries, keys, keys, need_weights=False)
        updated: Tensor = self.linear(self.norm(changed + queries))
        return updated
