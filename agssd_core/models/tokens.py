"""Position, cls and mask tokens, each owned by a leaf module.

A leaf module whose only parameter is the token can be given its own per-sample gradient rule;
a bare parameter beside child modules cannot.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from agssd_core.models.precision import full

Grid = tuple[int, int, int]


def sincos_positions(grid: Grid, width: int, *, temperature: float = 10000.0) -> Tensor:
    """Fixed sine-cosine embedding of a token grid, in MONAI's channel order.

    Args:
        grid: tokens along depth, height, width.
        width: E, a multiple of 6.
        temperature: longest wavelength / 2 pi, in tokens.

    Returns:
        (1, N, E) float32; sines, then cosines, of height, of depth and of the third axis.

    Source:
        Vaswani et al. 2017, arXiv:1706.03762, section 3.5, one third of the channels per axis.
    """
    bands = width // 6
    frequency = temperature ** (-torch.arange(bands, dtype=torch.float32) / bands)
    axes = [torch.arange(side, dtype=torch.float32) for side in grid]
    depth, height, breadth = torch.meshgrid(*axes, indexing="ij")
    angles = [axis.flatten()[:, None] * frequency for axis in (height, depth, breadth)]
    return torch.cat([wave(a) for a in angles for wave in (torch.sin, torch.cos)], dim=1)[None]


class PosEmbed(nn.Module):
    """Adds a position embedding; a learnable one is trained, a fixed one is only a buffer.

    At its native grid the embedding is used untouched; at any other it is interpolated.
    """

    weight: Tensor

    def __init__(self, grid: Grid, width: int, *, learnable: bool = True) -> None:
        super().__init__()
        self.grid = grid
        if learnable:
            self.weight = nn.Parameter(torch.empty(1, grid[0] * grid[1] * grid[2], width))
            nn.init.trunc_normal_(self.weight, std=0.02)
        else:
            # Recomputed from the grid, so neither saved nor sent.
            self.register_buffer("weight", sincos_positions(grid, width), persistent=False)

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Add positions to (M, N, E) tokens that lie on ``grid``.

        Name ``grid`` in a call: hooks of per-patient gradients want tensors alone in its place.
        """
        return tokens + self.at(grid)

    def at(self, grid: Grid) -> Tensor:
        """The embedding at a grid, (1, N, E): trilinear, voxel-centre aligned."""
        if grid == self.grid:
            return self.weight
        cube = self.weight.transpose(1, 2).reshape(1, -1, *self.grid)
        cube = F.interpolate(full(cube), size=grid, mode="trilinear", align_corners=False)
        return cube.flatten(2).transpose(1, 2)


class ClsToken(nn.Module):
    """Puts the cls token in front of the patch tokens; it has no position."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, 1, width))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """(M, N, E) -> (M, 1 + N, E)."""
        first = self.weight.expand(tokens.shape[0], -1, -1).to(tokens.dtype)
        return torch.cat([first, tokens], dim=1)


class MaskToken(nn.Module):
    """Replaces hidden patch tokens, before positions are added.

    Source:
        Zhou et al. 2022 (iBOT), arXiv:2111.07832, section 3.1; Xie et al. 2022 (SimMIM).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, 1, width))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """(M, N, E) tokens and (M, N) bool, True where hidden -> (M, N, E)."""
        return torch.where(mask[..., None], self.weight.to(tokens.dtype), tokens)
