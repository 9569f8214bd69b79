"""SAM's image encoder at an eighth of the image's edge, with adapters."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.sam.configuration_sam import SamVisionConfig
from transformers.models.sam.modeling_sam import SamVisionLayer, SamVisionNeck

from agssd_core.models.lpsam_adapters import Bottleneck, GlobalAdapter, PositionDown, Stem

STRIDE = 8
KERNEL = 16


@dataclass(frozen=True)
class LpsamShape:
    """Everything that fixes LP-SAM's arrays; the defaults are SAM ViT-B.

    Attributes:
        image_size: edge S of the padded input, pixels; the token grid is S / 8.
        width: E of the encoder. channels: C of embedding, prompts and decoder, a multiple of 32.
        window: tokens along a window of the blocks that are not global.
        stem: first width of both CNN branches.
        regions: R prompts of T ``tokens`` each; ``blocks`` of the engine.
    """

    image_size: int = 256
    width: int = 768
    depth: int = 12
    heads: int = 12
    window: int = 14
    global_blocks: tuple[int, ...] = (2, 5, 8, 11)
    channels: int = 256
    decoder_mlp: int = 2048
    stem: int = 64
    regions: int = 8
    tokens: int = 2
    blocks: int = 4

    @property
    def grid(self) -> int:
        """Tokens along an edge."""
        return self.image_size // STRIDE

    @property
    def mask_size(self) -> int:
        """Edge of a mask, pixels."""
        return 4 * self.grid


def vision_config(shape: LpsamShape) -> SamVisionConfig:
    """The same numbers for transformers' parts."""
    return SamVisionConfig(
        hidden_size=shape.width,
        output_channels=shape.channels,
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.heads,
        image_size=shape.image_size,
        patch_size=STRIDE,
        window_size=shape.window,
        global_attn_indexes=list(shape.global_blocks),
        num_pos_feats=shape.channels // 2,
        mlp_dim=4 * shape.width,
        attn_implementation="sdpa",
    )


class ImageEncoder(nn.Module):
    """(B, 3, S, S) to (B, C, S / 8, S / 8)."""

    def __init__(self, shape: LpsamShape) -> None:
        super().__init__()
        self.shape = shape
        config = vision_config(shape)
        self.patch_embed = nn.Conv2d(3, shape.width, KERNEL, stride=STRIDE)
        self.pos_embed = nn.Parameter(
            0.02 * torch.randn(1, 2 * shape.grid, 2 * shape.grid, shape.width)
        )
        self.layers = nn.ModuleList(
            SamVisionLayer(config, 0 if index in shape.global_blocks else shape.window)
            for index in range(shape.depth)
        )
        self.neck = SamVisionNeck(config)
        self.stem = Stem(shape.stem, shape.width)
        self.position_down = PositionDown(shape.width)
        self.input_adapter = Bottleneck(shape.width)
        self.adapters = nn.ModuleDict(
            {str(index): GlobalAdapter(shape.width, shape.heads) for index in shape.global_blocks}
        )

    def forward(self, images: Tensor) -> Tensor:
        """Encode normalised images, already padded to S x S."""
        # 8 more pixels make overlapping 16-pixel patches cover exactly S / 8 steps.
        side = self.shape.image_size + KERNEL - STRIDE
        wide = F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False)
        tokens = self.patch_embed(wide).permute(0, 2, 3, 1)
        tokens = tokens + self.input_adapter(tokens)
        tokens = tokens + self.position_down(self.pos_embed)
        local = self.stem(images)
        for index, layer in enumerate(self.layers):
            if index in self.shape.global_blocks:
                tokens, local = self.adapters[str(index)](layer, tokens, local)
            else:
                tokens = layer(tokens)
        embedding: Tensor = self.neck(tokens + 0.5 * local.permute(0, 2, 3, 1))
        return embedding
